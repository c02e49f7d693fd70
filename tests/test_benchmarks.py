"""The benchmarks run on a tiny layer, report what they should, and never a time whose result was wrong."""

from __future__ import annotations

import csv
import json
import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from math import prod
from pathlib import Path

import pytest

from fastscnn_fast import backends, bench, fuse, ops
from fastscnn_fast.checkpoints import CAMVID11
from fastscnn_fast.config import PRESETS, preset
from fastscnn_fast.plan import plan

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "benchmarks" / "bench_ops.py"
BENCH_MODEL = ROOT / "benchmarks" / "bench_model.py"
BENCH_FACTS = ROOT / "benchmarks" / "bench_facts.py"
built = pytest.mark.skipif(not backends.isas(), reason="the C++ extension is not built")

# A plugin that makes the uint8 stem wrong, and nothing else.
SPOILER = """
from fastscnn_fast import ops
right = ops.stem_conv
ops.stem_conv = lambda x, *rest, **named: right(x, *rest, **named) * (1 if x.is_floating_point() else 1.001)
"""


def output_of(script: Path, *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@built
@pytest.mark.parametrize(
    "peers",
    [["eager"], pytest.param(["eager", "onnxruntime", "openvino"], marks=pytest.mark.slow)],
    ids=",".join,
)
def test_the_network_is_measured_against_its_peers(tmp_path: Path, peers: list[str]) -> None:
    """Those of them that are installed."""
    pytest.importorskip("matplotlib")
    arguments = [
        "--size",
        "192x256",
        "--threads",
        "2",
        "--rounds",
        "1",
        "--calls",
        "1",
        "--batch",
        "2",
        "--weights",
        CAMVID11,  # trained: an untrained network amplifies what "high" rounds off
    ]
    printed = output_of(
        BENCH_MODEL, *arguments, "--fresh", "--stages", "--out", tmp_path, "--peers", *peers
    )
    assert "parity failed" not in printed
    with open(tmp_path / "bench_model.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for task in ("logits", "labels"):
        own = {row["name"]: row for row in rows if row["task"] == task}
        expected = {"eager", "eager, channels-last", "eager, channels-last, bfloat16"}
        for arithmetic in filter(backends.isas, backends.ARITHMETICS):
            name = f"fastscnn_fast {arithmetic}"
            expected |= {name, f"{name}, fresh output"}
            expected |= {f"{name}, uint8 pixels"} if task == "labels" else set()
            assert f"| {arithmetic} " in printed  # its roof and its stages
        if "onnxruntime" in peers and find_spec("onnxscript") and find_spec("onnxruntime"):
            expected |= {"onnxruntime", "onnxruntime, fresh output"}
        if "openvino" in peers and find_spec("onnxscript") and find_spec("openvino"):
            expected |= {"OpenVINO", "OpenVINO, fresh output"}
        optional = {
            "OpenVINO bfloat16",
            "OpenVINO bfloat16, fresh output",
        }  # where the processor has it
        assert set(own) - optional == expected
        for row in own.values():
            assert (
                row["passed"] == "True" and row["size"] == "2 of 192x256" and row["threads"] == "2"
            )
            assert float(row["median"]) > 0 and float(row["gflop_per_s"]) > 0
            rivals = expected & {"onnxruntime", "OpenVINO"} or "fresh" not in row["name"]
            assert float(row["ratio"]) > 0 if rivals else row["ratio"] == ""
    text = (tmp_path / "bench_model.md").read_text()
    assert "fastscnn_fast float32, uint8 pixels" in text and "- processor: " in text
    assert (tmp_path / "bench_model.png").read_bytes().startswith(b"\x89PNG")


@built
def test_the_stages_have_all_the_operations() -> None:
    module = runpy.run_path(str(BENCH_MODEL))
    model = bench.untrained_model("tramac")
    given = module["Input"].draw(model, 1, (96, 160), Path())
    blocks = [f"block{i}" for i in range(9)]
    assert [*given.flops] == ["downsample", *blocks, "pyramid", "classifier", "output"]
    assert sum(given.flops.values()) == sum(s.flops for s in plan(model.config, 96, 160))
    fast = fuse(model, "cpu")
    measured = ops.network_stages(given.x, fast.weights, fast.program)
    assert [name for name, _ in measured] == [*given.flops]


@built
@pytest.mark.slow
def test_facts() -> None:
    printed = output_of(BENCH_FACTS, "--rounds", "1", "--arithmetics", "float32")
    for what in ("375x1242", "/ batch 1", "arena MB", "import of fastscnn_fast"):
        assert what in printed


@pytest.mark.parametrize("name", PRESETS)
def test_every_step_is_benchmarked(name: str) -> None:
    config = preset(name)
    cases = runpy.run_path(str(BENCH))["cases"](config, 96, 160)
    assert sum(case.calls for case in cases) == len(plan(config, 96, 160))
    assert len({case.name for case in cases}) == len(cases)


@built
def test_a_time_needs_parity(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
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
        "test_op[stem-uint8-float32-reference]",
    }
    stem = plan(preset("paper"), 33, 40)[0]
    floats, raw = (
        measured[f"test_op[stem-{kind}-reference]"] for kind in ("float32", "uint8-float32")
    )
    assert floats["flops"] == raw["flops"] == stem.flops
    assert floats["bytes"] == 4 * stem.elements
    assert raw["bytes"] == 4 * stem.elements - 3 * prod(stem.inputs[0])
    assert floats["gflop_per_s"] == pytest.approx(stem.flops / floats["ms"] / 1e6)
    summary = run.stdout[run.stdout.index("fused ops:") :]
    (line,) = (line for line in summary.splitlines() if line.startswith("stem uint8 float32"))
    assert line.split()[6:] == [f"{raw['ms']:.3f}", *"-------"], line
