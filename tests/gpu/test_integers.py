"""int8 on GPUs: the bits that program/integers.py specifies, up to the logits at 1/8, on whatever runs the backend."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from cases import (
    DSCONV,
    FEATURE_FUSION,
    INVERTED_RESIDUAL,
    PYRAMID_POOLING,
    SIZES,
    STEM_CONV,
    Case,
)
from gpu_integers import check, inputs_of, pixels, run, shared, specified
from helpers import LAYOUTS, in_layout, noise, run_poisoned
from integers import random_integers, with_ranges
from layouts import free_widths
from targets import Target, slow_unless, small_model
from torch import Tensor

from fastscnn_fast import load_checkpoint, ops
from fastscnn_fast.arch.config import PRESETS, preset
from fastscnn_fast.backends.gpu import plan
from fastscnn_fast.kernels.launch import Tile
from fastscnn_fast.lower.fold import fold
from fastscnn_fast.lower.quantise import quantise
from fastscnn_fast.program.layers import Layer
from fastscnn_fast.program.program import layer_sizes
from fastscnn_fast.runtime.fused import FusedFastSCNN
from fastscnn_fast.runtime.model import FastSCNN

#: Without an activation before its depthwise convolution an inverted residual does not quantise.
BLOCKS = [layer for layer in INVERTED_RESIDUAL if layer.activation != "none"]
#: Channels that take several blocks of a program, whole ones and parts.
WIDER = [
    Layer("dsconv", "", 96, 160, dilation=4, last_channels=70),
    Layer("inverted_residual", "", 96, 96, 160, residual=True),
    Layer("pyramid_pooling", "", 128, 96, 32, bins=(1, 2, 3, 6)),
    Layer("feature_fusion", "", 96, 64, 160, dilation=4),
]
FIRST = [
    *(STEM_CONV[0], STEM_CONV[5], STEM_CONV[8], DSCONV[2], DSCONV[5], DSCONV[7], DSCONV[8]),
    *(BLOCKS[3], BLOCKS[4], PYRAMID_POOLING[2], PYRAMID_POOLING[4], *FEATURE_FUSION[2:4]),
]
ALL = [*STEM_CONV, *DSCONV, *BLOCKS, *PYRAMID_POOLING, *FEATURE_FUSION, *WIDER]


def named(layer: Layer) -> str:
    return str(Case(layer, ()))


@pytest.mark.parametrize("layer", FIRST, ids=named)
def test_a_small_size(layer: Layer, target: Target) -> None:
    check(layer, inputs_of(layer, (3, 7)), target)


@pytest.mark.slow
@pytest.mark.parametrize("layer", ALL, ids=named)
def test_odd_sizes(layer: Layer, target: Target) -> None:
    for size in SIZES:
        if layer.op != "stem_conv" or layer.padding or min(size) >= 3:
            check(layer, inputs_of(layer, size, 3 if size == (6, 5) else 1), target)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper", "mmseg", "segmentron"])
def test_real_layers(name: str, target: Target) -> None:
    for step in layer_sizes(PRESETS[name], 64, 96):
        if step.layer.op != "upsample_classify":
            check(step.layer.alone, tuple(pixels(1, s[0], s[1:]) for s in step.inputs), target)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_of_any_strides(layout: str, target: Target) -> None:
    raw = pixels(2, 3, (7, 18))
    for x in (raw, 2 * torch.randn(raw.shape)):
        check(STEM_CONV[4], (in_layout(x, layout),), target)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations_of_any_strides(layout: str, target: Target) -> None:
    layer = FEATURE_FUSION[2]
    check(layer, tuple(in_layout(x, layout) for x in inputs_of(layer, (6, 9))), target)


def test_pixels_of_floats(target: Target) -> None:
    """NaN is 0, what lies outside of a picture is clamped, ties go to even."""
    layer = Layer("stem_conv", "", 1, 16, stride=2)
    weights = random_integers(layer)
    weights["scale"], weights["shift"] = torch.tensor([1.0]), torch.tensor([0.0])
    values = [float("nan"), float("inf"), -float("inf"), -1e30, 1e30, 0.5, 1.5, 2.5, 254.5, -0.5]
    wanted = torch.tensor([0, 255, 0, 0, 255, 0, 2, 2, 254, 0], dtype=torch.uint8)
    results = [
        run(layer, (x.repeat(7, 3)[None, None],), weights, target)
        for x in (torch.tensor(values), wanted)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("sign", [1, -1])
def test_extremes_saturate(sign: int, target: Target) -> None:
    """The largest sums that weights may ask for: nothing wraps around, in no part of a sum."""
    layer = Layer("dsconv", "", 64, 40, last_channels=19)
    weights = random_integers(layer)
    for name, value in weights.items():
        if value.dtype == torch.int8:
            value.fill_(sign * 127)
            products = 255 * 127 * value[0].numel()
        elif name.endswith("bias"):
            value.fill_(sign * (2**31 - 300 - products))
        elif name.endswith("multiplier"):
            value.fill_(0.49)
    inputs = (torch.full((1, 64, 5, 6), 255, dtype=torch.uint8),)
    y, exact = run(layer, inputs, weights, target), specified(layer, inputs, weights)
    assert torch.equal(y, exact)


# ---------------------------------------------------------------- blocks whose channels are shared


@pytest.mark.parametrize(
    ("layer", "slices"),
    [
        slow_unless(n == 2 and layer.residual, layer, n)
        for layer in (BLOCKS[4], BLOCKS[2])
        for n in (1, 2, 4)
    ],
    ids=lambda value: named(value) if isinstance(value, Layer) else str(value),
)
def test_cut_blocks(
    layer: Layer, slices: int, triton: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same sums, whatever programs share them; what a run leaves is zeros again, or the next shows it."""
    monkeypatch.setattr(plan, "tile", lambda *_: shared(slices))
    check(layer, inputs_of(layer, (2, 18), 1), triton)


@pytest.mark.parametrize(
    ("layer", "rows", "columns"),
    [
        (BLOCKS[4], 4, 4),
        slow_unless(False, BLOCKS[4], 4, 2),
        slow_unless(False, BLOCKS[4], 1, 1),
        (BLOCKS[3], 2, 2),
        slow_unless(False, BLOCKS[3], 1, 4),
    ],
    ids=lambda value: named(value) if isinstance(value, Layer) else str(value),
)
def test_blocks_of_gpus(
    layer: Layer, rows: int, columns: int, triton: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pixels whose words two outputs share, at both strides; lanes beyond the image."""
    monkeypatch.setattr(plan, "tile", lambda *_: Tile(8, block=64, rows=rows, columns=columns))
    check(layer, inputs_of(layer, (5, 19), 1), triton)


# ---------------------------------------------------------------- networks


def low_logits(model: FastSCNN, x: Tensor) -> Tensor:
    """The specified logits at 1/8, by running the layers one by one."""
    folded = fold(model)
    made: list[Tensor] = []
    for layer, weights in zip(folded.program.layers[:-1], quantise(folded)):
        inputs = tuple(x if at < 0 else made[at] for at in layer.inputs)
        made.append(specified(layer.alone, inputs, weights))
    return made[-1]


def check_network(model: FastSCNN, x: Tensor, output: str, target: Target) -> None:
    """Every bit of the whole network is that of its layers, and theirs are the specification's."""
    folded = fold(with_ranges(model))
    fast = FusedFastSCNN(folded, target.backend, torch.int8, cuda_graph="off").to(target.device)
    logits = low_logits(model, x).to(target.device)
    last, size = folded.program.layers[-1].alone, (x.shape[2], x.shape[3])
    packed = ops.pack([last], [{}], target.backend).to(target.device)  # that of float32
    placed = in_layout(x.to(target.device), "cropped")
    arguments = (placed, fast.weights, fast.program, torch.int8, output)
    y = run_poisoned("network", *arguments, backend=target.backend)
    assert torch.equal(y, ops.upsample_classify(logits, packed, last, size, output, target.backend))


def networks() -> Iterator[Any]:
    for values in product(PRESETS, (True, False), ops.OUTPUTS):
        yield slow_unless(values == ("paper", True, "logits"), *values)


@pytest.mark.parametrize(("name", "raw", "output"), list(networks()))
def test_networks(name: str, raw: bool, output: str, target: Target) -> None:
    x = pixels(2, 3, (49, 65)) if raw else noise(1, 3, 64, 96)
    check_network(small_model(name), x, output, target)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [1, 33])
def test_free_widths(classes: int, target: Target) -> None:
    widths = free_widths(least=9, most=60)
    print(widths)
    model = FastSCNN.from_config(preset("paper", num_classes=classes, **widths)).eval()
    check_network(model, pixels(2, 3, (49, 65)), "labels", target)


@pytest.mark.slow
def test_the_slim_network(target: Target) -> None:
    check_network(load_checkpoint("camvid11-slim"), pixels(1, 3, (72, 96)), "logits", target)


@pytest.mark.slow
def test_calls_of_a_network(target: Target) -> None:
    """Compiled, and in a batch: the same bits."""
    model = with_ranges(small_model("paper"))
    fast = FusedFastSCNN(fold(model), target.backend, torch.int8, cuda_graph="off")
    fast = fast.to(target.device)
    x = pixels(2, 3, (16, 24)).to(target.device)
    y = fast(x)
    assert y.dtype == torch.float32 and torch.equal(fast(x[1:]), y[1:])
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), y)
    torch.compiler.reset()
    with pytest.raises(TypeError, match=r"torch\.float32 or torch\.uint8, got torch\.int8"):
        fast(x.to(torch.int8))
