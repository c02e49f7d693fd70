"""The benchmarks run on a tiny layer, report what they should, and never a time whose result was wrong."""

from __future__ import annotations

import csv
import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from math import nan, prod
from pathlib import Path

import pytest
import torch
from helpers import ROOT, small_network
from PIL import Image

from fastscnn_fast import bench, cli, fuse, load_checkpoint, ops
from fastscnn_fast.arch.config import PRESETS, preset
from fastscnn_fast.backends import registry
from fastscnn_fast.backends.gpu import choices
from fastscnn_fast.checkpoints import CAMVID11
from fastscnn_fast.data.scenes import street
from fastscnn_fast.program.parity import Parity
from fastscnn_fast.program.program import layer_sizes

BENCH = ROOT / "benchmarks" / "bench_ops.py"
BENCH_MODEL = ROOT / "benchmarks" / "bench_model.py"
GPU = ROOT / "benchmarks" / "gpu.py"
GPU_DAY = ROOT / "benchmarks" / "gpu_day.py"
BENCH_SLIM = ROOT / "benchmarks" / "bench_slim.py"
BENCH_FACTS = ROOT / "benchmarks" / "bench_facts.py"
built = pytest.mark.skipif(not registry.isas(), reason="the C++ extension is not built")

# A plugin that makes the uint8 stem wrong, and nothing else.
SPOILER = """
from fastscnn_fast import ops
right = ops.stem_conv
ops.stem_conv = lambda x, *rest, **named: right(x, *rest, **named) * (1 if x.is_floating_point() else 1.001)
"""


def output_of(script: Path, *arguments: str | Path, codes: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode in codes, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@built
@pytest.mark.parametrize("peers", [["eager"], ["eager", "onnxruntime", "openvino"]], ids=",".join)
def test_the_network_is_measured_against_its_peers(tmp_path: Path, peers: list[str]) -> None:
    """Those of them that are installed."""
    pytest.importorskip("matplotlib")
    arguments = [
        "--size",
        "256x512",
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
    arguments += ["--fresh", "--stages", "--peers", *peers]
    printed = output_of(BENCH_MODEL, *arguments, "--out", tmp_path, codes=(0, 1))
    with open(tmp_path / "bench_model.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for task in ("logits", "labels"):
        own = {row["name"]: row for row in rows if row["task"] == task}
        expected = {"eager", "eager, channels-last", "eager, channels-last, bfloat16"}
        for arithmetic in filter(registry.isas, registry.CPU_ARITHMETICS):
            name = f"fastscnn_fast {arithmetic}"
            expected |= {name, f"{name}, fresh output"}
            expected |= {f"{name}, uint8 pixels"} if task == "labels" else set()
            assert f"| {arithmetic} " in printed  # its roof and its stages
        if "onnxruntime" in peers and find_spec("onnxscript") and find_spec("onnxruntime"):
            for name in ("onnxruntime", "onnxruntime int8"):
                expected |= {name, f"{name}, fresh output"}
        if "openvino" in peers and find_spec("onnxscript") and find_spec("openvino"):
            expected |= {"OpenVINO", "OpenVINO, fresh output"}
            if find_spec("nncf"):
                expected |= {"OpenVINO int8", "OpenVINO int8, fresh output"}
        optional = {
            "OpenVINO bfloat16",
            "OpenVINO bfloat16, fresh output",
        }  # where the processor has it
        assert set(own) - optional == expected
        for row in own.values():
            if row["passed"] == "False":  # so small a picture may be too much for them
                assert row["name"].startswith(("onnxruntime int8", "OpenVINO int8"))
                assert row["median"] == "nan" and row["ratio"] == ""
                continue
            assert (
                row["passed"] == "True" and row["size"] == "2 of 256x512" and row["threads"] == "2"
            )
            assert float(row["median"]) > 0 and float(row["gflop_per_s"]) > 0
            rivals = expected & {"onnxruntime", "OpenVINO"} or "fresh" not in row["name"]
            assert float(row["ratio"]) > 0 if rivals else row["ratio"] == ""
            by_own = row["by_own_bfloat16"]
            assert float(by_own) > 0 if "fast int8" in row["name"] else by_own == ""
    text = (tmp_path / "bench_model.md").read_text()
    assert "fastscnn_fast float32, uint8 pixels" in text and "- processor: " in text
    assert (tmp_path / "bench_model.png").read_bytes().startswith(b"\x89PNG")


@built
def test_the_stages_have_all_the_operations() -> None:
    module = runpy.run_path(str(BENCH_MODEL))
    model = bench.untrained_model("tramac")
    given = module["Input"].draw(model, 1, (96, 160), Path())
    blocks = [f"block{i}" for i in range(9)]
    assert [*given.flops] == ["downsample", *blocks, "pyramid", "classifier"]
    assert sum(given.flops.values()) == sum(s.flops for s in layer_sizes(model.config, 96, 160))
    fast = fuse(model, "cpu")
    measured = ops.network_stages(given.x, fast.weights, fast.program)
    assert [name for name, _ in measured] == [*given.flops]


def test_int8_is_compared_with_all_peers() -> None:
    module = runpy.run_path(str(BENCH_MODEL))
    arithmetics = {
        "fastscnn_fast int8": "int8",
        "fastscnn_fast int8, fresh output": "int8",
        "fastscnn_fast bfloat16": "bfloat16",
        "onnxruntime": "float32",
        "onnxruntime, fresh output": "float32",
        "onnxruntime int8": "int8",
        "OpenVINO bfloat16": "bfloat16",
    }
    contestants = [bench.Contestant(n, torch.Tensor, a) for n, a in arithmetics.items()]
    against = {c.name: c.against for c in module["paired"](contestants)}
    peers = ("onnxruntime", "onnxruntime int8", "OpenVINO bfloat16")
    assert against["fastscnn_fast int8"] == against["onnxruntime int8"] == peers
    fresh = against["fastscnn_fast int8, fresh output"]
    assert fresh == tuple(f"{name}, fresh output" for name in peers)
    assert set(against["fastscnn_fast bfloat16"]) == {"onnxruntime", "OpenVINO bfloat16"}


def test_ranges_are_measured_where_there_are_none() -> None:
    model = small_network(bottleneck_repeats=(1, 1, 1))
    assert model.ranges is None
    ranges = bench.calibrated(model).ranges
    assert ranges is not None and bench.calibrated(model).ranges is ranges


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
    assert sum(case.calls for case in cases) == len(layer_sizes(config, 96, 160))
    assert len({case.name for case in cases}) == len(cases)


@pytest.mark.slow
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
    stem = layer_sizes(preset("paper"), 33, 40)[0]
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


# ---------------------------------------------------------------- on a GPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_benchmark_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert runpy.run_path(str(GPU))["main"](["--size", "64x96"]) == 2
    assert "torch finds no CUDA GPU" in capsys.readouterr().err
    assert runpy.run_path(str(GPU_DAY))["main"]([]) == 2
    assert "torch finds no CUDA GPU" in capsys.readouterr().err


def test_a_day_on_a_gpu_goes_on_after_what_fails_and_says_how_each_step_ended(
    tmp_path: Path,
) -> None:
    day = runpy.run_path(str(GPU_DAY))
    step = day["Step"]
    todo = [
        step("fails", 9, (sys.executable, "-c", "print('words'); raise SystemExit(3)")),
        step("absent", 9, ("no-such-tool",), "no-such-tool"),
        # The shell begins at once, however busy the machine is, and what it waits for is a process of its own.
        step("sleeps", 1, ("sh", "-c", "echo begun; sleep 60; echo over")),
        step("works", 9, (sys.executable, "-c", "import os; print(os.environ['MARK'])")),
    ]
    variables = os.environ | {"MARK": "marked"}
    assert not day["run"](todo, tmp_path, variables, 60, "a GPU")
    report, log = ((tmp_path / name).read_text() for name in ("report.md", "log.txt"))
    for line in (
        "| fails | exit code 3 |",
        "| absent | left out: no-such-tool is not on PATH |",
        "| sleeps | stopped after 1 s |",
        "| works | good |",
        "# a GPU",
    ):
        assert line in report
    assert "words" in log and "begun" in log and "marked" in log
    assert day["run"](todo[3:], tmp_path, variables, 60, "a GPU")
    assert not day["run"](todo[3:], tmp_path, variables, 0, "a GPU")
    assert "not begun: the time is over" in (tmp_path / "report.md").read_text()


def test_the_steps_of_a_day_on_a_gpu_are_commands_that_exist(tmp_path: Path) -> None:
    day = runpy.run_path(str(GPU_DAY))
    by_name = {step.name: step.command[1:] for step in day["steps"](tmp_path)}
    assert list(by_name) == ["build", "parity", "tune", "times", "counters", "sanitizer"]
    gpu = runpy.run_path(str(GPU))["parser"]()
    args = gpu.parse_args(by_name["times"][1:])
    assert args.out == tmp_path and args.size == [(512, 1024), (1024, 2048)]
    words = list(by_name["tune"][2:])
    assert cli._parser(words).parse_args(words).size == [(512, 1024), (1024, 2048)]
    assert (ROOT / by_name["build"][0]).is_file()
    compile(day["FORWARD"], "forward", "exec")
    variables = day["environment"](tmp_path, (9, 0))
    assert variables["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert variables[choices.VARIABLE] == str(tmp_path / "tune.json")


def test_the_gpu_benchmark_reads_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    parser = runpy.run_path(str(GPU))["parser"]()
    args = parser.parse_args(
        ["--size", "64x96", "33x49", "--arithmetics", "float16", "--batch", "2"]
    )
    assert args.size == [(64, 96), (33, 49)] and args.arithmetics == ["float16"]
    assert args.batch == 2 and args.preset == "paper" and args.weights is None
    for wrong in (
        ["--size", "64x"],
        ["--arithmetics", "int4"],
        ["--rounds", "0"],
        ["--parts", "x"],
    ):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(wrong)
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args(["--help"])
    assert "--no-compile" in capsys.readouterr().out


def test_the_gpu_benchmark_measures_and_writes_with_a_clock_of_ours(tmp_path: Path) -> None:
    """All but the GPU: the reference backend stands in for the kernels, the processor for the GPU."""
    pytest.importorskip("matplotlib")
    gpu = runpy.run_path(str(GPU))
    model = small_network(bottleneck_repeats=(1, 1, 2))
    given = gpu["Given"].draw(model, 2, (64, 96), torch.device("cpu"))
    args = gpu["parser"]().parse_args(["--rounds", "1", "--calls", "3"])
    asked = []

    def clock(call: bench.Call, pictures: int, calls: int) -> bench.Probe:
        asked.append((pictures, calls))
        return lambda: [1.0, 2.0, 4.0]

    with torch.inference_mode():
        timers = gpu["Timers"](clock, clock)
        races = list(gpu["measure"](given, "float32", ["reference"], args, timers))
    results = [r for race in races for r in race]
    assert set(asked) == {(2, 3)} and all(r.passed for r in results)
    names = {"eager", "eager, channels-last", "fastscnn_fast reference"}
    for race in races[2:]:
        assert {r.name for r in race} == names
    labels = {*names, "fastscnn_fast reference, uint8 pixels"}
    assert {r.name for r in races[1]} == labels
    assert [race[0].where["what"] for race in races[:3]] == [
        "network, logits",
        "network, labels",
        "stem",
    ]
    assert len(races) == 2 + len({s.layer.encode() for s in layer_sizes(model.config, 64, 96)})
    wrong = replace(results[-1], passed=False, median=nan, low=nan, high=nan, ratio=None)
    about = {"GPU": "a GPU", "torch": "2", "date": "today"}
    gpu["write"](tmp_path, [*results, wrong], about)
    gpu["plot"](tmp_path, [*results, wrong], about)
    text = (tmp_path / "gpu.md").read_text()
    assert "parity failed" in text and "| fusion " in text and "- GPU: a GPU" in text
    assert "| 2.000 " in text and text.count("| ratio") == 1
    with open(tmp_path / "gpu.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results) + 1 and rows[0]["size"] == "2 of 64x96"
    assert float(rows[0]["median"]) == 2 and rows[0]["GPU"] == "a GPU"
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_the_gpu_benchmark_races_int8_against_half_precision() -> None:
    gpu = runpy.run_path(str(GPU))
    given = gpu["Given"].draw(load_checkpoint(), 1, (256, 384), torch.device("cpu"))
    args = gpu["parser"]().parse_args(["--rounds", "1", "--calls", "1", "--tasks", "labels"])
    timers = gpu["Timers"](*[lambda call, pictures, calls: lambda: [1.0]] * 2)
    with torch.inference_mode():
        (race,) = gpu["measure"](given, "int8", ["reference"], args, timers)
    arithmetics = {r.name: r.arithmetic for r in race}
    ours = {name: "int8" for name in arithmetics if name.startswith("fastscnn_fast")}
    assert len(ours) == 2 and arithmetics == {
        "eager": "float16",
        "eager, channels-last": "float16",
        **ours,
    }
    assert all(r.passed for r in race)


def test_the_gpu_benchmark_times_nothing_that_is_wrong() -> None:
    gpu = runpy.run_path(str(GPU))
    model = small_network(bottleneck_repeats=(1, 1, 1))
    given = gpu["Given"].draw(model, 1, (64, 96), torch.device("cpu"))
    fusion = next(p for p in gpu["places"](given, torch.float32) if p.layer.op == "feature_fusion")
    (plain, _, ours) = gpu["layer_contestants"](fusion, "float32", ["reference"], False)
    wrong = replace(ours, call=lambda: ours.call() * 1.001)
    exact = fusion.run(*(x.double() for x in fusion.inputs), dtype=torch.float64)
    eager = {"float32": Parity.of(plain.call(), exact)}
    bounds = gpu["LAYER_BOUNDS"]
    for contestant, right in ((plain, True), (ours, True), (wrong, False)):
        (result,), _ = bench.race({}, [contestant], exact, eager, 1, bounds=bounds)
        assert result.passed == right


@built
def test_full_and_slim_are_scored_and_timed_side_by_side(tmp_path: Path) -> None:
    """In each arithmetic, by what stands in the recorded table too."""
    pytest.importorskip("matplotlib")
    for split, seeds in (("train", range(3)), ("val", range(3, 5))):
        for kind in ("images", "labels"):
            (tmp_path / "camvid" / split / kind).mkdir(parents=True)
        for seed in seeds:
            drawn = zip(("images", "labels"), street(seed, 96, 128))
            for kind, pixels in drawn:
                Image.fromarray(pixels).save(tmp_path / "camvid" / split / kind / f"{seed}.png")
    options = ["--size", "96x128", "--rounds", "1", "--threads", "1", "--peers", "--out"]
    printed = output_of(BENCH_SLIM, tmp_path / "camvid", *options, tmp_path / "out", codes=(0, 1))
    with open(tmp_path / "out" / "bench_slim.csv", newline="") as file:
        rows = {(row["weights"], row["arithmetic"]): row for row in csv.DictReader(file)}
    arithmetics = ("float32", "bfloat16", "int8")
    assert list(rows) == [(w, a) for w in ("camvid11", "camvid11-slim") for a in arithmetics]
    for (weights, arithmetic), row in rows.items():
        assert row["ms"] or arithmetic == "int8"  # so small a picture may be too much for it
        if row["ms"]:
            assert 0 < float(row["miou"]) <= 1 and row["by_fastest_peer"] == ""
            assert f"{float(row['miou']):.4f}" in printed
            full = rows["camvid11", arithmetic]["ms"]
            if full:
                assert float(row["by_full"]) == float(row["ms"]) / float(full), weights
    with Image.open(tmp_path / "out" / "bench_slim.png") as image:
        assert image.size[0] > 600


def test_the_recorded_table_keeps_what_is_claimed() -> None:
    """Labels of slim in at most 0.62 of full's time, in int8 in at most 0.20 of the fastest peer's; mIoU within a hundredth."""
    with open(ROOT / "benchmarks" / "results" / "zen5" / "bench_slim.csv", newline="") as file:
        rows = {(row["weights"], row["network"]): row for row in csv.DictReader(file)}
    assert {name for _, name in rows} >= {"onnxruntime", "OpenVINO int8", "OpenVINO bfloat16"}
    for arithmetic in ("float32", "bfloat16", "int8"):
        full, slim = (rows[w, f"fastscnn_fast {arithmetic}"] for w in ("camvid11", "camvid11-slim"))
        assert float(slim["operations"]) <= 0.5 * float(full["operations"])
        assert float(slim["miou"]) >= float(full["miou"]) - 0.01
        assert float(slim["by_full"]) <= (0.7 if arithmetic == "int8" else 0.62)
    assert float(rows["camvid11-slim", "fastscnn_fast int8"]["by_fastest_peer"]) <= 0.2
