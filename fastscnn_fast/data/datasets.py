"""Labelled pictures as training and evaluation read them: checked and kept in memory, in augmented batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from .augmentation import Augmentation
from .classes import counted, label_names
from .labelmap import DataError
from .scenery import Scenery
from .sources import Example, Source, raise_problems


class Examples:
    """Every example of a source, read and checked once and kept in memory as far as it fits.

    Attributes:
        label_names: what the labels are called, :func:`~.classes.label_names`.
        pixels: labelled pixels of each of them, int64.
        ignored: pixels that belong to no class.
        channels: of the pictures.
        sizes: (height, width) of each example.

    Raises:
        DataError: what is wrong, by file.
    """

    def __init__(
        self,
        source: Source,
        memory: float = math.inf,
        workers: int = 1,
        progress: Callable[[Iterator[None], int], Iterator[None]] | None = None,
    ) -> None:
        """Keeps at most ``memory`` bytes; ``progress(iterator, total)`` may show how far it is.

        Raises:
            ValueError: ``memory`` is below 0 or NaN.
        """
        if not memory >= 0:
            raise ValueError(f"memory must be 0 or more bytes, got {memory}")
        self.source, self.classes, self.ignore = source, source.classes, source.ignore
        self.channels = source.channels
        self.label_names = label_names(source.classes)
        self._kept: list[Example | None] = [None] * len(source)
        self.sizes: list[tuple[int, int]] = []
        counts, problems, left = np.zeros(256, np.int64), [], memory

        def read(index: int) -> Example | str:
            try:
                return source.read(index)
            except (ValueError, OSError) as error:
                return str(error)

        def read_all() -> Iterator[None]:
            nonlocal left
            with ThreadPoolExecutor(max(1, workers)) as pool:
                for index, result in enumerate(pool.map(read, range(len(source)))):
                    if isinstance(result, str):
                        problems.append(result)
                    else:
                        height, width = result.labels.shape
                        self.sizes.append((height, width))
                        counts[:] += np.bincount(result.labels.ravel(), minlength=256)
                        left -= result.picture.nbytes + result.labels.nbytes
                        if left >= 0:
                            self._kept[index] = result
                    yield

        for _ in read_all() if progress is None else progress(read_all(), len(source)):
            pass
        raise_problems(problems)
        self.pixels: NDArray[np.int64] = counts[: len(self.label_names)]
        self.ignored = int(counts[len(self.label_names) :].sum())
        if not self.pixels.any():
            raise DataError(f"{source.name(0)} and all others: no pixel has a class")

    @property
    def absent(self) -> str | None:
        """Which classes no labelled pixel has, and what that may mean, in a sentence; None where each occurs."""
        names = [name for name, pixels in zip(self.label_names, self.pixels) if not pixels]
        if not names:
            return None
        where = f"{counted(len(self), 'example')}, {self.name(0)} the first"
        said = (
            f"no pixel is of class {', '.join(n.removeprefix('class ') for n in names)} ({where})"
        )
        unsaid = self.source.table is None  # what the values mean
        if unsaid and not self.pixels[1:].any() and self.ignored:  # as in masks of 0 and 255
            said += (
                f"; they hold 0 and {self.ignore}, which is the id that is ignored: where it is meant as a class,"
                " write that class's id, 1 in masks of one or two classes, or say by --label-map what they mean"
            )
        return said

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Example:
        kept = self._kept[index]
        return self.source.read(index) if kept is None else kept

    def name(self, index: int) -> str:
        """What errors call the example at ``index``."""
        return self.source.name(index)

    def require_one_size(self, argument: str) -> None:
        """Raises DataError, naming the first example whose size is not that of the others."""
        for index, size in enumerate(self.sizes):
            if size != self.sizes[0]:
                raise DataError(
                    f"{argument} needs pictures of one size: {self.name(0)} is "
                    f"{self.sizes[0][0]}x{self.sizes[0][1]}, {self.name(index)} is {size[0]}x{size[1]}"
                )


def load(source: Source, memory: float = math.inf, workers: int = 1) -> Examples:
    """The :class:`Examples` of a source, with a progress bar where reading takes long."""

    def bar(reading: Iterator[None], total: int) -> Iterator[None]:
        shown: Iterator[None] = iter(
            tqdm(reading, "checking", total, unit="picture", delay=2, leave=False)
        )
        return shown

    return Examples(source, memory, workers, bar)


class Batch(NamedTuple):
    """Pictures, uint8 (N, C, H, W) in channels-last memory, and labels, uint8 (N, h, w)."""

    pictures: Tensor
    labels: Tensor


class Batches:
    """An endless stream of augmented batches in which step s is always the same.

    The stream is one shuffled pass over the examples after the other. What happens to its k-th example
    follows from ``seed`` and k alone, so that any step can be made on any process at any time.

    Args:
        examples: the data set.
        augmentation: what is done to each example.
        batch: examples per step over all processes.
        extra: a second data set; each example is taken from it with probability ``extra_share``.
        rank: which of the processes this is; it makes its part of each batch.
        world: how many there are; it divides ``batch``.
        workers: threads that prepare the next step; 0 prepares each when it is asked for.
        scenery: what is done to whole examples before views of them are taken.
    """

    def __init__(
        self,
        examples: Examples,
        augmentation: Augmentation,
        batch: int,
        seed: int = 0,
        extra: Examples | None = None,
        extra_share: float = 0.0,
        rank: int = 0,
        world: int = 1,
        workers: int = 2,
        scenery: Scenery | None = None,
    ) -> None:
        if batch < 1 or batch % world:
            raise ValueError(
                f"batch must be a positive multiple of the {world} processes, got {batch}"
            )
        self.examples, self.augmentation, self.batch, self.seed = (
            examples,
            augmentation,
            batch,
            seed,
        )
        self.extra, self.extra_share = extra, extra_share if extra is not None else 0.0
        self.rank, self.world, self.workers, self.scenery = rank, world, workers, scenery
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, np.int64))

    def _pick(self, position: int) -> tuple[Examples, int]:
        if self.extra is not None and self.extra_share > 0:
            rng = np.random.default_rng((self.seed, 1, position))
            if rng.random() < self.extra_share:
                return self.extra, int(rng.integers(len(self.extra)))
        epoch, place = divmod(position, len(self.examples))
        known, order = self._order
        if known != epoch:
            order = np.random.default_rng((self.seed, 2, epoch)).permutation(len(self.examples))
            self._order = epoch, order
        return self.examples, int(order[place])

    def example(self, position: int) -> Example:
        """The stream's example at ``position``, augmented."""
        examples, index = self._pick(position)
        example = examples[index]
        if self.scenery is not None:
            rng = np.random.default_rng((self.seed, 5, position))
            example = Example(*self.scenery(*example, rng))
        return self.augmentation(example, np.random.default_rng((self.seed, 3, position)))

    def steps(self, start: int, stop: int) -> Iterator[Batch]:
        """This process's part of the steps from ``start`` up to ``stop``."""
        share = self.batch // self.world

        def positions(step: int) -> range:
            first = step * self.batch + self.rank * share
            return range(first, first + share)

        if self.workers == 0:
            for step in range(start, stop):
                yield _collate([self.example(k) for k in positions(step)])
            return
        with ThreadPoolExecutor(self.workers) as pool:
            coming = (
                [[pool.submit(self.example, k) for k in positions(start)]] if start < stop else []
            )
            for step in range(start, stop):
                current = coming.pop()
                if step + 1 < stop:
                    coming.append([pool.submit(self.example, k) for k in positions(step + 1)])
                yield _collate([future.result() for future in current])


def _collate(examples: Sequence[Example]) -> Batch:
    pictures = torch.from_numpy(np.stack([e.picture for e in examples]))
    return Batch(
        pictures.permute(0, 3, 1, 2), torch.from_numpy(np.stack([e.labels for e in examples]))
    )
