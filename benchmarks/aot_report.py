"""The GPU kernels, Triton's and CUDA's, by architecture: what their machine code uses, executes and moves.

Nothing here was measured on a GPU: kernels are compiled without one, instructions are counted by following their PTX
(ptx_counts.py), and every time is a lower bound.

python benchmarks/aot_report.py [--preset paper] [--dtype int8] [--csv aot_report.csv] [--markdown aot_report.md]
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import ptx_counts
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastscnn_fast import FastSCNN
from fastscnn_fast.arch.config import PRESETS, preset
from fastscnn_fast.backends import registry
from fastscnn_fast.backends.gpu import aot, dump
from fastscnn_fast.backends.gpus import GPUS, ISSUED, MULTIPROCESSORS, Architecture, Gpu
from fastscnn_fast.program import arithmetic
from fastscnn_fast.program.memory import cdiv
from fastscnn_fast.program.program import layer_sizes

RESULTS = Path(__file__).parent / "results"
SIZES = ((1024, 2048), (512, 1024), (256, 512))
#: Whose kernels are listed one by one.
REPORTED = (512, 1024)
OUTPUTS = ("logits", "labels")
DTYPES = {"float16": torch.float16, "int8": torch.int8}
#: Of eager torch, which has no int8 on GPUs.
EAGER = torch.float16

Row = dict[str, str]


#: Those for which bounds are given, by the name of a usual device.
DEVICES = {gpu.device: architecture for architecture, gpu in GPUS.items() if gpu.bandwidth}


@dataclass(frozen=True)
class Counted:
    """A launch for an architecture, described as ``fastscnn_fast dump`` does.

    Attributes:
        bytes: that must move, each region once.
        instructions: warp instructions of a block, on average; None where nothing counts them (AMD's).
    """

    about: Mapping[str, Any]
    architecture: Architecture
    registers: int
    spills: int
    products: int
    wide_loads: int
    resident_warps: int
    bytes: int
    instructions: float | None

    @property
    def blocks(self) -> int:
        return prod(self.about["grid"])

    def issue(self, gpu: Gpu) -> float:
        """Seconds in which the busiest multiprocessor starts its instructions: a lower bound."""
        busiest = cdiv(self.blocks, gpu.processors) * (self.instructions or 0.0)
        return busiest / ISSUED / gpu.clock

    def seconds(self, gpu: Gpu) -> float:
        """A lower bound: memory or instructions, whichever takes longer; latencies and the launch come on top."""
        return max(self.bytes / gpu.bandwidth, self.issue(gpu))


_COUNTED: dict[Any, float] = {}


def _instructions(ptx: str, about: Mapping[str, Any]) -> float:
    scalars = tuple(p["value"] for p in about["parameters"] if p["kind"] == "scalar")
    key = (ptx, tuple(about["grid"]), scalars)
    if key not in _COUNTED:
        _COUNTED[key] = ptx_counts.instructions(ptx, about)
    return _COUNTED[key]


def _bytes(about: Mapping[str, Any]) -> int:
    """Of device memory that must move: every region that is read or written, once."""
    pointers = [p for p in about["parameters"] if p["kind"] == "pointer" and p["role"] != "null"]
    used = [p for p in pointers if p["holds"] != dump.UNUSED]
    return sum({(p["memory"], p["offset_bytes"]): p["bytes"] for p in used}.values())


@cache
def launches(
    name: str,
    size: tuple[int, int],
    output: str,
    architecture: Architecture,
    backend: str,
    dtype: torch.dtype,
) -> list[Counted]:
    """Those of a forward from raw pixels, in order; none where the backend is not built, or not for that."""
    if backend == "cuda" and (registry._cuda_module is None or not isinstance(architecture, int)):
        return []
    how = arithmetic.choose(backend, dtype)
    least = int(how.needs[backend])
    if how.quantised and not (isinstance(architecture, int) and architecture >= least):
        return []
    found = []
    for step in layer_sizes(preset(name), *size):
        plan = dump.launches(step, dtype, architecture, output, raw=True, backend=backend)
        for about, code in dump.described(step, plan, architecture):
            if isinstance(code, aot.Code):
                resident = code.resident_warps
            else:
                resident = MULTIPROCESSORS[architecture].resident_warps(
                    about["warps"], code.registers, about["dynamic_shared_bytes"]
                )
            found.append(
                Counted(
                    about,
                    architecture,
                    code.registers,
                    code.spills,
                    code.products,
                    code.wide_loads,
                    resident,
                    _bytes(about),
                    _instructions(code.ptx, about) if isinstance(architecture, int) else None,
                )
            )
    return found


class _Traffic(TorchDispatchMode):
    """Counts the kernels that eager torch launches, and the bytes of their inputs and results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name() and "detach" not in func.name():
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.launches += 1
            self.bytes += sum(t.numel() * t.dtype.itemsize for t in tensors)
        return result


def eager(name: str, size: tuple[int, int], output: str) -> tuple[int, int]:
    """Launches and bytes of plain torch: each convolution, norm, activation, pool, resize, cat and sum."""
    with torch.device("meta"):
        model = FastSCNN(preset=name).eval().to(EAGER)
        x = torch.empty(1, model.config.in_channels, *size, dtype=EAGER)
    with torch.no_grad(), _Traffic() as traffic:
        y = model.reference(x)
        if output == "labels":
            y.argmax(1)
    return traffic.launches, traffic.bytes


def kernels(name: str, size: tuple[int, int], backend: str, dtype: torch.dtype) -> Iterator[Row]:
    """A row a distinct launch and architecture."""
    for architecture in GPUS:
        gpu, seen = GPUS[architecture], set()
        for output in reversed(OUTPUTS):
            for one in launches(name, size, output, architecture, backend, dtype):
                about = one.about
                kernel = about.get("kernel", about["entry"]).replace("_kernel", "")
                scalars = [p["value"] for p in about["parameters"] if p["kind"] == "scalar"]
                key = (kernel, *about["grid"], *scalars, *about["constants"].items())
                if key in seen:
                    continue
                seen.add(key)
                last = about["op"] == "upsample_classify"
                nvidia = isinstance(architecture, int)
                row = {
                    "backend": backend,
                    "kernel": kernel,
                    "layer": about["layer"] + (f", {output}" if last else ""),
                    "architecture": f"sm_{architecture}" if nvidia else str(architecture),
                    "blocks": str(one.blocks),
                    "multiprocessors filled": f"{min(one.blocks, gpu.processors)} of {gpu.processors}",
                    "warps": str(about["warps"]),
                    "registers": str(one.registers),
                    "spills": str(one.spills),
                    "shared": str(about["dynamic_shared_bytes"]),
                    "tensor-core instructions": str(one.products),
                    "16-byte loads": str(one.wide_loads),
                    "resident warps": str(one.resident_warps),
                    "MB moved": f"{one.bytes / 1e6:.2f}",
                    "instructions a warp": "",
                }
                if one.instructions is not None:
                    row["instructions a warp"] = f"{one.instructions / about['warps']:.0f}"
                if gpu.bandwidth:
                    row["issue us"] = f"{one.issue(gpu) * 1e6:.1f}"
                    row["bytes us"] = f"{one.bytes / gpu.bandwidth * 1e6:.1f}"
                yield row


def forwards(name: str, backend: str, dtype: torch.dtype) -> Iterator[Row]:
    """A row a size and output: the whole network."""
    for size in SIZES:
        for output in OUTPUTS:
            found = launches(name, size, output, 80, backend, dtype)
            if not found:
                return
            must = aot.necessary_bytes(preset(name), size, dtype, output)
            eager_launches, eager_bytes = eager(name, size, output)
            row = {
                "size": f"{size[0]}x{size[1]}",
                "output": output,
                "launches": str(len(found)),
                "MB moved": f"{sum(one.bytes for one in found) / 1e6:.1f}",
                "MB necessary": f"{must / 1e6:.1f}",
                "eager launches": str(eager_launches),
                "eager MB": f"{eager_bytes / 1e6:.1f}",
            }
            for device, its in DEVICES.items():
                gpu = GPUS[its]
                mine = launches(name, size, output, its, backend, dtype)
                if not mine:
                    continue
                executed = sum((one.instructions or 0.0) * one.blocks for one in mine)
                row[f"{device}: M warp instructions"] = f"{executed / 1e6:.1f}"
                row[f"{device}: at least us"] = f"{sum(o.seconds(gpu) for o in mine) * 1e6:.0f}"
            yield row


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown; empty columns left out."""
    columns = [key for key in rows[0] if any(row.get(key) for row in rows)]
    lines = [columns, ["---"] * len(columns)]
    lines += [[row.get(key, "") for key in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


BACKENDS = {"triton": "Triton", "cuda": "CUDA C++"}


def markdown(
    name: str,
    dtype: str,
    whole: Mapping[str, Sequence[Row]],
    each: Mapping[str, Sequence[Row]],
) -> str:
    devices = ", ".join(
        f"{gpu.device} sm_{architecture} {gpu.processors} multiprocessors at {gpu.clock / 1e9:g} GHz"
        f" {gpu.bandwidth / 1e9:g} GB/s"
        for architecture, gpu in GPUS.items()
        if gpu.bandwidth
    )
    parts = [
        f"# The GPU kernels' machine code, preset {name}, {dtype}, from uint8 pixels",
        "Not measured on a GPU. Registers, spills, shared memory and instructions of the machine code are those of"
        " the compiled code; resident warps follow from NVIDIA's occupancy arithmetic. Instructions a warp are"
        " executed ones, counted by following the PTX (`ptx_counts.py`).",
        "Times are lower bounds, not predictions: of each launch the larger of *issue* (the instructions of the"
        f" busiest multiprocessor, {ISSUED} a cycle) and *bytes* (MB moved at the memory's rate); latencies, products"
        " of tensor cores and launches come on top, so few warps on few multiprocessors take longer.",
        f"Devices, as published: {devices}.",
        "MB moved: every buffer once a launch. MB necessary: each of the six ops' inputs, weights and outputs"
        " once, a picture as floats. Eager torch reads a picture of floats too, and computes in float16.",
    ]
    for backend, title in BACKENDS.items():
        parts.append(f"## A forward in {title}")
        parts.append(
            table(whole[backend])
            if whole[backend]
            else "Not built on the machine that made this report."
        )
    for backend, title in BACKENDS.items():
        for architecture in dict.fromkeys(row["architecture"] for row in each[backend]):
            rows = [row for row in each[backend] if row["architecture"] == architecture]
            size = f"{REPORTED[0]}x{REPORTED[1]}"
            parts += [f"## Each kernel in {title} on {architecture} at {size}", table(rows)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="paper")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--csv", type=Path, help="in results/ by default, as the Markdown")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    dtype, ending = DTYPES[args.dtype], "" if args.dtype == "float16" else f"_{args.dtype}"
    csv_file = args.csv or RESULTS / f"aot_report{ending}.csv"
    markdown_file = args.markdown or RESULTS / f"aot_report{ending}.md"
    whole = {backend: list(forwards(args.preset, backend, dtype)) for backend in BACKENDS}
    each = {backend: list(kernels(args.preset, REPORTED, backend, dtype)) for backend in BACKENDS}
    rows = [row for backend in BACKENDS for row in each[backend]]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with csv_file.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    markdown_file.write_text(markdown(args.preset, args.dtype, whole, each))
    for backend in BACKENDS:
        if whole[backend]:
            print(f"{BACKENDS[backend]}\n{table(whole[backend])}")
    print(f"wrote {csv_file} and {markdown_file}")


if __name__ == "__main__":
    main()
