"""One seed a run, groups of tests that `make test` leaves out, and one case per instruction set and arithmetic."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

# Thousands of small calls: waiting threads neither burn a busy processor for long nor go to sleep at once.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Triton's interpreter multiplies by numpy, small matrices each time: its threads would wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy
import torch
from helpers import Kernels, threads
from hypothesis import settings

from fastscnn_fast.backends import registry

#: The same numbers each time, unless FASTSCNN_SEED=n asks for others; child processes find it in their environment.
SEED = int(os.environ.setdefault("FASTSCNN_SEED", "1"))

#: The markers of groups that `make test` leaves out (pyproject.toml says what they are), and those that `.ci/run` does too.
GROUPS = (
    "gpu",
    "exhaustive",
    "sanitizers",
    "mutants",
    "machine_code",
    "emulated",
    "interpreted",
    "slow",
)
NOT_IN_CI = {"gpu", "exhaustive"}

# A shell has Ctrl-C ignored by what it runs in the background, and so by all that this starts: tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Most tensors here are too small to share: on a busy processor threads would wait for each other.
torch.set_num_threads(1)
# What failed before is not kept: hypothesis draws from the seed alone.
settings.register_profile("fastscnn_fast", deadline=None, print_blob=True, database=None)
settings.load_profile("fastscnn_fast")


@pytest.hookimpl(tryfirst=True)  # before hypothesis reads it
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--hypothesis-seed") is None:
        config.option.hypothesis_seed = str(SEED)


def _groups(item: pytest.Item) -> list[str]:
    return [name for name in GROUPS if item.get_closest_marker(name)]


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        groups = _groups(item)
        if groups and NOT_IN_CI.isdisjoint(groups):
            item.add_marker("ci")


_LEFT_OUT = Counter[str]()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    _LEFT_OUT.update(groups[0] for item in items if (groups := _groups(item)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the default selection did not run, by name; a test of two groups counts for the first."""
    config = terminalreporter.config
    if "not ci" not in config.option.markexpr:
        return
    what = dict(line.split(": ", 1) for line in config.getini("markers") if ": " in line)
    for name in filter(_LEFT_OUT.get, GROUPS):
        select = name if name in NOT_IN_CI else f"{name} and ci"
        command = f'python -m pytest -m "{select}"'
        terminalreporter.write_line(f"{_LEFT_OUT[name]:5} not run: {command:41} # {what[name]}")


def pytest_report_header() -> str:
    return f"FASTSCNN_SEED={SEED}"


@pytest.fixture(autouse=True)
def seed() -> int:
    """The run's seed; every test starts from it. FASTSCNN_SEED=n repeats a run."""
    print(f"FASTSCNN_SEED={SEED}")
    random.seed(SEED)
    numpy.random.seed(SEED % 2**32)
    # torch.manual_seed also notes the seed, with a traceback, for each kind of device that is not in use: 2 ms.
    torch.default_generator.manual_seed(SEED)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(SEED)
    return SEED


_ALL = Kernels.of_floats()
_FLOAT32 = [kernels for kernels in _ALL if kernels.arithmetic == "float32"]
_FORCED: dict[str, Sequence[Kernels]] = {
    "isa": _FLOAT32,
    "best_isa": _FLOAT32,
    "kernels": _ALL,
    "best_kernels": _ALL,
    "int8_isa": [Kernels("int8", isa) for isa in registry.isas("int8")],
}


def _case(name: str, kernels: Kernels) -> Any:
    best = kernels.isa == registry.isas(kernels.arithmetic)[-1]
    marks = [pytest.mark.slow] if name.startswith("best") and not best else []
    return pytest.param(kernels, id=kernels.isa if "isa" in name else str(kernels), marks=marks)


@pytest.hookimpl(trylast=True)  # so that the instruction set varies fastest
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, kernels in _FORCED.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, [_case(name, k) for k in kernels], indirect=True)


@contextmanager
def _forced(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """The kernels of the fixture's parameter, on a team of two threads."""
    chosen: Kernels = request.param
    with pytest.MonkeyPatch.context() as monkeypatch, threads(2):
        monkeypatch.setenv("FASTSCNN_ISA", chosen.isa)
        assert registry.isa() == chosen.isa
        yield chosen


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that has float32 kernels and runs here, forced in turn."""
    with _forced(request) as chosen:
        yield chosen.isa


@pytest.fixture
def best_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The best of them; `slow`: each. For what the ops' own tests show of each."""
    with _forced(request) as chosen:
        yield chosen.isa


@pytest.fixture
def int8_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that has int8 kernels and runs here, forced in turn."""
    with _forced(request) as chosen:
        yield chosen.isa


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """Each arithmetic of floats on each instruction set that has kernels for it and runs here, forced in turn."""
    with _forced(request) as chosen:
        yield chosen


@pytest.fixture
def best_kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """Each arithmetic of floats on its best instruction set; `slow`: on each. For what the ops' own tests show of each."""
    with _forced(request) as chosen:
        yield chosen
