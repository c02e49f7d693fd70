"""Iterators that run beside the one who takes from them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def beside(items: Iterable[Item], ahead: int, newest: bool = False) -> Generator[Item, None, None]:
    """``items``, iterated in a thread of its own, at most ``ahead`` further than what is taken.

    With ``newest`` the thread does not wait: where the taker is late, the oldest ones are dropped. What the iterator
    raises is raised here. Where the taker stops (close the iterator), the thread ends after the item that it is at.
    """
    ready: deque[Item] = deque()
    changed = threading.Condition()
    stopped, ended = False, False
    failed: list[BaseException] = []

    def run() -> None:
        nonlocal ended
        iterator = iter(items)
        try:
            for item in iterator:
                with changed:
                    if newest and len(ready) >= ahead:
                        ready.popleft()
                    changed.wait_for(lambda: stopped or len(ready) < ahead)
                    if stopped:
                        break
                    ready.append(item)
                    changed.notify_all()
                del item
        except BaseException as error:
            failed.append(error)
        finally:
            _close(iterator)
            with changed:
                ended = True
                changed.notify_all()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: ready or ended)
                if not ready:
                    break
                item = ready.popleft()
                changed.notify_all()
            yield item
            del item
        if failed:
            raise failed[0]
    finally:
        with changed:
            stopped = True
            changed.notify_all()
        thread.join()


def each(
    items: Iterable[Item],
    work: Callable[[Item], Result],
    workers: int,
    begin: Callable[[], None],
) -> Generator[Result, None, None]:
    """``work(item)`` of each, in order, by ``workers`` threads, each of which calls ``begin`` first.

    At most one item more than there are workers is begun and not given out.
    """
    going: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers, initializer=begin)
    iterator = iter(items)
    try:
        for item in iterator:
            going.append(pool.submit(work, item))
            del item
            while len(going) > workers or (going and going[0].done()):
                yield going.popleft().result()
        while going:
            yield going.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        _close(iterator)


def _close(iterator: Iterator[object]) -> None:
    if isinstance(iterator, Generator):
        with closing(iterator):
            pass
