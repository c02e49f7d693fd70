"""Where the layers of a program read and write, the steps that run them, and where their scratch memory lies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from math import prod

import torch

from ...kernels.launch import Launch, Tile
from ...program.arithmetic import activations_of, dtype_of
from ...program.layers import PICTURE, Layer
from ...program.memory import COUNTERS, Buffer, pixel_pitch, rounded_up
from ...program.program import Program
from .. import registry
from ..gpus import Architecture
from . import choices, cuda
from .choices import Choice, Choices, Sliced
from .cuda import CudaStep
from .tiles import processors, tile
from .torch_step import TorchStep

#: Memories that each call brings; all others are scratch.
EXTERNAL = ("x", "high", "low", "weights", "out")
_ALIGNMENT = 512  # bytes, of every scratch memory


def activation_buffer(
    memory: str, dtype: torch.dtype, images: int, height: int, width: int, channels: int
) -> Buffer:
    """An (N, H, W, C) activation of what lies between layers where ``dtype`` is asked for, its pixels padded to whole lines."""
    dtype = activations_of(dtype)
    pitch = pixel_pitch(channels, dtype)
    strides = (height * width * pitch, width * pitch, pitch, 1)
    return Buffer(memory, dtype, (images, height, width, channels), strides)


def logits_buffer(memory: str, images: int, height: int, width: int, classes: int) -> Buffer:
    """The (N, H, W, K) logits: float32, a plane a class."""
    strides = (classes * height * width, width, 1, height * width)
    return Buffer(memory, torch.float32, (images, height, width, classes), strides)


def input_names(layer: Layer) -> tuple[str, ...]:
    """What the op calls the activations that it reads."""
    return ("high", "low") if layer.op == "feature_fusion" else ("x",)


Step = Launch | CudaStep | TorchStep


@dataclass(frozen=True)
class Plan:
    """Steps in order, and where their scratch memories lie in one arena of ``bytes``.

    ``counters``: bytes of ``memory.COUNTERS``, which the arena must hold as zeros.
    """

    steps: tuple[Step, ...]
    offsets: Mapping[str, int]
    bytes: int
    counters: int = 0

    @property
    def launches(self) -> tuple[Launch, ...]:
        return tuple(step for step in self.steps if isinstance(step, Launch))

    @staticmethod
    def of(steps: Sequence[Step]) -> Plan:
        """Places each scratch memory where none lies that is in use at the same time, as the counters always are."""
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
        if COUNTERS in size:
            first[COUNTERS], last[COUNTERS] = 0, len(steps) - 1
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
        return Plan(tuple(_following(steps)), offsets, total, size.get(COUNTERS, 0))


def _following(steps: Sequence[Step]) -> Iterator[Step]:
    """Each CUDA step after another follows it. The first does not: what was queued before a plan may be its weights."""
    before: Step | None = None
    for step in steps:
        if isinstance(step, CudaStep) and isinstance(before, CudaStep):
            step = replace(step, follows=True)
        yield step
        before = step


@dataclass(frozen=True)
class PlacedLayer:
    """A layer with the memory that it reads and writes; ``inputs`` of feature_fusion are (high, low)."""

    layer: Layer
    inputs: tuple[Buffer, ...]
    out: Buffer
    weights: Mapping[str, Buffer]

    def products(self, precision: str) -> str:
        """Its own where the network's are of ``precision``: exact ones where the program asks for float32."""
        exact = precision == "tf32" and self.layer.arithmetic == "float32"
        return "ieee" if exact else precision

    def key(self, dtype: torch.dtype, precision: str, output: str) -> str:
        own = self.products(precision)
        return choices.layer_key(self.layer, self.inputs, self.out, dtype, own, output)

    def tile(self, dtype: torch.dtype, architecture: Architecture) -> Tile:
        """The one in use where nothing was tuned."""
        pixels = prod(self.out.shape) // self.out.shape[-1]
        return tile(self.layer, dtype, architecture, pixels)


def op_plan(
    place: PlacedLayer,
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
    place: PlacedLayer,
    dtype: torch.dtype,
    architecture: Architecture,
    output: str,
    precision: str,
    chosen: Choices,
    backend: str,
) -> list[Step]:
    layer, out, weights = place.layer, place.out, dict(place.weights)
    dtype, precision = dtype_of(layer.op, dtype), place.products(precision)
    cut: Choice = chosen.get(place.key(dtype, precision, output)) or (
        choices.CUDA if backend == "cuda" else place.tile(dtype, architecture)
    )
    if dtype == torch.int8 and cut == choices.TORCH:
        registry.log_once(f"{cut} is not taken: int8 has kernels alone")
        cut = choices.CUDA if backend == "cuda" else place.tile(dtype, architecture)
    if cut == choices.CUDA or isinstance(cut, Sliced):
        count, slices = processors(architecture), cut.slices if isinstance(cut, Sliced) else None
        return [cuda.step(layer, place.inputs, out, weights, dtype, output, count, slices)]
    if cut == choices.TORCH:
        names = input_names(layer)
        arguments = {**dict(zip(names, place.inputs)), "out": out, **weights}
        return [TorchStep(layer, names, arguments, dtype, output, precision == "tf32")]
    name = f"{layer.op}_int8" if dtype == torch.int8 else layer.op
    kernel = import_module(f"fastscnn_fast.kernels.{name}")  # the one place that needs triton
    rest = [output] if layer.op == "upsample_classify" else [weights]
    return [*kernel.launches(layer, *place.inputs, out, *rest, cut, precision)]


def network_plan(
    program: Program,
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
    """The whole of ``program`` on ``picture`` (N, C, H, W)."""
    steps: list[Step] = []
    for place in placed(program, picture, out, weights, dtype):
        steps += _steps(place, dtype, architecture, output, precision, chosen, backend)
    return Plan.of(steps)


def placed(
    program: Program,
    picture: Buffer,
    out: Buffer,
    weights: Sequence[dict[str, Buffer]],
    dtype: torch.dtype,
) -> Iterator[PlacedLayer]:
    """Where the program's layers read and write, in order."""
    images, _, height, width = picture.shape
    made: list[Buffer] = []
    sized = program.sized(height, width)
    for index, (one, pieces) in enumerate(zip(sized, weights, strict=True)):
        layer, (channels, rows, columns) = one.layer, one.output
        memory = layer.name or f"layer{index}"
        if layer.op == "upsample_classify":
            y = out
        elif layer.last_channels:
            y = logits_buffer(memory, images, rows, columns, channels)
        else:
            y = activation_buffer(memory, dtype, images, rows, columns, channels)
        made.append(y)
        inputs = tuple(picture if at == PICTURE else made[at] for at in layer.inputs)
        yield PlacedLayer(layer, inputs, y, pieces)
