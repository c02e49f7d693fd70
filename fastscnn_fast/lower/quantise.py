"""From a folded network and the ranges of its values to int8: scales, zero points, integer weights and biases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..arch.network import PlainFastSCNN, Ranges
from ..arch.structure import Unfusable
from ..program.layers import PICTURE, Layer
from ..program.program import Program
from .fold import FoldedWeights

#: The largest value of an activation, and of a weight.
LEVELS, MOST = 255, 127
#: The smallest range that is told from nothing.
SMALLEST = 1e-6
#: What an end of a range may be at most.
MOST_RANGE = 1e30
#: The least normal float32.
LEAST = torch.finfo(torch.float32).tiny
#: What is said of ranges that are not used.
STALE = (
    "ranges must be of the weights as they are, which have changed since they were measured: measure them anew with"
    " fastscnn_fast.calibrate(model, pictures)"
)
#: What a bias may be at most, so that with a sum of products it fits 32 bits.
MOST_BIAS = 2**30


def value_names(program: Program) -> list[str]:
    """Names of all values that have 8 bits in int8: the layer's and the value's, as in "bottleneck1.0.expand"."""
    return [f"{layer.name}.{value}" for layer in program.layers for value in layer.values]


def check_ranges(program: Program, ranges: Ranges | None) -> Ranges:
    """``ranges`` themselves.

    Raises:
        Unfusable: there are none, they are not those of ``program``'s values, or one is no range.
    """
    if not ranges:
        raise Unfusable(
            "int8 needs the ranges of the network's values, which this model has not: measure them with"
            " fastscnn_fast.calibrate(model, pictures), or `python -m fastscnn_fast quantize`"
        )
    if not isinstance(ranges, Mapping):
        raise Unfusable(f"ranges must be a mapping of names to (low, high), got {ranges!r:.80}")
    names = value_names(program)
    anew = "measure them anew with fastscnn_fast.calibrate(model, pictures)"
    if missing := [name for name in names if name not in ranges]:
        raise Unfusable(
            f"ranges must hold every value of the network, {missing[0]} is missing: {anew}"
        )
    if unknown := [name for name in ranges if name not in names]:
        raise Unfusable(
            f"ranges must be of the network's values, it has no {unknown[0]!r:.80}: {anew}"
        )
    for name in names:
        if not _is_range(ranges[name]):
            raise Unfusable(
                f"range of {name} must be two finite numbers in order, got {ranges[name]!r:.80}"
            )
    return ranges


def check_fresh(model: PlainFastSCNN) -> None:
    """The model's ranges, if it has any, must be of its weights.

    Raises:
        Unfusable: weights have changed since.
    """
    if model.has_stale_ranges():
        raise Unfusable(STALE)


def _is_range(value: Any) -> bool:
    if not isinstance(value, Sequence) or len(value) != 2:
        return False
    if not all(isinstance(end, Real) and not isinstance(end, bool) for end in value):
        return False
    low, high = value
    # An integer of JSON may be larger than any float.
    return -MOST_RANGE <= low <= high <= MOST_RANGE


@dataclass(frozen=True)
class Value:
    """How a tensor of 8 bits is to be read: ``scale * (q - zero)``."""

    scale: float
    zero: int = 0

    @staticmethod
    def of(low: float, high: float, activation: str) -> Value:
        """The finest that holds the range and 0; after an activation the zero point is 0."""
        if activation == "relu6":
            high = min(high, 6.0)
        high = max(high, 0.0)
        low = min(low, 0.0) if activation == "none" else 0.0
        scale = max(high - low, SMALLEST) / LEVELS
        return Value(scale, min(max(round(-low / scale), 0), LEVELS))


class _Weights(dict[str, Tensor]):
    """The quantised tensors of a layer as they come about."""

    def product(
        self,
        name: str,
        weight: Tensor,
        bias: Tensor,
        inputs: Tensor,
        zeros: Tensor,
        to: Value | None,
    ) -> None:
        """A product whose ``weight`` is (O, K) in float64, ``bias`` (O,); ``inputs`` and ``zeros`` (K,) are its inputs' scales and zero points.

        ``to`` is what becomes of the sums, None: floats. ``name`` ends in "_" or is empty.
        """
        real = weight * inputs
        unit = torch.maximum(real.abs().amax(1) / MOST, bias.abs() / MOST_BIAS).detach()
        unit = torch.where(unit > 0, unit, torch.ones_like(unit))
        self.keep(name, real / unit[:, None], bias / unit, unit, inputs, zeros, to)

    def keep(
        self,
        name: str,
        weight: Tensor,
        bias: Tensor,
        unit: Tensor,
        inputs: Tensor,
        zeros: Tensor,
        to: Value | None,
    ) -> None:
        """The same with weight and bias in units (O,) of the sums, which are yet to be rounded."""
        integers = weight.round()
        self[f"{name}weight"] = integers.to(torch.int8)
        self[f"{name}bias"] = (bias - integers @ zeros).round().to(torch.int32)
        multiplier = (unit if to is None else unit / to.scale).float()
        self[f"{name}multiplier"] = torch.where(multiplier < LEAST, 0.0, multiplier)
        if to is not None:
            self[f"{name}zero"] = torch.tensor([to.zero], dtype=torch.int32)

    def pointwise(
        self, name: str, tensors: Mapping[str, Tensor], of: Value, to: Value | None
    ) -> None:
        weight = tensors[f"{name}_weight"]
        like = weight.new_ones(weight.shape[1])
        self.product(
            f"{name}_", weight, tensors[f"{name}_bias"], of.scale * like, of.zero * like, to
        )

    def depthwise(self, name: str, tensors: Mapping[str, Tensor], of: Value, to: Value) -> None:
        """Where the input is padded with zeros, which must be its zero point."""
        weight = tensors[f"{name}_weight"]
        if of.zero != 0:
            raise Unfusable(
                f"int8 needs an activation before the depthwise convolution {name}, there is none"
            )
        like = weight.new_ones(9)
        self.product(
            f"{name}_", weight.flatten(1), tensors[f"{name}_bias"], of.scale * like, 0 * like, to
        )
        self[f"{name}_weight"] = self[f"{name}_weight"].view(weight.shape)


class _Fake(_Weights):
    """The same as floats, rounded by torch's fake-quantise ops, through which gradients pass."""

    def keep(
        self,
        name: str,
        weight: Tensor,
        bias: Tensor,
        unit: Tensor,
        inputs: Tensor,
        zeros: Tensor,
        to: Value | None,
    ) -> None:
        ones = torch.ones_like(unit, dtype=torch.float32)
        none = torch.zeros_like(unit, dtype=torch.int32)
        rounded = torch.fake_quantize_per_channel_affine(weight, ones, none, 0, -MOST, MOST)
        moved = rounded.detach() @ zeros
        most = 2 * MOST_BIAS
        sums = torch.fake_quantize_per_tensor_affine(bias - moved, 1.0, 0, -most, most) + moved
        self[f"{name}weight"] = rounded * unit[:, None] / inputs
        self[f"{name}bias"] = sums * unit


def padding_pixels(mean: Tensor) -> Tensor:
    """The pixels (C,) that surround a picture: the nearest to the normalised zero."""
    return (LEVELS * mean).round()


def _stem(named: _Weights, tensors: Mapping[str, Tensor], to: Value) -> None:
    """``weight`` of pixels q: normalised is (q / 255 - mean) / std."""
    weight, mean, std = tensors["weight"], tensors["mean"], tensors["std"]
    if mean.min() < 0 or mean.max() > 1:
        raise Unfusable(f"int8 needs mean from 0 to 1, that of a picture, got {mean.tolist()}")
    inputs = (1 / (LEVELS * std))[:, None, None].expand(weight.shape[1:]).reshape(-1)
    zeros = (LEVELS * mean)[:, None, None].expand(weight.shape[1:]).reshape(-1)
    named.product("", weight.flatten(1), tensors["bias"], inputs, zeros, to)
    named["weight"] = named["weight"].view(weight.shape)
    named["pad"] = padding_pixels(mean).to(torch.int32)
    named["scale"] = (LEVELS * std).float()
    named["shift"] = (LEVELS * mean).float()


def _pyramid(
    named: _Weights,
    layer: Layer,
    tensors: Mapping[str, Tensor],
    x: Value,
    branches: Sequence[Value],
    out: Value,
) -> None:
    parts = []
    for index, to in enumerate(branches):
        one = type(named)()
        branch = {f"b_{kind}": tensors[f"branch_{kind}"][index] for kind in ("weight", "bias")}
        one.pointwise("b", branch, x, to)
        parts.append(one)
    for kind in parts[0]:
        stacked = torch.stack([one[kind] for one in parts])
        named[kind.replace("b_", "branch_")] = stacked.flatten() if kind == "b_zero" else stacked
    weight = tensors["out_weight"]
    taps = weight.shape[2] * weight.shape[3]
    counts = [layer.in_channels, *[layer.mid_channels] * len(branches)]

    def spread(values: Sequence[float]) -> Tensor:
        each = [weight.new_full((count * taps,), v) for count, v in zip(counts, values)]
        return torch.cat(each)

    scales = spread([x.scale, *(to.scale for to in branches)])
    zeros = spread([x.zero, *(to.zero for to in branches)])
    named.product("out_", weight.flatten(1), tensors["out_bias"], scales, zeros, out)
    named["out_weight"] = named["out_weight"].view(weight.shape)


def _fusion(
    named: _Weights,
    layer: Layer,
    tensors: Mapping[str, Tensor],
    high: Value,
    low: Value,
    mid: Value,
    out: Value,
) -> None:
    (named.pointwise if layer.dense else named.depthwise)("refine", tensors, low, mid)
    first, second = tensors["low_weight"], tensors["high_weight"]
    both = torch.cat([first, second], 1)
    counts = (first.shape[1], second.shape[1])
    scales, zeros = (
        torch.cat([first.new_full((n,), v) for n, v in zip(counts, values)])
        for values in ((mid.scale, high.scale), (float(mid.zero), float(high.zero)))
    )
    named.product("", both, tensors["bias"], scales, zeros, out)
    joint = named.pop("weight")
    named["low_weight"], named["high_weight"] = joint[:, : counts[0]], joint[:, counts[0] :]


def _activations(layer: Layer) -> tuple[str, ...]:
    """What precedes each of ``layer.values``."""
    own = layer.activation
    return {
        "stem_conv": (own,),
        "dsconv": (layer.mid_activation, own),
        "inverted_residual": (own, own, "none"),
        "pyramid_pooling": (*("relu",) * len(layer.bins), own),
        "feature_fusion": ("none" if layer.dense else "relu", own),
    }.get(layer.op, ())


def _layers(
    program: Program,
    tensors: Sequence[Mapping[str, Tensor]],
    ranges: Ranges | None,
    kind: type[_Weights],
) -> Iterator[tuple[Layer, list[Value], _Weights]]:
    """Each layer with its values and, rounded as ``kind`` does, its weights."""
    known = check_ranges(program, ranges)
    results: list[Value] = []
    for layer, folded in zip(program.layers, tensors):
        values = [
            Value.of(*known[f"{layer.name}.{name}"], activation)
            for name, activation in zip(layer.values, _activations(layer))
        ]
        x = [results[at] for at in layer.inputs if at != PICTURE]
        named = kind()
        if layer.op == "stem_conv":
            _stem(named, folded, values[0])
        elif layer.op == "dsconv":
            named.depthwise("depthwise", folded, x[0], values[0])
            named.pointwise("pointwise", folded, values[0], values[1])
            if layer.last_channels:
                named.pointwise("last", folded, values[1], None)
        elif layer.op == "inverted_residual":
            named.pointwise("expand", folded, x[0], values[0])
            named.depthwise("depthwise", folded, values[0], values[1])
            named.pointwise("project", folded, values[1], values[2])
            ratio = x[0].scale / values[2].scale if layer.residual else 0.0
            named["residual_multiplier"] = torch.tensor([ratio]).float()
        elif layer.op == "pyramid_pooling":
            _pyramid(named, layer, folded, x[0], values[:-1], values[-1])
        elif layer.op == "feature_fusion":
            _fusion(named, layer, folded, x[0], x[1], *values)
        if layer.op in ("inverted_residual", "pyramid_pooling"):
            named["input_zero"] = torch.tensor([x[0].zero], dtype=torch.int32)
        yield layer, values, named
        results.append(values[-1] if values else Value(1.0))


@torch.no_grad()
def quantise(folded: FoldedWeights) -> tuple[dict[str, Tensor], ...]:
    """Per layer what ``layer.quantised_weights()`` names, of weights with their ranges.

    Raises:
        Unfusable: ranges are missing or wrong, sums may overflow, or a depthwise convolution has no activation before it.
    """
    tensors = [{name: t.double().cpu() for name, t in named.items()} for named in folded.tensors]
    made = []
    for layer, _, named in _layers(folded.program, tensors, folded.ranges, _Weights):
        ordered = {name: named[name].contiguous() for name in layer.quantised_weights()}
        check_sums(layer, ordered)
        made.append(ordered)
    return tuple(made)


def fake_quantise(
    program: Program, tensors: Sequence[Mapping[str, Tensor]], ranges: Ranges
) -> tuple[list[dict[str, Tensor]], dict[str, Value]]:
    """What :func:`quantise` rounds, as the float64 that it stands for, through which gradients pass; and all values.

    ``tensors`` are those of :func:`fastscnn_fast.lower.fold.folded_tensors`.

    Raises:
        Unfusable: as :func:`quantise`, but for overflows.
    """
    made, values = [], {}
    for (layer, own, named), folded in zip(_layers(program, tensors, ranges, _Fake), tensors):
        made.append({name: named.get(name, folded[name]) for name in layer.weights()})
        values.update({f"{layer.name}.{name}": value for name, value in zip(layer.values, own)})
    return made, values


def check_sums(layer: Layer, named: Mapping[str, Tensor]) -> None:
    """No sum of products may leave 32 bits, nor what becomes of it, whatever the input is; zero points have 8 bits.

    Multipliers are no denormals, which kernels take for 0.

    Raises:
        Unfusable: one may, or is.
    """
    for name, tensor in named.items():
        integral = name.endswith("zero") or name == "pad"
        if integral and not bool(((tensor >= 0) & (tensor <= LEVELS)).all()):
            got = tensor.flatten().tolist()
            raise Unfusable(
                f"{name} of {layer.op} {layer.name} must be from 0 to {LEVELS}, got {got}"
            )
        if not name.endswith("multiplier"):
            continue
        if bool(((tensor != 0) & (tensor.abs() < LEAST)).any()):
            raise Unfusable(f"{name} of {layer.op} {layer.name} must be 0 or at least {LEAST:.3g}")
        if name == "residual_multiplier":
            if not (abs(float(named[name])) < 2**22):
                raise Unfusable(
                    f"{name} of {layer.op} {layer.name} must be below 2**22, got {float(named[name]):.3g}"
                )
            continue
        prefix = name.removesuffix("multiplier")
        bias, multiplier = named[f"{prefix}bias"].double(), named[name].double()
        joint = layer.op == "feature_fusion" and not prefix
        parts = ["low_weight", "high_weight"] if joint else [f"{prefix}weight"]
        most = bias.abs()
        for part in parts:
            weight = named[part].double().abs()
            most = most + LEVELS * weight.flatten(bias.dim()).sum(-1)
        sound = bool((most < 2**31 - 256).all() and (most * multiplier.abs() < 2**30).all())
        if not (sound and bool(multiplier.isfinite().all())):
            raise Unfusable(
                f"{prefix}sums of {layer.op} {layer.name} may reach {float(most.max()):.3g}, times"
                f" {float(multiplier.abs().max()):.3g}: more than int8's arithmetic holds (a range that is far too"
                " small, or too many channels)"
            )
