"""Scores by hand and by brute force, on full-size labels; the command's comparison and files."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_network
from PIL import Image

from fastscnn_fast.arch.config import Config
from fastscnn_fast.backends import registry
from fastscnn_fast.checkpoints import read_details, save_checkpoint
from fastscnn_fast.cli import main
from fastscnn_fast.data.datasets import Examples
from fastscnn_fast.data.sources import Streets
from fastscnn_fast.runtime.segment import labelled
from fastscnn_fast.train import evaluate
from fastscnn_fast.train.evaluate import Confusion


def test_confusion_by_hand() -> None:
    confusion = Confusion(3)
    labels = np.array([[0, 0, 1], [1, 255, 0]], np.uint8)
    confusion.add(labels, np.array([[0, 1, 1], [1, 2, 0]], np.uint8))
    assert confusion.matrix.tolist() == [[2, 1, 0], [0, 2, 0], [0, 0, 0]]
    assert confusion.iou[:2].tolist() == pytest.approx([2 / 3, 2 / 3])
    assert math.isnan(confusion.iou[2])  # neither there nor predicted
    assert confusion.miou == pytest.approx(2 / 3) and confusion.accuracy == pytest.approx(4 / 5)
    confusion.add(labels, np.full((2, 3), 2, np.uint8))
    assert confusion.iou[2] == 0 and confusion.miou == pytest.approx((2 / 6 + 2 / 5 + 0) / 3)
    never = Confusion(3)
    never.add(np.array([[0, 0, 1, 255]], np.uint8), np.array([[0, 1, 1, 2]], np.uint8))
    *rows, mean, accuracy = never.table(["a", "b", "c"]).splitlines()
    assert rows[-1].split() == ["c", "-", "-", "-", "0"]
    assert mean.split(maxsplit=2) == ["mIoU", "0.5000", "without c: neither there nor predicted"]
    assert accuracy.split() == ["pixel", "accuracy", "0.6667"] and "nan" not in "".join(rows)
    with pytest.raises(ValueError, match="predicted must be labels of 0 to 2, got 4"):
        never.add(np.zeros((1, 1), np.uint8), np.full((1, 1), 4, np.uint8))
    empty = Confusion(2)
    assert "nan" not in empty.table(["a", "b"])
    assert math.isnan(empty.miou) and math.isnan(empty.accuracy)


def test_confusion_by_brute_force(seed: int) -> None:
    rng, classes = np.random.default_rng(seed), 7
    confusion, pairs = Confusion(classes), []
    for _ in range(3):
        labels = rng.integers(0, classes + 2, (9, 11), np.uint8)
        predicted = rng.integers(0, classes, (9, 11), np.uint8)
        confusion.add(labels, predicted)
        pairs += list(zip(labels.ravel().tolist(), predicted.ravel().tolist()))
    for k in range(classes):
        hit = sum(pair == (k, k) for pair in pairs)
        union = sum(pair[0] < classes and k in pair for pair in pairs)
        assert confusion.iou[k] == pytest.approx(hit / union)
    right = sum(a == b for a, b in pairs)
    assert confusion.accuracy == pytest.approx(right / sum(a < classes for a, _ in pairs))
    table = confusion.table([f"c{k}" for k in range(classes)])
    assert f"{confusion.miou:.4f}" in table and len(table.splitlines()) == classes + 3


def test_predictions_have_the_pictures_size(seed: int) -> None:
    """Also where the network runs at another size: the one asked for, or as many pixels as its config's."""
    picture = np.random.default_rng(seed).integers(0, 256, (50, 70, 3), np.uint8)
    sizes = []

    def halves(x: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(x.shape[2:]))
        labels = torch.zeros(1, *x.shape[2:], dtype=torch.uint8)
        labels[..., x.shape[3] // 2 :] = 1
        return labels

    for trained_at, size in (
        (None, None),
        ((150, 84), None),
        ((150, 84), (64, 64)),
        (None, (64, 64)),
    ):
        labels = labelled(halves, Config(size=trained_at), picture, size)
        assert labels.shape == (50, 70)
        assert (labels[:, :35] == 0).all() and (labels[:, 35:] == 1).all()
    assert sizes == [(50, 70), (95, 133), (64, 64), (64, 64)]


def test_score_of_some_examples() -> None:
    examples = Examples(Streets(3, 0, (64, 64)))

    def sky(picture: np.ndarray) -> np.ndarray:
        return np.zeros(picture.shape[:2], np.uint8)

    parts = [evaluate.score(sky, examples, range(r, 3, 2)).matrix for r in (0, 1)]
    whole = evaluate.score(sky, examples)
    assert np.array_equal(parts[0] + parts[1], whole.matrix)
    assert np.array_equal(whole.matrix.sum(1), examples.pixels)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights of a small network of CamVid's classes that predicts many of them."""
    model = small_network(11, size=(64, 96))
    path = tmp_path / "weights.safetensors"
    save_checkpoint(model, path, {"miou": 0.25})
    return path


def test_command(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert read_details(weights) == {"miou": 0.25}
    out = tmp_path / "out"
    arguments = ["evaluate", "streets:2", "--weights", str(weights), "-o", str(out)]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "2 pictures, trained at 64x96" in text and "Bicyclist" in text
    rows = re.findall(
        r"^(plain|fused).*?([\d.]+)\s+([+-][\d.]+)\s+([\d.]+)\s+([\d.]+) %", text, re.M
    )
    assert [row[0] for row in rows] == ["plain", "fused", "fused", "fused"]
    assert float(rows[0][2]) == 0 and float(rows[0][4]) == 100
    assert abs(float(rows[1][2])) < 1e-4 and float(rows[1][4]) > 99.9
    assert all(float(row[4]) > 90 for row in rows)
    with (out / "confusion.csv").open() as file:
        table = list(csv.reader(file))
    assert len(table) == 12 and sum(int(v) for row in table[1:] for v in row[1:-1]) > 300_000
    with Image.open(out / "confusion.png") as image:
        assert image.size[0] > 400

    assert main([*arguments[:4], "--size", "96x128", "--dtype", "float32"]) == 0
    text = capsys.readouterr().out
    assert "2 pictures, run at 96x128" in text and "bfloat16" not in text

    assert main([*arguments[:4], "--precision", "high", "--dtype", "float32", "bfloat16"]) == 0
    text = capsys.readouterr().out
    assert ("float32, high " in text) == bool(registry.isas("high"))
    assert re.search("bfloat16 .* %", text) and "bfloat16, high" not in text


def test_command_refuses(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(small_network(4), tmp_path / "four.safetensors")
    assert main(["evaluate", "streets:1", "--weights", str(tmp_path / "four.safetensors")]) == 2
    assert "has 4 classes, streets:1 has 11" in capsys.readouterr().err
    save_checkpoint(small_network(1), tmp_path / "one.safetensors")
    assert main(["evaluate", "streets:1", "--weights", str(tmp_path / "one.safetensors")]) == 2
    assert "has 1 class, streets:1 has 11" in capsys.readouterr().err
    names = {"classes": [f"kind {k}" for k in range(11)]}
    save_checkpoint(small_network(11), tmp_path / "other.safetensors", names)
    assert main(["evaluate", "streets:1", "--weights", str(tmp_path / "other.safetensors")]) == 2
    assert "has classes kind 0, kind 1" in capsys.readouterr().err
    unnamed = tmp_path / "unnamed"  # the names are those of the weights
    for kind, pixels in zip(("images", "labels"), Streets(1, 0, (64, 64)).read(0)):
        (unnamed / "val" / kind).mkdir(parents=True)
        Image.fromarray(pixels).save(unnamed / "val" / kind / "a.png")
    words = [str(unnamed), "--classes", "11", "--ignore", "11", "--dtype", "float32"]
    assert main(["evaluate", *words, "--weights", str(tmp_path / "other.safetensors")]) == 0
    assert "kind 10" in capsys.readouterr().out
    for words, message in (
        (["streets:0"], "must be followed by a number above 0"),
        (["streets:1", "--split", "test"], "split of streets must be train or val, got 'test'"),
        (["streets:1", "--classes", "5"], "--classes must be left out"),
        (["streets:1", "--ignore", "5"], "--ignore must be left out"),
    ):
        assert main(["evaluate", *words, "--weights", str(weights)]) == 2
        assert message in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "no"), "--weights", str(weights)]) == 2
    assert "no: no such folder" in capsys.readouterr().err
