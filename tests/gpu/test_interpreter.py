"""The tests of Triton's kernels in its interpreter, which needs a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from helpers import ROOT

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def run(*arguments: str, timeout: int) -> None:
    """All that is selected passes, and something is."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("FASTSCNN_BACKEND", None)
    done = subprocess.run(
        [*command, "tests/gpu"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout), done.stdout


def test_each_op() -> None:
    run("-m", "interpreted", "-k", "test_offsets_of_64_bits", timeout=300)


@pytest.mark.interpreted
def test_the_first_selection() -> None:
    run("-m", "interpreted and not slow", timeout=1500)


@pytest.mark.exhaustive
def test_every_case() -> None:
    run("-m", "interpreted and slow", timeout=4 * 3600)
