"""The forward that learns int8 is what the integers compute, and has gradients."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_network
from torch import Tensor

from fastscnn_fast import FastSCNN, calibrate, load_checkpoint
from fastscnn_fast.arch.config import PRESETS
from fastscnn_fast.arch.network import normalise
from fastscnn_fast.checkpoints import read_details, save_checkpoint
from fastscnn_fast.cli import main
from fastscnn_fast.data.datasets import Examples
from fastscnn_fast.data.scenes import street
from fastscnn_fast.data.sources import Streets
from fastscnn_fast.lower.fold import fold, folded_tensors
from fastscnn_fast.lower.quantise import LEVELS, Value, quantise
from fastscnn_fast.program import integers, reference
from fastscnn_fast.program.program import Program, fast_scnn
from fastscnn_fast.train import quantised
from fastscnn_fast.train.evaluate import labeller, score
from fastscnn_fast.train.quantised import low_logits, round_value
from fastscnn_fast.train.recipe import Recipe
from fastscnn_fast.train.trainer import Trainer, said


def batch(*sizes: tuple[int, int]) -> Tensor:
    pictures = [street(seed, *size)[0] for seed, size in enumerate(sizes)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def ready(preset: str = "paper", **overrides: object) -> FastSCNN:
    model = small_network(preset=preset, **overrides)
    calibrate(model, batch((64, 96)))
    return model


def eight_bits(model: FastSCNN, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Any]:
    """The logits at 1/8 by the integers, and each uint8 tensor on the way with what made it, in order."""
    folded, made = fold(model), []
    with monkeypatch.context() as patch:
        for name in ("requantise", "pool", "resize"):
            own = getattr(integers, name)

            def noted(*args: Any, name: str = name, own: Any = own) -> Tensor:
                made.append((name, own(*args)))
                return made[-1][1]

            patch.setattr(integers, name, noted)
        layers = Program(folded.program.layers[:-1])
        logits = reference.network(x, layers, quantise(folded)[:-1], ops=integers.OPS)
    return logits, made


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_each_value_is_what_the_integers_make_of_the_same(
    preset: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the network's values, from the same 8 bits before it, is the same 8 bits, but one level off where a float
    lies beside the middle of two levels.

    The integers round the product of sum and multiplier to float32, twice, so up to 255 levels by 2^-23 of
    themselves, which crosses a middle for one of 16000 values at most, where those are anywhere between levels; sums in
    float32 err by a few times that. Means and resizes fall on middles often, and resizes in fixed point err by 1/64
    of a level: there only the one level is the bound.
    """
    model = ready(preset)
    x = batch((64, 96), (64, 96))
    exact, made = eight_bits(model, x, monkeypatch)
    coming = iter(made)

    def compared(value: Tensor, to: Value) -> Tensor:
        levels = round_value(value, to) / to.scale + to.zero
        by, q = next(coming)
        off = (levels - q).abs()
        assert off.max() < 1.01, by
        assert by != "requantise" or (off > 0.5).sum() <= 2 + 1e-3 * off.numel()
        return (q.to(dtype) - to.zero) * to.scale

    monkeypatch.setattr(quantised, "round_value", compared)
    (logits,) = low_logits(model, x, model.ranges or {}, dtype)
    assert next(coming, None) is None and logits.dtype == dtype
    assert torch.allclose(logits, exact.to(dtype), rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


def gradients(model: FastSCNN, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    (logits,) = low_logits(model, batch((64, 96)), model.ranges or {}, dtype)
    model.zero_grad()
    logits.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_gradients_reach_every_parameter() -> None:
    for name, gradient in gradients(ready()).items():
        assert gradient is not None and gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name


def test_gradients_are_those_of_the_folded_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the rounding, which torch's ops pass through: here they leave everything as it is."""
    model = ready()
    with monkeypatch.context() as patch:
        for name in ("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine"):
            patch.setattr(torch, name, lambda x, *_: x)
        patch.setattr(quantised, "padding_pixels", lambda mean: LEVELS * mean)
        found = gradients(model, torch.float64)
    program = fast_scnn(model.config)
    small = Program(program.layers[:-1])
    weights = [
        {name: t.double() for name, t in named.items()} for named in folded_tensors(model, program)
    ]
    x = normalise(batch((64, 96)), model.config, torch.float64)
    model.zero_grad()
    reference.network(x, small, weights[:-1]).square().mean().backward()
    for name, parameter in model.named_parameters():
        a, b = found[name], parameter.grad
        assert a is not None and b is not None
        assert (a - b).norm() < 1e-4 * b.norm(), name


def test_statistics_stay_and_training_mode_drops_out() -> None:
    model = ready(dropout=0.5)
    ranges, x = model.ranges or {}, batch((64, 96))
    before = {name: b.clone() for name, b in model.named_buffers()}
    (evaluated,) = low_logits(model, x, ranges)
    model.train()
    (a,), (b,) = low_logits(model, x, ranges), low_logits(model, x, ranges)
    assert not torch.equal(a, b) and not torch.equal(a, evaluated)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_auxiliary_heads_read_what_has_eight_bits() -> None:
    model = ready(aux=True)
    logits = low_logits(model, batch((64, 96)), model.ranges or {})
    assert [tuple(y.shape) for y in logits] == [(1, 5, 8, 12), (1, 5, 8, 12), (1, 5, 2, 3)]
    with torch.no_grad():
        plain = model.auxiliary_logits(batch((64, 96)))[0]
    rough = torch.nn.functional.interpolate(logits[1], (64, 96), mode="bilinear")
    assert (rough - plain).norm() < 0.1 * plain.norm()


# --- runs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "start.safetensors"
    save_checkpoint(small_network(11), path)
    return path


def trainer(weights: Path, out: Path, **changes: Any) -> Trainer:
    values: dict[str, Any] = {
        "epochs": 2,
        "batch": 4,
        "crop": (64, 64),
        "lr": 1e-3,  # at 0.01 some draws of random weights grow beyond all bounds
        "ema": 0.5,
        "aux_weight": 0.0,
    }
    recipe = Recipe(quantize=True, weights=str(weights), **{**values, **changes})
    train, val = Examples(Streets(4, 0, (72, 96))), Examples(Streets(2, 9, (72, 96)))
    return Trainer(recipe, train, val, out, validations=2, workers=0)


def test_a_run_leaves_weights_with_their_ranges_and_both_scores(
    weights: Path, tmp_path: Path
) -> None:
    run = trainer(weights, tmp_path)
    assert run.recipe.dtype == "float32"
    before = {name: b.clone() for name, b in run.model.named_buffers() if "running" in name}
    assert run.run() == 0
    assert all(torch.equal(b, before[n]) for n, b in run.model.named_buffers() if n in before)
    assert len(run.history) == 2 and all(row["loss"] > 0 for row in run.history)
    best = next(row for row in run.history if row["miou"] == run.best)
    kept = load_checkpoint(tmp_path / "best.safetensors")
    details = read_details(tmp_path / "best.safetensors")
    assert (details["miou"], details["miou_float32"]) == (best["miou"], best["miou_float32"])
    assert said(best) == f"mIoU {best['miou']:.4f} in int8, {best['miou_float32']:.4f} in float32"
    assert said({"miou": 0.5}) == "mIoU 0.5000"
    for dtype, name in ((torch.int8, "miou"), (torch.float32, "miou_float32")):
        assert run.val is not None
        found = score(labeller(kept, "auto", dtype), run.val).miou
        assert found == pytest.approx(details[name], abs=1e-6)
    assert kept.ranges is not None
    start = load_checkpoint(weights)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(start.state_dict().values(), kept.state_dict().values())
    )


def test_a_run_that_was_stopped_goes_on_to_the_same(weights: Path, tmp_path: Path) -> None:
    """Between two validations, with the ranges that it had, not those of the weights by then."""
    whole = trainer(weights, tmp_path / "whole", epochs=4)
    whole.run()
    (tmp_path / "parts").mkdir()
    first = trainer(weights, tmp_path / "parts", epochs=4)
    learning = iter(first.batches.steps(0, 2))
    first.plain.ranges = first._measured(first._kept())
    first._mode()
    first._learn(next(learning))
    first._save()
    second = trainer(weights, tmp_path / "parts", epochs=4)
    second.resume()
    assert second.step == 1 and second.plain.ranges == first.plain.ranges
    second.run()
    for a, b in zip(whole.model.state_dict().values(), second.model.state_dict().values()):
        assert torch.equal(a, b)
    assert whole.plain.ranges == second.plain.ranges


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": None}, "weights must be given to start from with quantize, got None"),
        ({"dtype": "bfloat16", "weights": "x"}, "dtype must be float32 with quantize .*bfloat16"),
    ],
)
def test_what_a_recipe_may_not_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(quantize=True, **changes)


def test_command(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--weights", str(weights), "--epochs", "0.01", "--batch", "2", "--crop", "64x64"]
    words += ["--size", "64x96", "--aux-weight", "0", "--quantize"]
    assert main(["train", "streets:2", "-o", str(tmp_path), *words]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^mIoU 0\.\d{4} in int8, 0\.\d{4} in float32 on val: .*best", out, re.M)
    assert main(["train", "streets:2", "-o", str(tmp_path / "no"), "--quantize"]) == 2
    assert "weights must be given to start from" in capsys.readouterr().err
