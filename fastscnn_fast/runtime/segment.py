"""From a picture to the class of each of its pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..arch.config import SMALLEST_SIDE, Config, Size, picture_size
from ..data.pictures import Guess, Picture, pixels_of, resized
from ..data.windows import open_rows
from ..program.labels import labels_of, probabilities_of
from .forked import serial
from .fused import FusedFastSCNN
from .model import FastSCNN
from .network import check_model, fused_for
from .tiles import Tiling, bands, tiling

Labels = NDArray[np.uint8]
Confidence = NDArray[np.float32]
#: Lists of pictures of one kind, or of several, are no ``list[Picture]`` to type checkers.
Several = list[Any] | tuple[Picture, ...]
#: Pixels that the network takes at a time, in batches of one size: more of them gain nothing.
BATCH_PIXELS = 2**20
#: Bytes of pictures of a list that wait for others of their size.
_MOST_WAITING = 2**26


@overload
def segment(
    fast: FusedFastSCNN | FastSCNN,
    picture: Picture,
    size: Size | None = None,
    bits: int | None = None,
    confidence: Literal[False] = False,
    tile: Size | None = None,
    overlap: int | None = None,
    out: Labels | None = None,
) -> Labels: ...


@overload
def segment(
    fast: FusedFastSCNN | FastSCNN,
    picture: Picture,
    size: Size | None = None,
    bits: int | None = None,
    *,
    confidence: Literal[True],
    tile: Size | None = None,
    overlap: int | None = None,
    out: Labels | None = None,
) -> tuple[Labels, Confidence]: ...


@overload
def segment(
    fast: FusedFastSCNN | FastSCNN,
    picture: Several,
    size: Size | None = None,
    bits: int | None = None,
    confidence: Literal[False] = False,
    tile: Size | None = None,
    overlap: int | None = None,
) -> list[Labels]: ...


@overload
def segment(
    fast: FusedFastSCNN | FastSCNN,
    picture: Several,
    size: Size | None = None,
    bits: int | None = None,
    *,
    confidence: Literal[True],
    tile: Size | None = None,
    overlap: int | None = None,
) -> list[tuple[Labels, Confidence]]: ...


def segment(
    fast: FusedFastSCNN | FastSCNN,
    picture: Picture | Several,
    size: Size | None = None,
    bits: int | None = None,
    confidence: bool = False,
    tile: Size | None = None,
    overlap: int | None = None,
    out: Labels | None = None,
) -> Any:
    """The class of every pixel of a picture, uint8 (H, W) at the picture's own size; of several, a list of these.

    Pictures of a list that the network takes at one size run in batches, with the same labels.

    A network of one class gives 1 where that is, and 0 for the background.

    Args:
        fast: the network; a :class:`FastSCNN` must be in eval mode and is fused at its first picture. It may be
            wrapped, by torch.compile or DataParallel: what is inside runs.
        picture: a path, a PIL image, the bytes of a picture's file, a file opened in binary mode, an array of
            uint8 or uint16 pixels (H, W) or (H, W, C), a tensor of them (C, H, W), or a list or tuple of all
            these, turned upright and brought to the network's channels as
            :func:`~fastscnn_fast.data.pictures.read_picture` says. Colours are RGB: OpenCV's frames, which
            are BGR, are ``frame[:, :, ::-1]``.
        size: (height, width) to run the network at, or the side of a square, by default :func:`run_size`; the
            labels come back by nearest neighbour.
        bits: how many bits a channel a picture stored in more than 8 uses, by default a guess by
            :func:`~fastscnn_fast.data.pictures.read_picture`, which warns of it.
        confidence: also return how probable the network takes each pixel's label to be, float32 (H, W) from 0
            to 1: a pair of labels and confidence for each picture. The network runs twice for it.
        tile: (height, width) of tiles, or the side of a square, at least 64, for pictures that are too large to be run
            at once: the network runs at the picture's own size, on one tile after the other, and their logits are
            blended where they overlap (:func:`~fastscnn_fast.runtime.tiles.bands` says how, and what is in
            memory). A tile is all that the network sees at a time, in its pooled features too. TIFFs are read by
            rows, with the extra ``tiff``.
        overlap: of neighbouring tiles, in pixels, at most about half a tile; by default
            :data:`~fastscnn_fast.runtime.tiles.OVERLAP`.
        out: uint8 (H, W), to be filled and returned instead of a new array: ``np.memmap``, for one picture that is
            larger than memory.

    Raises:
        TypeError: ``fast`` is no such network, a picture is nothing of these, ``size``, ``bits``, ``tile`` or
            ``overlap`` no integers, ``out`` no array.
        ValueError: a picture cannot be read or has no pixels, ``size`` is below 32 a side or has more than 2^30
            pixels, ``tile`` is below 64 a side or given with ``size``, ``overlap`` is too large or
            given without ``tile``, ``out`` is not as the labels
            are or given for several pictures, the model is in training mode or has more than 256 classes.
        RuntimeError: a tensor has lost its memory.
    """
    fast = check_model(fast)
    several = isinstance(picture, (list, tuple))
    pictures: Several = picture if isinstance(picture, (list, tuple)) else [picture]
    if out is not None:
        check_out(out)
        if several:
            raise ValueError("out must be None for a list of pictures, got an array")
    names = (f"picture[{index}]" if several else "picture" for index in range(len(pictures)))
    if tile is not None:
        if size is not None:
            raise ValueError(
                f"size must be None with tile, at whose size the network runs, got {size}"
            )
        cut = tiling(tile, overlap)
        tiled = [_tiled(fast, *one, bits, confidence, cut, out) for one in zip(pictures, names)]
        return tiled if several else tiled[0]
    if overlap is not None:
        raise ValueError(f"overlap must be None without tile, got {overlap!r}")
    results: list[Any] = [None] * len(pictures)
    read = (prepare(one, fast.config, size, bits, name) for one, name in zip(pictures, names))
    waiting = (_Waiting(index, one.pixels.shape, one.x) for index, one in enumerate(read))
    for batch in _batches(waiting):
        found = classify(fast, [one.x for one in batch], confidence)
        for (place, shape, _), classified in zip(batch, found):
            pair = classified.at(shape)
            results[place] = pair if confidence else pair[0]
    if out is not None:
        results[0] = (filled(out, pair[0]), pair[1]) if confidence else filled(out, pair[0])
    return results if several else results[0]


def check_out(out: object) -> None:
    """Refuses what cannot hold labels.

    Raises:
        TypeError: it is no uint8 array (H, W).
    """
    if isinstance(out, np.ndarray) and out.dtype == np.uint8 and out.ndim == 2:
        return
    kind = (
        f"{out.dtype} of shape {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
    )
    raise TypeError(f"out must be a uint8 array (H, W), got {kind}")


def filled(out: Labels, labels: Labels) -> Labels:
    """``out``, with ``labels`` in it.

    Raises:
        ValueError: it has another shape, or is not to be written to.
    """
    _check_fits(out, labels.shape)
    np.copyto(out, labels)
    return out


def _check_fits(out: Labels, shape: tuple[int, ...]) -> None:
    if out.shape != shape:
        raise ValueError(f"out must be {shape} like the picture, got {out.shape}")
    if not out.flags.writeable:
        raise ValueError("out must be an array that can be written to, got one that is read-only")


@serial()
def _tiled(
    fast: FusedFastSCNN | FastSCNN,
    picture: Picture,
    name: str,
    bits: int | None,
    confidence: bool,
    cut: Tiling,
    out: Labels | None,
) -> Any:
    with open_rows(picture, fast.config.in_channels, bits, name) as rows:
        size = (rows.height, rows.width)
        if out is not None:
            _check_fits(out, size)
        labels = np.empty(size, np.uint8) if out is None else out
        sure = np.empty(size, np.float32) if confidence else None
        for band in bands(fast, rows, cut, confidence):
            bottom = band.top + len(band.labels)
            labels[band.top : bottom] = band.labels
            if sure is not None:
                sure[band.top : bottom] = band.confidence
    return (labels, sure) if confidence else labels


class _Waiting(NamedTuple):
    """A picture of a list: its place there, the shape of its pixels, and itself as the network takes it."""

    place: int
    shape: tuple[int, ...]
    x: Tensor


def _batches(pictures: Iterable[_Waiting]) -> Iterator[list[_Waiting]]:
    """Those of one size together, as many as :func:`fits` says."""
    waiting: dict[torch.Size, list[_Waiting]] = {}
    held = 0
    for picture in pictures:
        held += picture.x.numel()
        group = waiting.setdefault(picture.x.shape, [])
        group.append(picture)
        done = [] if fits(len(group), picture.x) else [picture.x.shape]
        for shape in waiting.copy() if held > _MOST_WAITING else done:
            batch = waiting.pop(shape)
            held -= sum(one.x.numel() for one in batch)
            yield batch
    yield from waiting.values()


def fits(count: int, x: Tensor) -> bool:
    """Whether there is room for x (1, C, h, w) in a batch of ``count`` of its size."""
    return (count + 1) * x.shape[2] * x.shape[3] <= BATCH_PIXELS


class Prepared(NamedTuple):
    """A picture as the network takes it.

    Attributes:
        pixels: uint8 (H, W, C), RGB, the picture upright.
        x: uint8 (1, C, h, w), the same at the size to run at.
    """

    pixels: NDArray[np.uint8]
    x: Tensor


class Classified(NamedTuple):
    """What the network says of a picture, at the size that it ran at.

    Attributes:
        labels: uint8 (h, w).
        confidence: float32 (h, w), where it was asked for.
    """

    labels: Labels
    confidence: Confidence | None

    def at(self, shape: tuple[int, ...]) -> tuple[Labels, Confidence | None]:
        """Labels and confidence (H, W) at the size of pixels of ``shape`` (H, W, C), by nearest neighbour."""
        labels = nearest(self.labels, shape)
        return labels, None if self.confidence is None else nearest(self.confidence, shape)


# The three steps of a picture. The first and the last may run in any thread, beside the network: most of their
# time is spent without Python's lock.


def prepare(
    picture: Picture,
    config: Config,
    size: Size | None = None,
    bits: int | None = None,
    name: str = "picture",
    tell: Callable[[Guess], None] = Guess.tell,
) -> Prepared:
    """Reads a picture for :func:`classify`; arguments and errors are those of :func:`segment`.

    Errors call a picture without a name of its own ``name``, and ``tell`` hears of guessed bits.
    """
    run_at = None if size is None else picture_size(size)
    pixels = pixels_of(picture, config.in_channels, bits, name, tell)
    return Prepared(pixels, _tensor_of(pixels, config, run_at))


@dataclass(frozen=True)
class Transform:
    """Any picture that :func:`segment` takes -> uint8 (C, h, w), as the network takes it; for a DataLoader's workers too.

    Args:
        config: of the network.
        size: (height, width) or the side of a square, so that pictures of all sizes make batches; by default
            :func:`run_size`, a picture's own proportions.
        bits: as :func:`segment` has it.

    Calling it raises as :func:`segment`.

    Raises:
        TypeError: ``config`` is no :class:`Config`, ``size`` no size.
        ValueError: ``size`` is below 32 a side.
    """

    config: Config
    size: Size | None = None
    bits: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.config, Config):
            kind = type(self.config).__name__
            raise TypeError(f"config must be a network's config, as fast.config, got {kind}")
        if self.size is not None:
            picture_size(self.size)

    def __call__(self, picture: Picture) -> Tensor:
        return prepare(picture, self.config, self.size, self.bits).x[0]


@serial()
@torch.no_grad()
def classify(
    fast: FusedFastSCNN | FastSCNN, pictures: Sequence[Tensor], confidence: bool = False
) -> list[Classified]:
    """The network's labels of each of uint8 pixels (1, C, h, w) of one size, and how probable it takes them to be."""
    fused, x = fused_for(fast, pictures[0] if len(pictures) == 1 else torch.cat(list(pictures)))
    if fused is not None:
        labels = fused.labels(x)
        probabilities = fused.probabilities(x) if confidence else None
    else:
        assert isinstance(fast, FastSCNN)
        logits = fast.reference(x)
        labels = labels_of(logits).to(torch.uint8)
        probabilities = probabilities_of(logits) if confidence else None
    probable = None if probabilities is None else _of_labels(probabilities.float(), labels)
    sure = [None] * len(pictures) if probable is None else probable.cpu().numpy()
    return [Classified(*pair) for pair in zip(labels.cpu().numpy(), sure)]


def _of_labels(probabilities: Tensor, labels: Tensor) -> Tensor:
    """(N, K, h, w) at ``labels`` (N, h, w): (N, h, w). Of one class alone, label 0 is what is not that class."""
    if probabilities.shape[1] == 1:
        probabilities = torch.cat((1 - probabilities, probabilities), 1)
    return probabilities.gather(1, labels[:, None].long())[:, 0]


def labelled(
    labels: Callable[[Tensor], Tensor],
    config: Config,
    pixels: NDArray[np.uint8],
    size: tuple[int, int] | None = None,
) -> Labels:
    """``labels``, uint8 (1, C, h, w) -> (1, h, w), of pixels (H, W, C) as :func:`segment` has them."""
    return nearest(labels(_tensor_of(pixels, config, size))[0].cpu().numpy(), pixels.shape)


def run_size(pixels: NDArray[np.uint8], config: Config) -> tuple[int, int]:
    """The (height, width) to run the network at for pixels (H, W, C).

    The picture's own size, or, where the config says at which ``size`` the weights were trained, as many
    pixels as that in the picture's own proportions; sides below 32 become 32.
    """
    height, width = pixels.shape[:2]
    scale = 1.0
    if config.size is not None:
        scale = math.sqrt(config.size[0] * config.size[1] / (height * width))
    return max(round(height * scale), SMALLEST_SIDE), max(round(width * scale), SMALLEST_SIDE)


def _tensor_of(pixels: NDArray[np.uint8], config: Config, size: tuple[int, int] | None) -> Tensor:
    """Pixels (H, W, C) as the network takes them, (1, C, *size)."""
    x = torch.from_numpy(np.require(resized(pixels, size or run_size(pixels, config)), None, "W"))
    return x.permute(2, 0, 1)[None]


def nearest(values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """(h, w) at the size of pixels of ``shape`` (H, W, C)."""
    height, width = shape[:2]
    if values.shape == (height, width):
        return values
    return np.array(Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST))
