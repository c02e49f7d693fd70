"""What one call costs besides its arithmetic: odd sizes, batches, memory, starting up. One table each.

python benchmarks/bench_facts.py [--threads 2] [--rounds 20] [--arithmetics float32 bfloat16] [--only start]
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from fastscnn_fast import FastSCNN, FusedFastSCNN, bench, fuse
from fastscnn_fast.backends import registry
from fastscnn_fast.cli.options import count
from fastscnn_fast.program.arithmetic import floats_of

SIZES = ((1024, 2048), (1080, 1920), (375, 1242), (719, 1283))
BATCH, BATCH_SIZE = 8, (256, 512)
ARENA_SIZES = ((512, 1024), (1024, 2048))
ARENA_PRESETS = ("tramac", "paper")
IMPORT = """
import time, torch
start = time.perf_counter()
import fastscnn_fast
print(time.perf_counter() - start)
"""

Row = dict[str, str]


def _name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _fused(arithmetic: str, preset: str = "paper") -> FusedFastSCNN:
    return fuse(_model(arithmetic, preset), "cpu", *registry.CPU_ARITHMETICS[arithmetic].asked)


def _model(arithmetic: str, preset: str) -> FastSCNN:
    model = bench.untrained_model(preset)
    return bench.calibrated(model) if registry.CPU_ARITHMETICS[arithmetic].quantised else model


def _tasks(
    fast: FusedFastSCNN, batch: int, size: tuple[int, int]
) -> dict[str, Callable[[], Tensor]]:
    """Calls that fill memory of their own."""
    x = torch.randn(batch, 3, *size).to(floats_of(fast.dtype))
    return {
        "logits": partial(fast, x, out=fast(x)),
        "labels": partial(fast.labels, x, out=fast.labels(x)),
    }


def _medians(calls: Mapping[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Milliseconds, in turns."""
    turns = {name: bench.clock(call) for name, call in calls.items()}
    samples = bench.interleaved(turns, rounds)
    return {name: statistics.median(values) for name, values in samples.items()}


def odd_sizes(arithmetic: str, rounds: int) -> Iterator[Row]:
    """Time a pixel, relative to the first size's."""
    fast = _fused(arithmetic)
    by_size = {size: _tasks(fast, 1, size) for size in SIZES}
    for task in ("logits", "labels"):
        calls = {_name(size): tasks[task] for size, tasks in by_size.items()}
        pixel = {
            name: ms / height / width * 1e6
            for (name, ms), (height, width) in zip(_medians(calls, rounds).items(), SIZES)
        }
        for name, ns in pixel.items():
            yield {
                "arithmetic": arithmetic,
                "task": task,
                "size": name,
                "ns a pixel": f"{ns:.2f}",
                f"/ {_name(SIZES[0])}": f"{ns / pixel[_name(SIZES[0])]:.2f}",
            }


def batches(arithmetic: str, rounds: int) -> Iterator[Row]:
    """A batch's time a picture, relative to one picture alone."""
    fast = _fused(arithmetic)
    one, many = (_tasks(fast, n, BATCH_SIZE) for n in (1, BATCH))
    for task in one:
        ms = _medians({"one": one[task], "many": many[task]}, rounds)
        yield {
            "arithmetic": arithmetic,
            "task": task,
            "size": _name(BATCH_SIZE),
            "batch 1 ms": f"{ms['one']:.2f}",
            f"batch {BATCH} ms a picture": f"{ms['many'] / BATCH:.2f}",
            "/ batch 1": f"{ms['many'] / BATCH / ms['one']:.2f}",
        }


def start(arithmetic: str, rounds: int) -> Iterator[Row]:
    """Fusing, the first call and the memory that calls keep, in a fresh process each."""
    for preset in ARENA_PRESETS:
        for size in ARENA_SIZES:
            row, arena = _started(arithmetic, preset, size, rounds)
            wide = arena if arithmetic == "float32" else _started("float32", preset, size, 1)[1]
            yield row | {"/ float32's": f"{arena / wide:.2f}"}


def _started(arithmetic: str, preset: str, size: tuple[int, int], rounds: int) -> tuple[Row, int]:
    arguments = (arithmetic, preset, size, torch.get_num_threads(), rounds)
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        return fresh.apply(_start, arguments)


def _start(
    arithmetic: str, preset: str, size: tuple[int, int], threads: int, rounds: int
) -> tuple[Row, int]:
    """The row, and the bytes that calls keep."""
    torch.set_num_threads(threads)
    with torch.inference_mode():
        model = _model(arithmetic, preset)
        x = torch.randn(1, 3, *size).to(registry.CPU_ARITHMETICS[arithmetic].floats)
        out = torch.zeros(1, model.config.num_classes, *size, dtype=x.dtype)
        times = [time.perf_counter()]
        fast = fuse(model, "cpu", *registry.CPU_ARITHMETICS[arithmetic].asked)
        times.append(time.perf_counter())
        fast(x, out=out)
        times.append(time.perf_counter())
        fused, first = ((b - a) * 1e3 for a, b in itertools.pairwise(times))
        warm = _medians({"": partial(fast, x, out=out)}, rounds)[""]
    arena = registry.cpu_module().scratch_bytes()
    return {
        "arithmetic": arithmetic,
        "preset": preset,
        "size": _name(size),
        "fuse() ms": f"{fused:.0f}",
        "first call ms": f"{first:.1f}",
        "warm ms": f"{warm:.1f}",
        "first / warm": f"{first / warm:.2f}",
        "arena MB": f"{arena / 1e6:.1f}",
    }, arena


def imports(rounds: int) -> Iterator[Row]:
    """What importing the package adds to importing torch, in fresh processes."""
    times = [
        float(
            subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, check=True).stdout
        )
        for _ in range(rounds)
    ]
    yield {
        "import of fastscnn_fast after torch, ms": f"{statistics.median(times) * 1e3:.0f}",
        "the slowest": f"{max(times) * 1e3:.0f}",
    }


FACTS: dict[str, Callable[[str, int], Iterator[Row]]] = {
    "sizes": odd_sizes,
    "batch": batches,
    "start": start,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [name for name in registry.CPU_ARITHMETICS if registry.isas(name)]
    parser.add_argument("--arithmetics", nargs="+", choices=names, default=names)
    parser.add_argument("--threads", type=count, default=2, metavar="N")
    parser.add_argument("--rounds", type=count, default=20, metavar="R")
    parser.add_argument("--only", choices=[*FACTS, "import"], help="one table")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        for fact, rows in FACTS.items():
            if args.only in (None, fact):
                found = [row for name in args.arithmetics for row in rows(name, args.rounds)]
                print(f"\n{rows.__doc__}\n\n{bench.markdown(found)}", flush=True)
    if args.only in (None, "import"):
        print(f"\n{imports.__doc__}\n\n{bench.markdown(list(imports(min(args.rounds, 10))))}")
    command = " ".join(
        ["python benchmarks/bench_facts.py", *(sys.argv[1:] if argv is None else argv)]
    )
    print("\n" + "\n".join(f"{key}: {value}" for key, value in bench.machine(command).items()))


if __name__ == "__main__":
    main()
