"""The weights that come with the package: what they are, and that they see what they should."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from fastscnn_fast import FastSCNN, Weights, fuse, load_checkpoint, segment
from fastscnn_fast.checkpoints import SHIPPED, read_details
from fastscnn_fast.cli import main
from fastscnn_fast.data.classes import CAMVID_CLASSES, CAMVID_IGNORE, CAMVID_PALETTE
from fastscnn_fast.data.datasets import Examples
from fastscnn_fast.data.sources import Streets, open_source
from fastscnn_fast.program.arithmetic import ARITHMETICS
from fastscnn_fast.train.evaluate import compare, labeller, score

CAMVID = os.environ.get("FASTSCNN_CAMVID", "")


@pytest.fixture(scope="module", params=SHIPPED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> FastSCNN:
    return load_checkpoint(name)


def test_what_they_are(model: FastSCNN, name: str) -> None:
    assert SHIPPED[name].stat().st_size < 2_600_000
    details = read_details(name)
    assert tuple(details["classes"]) == CAMVID_CLASSES
    assert [tuple(colour) for colour in details["palette"]] == list(CAMVID_PALETTE)
    command = "prune" if name.endswith("slim") else "train"
    assert details["command"].startswith(f"python -m fastscnn_fast {command} camvid ")
    assert details["recipe"]["preset"] == "paper" and 0.6 <= details["miou"] < 1
    assert model.config.num_classes == 11 and not model.training
    assert next(model.parameters()).dtype == torch.float32


def test_they_have_ranges_by_which_int8_labels_alike(model: FastSCNN) -> None:
    scenes = Examples(Streets(2, seed=2_000_000))
    runs = {str(t): labeller(model, "auto", t) for t in (torch.float32, torch.int8)}
    scores, equal, _ = compare(runs, scenes)
    assert equal["torch.int8"] > 0.99
    assert abs(scores["torch.int8"].miou - scores["torch.float32"].miou) < 0.01


def test_they_label_streets_never_seen(model: FastSCNN) -> None:
    """Procedural scenes beyond those of training, at their own shape and at a panorama's."""
    for size, accuracy, miou in (((360, 480), 0.85, 0.55), ((400, 900), 0.75, 0.45)):
        scenes = Examples(Streets(6, seed=2_000_000, size=size))
        scores = score(labeller(model, "auto", torch.float32), scenes)
        table = scores.table(CAMVID_CLASSES)
        assert scores.accuracy > accuracy and scores.miou > miou, table


@pytest.mark.slow
@pytest.mark.skipif(not CAMVID, reason="FASTSCNN_CAMVID names no CamVid folder")
def test_on_camvid(model: FastSCNN, name: str) -> None:
    """The score in the metadata is that of the file; fused and plain agree."""
    examples = Examples(open_source(CAMVID, "val", len(CAMVID_CLASSES), CAMVID_IGNORE))
    runs = {name: labeller(model, name, torch.float32) for name in ("plain", "auto")}
    scores, equal, _ = compare(runs, examples)
    assert abs(scores["plain"].miou - scores["auto"].miou) < 1e-4 and equal["auto"] >= 0.9999
    assert scores["plain"].miou == pytest.approx(read_details(name)["miou"], abs=2e-4)


def test_segment_uses_the_size_of_training(model: FastSCNN, tmp_path: Path) -> None:
    assert model.config.size is not None
    height, width = model.config.size
    picture, _ = Streets(1, seed=2_000_010).read(0)
    fast = fuse(model)
    Image.fromarray(picture).save(tmp_path / "street.png")
    labels = segment(fast, tmp_path / "street.png")
    assert labels.shape == picture.shape[:2]
    assert np.array_equal(labels, segment(fast, picture, (height, width)))
    assert (labels != segment(fast, picture, picture.shape[:2])).any()


def test_they_are_listed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By `info` as by `Weights`, with the operations that torch counts."""
    meta = Weights(name).meta
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        load_checkpoint(name).reference(torch.zeros(1, 3, 512, 1024))
    assert meta["operations"] == counter.get_total_flops()
    assert main(["info"]) == 0
    miou, flop = f"{meta['metrics']['miou']:.3f}", f"{meta['operations'] / 1e9:.2f}"
    size = f"{SHIPPED[name].stat().st_size / 1e6:.1f}"
    shown = f"  {name}: 11 classes, mIoU {miou}, {flop} GFLOP, {size} MB (Sky, Building, "
    assert shown in capsys.readouterr().out


def test_slim_is_half_of_full() -> None:
    """In operations, with ranges for int8, and no worse by more than a hundredth."""
    full, slim = Weights.CAMVID11.meta, Weights.CAMVID11_SLIM.meta
    assert slim["operations"] <= 0.5 * full["operations"]
    assert slim["metrics"]["miou"] >= full["metrics"]["miou"] - 0.01
    model = load_checkpoint(Weights.CAMVID11_SLIM)
    widths = [w for stage in model.config.bottlenecks for mid, out, _ in stage for w in (mid, out)]
    assert model.ranges and all(
        w % ARITHMETICS[read_details("camvid11-slim")["pruned by"]["arithmetic"]].channels == 0
        for w in widths
    )
