"""A tile's expanded channels shared by programs: the same bits in every order, counters at zero; what is wrong is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from cases import Case
from targets import GpuCase, Target, check_odd
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

from fastscnn_fast.backends.gpu import plan
from fastscnn_fast.kernels import inverted_residual
from fastscnn_fast.kernels.launch import Launch, Tile
from fastscnn_fast.program.layers import Layer
from fastscnn_fast.program.memory import COUNTERS, PARTIALS

pytestmark = pytest.mark.interpreted
LAYER = Layer("inverted_residual", "", 20, 20, mid_channels=90, residual=True)
SHARED = Tile(16, block=16, columns=2, slices=6)
TRITON = Target("triton", "interpreter")


@pytest.fixture(autouse=True)
def shared(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(plan, "tile", lambda *_: SHARED)
    with TRITON.ready():
        yield


def case(batch: int = 2) -> GpuCase:
    return TRITON.case(Case(LAYER, ((1, 35),), batch=batch), "float32")


def in_order(monkeypatch: pytest.MonkeyPatch, order: Callable[[list[Any]], list[Any]]) -> None:
    """Programs run in ``order`` of the grid's places, which the interpreter would take one after the other."""
    place, size = interpreter_builder.set_grid_idx, interpreter_builder.set_grid_dim
    places: dict[Any, Any] = {}

    def begin(*grid: int) -> None:
        every = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
        places.update(zip(every, order(every)))
        size(*grid)

    monkeypatch.setattr(interpreter_builder, "set_grid_dim", begin)
    monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda *at: place(*places[at]))


def shuffled(places: list[Any]) -> list[Any]:
    return [places[i] for i in torch.randperm(len(places)).tolist()]


def result(own: Any, inputs: Any, weights: dict[str, Tensor]) -> Tensor:
    y: Tensor = own.run(inputs, weights)
    return y


def test_the_order_of_programs_changes_no_bit() -> None:
    own = case()
    inputs, weights = own.inputs(), own.weights()
    expected = result(own, inputs, weights)
    for order in (lambda places: places[::-1], shuffled):
        with pytest.MonkeyPatch.context() as monkeypatch:
            in_order(monkeypatch, order)
            assert torch.equal(result(own, inputs, weights), expected)


def test_shared_channels_are_right() -> None:
    check_odd(case())


@triton.jit
def never_resets(counter, SLICES: tl.constexpr):
    return tl.atomic_add(counter, 1, sem="acq_rel") == SLICES - 1


@triton.jit
def sums_at_once(counter, SLICES: tl.constexpr):
    arrived = tl.atomic_add(counter, 1, sem="acq_rel")
    if arrived == SLICES - 1:
        tl.store(counter, 0)
    return arrived == 0


@triton.jit
def sums_one_too_early(counter, SLICES: tl.constexpr):
    arrived = tl.atomic_add(counter, 1, sem="acq_rel")
    if arrived == SLICES - 1:
        tl.store(counter, 0)
    return arrived == SLICES - 2


@pytest.mark.parametrize(
    ("mutant", "found"),
    [
        (never_resets, "left a counter"),
        (sums_at_once, "error everywhere inf"),
        (sums_one_too_early, "error everywhere inf"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_wrong_is_found(mutant: Any, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inverted_residual, "arrives_last", mutant)
    with pytest.raises(AssertionError, match=found):
        check_odd(case())


@pytest.mark.parametrize(("asked", "slices"), [(1, 1), (5, 3), (9, 6)])
def test_as_many_slices_as_divide_the_steps(
    asked: int, slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six steps of 16 channels for 90; a single slice has no partial sums."""
    monkeypatch.setattr(plan, "tile", lambda *_: replace(SHARED, slices=asked))
    made: list[Launch] = []
    launches = inverted_residual.launches

    def seen(*arguments: Any) -> list[Launch]:
        made.extend(launches(*arguments))
        return made

    monkeypatch.setattr(inverted_residual, "launches", seen)
    own = case(batch=1)
    result(own, own.inputs(), own.weights())
    (launch,) = made
    assert launch.grid[2] == launch.arguments["SLICES"] == slices
    names = {buffer.memory for buffer in launch.buffers.values()}
    assert (PARTIALS in names) == (COUNTERS in names) == (slices > 1)
