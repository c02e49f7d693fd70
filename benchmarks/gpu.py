"""Each layer and the whole network on an NVIDIA GPU, against torch and TensorRT: parity first.

    python benchmarks/gpu.py [--size 512x1024 1024x2048] [--arithmetics float16] [--out FOLDER]

How it is kept fair, and what the columns mean: benchmarks/README.md. Not measured on a GPU yet.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastscnn_fast import FastSCNN, bench, fuse, load_checkpoint, ops
from fastscnn_fast.arch.config import PRESETS
from fastscnn_fast.backends import registry
from fastscnn_fast.backends.gpu.measure import copies, milliseconds
from fastscnn_fast.bench import Call, Contestant, Plain, Probe, Result, Timer
from fastscnn_fast.cli.options import GPU_DTYPES, count, size
from fastscnn_fast.data.scenes import street
from fastscnn_fast.lower.fold import fold
from fastscnn_fast.program import memory, reference
from fastscnn_fast.program.arithmetic import ARITHMETICS, floats_of
from fastscnn_fast.program.layers import PICTURE, Layer
from fastscnn_fast.program.parity import Parity
from fastscnn_fast.runtime import graphs

OURS, COMPILED, TENSORRT, GRAPHED = (
    "fastscnn_fast",
    "torch.compile, max-autotune",
    "TensorRT",
    ", CUDA graph",
)
DTYPES = GPU_DTYPES
#: What peers compute in where torch has no such arithmetic on GPUs: the fastest that it has.
PEERS = {"int8": "float16"}
TASKS = ("logits", "labels")
PARTS = ("network", "layers")
#: Of a layer, whose channels mean no classes.
LAYER_BOUNDS = {
    name: replace(one.layer_bounds, disagreement=1.0) for name, one in ARITHMETICS.items()
}
_WARM_UPS = 3

Function = Callable[[Tensor], Tensor]


class Rotating:
    """``function`` on copies of x in turns, so many that none is in the L2 cache when it is its turn.

    ``place`` puts a copy where ``function`` wants it.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], x: Tensor, place: Callable[[Tensor], Tensor]
    ) -> None:
        self.count = copies(x.nbytes, x.device)
        self._function = function
        self._inputs = cycle([place(x.clone()) for _ in range(self.count)])

    def __call__(self) -> Tensor:
        return self._function(next(self._inputs))


def as_it_is(x: Tensor) -> Tensor:
    return x


def alone(call: Call, pictures: int, calls: int) -> Probe:
    """CUDA events around each call, of which the next waits for the end: what a user waits for."""

    def turn() -> list[float]:
        for _ in range(_WARM_UPS):
            call()
        times = []
        for _ in range(calls):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / pictures)
        return times

    return turn


def in_a_row(call: Call, pictures: int, calls: int) -> Probe:
    """A CUDA graph of a call on each copy, replayed ``calls`` times: a layer without its launch from Python."""
    assert isinstance(call, Rotating)
    runs = [call] * call.count
    return lambda: [ms / pictures for ms in milliseconds(runs, calls)]


@dataclass(frozen=True)
class Timers:
    network: Timer = alone
    layer: Timer = in_a_row


@dataclass(frozen=True)
class Given:
    """Drawn streets of one size on a device, raw uint8 (N, C, H, W)."""

    model: FastSCNN
    pixels: Tensor

    @staticmethod
    def draw(model: FastSCNN, batch: int, size: tuple[int, int], device: torch.device) -> Given:
        streets = [bench.picture_tensor(street(seed, *size)[0]) for seed in range(batch)]
        return Given(model, torch.cat(streets).to(device))

    def where(self, what: str, arithmetic: str) -> dict[str, str]:
        n, _, h, w = self.pixels.shape
        return {
            "what": what,
            "size": (f"{n} of " if n > 1 else "") + f"{h}x{w}",
            "arithmetic": arithmetic,
        }

    @cached_property
    def x(self) -> Tensor:
        """Normalised, contiguous float32."""
        return bench.normalised(self.model, self.pixels).contiguous()

    @cached_property
    def exact(self) -> Tensor:
        return bench.exact_logits(self.model, self.x)


# ---------------------------------------------------------------- contestants


def graphed(function: Function, x: Tensor) -> Function:
    """``function`` as a CUDA graph with its input copied in and its result copied out, as ours."""
    captured = graphs.Captured(function, x)

    def run(x: Tensor) -> Tensor:
        out = captured.result()
        captured.run(x, out)
        return out

    return run


def attempt(name: str, make: Callable[[], Function]) -> Function | None:
    """What ``make`` makes; None, with a word, where that fails."""
    try:
        return make()
    except Exception as error:  # whatever inductor, TensorRT or CUDA meets
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        print(f"{name} is left out: {reason}")
        return None


def compiled(function: Any, x: Tensor, mode: str) -> Function | None:
    """``function`` by torch.compile for inputs like x."""

    def make() -> Function:
        torch.compiler.reset()
        made: Function = torch.compile(function, mode=mode, dynamic=False)
        made(x)
        return made

    return attempt(COMPILED, make)


def tensorrt(plain: torch.nn.Module, x: Tensor) -> Function | None:
    """``plain`` by torch_tensorrt, where that is installed."""

    def make() -> Function:
        import torch_tensorrt

        made: Function = torch_tensorrt.compile(plain, inputs=[x], enabled_precisions={x.dtype})
        made(x)
        return made

    return attempt(TENSORRT, make)


def network_contestants(
    given: Given, task: str, arithmetic: str, ours: Sequence[str], compile_: bool
) -> Iterator[Contestant]:
    """Peers first. CUDA graphs, torch.compile and TensorRT on GPUs only."""
    peers = PEERS.get(arithmetic, arithmetic)
    dtype = DTYPES[peers]
    x = given.x.to(dtype)
    last = x.contiguous(memory_format=torch.channels_last)
    plain, plain_last = (Plain(given.model, task, dtype, last) for last in (False, True))
    functions: dict[str, tuple[Function | None, Tensor]] = {
        bench.EAGER: (plain, x),
        bench.EAGER_LAST: (plain_last, last),
    }
    if x.is_cuda:
        functions[bench.EAGER_LAST + GRAPHED] = (graphed(plain_last, last), last)
        if compile_:
            functions[COMPILED] = (compiled(plain_last, last, "max-autotune"), last)
        by_tensorrt = tensorrt(plain, x)
        if by_tensorrt is not None:
            functions[TENSORRT] = (by_tensorrt, x)
            name = TENSORRT + GRAPHED
            functions[name] = (attempt(name, partial(graphed, by_tensorrt, x)), x)
    for backend in ours:
        kinds = {"": "off", GRAPHED: "on"} if x.is_cuda else {"": "off"}
        for ending, policy in kinds.items():
            fast = fuse(given.model, backend, DTYPES[arithmetic], cuda_graph=policy)
            run = fast.labels if task == "labels" else fast
            name = f"{OURS} {backend}{ending}"
            functions[name] = (run, given.x.to(floats_of(DTYPES[arithmetic])))
            if task == "labels":
                functions[f"{name}, uint8 pixels"] = (run, given.pixels)
    for name, (function, picture) in functions.items():
        if function is not None:
            own = arithmetic if name.startswith(OURS) else peers
            yield Contestant(name, Rotating(function, picture, as_it_is), own)


@dataclass(frozen=True)
class NetworkLayer:
    """A layer of the network with its true inputs, in the arithmetic's dtype."""

    layer: Layer
    inputs: tuple[Tensor, ...]
    tensors: dict[str, Tensor]
    size: tuple[int, int]

    def run(self, *inputs: Tensor, dtype: torch.dtype) -> Tensor:
        """By the reference, in ``dtype``."""
        weights = {name: w.to(dtype) for name, w in self.tensors.items()}
        return reference.run(self.layer, inputs, weights, self.size)


def places(given: Given, dtype: torch.dtype) -> list[NetworkLayer]:
    """The distinct layers, in order."""
    found: dict[Any, NetworkLayer] = {}
    x = given.x.to(dtype).contiguous(memory_format=torch.channels_last)
    full = (given.x.shape[2], given.x.shape[3])
    folded = fold(given.model)
    made: list[Tensor] = []
    for layer, tensors in zip(folded.layers, folded.tensors):
        inputs = tuple(x if at == PICTURE else made[at] for at in layer.inputs)
        named = replace(layer.alone, name=layer.name)
        place = NetworkLayer(named, inputs, tensors, full)
        found.setdefault((layer.alone, inputs[0].shape), place)
        made.append(place.run(*inputs, dtype=dtype))
    return list(found.values())


class PlainLayer(torch.nn.Module):
    """A layer in plain torch, in a dtype and memory format: a function of its first input."""

    def __init__(
        self, place: NetworkLayer, dtype: torch.dtype, format: torch.memory_format
    ) -> None:
        super().__init__()
        self._layer, self._size = place.layer, place.size
        self._rest = [x.contiguous(memory_format=format) for x in place.inputs[1:]]
        for name, w in place.tensors.items():
            w = w.to(dtype)
            self.register_buffer(name, w.contiguous(memory_format=format) if w.dim() == 4 else w)

    def forward(self, x: Tensor) -> Tensor:
        return reference.run(self._layer, (x, *self._rest), dict(self.named_buffers()), self._size)


def layer_contestants(
    place: NetworkLayer, arithmetic: str, ours: Sequence[str], compile_: bool
) -> Iterator[Contestant]:
    """Peers first. torch.compile and TensorRT on GPUs only."""
    dtype, layer, (x, *rest) = DTYPES[arithmetic], place.layer, place.inputs
    plain, plain_last = (
        PlainLayer(place, dtype, format)
        for format in (torch.contiguous_format, torch.channels_last)
    )
    functions: dict[str, tuple[Function | None, Function]] = {
        bench.EAGER: (plain, Tensor.contiguous),
        bench.EAGER_LAST: (plain_last, as_it_is),
    }
    if x.is_cuda:  # a CUDA graph of its own could not be part of the timer's
        if compile_:
            mode = "max-autotune-no-cudagraphs"
            functions[COMPILED] = (compiled(plain_last, x, mode), as_it_is)
        by_tensorrt = tensorrt(plain, x.contiguous())
        if by_tensorrt is not None and attempt(
            TENSORRT, partial(graphed, by_tensorrt, x.contiguous())
        ):
            functions[TENSORRT] = (by_tensorrt, Tensor.contiguous)
    # As the network keeps activations; pictures and logits lie otherwise.
    own = as_it_is if layer.op in ("stem_conv", "upsample_classify") else memory.dense
    for backend in ours:
        packed = ops.pack([layer], [place.tensors], backend, dtype).to(x.device)
        arguments: list[Any] = [*map(own, rest), packed, layer]
        if layer.op == "upsample_classify":
            arguments += [place.size, "logits"]
        arguments.append(backend)
        if layer.op == "stem_conv":
            arguments.append(dtype)
        op: Callable[..., Tensor] = getattr(ops, layer.op)
        functions[f"{OURS} {backend}"] = (partial(_call, op, tuple(arguments)), own)
    for name, (function, laid) in functions.items():
        if function is not None:
            yield Contestant(name, Rotating(function, x, laid), arithmetic)


def _call(op: Callable[..., Tensor], arguments: tuple[Any, ...], x: Tensor) -> Tensor:
    return op(x, *arguments)


def paired(contestants: Sequence[Contestant]) -> list[Contestant]:
    """Each with its peers, by the fastest of which its time is divided."""
    peers = tuple(c.name for c in contestants if not c.name.startswith(OURS))
    return [replace(c, against=peers) for c in contestants]


# ---------------------------------------------------------------- measuring


def measure(
    given: Given,
    arithmetic: str,
    ours: Sequence[str],
    args: argparse.Namespace,
    timers: Timers = Timers(),
) -> Iterator[list[Result]]:
    """The results of one race after the other: of int8 the network's, whose layers tune measures."""
    peers = PEERS.get(arithmetic, arithmetic)
    dtype = DTYPES[peers]
    if "network" in args.parts:
        eager = Parity.of(Plain(given.model, "logits", dtype)(given.x.to(dtype)), given.exact)
        for task in args.tasks:
            contestants = list(
                network_contestants(given, task, arithmetic, ours, not args.no_compile)
            )
            yield bench.race(
                given.where(f"network, {task}", arithmetic),
                paired(contestants),
                given.exact,
                {peers: eager, arithmetic: eager},
                args.rounds,
                args.calls,
                timer=timers.network,
            )[0]
    if "layers" in args.parts and peers == arithmetic:
        for place in places(given, dtype):
            exact = place.run(*(x.double() for x in place.inputs), dtype=torch.float64)
            own = place.run(*place.inputs, dtype=dtype)
            contestants = list(layer_contestants(place, arithmetic, ours, not args.no_compile))
            yield bench.race(
                given.where(place.layer.name, arithmetic),
                paired(contestants),
                exact,
                {arithmetic: Parity.of(own, exact)},
                args.rounds,
                args.calls,
                bounds=LAYER_BOUNDS,
                timer=timers.layer,
            )[0]


def table(results: Sequence[Result]) -> str:
    return bench.markdown(
        [bench.row(r, {"ratio": "" if r.ratio is None else f"{r.ratio:.2f}"}) for r in results]
    )


LEGEND = (
    "ratio: the median by that of the fastest peer. Times are of one picture; a layer's without its launch from Python."
    " error and other labels: against float64, checked first (a layer's channels are no labels)."
)


def write(folder: Path, results: Sequence[Result], about: Mapping[str, str]) -> None:
    """gpu.csv and gpu.md."""
    folder.mkdir(parents=True, exist_ok=True)
    bench.write_csv(folder / "gpu.csv", [r.fields() for r in results], dict(about))
    facts = "\n".join(f"- {key}: {value}" for key, value in about.items())
    text = "\n\n".join([table(results), LEGEND, facts]) + "\n"
    (folder / "gpu.md").write_text(text, encoding="utf-8")


def plot(folder: Path, results: Sequence[Result], about: Mapping[str, str]) -> None:
    """gpu.png of the whole network, where matplotlib is installed."""
    networks = [r for r in results if r.where["what"].startswith("network")]
    if networks:
        title = f"Fast-SCNN on {about['GPU']}, torch {about['torch']}, {about['date']}"
        try:
            bench.plot(folder / "gpu.png", networks, title, columns=2)
        except ImportError as error:
            print(f"no plot: {error}")


def _about(device: torch.device, command: str) -> dict[str, str]:
    about = bench.machine(command)
    return {
        "GPU": torch.cuda.get_device_name(device),
        "CUDA": str(torch.version.cuda),
        **{key: about[key] for key in ("processor", "torch", "command", "date")},
    }


def _ours(model: FastSCNN, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Our backends that run on the GPU; of others it is said why not."""
    found = []
    for name in ("cuda", "triton"):
        reason = registry.BACKENDS[name].why_not(model.config, device, dtype)
        if reason is None:
            found.append(name)
        else:
            print(f"{OURS} {name} is left out in {dtype}: {reason}")
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several = partial(made.add_argument, nargs="+")
    several("--size", type=size, default=[(512, 1024), (1024, 2048)], metavar="HxW")
    several(
        "--arithmetics",
        choices=DTYPES,
        help="all by default; int8, whose peers compute in float16, with --weights",
    )
    several("--tasks", choices=TASKS, default=TASKS, help="of the network; both by default")
    several("--parts", choices=PARTS, default=PARTS, help="both by default")
    made.add_argument("--batch", type=count, default=1, metavar="N")
    made.add_argument("--rounds", type=count, default=30, metavar="R", help="turns (%(default)s)")
    made.add_argument(
        "--calls",
        type=count,
        default=10,
        metavar="C",
        help="timed calls of the network in each turn (%(default)s)",
    )
    made.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes minutes"
    )
    network = made.add_mutually_exclusive_group()
    network.add_argument(
        "--preset", choices=PRESETS, default="paper", help="untrained (%(default)s)"
    )
    network.add_argument("--weights", metavar="FILE", help="trained weights instead")
    made.add_argument("--out", type=Path, metavar="FOLDER", help="write CSV, Markdown and a plot")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """1 where a contestant failed parity, 2 where there is no GPU."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: error: torch finds no CUDA GPU on this machine", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    if args.weights is None:
        model = bench.untrained_model(args.preset)
    else:
        model = load_checkpoint(args.weights)
    if args.arithmetics is None:
        args.arithmetics = [n for n in DTYPES if n != "int8" or args.weights is not None]
    if "int8" in args.arithmetics:
        bench.calibrated(model)
    model = model.to(device)
    results: list[Result] = []
    about = _about(device, "python benchmarks/gpu.py " + shlex.join(argv))
    with torch.inference_mode(), reference.tf32(False):  # float32 is float32 to everyone
        for one in args.size:
            given = Given.draw(model, args.batch, one, device)
            for arithmetic in args.arithmetics:
                ours = _ours(model, device, DTYPES[arithmetic])
                for race in measure(given, arithmetic, ours, args):
                    print(f"\n{table(race)}", flush=True)
                    results += race
                    if args.out is not None:  # at once: an interruption loses one race
                        write(args.out, results, about)
    print(f"\n{LEGEND}\n" + "\n".join(f"{key}: {value}" for key, value in about.items()))
    if args.out is not None:
        plot(args.out, results, about)
        print(f"wrote {args.out}")
    return 0 if all(r.passed for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
