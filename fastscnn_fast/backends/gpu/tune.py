"""``fastscnn_fast tune``: the fastest way to run each layer of a network on this GPU, parity first.

A layer's contestants are its Triton kernel in several tiles where Triton is installed, the CUDA C++ kernel where
it was built (inverted_residual's in several slices), and plain torch with batch norm folded, in channels-last memory, each as the network's plan would run
it (:mod:`.plan`). Not measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from statistics import median

import torch
from torch import Tensor

from ...kernels.launch import Tile
from ...lower import gpu as layout
from ...lower.fold import FoldedWeights
from ...lower.pack import TAG
from ...lower.quantise import quantise
from ...program import integers, reference
from ...program.arithmetic import ARITHMETICS, choose as choose_arithmetic, dtype_of, floats_of
from ...program.layers import OUTPUTS, Layer
from ...program.memory import Buffer
from ...program.parity import relative_error
from .. import registry
from ..gpus import Architecture
from . import measure
from .arena import Pool
from .choices import CUDA, TORCH, Choice, Choices, Sliced
from .plan import PlacedLayer, input_names, op_plan, placed
from .runner import RUNNERS, products

#: Milliseconds of a run, several times: of these in turns, which read and write different memory.
Clock = Callable[[Sequence[Callable[[], None]]], Sequence[float]]
Tiles = Callable[[PlacedLayer, torch.dtype, Architecture], Sequence[Tile]]


def candidates(place: PlacedLayer, dtype: torch.dtype, architecture: Architecture) -> list[Tile]:
    """Tiles to try, the one in use without tuning first."""
    pixels, blocks, areas, warps, stages, slices = _CANDIDATES[place.layer.op]
    tried = [
        Tile(p, b, *area, w, s, n)
        for p, b, area, w, s, n in product(pixels, blocks, areas, warps, stages, slices)
    ]
    if dtype == torch.int8:  # whose products have 32 terms at least
        tried = [one for one in tried if one.block >= 32]
    return list(dict.fromkeys([place.tile(dtype, architecture), *tried]))


def cuda_candidates(
    place: PlacedLayer, dtype: torch.dtype, architecture: Architecture
) -> list[Choice]:
    """The CUDA kernel as it is cut without tuning, and with other slices: each cut once."""
    if place.layer.op != "inverted_residual":
        return [CUDA]
    key = place.key(dtype, "ieee", "logits")
    options: list[Choice] = [CUDA, *map(Sliced, _SLICES)]
    tried: dict[int, Choice] = {}  # by the bytes in which slices meet
    for choice in options:
        plan = op_plan(place, dtype, architecture, chosen=Choices({key: choice}))
        partials = plan.steps[0].buffers.get("partials")
        tried.setdefault(0 if partials is None else partials.bytes, choice)
    return list(tried.values())


_SLICES = (1, 2, 3, 4, 6, 8, 12, 16)  # of CUDA's inverted_residual
_ONE = ((1, 1),)
# Pixels, blocks of channels, (rows, columns), warps, stages, slices.
_CANDIDATES: dict[
    str,
    tuple[
        tuple[int, ...],
        tuple[int, ...],
        tuple[tuple[int, int], ...],
        tuple[int, ...],
        tuple[int, ...],
        tuple[int, ...],
    ],
] = {
    "stem_conv": ((64, 128, 256, 512), (32,), _ONE, (2, 4, 8), (1, 2), (1,)),
    "dsconv": ((16, 32, 64, 128), (16, 32, 64), _ONE, (4, 8), (1, 2, 3), (1,)),
    "inverted_residual": (
        (16, 32),
        (32, 64),
        ((1, 1), (1, 2), (2, 2)),
        (4, 8),
        (1,),
        (1, 2, 3, 6, 12),
    ),
    "pyramid_pooling": ((16, 32, 64), (32, 64, 128), _ONE, (4, 8), (1, 2, 3), (1,)),
    "feature_fusion": ((16, 32, 64), (32, 64, 128), _ONE, (4, 8), (1, 2), (1,)),
    "upsample_classify": ((64, 128, 256), (32,), ((4, 1), (8, 1), (16, 1)), (2, 4, 8), (2,), (1,)),
}


@dataclass(frozen=True)
class Trial:
    """A way to run a layer: its milliseconds, or why it has none."""

    choice: Choice
    ms: float | None
    problem: str = ""


@dataclass(frozen=True)
class Found:
    """A layer's trials, what is in use without tuning first."""

    name: str
    shapes: str
    key: str
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial | None:
        timed = [trial for trial in self.trials if trial.ms is not None]
        return min(timed, key=lambda trial: trial.ms or 0.0, default=None)

    @property
    def summary(self) -> str:
        """One line."""
        fastest = "nothing passes parity"
        if self.best is not None:
            fastest = f"{_ms(self.best)} ms, {named(self.best.choice)}"
        return f"{self.name} ({self.shapes}): {fastest}"

    def row(self) -> dict[str, str]:
        """Cells of bench.markdown."""
        torchs = next((trial for trial in self.trials if trial.choice == TORCH), None)
        best = self.best
        return {
            "layer": self.name,
            "shapes": self.shapes,
            "untuned ms": _ms(self.trials[0]),
            "torch ms": _ms(torchs),
            "best ms": _ms(best),
            "best": "none" if best is None else named(best.choice),
            "left out": str(sum(trial.ms is None for trial in self.trials)),
        }


def _ms(trial: Trial | None) -> str:
    return "" if trial is None or trial.ms is None else f"{trial.ms:.4f}"


def named(choice: Choice) -> str:
    return choice if isinstance(choice, str) else repr(choice)


def tune(
    folded: FoldedWeights,
    sizes: Sequence[tuple[int, int]],
    batch: int,
    dtype: torch.dtype,
    precision: str,
    device: torch.device,
    clock: Clock | None = None,
    tiles: Tiles = candidates,
) -> Iterator[Found]:
    """Measures each distinct layer of a network at each (height, width), in every output, on ``device``.

    Args:
        clock: :func:`.measure.milliseconds` by default.
        tiles: which tiles to try.

    Raises:
        CannotRun: no GPU backend can run, and why.
    """
    on = (folded.config, device, dtype)
    able = [name for name in registry.able(*on, precision) if name in registry.GPU_BACKENDS]
    if not able:
        whys = registry.why_not(registry.GPU_BACKENDS, *on)
        raise registry.CannotRun(f"no GPU backend can run: {whys}")
    precision = registry.choose_precision(precision, "auto", able[0], device, dtype)
    clock = measure.milliseconds if clock is None else clock
    arithmetic = choose_arithmetic(able[0], dtype, precision)
    program = folded.program.computed_in(arithmetic)
    plain = quantise(folded) if arithmetic.quantised else folded.tensors
    folded = replace(folded, program=program)
    packed = RUNNERS[able[0]].pack(program, plain, arithmetic).to(device)
    exact = [{k: w.to(device) for k, w in tensors.items()} for tensors in plain]
    pieces, _ = layout.layout(folded.layers, dtype, TAG.size)
    architecture = registry.architecture(device)
    how = _How(packed, dtype, architecture, products(precision, architecture), clock)
    done = set()
    for places_, output in _networks(folded, sizes, batch, dtype, pieces):
        for place, tensors in zip(places_, exact):
            own = dtype_of(place.layer.op, dtype)
            key = place.key(own, how.precision, output)
            if key in done:
                continue
            done.add(key)
            here = replace(how, dtype=own, precision=place.products(how.precision))
            options: list[Choice] = []
            for backend in able:
                of = cuda_candidates if backend == "cuda" else tiles
                options += of(place, own, architecture)
            if own != torch.int8:
                options.append(TORCH)
            name = place.layer.name
            if place.layer.op == "upsample_classify":
                name += f" {output}"
            if place.layer.op == "stem_conv" and place.inputs[0].dtype == torch.uint8:
                name += " uint8"
            yield Found(
                name,
                _shapes(place),
                key,
                tuple(_trials(place, tensors, output, options, here)),
            )


def _networks(
    folded: FoldedWeights,
    sizes: Sequence[tuple[int, int]],
    batch: int,
    dtype: torch.dtype,
    pieces: Sequence[dict[str, Buffer]],
) -> Iterator[tuple[list[PlacedLayer], str]]:
    """The places of every kind of call, and its output."""
    config, floats = folded.config, floats_of(dtype)
    outputs = [name for name in OUTPUTS if name != "labels" or config.num_classes <= 256]
    for height, width in sizes:
        for output, kind in product(outputs, (floats, torch.uint8)):
            picture = Buffer.dense("x", kind, (batch, config.in_channels, height, width))
            shape = (batch, config.num_classes, height, width)
            out = Buffer.dense("out", floats, shape)
            if output == "labels":
                out = Buffer.dense("out", torch.uint8, (batch, height, width))
            yield list(placed(folded.program, picture, out, pieces, dtype)), output


def _shapes(place: PlacedLayer) -> str:
    return ", ".join("x".join(map(str, b.shape)) for b in (*place.inputs, place.out))


@dataclass(frozen=True)
class _How:
    """What the trials of all layers share."""

    weights: Tensor
    dtype: torch.dtype
    architecture: Architecture
    precision: str
    clock: Clock


def _trials(
    place: PlacedLayer,
    exact_weights: Mapping[str, Tensor],
    output: str,
    options: Sequence[Choice],
    how: _How,
) -> Iterator[Trial]:
    place = _external(place)
    layer, device = place.layer, how.weights.device
    copies = [_memory(place, device) for _ in range(_copies(place, device))]
    for copy in copies:
        copy["weights"] = how.weights
    inputs, out = [copies[0][name] for name in input_names(layer)], copies[0]["out"]
    size = out.shape[-2:]
    exact, own = _references(layer, inputs, exact_weights, size, output, how)
    key, pool = place.key(how.dtype, how.precision, output), Pool()
    for choice in options:
        try:
            chosen = Choices({key: choice})
            plan = op_plan(place, how.dtype, how.architecture, output, how.precision, chosen)
            run = partial(pool.run, choice, plan, device)
            out.fill_(255 if out.dtype == torch.uint8 else float("nan"))
            run(copies[0])
            problem = _wrong(out, own, exact, how)
            if problem:
                yield Trial(choice, None, problem)
            else:
                times = how.clock([partial(run, copy) for copy in copies])
                yield Trial(choice, median(times))
        except Exception as error:  # Triton has many of its own: too much shared memory, and so on
            yield Trial(choice, None, f"{type(error).__name__}: {error}".splitlines()[0])


def _references(
    layer: Layer,
    inputs: Sequence[Tensor],
    weights: Mapping[str, Tensor],
    size: Sequence[int],
    output: str,
    how: _How,
) -> tuple[Tensor, Tensor]:
    """The result in float64, and torch's own in that dtype; of int8 both are the specification's."""
    if how.dtype == torch.int8:
        exact = reference.run(layer, inputs, weights, size, output, ops=integers.OPS)
        return exact, exact
    plain = {name: w.to(how.dtype) for name, w in weights.items()}
    with torch.no_grad(), reference.tf32(how.precision == "tf32"):
        double = [x if x.dtype == torch.uint8 else x.double() for x in inputs]
        exact = reference.run(layer, double, weights, size, output)
        own = reference.run(layer, inputs, plain, size, output)
    return exact, own


def _external(place: PlacedLayer) -> PlacedLayer:
    """The same place in memories that are given with each call."""
    names = input_names(place.layer)
    inputs = tuple(replace(buffer, memory=name) for buffer, name in zip(place.inputs, names))
    return replace(place, inputs=inputs, out=replace(place.out, memory="out"))


def _whole(buffer: Buffer) -> int:
    """Bytes with the channels that exist only in memory."""
    return buffer.shape[0] * buffer.strides[0] * buffer.dtype.itemsize


def _copies(place: PlacedLayer, device: torch.device) -> int:
    touched = sum(map(_whole, (*place.inputs, place.out)))
    return measure.copies(touched, device)


def _memory(place: PlacedLayer, device: torch.device) -> dict[str, Tensor]:
    """Inputs, normally distributed, and an output, as (N, C, H, W); what pads channels is zero."""
    memory = {}
    for buffer in (*place.inputs, place.out):
        view = buffer.view(torch.zeros(_whole(buffer), dtype=torch.uint8, device=device))
        if buffer.memory != "out":
            view.random_(256) if view.dtype == torch.uint8 else view.normal_()
        planes = place.layer.op == "stem_conv" and buffer.memory == "x"  # the picture
        planes |= place.layer.op == "upsample_classify" and buffer.memory == "out"
        memory[buffer.memory] = view if planes else view.permute(0, 3, 1, 2)
    return memory


def _wrong(y: Tensor, own: Tensor, exact: Tensor, how: _How) -> str:
    """Why y fails parity, "" where it does not; ``own`` is torch's result in that dtype."""
    if how.dtype == torch.int8:
        return "" if torch.equal(y, exact) else "other bits than the specification's"
    own = own.to(y.dtype)
    name = "high" if how.precision == "tf32" else str(how.dtype).removeprefix("torch.")
    bounds = ARITHMETICS[name].layer_bounds
    if y.dtype == torch.uint8:
        what, floor = "other labels", bounds.disagreement
        error, torchs = (float((z != exact).double().mean()) for z in (y, own))
    else:
        what, floor = "error", bounds.error
        error, torchs = (relative_error(z, exact) for z in (y, own))
    bound = max(floor, bounds.factor * torchs)
    return "" if error <= bound < float("inf") else f"{what} {error:.1e}, bound {bound:.1e}"
