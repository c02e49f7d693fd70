"""Pictures of any size in tiles that overlap, whose logits are blended where they do."""

from __future__ import annotations

import operator
from collections.abc import Generator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arch.config import SMALLEST_SIDE, Size, picture_size
from ..data.windows import Rows
from ..program.labels import labels_of, probabilities_of
from .fused import FusedFastSCNN
from .model import FastSCNN
from .network import as_input, logits

#: Tiles begin where the grids of the features at 1/32 do, so that each sees the same grid as its neighbours.
GRID = 32
#: The least side of a tile: what is left of one at the lower and right edges is a picture that the network takes.
SMALLEST_TILE = 64
#: Pixels that neighbouring tiles share, where nothing else is asked for.
OVERLAP = 128


class Tiling(NamedTuple):
    """How pictures are cut: tiles of (height, width) pixels, of which neighbours share at least ``overlap``."""

    tile: tuple[int, int]
    overlap: int


def tiling(tile: Size, overlap: int | None = None) -> Tiling:
    """The tiling that is asked for.

    Raises:
        TypeError: ``tile`` is no size, ``overlap`` no integer.
        ValueError: a side of ``tile`` is below 64, or ``overlap`` is negative or so large, about half a side, that three
            tiles would meet.
    """
    height, width = picture_size(tile, "tile")
    if min(height, width) < SMALLEST_TILE:
        raise ValueError(
            f"tile must be at least {SMALLEST_TILE}x{SMALLEST_TILE}, got {height}x{width}"
        )
    overlap = OVERLAP if overlap is None else overlap
    if isinstance(overlap, bool) or not hasattr(overlap, "__index__"):
        raise TypeError(f"overlap must be an integer, got {overlap!r}")
    overlap = operator.index(overlap)
    most = max(
        one for one in range(min(height, width) // 2 + 1) if _step(min(height, width), one) >= one
    )
    if not 0 <= overlap <= most:
        rule = f"overlap must be from 0 to {most}, of tiles of {height}x{width}, which begin at multiples of {GRID}"
        raise ValueError(f"{rule}, got {overlap}")
    return Tiling((height, width), overlap)


def _step(tile: int, overlap: int) -> int:
    """By how much one tile begins after the other."""
    return (tile - overlap) // GRID * GRID


class Span(NamedTuple):
    """A tile along one side of the picture, from ``start`` to ``stop``.

    ``blend`` (first, last) is where it takes over from the one before it: all is that one's before, all its own from
    there on. Of the first tile it is (0, 0).
    """

    start: int
    stop: int
    blend: tuple[int, int]


def spans(length: int, tile: int, overlap: int) -> list[Span]:
    """The tiles along a side of ``length`` pixels.

    They begin at multiples of 32 and are ``tile`` pixels long; the last, and one that is alone, is up to 31 pixels
    shorter, or as short as the picture. Neighbours share ``overlap`` pixels or more, of which the last ``overlap`` of the
    first one are blended: never more than two tiles at a time, as :func:`tiling` sees to.
    """
    found: list[Span] = []
    last = max(0, -(-(length - tile) // GRID) * GRID)
    for start in (*range(0, last, _step(tile, overlap)), last):
        before = found[-1].stop if found else overlap
        found.append(Span(start, min(start + tile, length), (before - overlap, before)))
    return [found[0]._replace(blend=(0, 0)), *found[1:]]


class Band(NamedTuple):
    """Rows of a picture that are done, from ``top`` on.

    Attributes:
        pixels: uint8 (rows, width, C).
        labels: uint8 (rows, width).
        confidence: float32 (rows, width), where it was asked for.
    """

    top: int
    pixels: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    confidence: NDArray[np.float32] | None


def bands(
    fast: FusedFastSCNN | FastSCNN, rows: Rows, cut: Tiling, confidence: bool = False
) -> Generator[Band, None, None]:
    """The labels of all rows of a picture, from above, with a row of tiles in memory.

    Where a pixel is in one tile alone, or outside the pixels that are blended, its label is that of its tile as a
    picture by itself. Where tiles are blended, the label is that of the sum of their logits, each weighted by how
    far from its edge the pixel is: linearly along each side, the weights of all tiles summing up to 1.

    In memory are, besides what the network takes for a tile, the logits of a tile, those of the blended rows across
    the picture (4 x classes x overlap x width bytes), and the pixels of a row of tiles.

    Raises:
        ValueError: rows cannot be read, the model is in training mode or has more than 256 classes.
    """
    classes = fast.config.num_classes
    down = spans(rows.height, cut.tile[0], cut.overlap)
    across = spans(rows.width, cut.tile[1], cut.overlap)
    above = torch.zeros(classes, cut.overlap if len(down) > 1 else 0, rows.width)
    pixels = rows.read(0, down[0].stop)
    for index, row in enumerate(down):
        if index > 0:
            held = down[index - 1].stop
            kept = pixels[len(pixels) - (held - row.start) :]
            pixels = np.concatenate([kept, rows.read(held, row.stop)])
        top = row.blend[0]
        bottom = down[index + 1].blend[0] if index + 1 < len(down) else rows.height
        labels = np.empty((bottom - top, rows.width), np.uint8)
        sure = np.empty(labels.shape, np.float32) if confidence else None
        for left, block in _blended_across(fast, pixels, across):
            block = block[:, top - row.start :]
            columns = slice(left, left + block.shape[2])
            fade = _ramp(row.blend)[:, None]
            block[:, : len(fade)].mul_(fade).add_(above[:, : len(fade), columns])
            if bottom < row.stop:
                lower = _ramp((bottom, row.stop)).neg_().add_(1)[:, None]
                torch.mul(block[:, bottom - top :], lower, out=above[:, :, columns])
            done = block[None, :, : bottom - top]
            found = labels_of(done)
            labels[:, columns] = found[0].numpy()
            if sure is not None:
                probable = probabilities_of(done)
                if classes == 1:
                    probable = torch.cat((1 - probable, probable), 1)
                sure[:, columns] = probable.gather(1, found[:, None])[0, 0].numpy()
        yield Band(top, pixels[top - row.start : bottom - row.start], labels, sure)


def _blended_across(
    fast: FusedFastSCNN | FastSCNN, pixels: NDArray[np.uint8], across: Sequence[Span]
) -> Generator[tuple[int, Tensor], None, None]:
    """The logits (K, h, columns) of a row of tiles, with their first column, from left to right."""
    before: Tensor | None = None
    for index, tile in enumerate(across):
        right = across[index + 1].blend[0] if index + 1 < len(across) else tile.stop
        found = _logits(fast, np.ascontiguousarray(pixels[:, tile.start : tile.stop]))
        found = found[:, :, tile.blend[0] - tile.start :]
        if before is not None:
            fade = _ramp(tile.blend)
            found[:, :, : len(fade)].mul_(fade).add_(before)
        width = right - tile.blend[0]
        if right < tile.stop:
            before = found[:, :, width:] * (1 - _ramp((right, tile.stop)))
        yield tile.blend[0], found[:, :, :width]


def _ramp(blend: tuple[int, int]) -> Tensor:
    """The weights of the tile that takes over."""
    length = blend[1] - blend[0]
    return (torch.arange(length) + 0.5) / max(length, 1)


def _logits(fast: FusedFastSCNN | FastSCNN, pixels: NDArray[np.uint8]) -> Tensor:
    """The network's logits of pixels (h, w, C), float32 (K, h, w) on the CPU, by nearest neighbour where a side is below 32."""
    height, width = pixels.shape[:2]
    size = max(height, SMALLEST_SIDE), max(width, SMALLEST_SIDE)
    found = logits(fast, as_input(pixels, size))[0].float().cpu()
    if size == (height, width):
        return found
    rows, columns = (
        ((torch.arange(own) + 0.5) * run / own).long() for own, run in zip((height, width), size)
    )
    return found[:, rows[:, None], columns]
