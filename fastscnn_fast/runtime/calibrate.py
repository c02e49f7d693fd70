"""The ranges of a network's values, measured on pictures: what int8 must know."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from math import ceil, inf, log2
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..arch import structure
from ..arch.config import SMALLEST_SIDE, Config, Size, picture_size
from ..arch.network import PlainFastSCNN, Ranges, normalise
from ..data.jobs import find
from ..lower.fold import FoldedWeights, fold
from ..lower.quantise import LEVELS, MOST_RANGE, quantise, value_names
from ..program import reference
from ..program.memory import check_memory
from .forked import serial
from .segment import prepare

#: The share of values that are not zero which ``percentile`` leaves out at each end.
_TAIL = 5e-5
_BINS = 4096  # of a histogram, on each side of zero
_CHUNK = 1 << 22  # values counted at a time: torch counts them in floats
#: Fractions of the largest value that ``least-squares`` tries: down to 1/32 in steps of 4 %.
_FRACTIONS = 2.0 ** (-torch.arange(81, dtype=torch.float64) / 16)


class Histogram:
    """How often each size of value occurred, in bins that widen with the largest; its memory is bounded.

    Attributes:
        low: the least value.
        high: the largest.
    """

    def __init__(self) -> None:
        self.low, self.high = inf, -inf
        self._counts = torch.zeros(2 * _BINS, dtype=torch.float64)
        self._reach = 0.0  # the bins are from -reach to reach, a power of two

    def add(self, values: Tensor) -> None:
        """Counts ``values``, of any shape.

        Raises:
            ValueError: one is not finite, or beyond what a range may be.
        """
        low, high = map(float, values.aminmax())
        most = max(-low, high)
        if not most <= MOST_RANGE:
            raise ValueError(f"must be from {-MOST_RANGE:g} to {MOST_RANGE:g}, got {low} to {high}")
        self.low, self.high = min(self.low, low), max(self.high, high)
        if most > 0 and self._reach == 0:
            self._reach = 2.0 ** ceil(log2(most))
        while self._reach < most:
            pairs = self._counts.view(-1, 2).sum(1)
            self._counts.zero_()[_BINS // 2 : -_BINS // 2] = pairs
            self._reach *= 2
        if self._reach == 0:
            return
        for part in values.reshape(-1).float().split(_CHUNK):
            self._counts += torch.histc(part, 2 * _BINS, -self._reach, self._reach).cpu()

    def _points(self) -> tuple[Tensor, Tensor]:
        """The middles of the bins that hold something, and how much; zero, which is exact in 8 bits, is left out."""
        width = self._reach / _BINS
        middles = (torch.arange(2 * _BINS, dtype=torch.float64) - _BINS + 0.5) * width
        there = self._counts > 0
        there[_BINS] = False  # from zero on
        return middles[there], self._counts[there]

    def extremes(self) -> tuple[float, float]:
        """The least and the largest value."""
        return self.low, self.high

    def percentile(self) -> tuple[float, float]:
        """What all but 0.005 % of the values at each end lie between; zeros do not count."""
        points, counts = self._points()
        if not len(points):
            return self.extremes()
        below = counts.cumsum(0) / counts.sum()
        low = points[int((below > _TAIL).nonzero()[0])]
        high = points[int((below >= 1 - _TAIL).nonzero()[0])]
        return max(float(low), self.low), min(float(high), self.high)

    def least_squares(self) -> tuple[float, float]:
        """The range whose 256 levels are nearest to the values, by the mean of squared errors.

        What is cut off errs by its distance; what rounds to zero by itself; all else as if it were anywhere
        between two levels.
        """
        points, counts = self._points()
        sums = [F.pad((counts * points**power).cumsum(0), (1, 0)) for power in (0, 1, 2)]

        def beyond(end: Tensor, first: Tensor | int, last: Tensor | int) -> Tensor:
            n, x, xx = (total[last] - total[first] for total in sums)
            return xx - 2 * end * x + end**2 * n

        def errors(low: Tensor, high: Tensor) -> Tensor:
            step = (high - low) / LEVELS
            below, above = torch.searchsorted(points, low), torch.searchsorted(points, high)
            zero, to = (torch.searchsorted(points, end * step / 2) for end in (-1, 1))
            between = sums[0][above] - sums[0][below] - (sums[0][to] - sums[0][zero])
            cut = beyond(low, 0, below) + beyond(high, above, -1)
            return cut + beyond(0 * step, zero, to) + between.clamp(min=0) * step**2 / 12

        ends = torch.tensor([min(self.low, 0.0), max(self.high, 0.0)], dtype=torch.float64)
        low, high = ends
        for _ in range(2 if low < 0 else 1):  # one end after the other
            tried = ends[1] * _FRACTIONS
            high = tried[errors(low.repeat(len(tried)), tried).argmin()]
            if low < 0:
                tried = ends[0] * _FRACTIONS
                low = tried[errors(tried, high.repeat(len(tried))).argmin()]
        return float(low), float(high)


#: By name, the default first: what becomes of a value's histogram.
METHODS: dict[str, Callable[[Histogram], tuple[float, float]]] = {
    "least-squares": Histogram.least_squares,
    "min-max": Histogram.extremes,
    "percentile": Histogram.percentile,
}


@serial()
def calibrate(
    model: PlainFastSCNN,
    pictures: Any,
    method: str = "least-squares",
    size: Size | None = None,
    bits: int | None = None,
) -> Ranges:
    """Measures the ranges of the network's values on pictures, and keeps them as ``model.ranges``.

    ``fuse(model, dtype=torch.int8)`` needs them. They travel with copies, pickles and checkpoints of the model, and
    are dropped as soon as it trains or loads a state_dict. A dozen pictures such as the network will see are enough,
    labels are not needed.

    Args:
        model: a FastSCNN in eval mode, on any device. Its folded copy in float32 runs, in plain torch.
        pictures: a path, a PIL image, pixels (H, W) or (H, W, C), or whatever else :func:`segment` takes, at the
            size that it runs them at; a folder of pictures, with its subfolders; a tensor (C, H, W) or
            (N, C, H, W), normalised floats or raw uint8, which runs as it is; or an iterable of these, also
            one that can be gone through once. Of a tuple or list in it whose first is a batch, as data loaders yield
            them with labels, the first counts.
        method: "least-squares": the range whose 256 levels are nearest to the values, which may cut off a few;
            "min-max": from the least to the largest; "percentile": all but 0.005 % of the values at each end.
        size: (height, width) to run pictures at, or the side of a square, as in :func:`segment`; tensors run as they are.
        bits: of pictures of more than 8 a channel, as in :func:`segment`.

    Returns:
        The least and the largest value of each tensor that has 8 bits in int8, by name.

    Raises:
        TypeError: not a FastSCNN, or something that is no picture.
        ValueError: no pictures, one that cannot be read, a tensor of another shape, an unknown method, a model in
            training mode, or one whose values are not finite; or a network that int8 cannot compute
            (:class:`fastscnn_fast.arch.structure.Unfusable`). ``model.ranges`` is then what it was.
        RuntimeError: a tensor has lost its memory.
    """
    if not isinstance(model, PlainFastSCNN):
        raise TypeError(f"model must be a fastscnn_fast.FastSCNN, got {type(model).__name__}")
    if model.training:
        raise ValueError(
            "model must be in eval mode (model.eval()) to be calibrated, got one in training mode"
        )
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    run_at = None if size is None else picture_size(size)
    structure.check(model)
    folded = fold(model)
    inputs = _Inputs(model.config, run_at, bits)
    found = _measure(folded, inputs.of(pictures), model.classifier.conv.weight.device)
    ranges: dict[str, tuple[float, float]] = {}
    for name, histogram in found.items():
        low, high = METHODS[method](histogram)
        # What was always zero may have any scale: the sums before it must fit.
        ranges[name] = (low, high) if high > low or low != 0 else (0.0, 1.0)
    quantise(replace(folded, ranges=ranges))
    model.ranges = ranges
    return ranges


@torch.no_grad()
def _measure(
    folded: FoldedWeights, inputs: Iterator[Tensor], device: torch.device
) -> dict[str, Histogram]:
    """The histograms of all values, by name, over normalised pictures (1, C, H, W)."""
    tensors = [
        {name: tensor.to(device, torch.float32) for name, tensor in named.items()}
        for named in folded.tensors
    ]
    found = {name: Histogram() for name in value_names(folded.program)}

    def count(name: str, value: Tensor) -> Tensor:
        try:
            found[name].add(value)
        except ValueError as error:
            raise ValueError(f"values of {name} {error}") from None
        return value

    seen = 0
    with torch.autocast(device.type, enabled=False):
        for x in inputs:
            x = x.to(device, torch.float32, memory_format=torch.channels_last)
            x = _as_pixels(x, folded.config)
            reference.network(x, folded.program, tensors, tap=count)
            seen += 1
    if not seen:
        raise ValueError("pictures must be at least one, got none")
    return found


def _as_pixels(x: Tensor, config: Config) -> Tensor:
    """Normalised floats as int8 sees them, whose stem clamps them to pixels.

    Raises:
        ValueError: more than a tenth of them are no pixels: they are not normalised.
    """
    mean, std = (255 * x.new_tensor(v)[:, None, None] for v in (config.mean, config.std))
    pixels = x * std + mean
    clamped = pixels.clamp(0, 255)
    outside = float(((pixels - clamped).abs() > 1).double().mean())
    if outside > 0.1:
        raise ValueError(
            "pictures of floats must be normalised by the model's mean and std (or be uint8 pixels), got floats of which"
            f" {outside:.0%} are no pixels"
        )
    return (clamped - mean) / std


class _Inputs:
    """From whatever holds pictures to what the network is given, one picture (1, C, H, W) at a time."""

    def __init__(self, config: Config, size: tuple[int, int] | None, bits: int | None) -> None:
        self.config, self.size, self.bits = config, size, bits

    def of(self, pictures: Any) -> Iterator[Tensor]:
        """With a progress bar."""
        items: Iterable[Any] = [pictures]
        _check_memory(pictures)
        if _is_folder(pictures):
            items = _folder(Path(pictures))
        elif isinstance(pictures, (np.ndarray, Tensor)) and pictures.ndim == 4:
            items = pictures
        elif not isinstance(pictures, Tensor) and not _is_picture(pictures):
            if not isinstance(pictures, Iterable):
                raise TypeError(_rule(pictures))
            items = pictures
        for item in tqdm(items, "calibrating", unit="picture", leave=False, delay=1):
            yield from self._item(item)

    def _item(self, item: Any) -> Iterator[Tensor]:
        """One of an iterable: a picture, or several."""
        if isinstance(item, (tuple, list)) and item and _is_batch(item[0]):
            item = item[0]
        _check_memory(item)
        if _is_folder(item):
            yield from map(self._picture, _folder(Path(item)))
        elif isinstance(item, Tensor):
            yield from map(self._tensor, item if item.dim() == 4 else [item])
        elif isinstance(item, np.ndarray) and item.ndim == 4:
            yield from map(self._picture, item)
        elif _is_picture(item):
            yield self._picture(item)
        else:
            raise TypeError(_rule(item))

    def _picture(self, picture: Any) -> Tensor:
        return self._tensor(prepare(picture, self.config, self.size, self.bits).x[0])

    def _tensor(self, x: Tensor) -> Tensor:
        channels = self.config.in_channels
        if x.dim() != 3 or x.shape[0] != channels or min(x.shape[1:]) < SMALLEST_SIDE:
            raise ValueError(
                f"pictures in a tensor must be ({channels}, H, W) or (N, {channels}, H, W) from"
                f" {SMALLEST_SIDE}x{SMALLEST_SIDE} up, got shape {tuple(x.shape)}"
            )
        if x.dtype == torch.uint8:
            return normalise(x[None], self.config, torch.float32)
        if not x.is_floating_point():
            raise TypeError(
                f"pictures in a tensor must be normalised floats or raw torch.uint8, got {x.dtype}"
            )
        return x[None]


def _check_memory(value: Any) -> None:
    """Of a tensor, before it is taken apart."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.device.type == "meta":
            raise ValueError(
                f"picture must be a tensor with pixels, got {value.layout} on {value.device}"
            )
        check_memory("picture", value)


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4


def _is_folder(value: Any) -> bool:
    # The empty path is no folder, though pathlib takes it for the current one.
    return isinstance(value, (str, os.PathLike)) and value != "" and os.path.isdir(value)


def _is_picture(value: Any) -> bool:
    """Whether :func:`segment` takes it for one."""
    kinds = (str, os.PathLike, bytes, bytearray, memoryview, np.ndarray, Image.Image)
    return isinstance(value, kinds) or hasattr(value, "read")


def _folder(folder: Path) -> list[Path]:
    """Its pictures.

    Raises:
        ValueError: it has none, or labels too, or what looks like a picture and is none.
    """
    labels = [path for name in ("labels", "gtFine") for path in folder.rglob(name) if path.is_dir()]
    if labels:
        raise ValueError(
            f"pictures must be a folder of pictures alone, {folder} has labels too ({labels[0]}):"
            " name the folder of the pictures in it"
        )
    found = find([str(folder)])
    if found.problems:
        raise ValueError(f"pictures cannot all be read: {'; '.join(found.problems[:5])}")
    return [job.path for job in found.jobs]


def _rule(value: Any) -> str:
    return (
        "pictures must be paths, folders, PIL images, uint8 arrays, tensors, or an iterable of these,"
        f" got {type(value).__name__}"
    )
