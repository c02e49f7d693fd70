"""The host side: plans of launches, their scratch memory, and running them on the current stream."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from fastscnn_fast.plan import Layer

from . import (
    dsconv,
    feature_fusion,
    inverted_residual,
    pyramid_pooling,
    stem_conv,
    upsample_classify,
)
from .launch import Buffer, Launch, rounded_up
from .tiles import Architecture, tile

EXTERNAL = ("x", "high", "low", "weights", "out")
_LINE = 64  # bytes of which every pixel of an activation takes a multiple
_ALIGNMENT = 512

_PLANES = {
    "dsconv": dsconv.launches,
    "inverted_residual": inverted_residual.launches,
    "pyramid_pooling": pyramid_pooling.launches,
}


def activation(
    memory: str, dtype: torch.dtype, images: int, height: int, width: int, channels: int
) -> Buffer:
    """An (N, H, W, C) activation whose pixels are padded to whole lines."""
    pitch = rounded_up(channels, _LINE // dtype.itemsize)
    strides = (height * width * pitch, width * pitch, pitch, 1)
    return Buffer(memory, dtype, (images, height, width, channels), strides)


def planes(memory: str, images: int, height: int, width: int, classes: int) -> Buffer:
    """The (N, H, W, K) logits: float32, a plane a class."""
    strides = (classes * height * width, width, 1, height * width)
    return Buffer(memory, torch.float32, (images, height, width, classes), strides)


@dataclass(frozen=True)
class Plan:
    """Launches in order, and where their scratch memories lie in one arena of ``bytes``."""

    launches: tuple[Launch, ...]
    offsets: Mapping[str, int]
    bytes: int

    @staticmethod
    def of(launches: Sequence[Launch]) -> Plan:
        """Places each scratch memory where none lies that is in use at the same time."""
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        size: dict[str, int] = {}
        for index, launch in enumerate(launches):
            for buffer in launch.buffers.values():
                if buffer.memory not in EXTERNAL:
                    first.setdefault(buffer.memory, index)
                    last[buffer.memory] = index
                    size[buffer.memory] = max(
                        size.get(buffer.memory, 0), rounded_up(buffer.bytes, _ALIGNMENT)
                    )
        offsets: dict[str, int] = {}
        for name in sorted(size, key=lambda n: -size[n]):
            taken = sorted(
                (offsets[other], offsets[other] + size[other])
                for other in offsets
                if first[other] <= last[name] and first[name] <= last[other]
            )
            at = 0
            for begin, end in taken:
                if at + size[name] <= begin:
                    break
                at = max(at, end)
            offsets[name] = at
        total = max((offsets[n] + size[n] for n in size), default=0)
        return Plan(tuple(launches), offsets, total)


def op_plan(
    layer: Layer,
    inputs: Sequence[Buffer],
    out: Buffer,
    weights: dict[str, Buffer],
    dtype: torch.dtype,
    architecture: Architecture,
    output: str = "logits",
    precision: str = "ieee",
) -> Plan:
    """One fused op, in the order of its launches."""
    return Plan.of(_launches(layer, inputs, out, weights, dtype, architecture, output, precision))


def _launches(
    layer: Layer,
    inputs: Sequence[Buffer],
    out: Buffer,
    weights: dict[str, Buffer],
    dtype: torch.dtype,
    architecture: Architecture,
    output: str,
    precision: str,
) -> list[Launch]:
    cut = tile(layer, dtype, architecture, prod(out.shape) // out.shape[-1])
    if layer.op == "stem_conv":
        return stem_conv.launches(layer, inputs[0], out, weights, cut, precision)
    if layer.op == "feature_fusion":
        high, low = inputs
        return feature_fusion.launches(layer, high, low, out, weights, cut, precision)
    if layer.op == "upsample_classify":
        return upsample_classify.launches(layer, inputs[0], out, output, cut, precision)
    return _PLANES[layer.op](layer, inputs[0], out, weights, cut, precision)


def network_plan(
    layers: Sequence[Layer],
    picture: Buffer,
    out: Buffer,
    weights: Sequence[dict[str, Buffer]],
    dtype: torch.dtype,
    architecture: Architecture,
    output: str,
    precision: str = "ieee",
) -> Plan:
    """The whole network on ``picture`` (N, C, H, W); layers as plan.program lists them."""
    launches: list[Launch] = []
    x = high = picture
    height, width = picture.shape[2:]
    for index, (layer, pieces) in enumerate(zip(layers, weights, strict=True)):
        inputs = [high, x] if layer.op == "feature_fusion" else [x]
        if layer.op == "upsample_classify":
            y = out
        else:
            if layer.op == "feature_fusion":
                height, width = high.shape[1:3]
            elif layer.op != "pyramid_pooling":
                height, width = layer.output_size(height, width)
            memory = layer.name or f"layer{index}"
            if layer.last_channels:
                y = planes(memory, x.shape[0], height, width, layer.last_channels)
            else:
                y = activation(memory, dtype, x.shape[0], height, width, layer.out_channels)
        launches += _launches(layer, inputs, y, pieces, dtype, architecture, output, precision)
        x = y
        if index == 2:  # the end of learning to downsample
            high = y
    return Plan.of(launches)


class _Bound:
    """A plan with its arena, ready for one call at a time on one stream."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._arena = torch.empty(plan.bytes, dtype=torch.uint8, device=device)
        self._weights: weakref.ref[Tensor] | None = None
        self._calls: list[tuple[Launch, dict[str, Any], list[tuple[str, str]]]] = []
        self._weight_buffers: list[tuple[dict[str, Any], list[tuple[str, Buffer]]]] = []
        for launch in plan.launches:
            fixed: dict[str, Any] = {}
            given, own = [], []
            for name, value in launch.arguments.items():
                if not isinstance(value, Buffer):
                    fixed[name] = value
                elif value.memory == "weights":
                    own.append((name, value))
                elif value.memory in EXTERNAL:
                    given.append((name, value.memory))
                else:
                    begin = plan.offsets[value.memory]
                    fixed[name] = value.view(self._arena[begin:])
            self._calls.append((launch, fixed, given))
            self._weight_buffers.append((fixed, own))

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        weights = tensors["weights"]
        if self._weights is None or self._weights() is not weights:
            self._weights = weakref.ref(weights)
            for fixed, buffers in self._weight_buffers:
                fixed.update((name, buffer.view(weights)) for name, buffer in buffers)
        for launch, fixed, given in self._calls:
            launch.run({**fixed, **{name: tensors[memory] for name, memory in given}})


class Pool:
    """Bound plans by device, stream and plan: taken for a call and given back, bounded in number.

    On one stream calls run in order, so a given-back arena may be taken at once; another stream or a
    concurrent call gets one of its own.
    """

    def __init__(self, most: int = 16) -> None:
        self._most = most
        self._free: dict[Any, list[_Bound]] = {}
        self._lock = Lock()

    def run(
        self, key: Any, plan: Plan, device: torch.device, tensors: Mapping[str, Tensor]
    ) -> None:
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (key, device, stream)
        with self._lock:
            free = self._free.pop(key, [])
            bound = free.pop() if free else None
            if free:
                self._free[key] = free
        if bound is None:
            bound = _Bound(plan, device)
        bound.run(tensors)
        with self._lock:
            self._free.setdefault(key, []).append(bound)
            self._free[key] = self._free.pop(key)  # the most recently used is last
            while sum(map(len, self._free.values())) > self._most:
                oldest = next(iter(self._free))
                self._free[oldest].pop(0)
                if not self._free[oldest]:
                    del self._free[oldest]
