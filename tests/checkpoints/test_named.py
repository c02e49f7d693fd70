"""The weights that come with the package, by name."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastscnn_fast import Weights, fuse, load_checkpoint, segment
from fastscnn_fast.checkpoints import (
    CAMVID11,
    CheckpointError,
    located,
    read,
    read_details,
    stored_dtype,
)
from fastscnn_fast.data.classes import CAMVID_CLASSES, CAMVID_PALETTE
from fastscnn_fast.data.scenes import street
from fastscnn_fast.program.program import operations


def test_each_file_has_a_name_and_each_name_a_file() -> None:
    assert {each.path for each in Weights} == set(CAMVID11.parent.glob("*.safetensors"))
    assert Weights.DEFAULT is Weights("camvid11") and Weights.DEFAULT.path == CAMVID11
    assert str(Weights.CAMVID11) == "camvid11" and os.fspath(Weights.CAMVID11) == str(CAMVID11)
    with pytest.raises(ValueError, match="^Weights must be one of camvid11.*, got 'camvid12'"):
        Weights("camvid12")


@pytest.mark.parametrize("weights", Weights, ids=str)
def test_what_they_know(weights: Weights) -> None:
    meta, model = weights.meta, load_checkpoint(weights)
    assert meta["categories"] == CAMVID_CLASSES and meta["palette"] == CAMVID_PALETTE
    assert meta["num_params"] == sum(p.numel() for p in model.parameters())
    assert meta["min_size"] == (32, 32) and meta["size"] == model.config.size
    assert 0.5 < meta["metrics"]["miou"] == read_details(weights)["miou"]
    assert list(meta["metrics"]["iou"]) == list(CAMVID_CLASSES)
    assert meta["operations"] == operations(model.config, 512, 1024)
    assert meta["bytes"] == weights.path.stat().st_size
    made_by = "prune" if str(weights).endswith("slim") else "train"
    assert meta["command"].startswith(f"python -m fastscnn_fast {made_by} camvid ")
    assert meta["recipe"]["batch"]


def test_their_transform_is_what_segment_does() -> None:
    picture = street(3, 90, 120)[0]
    transform, fast = Weights.CAMVID11.transforms(), fuse(load_checkpoint(Weights.CAMVID11))
    x = transform(picture)
    assert x.dtype == torch.uint8 and x.shape == (3, 720, 960)
    small = Weights.CAMVID11.transforms((90, 120))
    assert np.array_equal(fast.labels(small(picture)[None])[0], segment(fast, picture, (90, 120)))


def test_their_transform_makes_batches_in_a_loader() -> None:
    """Pictures of different sizes, and it can be pickled, as workers want it."""
    transform = pickle.loads(pickle.dumps(Weights.CAMVID11.transforms(64)))
    pictures = [transform(street(seed, 48 + seed, 64)[0]) for seed in range(4)]
    batches = list(DataLoader(pictures, batch_size=2))  # type: ignore[arg-type]
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 64, 64)] * 2
    with pytest.raises(ValueError, match=r"^size must be .*16"):
        Weights.CAMVID11.transforms(16)(street(0, 48, 64)[0])


def test_a_file_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert located("camvid11") == CAMVID11 and located("other.pth") == Path("other.pth")
    assert load_checkpoint("camvid11").config == load_checkpoint().config
    assert read_details("camvid11") == read_details(CAMVID11)
    assert stored_dtype("camvid11") == stored_dtype(CAMVID11)
    assert read("camvid11")[1] == load_checkpoint().config
    with pytest.raises(
        FileNotFoundError, match=r"nor are weights of that name in the package \(camvid11"
    ):
        load_checkpoint("camvid12")
    Path("camvid11").touch()
    assert located("camvid11") == Path("camvid11")
    with pytest.raises(CheckpointError, match="camvid11"):
        load_checkpoint("camvid11")
