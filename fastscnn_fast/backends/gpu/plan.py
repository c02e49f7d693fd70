"""The host side: plans of launches, their scratch memory, and running them on the current stream."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from math import prod
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...kernels.launch import Launch, Tile
from ...lower import gpu as layout
from ...lower.pack import counted
from ...program import reference
from ...program.layers import Layer
from ...program.memory import Buffer, pixel_pitch, rounded_up
from . import choices, cuda
from .choices import Choice, Choices
from .cuda import CudaStep
from .tiles import Architecture, tile

EXTERNAL = ("x", "high", "low", "weights", "out")
_INTERPRETER = Lock()  # which patches triton.language for the whole process while a kernel runs
_ALIGNMENT = 512


def activation(
    memory: str, dtype: torch.dtype, images: int, height: int, width: int, channels: int
) -> Buffer:
    """An (N, H, W, C) activation whose pixels are padded to whole lines."""
    pitch = pixel_pitch(channels, dtype)
    strides = (height * width * pitch, width * pitch, pitch, 1)
    return Buffer(memory, dtype, (images, height, width, channels), strides)


def planes(memory: str, images: int, height: int, width: int, classes: int) -> Buffer:
    """The (N, H, W, K) logits: float32, a plane a class."""
    strides = (classes * height * width, width, 1, height * width)
    return Buffer(memory, torch.float32, (images, height, width, classes), strides)


@dataclass(frozen=True)
class TorchStep:
    """One fused op by plain torch, where :mod:`.choices` says that it is the fastest.

    ``arguments`` are the op's activations and its pieces of packed weights. Tensors of EXTERNAL memories are
    (N, C, H, W), scratch ones are views (N, H, W, C).
    """

    layer: Layer
    arguments: Mapping[str, Buffer]
    dtype: torch.dtype
    output: str
    tf32: bool

    @property
    def buffers(self) -> Mapping[str, Buffer]:
        return self.arguments

    def plain(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The op's weights, as :mod:`fastscnn_fast.reference` takes them."""
        return {
            name: value.to(self.dtype, copy=True, memory_format=torch.channels_last)
            if value.dim() == 4
            else value.to(self.dtype, copy=True)
            for name, value in layout.unpacked(self.layer, pieces).items()
        }

    def run(self, values: Mapping[str, Any], plain: Mapping[str, Tensor]) -> None:
        """On the current device and stream; ``values`` has a tensor for every activation."""
        layer = self.layer
        *inputs, out = (
            values[name] if self.arguments[name].memory in EXTERNAL else _planes(values[name])
            for name in (*input_names(layer), "out")
        )
        with (
            torch.autocast(out.device.type, enabled=False),
            torch.no_grad(),
            reference.tf32(self.tf32) if self.dtype == torch.float32 else nullcontext(),
        ):
            out.copy_(reference.run(layer, inputs, plain, out.shape[-2:], self.output))
            channels = out.shape[1]
            padding = layout.padded(channels) - channels
            if layer.op != "upsample_classify" and padding and out.stride(3) >= channels + padding:
                shape = (out.shape[0], padding, *out.shape[2:])
                out.as_strided(shape, out.stride(), out.storage_offset() + channels).zero_()


def input_names(layer: Layer) -> tuple[str, ...]:
    return ("high", "low") if layer.op == "feature_fusion" else ("x",)


def _planes(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


Step = Launch | CudaStep | TorchStep


@dataclass(frozen=True)
class Plan:
    """Steps in order, and where their scratch memories lie in one arena of ``bytes``."""

    steps: tuple[Step, ...]
    offsets: Mapping[str, int]
    bytes: int

    @property
    def launches(self) -> tuple[Launch, ...]:
        return tuple(step for step in self.steps if isinstance(step, Launch))

    @staticmethod
    def of(steps: Sequence[Step]) -> Plan:
        """Places each scratch memory where none lies that is in use at the same time."""
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        size: dict[str, int] = {}
        for index, step in enumerate(steps):
            for buffer in step.buffers.values():
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
        return Plan(tuple(steps), offsets, total)


@dataclass(frozen=True)
class Place:
    """A layer with the memory that it reads and writes; ``inputs`` of feature_fusion are (high, low)."""

    layer: Layer
    inputs: tuple[Buffer, ...]
    out: Buffer
    weights: Mapping[str, Buffer]

    def key(self, dtype: torch.dtype, precision: str, output: str) -> str:
        return choices.layer_key(self.layer, self.inputs, self.out, dtype, precision, output)

    def tile(self, dtype: torch.dtype, architecture: Architecture) -> Tile:
        """The one in use where nothing was tuned."""
        pixels = prod(self.out.shape) // self.out.shape[-1]
        return tile(self.layer, dtype, architecture, pixels)


def op_plan(
    place: Place,
    dtype: torch.dtype,
    architecture: Architecture,
    output: str = "logits",
    precision: str = "ieee",
    chosen: Choices = choices.NONE,
    backend: str = "triton",
) -> Plan:
    """One fused op, in the order of its launches, by the kernels of ``backend`` where nothing else was chosen."""
    return Plan.of(_steps(place, dtype, architecture, output, precision, chosen, backend))


def _steps(
    place: Place,
    dtype: torch.dtype,
    architecture: Architecture,
    output: str,
    precision: str,
    chosen: Choices,
    backend: str,
) -> list[Step]:
    layer, out, weights = place.layer, place.out, dict(place.weights)
    cut: Choice = chosen.get(place.key(dtype, precision, output)) or (
        choices.CUDA if backend == "cuda" else place.tile(dtype, architecture)
    )
    if cut == choices.CUDA:
        return [cuda.step(layer, place.inputs, out, weights, dtype, output)]
    if cut == choices.TORCH:
        arguments = {**dict(zip(input_names(layer), place.inputs)), "out": out, **weights}
        return [TorchStep(layer, arguments, dtype, output, precision == "tf32")]
    kernel = import_module(f"fastscnn_fast.kernels.{layer.op}")  # the one place that needs triton
    rest = [output] if layer.op == "upsample_classify" else [weights]
    return [*kernel.launches(layer, *place.inputs, out, *rest, cut, precision)]


def network_plan(
    layers: Sequence[Layer],
    picture: Buffer,
    out: Buffer,
    weights: Sequence[dict[str, Buffer]],
    dtype: torch.dtype,
    architecture: Architecture,
    output: str,
    precision: str = "ieee",
    chosen: Choices = choices.NONE,
    backend: str = "triton",
) -> Plan:
    """The whole network on ``picture`` (N, C, H, W); layers as plan.program lists them."""
    return Plan.of(
        [
            step
            for place in places(layers, picture, out, weights, dtype)
            for step in _steps(place, dtype, architecture, output, precision, chosen, backend)
        ]
    )


def places(
    layers: Sequence[Layer],
    picture: Buffer,
    out: Buffer,
    weights: Sequence[dict[str, Buffer]],
    dtype: torch.dtype,
) -> Iterator[Place]:
    """Where the network's layers read and write, in order."""
    x = high = picture
    height, width = picture.shape[2:]
    for index, (layer, pieces) in enumerate(zip(layers, weights, strict=True)):
        inputs = (high, x) if layer.op == "feature_fusion" else (x,)
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
        yield Place(layer, inputs, y, pieces)
        x = y
        if index == 2:  # the end of learning to downsample
            high = y


# Of torch steps, by packed weights: how often those were written to, and what was unpacked since.
_plain = WeakTensorKeyDictionary()


def _plain_of(step: TorchStep, weights: Tensor, pieces: Mapping[str, Tensor]) -> Any:
    version = counted(weights)
    known = _plain.get(weights)
    if known is None or known[0] != version:
        known = _plain[weights] = (version, {})
    key = (step.layer, step.dtype, *(buffer.offset for buffer in step.buffers.values()))
    if key not in known[1]:
        plain = step.plain(pieces)
        if weights.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return plain  # of the graph's own memory, and not filled before it runs
            torch.cuda.current_stream(
                weights.device
            ).synchronize()  # once: other streams read them too
        known[1][key] = plain
    return known[1][key]


class _Call:
    """A step with what it is run on: scratch from the start, weights once bound, other tensors at each call."""

    def __init__(self, step: Any, scratch: Mapping[str, Tensor]) -> None:
        self._step = step
        self._values: dict[str, Any] = {}
        self._own: dict[str, Buffer] = {}  # pieces of the weights
        self._given: list[tuple[str, str]] = []  # name and memory
        for name, value in step.arguments.items():
            if not isinstance(value, Buffer):
                self._values[name] = value
            elif value.memory == "weights":
                self._own[name] = value
            elif value.memory in EXTERNAL:
                self._given.append((name, value.memory))
            else:
                self._values[name] = value.view(scratch[value.memory])

    def pieces(self, weights: Tensor) -> dict[str, Tensor]:
        return {name: buffer.view(weights) for name, buffer in self._own.items()}

    def given(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensors[memory] for name, memory in self._given}

    def bind(self, weights: Tensor) -> None:
        self._values |= self.pieces(weights)

    def forget(self) -> None:
        """Views would keep the memory of weights that are gone."""
        for name in self._own:
            self._values.pop(name, None)

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        self._step.run({**self._values, **self.given(tensors)})


class _CudaCall(_Call):
    """Its struct is filled as the tensors become known, so that a call sets few addresses."""

    def __init__(self, step: CudaStep, scratch: Mapping[str, Tensor]) -> None:
        super().__init__(step, scratch)
        self._arguments = step.struct()
        self._set(self._values)

    def _set(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            setattr(self._arguments, name, tensor.data_ptr())

    def bind(self, weights: Tensor) -> None:
        self._set(self.pieces(weights))

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        self._set(self.given(tensors))
        self._step.run(self._arguments)


class _TorchCall(_Call):
    """Its weights are unpacked when they are bound."""

    def bind(self, weights: Tensor) -> None:
        self._plain = _plain_of(self._step, weights, self.pieces(weights))

    def forget(self) -> None:
        self._plain = None

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        self._step.run({**self._values, **self.given(tensors)}, self._plain)


_CALLS: dict[type, type[_Call]] = {Launch: _Call, CudaStep: _CudaCall, TorchStep: _TorchCall}


class _Bound:
    """A plan with its arena, ready for one call at a time on one stream."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._one_at_a_time = _INTERPRETER if device.type == "cpu" else nullcontext()
        self._weights: weakref.ref[Tensor] | None = None
        self._bound_to = (0, 0)
        with torch.inference_mode(False):  # a later call may be outside of it
            self._arena = torch.empty(plan.bytes, dtype=torch.uint8, device=device)
            scratch = {memory: self._arena[begin:] for memory, begin in plan.offsets.items()}
            self._calls = [_CALLS[type(step)](step, scratch) for step in plan.steps]

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        weights = tensors["weights"]
        if (
            self._weights is None
            or self._weights() is not weights
            or self._bound_to != (weights.data_ptr(), counted(weights))
        ):
            self._bind(weights)
        with self._one_at_a_time:
            for call in self._calls:
                call.run(tensors)

    def _bind(self, weights: Tensor) -> None:
        with torch.inference_mode(False):
            for call in self._calls:
                call.bind(weights)
        self._weights = weakref.ref(weights, lambda _: self._forget())
        self._bound_to = (weights.data_ptr(), counted(weights))

    def _forget(self) -> None:
        for call in self._calls:
            call.forget()


class Pool:
    """Bound plans by device, stream and plan: taken for a call and given back, bounded in number.

    On one stream calls run in order, so a given-back arena may be taken at once; another stream or a
    concurrent call gets one of its own, and so does a call that is captured as a CUDA graph.
    """

    def __init__(self, most: int = 16) -> None:
        self._most = most
        self._free: dict[Any, list[_Bound]] = {}
        self._lock = Lock()

    def run(
        self, key: Any, plan: Plan, device: torch.device, tensors: Mapping[str, Tensor]
    ) -> None:
        if device.type != "cuda":
            self._run((key, device), plan, device, tensors)
            return
        with torch.cuda.device(device):  # kernels are launched on the current one
            key = (key, device, torch.cuda.current_stream().cuda_stream)
            if torch.cuda.is_current_stream_capturing():
                # An arena in the graph's private memory, which none but the graph uses.
                with self._lock:
                    self._free.pop(key, None)
                _Bound(plan, device).run(tensors)
            else:
                self._run(key, plan, device, tensors)

    def _run(
        self, key: Any, plan: Plan, device: torch.device, tensors: Mapping[str, Tensor]
    ) -> None:
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
