"""Options of the benchmarks, what they run on, and a summary of one line a layer."""

from __future__ import annotations

import argparse
import os
from math import nan
from secrets import randbits
from typing import Any

import pytest
import torch

from fastscnn_fast import backends, bench
from fastscnn_fast.config import PRESETS

SEED = int(os.environ.get("FASTSCNN_SEED") or randbits(31))
CONTENDERS = ("reference", "compile", "ours")
RESULTS = pytest.StashKey[list[dict[str, Any]]]()


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH, got {text!r}") from None
    return height, width


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastscnn_fast")
    group.addoption(
        "--size",
        type=_size,
        default="512x1024",
        help="picture's HEIGHTxWIDTH (default: %(default)s)",
    )
    group.addoption("--preset", choices=list(PRESETS), default="paper", help="default: %(default)s")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = []


def pytest_report_header(config: pytest.Config) -> list[str]:
    height, width = config.getoption("size")
    about = ", ".join(f"{key} {value}" for key, value in _machine().items())
    return [f"{config.getoption('preset')} at {height}x{width}, FASTSCNN_SEED={SEED}", about]


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["fastscnn_fast"] = _machine()


def _machine() -> dict[str, str]:
    return {
        "processor": bench.processor(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "isa": backends.isa() if backends.isas() else "none",
    }


@pytest.fixture(scope="session")
def seed() -> int:
    """The run's seed; FASTSCNN_SEED=n repeats a run."""
    return SEED


@pytest.fixture(scope="session")
def machine() -> dict[str, str]:
    """What the times depend on."""
    return _machine()


@pytest.fixture
def results(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What the summary shows, one entry a benchmark."""
    return request.config.stash[RESULTS]


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's tables
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    results = config.stash[RESULTS]
    if results:
        terminalreporter.section("fused ops: median ms, ours against the others, ours a second")
        for line in _table(results):
            terminalreporter.write_line(line)


def _table(results: list[dict[str, Any]]) -> list[str]:
    """One line a layer; a time that is missing, or whose result failed parity, is a dash.

    The last line sums what a forward pass to logits calls.
    """
    layers: dict[str, dict[str, dict[str, Any]]] = {}
    for result in results:
        layers.setdefault(result["layer"], {})[result["contender"]] = result
    rows: list[tuple[str, ...]] = [
        ("layer", "shape", "calls", *CONTENDERS, "/reference", "/compile", "GFLOP/s", "GB/s")
    ]
    total = [0.0] * (len(CONTENDERS) + 2)
    for layer, by_contender in layers.items():
        one = next(iter(by_contender.values()))
        times = [by_contender.get(name, {}).get("ms", nan) for name in CONTENDERS]
        figures = [*times, one["flops"], one["bytes"]]
        rows.append((layer, one["shape"], str(one["calls"]), *_figures(*figures)))
        if one["calls"]:
            total = [old + one["calls"] * new for old, new in zip(total, figures)]
    rows.append(("sum of calls", "", "", *_figures(*total)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, (True, True, *[False] * len(widths)))
        )
        for row in rows
    ]


def _figures(
    reference: float, compiled: float, ours: float, flops: float, moved: float
) -> tuple[str, ...]:
    times = [f"{ms:.3f}" for ms in (reference, compiled, ours)]
    ratios = [f"{ours / reference:.2f}", f"{ours / compiled:.2f}"]
    rates = [f"{flops / ours / 1e6:.0f}", f"{moved / ours / 1e6:.1f}"]
    return tuple(text.replace("nan", "-") for text in (*times, *ratios, *rates))
