"""Builds the C++ extension and, where it is asked for, the CUDA extension; all else is in pyproject.toml.

Environment:
    FASTSCNN_REQUIRE_CPU  1: a failing C++ build is an error; without it the extension is reported and left out (the
                          package then runs on plain torch)
    FASTSCNN_CUDA         1: the CUDA extension too; a failing CUDA build, or no nvcc, is an error. 0: without it.
                          Unset: an editable or in-place build has it where there is nvcc and it builds, a wheel not
    TORCH_CUDA_ARCH_LIST  compute capabilities, as in "8.0;9.0+PTX"; by default 7.5, 8.0, 8.6, 8.9, 9.0, 10.0 and
                          12.0, as far as nvcc knows them, and PTX of the last
    CUDA_HOME             where to look for bin/nvcc before PATH
    MAX_JOBS              compilers at a time
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from sysconfig import get_platform

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError

CUDA_SOURCES = [
    "csrc/bindings_cuda.cpp",
    *sorted(map(str, [*Path("csrc/cuda").glob("*.cpp"), *Path("csrc/cuda").glob("*.cu")])),
]
SOURCES = sorted(map(str, [*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")]))
SOURCES.remove(CUDA_SOURCES[0])
HEADERS = sorted(map(str, [*Path("csrc").glob("*.h"), *Path("csrc/cpu").glob("*.[hi]*")]))
CUDA_HEADERS = sorted(map(str, [*Path("csrc/cuda").glob("*.h"), *Path("csrc/cuda").glob("*.cuh")]))
CUDA = "fastscnn_fast._cuda"
CUDA_ASKED = os.environ.get("FASTSCNN_CUDA")
NVCC_FLAGS = ("-std=c++17", "-O3")  # backends/gpu/nvcc.py has the same
ARCHITECTURES = "7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX"

# GCC 12 takes the deliberately undefined operands inside its own AVX-512 intrinsics for mistakes.
QUIET = ["-Wno-uninitialized"]
OPENMP = ["-fopenmp"]
OPENMP_PROGRAM = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"


def find_nvcc() -> str | None:
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [str(Path(home, "bin")) for home in homes if home]
    return shutil.which("nvcc", path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))


def architectures(nvcc: str) -> tuple[list[int], int]:
    """Compute capabilities, times 10, to compile for, and the one to keep PTX of (0: none).

    Raises:
        CompileError: TORCH_CUDA_ARCH_LIST cannot be read, nvcc does not know what it names, or knows nothing.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    told = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    known = {int(number) for number in re.findall(r"compute_(\d+)", told.stdout)}
    if not known:
        raise CompileError(f"{nvcc} --list-gpu-arch must list architectures, got {told}")
    found, ptx = [], 0
    for entry in re.split(r"[;,\s]+", (asked or ARCHITECTURES).strip()):
        match = re.fullmatch(r"(\d+)\.(\d)(\+PTX)?", entry)
        number = 10 * int(match[1]) + int(match[2]) if match else 0
        if not match or number < 75 or (asked and number not in known):
            raise CompileError(
                "TORCH_CUDA_ARCH_LIST must name compute capabilities from 7.5 on that nvcc knows,"
                f" as in 8.0;9.0+PTX, got {entry!r}"
            )
        if number in known:
            found.append(number)
            ptx = number if match[3] else ptx
    if not asked:
        ptx = found[-1]
    return sorted(set(found)), ptx


def definitions(built: Sequence[int], ptx: int) -> list[str]:
    """What the extension says that it was built for; without commas, at which nvcc ends a definition."""
    names = "_".join(map(str, built))
    return [f"-DFASTSCNN_CUDA_ARCHITECTURES=sm_{names}", f"-DFASTSCNN_CUDA_PTX={ptx}"]


def compile_cuda(output: Path, folder: Path, jobs: int) -> None:
    """Compiles what changed and links it with CUDA's runtime, statically: no driver is needed to import it."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise CompileError("FASTSCNN_CUDA=1 needs nvcc in CUDA_HOME or on PATH")
    built, ptx = architectures(nvcc)
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in built]
    codes += [f"-gencode=arch=compute_{ptx},code=compute_{ptx}"] if ptx else []
    host = "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-unused-parameter"
    flags = [*NVCC_FLAGS, f"-Xcompiler={host}", *codes]
    flags += definitions(built, ptx)
    includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags += [f"-I{path}" for path in includes]
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    folder = folder / hashlib.sha256(" ".join([version, *flags]).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)

    def run(command: Sequence[str]) -> None:
        done = subprocess.run([nvcc, *command], capture_output=True, text=True)
        if done.returncode != 0:
            raise CompileError(f"nvcc {' '.join(command)}\n{done.stderr}")

    def made(source: str) -> str:
        compiled = folder / f"{Path(source).name}.o"
        newest = max(os.path.getmtime(path) for path in (source, *CUDA_HEADERS, __file__))
        if not compiled.exists() or compiled.stat().st_mtime < newest:
            run([*flags, "-c", source, "-o", str(compiled)])
        return str(compiled)

    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(made, CUDA_SOURCES))
    output.parent.mkdir(parents=True, exist_ok=True)
    run(["-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL", *objects, "-o", str(output)])


class BuildExt(build_ext):
    """Compiles what changed since the last build, of whatever kind that was, and OpenMP where there is one."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = str(Path("build", f"{get_platform()}-{sys.implementation.cache_tag}"))

    def run(self) -> None:
        if not (CUDA_ASKED == "1" or self.inplace or self.editable_mode):  # known only now
            self.extensions = [ext for ext in self.extensions if ext.name != CUDA]
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if ext.name == CUDA:
            output = Path(self.get_ext_fullpath(ext.name))
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            compile_cuda(output, Path(self.build_temp, "cuda"), jobs)
            return
        if self.compiler.compiler_type == "msvc":
            raise CompileError("csrc/cpu needs GCC or Clang (vector extensions), not MSVC")
        if self.has_openmp():
            ext.extra_compile_args += OPENMP
            ext.extra_link_args += OPENMP
        else:
            self.warn(f"{ext.name} is built without OpenMP: it will run on one thread")
        super().build_extension(ext)

    def has_openmp(self) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "openmp.cpp")
            source.write_text(OPENMP_PROGRAM)
            try:
                objects = self.compiler.compile([str(source)], folder, extra_postargs=OPENMP)
                self.compiler.link_executable(
                    objects, "openmp", folder, extra_postargs=OPENMP, target_lang="c++"
                )
            except CCompilerError:
                return False
        return True


def is_stale(compiled: str, source: str) -> bool:
    """Whether an object file is older than what it is made of; any header counts, whoever includes it."""
    made = os.path.getmtime(compiled)
    return any(os.path.getmtime(path) > made for path in (source, *HEADERS, __file__))


ParallelCompile("MAX_JOBS", needs_recompile=is_stale).install()

extensions = [
    Pybind11Extension(
        "fastscnn_fast._cpu",
        SOURCES,
        depends=[*HEADERS, "setup.py"],
        cxx_std=17,
        extra_compile_args=["-O3", "-fno-math-errno", "-Wall", "-Wextra", *QUIET],
        optional=os.environ.get("FASTSCNN_REQUIRE_CPU") != "1",
    )
]
if CUDA_ASKED == "1" or (CUDA_ASKED != "0" and find_nvcc() is not None):
    extensions.append(
        Extension(CUDA, CUDA_SOURCES, depends=CUDA_HEADERS, optional=CUDA_ASKED != "1"),
    )

setup(
    packages=find_packages(include=["fastscnn_fast", "fastscnn_fast.*"]),
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExt},
)
