"""A GPU backend against plain torch in float64, on what runs it: Triton's interpreter, the emulation of CUDA or a GPU.

Modules that import these tests have a fixture ``backend``: its name; the cases beyond a first selection are slow.
Results, guard zones, weights' surroundings and scratch arenas are poisoned with NaN before each
run, so that one run also shows that every element is written, nothing else is, and nothing else is read.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
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
    PYRAMID_POOLING,
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
    BOUNDS,
    GUARD,
    LAYOUTS,
    Bound,
    Guarded,
    assert_labels,
    assert_parity,
    err,
    in_layout,
    lifelike,
    noise,
    run_poisoned,
)
from layouts import SMALL
from torch import Tensor

from fastscnn_fast import ops
from fastscnn_fast.arch.config import PRESETS, preset
from fastscnn_fast.backends.gpu import arena, runner
from fastscnn_fast.backends.gpu.plan import Plan
from fastscnn_fast.lower.fold import fold
from fastscnn_fast.lower.pack import TAG
from fastscnn_fast.program.layers import Layer
from fastscnn_fast.program.program import layer_sizes
from fastscnn_fast.runtime.fused import FusedFastSCNN
from fastscnn_fast.runtime.model import FastSCNN

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = ""  # the fixture's
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

#: dtype and precision by name. In the interpreter "high" is as good as "highest".
ARITHMETICS = {
    "float32": (torch.float32, "highest"),
    "high": (torch.float32, "high"),
    "float16": (torch.float16, "highest"),
    "bfloat16": (torch.bfloat16, "highest"),
}


def bound(arithmetic: str) -> Bound:
    name = "float32" if INTERPRETED else "tf32"
    return BOUNDS[name if arithmetic == "high" else arithmetic]


def how(arithmetic: str) -> tuple[torch.dtype, str]:
    """Its dtype and precision."""
    if arithmetic == "high" and BACKEND == "cuda":
        pytest.skip("the cuda backend has no precision 'high'")
    return ARITHMETICS[arithmetic]


@dataclass(frozen=True)
class GpuCase(Case):
    """A :class:`Case` of a GPU backend; its arithmetic is one of ARITHMETICS above."""

    @staticmethod
    def of(case: Case, arithmetic: str) -> GpuCase:
        return GpuCase(**{**vars(case), "arithmetic": arithmetic})

    @property
    def dtype(self) -> torch.dtype:
        return ARITHMETICS[self.arithmetic][0]

    def packed(self, weights: dict[str, Tensor]) -> Tensor:
        packed = ops.pack([self.layer], [weights], BACKEND, *how(self.arithmetic))
        memory = Guarded(packed.numel(), device=DEVICE).inside
        memory.copy_(packed)
        return memory

    def run(self, inputs: Sequence[Tensor], weights: dict[str, Tensor]) -> Tensor:
        """The op's result, on the cpu."""
        placed = tuple(in_layout(x.to(DEVICE), self.layout) for x in inputs)
        arguments = self.arguments(placed, weights)
        return run_poisoned(self.layer.op, *arguments, backend=BACKEND).cpu()


class PoisonedBound(arena.Bound):
    """Its arena lies between guard zones and holds NaN before each run."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        offsets = {name: at + GUARD for name, at in plan.offsets.items()}
        super().__init__(replace(plan, offsets=offsets, bytes=plan.bytes + 2 * GUARD), device)

    def run(self, tensors: Any) -> None:
        self._arena.fill_(255)
        super().run(tensors)
        for zone in (self._arena[:GUARD], self._arena[-GUARD:]):
            assert (zone == 255).all(), "a kernel wrote outside of its scratch memory"


@pytest.fixture(autouse=True)
def poisoned_arenas(backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plans, arenas and tiles are the test's own."""
    monkeypatch.setattr(sys.modules[__name__], "BACKEND", backend)
    monkeypatch.setattr(arena, "Bound", PoisonedBound)
    monkeypatch.setattr(runner, "_pool", arena.Pool())
    yield
    runner._op_plan.cache_clear()
    runner._network_plan.cache_clear()


def check(case: GpuCase, least: float = 0.0) -> None:
    inputs, weights = case.inputs(), case.weights()
    own, ref64 = case.reference(inputs, weights), case.reference64(inputs, weights)
    assert_parity(case.run(inputs, weights), own, ref64, *bound(case.arithmetic).op, least)


def check_odd(case: GpuCase) -> None:
    """As test_ops.size_of_numbers: the numbers that get rounded may be larger than the result's spread."""
    ref64 = case.reference64(case.inputs(), case.weights())
    check(case, max(1.0, ref64.square().mean().sqrt().item()))


def slow_unless(quick: bool, *values: Any, id: str | None = None) -> Any:
    marks = [] if quick else [pytest.mark.slow]
    return pytest.param(*values, id=id, marks=marks)


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
                    yield slow_unless(quick, GpuCase.of(case, arithmetic), id=id)


@pytest.mark.parametrize("case", list(small_layers()))
def test_layers_of_presets(case: GpuCase) -> None:
    check_odd(case)


def odd_cases(layer: Layer, arithmetic: str, sizes: Sequence[Size]) -> Iterator[GpuCase]:
    for size in sizes:
        if layer.op == "stem_conv" and layer.padding == 0 and min(size) < 3:
            continue
        lows = sorted({quarter(size), (3, 5), (1, 1)})
        for low in lows if layer.op == "feature_fusion" else [()]:
            case = Case(layer, (size, low) if low else (size,), batch=3 if size == (6, 5) else 1)
            case = case.enlarged(64 if arithmetic == "float32" else 1024)
            yield GpuCase.of(case, arithmetic)


each_variant = pytest.mark.parametrize("layer", VARIANTS, ids=lambda layer: str(Case(layer, ())))


@each_variant
def test_a_small_size(layer: Layer) -> None:
    for case in odd_cases(layer, "float32", [(3, 5)]):
        check_odd(case)


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ["float32", "float16", "bfloat16"])
@each_variant
def test_odd_sizes(layer: Layer, arithmetic: str) -> None:
    for case in odd_cases(layer, arithmetic, SIZES):
        check_odd(case)


ONE_OF_EACH = [
    Case(STEM_CONV[5], ((9, 13),), batch=2),
    Case(DSCONV[7], ((5, 6),), batch=2),
    Case(INVERTED_RESIDUAL[2], ((5, 6),), batch=2),
    Case(INVERTED_RESIDUAL[1], ((5, 6),)),
    Case(PYRAMID_POOLING[6], ((5, 6),), batch=2),
    Case(FEATURE_FUSION[2], ((9, 7), (3, 2))),
    Case(FEATURE_FUSION[4], ((9, 7), (3, 2)), batch=2),
    Case(upsample(19, align_corners=True), ((2, 3), (9, 12)), batch=2),
]
each_op = pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)


@pytest.mark.slow
@each_op
def test_high_precision(case: Case) -> None:
    check_odd(GpuCase.of(case, "high"))


@each_op
def test_empty_batches(case: Case) -> None:
    own = GpuCase.of(case, "float32")
    inputs, weights = own.inputs(), own.weights()
    y = own.run([x[:0] for x in inputs], weights)
    assert y.shape == (0, *own.reference(inputs, weights).shape[1:])


@pytest.mark.parametrize(
    "case", [slow_unless(case.layer.op == "dsconv", case, id=str(case)) for case in ONE_OF_EACH]
)
def test_opcheck(case: Case) -> None:
    own = GpuCase.of(case, "float32")
    inputs = tuple(x.to(DEVICE) for x in own.inputs())
    arguments = own.arguments(inputs, own.weights())
    op = getattr(torch.ops.fastscnn, case.layer.op).default
    results = torch.library.opcheck(op, (*arguments, BACKEND))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_of_any_strides(layout: str, raw: bool) -> None:
    for layer in (STEM_CONV[4], STEM_CONV[7]):
        check(GpuCase.of(Case(layer, ((7, 18),), 2, layout, raw), "float32"))


@pytest.mark.parametrize("arithmetic", ["float16", "bfloat16"])
def test_raw_pixels_in_half_types(arithmetic: str) -> None:
    check(GpuCase.of(Case(STEM_CONV[5], ((7, 18),), raw=True), arithmetic))


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
def test_activations_of_any_strides(case: Case, layout: str) -> None:
    check_odd(GpuCase.of(replace(case, layout=layout), "float32"))


def test_activations_at_any_address() -> None:
    case = GpuCase.of(Case(Layer("dsconv", "", 32, 16), ((6, 9),)), "float32")
    (x,), weights = case.inputs(), case.weights()
    memory = torch.empty(x.numel() + 1, device=DEVICE)
    shifted = memory[1:].view(1, 6, 9, 32).permute(0, 3, 1, 2).copy_(x)
    y = run_poisoned("dsconv", *case.arguments((shifted,), weights), backend=BACKEND)
    assert torch.equal(y.cpu(), case.run((x,), weights))


def test_weights_off_16_bytes_are_refused() -> None:
    case = GpuCase.of(Case(Layer("dsconv", "", 32, 16), ((6, 9),)), "float32")
    (x, packed, *rest) = case.arguments(case.inputs(), case.weights())
    shifted = torch.empty(packed.numel() + 4, dtype=torch.uint8, device=DEVICE)[4:].copy_(packed)
    with pytest.raises(ValueError, match="weights must be aligned to 16 bytes"):
        torch.ops.fastscnn.dsconv(x.to(DEVICE), shifted, *rest, BACKEND)


# ---------------------------------------------------------------- upsample_classify

QUICK = {  # sizes and align_corners
    (((5, 7), (33, 49)), True),
    (((1, 6), (3, 1)), False),
}


def upsamples() -> Iterator[Any]:
    for case in UPSAMPLES:
        for arithmetic in ("float32", "float16", "bfloat16"):
            quick = arithmetic == "float32" and case.layer.in_channels == 11
            quick = quick and (case.sizes, case.layer.align_corners) in QUICK
            yield slow_unless(quick, GpuCase.of(case, arithmetic), id=f"{case} {arithmetic}")


@pytest.mark.parametrize("case", list(upsamples()))
def test_upsampling(case: GpuCase) -> None:
    """Logits, probabilities, and labels: the largest logit's class, but where two are within a few ulp."""
    check(case)
    check(replace(case, output="probabilities"))
    if case.layer.in_channels <= 256:
        inputs = case.inputs()
        labels = replace(case, output="labels").run(inputs, {})
        ref64 = case.reference64(inputs, {})
        largest = inputs[0].abs().max().item()
        gap = assert_labels(labels, ref64, LABEL_ULPS * largest)
        # Between logits that are equal (as of bfloat16 many are), float64's own choice is chance.
        assert (gap > 1e-12 * largest).double().mean() < 1e-3


exact_resizes = pytest.mark.parametrize(
    ("layer", "low", "size"), [slow_unless(case[1][1] == 5, *case) for case in EXACT]
)


@exact_resizes
def test_the_first_of_equal_logits_wins(layer: Layer, low: Size, size: Size) -> None:
    case = GpuCase.of(Case(layer, (low, size), output="labels"), "float32")
    x = coarse_logits(case, layer.in_channels, *low)
    assert torch.equal(case.run((x,), {}), case.reference64((x,), {}))


@exact_resizes
@pytest.mark.parametrize(
    "arithmetic", ["float32", *(slow_unless(False, name) for name in ("float16", "bfloat16"))]
)
def test_non_finite_logits(layer: Layer, low: Size, size: Size, arithmetic: str) -> None:
    """As torch has it: non-finite just where torch's are, and NaN is the largest of all."""
    case = GpuCase.of(Case(layer, (low, size)), arithmetic)
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
def test_labels_of_extreme_logits(magnitude: float) -> None:
    """Differences of finite logits may be infinite."""
    x = (2 * torch.rand(1, 19, 5, 9) - 1) * magnitude
    case = GpuCase.of(Case(upsample(19), ((5, 9), (40, 72)), output="labels"), "float32")
    with np.errstate(all="ignore"):
        labels = case.run((x,), {})
    logits64 = replace(case, output="logits").reference64((x,), {})
    assert_labels(labels, logits64, LABEL_ULPS * magnitude)


@pytest.mark.parametrize("classes", [128, 150, 300])
def test_many_classes(classes: int) -> None:
    """The second product of a dsconv takes all of them at once."""
    layer = replace(DSCONV[3], in_channels=32, out_channels=32, last_channels=classes)
    check(GpuCase.of(Case(layer, ((5, 6),), batch=2), "float32"))


def free_block(stride: int, residual: bool) -> Layer:
    """An inverted residual of widths that nobody chose, drawn by the run's seed; not both multiples of 16."""
    inputs, mid, out = (1 + 5 * n for n in torch.randint(4, 24, (3,)).tolist())
    out = inputs if residual else out
    return Layer(
        "inverted_residual", "", inputs, out, mid_channels=mid, stride=stride, residual=residual
    )


@pytest.mark.parametrize(
    "arithmetic",
    ["float32", *(slow_unless(not INTERPRETED, name) for name in ("float16", "bfloat16"))],
)
@pytest.mark.parametrize(("stride", "residual"), [(1, False), (1, True), (2, False)])
def test_blocks_of_free_widths(stride: int, residual: bool, arithmetic: str) -> None:
    case = Case(free_block(stride, residual), ((5, 11),)).enlarged(1024)
    print(case)
    check_odd(GpuCase.of(case, arithmetic))


@pytest.mark.parametrize("arithmetic", ["float32", slow_unless(not INTERPRETED, "float16")])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(
    "layer", [INVERTED_RESIDUAL[3], INVERTED_RESIDUAL[5]], ids=lambda layer: str(Case(layer, ()))
)
def test_an_infinity_reaches_no_channel_that_exists_only_in_memory(
    layer: Layer, sign: int, arithmetic: str
) -> None:
    """Expanded ones, and those of the result: infinity times the zeros that pad weights would be NaN."""
    case = GpuCase.of(Case(replace(layer, activation="relu"), ((5, 9),)), arithmetic)
    (x,), weights = case.inputs(), case.weights()
    x[0, 0, 2, 3] = float("inf")
    weights["expand_weight"][:, 0] = (
        weights["expand_weight"][:, 0].abs() * sign
    )  # ReLU ends it, or not
    for name in ("depthwise_weight", "project_weight"):
        weights[name] = weights[name].abs()
    with np.errstate(all="ignore"):  # the interpreter's numpy warns of infinities
        y = case.run((x,), weights)  # which looks at the padding of the result
    ref64 = case.reference64((x,), weights)
    assert ref64.isinf().any() == (sign > 0) and not ref64.isnan().any()
    tolerance = 20 * torch.finfo(case.dtype).eps
    torch.testing.assert_close(y.double(), ref64, rtol=tolerance, atol=tolerance)


def test_strides_of_dimensions_of_size_one() -> None:
    """Torch calls an activation dense whatever strides it tells where the size is 1."""
    case = GpuCase.of(Case(Layer("dsconv", "", 64, 64), ((7, 1),)), "float32")
    weights = case.weights()
    x = torch.randn(1, 7, 64).transpose(1, 2)[..., None]
    assert x.permute(0, 2, 3, 1).is_contiguous() and x.stride(3) == 1
    y = ops.dsconv(x.to(DEVICE), case.packed(weights).to(DEVICE), case.layer, BACKEND).cpu()
    assert err(y, case.reference64((x,), weights)) < 1e-6


def test_positions_beyond_32_bits() -> None:
    """A numerator of a position is as large as four times the product of both sizes."""
    case = GpuCase.of(Case(upsample(1), ((1, 23250), (1, 46500))), "float32")
    (x,), weights = case.inputs(), case.weights()
    assert err(case.run((x,), weights), case.reference64((x,), weights)) < 1e-6


# ---------------------------------------------------------------- networks


@cache
def small_model(name: str) -> FastSCNN:
    """Of few classes: the interpreter takes them one after the other."""
    return lifelike(preset(name, **SMALL, num_classes=7))


def fused(name: str, arithmetic: str = "float32") -> FusedFastSCNN:
    """Without CUDA graphs, so that every call launches (graphs have tests of their own)."""
    folded = fold(small_model(name))
    return FusedFastSCNN(folded, BACKEND, *how(arithmetic), cuda_graph="off").to(DEVICE)


def networks() -> Iterator[Any]:
    quick: set[tuple[Any, ...]] = {
        ("paper", "float32", (64, 96), False, "logits"),
        ("mmseg", "float32", (49, 65), True, "probabilities"),
        ("segmentron", "bfloat16", (49, 65), False, "logits"),
        ("mmseg_legacy", "float32", (49, 65), True, "labels"),
    }
    for values in product(PRESETS, ARITHMETICS, ((49, 65), (64, 96)), (False, True), ops.OUTPUTS):
        yield slow_unless(values in quick, *values)


@pytest.mark.parametrize(("name", "arithmetic", "size", "raw", "output"), list(networks()))
@torch.no_grad()
def test_networks(name: str, arithmetic: str, size: Size, raw: bool, output: str) -> None:
    model, fast = small_model(name), fused(name, arithmetic)
    own, model64 = copy.deepcopy(model).to(fast.dtype), copy.deepcopy(model).double()
    batch = 4 if fast.dtype.itemsize == 2 else 1  # one small picture may be lucky in what it rounds
    x = torch.randint(256, (batch, 3, *size), dtype=torch.uint8) if raw else noise(batch, 3, *size)
    x = x if raw else x.to(fast.dtype)
    ref64, owns = model64.reference(x if raw else x.double()), own.reference(x)

    def run(output: str) -> Tensor:
        placed = in_layout(x.to(DEVICE), "cropped")
        arguments = (placed, fast.weights, fast.program, fast.dtype, output)
        return run_poisoned("network", *arguments, backend=BACKEND).cpu()

    y = run(output)
    if output == "labels":
        # As in test_network.py: the logits are compared before they are rounded to their dtype.
        rounding = torch.finfo(fast.dtype).eps / 2 * ref64.abs().max().item()
        tolerance = 2.1 * ((run("logits") - ref64).abs().max().item() + rounding)
        assert_labels(y, ref64, tolerance)
    else:
        if output == "probabilities":
            ref64, owns = ref64.softmax(1), owns.softmax(1)
        assert_parity(y, owns, ref64, *bound(arithmetic).network)


@pytest.mark.parametrize(
    "arithmetic",
    ["float32", *(slow_unless(not INTERPRETED, name) for name in ("float16", "bfloat16"))],
)
@torch.no_grad()
def test_a_network_of_free_widths(arithmetic: str) -> None:
    """Each block's expanded and output channels are its own, as those of a pruned network are."""
    widths = iter(1 + 3 * n for n in torch.randint(2, 30, (21,)).tolist())
    stages = [[(next(widths), next(widths), stride) for stride in (2, 1, 1)] for _ in range(3)]
    stages[0][2] = (next(widths), stages[0][1][1], 1)  # which adds its input
    stages[2][2] = (next(widths), 4 * next(widths), 1)  # as many as the bins' number divides
    bottlenecks = tuple(map(tuple, stages))
    rest = {
        name: v for name, v in SMALL.items() if not name.startswith(("bottleneck", "expansion"))
    }
    print(bottlenecks)
    model = lifelike(preset("paper", **rest, bottlenecks=bottlenecks, num_classes=7))
    network = FusedFastSCNN(fold(model), BACKEND, *how(arithmetic), cuda_graph="off").to(DEVICE)
    x = noise(2, 3, 49, 65).to(network.dtype)
    arguments = (x.to(DEVICE), network.weights, network.program, network.dtype, "logits")
    y = run_poisoned("network", *arguments, backend=BACKEND).cpu()
    own, model64 = copy.deepcopy(model).to(network.dtype), copy.deepcopy(model).double()
    ref64 = model64.reference(x.double())
    assert_parity(y, own.reference(x), ref64, *bound(arithmetic).network)


@torch.no_grad()
def test_a_batch_of_pictures_whose_logits_are_one_pixel() -> None:
    """Their planes of 1x1 have the strides of a pixel's channels, whose padding would be the next image's."""
    model, fast, x = small_model("paper"), fused("paper"), noise(2, 3, 8, 8)
    arguments = (x.to(DEVICE), fast.weights, fast.program, fast.dtype, "logits")
    y = run_poisoned("network", *arguments, backend=BACKEND).cpu()
    ref64 = copy.deepcopy(model).double().reference(x.double())
    assert_parity(y, model.reference(x), ref64, *BOUNDS["float32"].network)


def test_calls_of_a_network() -> None:
    """In a batch, compiled, into out=, in two threads at once: the same bits."""
    fast, x = fused("paper", "float16"), noise(2, 3, 32, 32).half().to(DEVICE)
    y = torch.compile(fast, fullgraph=True, backend="aot_eager")(x)
    out = torch.full_like(y[1:], float("nan"))
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(fast, x[1:], out)
        assert torch.equal(fast(x[:1]), y[:1])
        assert other.result() is out and torch.equal(out, y[1:])


def test_other_weights_of_the_same_network() -> None:
    """Networks of the same layers share arenas, not weights."""
    fast, other, x = fused("paper"), fused("paper"), noise(1, 3, 32, 32).to(DEVICE)
    y = fast(x)
    fast.weights[TAG.size :] = 0
    assert (fast(x) == 0).all()
    assert torch.equal(other(x), y)
