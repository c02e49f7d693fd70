"""Builds the C++ extension; everything else about the package is in pyproject.toml.

Environment: ``FASTSCNN_REQUIRE_CPU=1`` makes a failing C++ build an error (without it the extension is
reported and left out: the package then runs on plain torch), ``MAX_JOBS`` limits parallel compilation.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from sysconfig import get_platform

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError

CUDA = Path("csrc/bindings_cuda.cpp")
SOURCES = sorted(map(str, [*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")]))
SOURCES.remove(str(CUDA))
HEADERS = sorted(map(str, [*Path("csrc").glob("*.h"), *Path("csrc/cpu").glob("*.[hi]*")]))

# GCC 12 takes the deliberately undefined operands inside its own AVX-512 intrinsics for mistakes.
QUIET = ["-Wno-uninitialized"]
OPENMP = ["-fopenmp"]
OPENMP_PROGRAM = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"


class BuildExt(build_ext):
    """Compiles what changed since the last build, of whatever kind that was, and OpenMP where there is one."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = str(Path("build", f"{get_platform()}-{sys.implementation.cache_tag}"))

    def build_extension(self, ext: Extension) -> None:
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

setup(
    packages=[
        *find_packages(include=["fastscnn_fast", "fastscnn_fast.*"]),
        "fastscnn_fast.kernels",
    ],
    package_dir={"fastscnn_fast.kernels": "kernels"},
    ext_modules=[
        Pybind11Extension(
            "fastscnn_fast._cpu",
            SOURCES,
            depends=[*HEADERS, "setup.py"],
            cxx_std=17,
            extra_compile_args=["-O3", "-fno-math-errno", "-Wall", "-Wextra", *QUIET],
            optional=os.environ.get("FASTSCNN_REQUIRE_CPU") != "1",
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
