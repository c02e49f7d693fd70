"""Launches compiled for any architecture, no driver needed, and what their machine code uses.

NVIDIA's figures are those of ``cuobjdump``, which comes with Triton, on the final machine code; AMD's are
those of the assembly's own directives. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ...arch.config import Config
from ...kernels.launch import Launch
from ...lower import gpu as weights
from ...lower.pack import TAG
from ...program.arithmetic import floats_of
from ...program.memory import Buffer, rounded_up
from ...program.program import fast_scnn, layer_sizes
from ..gpus import MULTIPROCESSORS, Architecture
from .machine import PRODUCTS, WIDE_LOADS, count, instructions, listing
from .plan import Plan, network_plan

_POINTERS = {
    "torch.float16": "*fp16",
    "torch.bfloat16": "*bf16",
    "torch.float32": "*fp32",
    "torch.uint8": "*u8",
    "torch.int8": "*i8",
    "torch.int32": "*i32",
}
_DIVISIBLE = ["tt.divisibility", 16]
_WITHIN_2_GIB = ["tt.pointer_range", 32]


def target(architecture: Architecture) -> GPUTarget:
    """Triton's name of an NVIDIA compute capability, or of AMD's gfx name."""
    if isinstance(architecture, int):
        return GPUTarget("cuda", architecture, 32)
    return GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)


@dataclass(frozen=True)
class Specialisation:
    """A launch's arguments as the JIT would compile them; of constants, those that 1 makes too."""

    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    attributes: Mapping[tuple[int, ...], list[list[Any]]]


def specialised(launch: Launch, architecture: Architecture) -> Specialisation:
    """As triton.jit specialises: all memories are 16-byte aligned, as torch's are."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Buffer):
            signature[name] = _POINTERS[str(value.dtype)]
            within = not isinstance(architecture, int) and value.bytes < 2**31
            hints = [_DIVISIBLE] if value.offset % 16 == 0 else []
            attributes[(index,)] = hints + ([_WITHIN_2_GIB] if within else [])
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [_DIVISIBLE]
    return Specialisation(
        signature, constants, {i: hints for i, hints in attributes.items() if hints}
    )


@dataclass(frozen=True)
class Code:
    """A compiled launch."""

    launch: Launch
    architecture: Architecture
    specialisation: Specialisation
    compiled: Any

    @property
    def ptx(self) -> str:
        """NVIDIA's only."""
        return str(self.compiled.asm["ptx"])

    @property
    def cubin(self) -> bytes:
        """NVIDIA's only."""
        return bytes(self.compiled.asm["cubin"])

    @property
    def shared(self) -> int:
        """Bytes of shared memory a block takes, all of them dynamic."""
        return int(self.compiled.metadata.shared)

    @cached_property
    def _listing(self) -> str:
        """What cuobjdump says of the machine code: resource use and instructions."""
        return listing(self.cubin)

    @cached_property
    def _usage(self) -> dict[str, int]:
        if not isinstance(self.architecture, int):
            text = self.compiled.asm["amdgcn"]
            names = {
                "registers": r"\.vgpr_count",
                "spills": r"\.vgpr_spill_count",
                "stack": r"\.private_segment_fixed_size",
            }
            found = {name: re.search(rf"{key}:\s*(\d+)", text) for name, key in names.items()}
            return {name: int(match[1]) for name, match in found.items() if match}
        match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", self._listing)
        if match is None:
            raise RuntimeError(f"cuobjdump must name registers, got {self._listing!r}")
        usage = dict(
            zip(("registers", "stack", "static_shared", "local"), map(int, match.groups()))
        )
        local = sum(n for op, n in self.instructions.items() if op.split(".")[0] in ("STL", "LDL"))
        return {**usage, "spills": local}

    @property
    def registers(self) -> int:
        """Registers a thread takes."""
        return self._usage["registers"]

    @property
    def spills(self) -> int:
        """Instructions that reach local memory (AMD: vector registers spilled; scalar ones spill into those)."""
        return self._usage["spills"]

    @property
    def stack(self) -> int:
        """Bytes of local memory a thread takes."""
        return self._usage["stack"] + self._usage.get("local", 0)

    @cached_property
    def instructions(self) -> Counter[str]:
        """How often each instruction, with its modifiers, stands in the machine code."""
        if isinstance(self.architecture, int):
            return instructions(self._listing)
        text = self.compiled.asm["amdgcn"]
        return Counter(re.findall(r"^\s+([a-z]\w+)(?:\s|$)", text, re.MULTILINE))

    @property
    def products(self) -> int:
        """Tensor-core instructions."""
        return count(self.instructions, f"{PRODUCTS}|v_(smf|mf|wm)ma|v_mfma|v_wmma")

    @property
    def wide_loads(self) -> int:
        """Loads of 16 bytes a thread from global memory."""
        amd = r"(global|buffer|flat)_load_(dwordx4|b128)"
        return count(self.instructions, f"{WIDE_LOADS}|{amd}")

    @property
    def resident_warps(self) -> int:
        """Warps at once on a multiprocessor of NVIDIA's; waves of AMD's gfx9 (512 registers a lane, 64 KiB)."""
        warps = self.launch.warps
        if isinstance(self.architecture, int):
            multiprocessor = MULTIPROCESSORS[self.architecture]
            return multiprocessor.resident_warps(warps, self.registers, self.shared)
        by_registers = 4 * min(8, 512 // rounded_up(max(self.registers, 1), 8))
        by_shared = 65536 // self.shared if self.shared else by_registers
        return warps * min(by_registers // warps, by_shared)


def compiled(launch: Launch, architecture: Architecture) -> Code:
    """``launch`` for ``architecture``: an NVIDIA compute capability, or AMD's name of one.

    Raises:
        RuntimeError: the kernels are interpreted in this process (TRITON_INTERPRET).
    """
    if not hasattr(launch.kernel, "params"):
        raise RuntimeError("kernels cannot be compiled where TRITON_INTERPRET was set at import")
    how = specialised(launch, architecture)
    source = ASTSource(
        launch.kernel, dict(how.signature), dict(how.constants), dict(how.attributes)
    )
    options = {
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        "enable_fp_fusion": launch.fused,
    }
    return Code(
        launch,
        architecture,
        how,
        triton.compile(source, target=target(architecture), options=options),
    )


def network(
    config: Config,
    size: tuple[int, int],
    dtype: torch.dtype,
    architecture: Architecture,
    output: str = "logits",
    raw: bool = False,
    backend: str = "triton",
) -> Plan:
    """The steps for one contiguous picture of ``size`` (height, width): uint8 pixels if ``raw``, else floats."""
    program, floats = fast_scnn(config), floats_of(dtype)
    pieces, _ = weights.layout(program.layers, dtype, TAG.size)
    picture = Buffer.dense("x", torch.uint8 if raw else floats, (1, config.in_channels, *size))
    labels = output == "labels"
    shape = (1, *size) if labels else (1, config.num_classes, *size)
    out = Buffer.dense("out", torch.uint8 if labels else floats, shape)
    return network_plan(program, picture, out, pieces, dtype, architecture, output, backend=backend)


def necessary_bytes(
    config: Config, size: tuple[int, int], dtype: torch.dtype, output: str = "logits"
) -> int:
    """Bytes that six fused ops must move for one picture of ``dtype``: each op's input, weights and output once."""
    elements = sum(step.elements for step in layer_sizes(config, *size))
    labels = prod(size)
    if output == "labels":
        return (elements - config.num_classes * labels) * dtype.itemsize + labels
    return elements * dtype.itemsize
