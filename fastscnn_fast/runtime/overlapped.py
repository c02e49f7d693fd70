"""Many pieces of work in three steps each, the first and the last in threads beside the one between."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

Item = TypeVar("Item")
Read = TypeVar("Read")
Made = TypeVar("Made")
Result = TypeVar("Result")


def overlapped(
    items: Iterable[Item],
    before: Callable[[Item], Read],
    between: Callable[[Read, int], Made],
    after: Callable[[Item, Made], Result],
    size: Callable[[Item], int],
    most: int,
    workers: int,
) -> Generator[tuple[Item, Future[Result]], None, None]:
    """Each item, in order, with the finished future of ``after(item, between(before(item), busy))``.

    ``between`` and ``size`` run in the caller's thread, one item after the other, the rest in ``workers`` threads,
    of which ``busy`` have something to do.
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
                item, its_size, read = coming.popleft()
                begun = sum(not future.done() for *_, future in coming)
                begun += sum(not future.done() for *_, future in going)
                made = _go_on(pool, item, read, min(begun, workers), between, after)
                going.append((item, its_size, made))
                del read
    finally:
        pool.shutdown(cancel_futures=True)


def _go_on(
    pool: ThreadPoolExecutor,
    item: Item,
    read: Future[Read],
    busy: int,
    between: Callable[[Read, int], Made],
    after: Callable[[Item, Made], Result],
) -> Future[Result]:
    try:
        made = between(read.result(), busy)
    except Exception as error:
        failed: Future[Result] = Future()
        failed.set_exception(error)
        return failed
    return pool.submit(after, item, made)
