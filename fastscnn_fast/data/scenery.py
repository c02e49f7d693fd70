"""Examples changed by other examples and by weather, so that a network learns streets it has not seen.

Everything works on whole pictures, uint8 (H, W, 3), with labels, uint8 (H, W), returns new arrays, and
follows from its arguments and the state of ``rng`` alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Pixels = NDArray[np.uint8]
Labelled = tuple[Pixels, Pixels]


class Pictures(Protocol):
    """Pictures with their labels, by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Labelled: ...


@dataclass(frozen=True)
class Scenery:
    """What is done to a picture and its labels before a view of them is taken.

    Args:
        others: where :func:`mixed` takes the second picture from.
        pieces: what is pasted.
        styles: the colours that pictures can be given.
        mix: probability that half of the classes of another picture are laid over this one.
        paste: pieces pasted into a picture, on average.
        style: probability that a picture is given another's colours.
        weather: 0 to 1, scales the probabilities of shadows, haze, rain and lost colours.
    """

    others: Pictures
    pieces: Pieces
    styles: Styles
    mix: float = 0.0
    paste: float = 0.0
    style: float = 0.0
    weather: float = 0.0

    def __call__(self, picture: Pixels, labels: Pixels, rng: np.random.Generator) -> Labelled:
        """The changed picture and its labels; neither has another shape than before."""
        if rng.random() < self.mix:
            other = self.others[int(rng.integers(len(self.others)))]
            picture, labels = mixed(picture, labels, other, rng)
        if self.paste:
            picture, labels = self.pieces.pasted(picture, labels, int(rng.poisson(self.paste)), rng)
        if rng.random() < self.style:
            picture = self.styles.applied(picture, rng)
        for change, probability in _WEATHER:
            if rng.random() < probability * self.weather:
                picture = change(picture, rng)
        return picture, labels


# --- other pictures' classes -----------------------------------------------------------------------------


def mixed(picture: Pixels, labels: Pixels, other: Labelled, rng: np.random.Generator) -> Labelled:
    """The picture with half of the labels that ``other`` has laid over it, where they are there (ClassMix).

    Half of the time ``other`` is mirrored; where it has another size, it is resized to this picture's.
    """
    size = labels.shape[::-1]
    above = Image.fromarray(other[0]), Image.fromarray(other[1])
    if above[0].size != size:
        above = (
            above[0].resize(size, Image.Resampling.BILINEAR),
            above[1].resize(size, Image.Resampling.NEAREST),
        )
    step = -1 if rng.random() < 0.5 else 1
    pixels, ids = (np.asarray(image)[:, ::step] for image in above)
    present = np.flatnonzero(np.bincount(ids.ravel(), minlength=256))
    chosen = np.zeros(256, np.bool_)
    chosen[rng.permutation(present)[: (len(present) + 1) // 2]] = True
    here = chosen[ids]
    return np.where(here[..., None], pixels, picture), np.where(here, ids, labels)


# --- pieces of rare classes ------------------------------------------------------------------------------

_HORIZON = 0.5  # share of a picture's height: what comes nearer grows away from there
_NEARER = (0.6, 1.6)
_LEAST_AREA, _MOST_HEIGHT, _MOST_WIDTH = 2e-4, 0.8, 0.4  # of pieces, as shares of their picture
_PIECES_MEMORY = 2**28


@dataclass(frozen=True)
class Piece:
    """A connected part of a picture whose classes are all rare.

    Attributes:
        picture: uint8 (h, w, 3), the box around it.
        labels: uint8 (h, w).
        mask: uint8 (h, w), 255 where the piece is and 0 beside it.
        top, height: the box's, as shares of the whole picture's height.
        width: the box's, as a share of the whole picture's height as well.
        foot: column of its lowest row's middle, as a share of the box's width.
        ground: label of the pixel below its foot.
    """

    picture: Pixels
    labels: Pixels
    mask: Pixels
    top: float
    height: float
    width: float
    foot: float
    ground: int


class Pieces:
    """Things of rare classes, cut from pictures to be pasted into others.

    Args:
        examples: where they are cut from, in random order until they fill ``memory`` bytes.
        rare: the classes; what touches is cut as one piece, a sign with its pole.
        seed: of the order.
    """

    def __init__(
        self, examples: Pictures, rare: Sequence[int], seed: int = 0, memory: int = _PIECES_MEMORY
    ) -> None:
        table = np.zeros(256, np.bool_)
        table[list(rare)] = True
        by_class: dict[int, list[Piece]] = {}
        for index in np.random.default_rng((seed, 6)).permutation(len(examples)):
            for piece in _cut(*examples[int(index)], table):
                main = int(np.bincount(piece.labels[piece.mask > 0]).argmax())
                by_class.setdefault(main, []).append(piece)
                memory -= piece.picture.nbytes + piece.labels.nbytes + piece.mask.nbytes
            if memory < 0:
                break
        self.by_class = [by_class[k] for k in sorted(by_class)]

    def pasted(
        self, picture: Pixels, labels: Pixels, count: int, rng: np.random.Generator
    ) -> Labelled:
        """The picture with ``count`` pieces at most, of one class as often as of another."""
        canvas, truth = Image.fromarray(picture), labels.copy()
        for _ in range(count if self.by_class else 0):
            kind = self.by_class[int(rng.integers(len(self.by_class)))]
            _paste(kind[int(rng.integers(len(kind)))], canvas, truth, rng)
        return np.array(canvas), truth


def _cut(picture: Pixels, labels: Pixels, rare: NDArray[np.bool_]) -> Iterator[Piece]:
    """The pieces of a picture that are neither too small, nor too large, nor cut off by its border."""
    height, width = labels.shape
    ids, boxes = components(rare[labels])
    for index, (top, bottom, left, right) in enumerate(boxes.tolist(), 1):
        box = slice(top, bottom), slice(left, right)
        mask = ids[box] == index
        if (
            mask.sum() < _LEAST_AREA * height * width
            or bottom - top > _MOST_HEIGHT * height
            or right - left > _MOST_WIDTH * width
            or bottom == height
            or left == 0
            or right == width
        ):
            continue
        foot = int(np.median(np.flatnonzero(mask[-1])))
        yield Piece(
            picture[box].copy(),
            labels[box].copy(),
            mask.astype(np.uint8) * 255,
            top / height,
            (bottom - top) / height,
            (right - left) / height,
            (foot + 0.5) / (right - left),
            int(labels[bottom, left + foot]),
        )


def _paste(piece: Piece, canvas: Image.Image, truth: Pixels, rng: np.random.Generator) -> None:
    """Pastes in place, nearer or farther than it was, where its foot has the ground that it had."""
    height, width = truth.shape
    near = math.exp(rng.uniform(*np.log(_NEARER)))
    mirrored = rng.random() < 0.5
    top = round(height * (_HORIZON + near * (piece.top - _HORIZON)))
    rows, columns = (max(1, round(height * near * side)) for side in (piece.height, piece.width))
    if not 0 < top + rows < height:
        return
    feet = np.flatnonzero(truth[top + rows] == piece.ground)
    if not len(feet):
        return
    foot = 1 - piece.foot if mirrored else piece.foot
    left = int(rng.choice(feet)) - int(columns * foot)

    def fitted(pixels: Pixels, how: Image.Resampling) -> Image.Image:
        image = Image.fromarray(pixels).resize((columns, rows), how)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image

    alpha = fitted(piece.mask, Image.Resampling.BILINEAR)
    canvas.paste(fitted(piece.picture, Image.Resampling.BILINEAR), (left, top), alpha)
    inside = (
        slice(max(0, top), top + rows),
        slice(max(0, left), max(0, min(width, left + columns))),
    )
    part = tuple(slice(s.start - first, s.stop - first) for s, first in zip(inside, (top, left)))
    ids = np.asarray(fitted(piece.labels, Image.Resampling.NEAREST))[part]
    np.copyto(truth[inside], ids, where=np.asarray(alpha)[part] >= 128)


def components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The connected parts of a mask (H, W); corners connect.

    Returns:
        int32 (H, W), the number of each pixel's part from 1 on, 0 where there is none; and the parts' boxes,
        int64 (parts, 4): top, bottom, left, right, bottom and right exclusive.
    """
    height, width = mask.shape
    edges = np.diff(mask.astype(np.int8), axis=1, prepend=0, append=0)
    rows, starts = np.nonzero(edges == 1)
    stops = np.nonzero(edges == -1)[1]
    # Runs of pixels touch those of the row above from the first that ends late enough to the last that
    # begins early enough; positions count through all rows, with a gap between them.
    stride = width + 2
    first = np.searchsorted(rows * stride + stops, (rows - 1) * stride + starts)
    last = np.searchsorted(rows * stride + starts, (rows - 1) * stride + stops, "right")
    touching = np.maximum(last - first, 0)
    below = np.repeat(np.arange(len(rows)), touching)
    above = np.arange(len(below)) - np.repeat(np.cumsum(touching) - touching - first, touching)
    # The least number of all connected runs spreads until nothing changes.
    part = np.arange(len(rows))
    while not np.array_equal(part[below], part[above]):
        least = np.minimum(part[below], part[above])
        np.minimum.at(part, part[below], least)
        np.minimum.at(part, part[above], least)
        part = part[part]
    part = np.unique(part, return_inverse=True)[1].reshape(-1)

    count = int(part.max(initial=-1)) + 1
    boxes = np.tile(np.array([height, 0, width, 0]), (count, 1))
    np.minimum.at(boxes[:, 0], part, rows)
    np.maximum.at(boxes[:, 1], part, rows + 1)
    np.minimum.at(boxes[:, 2], part, starts)
    np.maximum.at(boxes[:, 3], part, stops)
    ids = np.zeros((height, width + 1), np.int32)
    ids[rows, starts] = part + 1
    ids[rows, stops] = -(part + 1)
    return ids.cumsum(1, dtype=np.int32)[:, :width], boxes


# --- other pictures' colours -----------------------------------------------------------------------------

# Brightness, blue against yellow, red against green: nearly uncorrelated in pictures of the world.
_OPPONENTS = np.array([[1, 1, 1], [-1, -1, 2], [1, -1, 0]]) / np.sqrt([[3.0], [6.0], [2.0]])
_LEAST_SPREAD, _MOST_GAIN, _MOST_STYLES = 2.0, 3.0, 1000


class Styles:
    """The colours of pictures: mean and standard deviation of each of three opponent channels.

    Args:
        sources: where the pictures are, at most 1000 of each, evenly spread.

    Attributes:
        statistics: float64 (pictures, 2, 3), means and deviations.
    """

    def __init__(self, *sources: Pictures) -> None:
        self.statistics = np.array(
            [
                _statistics(source[index][0])
                for source in sources
                for index in range(0, len(source), -(-len(source) // _MOST_STYLES) or 1)
            ]
        )

    def applied(self, picture: Pixels, rng: np.random.Generator) -> Pixels:
        """The picture with its statistics moved, by a random share, towards those of another."""
        target = self.statistics[int(rng.integers(len(self.statistics)))]
        share = rng.uniform(0.3, 1)
        (mean, spread), (other_mean, other_spread) = _statistics(picture), target
        gain = np.clip(other_spread / spread, 1 / _MOST_GAIN, _MOST_GAIN) ** share
        matrix = _OPPONENTS.T @ np.diag(gain) @ _OPPONENTS
        offset = _OPPONENTS.T @ (mean + share * (other_mean - mean) - gain * mean)
        rows = np.concatenate([matrix, offset[:, None]], 1)
        return np.array(Image.fromarray(picture).convert("RGB", tuple(rows.ravel().tolist())))


def _statistics(picture: Pixels) -> NDArray[np.float64]:
    channels = picture[::4, ::4].reshape(-1, 3) @ _OPPONENTS.T
    return np.stack([channels.mean(0), np.maximum(channels.std(0), _LEAST_SPREAD)])


# --- weather ---------------------------------------------------------------------------------------------

_COARSE = 4  # soft things are drawn this much smaller


def shadow(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """One to three soft-edged polygons in the shade, which is a little bluer than the light."""
    height, width = (-(-side // _COARSE) for side in picture.shape[:2])
    shade = Image.new("L", (width, height), 255)
    ink = ImageDraw.Draw(shade)
    for _ in range(int(rng.integers(1, 4))):
        middle = rng.uniform((0, 0), (width, height))
        turns = np.sort(rng.uniform(0, 2 * math.pi, int(rng.integers(3, 7))))
        reach = rng.uniform(0.1, 0.7, (len(turns), 1)) * (width, height)
        corners = middle + reach * np.stack([np.cos(turns), np.sin(turns)], 1)
        ink.polygon([(x, y) for x, y in corners.tolist()], fill=int(rng.integers(90, 210)))
    shade = shade.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 3)))
    shade = shade.resize(picture.shape[1::-1], Image.Resampling.BILINEAR)
    bluer = shade.point([round(v + 0.12 * (255 - v)) for v in range(256)])
    return np.array(
        ImageChops.multiply(Image.fromarray(picture), Image.merge("RGB", (shade, shade, bluer)))
    )


def haze(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Light grey over the picture, thickest at the horizon, where things are farthest."""
    height, width = picture.shape[:2]
    rows = (np.arange(height) + 0.5) / height
    depth = np.exp(-np.abs(rows - _HORIZON - rng.uniform(-0.1, 0.1)) / rng.uniform(0.1, 0.5))
    thick = np.rint(255 * rng.uniform(0.15, 0.65) * depth).astype(np.uint8)
    mask = Image.fromarray(np.ascontiguousarray(np.broadcast_to(thick[:, None], (height, width))))
    return _veiled(picture, mask, rng)


def rain(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Bright streaks, all leaning the same way, over a picture that has lost contrast."""
    height, width = picture.shape[:2]
    mask = Image.new("L", (width, height), int(rng.integers(20, 70)))
    ink = ImageDraw.Draw(mask)
    lean, length = rng.uniform(-0.3, 0.3), rng.uniform(0.02, 0.08) * height
    count = int(rng.integers(50, 400))
    for x, y, size, light in rng.uniform((0, 0, 0.5, 70), (width, height, 1, 150), (count, 4)):
        ink.line((x, y, x + lean * size * length, y + size * length), fill=int(light))
    return _veiled(picture, mask.filter(ImageFilter.BoxBlur(0.5)), rng)


def grey(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """The picture without colours, or with few left."""
    image = Image.fromarray(picture)
    return np.array(Image.blend(image.convert("L").convert("RGB"), image, rng.uniform(0, 0.3)))


def _veiled(picture: Pixels, mask: Image.Image, rng: np.random.Generator) -> Pixels:
    """A light, nearly grey colour laid over the picture as thick as the mask says."""
    light = rng.uniform(150, 235) + rng.uniform(-8, 8, 3)
    veil = Image.new("RGB", mask.size, (round(light[0]), round(light[1]), round(light[2])))
    return np.array(Image.composite(veil, Image.fromarray(picture), mask))


_WEATHER = ((shadow, 0.5), (haze, 0.25), (rain, 0.15), (grey, 0.15))
