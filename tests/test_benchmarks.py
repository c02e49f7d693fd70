"""The benchmarks run on a tiny layer, report what they should, and never a time whose result was wrong."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest

from fastscnn_fast import backends
from fastscnn_fast.config import PRESETS, preset
from fastscnn_fast.plan import plan

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "benchmarks" / "bench_ops.py"

# A plugin that makes the uint8 stem wrong, and nothing else.
SPOILER = """
from fastscnn_fast import ops
right = ops.stem_conv
ops.stem_conv = lambda x, *rest: right(x, *rest) * (1 if x.is_floating_point() else 1.001)
"""


@pytest.mark.parametrize("name", PRESETS)
def test_every_step_is_benchmarked(name: str) -> None:
    config = preset(name)
    cases = runpy.run_path(str(BENCH))["cases"](config, 96, 160)
    assert sum(case.calls for case in cases) == len(plan(config, 96, 160))
    assert len({case.name for case in cases}) == len(cases)


@pytest.mark.skipif(not backends.isas(), reason="the C++ extension is not built")
def test_a_time_needs_parity(tmp_path: Path) -> None:
    (tmp_path / "spoiler.py").write_text(SPOILER)
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pytest", BENCH, "--benchmark-only", "-p", "spoiler"]
    command += ["--size", "33x40", "-k", "stem and not compile"]
    run = subprocess.run(
        [*command, f"--benchmark-json={report}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert "3 passed" in run.stdout and "1 failed" in run.stdout, run.stdout
    measured = {
        entry["name"]: entry["extra_info"] for entry in json.loads(report.read_text())["benchmarks"]
    }
    assert set(measured) == {
        "test_op[stem-float32-reference]",
        "test_op[stem-float32-ours]",
        "test_op[stem-uint8-reference]",
    }
    stem = plan(preset("paper"), 33, 40)[0]
    floats, raw = (measured[f"test_op[stem-{kind}-reference]"] for kind in ("float32", "uint8"))
    assert floats["flops"] == raw["flops"] == stem.flops
    assert floats["bytes"] == 4 * stem.elements
    assert raw["bytes"] == 4 * stem.elements - 3 * prod(stem.inputs[0])
    assert floats["gflop_per_s"] == pytest.approx(stem.flops / floats["ms"] / 1e6)
    summary = run.stdout[run.stdout.index("fused ops:") :]
    (line,) = (line for line in summary.splitlines() if line.startswith("stem uint8"))
    assert line.split()[4:] == [f"{raw['ms']:.3f}", *"------"], line
