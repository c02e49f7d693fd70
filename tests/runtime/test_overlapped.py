"""Three steps of many pieces of work: in order, beside each other, bounded, and over when they are stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from fastscnn_fast.runtime.overlapped import overlapped

WAIT = 20.0


def run(
    items: Any = range(20),
    before: Callable[[int], int] = lambda item: item + 1,
    between: Callable[[int, int], int] = lambda read, busy: read * 10,
    after: Callable[[int, int], tuple[int, int]] = lambda item, made: (item, made),
    size: Callable[[int], int] = lambda item: 1,
    most: int = 1000,
    workers: int = 2,
    joins: Callable[[list[int], int], bool] = lambda reads, read: False,
) -> Any:
    def each(reads: list[int], busy: int) -> list[int]:
        return [between(read, busy) for read in reads]

    return overlapped(items, before, each, after, size, most, workers, joins)


def test_results_come_in_order_whichever_is_ready_first() -> None:
    release = threading.Event()

    def after(item: int, made: int) -> tuple[int, int]:
        if item == 0:
            assert release.wait(WAIT)
        if item == 3:
            release.set()
        return item, made

    found = [(item, future.result()) for item, future in run(after=after)]
    assert found == [(item, (item, 10 * (item + 1))) for item in range(20)]
    assert list(run([])) == []


def test_the_outer_steps_run_beside_the_one_between() -> None:
    """Which waits here until the next picture is read and the one before written, in other threads."""
    read = [threading.Event() for _ in range(5)]
    written = [threading.Event() for _ in range(5)]
    here = threading.get_ident()

    def before(item: int) -> int:
        assert threading.get_ident() != here
        read[item].set()
        return item

    def between(item: int, busy: int) -> int:
        assert threading.get_ident() == here and 0 <= busy <= 2
        assert item == 4 or read[item + 1].wait(WAIT)
        assert item == 0 or written[item - 1].wait(WAIT)
        return item

    def after(item: int, made: int) -> int:
        assert threading.get_ident() != here
        written[item].set()
        return item

    assert [future.result() for _, future in run(range(5), before, between, after)] == [*range(5)]


@pytest.mark.parametrize("bad", ["before", "between", "after"])
def test_what_a_step_raises_is_its_items_and_the_rest_goes_on(bad: str) -> None:
    def step(name: str) -> Callable[..., int]:
        def act(item: int, *_: Any) -> int:
            if name == bad and item == 7:
                raise ValueError("seven")
            return item

        return act

    outcomes = list(run(range(12), step("before"), step("between"), step("after")))
    assert [item for item, _ in outcomes] == [*range(12)]
    for item, future in outcomes:
        if item == 7:
            with pytest.raises(ValueError, match="seven"):
                future.result()
        else:
            assert future.result() == item


@pytest.mark.parametrize(
    ("sizes", "most", "workers", "expected"),
    [
        ([1] * 40, 1000, 2, 6),  # 2 workers + 2 ahead of those given out
        ([1] * 40, 4, 2, 4),
        ([10] * 40, 25, 3, 2),
        ([99] * 40, 25, 3, 1),
    ],
)
def test_what_is_begun_and_not_given_out_is_bounded(
    sizes: list[int], most: int, workers: int, expected: int
) -> None:
    begun: list[int] = []

    def before(item: int) -> int:
        begun.append(item)
        return item

    steps = run(range(40), before, size=lambda item: sizes[item], most=most, workers=workers)
    most_begun = 0
    for given, _ in enumerate(steps):
        most_begun = max(most_begun, len(begun) - given)
    assert most_begun <= expected and len(begun) == 40


@pytest.mark.parametrize("how", ["closed", "interrupted"])
def test_where_the_caller_stops_what_runs_ends_and_nothing_else_begins(how: str) -> None:
    begun, ended = [], []
    holds = threading.Event()

    def after(item: int, made: int) -> int:
        begun.append(item)
        if item == 0:
            assert holds.wait(WAIT)
        if item == 1:
            holds.set()
            threading.Event().wait(0.05)
        ended.append(item)
        return item

    def between(read: int, busy: int) -> int:
        if how == "interrupted" and read == 3:
            assert holds.wait(WAIT)
            raise KeyboardInterrupt
        return read

    before_it = threading.active_count()
    with closing(run(range(1000), between=between, after=after)) as steps:
        if how == "closed":
            next(steps)
            assert holds.wait(WAIT)
        else:
            with pytest.raises(KeyboardInterrupt):
                list(steps)
    assert begun and sorted(begun) == sorted(ended) and len(begun) < 20
    assert threading.active_count() == before_it


def test_results_are_not_kept() -> None:
    """Memory stays bounded although the futures hold what the steps made."""
    import weakref

    class Big:
        pass

    alive: list[weakref.ref[Big]] = []

    def before(item: int) -> Big:
        big = Big()
        alive.append(weakref.ref(big))
        return big

    steps = run(range(30), before, lambda read, busy: read, lambda item, made: item, workers=1)
    for _ in steps:
        assert sum(ref() is not None for ref in alive) <= 5


def test_those_that_are_ready_go_together_as_far_as_they_join() -> None:
    """The first waits until all that may be begun with it are read; 4 joins none before it, and 9 fails by itself."""
    read = [threading.Event() for _ in range(10)]
    batches: list[list[int]] = []

    def before(item: int) -> int:
        read[item].set()
        if item == 9:
            raise ValueError("nine")
        return item

    def between(reads: list[int], busy: int) -> list[int]:
        batches.append(reads)
        assert read[5].wait(WAIT)
        threading.Event().wait(0.02)  # until their futures know it
        return [10 * one for one in reads]

    def joins(reads: list[int], one: int) -> bool:
        return len(reads) < 3 and one != 4

    steps = overlapped(range(10), before, between, lambda i, m: (i, m), lambda i: 1, 99, 2, joins)
    outcomes = [future for _, future in steps]
    assert [future.result() for future in outcomes[:9]] == [(i, 10 * i) for i in range(9)]
    with pytest.raises(ValueError, match="nine"):
        outcomes[9].result()
    assert [one for batch in batches for one in batch] == [*range(9)]
    assert all(len(batch) <= 3 and 4 not in batch[1:] for batch in batches)
    assert max(map(len, batches)) > 1


def test_what_a_batch_raises_is_the_exception_of_all_in_it() -> None:
    def fail(reads: list[int], busy: int) -> list[int]:
        raise RuntimeError(str(reads))

    def joins(reads: list[int], one: int) -> bool:
        return True

    steps = overlapped(range(5), lambda i: i, fail, lambda i, m: m, lambda i: 1, 99, 2, joins)
    for item, future in steps:
        with pytest.raises(RuntimeError, match=str(item)):
            future.result()
