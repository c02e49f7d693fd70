"""Random layers and random networks on the CPU, in every arithmetic and on every instruction set.

Layers are held to the float64 reference, whole networks to it and to their own layers. Hypothesis draws
shapes, switches and a seed; the numbers come from the seed. ``slow`` runs thousands.

A fixed layer of a real network can be held to a multiple of torch's own error (test_ops.py). Here that sets
one draw of chance against another: a result of few values, most of them clamped, may come out exact in one
arithmetic and not in the other, and a sum may cancel to much less than what was rounded on its way. So an
error passes as well where it is one that honest rounding makes of this very layer: that of the float64
reference when every number that it makes is moved, up or down by chance, by Bound.rounding of itself (helpers.honest,
the mean square over a few draws). That is as far as rounding goes, each time; it goes half as far in mean
square, so errors must conspire to get past the bound, whatever the layer does to them.

- bfloat16: 2^-8, half a unit in the last of 8 bits. Sums are float32.
- high: 3 * 2^-16 of a product: with a = a1 + a2 + r, |a2| <= 2^-8 |a|, |r| <= 2^-16 |a|, and b likewise, what
  is left out of a b is a2 b2 + r b + a r.
- float32: 2^-24 at each partial sum, of which the largest product here has 3240. They add up as chance does:
  2^-25.25 in mean square, of partial sums that grow to the whole, make 2^-25.25 (3240 / 2)^0.5 = 1e-6.

In a network all roundings may meet in one number that decides everything: four times as much passes there.
That leaves no room behind the bound, as the network is also, bit for bit, the chain of its layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import LABEL_ULPS, Case, Size
from helpers import (
    BOUNDS,
    LAYOUTS,
    Kernels,
    assert_honest,
    assert_labels,
    honest,
    in_layout,
    randomise,
    run_poisoned,
    threads,
)
from hypothesis import given, settings, strategies as st
from integers import random_integers, run_integers
from networks import Network, assert_chain
from torch import Tensor

from fastscnn_fast import ops
from fastscnn_fast.arch.config import PRESETS, Config, preset
from fastscnn_fast.backends import registry
from fastscnn_fast.lower.fold import fold
from fastscnn_fast.program import reference
from fastscnn_fast.program.layers import ACTIVATIONS, OPS, Layer
from fastscnn_fast.runtime.model import FastSCNN

pytestmark = pytest.mark.skipif(not registry.isas(), reason="the C++ extension is not built")

SEEDS, COUNTS, BATCHES = st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 3)
ARITHMETICS = st.sampled_from(sorted({kernels.arithmetic for kernels in Kernels.of_floats()}))


# ---------------------------------------------------------------- layers

CHANNELS = st.integers(1, 40)
SIZE, LARGE = (st.tuples(*[st.integers(1, most)] * 2) for most in (20, 70))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    op = draw(st.sampled_from(OPS))
    c, o, mid = draw(CHANNELS), draw(CHANNELS), draw(CHANNELS)
    sizes: tuple[Size, ...] = (draw(SIZE),)
    fields: dict[str, Any] = {"activation": draw(st.sampled_from(ACTIVATIONS))}
    raw, output = False, "logits"
    if op == "stem_conv":
        c, raw = draw(st.integers(1, 4)), draw(st.booleans())
        fields |= {"stride": 2, "padding": draw(st.integers(0, 1))}
        sizes = ((sizes[0][0] + 2, sizes[0][1] + 2),)
    elif op == "dsconv":
        fields |= {"stride": draw(st.integers(1, 2)), "dilation": draw(st.integers(1, 6))}
        fields |= {
            "mid_activation": draw(st.sampled_from(ACTIVATIONS)),
            "last_channels": draw(st.integers(0, 40)),
        }
    elif op == "inverted_residual":
        o = draw(st.sampled_from([c, o]))
        fields |= {"stride": draw(st.integers(1, 2)), "mid_channels": 3 * mid}
        fields |= {"residual": fields["stride"] == 1 and c == o and draw(st.booleans())}
    elif op == "pyramid_pooling":
        fields |= {"bins": tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=8)))}
        fields |= {"mid_channels": mid, "kernel": draw(st.sampled_from([1, 3]))}
    elif op == "feature_fusion":
        sizes = (*sizes, draw(SIZE))
        fields |= {"mid_channels": mid, "dense": draw(st.booleans())}
        fields |= {"dilation": 1 if fields["dense"] else draw(st.integers(1, 6))}
    else:
        sizes, o = (*sizes, draw(LARGE)), c
        output = draw(st.sampled_from(ops.OUTPUTS))
    fields |= {"align_corners": draw(st.booleans())}
    layer, layout = Layer(op, "", c, o, **fields), draw(st.sampled_from(LAYOUTS[:-1]))
    return Case(layer, sizes, draw(BATCHES), layout, raw, output, draw(ARITHMETICS)).enlarged()


def check_layer(case: Case, seed: int, count: int) -> None:
    torch.manual_seed(seed)
    inputs, weights = case.inputs(), case.weights()
    arguments = case.arguments(inputs, weights)

    def run64(output: str = case.output) -> Tensor:
        return replace(case, output=output).reference64(inputs, weights)

    labels = case.output == "labels"
    with threads(1):  # too small to share
        ref64, own = run64("logits" if labels else case.output), case.reference(inputs, weights)
        others = [] if labels else honest(run64, BOUNDS[case.arithmetic].rounding)
    with pytest.MonkeyPatch.context() as monkeypatch, threads(count):
        for isa in registry.isas(case.arithmetic):
            monkeypatch.setenv("FASTSCNN_ISA", isa)
            print(isa)
            y = run_poisoned(case.layer.op, *arguments)
            if labels:
                assert_labels(y, ref64, LABEL_ULPS * inputs[0].abs().max().item())
            else:
                assert_honest(y, own, ref64, others, BOUNDS[case.arithmetic].op[0])


@given(cases().filter(lambda case: case.layer.op != "upsample_classify"), SEEDS, COUNTS)
@settings(max_examples=60)
def test_random_layers_in_int8(case: Case, seed: int, count: int) -> None:
    torch.manual_seed(seed)
    layer, weights = case.layer, random_integers(case.layer)
    raw = layer.op != "stem_conv" or case.raw
    inputs = replace(case, raw=raw, arithmetic="float32").inputs()
    exact = run_integers(layer, inputs, weights, "reference")
    with pytest.MonkeyPatch.context() as monkeypatch, threads(count):
        for isa in registry.isas("int8"):
            monkeypatch.setenv("FASTSCNN_ISA", isa)
            print(isa)
            assert torch.equal(run_integers(layer, inputs, weights, "cpu"), exact)


@given(cases(), SEEDS, COUNTS)
@settings(max_examples=80)
def test_random_layers(case: Case, seed: int, count: int) -> None:
    check_layer(case, seed, count)


@pytest.mark.slow
@given(cases(), SEEDS, COUNTS)
@settings(max_examples=3000)
def test_many_random_layers(case: Case, seed: int, count: int) -> None:
    check_layer(case, seed, count)


# ---------------------------------------------------------------- networks

WIDTH = st.integers(1, 40)
SIDE = st.integers(3, 80)
SWITCHES: list[dict[str, Any]] = [
    {},
    *({"stem_padding": padding} for padding in (0, 1)),
    *({"dsconv_mid_activation": name} for name in ACTIVATIONS),
    *({"bottleneck_activation": name} for name in ACTIVATIONS),
    *({"pyramid_kernel": size} for size in (1, 3)),
    *({"align_corners": align} for align in (False, True)),
    {"fusion_refine": "dense", "fusion_dilation": 1},
    *({"fusion_refine": "depthwise", "fusion_dilation": dilation} for dilation in (1, 2, 4)),
    {"fusion_bias": True, "fusion_norm": False},
    {"pyramid_input_first": False},
]


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Any preset, perhaps with one switch changed, and with widths, depths and bins of its own."""
    bins = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=8)))
    channels = draw(st.integers(1, 4))
    fields: dict[str, Any] = {
        "num_classes": draw(st.sampled_from([1, 2, 11, 19, 33, 256, 300])),
        "in_channels": channels,
        "mean": (0.4,) * channels,
        "std": (0.3,) * channels,
        "downsample_channels": draw(st.tuples(WIDTH, WIDTH, WIDTH)),
        "bottleneck_channels": (
            *draw(st.tuples(WIDTH, WIDTH)),
            len(bins) * draw(st.integers(1, 8)),
        ),
        "bottleneck_repeats": draw(st.tuples(*[st.integers(1, 2)] * 3)),
        "expansion": draw(st.integers(1, 6)),
        "pyramid_bins": bins,
        "pyramid_channels": draw(WIDTH),
        "fusion_channels": draw(WIDTH),
    }
    name = draw(st.sampled_from(sorted(PRESETS)))
    return preset(name, **draw(st.sampled_from(SWITCHES)), **fields)


def check_network(
    config: Config, arithmetic: str, size: Size, batch: int, raw: bool, layout: str, seed: int
) -> None:
    """Of float64, such a network says itself how it amplifies rounding; of its ops it is the chain, bit by bit."""
    torch.manual_seed(seed)
    model = randomise(FastSCNN.from_config(config)).eval()
    net = Network.of(model, arithmetic)
    pixels = torch.randint(256, (batch, config.in_channels, *size), dtype=torch.uint8)
    x = in_layout(pixels if raw else (pixels / 128 - 1).to(net.fast.dtype), layout)
    folded = fold(model)

    def run64() -> Tensor:
        weights = [
            {name: w * 1 for name, w in named.items()} for named in folded.tensors
        ]  # moved too
        return reference.network(x if raw else x.double(), folded.program, weights)

    with threads(1):
        ref64, own = run64(), net.reference(x)
        others = honest(run64, 4 * BOUNDS[arithmetic].rounding, 8)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for isa in registry.isas(arithmetic):
            monkeypatch.setenv("FASTSCNN_ISA", isa)
            print(isa)
            assert_honest(net.run(x), own, ref64, others, BOUNDS[arithmetic].op[0])
            assert_chain(net, x, ops.OUTPUTS if config.num_classes <= 256 else ops.OUTPUTS[:2])


NETWORKS = st.tuples(
    configs(),
    ARITHMETICS,
    st.tuples(SIDE, SIDE),
    BATCHES,
    st.booleans(),
    st.sampled_from(LAYOUTS),
    SEEDS,
)


@given(NETWORKS)
@settings(max_examples=8)
def test_random_networks(drawn: Any) -> None:
    check_network(*drawn)


@pytest.mark.slow
@given(NETWORKS)
@settings(max_examples=400)
def test_many_random_networks(drawn: Any) -> None:
    check_network(*drawn)
