"""Every GPU backend against plain torch in float64, on whatever runs it (fixture ``target``).

The cases beyond a first selection are slow.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    DSCONV,
    EXACT,
    FEATURE_FUSION,
    INVERTED_RESIDUAL,
    LABEL_ULPS,
    SIZES,
    STEM_CONV,
    UPSAMPLES,
    VARIANTS,
    Case,
    Size,
    coarse_logits,
    quarter,
    upsample,
)
from helpers import (
    LAYOUTS,
    assert_labels,
    assert_parity,
    drawn_once,
    err,
    in_layout,
    lifelike,
    noise,
    probabilities_of,
    run_poisoned,
)
from layouts import SMALL
from targets import (
    INTERPRETED,
    NAMES,
    ONE_OF_EACH,
    Target,
    check,
    check_odd,
    check_upsampling,
    each_op,
    slow_unless,
    small_model,
)
from torch import Tensor

from fastscnn_fast import load_checkpoint, ops
from fastscnn_fast.arch.config import PRESETS, preset
from fastscnn_fast.lower.fold import fold
from fastscnn_fast.lower.pack import TAG
from fastscnn_fast.program.layers import Layer
from fastscnn_fast.program.program import layer_sizes
from fastscnn_fast.runtime.fused import FusedFastSCNN
from fastscnn_fast.runtime.model import FastSCNN

# ---------------------------------------------------------------- ops


def small_layers() -> Iterator[Any]:
    """Every layer of every preset, with fewer channels, and so many values that chance does not decide."""
    seen = set()
    for name in PRESETS:
        for step in layer_sizes(preset(name, **SMALL), 64, 96):
            sizes = tuple(shape[1:] for shape in step.inputs)
            if step.layer.op == "upsample_classify":
                sizes += (step.output[1:],)
            case = Case(replace(step.layer, name=""), sizes).enlarged(1024)
            if case not in seen:
                seen.add(case)
                for arithmetic in ("float32", "float16", "bfloat16"):
                    id = f"{name}-{step.layer.name}-{arithmetic}"
                    # The interpreter takes seconds for 3x3; a network with it is in the first selection.
                    quick = arithmetic == "bfloat16" and not (
                        INTERPRETED and step.layer.kernel == 3
                    )
                    yield slow_unless(quick, replace(case, arithmetic=arithmetic), id=id)


@pytest.mark.parametrize("case", list(small_layers()))
def test_layers_of_presets(case: Case, target: Target) -> None:
    check_odd(target.case(case))


def odd_cases(layer: Layer, arithmetic: str, sizes: Sequence[Size]) -> Iterator[Case]:
    for size in sizes:
        if layer.op == "stem_conv" and layer.padding == 0 and min(size) < 3:
            continue
        lows = sorted({quarter(size), (3, 5), (1, 1)})
        for low in lows if layer.op == "feature_fusion" else [()]:
            case = Case(layer, (size, low) if low else (size,), batch=3 if size == (6, 5) else 1)
            case = case.enlarged(64 if arithmetic == "float32" else 1024)
            yield replace(case, arithmetic=arithmetic)


each_variant = pytest.mark.parametrize("layer", VARIANTS, ids=lambda layer: str(Case(layer, ())))


@each_variant
def test_a_small_size(layer: Layer, target: Target) -> None:
    for case in odd_cases(layer, "float32", [(3, 5)]):
        check_odd(target.case(case))


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ["float32", "float16", "bfloat16"])
@each_variant
def test_odd_sizes(layer: Layer, arithmetic: str, target: Target) -> None:
    for case in odd_cases(layer, arithmetic, SIZES):
        check_odd(target.case(case))


@pytest.mark.slow
@each_op
def test_high_precision(case: Case, target: Target) -> None:
    check_odd(target.case(case, "high"))


@each_op
def test_empty_batches(case: Case, target: Target) -> None:
    own = target.case(case, "float32")
    inputs, weights = own.inputs(), own.weights()
    y = own.run([x[:0] for x in inputs], weights)
    assert y.shape == (0, *own.reference(inputs, weights).shape[1:])


@pytest.mark.parametrize(
    "case", [slow_unless(case.layer.op == "dsconv", case, id=str(case)) for case in ONE_OF_EACH]
)
def test_opcheck(case: Case, target: Target) -> None:
    own = target.case(case, "float32")
    inputs = tuple(x.to(target.device) for x in own.inputs())
    arguments = own.arguments(inputs, own.weights())
    op = getattr(torch.ops.fastscnn, case.layer.op).default
    results = torch.library.opcheck(op, (*arguments, target.backend))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_of_any_strides(layout: str, raw: bool, target: Target) -> None:
    for layer in (STEM_CONV[4], STEM_CONV[7]):
        check(target.case(Case(layer, ((7, 18),), 2, layout, raw), "float32"))


@pytest.mark.parametrize("arithmetic", ["float16", "bfloat16"])
def test_raw_pixels_in_half_types(arithmetic: str, target: Target) -> None:
    check(target.case(Case(STEM_CONV[5], ((7, 18),), raw=True), arithmetic))


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        slow_unless(case.layer.op == "upsample_classify", case, layout)
        for case in (
            Case(DSCONV[2], ((6, 9),), 2),
            Case(FEATURE_FUSION[2], ((6, 9), (2, 3)), 2),
            Case(upsample(5), ((2, 9), (5, 19)), 2),
        )
        for layout in LAYOUTS
    ],
    ids=str,
)
def test_activations_of_any_strides(case: Case, layout: str, target: Target) -> None:
    check_odd(target.case(replace(case, layout=layout), "float32"))


def test_activations_at_any_address(target: Target) -> None:
    case = target.case(Case(Layer("dsconv", "", 32, 16), ((6, 9),)), "float32")
    (x,), weights = case.inputs(), case.weights()
    memory = torch.empty(x.numel() + 1, device=target.device)
    shifted = memory[1:].view(1, 6, 9, 32).permute(0, 3, 1, 2).copy_(x)
    y = run_poisoned("dsconv", *case.arguments((shifted,), weights), backend=target.backend)
    assert torch.equal(y.cpu(), case.run((x,), weights))


def test_weights_off_16_bytes_are_refused(target: Target) -> None:
    case = target.case(Case(Layer("dsconv", "", 32, 16), ((6, 9),)), "float32")
    (x, packed, *rest) = case.arguments(case.inputs(), case.weights())
    memory = torch.empty(packed.numel() + 4, dtype=torch.uint8, device=target.device)
    shifted = memory[4:].copy_(packed)
    with pytest.raises(ValueError, match="weights must be aligned to 16 bytes"):
        torch.ops.fastscnn.dsconv(x.to(target.device), shifted, *rest, target.backend)


# ---------------------------------------------------------------- upsample_classify

QUICK = {  # sizes and align_corners
    (((5, 7), (33, 49)), True),
    (((1, 6), (3, 1)), False),
}


def upsamples() -> Iterator[Any]:
    for case in UPSAMPLES:
        for arithmetic in ("float32", "float16", "bfloat16"):
            quick = arithmetic == "float32" and case.layer.in_channels in (1, 11)
            quick = quick and (case.sizes, case.layer.align_corners) in QUICK
            yield slow_unless(
                quick, replace(case, arithmetic=arithmetic), id=f"{case} {arithmetic}"
            )


@pytest.mark.parametrize("case", list(upsamples()))
def test_upsampling(case: Case, target: Target) -> None:
    check_upsampling(target.case(case))


exact_resizes = pytest.mark.parametrize(
    ("layer", "low", "size"), [slow_unless(case[1][1] == 5, *case) for case in EXACT]
)


@exact_resizes
def test_the_first_of_equal_logits_wins(
    layer: Layer, low: Size, size: Size, target: Target
) -> None:
    case = target.case(Case(layer, (low, size), output="labels"), "float32")
    x = coarse_logits(case, layer.in_channels, *low)
    assert torch.equal(case.run((x,), {}), case.reference64((x,), {}))


@exact_resizes
@pytest.mark.parametrize(
    "arithmetic", ["float32", *(slow_unless(False, name) for name in ("float16", "bfloat16"))]
)
def test_non_finite_logits(
    layer: Layer, low: Size, size: Size, arithmetic: str, target: Target
) -> None:
    """As torch has it: non-finite just where torch's are, and NaN is the largest of all."""
    case = target.case(Case(layer, (low, size)), arithmetic)
    x = coarse_logits(case, layer.in_channels, *low)
    tolerance = max(1e-6, torch.finfo(case.dtype).eps)
    for value in (float("nan"), float("inf"), float("-inf")):
        x[torch.rand(x.shape) < 0.01] = value
    x[0, :, 0, 0] = float("-inf")
    for output in ops.OUTPUTS:
        case = replace(case, output=output)
        with np.errstate(all="ignore"):  # the interpreter's numpy warns of NaN
            y = case.run((x,), {})
        ref64 = case.reference64((x,), {})
        if output == "labels":
            assert torch.equal(y, ref64)
        else:
            torch.testing.assert_close(
                y.double(), ref64, rtol=tolerance, atol=tolerance, equal_nan=True, msg=output
            )


@pytest.mark.parametrize("magnitude", [1e-30, 1e30, 3e38])
def test_labels_of_extreme_logits(magnitude: float, target: Target) -> None:
    """Differences of finite logits may be infinite."""
    x = (2 * torch.rand(1, 19, 5, 9) - 1) * magnitude
    case = target.case(Case(upsample(19), ((5, 9), (40, 72)), output="labels"), "float32")
    with np.errstate(all="ignore"):
        labels = case.run((x,), {})
    logits64 = replace(case, output="logits").reference64((x,), {})
    assert_labels(labels, logits64, LABEL_ULPS * magnitude)


@pytest.mark.parametrize("classes", [128, 150, 300])
def test_many_classes(classes: int, target: Target) -> None:
    """The second product of a dsconv takes all of them at once."""
    layer = replace(DSCONV[3], in_channels=32, out_channels=32, last_channels=classes)
    check(target.case(Case(layer, ((5, 6),), batch=2), "float32"))


def free_block(stride: int, residual: bool) -> Layer:
    """An inverted residual of widths that nobody chose, drawn by the run's seed; not both multiples of 16."""
    inputs, mid, out = (1 + 5 * n for n in torch.randint(4, 24, (3,)).tolist())
    out = inputs if residual else out
    return Layer(
        "inverted_residual", "", inputs, out, mid_channels=mid, stride=stride, residual=residual
    )


HALVES_ARE_SLOW = [
    "float32",
    *(slow_unless(not INTERPRETED, name) for name in ("float16", "bfloat16")),
]


@pytest.mark.parametrize("arithmetic", HALVES_ARE_SLOW)
@pytest.mark.parametrize(("stride", "residual"), [(1, False), (1, True), (2, False)])
def test_blocks_of_free_widths(
    stride: int, residual: bool, arithmetic: str, target: Target
) -> None:
    case = Case(free_block(stride, residual), ((5, 11),)).enlarged(1024)
    print(case)
    check_odd(target.case(case, arithmetic))


@pytest.mark.parametrize("arithmetic", ["float32", slow_unless(not INTERPRETED, "float16")])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(
    "layer", [INVERTED_RESIDUAL[3], INVERTED_RESIDUAL[5]], ids=lambda layer: str(Case(layer, ()))
)
def test_an_infinity_reaches_no_channel_that_exists_only_in_memory(
    layer: Layer, sign: int, arithmetic: str, target: Target
) -> None:
    """Expanded ones, and those of the result: infinity times the zeros that pad weights would be NaN."""
    case = target.case(Case(replace(layer, activation="relu"), ((5, 9),)), arithmetic)
    (x,), weights = case.inputs(), case.weights()
    x[0, 0, 2, 3] = float("inf")
    # ReLU ends it, or not.
    weights["expand_weight"][:, 0] = weights["expand_weight"][:, 0].abs() * sign
    for name in ("depthwise_weight", "project_weight"):
        weights[name] = weights[name].abs()
    with np.errstate(all="ignore"):  # the interpreter's numpy warns of infinities
        y = case.run((x,), weights)  # which looks at the padding of the result
    ref64 = case.reference64((x,), weights)
    assert ref64.isinf().any() == (sign > 0) and not ref64.isnan().any()
    tolerance = 20 * torch.finfo(case.dtype).eps
    torch.testing.assert_close(y.double(), ref64, rtol=tolerance, atol=tolerance)


def test_strides_of_dimensions_of_size_one(target: Target) -> None:
    """Torch calls an activation dense whatever strides it tells where the size is 1."""
    case = target.case(Case(Layer("dsconv", "", 64, 64), ((7, 1),)), "float32")
    weights = case.weights()
    x = torch.randn(1, 7, 64).transpose(1, 2)[..., None]
    assert x.permute(0, 2, 3, 1).is_contiguous() and x.stride(3) == 1
    y = ops.dsconv(x.to(target.device), case.packed(weights), case.layer, target.backend)
    assert err(y.cpu(), case.reference64((x,), weights)) < 1e-6


def test_positions_beyond_32_bits(target: Target) -> None:
    """A numerator of a position is as large as four times the product of both sizes."""
    case = target.case(Case(upsample(1), ((1, 23250), (1, 46500))), "float32")
    (x,), weights = case.inputs(), case.weights()
    assert err(case.run((x,), weights), case.reference64((x,), weights)) < 1e-6


# ---------------------------------------------------------------- networks


def networks() -> Iterator[Any]:
    quick: set[tuple[Any, ...]] = {
        ("paper", "float32", (64, 96), False, "logits"),
        ("mmseg", "float32", (49, 65), True, "probabilities"),
        ("segmentron", "bfloat16", (49, 65), False, "logits"),
        ("mmseg_legacy", "float32", (49, 65), True, "labels"),
    }
    for values in product(PRESETS, NAMES, ((49, 65), (64, 96)), (False, True), ops.OUTPUTS):
        yield slow_unless(values in quick, *values)


@pytest.mark.parametrize(("name", "arithmetic", "size", "raw", "output"), list(networks()))
@torch.no_grad()
def test_networks(
    name: str, arithmetic: str, size: Size, raw: bool, output: str, target: Target
) -> None:
    fast = target.fused(name, arithmetic)
    check_network(small_model(name), fast, arithmetic, size, raw, output, target)


def check_network(
    model: FastSCNN,
    fast: FusedFastSCNN,
    arithmetic: str,
    size: Size,
    raw: bool,
    output: str,
    target: Target,
) -> None:
    own, model64 = copy.deepcopy(model).to(fast.dtype), copy.deepcopy(model).double()
    batch = 4 if fast.dtype.itemsize == 2 else 1  # one small picture may be lucky in what it rounds
    x = torch.randint(256, (batch, 3, *size), dtype=torch.uint8) if raw else noise(batch, 3, *size)
    x = x if raw else x.to(fast.dtype)
    ref64, owns = model64.reference(x if raw else x.double()), own.reference(x)

    def run(output: str) -> Tensor:
        placed = in_layout(x.to(target.device), "cropped")
        arguments = (placed, fast.weights, fast.program, fast.dtype, output)
        return run_poisoned("network", *arguments, backend=target.backend).cpu()

    y = run(output)
    if output == "labels":
        # As in test_network.py: the logits are compared before they are rounded to their dtype.
        rounding = torch.finfo(fast.dtype).eps / 2 * ref64.abs().max().item()
        tolerance = 2.1 * ((run("logits") - ref64).abs().max().item() + rounding)
        assert_labels(y, ref64, tolerance)
    else:
        if output == "probabilities":
            ref64, owns = probabilities_of(ref64), probabilities_of(owns)
        assert_parity(y, owns, ref64, *target.bound(arithmetic).network)


@pytest.mark.parametrize("arithmetic", HALVES_ARE_SLOW)
@pytest.mark.parametrize("output", ["labels", slow_unless(False, "probabilities")])
@torch.no_grad()
def test_a_network_of_one_class(output: str, arithmetic: str, target: Target) -> None:
    """Drawn once, as in test_network.py."""
    asked = target.asked(arithmetic)
    with drawn_once():
        model = lifelike(preset("paper", **SMALL, num_classes=1))
        fast = FusedFastSCNN(fold(model), target.backend, *asked, cuda_graph="off")
        fast = fast.to(target.device)
        check_network(model, fast, arithmetic, (49, 65), False, output, target)


def free_bottlenecks() -> tuple[tuple[tuple[int, int, int], ...], ...]:
    """Each block's expanded and output channels are its own, multiples of nothing."""
    widths = iter(1 + 3 * n for n in torch.randint(2, 30, (21,)).tolist())
    stages = [[(next(widths), next(widths), stride) for stride in (2, 1, 1)] for _ in range(3)]
    stages[0][2] = (next(widths), stages[0][1][1], 1)  # which adds its input
    stages[2][2] = (next(widths), 4 * next(widths), 1)  # as many as the bins' number divides
    bottlenecks = tuple(map(tuple, stages))
    print(bottlenecks)
    return bottlenecks


@pytest.mark.parametrize("arithmetic", HALVES_ARE_SLOW)
@pytest.mark.parametrize("pruned", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
@torch.no_grad()
def test_a_network_of_other_widths(pruned: bool, arithmetic: str, target: Target) -> None:
    """Such as nobody chose, and those of the slim weights that come along, with these."""
    if pruned:
        model = load_checkpoint("camvid11-slim")
    else:
        rest = {
            name: v for name, v in SMALL.items() if not name.startswith(("bottleneck", "expansion"))
        }
        model = lifelike(preset("paper", **rest, bottlenecks=free_bottlenecks(), num_classes=7))
    asked = target.asked(arithmetic)
    fast = FusedFastSCNN(fold(model), target.backend, *asked, cuda_graph="off").to(target.device)
    batch = 8 if fast.dtype.itemsize == 2 else 2  # few pictures may be lucky in what they round
    x = noise(batch, 3, 49, 65).to(fast.dtype)
    arguments = (x.to(target.device), fast.weights, fast.program, fast.dtype, "logits")
    y = run_poisoned("network", *arguments, backend=target.backend).cpu()
    own, model64 = copy.deepcopy(model).to(fast.dtype), copy.deepcopy(model).double()
    ref64 = model64.reference(x.double())
    assert_parity(y, own.reference(x), ref64, *target.bound(arithmetic).network)


@torch.no_grad()
def test_a_batch_of_pictures_whose_logits_are_one_pixel(target: Target) -> None:
    """Their planes of 1x1 have the strides of a pixel's channels, whose padding would be the next image's."""
    model, fast, x = small_model("paper"), target.fused("paper"), noise(2, 3, 8, 8)
    arguments = (x.to(target.device), fast.weights, fast.program, fast.dtype, "logits")
    y = run_poisoned("network", *arguments, backend=target.backend).cpu()
    ref64 = copy.deepcopy(model).double().reference(x.double())
    assert_parity(y, model.reference(x), ref64, *target.bound("float32").network)


def test_calls_of_a_network(target: Target) -> None:
    """In a batch, compiled, into out=, in two threads at once: the same bits."""
    fast, x = target.fused("paper", "float16"), noise(2, 3, 32, 32).half().to(target.device)
    y = torch.compile(fast, fullgraph=True, backend="aot_eager")(x)
    out = torch.full_like(y[1:], float("nan"))
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(fast, x[1:], out)
        assert torch.equal(fast(x[:1]), y[:1])
        assert other.result() is out and torch.equal(out, y[1:])


def test_float32_pictures_in_a_half_type(target: Target) -> None:
    """What a cast before the network gives."""
    fast, x = target.fused("paper", "float16"), noise(2, 3, 32, 32).to(target.device)
    assert torch.equal(fast(x), fast(x.half()))


def test_other_weights_of_the_same_network(target: Target) -> None:
    """Networks of the same layers share arenas, not weights."""
    fast, other = target.fused("paper"), target.fused("paper")
    x = noise(1, 3, 32, 32).to(target.device)
    y = fast(x)
    fast.weights[TAG.size :] = 0
    assert (fast(x) == 0).all()
    assert torch.equal(other(x), y)
