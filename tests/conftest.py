"""One fresh seed a run, printed with the run and with each failure; one case per instruction set."""

from __future__ import annotations

import os
import random
from secrets import randbits

import numpy
import pytest

# Thousands of small calls: waiting threads neither burn a busy processor for long nor go to sleep at once.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from hypothesis import settings

from fastscnn_fast import backends

SEED = int(os.environ.get("FASTSCNN_SEED") or randbits(31))

torch.set_num_threads(2)
settings.register_profile("fastscnn_fast", deadline=None, print_blob=True)
settings.load_profile("fastscnn_fast")


def pytest_report_header() -> str:
    return f"FASTSCNN_SEED={SEED}"


@pytest.fixture(autouse=True)
def seed() -> int:
    """The run's seed; every test starts from it. FASTSCNN_SEED=n repeats a run."""
    print(f"FASTSCNN_SEED={SEED}")
    random.seed(SEED)
    numpy.random.seed(SEED % 2**32)
    torch.manual_seed(SEED)
    return SEED


@pytest.hookimpl(trylast=True)  # so that the instruction set varies fastest
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", backends.isas(), indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that is compiled in and runs here, forced in turn."""
    name: str = request.param
    monkeypatch.setenv("FASTSCNN_ISA", name)
    assert backends.isa() == name
    return name
