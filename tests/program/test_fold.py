"""Folding changes nothing, and packed weights are taken for what they are or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import random_weights, randomise
from torch import Tensor, nn

from fastscnn_fast import ops
from fastscnn_fast.arch.config import PRESETS, Config, preset
from fastscnn_fast.backends import registry
from fastscnn_fast.lower.fold import fold
from fastscnn_fast.program import reference
from fastscnn_fast.program.layers import Layer
from fastscnn_fast.runtime.model import FastSCNN

needs_cpu = pytest.mark.skipif(not registry.isas(), reason="the C++ extension is not built")

CONFIGS = {
    **PRESETS,
    "bins first, 3x3": preset(
        "leftthomas", pyramid_kernel=3, pyramid_bins=(2, 5), fusion_dilation=2
    ),
    "four channels": preset("mmseg_legacy", in_channels=4, num_classes=2, expansion=2),
}


def model64(config: Config) -> FastSCNN:
    """A network in float64 whose variances span ten orders of magnitude, some of them far below eps."""
    model = FastSCNN.from_config(config)
    randomise(model).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            module.running_var *= 10 ** torch.empty_like(module.running_var).uniform_(-8, 2)
            module.weight.data *= (module.running_var + module.eps).sqrt()  # outputs stay of size 1
    return model


def picture(config: Config, *size: int) -> Tensor:
    return torch.randn(2, config.in_channels, *size, dtype=torch.float64)


@pytest.mark.parametrize("name", CONFIGS)
def test_folding_is_exact(name: str) -> None:
    config = CONFIGS[name]
    model, x = model64(config), picture(config, 33, 49)
    folded = fold(model)
    assert all(
        {key: tuple(w.shape) for key, w in tensors.items()} == layer.weights()
        for layer, tensors in zip(folded.layers, folded.tensors, strict=True)
    )
    y, wanted = reference.network(x, folded.program, folded.tensors), model.reference(x)
    assert (y - wanted).norm() <= 1e-12 * (wanted - wanted.mean((0, 2, 3), keepdim=True)).norm()


@pytest.mark.parametrize("name", CONFIGS)
def test_raw_pixels(name: str) -> None:
    """The normalisation that the folded stem carries is the config's."""
    config = CONFIGS[name]
    model = model64(config)
    x = torch.randint(256, (1, config.in_channels, 33, 49), dtype=torch.uint8)
    folded = fold(model)
    y = reference.network(x, folded.program, folded.tensors)
    torch.testing.assert_close(y, model.reference(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", PRESETS)
def test_training_mode_and_dropout_do_not_matter(name: str) -> None:
    model = model64(PRESETS[name])
    before = copy.deepcopy(model.state_dict())
    evaluated, trained = fold(model), fold(model.train())
    for one, other in zip(evaluated.tensors, trained.tensors, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert all(torch.equal(w, before[key]) for key, w in model.state_dict().items())


def test_float32_weights_fold_in_float64() -> None:
    model = FastSCNN()
    randomise(model)
    folded, wanted = fold(model), fold(copy.deepcopy(model).double())
    for one, other in zip(folded.tensors, wanted.tensors, strict=True):
        assert all(one[key].dtype == torch.float64 for key in one)
        assert all(torch.equal(one[key], other[key]) for key in one)


# ---------------------------------------------------------------- packed weights

BACKENDS = [pytest.param("cpu", marks=needs_cpu), "reference"]
LAYER = Layer("dsconv", "", 20, 24, last_channels=5)
OTHER = Layer("dsconv", "", 20, 24, last_channels=6)
X = torch.ones(1, 20, 4, 4)


def run(weights: Tensor, layer: Layer = LAYER, backend: str = "reference") -> Tensor:
    return ops.dsconv(X, weights, layer, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_cannot_be_packed(backend: str) -> None:
    weights = random_weights(LAYER)
    missing = {key: w for key, w in weights.items() if key != "last_bias"}
    wrong = {**weights, "last_bias": torch.zeros(6)}
    with pytest.raises(ValueError, match=r"layer 0 \(dsconv\): last_bias .* \(5,\), got nothing"):
        ops.pack([LAYER], [missing], backend)
    with pytest.raises(ValueError, match=r"layer 0 \(dsconv\): last_bias .* \(5,\), got \(6,\)"):
        ops.pack([LAYER], [wrong], backend)
    with pytest.raises(ValueError):
        ops.pack([LAYER, LAYER], [weights], backend)


def test_what_no_backend_packs() -> None:
    weights = random_weights(LAYER)
    with pytest.raises(
        ValueError, match="backend must be one of reference, cpu, triton, cuda, got 'tpu'"
    ):
        ops.pack([LAYER], [weights], "tpu")
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(ValueError, match="dtype must be .* for backend cpu, got torch.float"):
            ops.pack([LAYER], [weights], "cpu", dtype)
    with pytest.raises(ValueError, match="dtype must be .* for backend reference, got torch.int16"):
        ops.pack([LAYER], [weights], "reference", torch.int16)
    for backend, dtype in (("cpu", torch.bfloat16), ("reference", torch.float32)):
        with pytest.raises(ValueError, match="precision must be 'highest' for .*, got 'high'"):
            ops.pack([LAYER], [weights], backend, dtype, "high")


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_any_dtype_and_layout_are_packed(backend: str) -> None:
    weights = random_weights(LAYER)
    strided = {key: torch.stack([w, w], -1)[..., 0].double() for key, w in weights.items()}
    assert torch.equal(ops.pack([LAYER], [weights], backend), ops.pack([LAYER], [strided], backend))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_reference_weights_keep_their_dtype(dtype: torch.dtype) -> None:
    weights = random_weights(LAYER)
    packed = ops.pack([LAYER], [weights], "reference", dtype)
    y = ops.dsconv(X.to(dtype), packed, LAYER, "reference")
    wanted = reference.dsconv(X.to(dtype), LAYER, {key: w.to(dtype) for key, w in weights.items()})
    assert y.dtype == dtype
    assert torch.equal(y, wanted)


def tampered(packed: Tensor) -> dict[str, Tensor]:
    flipped = packed.clone()
    flipped[:64] ^= 1
    return {
        "empty": packed[:0],
        "shorter than the tag": packed[:40],
        "only the tag": packed[:64],
        "truncated": packed[:-4],
        "too long": torch.cat([packed, packed[-4:]]),
        "random": torch.randint(256, packed.shape, dtype=torch.uint8),
        "zeros": torch.zeros_like(packed),
        "without the tag": packed[64:],
        "a damaged tag": flipped,
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_foreign_weights_are_refused(backend: str) -> None:
    packed = ops.pack([LAYER], [random_weights(LAYER)], backend)
    assert run(packed, LAYER, backend).isfinite().all()
    with pytest.raises(ValueError, match="packed for these layers"):
        run(packed, OTHER, backend)
    for what, weights in tampered(packed).items():
        with pytest.raises(ValueError, match="weights must"):
            pytest.fail(f"{what}: {run(weights, LAYER, backend)}")
    for index in (*range(12), *range(16, 32)):  # magic, version, layout; layers, size
        changed = packed.clone()
        changed[index] += 1
        with pytest.raises(ValueError, match="weights must"):
            pytest.fail(f"byte {index}: {run(changed, LAYER, backend)}")


@needs_cpu
def test_layouts_are_not_mixed_up() -> None:
    weights = random_weights(LAYER)
    for packed_for, run_on in (("cpu", "reference"), ("reference", "cpu")):
        with pytest.raises(ValueError, match="layout"):
            run(ops.pack([LAYER], [weights], packed_for), LAYER, run_on)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_that_are_no_bytes_are_refused(backend: str) -> None:
    packed = ops.pack([LAYER], [random_weights(LAYER)], backend)
    bad: list[Any] = [packed.view(torch.float32), packed.to(torch.int64), packed.to("meta")]
    for weights in bad:
        with pytest.raises((TypeError, ValueError)):
            run(weights, LAYER, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_weights_in_other_memory(backend: str) -> None:
    """Memory maps put tensors anywhere: at any float's address they work, elsewhere they are refused."""
    packed = ops.pack([LAYER], [random_weights(LAYER)], backend)
    moved = torch.cat([packed[:4], packed])[4:]
    assert torch.equal(run(moved, LAYER, backend), run(packed, LAYER, backend))
    with pytest.raises((ValueError, RuntimeError)):
        run(torch.cat([packed[:1], packed])[1:], LAYER, backend)
    with pytest.raises(ValueError, match="weights must be contiguous"):
        run(torch.stack([packed, packed], 1)[:, 0], LAYER, backend)
