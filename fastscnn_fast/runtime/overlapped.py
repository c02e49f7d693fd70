"""Many pieces of work in three steps each, the first and the last in threads beside the one between."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

Item = TypeVar("Item")
Read = TypeVar("Read")
Made = TypeVar("Made")
Result = TypeVar("Result")


def overlapped(
    items: Iterable[Item],
    before: Callable[[Item], Read],
    between: Callable[[list[Read], int], Sequence[Made]],
    after: Callable[[Item, Made], Result],
    size: Callable[[Item], int],
    most: int,
    workers: int,
    joins: Callable[[list[Read], Read], bool],
) -> Generator[tuple[Item, Future[Result]], None, None]:
    """Each item, in order, with the finished future of ``after(item, made)``, which is its of those that
    ``between([before(item), ...], busy)`` gives.

    ``between``, ``joins`` and ``size`` run in the caller's thread, the rest in ``workers`` threads, of which
    ``busy`` have something to do. ``between`` gets those that are there by then and follow each other, the
    first and those that ``joins`` adds to them.
    What a step raises is its item's future's exception, and the others go on. At most 2 ``workers`` + 2 items
    are begun and not given out yet, and they are of ``size`` at most ``most`` together, or one alone: the
    slowest step holds back those before it.

    Where the caller stops (close the iterator) or is interrupted, steps that run are waited for and no other
    begins.
    """
    coming: deque[tuple[Item, int, Future[Read]]] = deque()
    going: deque[tuple[Item, int, Future[Result]]] = deque()
    sized = ((item, size(item)) for item in items)
    following, held = next(sized, None), 0
    pool = ThreadPoolExecutor(workers)
    try:
        while following or coming or going:
            while following and (count := len(coming) + len(going)) < 2 * workers + 2:
                item, its_size = following
                if count and held + its_size > most:
                    break
                coming.append((item, its_size, pool.submit(before, item)))
                following, held = next(sized, None), held + its_size
            heads: list[Future[Any]] = [queue[0][2] for queue in (coming, going) if queue]
            wait(heads, None, FIRST_COMPLETED)
            while going and going[0][2].done():
                item, its_size, future = going.popleft()
                held -= its_size
                yield item, future
                del future  # and what it holds
            if coming and coming[0][2].done():
                batch = _batch(coming, joins)
                begun = sum(not future.done() for *_, future in coming)
                begun += sum(not future.done() for *_, future in going)
                going += _go_on(pool, batch, min(begun, workers), between, after)
                del batch
    finally:
        pool.shutdown(cancel_futures=True)


_Coming = tuple[Item, int, "Future[Read]"]


def _batch(
    coming: deque[_Coming[Item, Read]], joins: Callable[[list[Read], Read], bool]
) -> list[_Coming[Item, Read]]:
    """Takes the first away, which is done, and those after it that go with it."""
    batch = [coming.popleft()]
    if batch[0][2].exception() is None:
        reads = [batch[0][2].result()]
        while coming and coming[0][2].done() and coming[0][2].exception() is None:
            if not joins(reads, read := coming[0][2].result()):
                break
            reads.append(read)
            batch.append(coming.popleft())
    return batch


def _go_on(
    pool: ThreadPoolExecutor,
    batch: list[_Coming[Item, Read]],
    busy: int,
    between: Callable[[list[Read], int], Sequence[Made]],
    after: Callable[[Item, Made], Result],
) -> list[tuple[Item, int, Future[Result]]]:
    try:
        made = between([read.result() for *_, read in batch], busy)
    except Exception as error:
        failed: Future[Result] = Future()
        failed.set_exception(error)
        return [(item, its_size, failed) for item, its_size, _ in batch]
    return [
        (item, its_size, pool.submit(after, item, one))
        for (item, its_size, _), one in zip(batch, made, strict=True)
    ]
