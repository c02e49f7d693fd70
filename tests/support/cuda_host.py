"""Builds csrc/cuda for the host: the module that tests run in place of ``fastscnn_fast._cuda``.

Objects are kept below build/cuda_host/ and made again when a source, a header or a flag has changed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11
from helpers import ROOT

from fastscnn_fast.backends.gpu.machine import nvidia_program
from fastscnn_fast.writing import write_whole

CUDA = ROOT / "csrc" / "cuda"
BUILT = ROOT / "build" / "cuda_host"
COMPILER = os.environ.get("CXX", "g++")
MODULE = "_cuda_host"
VARIABLE = "FASTSCNN_CUDA_HOST_MODULE"
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-DFASTSCNN_CUDA_ON_HOST")
WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas")
FAST = ("-O2",)
SANITIZED = ("-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")  # fmt: skip


@cache
def why_not() -> str:
    """Why there is nothing to build with, "" where there is."""
    if nvidia_program("nvcc") is None:
        return "CUDA's headers are not installed (there is no nvcc)"
    return "" if shutil.which(COMPILER) else f"there is no {COMPILER}"


@cache
def includes() -> tuple[str, ...]:
    """Of CUDA, as nvcc itself finds them, pybind11 and Python."""
    command = [str(nvidia_program("nvcc")), "--dryrun", "-c", "nothing.cu"]
    told = subprocess.run(command, capture_output=True, text=True).stderr
    line = next(line for line in told.splitlines() if line.startswith("#$ INCLUDES="))
    cuda = line.partition("=")[2].strip().strip('"').removeprefix("-I")
    return ("-isystem", cuda, "-I", pybind11.get_include(), "-I", sysconfig.get_paths()["include"])


def units() -> dict[str, Path]:
    """What is compiled, by name."""
    paths = [*CUDA.glob("*.cu"), *CUDA.glob("*.cpp"), *(CUDA / "host").glob("*.cpp")]
    return {path.name: path for path in sorted([*paths, ROOT / "csrc" / "bindings_cuda.cpp"])}


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


@cache
def _headers() -> bytes:
    """Of all headers: any may be included anywhere."""
    paths = sorted(path for path in CUDA.rglob("*") if path.suffix in (".h", ".cuh"))
    return b"".join(path.read_bytes() for path in paths)


def _object(name: str, text: str, flags: Sequence[str]) -> Path:
    """The compiled ``text``, which stands where the unit of that name stands."""
    flags = (*FLAGS, *flags, f"-DFASTSCNN_CUDA_MODULE={MODULE}")
    key = hashlib.sha256(_headers() + text.encode() + " ".join((COMPILER, *flags)).encode())
    made = BUILT / f"{name}-{key.hexdigest()[:16]}.o"
    if not made.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        place = units()[name].parent
        source, unfinished = made.with_suffix(".cpp"), made.with_suffix(f".{os.getpid()}")
        write_whole(source, text.encode(), durable=False)  # another process may be compiling it
        folders = ("-iquote", str(place), *includes())
        _run([COMPILER, *flags, *WARNINGS, *folders, "-c", str(source), "-o", str(unfinished)])
        unfinished.replace(made)
    return made


def build(flags: Sequence[str] = FAST, changed: Mapping[str, str] | None = None) -> Path:
    """The module's file; ``changed`` has other texts for some units.

    Raises:
        AssertionError: it does not compile.
    """
    texts = {name: path.read_text() for name, path in units().items()} | dict(changed or {})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda item: _object(*item, flags), texts.items()))
    key = hashlib.sha256(" ".join(path.name for path in objects).encode()).hexdigest()[:16]
    made = BUILT / key / f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not made.exists():
        made.parent.mkdir(exist_ok=True)
        unfinished = made.with_suffix(f".{os.getpid()}")
        _run([COMPILER, *flags, "-shared", "-pthread", *map(str, objects), "-o", str(unfinished)])
        unfinished.replace(made)
    return made


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def shared() -> ModuleType:
    """The module of this process: that of FASTSCNN_CUDA_HOST_MODULE (a mutant, or one with sanitizers), or built now."""
    return load(Path(os.environ.get(VARIABLE) or build()))
