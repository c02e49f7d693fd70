"""csrc/cuda compiled by nvcc for any architecture, no driver needed: PTX, machine code and what it uses."""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from .machine import PRODUCTS, WIDE_LOADS, count, listing, nvidia_program, sequence

SOURCES = Path(__file__).resolve().parents[3] / "csrc" / "cuda"
# As setup.py's NVCC_FLAGS, so that what is inspected is what is built.
FLAGS = ("-std=c++17", "-O3")


def why_not() -> str:
    """Why nothing can be compiled, "" where it can."""
    if nvidia_program("nvcc") is None:
        return "nvcc must be in CUDA_HOME or on PATH"
    if not SOURCES.is_dir():
        return "the sources csrc/cuda must be there: install from a clone with pip install -e"
    return ""


@dataclass(frozen=True)
class Code:
    """One kernel for one architecture; ``name`` as ``Described`` of csrc/cuda/launch.h has it."""

    name: str
    architecture: int
    entry: str
    ptx: str
    module: bytes  # machine code of all of the op's kernels
    registers: int
    stack: int
    spills: int  # bytes

    @property
    def cubin(self) -> bytes:
        """Machine code of this kernel alone."""
        return assembled(self.ptx, self.architecture)

    @cached_property
    def sequence(self) -> list[str]:
        """The machine code's instructions as they follow each other, with their modifiers."""
        return sequence(_functions(self.module)[self.entry])

    @cached_property
    def instructions(self) -> Counter[str]:
        """How often each of them stands there."""
        return Counter(self.sequence)

    @property
    def products(self) -> int:
        """Tensor-core instructions."""
        return count(self.instructions, PRODUCTS)

    @property
    def wide_loads(self) -> int:
        """Loads of 16 bytes a thread from global memory."""
        return count(self.instructions, WIDE_LOADS)


@cache
def _functions(cubin: bytes) -> dict[str, str]:
    parts = re.split(r"^\s*Function : (\S+)$", listing(cubin), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def _nvcc(arguments: list[str]) -> str:
    """What nvcc says.

    Raises:
        RuntimeError: it failed, or there is none.
    """
    if why_not():
        raise RuntimeError(why_not())
    command = [str(nvidia_program("nvcc")), *FLAGS, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stderr


def demangled(name: str) -> str:
    """A C++ symbol as source text."""
    runtime = ctypes.CDLL("libstdc++.so.6")
    runtime.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    memory = runtime.__cxa_demangle(name.encode(), None, None, ctypes.byref(status))
    if status.value != 0:
        return name
    text = ctypes.string_at(memory).decode()
    runtime.free(ctypes.c_void_p(memory))
    return text


def kernel_of(symbol: str) -> str:
    """The template-id in a demangled or pretty name of a kernel, without namespaces."""
    anonymous = r"\{anonymous\}|\(anonymous namespace\)|<unnamed>|_GLOBAL__N_\w*"
    text = re.sub(rf"^void |fastscnn::cuda::|({anonymous})::", "", symbol)
    depth = 0
    for at, character in enumerate(text):  # the template's end, or the parameters' begin
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return text[:at]
    return text


@cache
def compiled(op: str, architecture: int) -> dict[str, Code]:
    """The kernels of csrc/cuda/``op``.cu by :func:`kernel_of`, for compute capability ``architecture`` / 10.

    Raises:
        RuntimeError: nvcc failed, or there is none.
    """
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, f"{op}.ptx"), Path(folder, f"{op}.cubin")
        source = str(SOURCES / f"{op}.cu")
        _nvcc([f"-arch=compute_{architecture}", "-ptx", source, "-o", str(ptx)])
        told = _nvcc(
            [f"-arch=sm_{architecture}", "-Xptxas=-v", "-cubin", str(ptx), "-o", str(cubin)]
        )
        texts, code = _entries(ptx.read_text()), cubin.read_bytes()
    found = {}
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores,"
        r" (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    for entry, stack, stores, loads, registers in re.findall(pattern, told, re.DOTALL):
        name = kernel_of(demangled(entry))
        spills = int(stores) + int(loads)
        found[name] = Code(
            name, architecture, entry, texts[entry], code, int(registers), int(stack), spills
        )
    return found


def _entries(ptx: str) -> dict[str, str]:
    """By entry, PTX of that kernel alone: what stands before the first one, and it."""
    # A brace that ends a line of inline assembly is no kernel's end: a comment follows it.
    begin, end = r"^(?:\.visible |\.weak )?\.entry (\w+)\(", r"^\}$(?!\n\s*// end inline asm)"
    kernel = re.compile(f"{begin}.*?{end}", re.MULTILINE | re.DOTALL)
    matches = list(kernel.finditer(ptx))
    head = ptx[: matches[0].start()]
    return {match[1]: f"{head}{match[0]}\n" for match in matches}


def assembled(ptx: str, architecture: int) -> bytes:
    """The machine code of ``ptx``."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        _nvcc([f"-arch=sm_{architecture}", "-cubin", str(source), "-o", str(cubin)])
        return cubin.read_bytes()
