"""The weights that come with the package: what they are, and that they see what they should."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastscnn_fast import FastSCNN, fuse, load_checkpoint, segment
from fastscnn_fast.checkpoints import CAMVID11, read_details
from fastscnn_fast.data.classes import CAMVID_CLASSES, CAMVID_IGNORE, CAMVID_PALETTE
from fastscnn_fast.data.datasets import Examples
from fastscnn_fast.data.sources import Streets, open_source
from fastscnn_fast.train.evaluate import compare, labeller, score

CAMVID = os.environ.get("FASTSCNN_CAMVID", "")


@pytest.fixture(scope="module")
def model() -> FastSCNN:
    return load_checkpoint()


def test_what_they_are(model: FastSCNN) -> None:
    assert CAMVID11.stat().st_size < 2_600_000
    details = read_details(CAMVID11)
    assert tuple(details["classes"]) == CAMVID_CLASSES
    assert [tuple(colour) for colour in details["palette"]] == list(CAMVID_PALETTE)
    assert details["command"].startswith("python -m fastscnn_fast train")
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
def test_on_camvid(model: FastSCNN) -> None:
    """The score in the metadata is that of the file; fused and plain agree."""
    examples = Examples(open_source(CAMVID, "val", len(CAMVID_CLASSES), CAMVID_IGNORE))
    runs = {name: labeller(model, name, torch.float32) for name in ("plain", "auto")}
    scores, equal, _ = compare(runs, examples)
    assert abs(scores["plain"].miou - scores["auto"].miou) < 1e-4 and equal["auto"] >= 0.9999
    assert scores["plain"].miou == pytest.approx(read_details(CAMVID11)["miou"], abs=2e-4)


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
