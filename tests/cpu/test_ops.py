"""Each fused op on the CPU against its plain-torch twin in float64.

Every run is poisoned (helpers.run_poisoned): the result is NaN before, guard zones lie around it and around
the inputs, and scratch memory is filled with garbage, so that one run also shows that every element is
written, nothing else is, and nothing but the input is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

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
    LAYOUTS,
    Kernels,
    assert_labels,
    assert_parity,
    in_layout,
    random_weights,
    run_poisoned,
    threads,
)
from torch import Tensor

from fastscnn_fast import ops
from fastscnn_fast.arch.config import PRESETS
from fastscnn_fast.backends import registry
from fastscnn_fast.program.layers import Layer
from fastscnn_fast.program.program import layer_sizes

pytestmark = pytest.mark.skipif(not registry.isas(), reason="the C++ extension is not built")


@lru_cache(maxsize=64)  # the instruction sets share it
def prepared(case: Case) -> tuple[tuple[Any, ...], Tensor, Tensor]:
    """Arguments of the op, torch's own result in its dtype and the float64 reference."""
    inputs, weights = case.inputs(), case.weights()
    with threads(1):  # most cases are too small to share
        ref64, own = case.reference64(inputs, weights), case.reference(inputs, weights)
    return case.arguments(inputs, weights), own, ref64


def check(case: Case, least: float = 0.0) -> None:
    arguments, own, ref64 = prepared(case)
    y = run_poisoned(case.layer.op, *arguments)
    assert_parity(y, own, ref64, *BOUNDS[case.arithmetic].op, least)


def size_of_numbers(case: Case) -> float:
    """How large the numbers are that get rounded in a layer.

    Layers that no network has may make values that hardly vary around a large mean, or that are almost all
    clamped away. The numbers' size shows then in the inputs, of size 1, and in the mean.
    """
    return max(1.0, prepared(case)[2].square().mean().sqrt().item())


# ---------------------------------------------------------------- shapes
# Real layers: all that any preset has. Their code depends on the size only through widths modulo the vector,
# the tile and the depthwise block, through the resize ratios and through the threads' shares of rows, so a
# quarter of the real size shows as much; `slow` runs the real one.


def real_cases(height: int, width: int) -> Iterator[Any]:
    seen = set()
    for name, config in PRESETS.items():
        for step in layer_sizes(config, height, width):
            sizes = tuple(shape[1:] for shape in step.inputs)
            if step.layer.op == "upsample_classify":
                sizes += (step.output[1:],)
            case = Case(replace(step.layer, name=""), sizes)
            if case not in seen:
                seen.add(case)
                yield pytest.param(case, id=f"{name}-{step.layer.name}")


@pytest.mark.parametrize("case", list(real_cases(128, 256)))
def test_real_layers(case: Case, kernels: Kernels) -> None:
    check(case.on(kernels))


@pytest.mark.slow
@pytest.mark.parametrize("case", list(real_cases(512, 1024)))
def test_real_layers_at_full_size(case: Case, kernels: Kernels) -> None:
    check(case.on(kernels))


# For kernels of bfloat16 products: around the 16 pixels of a tile, and again one with every remainder.
FEWER_SIZES: tuple[Size, ...] = ((1, 1), (2, 3), (6, 5), (3, 17), (17, 8), (33, 49))


def odd_cases(layer: Layer, kernels: Kernels) -> Iterator[Case]:
    """Each of many tiny ones is printed, not a test of its own: pytest would take longer than the kernels."""
    for size in SIZES if kernels.arithmetic == "float32" else FEWER_SIZES:
        if layer.op == "stem_conv" and layer.padding == 0 and min(size) < 3:
            continue
        lows = {quarter(size), (3, 5), (1, 1)} if layer.op == "feature_fusion" else {()}
        for low in sorted(lows):
            sizes = (size, low) if low else (size,)
            case = Case(layer, sizes, batch=3 if size == (6, 5) else 1)
            case = case.enlarged(64 if kernels.arithmetic == "float32" else 1024).on(kernels)
            print(case)
            yield case


@pytest.mark.parametrize("layer", VARIANTS, ids=lambda layer: str(Case(layer, ())))
def test_odd_sizes(layer: Layer, kernels: Kernels) -> None:
    for case in odd_cases(layer, kernels):
        check(case, size_of_numbers(case))


# The stem reads pictures by their strides; every other op brings its input into one layout first, by one and
# the same function. Pictures are high so that even an "expanded" one, of equal columns, has many values.
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("layer", STEM_CONV, ids=lambda layer: f"{layer.in_channels}")
def test_pictures_of_any_strides(layer: Layer, raw: bool, kernels: Kernels) -> None:
    for layout in LAYOUTS:
        print(layout)
        check(Case(layer, ((67, 18),), batch=2, layout=layout, raw=raw).on(kernels))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "layer",
    [DSCONV[1], DSCONV[3], INVERTED_RESIDUAL[0], PYRAMID_POOLING[0], FEATURE_FUSION[0]],
    ids=lambda layer: f"{layer.op}{layer.in_channels}",
)
def test_activations_of_any_strides(layer: Layer, layout: str, kernels: Kernels) -> None:
    sizes = ((34, 9), (9, 3)) if layer.op == "feature_fusion" else ((34, 9),)
    check(Case(layer, sizes, batch=2, layout=layout).on(kernels))


def test_surroundings_of_raw_pictures_do_not_matter(kernels: Kernels) -> None:
    """Raw pixels have no NaN to be poisoned with: two fillings must give the same."""
    case = Case(STEM_CONV[5], ((7, 18),), batch=2, raw=True).on(kernels)
    (picture,) = case.inputs()
    _, *rest = case.arguments((picture,), case.weights())
    for layout in LAYOUTS:
        one, other = (
            run_poisoned("stem_conv", in_layout(picture, layout, byte), *rest) for byte in (0, 255)
        )
        assert torch.equal(one, other), layout


# ---------------------------------------------------------------- upsample_classify


@pytest.mark.parametrize("case", UPSAMPLES, ids=str)
def test_upsampled_logits_and_probabilities(case: Case, kernels: Kernels) -> None:
    for output in ("logits", "probabilities"):
        print(output)
        check(replace(case.on(kernels), output=output))


@pytest.mark.parametrize("case", UPSAMPLES, ids=str)
def test_upsampled_labels(case: Case, kernels: Kernels) -> None:
    """The largest logit's class, but where the two largest are within a few ulp."""
    arguments, _, ref64 = prepared(case.on(kernels))
    arguments = (*arguments[:-1], "labels")
    if case.layer.in_channels > 256:
        with pytest.raises(ValueError, match="256"):
            run_poisoned("upsample_classify", *arguments)
        return
    labels = run_poisoned("upsample_classify", *arguments)
    assert_labels(labels, ref64, LABEL_ULPS * arguments[0].abs().max().item())


@pytest.mark.parametrize(("layer", "low", "size"), EXACT)
def test_the_first_of_equal_logits_wins(
    layer: Layer, low: Size, size: Size, kernels: Kernels
) -> None:
    x = coarse_logits(kernels, layer.in_channels, *low)
    x[1, :, 1:] = 0  # one class everywhere, the shortcut's case
    case = Case(layer, (low, size), output="labels").on(kernels)
    y = run_poisoned("upsample_classify", *case.arguments((x,), {}))
    assert torch.equal(y, case.reference64((x,), {}))


@pytest.mark.parametrize(("layer", "low", "size"), EXACT)
def test_non_finite_logits(layer: Layer, low: Size, size: Size, kernels: Kernels) -> None:
    """As torch has it: non-finite just where torch's are, and NaN is the largest of all."""
    x = coarse_logits(kernels, layer.in_channels, *low)
    tolerance = max(1e-6, torch.finfo(kernels.dtype).eps)
    for value in (float("nan"), float("inf"), float("-inf")):
        x[torch.rand(x.shape) < 0.01] = value
    x[0, :, 0, 0] = float("-inf")
    for output in ops.OUTPUTS:
        case = Case(layer, (low, size), output=output).on(kernels)
        y, ref64 = (
            run_poisoned("upsample_classify", *case.arguments((x,), {})),
            case.reference64((x,), {}),
        )
        if output == "labels":
            assert torch.equal(y, ref64)
        else:
            torch.testing.assert_close(
                y.double(), ref64, rtol=tolerance, atol=tolerance, equal_nan=True, msg=output
            )


@pytest.mark.parametrize("magnitude", [1e-30, 1e30, 3e38])
def test_labels_of_extreme_logits(magnitude: float, kernels: Kernels) -> None:
    """Differences of finite logits may be infinite."""
    x = ((2 * torch.rand(1, 19, 5, 9) - 1) * magnitude).to(kernels.dtype)
    case = Case(upsample(19), ((5, 9), (40, 72)), output="labels").on(kernels)
    y = run_poisoned("upsample_classify", *case.arguments((x,), {}))
    logits64 = replace(case, output="logits").reference64((x,), {})
    assert_labels(y, logits64, LABEL_ULPS * magnitude)


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    "layer",
    [
        STEM_CONV[5],
        replace(DSCONV[1], in_channels=32),
        replace(INVERTED_RESIDUAL[0], in_channels=32, out_channels=32),
        replace(PYRAMID_POOLING[0], mid_channels=32),
        replace(FEATURE_FUSION[0], mid_channels=32),
    ],
    ids=lambda layer: layer.op,
)
def test_nan_and_infinity_are_kept(layer: Layer, kernels: Kernels) -> None:
    """One pixel of NaN or infinity spoils what it reaches, no more and no less.

    Resizes by powers of two are exact: which pixels are reached is then no matter of rounding. Channels are
    multiples of 32: where they are padded, infinity times the padding's 0 is NaN. Infinity has no second
    half in bfloat16: in "high" it is as good as NaN, which is not clamped away.
    """
    sizes = ((8, 16), (2, 4)) if layer.op == "feature_fusion" else ((8, 16),)
    case = Case(layer, sizes, batch=2).on(kernels)
    weights = case.weights()
    for value in (float("nan"), *[float("inf")] * (kernels.arithmetic != "high")):
        inputs = case.inputs()
        inputs[0][1, 1, 5, 7] = value
        y = run_poisoned(layer.op, *case.arguments(inputs, weights))
        ref64 = case.reference64(inputs, weights)
        assert torch.equal(y.isfinite(), ref64.isfinite())
        # In bfloat16 up to three results in a row are rounded, by 2^-8 of themselves.
        rounding = 1e-4 if kernels.dtype == torch.float32 else 3 * 2**-8
        close = rounding * max(1.0, ref64[ref64.isfinite()].abs().max().item())
        torch.testing.assert_close(y.double(), ref64, rtol=rounding, atol=close, equal_nan=True)


INVARIANT = [
    Case(layer, sizes, batch, output=output)
    for batch in (1, 2, 3)
    for layer, sizes, output in (
        (STEM_CONV[5], ((21, 37),), "logits"),
        (DSCONV[0], ((21, 37),), "logits"),
        (DSCONV[3], ((11, 9),), "logits"),
        (INVERTED_RESIDUAL[0], ((11, 9),), "logits"),
        (INVERTED_RESIDUAL[2], ((2, 9),), "logits"),  # fewer rows than threads
        (PYRAMID_POOLING[0], ((11, 9),), "logits"),
        (PYRAMID_POOLING[4], ((11, 9),), "logits"),
        (FEATURE_FUSION[0], ((21, 18), (6, 5)), "logits"),
        (FEATURE_FUSION[3], ((21, 18), (6, 5)), "logits"),
        (upsample(19), ((5, 7), (33, 49)), "logits"),
        (upsample(19), ((5, 7), (33, 49)), "probabilities"),
        (upsample(19), ((5, 7), (33, 49)), "labels"),
    )
]


@pytest.mark.parametrize("case", INVARIANT, ids=str)
def test_threads_and_batches_do_not_change_a_bit(case: Case, kernels: Kernels) -> None:
    """Rows shared among threads, whole images a thread and images by themselves are the same arithmetic."""
    case = case.on(kernels)
    inputs, weights = case.inputs(), case.weights()
    arguments = case.arguments(inputs, weights)
    with threads(1):
        alone = [
            run_poisoned(case.layer.op, *(x[i : i + 1] for x in inputs), *arguments[len(inputs) :])
            for i in range(case.batch)
        ]
    for count in (1, 2, 3, 4):
        with threads(count):
            assert torch.equal(run_poisoned(case.layer.op, *arguments), torch.cat(alone)), count


# ---------------------------------------------------------------- the dispatcher's view

ONE_OF_EACH = [
    Case(STEM_CONV[5], ((9, 12),)),
    Case(STEM_CONV[5], ((9, 12),), raw=True),
    Case(DSCONV[7], ((5, 6),), batch=2),
    Case(INVERTED_RESIDUAL[3], ((5, 6),), batch=2),
    Case(PYRAMID_POOLING[2], ((5, 6),)),
    Case(FEATURE_FUSION[2], ((5, 6), (2, 2))),
    *(Case(upsample(19), ((2, 3), (9, 12)), batch=2, output=output) for output in ops.OUTPUTS),
]


@pytest.mark.parametrize(
    ("backend", "arithmetic"),
    [
        ("cpu", "float32"),
        ("cpu", "bfloat16"),
        ("reference", "float32"),
        pytest.param("reference", "bfloat16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_opcheck(case: Case, arithmetic: str, backend: str) -> None:
    case = replace(case, arithmetic=arithmetic)
    inputs, weights = case.inputs(), case.weights()
    arguments = list(case.arguments(inputs, weights))
    expected = run_poisoned(case.layer.op, *arguments)
    if backend == "reference":
        arguments[len(inputs)] = ops.pack([case.layer], [weights], backend, case.dtype)
        expected = case.reference(inputs, weights)
    op = getattr(torch.ops.fastscnn, case.layer.op)
    results = torch.library.opcheck(op.default, (*arguments, backend))
    assert set(results.values()) == {"SUCCESS"}
    assert torch.equal(op(*arguments, backend), expected)


def test_no_gradients() -> None:
    case = Case(DSCONV[1], ((5, 6),))
    (x,), weights = case.inputs(), random_weights(case.layer)
    y = torch.ops.fastscnn.dsconv(x.requires_grad_(), *case.arguments((x,), weights)[1:], "cpu")
    with pytest.raises(RuntimeError, match="no gradient"):
        y.sum().backward()


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_empty_batches(case: Case) -> None:
    inputs, weights = case.inputs(), random_weights(case.layer)
    nothing = tuple(x[:0] for x in inputs)
    op = getattr(torch.ops.fastscnn, case.layer.op)
    y = op(*case.arguments(nothing, weights), "cpu")
    assert y.shape == (0, *case.reference(inputs, weights).shape[1:])


X, WEIGHTS = torch.zeros(1, 16, 5, 6), random_weights(DSCONV[1])
PACKED = ops.pack([DSCONV[1]], [WEIGHTS], "cpu") if registry.isas() else None


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": X[0]}, ValueError, r"x must be \(N, 16, H, W\), got shape \(16, 5, 6\)"),
        ({"x": X[:, :15]}, ValueError, r"x must be \(N, 16, H, W\), got shape \(1, 15, 5, 6\)"),
        ({"x": X[:, :, :0]}, ValueError, "x must be at least 1x1, got 0x6"),
        ({"x": X.double()}, TypeError, "x must be of dtype torch.float32, .*, got torch.float64"),
        (
            {"x": X.byte()},
            ValueError,
            "weights must be packed for torch.uint8, got .* torch.float32",
        ),
        ({"x": X.bfloat16()}, ValueError, "weights must be packed for torch.bfloat16, got .*32"),
        ({"x": X.to("meta")}, ValueError, "x must be on cpu, got meta"),
        (
            {"backend": "tpu"},
            ValueError,
            "backend must be one of reference, cpu, triton, cuda, got 'tpu'",
        ),
        ({"layer": DSCONV[0]}, ValueError, r"x must be \(N, 32, H, W\), got shape"),
        ({"layer": INVERTED_RESIDUAL[0]}, ValueError, "layer must be one encoded dsconv"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ops.dsconv(**{"x": X, "weights": PACKED, "layer": DSCONV[1], "backend": "cpu", **change})


def test_wrong_arguments_of_two_inputs() -> None:
    layer = FEATURE_FUSION[0]
    weights = ops.pack([layer], [random_weights(layer)], "cpu")
    high, low = torch.zeros(2, 16, 8, 8), torch.zeros(2, 32, 2, 2)
    with pytest.raises(ValueError, match="low must have high's batch 2, got 1"):
        ops.feature_fusion(high, low[:1], weights, layer)
    with pytest.raises(ValueError, match=r"low must be \(N, 32, H, W\), got shape"):
        ops.feature_fusion(high, high, weights, layer)
    with pytest.raises(TypeError, match=r"low must be of dtype torch.float32 .*, got torch.bf"):
        ops.feature_fusion(high, low.bfloat16(), weights, layer)


def test_wrong_dtypes_of_a_layer_that_takes_raw_pixels() -> None:
    layer, x = STEM_CONV[5], torch.zeros(1, 3, 9, 12)
    weights = ops.pack([layer], [random_weights(layer)], "cpu")
    with pytest.raises(TypeError, match=r"x must be of dtype torch.float32, torch.uint8 .*16"):
        ops.stem_conv(x.bfloat16(), weights, layer)
    with pytest.raises(TypeError, match=r"dtype must be torch.float32, torch.bfloat16, .*64"):
        ops.stem_conv(x.double(), weights, layer, dtype=torch.float64)
    with pytest.raises(ValueError, match="weights must be packed for torch.bfloat16, got .*32"):
        ops.stem_conv(x.byte(), weights, layer, dtype=torch.bfloat16)


def test_wrong_outputs_and_sizes() -> None:
    layer = upsample(2)
    weights, x = ops.pack([layer], [{}], "cpu"), torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"output must be one of .*, got 'scores'"):
        ops.upsample_classify(x, weights, layer, (8, 8), "scores")
    with pytest.raises(ValueError, match="size must be at least 1x1, got 0x8"):
        ops.upsample_classify(x, weights, layer, (0, 8))


@pytest.mark.parametrize(
    "layer",
    [
        replace(PYRAMID_POOLING[0], bins=()),
        replace(PYRAMID_POOLING[0], bins=(1, 0)),
        replace(PYRAMID_POOLING[0], bins=(1,) * 9),
        replace(PYRAMID_POOLING[0], bins=(2000,)),
        replace(STEM_CONV[0], stride=1),
        replace(STEM_CONV[0], in_channels=5),
        replace(DSCONV[0], stride=3),
        replace(DSCONV[0], dilation=0),
        replace(DSCONV[0], dilation=2000),
        replace(INVERTED_RESIDUAL[2], residual=True),
        replace(INVERTED_RESIDUAL[0], last_channels=8),
    ],
    ids=lambda layer: layer.op,
)
def test_impossible_layers_are_refused(layer: Layer) -> None:
    with pytest.raises(ValueError, match="must"):
        ops.pack([layer], [random_weights(layer)], "cpu")
