"""Layers to be tested, on every backend: real ones, odd ones and sizes that show what is particular about them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from helpers import Kernels, in_layout, random_weights
from torch import Tensor

from fastscnn_fast import ops
from fastscnn_fast.program import reference
from fastscnn_fast.program.arithmetic import ARITHMETICS
from fastscnn_fast.program.layers import Layer

Size = tuple[int, ...]  # (height, width)


@dataclass(frozen=True)
class Case:
    """A layer and its input. ``sizes`` are those of x; of high and low; or of x and the result."""

    layer: Layer
    sizes: tuple[Size, ...]
    batch: int = 1
    layout: str = "channels_last"
    raw: bool = False
    output: str = "logits"
    arithmetic: str = "float32"

    @property
    def dtype(self) -> torch.dtype:
        return ARITHMETICS[self.arithmetic].dtype

    def on(self, kernels: Kernels) -> Case:
        """In that arithmetic, or in what it has for this op."""
        record = ARITHMETICS[kernels.arithmetic]
        layer = replace(self.layer, arithmetic=record.layers.get(self.layer.op, ""))
        return replace(self, layer=layer, arithmetic=kernels.arithmetic)

    def weights(self) -> dict[str, Tensor]:
        """Random ones, as rounded to the dtype."""
        named = random_weights(self.layer)
        return {name: w.to(self.dtype).float() for name, w in named.items()}

    def packed(self, weights: dict[str, Tensor]) -> Tensor:
        return ops.pack([self.layer], [weights], "cpu", *ARITHMETICS[self.arithmetic].asked)

    def enlarged(self, values: int = 64) -> Case:
        """With a batch so large that the result has so many values.

        The relative error of a few values says little: they may happen to cancel to almost nothing.
        """
        layer = self.layer
        keeps_size = layer.op in ("pyramid_pooling", "feature_fusion", "upsample_classify")
        h, w = self.sizes[-1] if layer.op == "upsample_classify" else self.sizes[0]
        h, w = (h, w) if keeps_size else layer.output_size(h, w)
        wanted = -(-values // (h * w * layer.result_channels))
        return replace(self, batch=max(self.batch, wanted))

    def inputs(self) -> tuple[Tensor, ...]:
        layer = self.layer
        channels = {"feature_fusion": (layer.mid_channels, layer.in_channels)}
        return tuple(
            self._input((self.batch, c, *size))
            for c, size in zip(channels.get(layer.op, (layer.in_channels,)), self.sizes)
        )

    def _input(self, shape: tuple[int, ...]) -> Tensor:
        if self.raw:
            return in_layout(torch.randint(256, shape, dtype=torch.uint8), self.layout)
        return in_layout(torch.randn(shape).to(self.dtype), self.layout)

    def reference(self, inputs: tuple[Tensor, ...], weights: dict[str, Tensor]) -> Tensor:
        weights = {name: w.to(self.dtype) for name, w in weights.items()}
        return self._reference(inputs, weights)

    def _reference(self, inputs: tuple[Tensor, ...], weights: dict[str, Tensor]) -> Tensor:
        function = getattr(reference, self.layer.op)
        if self.layer.op == "upsample_classify":
            return function(*inputs, self.layer, self.sizes[1], self.output)
        return function(*inputs, self.layer, weights)

    def reference64(self, inputs: tuple[Tensor, ...], weights: dict[str, Tensor]) -> Tensor:
        inputs = tuple(x if self.raw else x.double() for x in inputs)
        return self._reference(inputs, {name: w.double() for name, w in weights.items()})

    def arguments(self, inputs: tuple[Tensor, ...], weights: dict[str, Tensor]) -> tuple[Any, ...]:
        """What the op takes, without the backend."""
        rest: dict[str, tuple[Any, ...]] = {
            "stem_conv": (self.dtype,),
            "upsample_classify": (*self.sizes[-1], self.output),
        }
        encoded = ops.encode([self.layer])
        return (*inputs, self.packed(weights), encoded, *rest.get(self.layer.op, ()))

    def __str__(self) -> str:
        """The op and every field that differs from its default."""
        plain = Layer(self.layer.op, "", self.layer.in_channels, self.layer.out_channels)
        told = [self.layer.op, f"{self.layer.in_channels}to{self.layer.out_channels}"]
        for key, value in vars(self.layer).items():
            if key != "name" and value != getattr(plain, key):
                text = "x".join(map(str, value)) if isinstance(value, tuple) else value
                told.append(key if value is True else f"{key}={text}")
        told += [f"{h}x{w}" for h, w in self.sizes] + [f"batch={self.batch}"] * (self.batch > 1)
        told += [self.layout] * (self.layout != "channels_last") + ["raw"] * self.raw
        return " ".join(told + [self.output] * (self.output != "logits"))


# ---------------------------------------------------------------- shapes
# Odd sizes: below one vector, tile or block in each direction (1x1, 2x3, 6x5), around the depthwise block of
# 8 outputs (stride 1: widths 7, 8, 9, 15, 16, 17; stride 2: 15, 16, 17, 33) and around the tiles of 6 and 14
# pixels (7, 15, 17), and one with every remainder at once (33x49). Heights below, at and above the number
# of threads and the rows that a dilated window needs.
SIZES: tuple[Size, ...] = (
    *((1, 1), (2, 3), (6, 5), (3, 7), (1, 8), (5, 9), (4, 15), (2, 16), (3, 17)),
    *((9, 13), (17, 8), (7, 33), (33, 49)),
)

# Each variant has some switch that no other has, or a channel count that is no multiple of 16.
STEM_CONV = [
    Layer("stem_conv", "", c, 32, stride=2, padding=padding)
    for c in (1, 2, 3, 4)
    for padding in (0, 1)
] + [Layer("stem_conv", "", 3, 20, stride=2, activation="relu6")]
DSCONV = [
    Layer("dsconv", "", 32, 48, stride=2),
    Layer("dsconv", "", 16, 32, mid_activation="relu"),
    Layer("dsconv", "", 20, 40, stride=2, mid_activation="relu6", activation="relu6"),
    Layer("dsconv", "", 40, 24, dilation=4, activation="none"),
    Layer("dsconv", "", 16, 16, dilation=2),
    Layer("dsconv", "", 16, 16, dilation=3, stride=2),
    Layer("dsconv", "", 32, 32, last_channels=19),
    Layer("dsconv", "", 24, 40, last_channels=33, mid_activation="relu"),
    Layer("dsconv", "", 16, 64, last_channels=1),
]
INVERTED_RESIDUAL = [
    Layer("inverted_residual", "", 16, 16, mid_channels=96, residual=True),
    Layer("inverted_residual", "", 16, 16, mid_channels=96, activation="relu6", residual=True),
    Layer("inverted_residual", "", 16, 32, mid_channels=48, stride=2, activation="relu6"),
    Layer("inverted_residual", "", 20, 40, mid_channels=60, stride=2),
    Layer("inverted_residual", "", 20, 20, mid_channels=100, residual=True),
    Layer("inverted_residual", "", 24, 16, mid_channels=24, activation="none"),
]
PYRAMID_POOLING = [
    Layer("pyramid_pooling", "", c, o, mid, kernel=kernel, align_corners=align, bins=bins)
    for kernel in (1, 3)
    for c, o, mid, bins, align in (
        (32, 32, 8, (1, 2, 3, 6), False),
        (32, 48, 32, (1,), True),
        (40, 20, 20, (2, 4, 8), True),  # bins larger than most of SIZES
        (16, 16, 2, (1, 2, 3, 4, 5, 6, 7, 8), False),
    )
]
FEATURE_FUSION = [
    Layer("feature_fusion", "", 32, 32, 16, dilation=4),
    Layer("feature_fusion", "", 32, 32, 16, align_corners=True),
    Layer("feature_fusion", "", 20, 40, 24, dilation=2, activation="relu6", align_corners=True),
    Layer("feature_fusion", "", 16, 20, 40, dense=True),
    Layer("feature_fusion", "", 40, 16, 20, dense=True, align_corners=True),
]


def quarter(size: Size) -> Size:
    """The 1/32 features' size where ``size`` is the 1/8 features': two 3x3s of stride 2."""
    return ((size[0] + 3) // 4, (size[1] + 3) // 4)


VARIANTS = [*STEM_CONV, *DSCONV, *INVERTED_RESIDUAL, *PYRAMID_POOLING, *FEATURE_FUSION]


# ---------------------------------------------------------------- upsample_classify


def upsample(classes: int, align_corners: bool = False) -> Layer:
    return Layer(
        "upsample_classify", "", classes, classes, activation="none", align_corners=align_corners
    )


# Ratios: the network's 8, others up to a vector's width and beyond (one low column then serves a whole
# block), around 1, and downsampling, where one vector of results needs more low columns than one load has.
RATIOS: tuple[tuple[Size, Size], ...] = (
    ((4, 8), (32, 64)),
    ((5, 7), (33, 49)),
    ((3, 5), (20, 36)),
    ((2, 3), (67, 101)),
    ((1, 1), (5, 9)),
    ((1, 1), (1, 1)),
    ((1, 6), (3, 1)),
    ((6, 17), (6, 17)),
    ((7, 16), (8, 15)),
    ((9, 40), (4, 9)),
    ((8, 70), (3, 17)),
)
UPSAMPLES = [
    Case(upsample(classes, align), ratio, batch)
    for classes, batch in ((19, 1), (11, 3), (1, 3))
    for align in (False, True)
    for ratio in RATIOS
] + [Case(upsample(k), RATIOS[1]) for k in (2, 15, 16, 17, 33, 256, 300)]
LABEL_ULPS = 4 * torch.finfo(torch.float32).eps


def coarse_logits(kernels: Kernels, classes: int, height: int, width: int) -> Tensor:
    """Small integers, so that resizing by powers of two is exact and ties are many."""
    return torch.randint(-2, 3, (2, classes, height, width)).to(kernels.dtype)


# Exact resizes, so that every implementation sees the same ties and the same samples.
EXACT = [
    (upsample(classes, align), (4, width), (25, 8 * width - 7) if align else (32, 8 * width))
    for classes in (1, 2, 19)
    for width in (5, 9)
    for align in (False, True)
]
