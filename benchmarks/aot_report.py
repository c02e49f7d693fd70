"""The GPU kernels, Triton's and CUDA's, by architecture: what their machine code uses, what they move, how long that should take.

Nothing here was measured on a GPU: kernels are compiled without one, and every time is predicted.

python benchmarks/aot_report.py [--preset paper] [--csv aot_report.csv] [--markdown aot_report.md]
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastscnn_fast import FastSCNN
from fastscnn_fast.arch.config import PRESETS, preset
from fastscnn_fast.backends import registry
from fastscnn_fast.backends.gpu import aot, nvcc
from fastscnn_fast.backends.gpu.cuda import CudaStep, Described, described
from fastscnn_fast.backends.gpu.machine import PRODUCTS, WIDE_LOADS, count
from fastscnn_fast.backends.gpus import GPUS, MULTIPROCESSORS, Gpu
from fastscnn_fast.kernels.launch import Launch
from fastscnn_fast.program.layers import SizedLayer
from fastscnn_fast.program.memory import cdiv, rounded_up
from fastscnn_fast.program.program import layer_sizes

RESULTS = Path(__file__).parent / "results"
SIZES = ((1024, 2048), (512, 1024), (256, 512))
DTYPE = torch.float16
LAUNCH = 3e-6  # seconds that every launch costs besides its work: assumed

Row = dict[str, str]


#: Those for which times are predicted, by the name of a usual device.
DEVICES = {gpu.device: architecture for architecture, gpu in GPUS.items() if gpu.bandwidth}


def seconds(launch: Launch, gpu: Gpu) -> float:
    """The roofline of a Triton launch: memory or arithmetic, whichever takes longer, and the launch."""
    rate = gpu.triton_rate or gpu.rate
    return max(launch.bytes / gpu.bandwidth, work(launch).flops / rate) + LAUNCH


def seconds_of(launches: Sequence[Described], flops: int, gpu: Gpu) -> float:
    """The same of a CUDA step: each launch's memory, or ``flops``, those of the fused algorithm."""
    moved = sum(one.bytes for one in launches)
    return max(moved / gpu.bandwidth, flops / gpu.rate) + LAUNCH * len(launches)


@dataclass(frozen=True)
class Work:
    """flops: with what is computed twice; loaded: bytes of activations that programs ask for, halos too."""

    flops: int
    loaded: int


def _stem_conv(a: Mapping[str, Any], programs: int) -> Work:
    pixels = programs * a["BLOCK_PIXELS"]
    terms = pixels * 9 * a["CHANNELS"]
    return Work(2 * pixels * a["TERMS"] * a["OUT"], terms * a["x"].dtype.itemsize)


def _dsconv(a: Mapping[str, Any], programs: int) -> Work:
    pixels, blocks = programs * a["BLOCK_PIXELS"], cdiv(a["OUT"], a["BLOCK_OUT"])
    out = blocks * a["BLOCK_OUT"]
    last = a["BLOCK_LAST"] if a["LAST"] else 0
    macs = pixels * (9 * a["IN"] * blocks + a["IN"] * out + out * last)
    return Work(2 * macs, pixels * 9 * a["IN"] * blocks * a["x"].dtype.itemsize)


def _inverted_residual(a: Mapping[str, Any], programs: int) -> Work:
    rows, columns = ((a[side] - 1) * a["STRIDE"] + 3 for side in ("ROWS", "COLUMNS"))
    lanes, block = programs * a["BLOCK_PIXELS"], a["ROWS"] * a["COLUMNS"]
    seen = lanes * rows * columns * a["IN"]
    macs = seen * a["MID"] + lanes * block * a["MID"] * (9 + a["BLOCK_OUT"])
    return Work(2 * macs, seen * a["x"].dtype.itemsize)


def _row_sums(a: Mapping[str, Any], programs: int) -> Work:
    values = programs * rounded_up(a["width"], a["BLOCK_PIXELS"]) * a["BLOCK_IN"]
    return Work(2 * values * a["BLOCK_CELLS"], values * a["x"].dtype.itemsize)


def _grids(a: Mapping[str, Any], programs: int) -> Work:
    cells = programs * a["BLOCK_CELLS"]
    out = rounded_up(a["OUT"], a["BLOCK_OUT"])
    sums = sum(a["height"] * cdiv(b * b, a["BLOCK_CELLS"]) for b in a["BINS"]) * a["BLOCK_CELLS"]
    macs = cells * a["MID"] * (a["IN"] + a["TAPS"] * out) + sums * a["IN"]
    return Work(2 * macs, sums * a["IN"] * a["sums"].dtype.itemsize)


def _out_convolution(a: Mapping[str, Any], programs: int) -> Work:
    pixels, taps = programs * a["BLOCK_PIXELS"], a["SIDE"] ** 2
    terms = a["IN"] + rounded_up(a["CELLS"], a["BLOCK_CELLS"])
    size = a["x"].dtype.itemsize
    return Work(2 * pixels * taps * terms * a["BLOCK_OUT"], pixels * taps * a["IN"] * size)


def _feature_fusion(a: Mapping[str, Any], programs: int) -> Work:
    pixels, span = programs * a["BLOCK_PIXELS"], a["Y_SPAN"] * a["X_SPAN"]
    terms = a["IN"] + a["MID"]
    macs = pixels * (a["IN"] * span * (a["TAPS"] + 1) + terms * a["BLOCK_OUT"])
    return Work(2 * macs, pixels * (a["IN"] * span + a["MID"]) * a["low"].dtype.itemsize)


def _upsample_classify(a: Mapping[str, Any], programs: int) -> Work:
    passes = 3 if a["OUTPUT"] == "probabilities" else 1
    values = passes * a["height"] * a["width"] * a["CLASSES"]
    columns = passes * programs * a["BLOCK_COLUMNS"] * a["CLASSES"]
    return Work(4 * values + 8 * columns, 4 * columns * a["x"].dtype.itemsize)


_WORK: dict[str, Callable[[Mapping[str, Any], int], Work]] = {
    "stem_conv": _stem_conv,
    "dsconv": _dsconv,
    "inverted_residual": _inverted_residual,
    "row_sums": _row_sums,
    "grids": _grids,
    "out_convolution": _out_convolution,
    "feature_fusion": _feature_fusion,
    "upsample_classify": _upsample_classify,
}


def name_of(launch: Launch) -> str:
    name: str = launch.kernel.__name__
    return name.removesuffix("_kernel")


def work(launch: Launch) -> Work:
    """What the programs of ``launch`` compute and load, from its tiles."""
    return _WORK[name_of(launch)](launch.arguments, prod(launch.grid))


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
        model = FastSCNN(preset=name).eval().to(DTYPE)
        x = torch.empty(1, model.config.in_channels, *size, dtype=DTYPE)
    with torch.no_grad(), _Traffic() as traffic:
        y = model.reference(x)
        if output == "labels":
            y.argmax(1)
    return traffic.launches, traffic.bytes


def _sizes(launch: Launch) -> str:
    a = launch.arguments
    keys = ("IN", "MID", "OUT", "LAST", "STRIDE", "ROWS", "COLUMNS", "OUTPUT")
    return " ".join(f"{key.lower()}={a[key]}" for key in keys if key in a)


def kernels(name: str, size: tuple[int, int]) -> Iterator[Row]:
    """A row a distinct kernel and architecture."""
    for architecture in GPUS:
        seen = set()
        for output in ("logits", "labels"):
            for launch in aot.network(preset(name), size, DTYPE, architecture, output).launches:
                key = f"{name_of(launch)} {_sizes(launch)} {aot.specialised(launch, architecture)}"
                if key in seen:
                    continue
                seen.add(key)
                code, does = aot.compiled(launch, architecture), work(launch)
                row = {
                    "kernel": name_of(launch),
                    "sizes": _sizes(launch),
                    "architecture": f"sm_{architecture}"
                    if isinstance(architecture, int)
                    else architecture,
                    "programs": str(prod(launch.grid)),
                    "warps": str(launch.warps),
                    "registers": str(code.registers),
                    "spills": str(code.spills),
                    "shared": str(code.shared),
                    "tensor-core instructions": str(code.products),
                    "16-byte loads": str(code.wide_loads),
                    "resident warps": str(code.resident_warps),
                    "MB moved": f"{launch.bytes / 1e6:.2f}",
                    "MB loaded": f"{does.loaded / 1e6:.2f}",
                    "GFLOP": f"{does.flops / 1e9:.3f}",
                }
                for device, its in DEVICES.items():
                    row[f"predicted us {device}"] = (
                        f"{seconds(launch, GPUS[its]) * 1e6:.1f}" if its == architecture else ""
                    )
                yield row


def cuda_steps(
    name: str, size: tuple[int, int], output: str
) -> Iterator[tuple[SizedLayer, list[Described]]]:
    """The network's layers with their launches in CUDA C++, none where that is not built."""
    if registry._cuda_module is None:
        return
    steps = aot.network(preset(name), size, DTYPE, 80, output, backend="cuda").steps
    for layer, step in zip(layer_sizes(preset(name), *size), steps, strict=True):
        assert isinstance(step, CudaStep)
        yield layer, described(step)


def cuda_kernels(name: str, size: tuple[int, int]) -> Iterator[Row]:
    """A row a distinct CUDA kernel and architecture."""
    for architecture, multiprocessor in MULTIPROCESSORS.items():
        seen = set()
        for output in ("logits", "labels"):
            for layer, launches in cuda_steps(name, size, output):
                for one in launches:
                    if (one.kernel, one.grid) in seen:
                        continue
                    seen.add((one.kernel, one.grid))
                    code = nvcc.compiled(layer.layer.op, architecture)[one.kernel]
                    warps = one.threads // 32
                    yield {
                        "kernel": one.kernel,
                        "layer": layer.layer.name,
                        "architecture": f"sm_{architecture}",
                        "programs": str(prod(one.grid)),
                        "warps": str(warps),
                        "registers": str(code.registers),
                        "spills": str(code.spills),
                        "shared": str(one.shared),
                        "tensor-core instructions": str(count(code.instructions, PRODUCTS)),
                        "16-byte loads": str(count(code.instructions, WIDE_LOADS)),
                        "resident warps": str(
                            multiprocessor.resident_warps(warps, code.registers, one.shared)
                        ),
                        "MB moved": f"{one.bytes / 1e6:.2f}",
                    }


def cuda_forwards(name: str) -> Iterator[Row]:
    """A row a size and output: the whole network in CUDA C++."""
    for size in SIZES:
        for output in ("logits", "labels"):
            steps = list(cuda_steps(name, size, output))
            if not steps:
                return
            moved = sum(one.bytes for _, launches in steps for one in launches)
            must = aot.necessary_bytes(preset(name), size, DTYPE, output)
            row = {
                "size": f"{size[0]}x{size[1]}",
                "output": output,
                "launches": str(sum(len(launches) for _, launches in steps)),
                "MB moved": f"{moved / 1e6:.1f}",
                "MB necessary": f"{must / 1e6:.1f}",
            }
            for device, its in DEVICES.items():
                gpu = GPUS[its]
                total = sum(seconds_of(launches, step.flops, gpu) for step, launches in steps)
                row[f"predicted us {device}"] = f"{total * 1e6:.0f}"
            yield row


def forwards(name: str) -> Iterator[Row]:
    """A row a size and output: the whole network, fused and eager."""
    for size in SIZES:
        for output in ("logits", "labels"):
            launches = aot.network(preset(name), size, DTYPE, 80, output).launches
            must = aot.necessary_bytes(preset(name), size, DTYPE, output)
            eager_launches, eager_bytes = eager(name, size, output)
            row = {
                "size": f"{size[0]}x{size[1]}",
                "output": output,
                "launches": str(len(launches)),
                "MB moved": f"{sum(launch.bytes for launch in launches) / 1e6:.1f}",
                "MB necessary": f"{must / 1e6:.1f}",
                "MB loaded": f"{sum(work(launch).loaded for launch in launches) / 1e6:.1f}",
                "eager launches": str(eager_launches),
                "eager MB": f"{eager_bytes / 1e6:.1f}",
            }
            for device, its in DEVICES.items():
                fused = aot.network(preset(name), size, DTYPE, its, output)
                total = sum(seconds(launch, GPUS[its]) for launch in fused.launches)
                row[f"predicted us {device}"] = f"{total * 1e6:.0f}"
            yield row


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown; empty columns left out."""
    columns = [key for key in rows[0] if any(row[key] for row in rows)]
    lines = [columns, ["---"] * len(columns), *([row[key] for key in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(
    name: str,
    whole: Sequence[Row],
    each: Sequence[Row],
    cuda_whole: Sequence[Row],
    cuda_each: Sequence[Row],
) -> str:
    devices = ", ".join(
        f"{gpu.device} sm_{architecture} {gpu.bandwidth / 1e9:g} GB/s {gpu.rate / 1e12:g} TFLOP/s"
        for architecture, gpu in GPUS.items()
        if gpu.bandwidth
    )
    parts = [
        f"# The GPU kernels' machine code, preset {name}, {str(DTYPE)[6:]}",
        "Not measured on a GPU. Registers, spills, shared memory and instructions are those of the compiled"
        " code; resident warps follow from NVIDIA's occupancy arithmetic. Times are predicted: per launch"
        " max(bytes moved / bandwidth, operations / rate) +"
        f" {LAUNCH * 1e6:g} us, an assumed cost of a launch; latencies and unused multiprocessors, which"
        " decide on small planes, are left out.",
        f"Devices, as published: {devices}. Triton's rate on T4 is that of fp32 arithmetic, 8.1 TFLOP/s: it has"
        " no products for its tensor cores.",
        "MB moved: every buffer once a launch. MB necessary: each of the six ops' inputs, weights and outputs"
        " once. MB loaded: activations that programs ask for, halos included;"
        " what exceeds MB moved comes from the caches.",
        "## A forward in Triton",
        table(whole),
        "## A forward in CUDA C++",
        "Operations are those of the fused algorithm, without what is computed twice."
        if cuda_whole
        else "Not built on the machine that made this report.",
        *([table(cuda_whole)] if cuda_whole else []),
        f"## Each Triton kernel at {SIZES[0][0]}x{SIZES[0][1]}",
    ]
    for architecture in dict.fromkeys(row["architecture"] for row in each):
        rows = [row for row in each if row["architecture"] == architecture]
        parts += [f"### {architecture}", table(rows)]
    if cuda_each:
        parts.append(f"## Each CUDA kernel at {SIZES[0][0]}x{SIZES[0][1]}")
    for architecture in dict.fromkeys(row["architecture"] for row in cuda_each):
        rows = [row for row in cuda_each if row["architecture"] == architecture]
        parts += [f"### {architecture}, CUDA", table(rows)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="paper")
    parser.add_argument("--csv", type=Path, default=RESULTS / "aot_report.csv")
    parser.add_argument("--markdown", type=Path, default=RESULTS / "aot_report.md")
    args = parser.parse_args()
    whole, each = list(forwards(args.preset)), list(kernels(args.preset, SIZES[0]))
    cuda_whole, cuda_each = (
        list(cuda_forwards(args.preset)),
        list(cuda_kernels(args.preset, SIZES[0])),
    )
    rows = [{"backend": "triton", **row} for row in each]
    rows += [{"backend": "cuda", **row} for row in cuda_each]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with args.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    args.markdown.write_text(markdown(args.preset, whole, each, cuda_whole, cuda_each))
    print(table(whole))
    if cuda_whole:
        print(table(cuda_whole))
    print(f"wrote {args.csv} and {args.markdown}")


if __name__ == "__main__":
    main()
