"""Which builds have the CUDA extension: an editable one where there is nvcc, a wheel only where it is asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]

# Compiles nothing; what it is told to write comes out empty.
NVCC = """#!/bin/sh
[ "$1" = --list-gpu-arch ] && echo compute_80
while [ $# -gt 0 ]; do
    [ "$1" = -o ] && : > "$2"
    shift
done
exit 0
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, where nothing was built, with an nvcc in ``cuda/bin`` beside it."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    built = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "fastscnn_fast", "kernels"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=built)
    nvcc = folder / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    return folder


def build(source: Path, hook: str, asked: str | None, cuda: Path, out: Path) -> list[str]:
    """The names of the CUDA extensions that a build leaves: in the wheel, or in the sources."""
    environment = {key: value for key, value in os.environ.items() if key != "FASTSCNN_CUDA"}
    environment |= {"CUDA_HOME": str(cuda), "PATH": str(out)}  # no nvcc of this machine
    environment |= {
        "CC": "no-such-compiler",
        "CXX": "no-such-compiler",
        "FASTSCNN_REQUIRE_CPU": "0",
    }
    environment |= {} if asked is None else {"FASTSCNN_CUDA": asked}
    out.mkdir()
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(out)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with ZipFile(next(out.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    here = list((source / "fastscnn_fast").glob("_cuda*.so"))
    for file in here:
        file.unlink()
    return [name for name in [*names, *map(str, here)] if Path(name).match("_cuda*.so")]


@pytest.mark.parametrize(
    "hook, asked, has",
    [
        ("build_wheel", None, False),
        ("build_wheel", "0", False),
        ("build_wheel", "1", True),
        ("build_editable", None, True),
        ("build_editable", "0", False),
    ],
)
def test_a_wheel_has_cuda_where_it_is_asked_for(
    source: Path, tmp_path: Path, hook: str, asked: str | None, has: bool
) -> None:
    assert len(build(source, hook, asked, source / "cuda", tmp_path / "out")) == has


def test_an_editable_build_without_nvcc_has_none(source: Path, tmp_path: Path) -> None:
    assert build(source, "build_editable", None, tmp_path, tmp_path / "out") == []


def test_asking_for_cuda_without_nvcc_is_an_error(source: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="FASTSCNN_CUDA=1 needs nvcc"):
        build(source, "build_wheel", "1", tmp_path, tmp_path / "out")
