"""Options of the benchmarks, what they run on, and a summary of one line a layer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import nan
from secrets import randbits
from typing import Any

import numpy as np
import pytest
import torch

from fastscnn_fast import bench
from fastscnn_fast.arch.config import PRESETS
from fastscnn_fast.backends import registry
from fastscnn_fast.cli import options

SEED = int(os.environ.get("FASTSCNN_SEED") or randbits(31))
RESULTS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastscnn_fast")
    group.addoption(
        "--size",
        type=options.size,
        default="512x1024",
        help="picture's HEIGHTxWIDTH (default: %(default)s)",
    )
    group.addoption("--preset", choices=list(PRESETS), default="paper", help="default: %(default)s")
    group.addoption(
        "--arithmetics",
        nargs="+",
        choices=list(registry.CPU_ARITHMETICS),
        default=["float32"],
        help="default: float32",
    )
    group.addoption(
        "--isas",
        nargs="+",
        metavar="ISA",
        help="instruction sets, each where it has kernels of its own (default: the one in use)",
    )


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
        "isa": registry.isa() if registry.isas() else "none",
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
    """One line a layer and instruction set; a time that is missing, or whose result failed parity, is a dash.

    The last line of an instruction set sums what a forward pass to logits calls.
    """
    rows: list[tuple[str, ...]] = [_HEAD]
    for arithmetic in dict.fromkeys(r["arithmetic"] for r in results):
        mine = [r for r in results if r["arithmetic"] == arithmetic]
        for isa in dict.fromkeys(r["isa"] for r in mine if r["contender"] == "ours") or ("-",):
            rows += _lines(
                arithmetic, isa, [r for r in mine if r["isa"] == isa or r["contender"] != "ours"]
            )
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, (True, True, True, *[False] * len(widths)))
        )
        for row in rows
    ]


_HEAD = (
    *("layer", "shape", "isa", "calls", "reference", "compile", "ours", "/reference", "/compile"),
    *("GFLOP/s", "GB/s", "of roof"),
)


def _lines(arithmetic: str, isa: str, results: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    layers: dict[str, dict[str, dict[str, Any]]] = {}
    for result in results:
        layers.setdefault(result["layer"], {})[result["contender"]] = result
    total = np.zeros(6)
    for layer, by_contender in layers.items():
        one = next(iter(by_contender.values()))
        times = [by_contender.get(name, {}).get("ms", nan) for name in _HEAD[4:7]]
        least = by_contender.get("ours", {}).get("of_roof", nan) * times[-1]
        figures = np.array([*times, one["flops"], one["bytes"], least])
        yield (layer, one["shape"], isa, str(one["calls"]), *_figures(*figures))
        if one["calls"]:
            total += one["calls"] * figures
    yield (f"sum of calls, {arithmetic}", "", isa, "", *_figures(*total))


def _figures(
    reference: float, compiled: float, ours: float, flops: float, moved: float, least: float
) -> tuple[str, ...]:
    """``least`` is the time that the roof allows."""
    times = [f"{ms:.3f}" for ms in (reference, compiled, ours)]
    ratios = [f"{ours / reference:.2f}", f"{ours / compiled:.2f}"]
    rates = [f"{flops / ours / 1e6:.0f}", f"{moved / ours / 1e6:.1f}", f"{least / ours:.2f}"]
    return tuple(text.replace("nan", "-") for text in (*times, *ratios, *rates))
