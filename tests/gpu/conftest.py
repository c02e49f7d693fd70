"""A test of GPU kernels says what may run them by the name of its fixture; each that this process has is a case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from targets import INTERPRETED, TARGETS, Target

# Nothing is compiled where it is interpreted, and no further process is started.
collect_ignore = ["test_aot.py", "test_dump.py", "test_interpreter.py"] if INTERPRETED else []

_WANTED: dict[str, Callable[[Target], bool]] = {
    "target": lambda target: True,
    "triton": lambda target: target.backend == "triton",
    "emulation": lambda target: target.where == "emulation",
    "on_gpu": lambda target: target.where == "gpu",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, wanted in _WANTED.items():
        if name in metafunc.fixturenames:
            found = [pytest.param(t, id=str(t), marks=t.marks) for t in TARGETS if wanted(t)]
            metafunc.parametrize(name, found, indirect=True)


@contextmanager
def _ready(request: pytest.FixtureRequest) -> Iterator[Target]:
    target: Target = request.param
    if why_not := target.why_not():
        pytest.skip(f"{target}: {why_not}")
    with target.ready():
        yield target


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Every backend on everything that runs it."""
    with _ready(request) as found:
        yield found


@pytest.fixture
def triton(request: pytest.FixtureRequest) -> Iterator[Target]:
    """The Triton backend, in its interpreter or on a GPU."""
    with _ready(request) as found:
        yield found


@pytest.fixture
def emulation(request: pytest.FixtureRequest) -> Iterator[Target]:
    """The CUDA backend's kernels on the host."""
    with _ready(request) as found:
        yield found


@pytest.fixture
def on_gpu(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Every backend on a GPU."""
    with _ready(request) as found:
        yield found
