"""The recipe's parts, and runs: they learn, stop and go on to the same bits, and share a batch over processes."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import randomise, threads
from PIL import Image
from torch import Tensor, nn

from fastscnn_fast import FastSCNN, load_checkpoint
from fastscnn_fast.checkpoints import read_details, save_checkpoint
from fastscnn_fast.cli import main, train as command_line
from fastscnn_fast.data.classes import CAMVID_CLASSES, CAMVID_PALETTE, colours_of, numbered
from fastscnn_fast.data.datasets import Batch, Examples
from fastscnn_fast.data.scenes import street
from fastscnn_fast.data.sources import Streets, open_source
from fastscnn_fast.train import files, trainer as train
from fastscnn_fast.train.dice import upsampled_dice
from fastscnn_fast.train.evaluate import labeller, score
from fastscnn_fast.train.ops import low_logits, normalised
from fastscnn_fast.train.recipe import Recipe, learning_rate
from fastscnn_fast.train.step import class_weights, parameter_groups, update_average
from fastscnn_fast.train.trainer import Trainer

SMALL = Recipe(
    epochs=3,
    batch=4,
    crop=(64, 64),
    dtype="float32",
    ema=0.9,
    photo=0.5,
    class_weights=1.1,
    paste=2.0,
    mix=0.2,
    style=0.5,
    weather=0.5,
)


@pytest.fixture(scope="module")
def streets() -> Examples:
    return Examples(Streets(8, 0, (72, 96)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight streets to learn from and three to choose by, as files."""
    root = tmp_path_factory.mktemp("streets")
    for split, seeds in (("train", range(8)), ("val", range(50, 53))):
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True)
        for seed in seeds:
            picture, labels = street(seed, 72, 96)
            Image.fromarray(picture).save(root / split / "images" / f"{seed}.png")
            labels[labels == 11] = 255
            Image.fromarray(labels).save(root / split / "labels" / f"{seed}.png")
    return root


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Every tensor that a run leaves behind."""
    state = {f"model.{k}": v for k, v in trainer.model.state_dict().items()}
    if trainer.average is not None:
        state |= {f"average.{k}": v for k, v in trainer.average.state_dict().items()}
    for index, values in trainer.optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{k}": v for k, v in values.items() if v is not None}
    return state


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


# --- parts -----------------------------------------------------------------------------------------------


def test_defaults_are_the_papers() -> None:
    recipe = Recipe()
    assert (recipe.lr, recipe.batch, recipe.weight_decay, recipe.aux_weight) == (
        0.045,
        12,
        4e-5,
        0.4,
    )
    assert (recipe.epochs, recipe.scale, recipe.flip) == (1000, (0.5, 2.0), True)
    assert (
        recipe.class_weights == recipe.ohem == recipe.ema == recipe.smoothing == recipe.streets == 0
    )


def test_learning_rate() -> None:
    assert learning_rate(Recipe(), 0, 100) == pytest.approx(0.045)
    assert learning_rate(Recipe(batch=24), 50, 100) == pytest.approx(0.09 * 0.5**0.9)
    assert learning_rate(Recipe(), 99, 100) == pytest.approx(0.045 * 0.01**0.9)


def test_what_decays() -> None:
    model = FastSCNN(5, aux=True)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, rest = parameter_groups(model, 4e-5)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (4e-5, 0.0)
    assert len(decayed["params"]) + len(rest["params"]) == len(names)
    for p in decayed["params"]:
        assert names[id(p)].endswith("conv.weight") and p.shape[1] > 1
    for p in rest["params"]:
        depthwise = p.dim() == 4 and p.shape[1] == 1 and p.shape[0] > 11
        assert p.dim() == 1 or depthwise, names[id(p)]


def test_class_weights(streets: Examples) -> None:
    assert class_weights(Recipe(), streets) is None
    weights = class_weights(Recipe(class_weights=1.1), streets)
    f = streets.pixels / streets.pixels.sum()
    assert weights is not None and (f * weights).sum() == pytest.approx(1)
    rare, common = int(f.argmin()), int(f.argmax())
    ratio = np.log(1.1 + f[common]) / np.log(1.1 + f[rare])
    assert weights[rare] / weights[common] == pytest.approx(ratio)


def test_class_weights_by_value(streets: Examples, tmp_path: Path) -> None:
    values = tuple(float(k) for k in range(11))
    assert class_weights(Recipe(class_weights=values), streets) == list(values)
    assert class_weights(Recipe(class_weights=[1.5]), streets) == class_weights(
        Recipe(class_weights=1.5), streets
    )
    trainer = Trainer(dataclasses.replace(SMALL, class_weights=values), streets, None, tmp_path)
    assert trainer.targets.weight[:11].tolist() == list(values)
    with pytest.raises(
        ValueError, match=r"class_weights must be one number, or one for each class \(11\), got 2"
    ):
        Trainer(dataclasses.replace(SMALL, class_weights=(1.0, 2.0)), streets, None, tmp_path)


def test_moving_average() -> None:
    model, average = FastSCNN(3), FastSCNN(3)
    expected = average.state_dict()["classifier.conv.weight"].clone()
    for step in range(30):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.classifier.conv.weight.detach()
        update_average(average, model, 0.9, step)
    assert torch.allclose(average.classifier.conv.weight, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch", 0),
        ("lr", -1.0),
        ("scale", (2.0, 0.5)),
        ("class_weights", 0.5),
        ("class_weights", (1.0, -1.0)),
        ("class_weights", (0.0, 0.0)),
        ("class_weights", (1.0, float("nan"))),
        ("class_weights", ()),
        ("dice", -1.0),
        ("ema", 1.0),
        ("smoothing", 1.0),
        ("colour", 1.0),
        ("dropout", 1.0),
        ("paste", -1.0),
        ("mix", 1.5),
        ("style", -0.5),
        ("weather", 2.0),
        ("seed", -1),
        ("seed", 2**63),
        ("scale", (1.0,)),
        ("scale", 1.0),
        ("batch", 2.5),
        ("accumulate", True),
        ("epochs", "3"),
        ("flip", 0),
        ("crop", (31, 64)),
        ("crop", (64,)),
        ("size", 8),
        ("size", "64x64"),
        ("epochs", float("inf")),
        ("aux_weight", float("nan")),
    ],
)
def test_recipe_refuses(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} must .*, got "):
        Recipe(**{field: value})


def test_recipe_takes_what_means_the_same() -> None:
    given = Recipe(crop=64, size=[64, 96], scale=[1, 2], weights=Path("a.pth"))  # type: ignore[arg-type]
    assert given == Recipe(crop=(64, 64), size=(64, 96), scale=(1, 2), weights="a.pth")


def test_every_field_is_an_option(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    command_line.add_options(parser)
    changed = {"flip": False, "freeze_bn": True, "scale": (0.75, 1.5), "size": (64, 96), "seed": 3}
    words = ["--no-flip", "--freeze-bn", "--scale", "0.75", "1.5", "--size", "64x96", "--seed", "3"]
    args = parser.parse_args(["DATA", "-o", str(tmp_path), *words])
    fields = [field.name for field in dataclasses.fields(Recipe)]
    assert Recipe(**{name: getattr(args, name) for name in fields}) == Recipe(**changed)


# --- runs ------------------------------------------------------------------------------------------------


def test_it_learns(streets: Examples, tmp_path: Path) -> None:
    recipe = Recipe(
        epochs=20,
        batch=4,
        lr=0.1,
        crop=(64, 96),
        scale=(1, 1),
        colour=0,
        dropout=0,
        dtype="float32",
    )
    trainer = Trainer(recipe, streets, streets, tmp_path, validations=4, command="the command")
    assert trainer.steps == 40 and trainer.run() == 0
    losses = [row["loss"] for row in trainer.history]
    assert len(losses) == 4 and losses[-1] < 0.6 * losses[0]
    best = load_checkpoint(tmp_path / "best.safetensors")
    assert not best.training and not best.config.aux
    details = read_details(tmp_path / "best.safetensors")
    assert details["command"] == "the command" and details["classes"] == list(streets.classes)
    assert best.classes == CAMVID_CLASSES and best.palette == CAMVID_PALETTE
    assert details["palette"] == [list(colour) for colour in CAMVID_PALETTE]
    assert details["miou"] == trainer.best == max(row["miou"] for row in trainer.history)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [10, 20, 30, 40]
    assert float(rows[-1]["iou_Sky"]) > 0.3 and float(rows[-1]["train_miou"]) > 0.1
    pytest.importorskip("matplotlib")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size[0] > 400


class Stopping:
    """Batches that send the process a signal while a step runs."""

    def __init__(self, trainer: Trainer, at: int, number: int) -> None:
        self.batches, self.at, self.number = trainer.batches, at, number
        self.augmentation = trainer.batches.augmentation

    def steps(self, start: int, stop: int) -> Iterator[Batch]:
        for step, batch in enumerate(self.batches.steps(start, stop), start):
            if step == self.at:
                os.kill(os.getpid(), self.number)
            yield batch


@pytest.mark.parametrize(
    ("number", "dtype"),
    [
        (signal.SIGINT, "float32"),
        pytest.param(signal.SIGTERM, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_interrupted_and_resumed_is_uninterrupted(
    number: int, dtype: str, streets: Examples, tmp_path: Path
) -> None:
    """Bit for bit: weights, average, optimizer, best weights, and metrics but for the clock."""
    recipe = dataclasses.replace(SMALL, dtype=dtype, ohem=0.2, smoothing=0.05, accumulate=2)
    val = Examples(Streets(2, 90, (72, 96)))

    def trainer(folder: str) -> Trainer:
        return Trainer(recipe, streets, val, tmp_path / folder, validations=3)

    whole = trainer("whole")
    assert whole.run() == 0 and whole.step == whole.steps == 6

    handler = signal.getsignal(number)
    for at in (0, 2):  # twice, once within an epoch
        part = trainer("parts")
        if at:
            part.resume()
        part.batches = Stopping(part, at, number)  # type: ignore[assignment]
        assert part.run() == 128 + number and part.step == at + 1
        assert signal.getsignal(number) is handler
    rest = trainer("parts")
    rest.resume()
    assert rest.step == 3 and rest.run() == 0
    assert_same(state_of(whole), state_of(rest))

    def without_clock(history: list[dict[str, float]]) -> list[dict[str, float]]:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in history]

    assert without_clock(whole.history) == without_clock(rest.history)
    weights = [load_checkpoint(tmp_path / d / "best.safetensors") for d in ("whole", "parts")]
    assert_same(*(w.state_dict() for w in weights))


def test_seed_decides(streets: Examples, tmp_path: Path) -> None:
    def run(seed: int) -> dict[str, Tensor]:
        recipe = dataclasses.replace(SMALL, epochs=1, seed=seed)
        trainer = Trainer(recipe, streets, None, tmp_path / str(seed))
        trainer.run()
        return state_of(trainer)

    first = run(1)
    assert_same(first, run(1))
    other = run(2)
    assert not torch.equal(
        first["model.classifier.conv.weight"], other["model.classifier.conv.weight"]
    )
    assert (tmp_path / "1" / "best.safetensors").exists()  # the last weights: nothing to choose by


def test_resume_refuses_another_recipe(streets: Examples, tmp_path: Path) -> None:
    recipe = dataclasses.replace(SMALL, epochs=0.5)
    Trainer(recipe, streets, None, tmp_path).run()
    other = Trainer(dataclasses.replace(recipe, lr=0.03), streets, None, tmp_path)
    with pytest.raises(ValueError, match=r"lr must be 0\.045 to go on with .*last\.pt, got 0\.03"):
        other.resume()
    fewer = Examples(Streets(6, 0, (72, 96)))
    with pytest.raises(ValueError, match=r"examples must be 8 to go on .*, got 6"):
        Trainer(recipe, fewer, None, tmp_path).resume()
    with pytest.raises(ValueError, match=r"validation examples must be 0 to go on .*, got 8"):
        Trainer(recipe, streets, streets, tmp_path).resume()
    with pytest.raises(OSError, match=r"last\.pt"):
        Trainer(recipe, streets, None, tmp_path / "nowhere").resume()
    last = tmp_path / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"last\.pt: is damaged"):
        Trainer(recipe, streets, None, tmp_path).resume()


def test_resume_refuses_other_pictures_and_validation_labels(
    streets: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of before such things were kept goes on all the same."""
    recipe = dataclasses.replace(SMALL, epochs=0.5)
    val, other = (Examples(Streets(2, first, (72, 96))) for first in (90, 94))
    Trainer(recipe, streets, val, tmp_path).run()
    with pytest.raises(ValueError, match="validation pixels of each class must be .* to go on"):
        Trainer(recipe, streets, other, tmp_path).resume()
    for source, name in ((streets.source, "bits"), (val.source, "validation bits")):
        with monkeypatch.context() as patched:
            patched.setattr(source, "bits", 12, raising=False)
            with pytest.raises(ValueError, match=f"^{name} must be None to go on .*, got 12"):
                Trainer(recipe, streets, val, tmp_path).resume()
    state = files.read_last(tmp_path)
    for name in ("validation pixels of each class", "bits", "validation bits"):
        del state["run"][name]
    files.write_last(state, tmp_path)
    run = Trainer(recipe, streets, val, tmp_path)
    run.resume()
    assert run.step == 1


def test_going_on_needs_no_weights_to_start_from(streets: Examples, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    save_checkpoint(FastSCNN(11, fusion_channels=64), weights)
    recipe = dataclasses.replace(SMALL, epochs=1, weights=str(weights))
    assert Trainer(recipe, streets, None, tmp_path).run() == 0
    longer = dataclasses.replace(recipe, epochs=2)
    weights.unlink()
    with pytest.raises(FileNotFoundError):
        Trainer(longer, streets, None, tmp_path).run()
    run = Trainer(longer, streets, None, tmp_path)
    run.resume()
    assert run.step == 2 and run.model.config.fusion_channels == 64
    assert_same(run.model.state_dict(), weights_of(tmp_path))
    assert run.run() == 0
    with pytest.raises(FileNotFoundError):
        Trainer(recipe, streets, None, tmp_path / "another")


def test_a_run_in_a_thread(streets: Examples, tmp_path: Path) -> None:
    """Which may not ask for signals."""
    trainer, status = Trainer(dataclasses.replace(SMALL, epochs=0.5), streets, None, tmp_path), []
    thread = threading.Thread(target=lambda: status.append(trainer.run()))
    thread.start()
    thread.join()
    assert status == [0]


def test_on_beyond_the_end(streets: Examples, tmp_path: Path) -> None:
    """As a run of that many epochs from there: the learning rate is the longer run's."""
    recipe = dataclasses.replace(SMALL, epochs=1, ema=0)
    Trainer(recipe, streets, None, tmp_path).run()
    longer = Trainer(dataclasses.replace(recipe, epochs=3), streets, None, tmp_path)
    longer.resume()
    assert (longer.step, longer.steps) == (2, 6) and longer.run() == 0
    assert [(row["step"], row["lr"]) for row in longer.history] == [
        (2, pytest.approx(learning_rate(recipe, 1, 2))),
        (4, pytest.approx(learning_rate(recipe, 3, 6))),
        (6, pytest.approx(learning_rate(recipe, 5, 6))),
    ]
    same = Trainer(dataclasses.replace(recipe, epochs=3), streets, None, tmp_path)
    same.resume()
    assert same.step == same.steps == 6 and same.run() == 0
    for epochs in (2, 2.9):
        less = Trainer(dataclasses.replace(recipe, epochs=epochs), streets, None, tmp_path)
        with pytest.raises(ValueError, match=rf"epochs must be above 3, which .*, got {epochs}"):
            less.resume()
    other = Trainer(dataclasses.replace(recipe, epochs=9, lr=0.1), streets, None, tmp_path)
    with pytest.raises(ValueError, match=r"lr must be 0\.045 to go on with"):
        other.resume()


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_channels(channels: int, folder: Path, tmp_path: Path) -> None:
    """From files to weights, and on from these."""
    examples = Examples(open_source(folder, "train", 11, channels=channels))
    picture = Image.open(folder / "train" / "images" / "0.png")
    mode = {1: "L", 2: "LA", 4: "RGBA"}[channels]
    assert np.array_equal(
        examples[0].picture, np.asarray(picture.convert(mode)).reshape(72, 96, channels)
    )
    recipe = dataclasses.replace(SMALL, epochs=0.5, paste=0, mix=0, style=0, weather=0)
    trainer = Trainer(recipe, examples, examples, tmp_path)
    batch = next(trainer.batches.steps(0, 1))
    assert batch.pictures.shape == (4, channels, 64, 64)
    assert trainer.run() == 0
    model = load_checkpoint(tmp_path / "best.safetensors")
    assert (model.config.in_channels, model.config.mean) == (channels, (0.5,) * channels)
    assert score(labeller(model, "auto", torch.float32), examples).miou == pytest.approx(
        trainer.best
    )
    for name in ("paste", "mix", "style", "weather", "streets"):
        with pytest.raises(
            ValueError, match=f"{name} must be 0 for pictures of {channels} channels"
        ):
            Trainer(dataclasses.replace(recipe, **{name: 0.5}), examples, None, tmp_path)
    with pytest.raises(
        ValueError, match=f"val must have pictures of {channels} channels like train"
    ):
        Trainer(recipe, examples, Examples(Streets(1, 0, (72, 96))), tmp_path)


def test_other_channels_on_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = [str(folder), "--classes", "11"], tmp_path / "grey"
    options = ["-o", str(out), "--in-channels", "1", "--batch", "8", "--epochs", "1"]
    assert main(["train", *data, *options, "--crop", "64x64", "--dtype", "float32"]) == 0
    weights = ["--weights", str(out / "best.safetensors"), "--dtype", "float32"]
    capsys.readouterr()
    assert main(["evaluate", *data, *weights]) == 0
    miou = read_details(out / "best.safetensors")["miou"]
    assert f"plain torch, float32        {miou:.5f}" in capsys.readouterr().out
    streets = ["train", "streets:2", "-o", str(tmp_path / "no"), "--in-channels", "1"]
    assert main(streets) == 2
    assert "--in-channels must be 3 for streets" in capsys.readouterr().err


def test_starts_from_weights_of_other_channels(folder: Path, tmp_path: Path) -> None:
    given = randomise(FastSCNN(11, mean=(0.1, 0.2, 0.3), std=(0.2, 0.3, 0.4)))
    assert isinstance(given, FastSCNN)
    save_checkpoint(given, tmp_path / "rgb.safetensors")
    examples = Examples(open_source(folder, "train", 11, channels=1))
    recipe = Recipe(weights=str(tmp_path / "rgb.safetensors"), crop=(64, 64), dtype="float32")
    model = Trainer(recipe, examples, None, tmp_path / "run").model
    stem = given.learning_to_downsample.stem.conv.weight
    assert torch.equal(model.learning_to_downsample.stem.conv.weight, stem.sum(1, keepdim=True))
    assert model.config.mean == pytest.approx((0.2,)) and model.config.std == pytest.approx((0.3,))


def test_dice_is_part_of_the_loss(streets: Examples, tmp_path: Path) -> None:
    """Of every head, and in whatever parts a batch is computed."""
    step = {}
    for weight in (0.0, 0.5):
        recipe = Recipe(batch=4, crop=(64, 64), dtype="float32", dice=weight, dropout=0)
        trainer = Trainer(recipe, streets, None, tmp_path)
        pictures, labels = next(trainer.batches.steps(0, 1))
        denominator = trainer.targets.denominator(labels)
        step[weight], _ = trainer.objective(pictures, labels, denominator)
        with torch.no_grad():
            heads = low_logits(trainer.model, normalised(pictures, trainer.model.config))
    dice = [upsampled_dice(z, labels, trainer.targets) for z in heads]
    assert len(dice) == 3
    expected = 0.5 * (dice[0] + 0.4 * (dice[1] + dice[2]))
    assert (step[0.5] - step[0.0]).item() == pytest.approx(expected.item(), rel=1e-3)
    halves = dataclasses.replace(trainer.recipe, accumulate=2, epochs=1)
    assert Trainer(halves, streets, None, tmp_path / "halves").run() == 0


def test_starts_from_weights(streets: Examples, tmp_path: Path) -> None:
    """Also those of other classes; another architecture is refused."""
    given = randomise(FastSCNN(5))
    assert isinstance(given, FastSCNN)
    save_checkpoint(given, tmp_path / "five.safetensors")
    recipe = dataclasses.replace(SMALL, weights=str(tmp_path / "five.safetensors"))
    model = Trainer(recipe, streets, None, tmp_path).model
    theirs = given.state_dict()
    for name, value in model.state_dict().items():
        if not name.startswith(("classifier.conv.", "auxiliary.")):
            assert torch.equal(value, theirs[name]), name
    with pytest.raises(ValueError, match="weights must be of the preset trained.*stem_padding"):
        Trainer(dataclasses.replace(recipe, preset="tramac"), streets, None, tmp_path)


def test_a_pruned_network_trains_on(streets: Examples, tmp_path: Path) -> None:
    """Its widths are those of the weights to start from, whatever they are."""
    pruned = FastSCNN(
        11,
        downsample_channels=(9, 21, 30),
        bottlenecks=(((50, 17, 2), (23, 17, 1)), ((40, 33, 2),), ((70, 52, 1), (19, 44, 1))),
        pyramid_channels=37,
        fusion_channels=29,
    )
    save_checkpoint(pruned, tmp_path / "pruned.safetensors")
    recipe = dataclasses.replace(SMALL, epochs=0.5, weights=str(tmp_path / "pruned.safetensors"))
    assert Trainer(recipe, streets, streets, tmp_path / "run").run() == 0
    trained = load_checkpoint(tmp_path / "run" / "best.safetensors")
    assert trained.config == pruned.config
    before = pruned.state_dict()["global_features.bottleneck1.1.expand.conv.weight"]
    after = trained.state_dict()["global_features.bottleneck1.1.expand.conv.weight"]
    assert before.shape == after.shape == (23, 17, 1, 1) and not torch.equal(before, after)


def test_a_preset_keeps_its_dropout(streets: Examples, tmp_path: Path) -> None:
    for preset, dropout in (("zacario", 0.0), ("paper", 0.1)):
        recipe = dataclasses.replace(SMALL, preset=preset)
        model = Trainer(recipe, streets, None, tmp_path).model
        assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {dropout}


def test_a_chart_that_cannot_be_drawn_stops_nothing(
    streets: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(files, "_curves", fail)
    assert Trainer(dataclasses.replace(SMALL, epochs=0.5), streets, None, tmp_path).run() == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best.safetensors", "last.pt", "metrics.csv"]


def test_accumulated_parts_are_the_whole_batch(streets: Examples, tmp_path: Path) -> None:
    """With batch norm frozen and without dropout, but for rounding."""
    results, losses = [], []
    for parts in (1, 4):
        recipe = dataclasses.replace(
            SMALL, epochs=1, accumulate=parts, freeze_bn=True, dropout=0, aux_weight=0
        )
        trainer = Trainer(recipe, streets, None, tmp_path / str(parts))
        trainer.run()
        results.append(state_of(trainer))
        losses.append([row["loss"] for row in trainer.history])
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], rtol=1e-4, atol=1e-6), name
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("ohem", [0.0, 0.2])
def test_a_loss_that_is_not_finite_stops(ohem: float, streets: Examples, tmp_path: Path) -> None:
    """And nothing of it is saved."""
    trainer = Trainer(dataclasses.replace(SMALL, ohem=ohem), streets, None, tmp_path)
    with torch.no_grad():
        trainer.model.classifier.conv.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="the loss is nan at step 2: start again with a lower"):
        trainer.run()
    assert list(tmp_path.iterdir()) == []


def test_larger_input_keeps_the_labels(
    streets: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "_STREET_SCENES", 2)
    recipe = dataclasses.replace(SMALL, epochs=0.5, size=(144, 192), crop=(128, 160), streets=0.5)
    trainer = Trainer(recipe, streets, streets, tmp_path)
    batch = next(trainer.batches.steps(0, 1))
    assert batch.pictures.shape == (4, 3, 128, 160) and batch.labels.shape == (4, 64, 80)
    assert trainer.run() == 0
    assert load_checkpoint(tmp_path / "best.safetensors").config.size == (144, 192)
    assert np.isfinite(trainer.history[-1]["miou"])


def masks(root: Path, *values: int) -> Examples:
    """Two pictures and their masks of these values, in two classes."""
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        for kind, pixels in (
            ("images", rng.integers(0, 256, (64, 64, 3), np.uint8)),
            ("labels", rng.choice(np.array(values, np.uint8), (64, 64))),
        ):
            (root / "train" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / "train" / kind / name)
    return Examples(open_source(root, "train", 2))


def test_masks_of_0_and_255_are_refused(tmp_path: Path) -> None:
    """The second class would be ignored, the first be everywhere, and the mIoU 1."""
    right = masks(tmp_path / "right", 0, 1)
    with pytest.raises(ValueError, match=r"nothing to learn.*class 1 .*they hold 0 and 255.*masks"):
        Trainer(SMALL, masks(tmp_path / "wrong", 0, 255), right, tmp_path)
    with pytest.raises(
        ValueError, match=r"labels are the same, .* nothing to learn.*no pixel is of class 0 [^;]*$"
    ):
        Trainer(SMALL, masks(tmp_path / "one", 1, 255), right, tmp_path)
    Trainer(SMALL, right, right, tmp_path)


def test_one_class_is_learnt_scored_and_segmented(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pink rectangle on dark noise, in masks of 0 and 1, 255 ignored, with all that a recipe has for labels."""
    rng, data, run = np.random.default_rng(0), tmp_path / "data", tmp_path / "run"
    for split, count in (("train", 8), ("val", 2)):
        for kind in ("images", "labels"):
            (data / split / kind).mkdir(parents=True)
        for k in range(count):
            picture = rng.integers(0, 100, (64, 96, 3), np.uint8)
            labels = np.zeros((64, 96), np.uint8)
            y, x = rng.integers(0, 30), rng.integers(0, 50)
            labels[y : y + 32, x : x + 40] = 1
            picture[labels == 1] += np.array([150, 0, 100], np.uint8)
            labels[:3] = 255
            Image.fromarray(picture).save(data / split / "images" / f"{k}.png")
            Image.fromarray(labels).save(data / split / "labels" / f"{k}.png")
    (data / "classes.txt").write_text("road")
    options = (
        "--epochs 6 --batch 4 --crop 64x64 --lr 0.3 --validations 1 --dtype float32 --colour 0"
    )
    options += (
        " --ohem 0.2 --class-weights 1.1 --smoothing 0.05 --scale 0.8 1.2 --mix 0.1 --paste 1"
    )
    assert main(["train", str(data), "-o", str(run), *options.split()]) == 0
    assert "8 examples, 1 class, crops 64x64" in capsys.readouterr().out
    with (run / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    scores = [float(row[f"iou_{name}"]) for name in ("background", "road")]
    assert min(scores) > 0.3 and float(row["miou"]) == pytest.approx(sum(scores) / 2)

    best = load_checkpoint(run / "best.safetensors")
    assert best.config.num_classes == 1 and best.classes == ("road",) and len(best.palette) == 1
    weights = ["--weights", str(run / "best.safetensors")]
    assert main(["evaluate", str(data), *weights, "--dtype", "float32", "-o", str(run)]) == 0
    said = capsys.readouterr().out
    names = ("background", "road")
    assert [f"{score:.4f}" for score in scores] == [
        line.split()[1] for line in said.splitlines() if line.startswith(names)
    ]
    with (run / "confusion.csv").open() as file:
        assert [line[0] for line in csv.reader(file)] == ["true \\ predicted", *names]

    assert main(["segment", str(data / "val" / "images"), *weights, "-o", str(run)]) == 0
    with Image.open(run / "0_labels.png") as image:
        ids, colours = np.asarray(image), np.asarray(image.convert("RGB"))
    assert set(np.unique(ids)) == {0, 1}
    assert (colours[ids == 0] == 0).all() and (colours[ids == 1] == best.palette[0]).all()
    with Image.open(run / "0_overlay.png") as shown, Image.open(data / "val/images/0.png") as plain:
        tinted = (np.asarray(shown)[:64, :96] != np.asarray(plain)).any(-1)
    assert np.array_equal(tinted, ids == 1)


def test_classes_that_do_not_occur_are_told(
    tmp_path: Path, streets: Examples, caplog: pytest.LogCaptureFixture
) -> None:
    few = Examples(Streets(1, 3, (32, 32)))
    assert few.absent is not None and streets.absent is None
    recipe = dataclasses.replace(SMALL, batch=1, epochs=1, crop=(32, 32))
    Trainer(recipe, streets, streets, tmp_path)
    assert not caplog.records
    trainer = Trainer(recipe, few, few, tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"training cannot teach what is not there: {few.absent}",
        f"validation says nothing of what is not there: {few.absent}",
    ]
    assert trainer.run() == 0
    assert "nan" not in (tmp_path / "metrics.csv").read_text()


def test_refused_before_training(streets: Examples, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"batch must divide by processes \* accumulate = 1 \* 3, got 4"
    ):
        Trainer(dataclasses.replace(SMALL, accumulate=3), streets, None, tmp_path)
    for wrong, message in (
        ({"validations": 0}, "validations must be an integer of at least 1, got 0"),
        ({"validations": 2.5}, r"validations must be an integer of at least 1, got 2\.5"),
        ({"workers": -1}, "workers must be an integer of at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(SMALL, streets, None, tmp_path, **wrong)  # type: ignore[arg-type]


def test_examples_to_choose_by_have_the_classes_that_are_learnt(
    streets: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or numbers for their names."""
    val = Examples(Streets(1, 90, (72, 96)))
    for name, value, message in (
        ("classes", numbered(12), "val must have the classes of train, Sky, .*, got class 0, "),
        ("classes", CAMVID_CLASSES[::-1], "val must have the classes of train, Sky, .*, got Bicy"),
        ("ignore", 255, "val must ignore label 11 like train, got 255"),
    ):
        with monkeypatch.context() as patched, pytest.raises(ValueError, match=message):
            patched.setattr(val, name, value)
            Trainer(SMALL, streets, val, tmp_path)
    monkeypatch.setattr(val, "classes", numbered(11))
    Trainer(SMALL, streets, val, tmp_path)


# --- the command -----------------------------------------------------------------------------------------

OPTIONS = [
    "--classes",
    "11",
    "--batch",
    "4",
    "--epochs",
    "2",
    "--crop",
    "64x64",
    "--dtype",
    "float32",
    "--dropout",
    "0",
]


def run_command(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = ["train", str(folder), "-o", str(out), *OPTIONS]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "8 examples, 11 classes, crops 64x64" in text and "best.safetensors" in text
    details = read_details(out / "best.safetensors")
    assert details["command"].startswith("python -m fastscnn_fast train")
    best = load_checkpoint(out / "best.safetensors")  # 11 classes, but no one said CamVid's
    assert best.classes == tuple(details["classes"]) == numbered(11)
    assert best.palette == colours_of(numbered(11))
    assert main([*arguments[:2], "-o", str(tmp_path / "more"), *OPTIONS, "--streets", "0.5"]) == 2
    assert "streets need CamVid's 11 classes, by name" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "holds a run already; add --resume" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    short = [*arguments[:4], "--classes", "11", "--resume"]  # the recipe is the run's own
    assert main(short) == 0
    capsys.readouterr()
    assert main([*short, "--lr", "0.1"]) == 2
    assert "lr must be 0.045 to go on with" in capsys.readouterr().err
    assert main([*short, "--epochs", "1000", "--no-flip"]) == 2
    assert "flip must be True to go on with" in capsys.readouterr().err
    for words, said in (
        (["--quantize"], "quantize must be False to go on with"),
        (["--lr", "-1"], "lr must be 0.045 to go on with"),
    ):
        assert main([*short, *words]) == 2
        assert f"--resume goes on by the run's own recipe: {said}" in capsys.readouterr().err
    assert main([*short, "--epochs", "-1"]) == 2
    assert "error: epochs must be positive, got -1.0" in capsys.readouterr().err
    assert main([*short, "--epochs", "3"]) == 0
    assert "crops 64x64" in (text := capsys.readouterr().out) and "step 4 of 6" in text
    details = read_details(out / "best.safetensors")
    for where, message in (
        (folder / "classes.txt", "--out must be a folder that can be made and written to"),
        (tmp_path / "none", "holds no run (last.pt) for --resume"),
    ):
        (folder / "classes.txt").touch()
        capsys.readouterr()
        assert main(["train", str(folder), "-o", str(where), *OPTIONS, "--resume"]) == 2
        assert message in capsys.readouterr().err
    (folder / "classes.txt").unlink()
    assert (
        main(
            ["evaluate", str(folder), "--classes", "11", "--weights", str(out / "best.safetensors")]
        )
        == 0
    )
    assert f"{details['miou']:.4f}" in capsys.readouterr().out


def test_data_errors_come_first(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["train", str(folder), "-o", str(out), *OPTIONS, "--ignore", "77"]) == 2
    error = capsys.readouterr().err
    assert "labels" in error and "label id 255" in error and not out.exists()


def weights_of(run: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(run / "last.pt", weights_only=True)["model"]
    return state


@pytest.mark.slow
def test_two_processes_are_one(folder: Path, tmp_path: Path) -> None:
    """gloo, batch norm frozen: the same global batch, the same weights, the same scores."""
    options = [
        *OPTIONS,
        "--freeze-bn",
        "--class-weights",
        "1.1",
        "--accumulate",
        "2",
        "--ema",
        "0.9",
    ]
    with threads(1):
        arguments = ["train", str(folder), "-o", str(tmp_path / "one"), *options]
        assert main(arguments) == 0
    command = [
        "fastscnn_fast",
        "train",
        folder,
        "-o",
        tmp_path / "two",
        *options,
        "--device",
        "cpu",
    ]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    result = run_command(*torchrun, *command)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("2 x cpu") == 1  # one of them speaks
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name, value in one.items():
        assert torch.allclose(value, two[name], rtol=1e-4, atol=1e-6), name
    rows = []
    for name in ("one", "two"):
        with (tmp_path / name / "metrics.csv").open() as file:
            rows.append(list(csv.DictReader(file)))
    assert len(rows[0]) == len(rows[1]) == 2
    for ours, theirs in zip(*rows):
        for column in ("step", "lr", "loss", "train_miou", "miou", "accuracy"):
            assert float(ours[column]) == pytest.approx(float(theirs[column]), rel=1e-3, abs=1e-3)


LIVE_PROCESSES = """
import sys
from fastscnn_fast import cli
from fastscnn_fast.train import trainer
rank = int(__import__("os").environ["RANK"])
trainer._SAVE_SECONDS = 1e9 if rank else 0.2  # processes never agree on the time
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_with_live_batch_norms(folder: Path, tmp_path: Path) -> None:
    """Each has statistics of its own between the steps; the score is of the weights that are kept."""
    script = tmp_path / "live.py"
    script.write_text(LIVE_PROCESSES)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = [*OPTIONS, "--ema", "0.9", "--epochs", "4", "--device", "cpu"]
    package = str(Path(train.__file__).parents[2])
    for out, more in (("whole", []), ("whole", ["--resume"])):
        command = [script, "train", folder, "-o", tmp_path / out, *options, *more]
        result = run_command(*torchrun, *command, PYTHONPATH=package)
        assert result.returncode == 0, result.stdout
    best = tmp_path / "whole" / "best.safetensors"
    val = Examples(open_source(folder, "val", 11))
    scores = score(labeller(load_checkpoint(best), "auto", torch.float32), val)
    assert scores.miou == read_details(best)["miou"]


@pytest.mark.slow
def test_signal_to_the_command(folder: Path, tmp_path: Path) -> None:
    """A real process, stopped from outside, saves; --resume then finishes the same run."""
    command = ["-m", "fastscnn_fast", "train", folder, *OPTIONS, "--epochs", "6", "--device", "cpu"]

    def start(out: Path, *more: str) -> subprocess.Popen[str]:
        words = [sys.executable, *map(str, command), "-o", str(out), *more]
        return subprocess.Popen(
            words,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    stopped = start(tmp_path / "parts")
    assert stopped.stdout is not None
    text = ""
    while "%|" not in text and stopped.poll() is None:
        text += stopped.stdout.read(1)  # up to the bar, which is drawn once signals are awaited
    stopped.send_signal(signal.SIGTERM)
    text += stopped.communicate(timeout=120)[0]
    assert stopped.returncode == 128 + signal.SIGTERM, text
    assert "--resume goes on" in text
    for out, more in ((tmp_path / "parts", ["--resume"]), (tmp_path / "whole", [])):
        process = start(out, *more)
        text = process.communicate(timeout=300)[0]
        assert process.returncode == 0, text
    assert_same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))


def test_frozen_batch_norms_do_not_move(streets: Examples, tmp_path: Path) -> None:
    recipe = dataclasses.replace(SMALL, epochs=0.5, freeze_bn=True)
    trainer = Trainer(recipe, streets, None, tmp_path)
    trainer.run()
    for module in trainer.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and not module.running_mean.any()
