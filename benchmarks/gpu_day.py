"""A full answer from an NVIDIA GPU in ten minutes, in one folder: parity, tuning, times, counters.

    python benchmarks/gpu_day.py [--minutes 10] [--out gpu_day]

Builds the CUDA extension for the GPU, checks both backends' results on it, tunes, times layers and network against
eager torch, torch as a CUDA graph, torch.compile and TensorRT (gpu.py), then reads Nsight Compute's counters and runs
compute-sanitizer where they are. What a step wrote stays when the time is over; a step that fails does not stop the
next ones. The exit code is 1 where one failed or did not end, 2 where there is no GPU. Not measured on a GPU yet.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastscnn_fast.cli.options import count

ROOT = Path(__file__).resolve().parent.parent

# A forward of each backend that runs, for tools that watch its launches.
FORWARD = """
import torch
from fastscnn_fast import fuse, load_checkpoint
from fastscnn_fast.backends import registry
model = load_checkpoint().cuda()
x = torch.randint(256, (1, 3, 512, 1024), dtype=torch.uint8, device="cuda")
for backend in ("cuda", "triton"):
    if registry.BACKENDS[backend].why_not(model.config, x.device, torch.float16) is None:
        print(backend, fuse(model, backend, torch.float16, cuda_graph="off").labels(x).sum().item())
"""
METRICS = (
    "gpu__time_duration.sum,smsp__inst_executed.sum,sm__warps_active.avg.pct_of_peak_sustained_active,"
    "dram__bytes.sum,l1tex__data_bank_conflicts_pipe_lsu.sum"
)


@dataclass(frozen=True)
class Step:
    """``command`` may take ``seconds``; ``tool``: what must be on PATH, else it is left out."""

    name: str
    seconds: int
    command: tuple[str, ...]
    tool: str = ""


def steps(out: Path, python: str = sys.executable) -> list[Step]:
    """In order, the most important first."""
    gpu = (
        python,
        str(ROOT / "benchmarks" / "gpu.py"),
        "--arithmetics",
        "float16",
        "--rounds",
        "10",
    )
    tests = ("-m", "gpu and not slow and not exhaustive", "-p", "no:cacheprovider", "--maxfail=30")
    sizes = ("512x1024", "1024x2048")
    return [
        Step("build", 120, (python, "setup.py", "--quiet", "build_ext", "--inplace"), "nvcc"),
        Step("parity", 180, (python, "-m", "pytest", *tests)),
        Step("tune", 120, (python, "-m", "fastscnn_fast", "tune", "--size", *sizes)),
        Step("times", 240, (*gpu, "--size", *sizes, "--out", str(out))),
        Step(
            "counters",
            90,
            (
                "ncu",
                "--csv",
                "--log-file",
                str(out / "ncu.csv"),
                "--metrics",
                METRICS,
                python,
                "-c",
                FORWARD,
            ),
            "ncu",
        ),
        Step(
            "sanitizer",
            90,
            (
                "compute-sanitizer",
                "--tool",
                "racecheck",
                "--error-exitcode",
                "1",
                python,
                "-c",
                FORWARD,
            ),
            "compute-sanitizer",
        ),
    ]


def environment(out: Path, capability: tuple[int, int]) -> dict[str, str]:
    """The tuner's file lies in the folder, and the extension is built for this GPU."""
    return os.environ | {
        "FASTSCNN_TUNE_CACHE": str(out / "tune.json"),
        "FASTSCNN_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": "{}.{}".format(*capability),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
    }


def run(
    todo: Sequence[Step],
    out: Path,
    variables: dict[str, str],
    seconds: float,
    about: str,
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Runs the steps within ``seconds``; log.txt has all that they print, report.md how each ended, after each.

    Returns whether all ended well.
    """
    begun, rows, good = clock(), ["| step | result | seconds |", "|---|---|---|"], True
    for step in todo:
        left = min(float(step.seconds), seconds - (clock() - begun))
        start = clock()
        if step.tool and shutil.which(step.tool) is None:
            result = f"left out: {step.tool} is not on PATH"
        elif left <= 0:
            result, good = "not begun: the time is over", False
        else:
            result = _ended(step, left, out / "log.txt", variables)
            good = good and result == "good"
        rows.append(f"| {step.name} | {result} | {clock() - start:.0f} |")
        print(f"{step.name}: {result}", flush=True)
        commands = "\n".join(f"    {shlex.join(one.command)}" for one in todo)
        text = "\n\n".join([f"# {about}", "\n".join(rows), "Commands:", commands]) + "\n"
        (out / "report.md").write_text(text, encoding="utf-8")
    return good


def _ended(step: Step, seconds: float, log: Path, variables: dict[str, str]) -> str:
    with log.open("a", encoding="utf-8") as file:
        print(f"\n===== {step.name}: {shlex.join(step.command)}", file=file, flush=True)
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=variables,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # with whatever it has started
            process.wait()
            return f"stopped after {seconds:.0f} s"
        return "good" if code == 0 else f"exit code {code}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=count, default=10, metavar="M", help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("gpu_day"), help="(%(default)s)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(
            "benchmarks/gpu_day.py: error: torch finds no CUDA GPU on this machine", file=sys.stderr
        )
        return 2
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    variables = environment(out, torch.cuda.get_device_capability())
    about = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    good = run(steps(out), out, variables, 60 * args.minutes, about)
    print(f"wrote {out}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
