"""Many pictures through the network: read and written in threads, beside the batches that it runs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from contextlib import closing
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from .fused import FusedFastSCNN
from .overlapped import overlapped
from .segment import Classified, Confidence, Labels, Prepared, classify, fits

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Pixels of pictures in memory at a time, or of one larger one alone; 10 to 25 bytes each.
MOST_PIXELS = 2**26


def flow(
    fast: FusedFastSCNN,
    items: Iterable[Item],
    read: Callable[[Item], Prepared],
    write: Callable[[Item, NDArray[np.uint8], Labels, Confidence | None], Result],
    size: Callable[[Item], int],
    confidence: bool = False,
) -> Generator[tuple[Item, Future[Result]], None, None]:
    """Each item, in order, with the finished future of ``write(item, pixels, labels, confidence)``.

    ``read`` and ``write`` run in as many threads as torch has, of which the network takes those that have nothing to do.
    What they raise is their item's future's exception, and the others go on. Pictures that the network takes at one size
    run in batches.

    Args:
        fast: the network.
        items: whatever stands for a picture.
        read: an item as the network takes it.
        write: what becomes of uint8 ``pixels`` (H, W, C) and their uint8 ``labels`` (H, W), with ``confidence``, float32 (H, W)
            from 0 to 1, where that is asked for.
        size: an item's pixels, before it is read; at most :data:`MOST_PIXELS` are in memory, or one larger picture.
        confidence: whether to ask for it.
    """
    threads = torch.get_num_threads()

    def label(read: list[Prepared], busy: int) -> list[tuple[Prepared, Classified]]:
        # Threads of the network wait for each other: one whose processor encodes holds up all.
        torch.set_num_threads(max(1, threads - busy))
        return list(zip(read, classify(fast, [one.x for one in read], confidence)))

    def joins(read: list[Prepared], one: Prepared) -> bool:
        return one.x.shape == read[0].x.shape and fits(len(read), one.x)

    def after(item: Item, made: tuple[Prepared, Classified]) -> Result:
        (pixels, _), classified = made
        return write(item, pixels, *classified.at(pixels.shape))

    steps = overlapped(
        *(items, read, label, after), size=size, most=MOST_PIXELS, workers=threads, joins=joins
    )
    try:
        with closing(steps):
            yield from steps
    finally:
        torch.set_num_threads(threads)
