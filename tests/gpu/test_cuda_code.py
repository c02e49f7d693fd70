"""The machine code of every CUDA kernel, for architectures that are not at hand: compiled, never run."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import cuda_host
import pytest
import torch

from fastscnn_fast.arch.config import PRESETS
from fastscnn_fast.backends import registry
from fastscnn_fast.backends.gpu import dump, nvcc
from fastscnn_fast.backends.gpu.cuda import CudaStep, Described, described
from fastscnn_fast.backends.gpu.machine import PRODUCTS, count
from fastscnn_fast.backends.gpus import MULTIPROCESSORS
from fastscnn_fast.cli import main
from fastscnn_fast.program.layers import OPS
from fastscnn_fast.program.memory import Buffer
from fastscnn_fast.program.program import layer_sizes

pytestmark = [
    pytest.mark.machine_code,
    pytest.mark.skipif(
        bool(cuda_host.why_not() or nvcc.why_not()), reason=cuda_host.why_not() or nvcc.why_not()
    ),
]

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
HALF = ("__half", "__nv_bfloat16")
#: Kernels without a product on tensor cores: sums, tiny grids, interpolation.
NO_PRODUCT = ("row_sums_kernel", "grids_kernel", "upsample_classify_kernel")
NO_PRODUCT_INT8 = ("row_sums_int8_kernel", "grids_int8_kernel")
INT8 = tuple(f"{op}_int8" for op in OPS if op != "upsample_classify")


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are described by the module for the host: the same templates, the same sizes."""
    monkeypatch.setattr(registry, "_cuda_module", cuda_host.shared())


def cases() -> Iterator[Any]:
    for architecture in ARCHITECTURES:
        for op in OPS:
            quick = (op, architecture) == ("dsconv", 80)
            marks = [] if quick else [pytest.mark.slow]
            yield pytest.param(op, architecture, marks=marks, id=f"{op}-{architecture}")


@pytest.mark.parametrize(("op", "architecture"), list(cases()))
def test_every_instantiation(op: str, architecture: int) -> None:
    """What each kernel's machine code must have, and must not."""
    for name, code in nvcc.compiled(op, architecture).items():
        kernel, half = name.partition("<")[0], any(f"<{type_}" in name for type_ in HALF)
        if architecture >= 80 or half or kernel in NO_PRODUCT:  # what runs there
            assert (code.spills, code.stack) == (0, 0), name
        check_waiting(code)
        if not half or kernel in NO_PRODUCT:
            continue
        if architecture == 75 and "__nv_bfloat16" in name:
            continue  # which Turing has not: such a kernel only traps
        assert count(code.instructions, PRODUCTS) > 0, name
        assert count(code.instructions, "LDSM") > 0, name
        if architecture >= 80:
            assert count(code.instructions, "LDGSTS") > 0, name


def cases_int8() -> Iterator[Any]:
    for op, architecture in product(INT8, ARCHITECTURES):
        quick = (op, architecture) == ("dsconv_int8", 90)
        yield pytest.param(op, architecture, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize(("op", "architecture"), list(cases_int8()))
def test_every_instantiation_of_int8(op: str, architecture: int) -> None:
    """Products of integers wherever one multiplies, 16 bytes a load, no product and sum that are rounded at once."""
    for name, code in nvcc.compiled(op, architecture).items():
        assert (code.spills, code.stack) == (0, 0), name
        check_waiting(code)
        assert code.wide_loads > 0, name
        # A product with a unit, whose sum is an integer (integers.cuh), ends in a register of integers.
        assert not re.search(r"fma\S*\s+%f|(add|sub|mul)\.f32", code.ptx), name
        kernel = name.partition("<")[0]
        if kernel not in NO_PRODUCT_INT8:
            assert count(code.instructions, "IMMA") > 0, name


#: Machine code of griddepcontrol.wait and .launch_dependents; accesses of global memory.
WAITS, LETS_BEGIN, ACCESSES = "ACQBULK", "PREEXIT", r"(LD|ST)(G\b|GSTS|\b)|ATOM|RED\b|REDG"


def check_waiting(code: nvcc.Code) -> None:
    """Launches overlap from 9.0 on: a kernel waits once; what it does before only reads, as constants or in PTX's order."""
    waits, lets = (code.sequence.count(one) for one in (WAITS, LETS_BEGIN))
    if code.architecture < 90:
        assert waits == lets == code.ptx.count("griddepcontrol") == 0, code.name
        return
    assert waits == lets == 1, code.name
    before = code.sequence[: code.sequence.index(WAITS)]
    assert LETS_BEGIN in before, code.name
    copies = [one for one in before if one.startswith("LDGSTS")]
    others = [one for one in before if re.match(ACCESSES, one) and one not in copies]
    assert all(one.startswith("LDG.") and one.endswith(".CONSTANT") for one in others), code.name
    assert len(copies) == before_waiting(code.ptx).count("cp.async.cg"), code.name


def before_waiting(ptx: str) -> str:
    return ptx[: ptx.index("griddepcontrol.wait")]


def touched_before_waiting(ptx: str) -> set[int]:
    """The parameters through which a kernel accesses global memory before it waits."""
    origins: dict[str, set[int]] = {}
    touched: set[int] = set()
    for _ in range(2):  # what a loop's end makes, its beginning may use
        for name, operands in re.findall(
            r"^\s*(?:@!?%p\d+ )?([a-z]\w*\.[\w.:]+)\s+(.*?);", before_waiting(ptx), re.MULTILINE
        ):
            parameter = re.search(r"_param_(\d+)\]", operands)
            registers = re.findall(r"%[a-z]+\d+", operands)
            found = set().union(*(origins.get(one, set()) for one in registers))
            if name.startswith("ld.param") and parameter:
                origins[registers[0]] = {int(parameter[1])}
            elif re.match(r"(ld|st|atom|red)\.(?!param|shared|local)|cp\.async\.cg", name):
                touched |= found
            elif registers:
                origins[registers[0]] = origins.get(registers[0], set()) | found
    return touched


def source(op: str, dtype: torch.dtype) -> str:
    return f"{op}_int8" if f"{op}_int8" in INT8 and dtype == torch.int8 else op


def launched(name: str, dtype: torch.dtype, op: str) -> Iterator[Described]:
    """The launches of the preset's layers of ``op`` at full size, in every output."""
    for index, step in enumerate(layer_sizes(PRESETS[name], 1024, 2048)):
        if step.layer.op != op:
            continue
        for output in ("logits", "probabilities", "labels"):
            (first,) = dump.launches(step, dtype, 80, output, backend="cuda").steps
            assert isinstance(first, CudaStep), index
            yield from described(first)


@pytest.mark.parametrize(("op", "architecture"), list(cases()))
def test_resident_warps_of_the_network(op: str, architecture: int) -> None:
    """At least 8 a multiprocessor by NVIDIA's occupancy arithmetic."""
    multiprocessor = MULTIPROCESSORS[architecture]
    dtypes = [torch.float16, torch.int8, *[torch.bfloat16] * (architecture > 75)]
    for name in PRESETS:
        for dtype in dtypes:
            codes = nvcc.compiled(source(op, dtype), architecture)
            for one in launched(name, dtype, op):
                registers = codes[one.kernel].registers
                warps = one.threads // 32
                assert multiprocessor.resident_warps(warps, registers, one.shared) >= 8, one


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_only_weights_are_touched_before_waiting(op: str) -> None:
    """Of what the network launches; the larger kernels do fetch some."""
    fetched = set()
    for name, dtype in product(PRESETS, (torch.float32, torch.float16, torch.int8)):
        codes = nvcc.compiled(source(op, dtype), 90)
        for one in launched(name, dtype, op):
            touched = touched_before_waiting(codes[one.kernel].ptx)
            buffers = [value for at in touched for value in one.parameters[at][2:]]
            memories = {buffer.memory for buffer in buffers if isinstance(buffer, Buffer)}
            assert memories <= {"weights"}, one
            fetched |= memories
    assert bool(fetched) == (op != "upsample_classify")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_memory_of_the_network(architecture: int) -> None:
    """No more than a block may have, in every dtype that runs there; nothing is compiled."""
    most = MULTIPROCESSORS[architecture].shared_of_block
    every = (torch.float16, torch.int8, torch.bfloat16, torch.float32)
    for name, dtype, op in product(PRESETS, every[: 2 if architecture < 80 else 4], OPS):
        for one in launched(name, dtype, op):
            assert one.shared <= most, one


# ---------------------------------------------------------------- dump


def _dump(folder: Path, *options: str) -> list[dict[str, Any]]:
    assert main(["dump", "--backend", "cuda", "--out", str(folder), *options]) == 0
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def dumps() -> Iterator[Any]:
    for op in OPS:
        options = {
            "dsconv": ("--layer", "classifier.dsconv2"),
            "stem_conv": ("--raw",),
            "upsample_classify": ("--output", "labels"),
            "feature_fusion": ("--preset", "mmseg_legacy"),
        }.get(op, ())
        marks = [] if op == "dsconv" else [pytest.mark.slow]
        yield pytest.param(op, options, marks=marks, id=op)
        if op != "upsample_classify":
            int8 = (*options, "--dtype", "int8")
            yield pytest.param(op, int8, marks=pytest.mark.slow, id=f"{op}-int8")


@pytest.mark.parametrize(("op", "options"), list(dumps()))
def test_dump(op: str, options: tuple[str, ...], tmp_path: Path) -> None:
    """The parameters are those of the PTX, in order, and what they name lies where it is said to."""
    for about in _dump(tmp_path, "--op", op, "--arch", "80", "--size", "250x333", *options):
        name = f"{op}_{about['launch']}"
        ptx = (tmp_path / f"{name}.ptx").read_text()
        (found,) = re.findall(r"\.entry (\w+)\((.*?)\)", ptx, re.DOTALL)
        assert found[0] == about["entry"]
        types = re.findall(r"\.param \.(\w+)", found[1])
        assert len(types) == len(about["parameters"])
        for type_, parameter in zip(types, about["parameters"]):
            if parameter["kind"] == "pointer":
                assert type_ == "u64"
                assert parameter["holds"]
                assert parameter["role"] in ("input", "weight", "output", "scratch", "null")
            else:
                assert type_[1:] == re.sub(r"\D", "", parameter["dtype"])
        assert about["block"][0] == 32 * about["warps"]
        assert (tmp_path / f"{name}.cubin").read_bytes()[:4] == b"\x7fELF"


def test_dump_says_what_memory_holds(tmp_path: Path) -> None:
    """Of each launch by itself, also where a pointer has another role there than the layer's field of that name."""

    def holds(about: dict[str, Any]) -> dict[str, str]:
        return {p["name"]: p["holds"] for p in about["parameters"] if p["kind"] == "pointer"}

    size = ("--arch", "80", "--size", "256x512")
    sums, grids, out = _dump(tmp_path / "pooling", "--op", "pyramid_pooling", *size)
    assert holds(sums)["x"] == holds(out)["out"] == dump._PLANE
    assert holds(grids)["sums"] == "what row_sums_kernel wrote"
    assert holds(out)["shares"] == "what grids_kernel wrote"
    assert holds(out)["weight"].startswith("(tap, K, N)") and holds(out)["bias"] == dump._VECTOR
    dtypes = {p["name"]: (p["dtype"], p["shape"]) for p in grids["parameters"] if "shape" in p}
    assert dtypes["sums"] == ("float32", [1, 8, 12, 128])
    assert dtypes["shares"] == ("float16", [1, 1, 50, 128])

    refine, fuse = _dump(
        tmp_path / "fusion", "--op", "feature_fusion", "--preset", "segmentron", *size
    )
    unused = {"low", "low_weight", "refine_weight", "refine_bias"}
    assert {name for name, held in holds(refine).items() if held == dump.UNUSED} == unused
    assert holds(refine)["high_weight"].endswith("row channel of high, column output channel")
    unused = {"refine_weight", "refine_bias"}
    assert {name for name, held in holds(fuse).items() if held == dump.UNUSED} == unused
    assert holds(fuse)["low"] == dump._PLANE


def test_names_of_kernels() -> None:
    assert (
        nvcc.kernel_of("fastscnn::cuda::{anonymous}::k<__half, 48, true>") == "k<__half, 48, true>"
    )
    by_nvcc = "fastscnn::cuda::_GLOBAL__N__0e1_9_dsconv_cu_8363::k<float, 0>"
    assert nvcc.kernel_of(by_nvcc) == "k<float, 0>"
    mangled = "void fastscnn::cuda::(anonymous namespace)::k<float, 0>(float const*, (x)1)"
    assert nvcc.kernel_of(mangled) == "k<float, 0>"
    assert nvcc.demangled("_ZN1a1bIfEEvi") == "void a::b<float>(int)"
    assert nvcc.demangled("no_symbol") == "no_symbol"


# ---------------------------------------------------------------- occupancy

OCCUPANCY = r"""
#include <cstdio>
#include <cuda_occupancy.h>
// A line in: compute capability times 10, threads and blocks and shared bytes of a multiprocessor, reserved shared
// bytes; threads, registers and shared bytes of a kernel. A line out: blocks at once.
int main() {
  int cc, warps, blocks, shared, reserved, threads, registers, dynamic;
  while (scanf("%d %d %d %d %d %d %d %d", &cc, &warps, &blocks, &shared, &reserved, &threads, &registers, &dynamic) == 8) {
    cudaOccDeviceProp device;
    device.computeMajor = cc / 10;
    device.computeMinor = cc % 10;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = 32 * warps;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 * 1024;
    device.sharedMemPerMultiprocessor = shared;
    device.numSms = 1;
    device.sharedMemPerBlockOptin = shared - reserved;
    device.reservedSharedMemPerBlock = reserved;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = 0;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = shared - reserved;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    cudaOccResult result;
    const cudaOccError error =
        cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, dynamic);
    printf("%d\n", error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -int(error));
  }
}
"""


def test_occupancy_is_that_of_cuda_occupancy_h(tmp_path: Path) -> None:
    """The arithmetic of machine.py against NVIDIA's own header."""
    (tmp_path / "occupancy.cpp").write_text(OCCUPANCY)
    program = str(tmp_path / "occupancy")
    command = [cuda_host.COMPILER, *cuda_host.includes(), str(tmp_path / "occupancy.cpp")]
    subprocess.run([*command, "-o", program], check=True)
    lines, ours = [], []
    for architecture in ARCHITECTURES:
        held = MULTIPROCESSORS[architecture]
        whole = (architecture, held.warps, held.blocks, held.shared, held.reserved)
        for warps in (2, 4, 8, 16):
            for registers in (*range(16, 129, 7), 40, 64, 96, 128, 255):
                if registers * warps * 32 > 65536:
                    continue
                for shared in (0, 1, 1000, 4096, 29704, 48 * 1024, 53632, 64896 - 1024):
                    lines.append(" ".join(map(str, (*whole, 32 * warps, registers, shared))))
                    ours.append(held.resident_warps(warps, registers, shared) // warps)
    done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True)
    nvidias = list(map(int, done.stdout.split()))
    assert len(nvidias) == len(lines)
    wrong = [(line, a, b) for line, a, b in zip(lines, ours, nvidias) if a != b]
    assert not wrong, wrong[:10]
