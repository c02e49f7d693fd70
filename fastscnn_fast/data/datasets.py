"""Pictures with labels to train and evaluate on: where they come from, checks, augmentation, batches."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFilter
from torch import Tensor

from ..runtime.segment import PICTURE_SUFFIXES, read_picture
from .classes import CAMVID_CLASSES, CAMVID_IGNORE, CITYSCAPES_CLASSES, class_names, street

Pixels = NDArray[np.uint8]

_SHOWN = 20
IGNORE = 255
STREETS = "streets"
# The first seed and the usual count of each split.
_STREETS_OF = {"train": (0, 1000), "val": (1_000_000, 100)}

#: Cityscapes' labelIds -> its 19 train ids; everything else is ignored.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CITYSCAPES_LAST = 33


class DataError(ValueError):
    """What is wrong with a data set, one line per file."""


class Example(NamedTuple):
    """A picture, uint8 (H, W, 3), and its labels, uint8 (H, W)."""

    picture: Pixels
    labels: Pixels


class Source(Protocol):
    """Where examples come from. ``read`` raises ValueError or OSError for a damaged example."""

    classes: tuple[str, ...]
    ignore: int

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def read(self, index: int) -> Example: ...


class Files:
    """Pairs of files: a picture and its labels."""

    def __init__(
        self,
        pairs: Sequence[tuple[Path, Path]],
        classes: tuple[str, ...],
        ignore: int = IGNORE,
        table: Pixels | None = None,
    ) -> None:
        """``table`` (256,) replaces the labels in the files; what it maps to no class is ``ignore``."""
        self.pairs, self.classes, self.ignore, self.table = list(pairs), classes, ignore, table

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return str(self.pairs[index][0])

    def read(self, index: int) -> Example:
        picture, labels = self.pairs[index]
        pixels = _read_upright(picture)
        ids = _read_labels(labels)
        if ids.shape != pixels.shape[:2]:
            raise ValueError(
                f"{labels}: is {ids.shape[0]}x{ids.shape[1]}, its picture {picture} is "
                f"{pixels.shape[0]}x{pixels.shape[1]}"
            )
        if self.table is not None:
            _check_ids(ids, range(_CITYSCAPES_LAST + 1), IGNORE, str(labels))
            ids = self.table[ids]
        _check_ids(ids, range(len(self.classes)), self.ignore, str(labels))
        return Example(pixels, ids)


class Streets:
    """``count`` procedural street scenes with CamVid's classes, drawn from ``seed`` on."""

    classes: tuple[str, ...] = CAMVID_CLASSES

    def __init__(
        self,
        count: int,
        seed: int = 0,
        size: tuple[int, int] = (360, 480),
        ignore: int = CAMVID_IGNORE,
    ) -> None:
        self.count, self.seed, self.size, self.ignore = count, seed, size, ignore

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"street {self.seed + index}"

    def read(self, index: int) -> Example:
        picture, labels = street(self.seed + index, *self.size)
        labels[labels == CAMVID_IGNORE] = self.ignore
        return Example(picture, labels)


def _read_upright(path: Path) -> Pixels:
    pixels = read_picture(path)
    with Image.open(path) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1)
    if turned != 1:  # its labels have no such tag
        rule = "a picture with labels must be stored upright"
        raise ValueError(f"{path}: {rule}, got EXIF orientation {turned}")
    return pixels


def _read_labels(path: Path) -> Pixels:
    try:
        with Image.open(path) as image:
            raw = [part for tile in image.tile for part in np.atleast_1d(tile[3]).tolist()]
            image.load()
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        raise ValueError(f"{path}: cannot be read: {error}") from error
    rule = "labels must be 8-bit class ids in one channel"
    if image.mode not in ("L", "P"):
        raise ValueError(f"{path}: {rule}, got an image of mode {image.mode}")
    packed = [mode for mode in raw if str(mode).startswith("L;")]
    if packed:  # Pillow spreads fewer bits over 0 to 255
        raise ValueError(f"{path}: {rule}, got an image of raw mode {packed[0]}")
    return np.array(image)


def _check_ids(labels: Pixels, known: range, ignore: int, name: str) -> None:
    counts = np.bincount(labels.ravel(), minlength=256)
    counts[known.start : known.stop] = 0
    if 0 <= ignore < 256:
        counts[ignore] = 0
    if counts.any():
        label = int(counts.argmax())
        y, x = np.argwhere(labels == label)[0]
        raise ValueError(
            f"{name}: label id {label} (row {y}, column {x}) is neither a class, "
            f"0 to {known.stop - 1}, nor the ignored id {ignore}"
        )


def open_source(
    root: str | os.PathLike[str],
    split: str,
    num_classes: int | None = None,
    ignore: int | None = None,
) -> Source:
    """The examples of one split of a data set.

    ``root`` is a folder with ``<split>/images`` and ``<split>/labels`` (the same names, any suffix) whose
    class names are the lines of ``classes.txt`` or numbers 0 to ``num_classes - 1``; or Cityscapes' own
    folder (``leftImg8bit`` and ``gtFine``); or "streets", the procedural ones ("streets:500" for 500).

    The latter two have their own classes and ignored ids: ``num_classes`` and ``ignore`` must be None.

    Raises:
        DataError: no such folder, an empty one, pictures without labels or the reverse, a wrong argument.
    """
    kind, _, count = os.fspath(root).partition(":")
    root = Path(root)
    own = kind == STREETS or (root / "leftImg8bit").is_dir()
    for name, value in (("--classes", num_classes), ("--ignore", ignore)):
        if own and value is not None:
            raise DataError(f"{name} must be left out: {root} has its own, got {value}")
    if kind == STREETS:
        if count and not (count.isdecimal() and int(count) > 0):
            raise DataError(f"streets must be followed by a number above 0, got {str(root)!r}")
        if split not in _STREETS_OF:
            raise DataError(f"split of streets must be train or val, got {split!r}")
        first, usual = _STREETS_OF[split]
        return Streets(int(count or usual), first)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    if own:
        return _cityscapes(root, split)
    return _folder(root, split, num_classes, IGNORE if ignore is None else ignore)


def _folder(root: Path, split: str, num_classes: int | None, ignore: int) -> Files:
    names = root / "classes.txt"
    if names.is_file():
        classes = _read_names(names)
        if num_classes not in (None, len(classes)):
            raise DataError(f"{names}: names {len(classes)} classes, --classes says {num_classes}")
    elif num_classes is not None:
        classes = class_names(num_classes)[0]
    else:
        raise DataError(f"{names}: missing; name the classes there, one a line, or give --classes")
    if not 1 <= len(classes) <= 255:
        raise DataError(f"{root}: must have 1 to 255 classes, got {len(classes)}")
    if not len(classes) <= ignore <= 255:
        raise DataError(f"--ignore must be {len(classes)} to 255, beyond the classes, got {ignore}")
    folder = root / split
    pictures, labels = _by_name(folder / "images"), _by_name(folder / "labels")
    return Files(_paired(folder, pictures, labels), classes, ignore)


def _read_names(path: Path) -> tuple[str, ...]:
    """A class name a line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: must be text in UTF-8: {error}") from None
    names = [line.strip() for line in lines]
    for number, name in enumerate(names, 1):
        if not name or name in names[: number - 1]:
            problem = "repeats " + repr(name) if name else "is empty"
            raise DataError(f"{path}: each line must name another class, line {number} {problem}")
    return tuple(names)


def _by_name(folder: Path, ending: str = "") -> dict[str, Path]:
    """Image files below ``folder`` by their path without suffix and ``ending``."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (is the split called otherwise?)")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder).with_suffix(""))
        known = path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")
        if known and name.endswith(ending):
            name = name.removesuffix(ending)
            if name in found:
                raise DataError(f"{path}: has the same name as {found[name]}")
            found[name] = path
    return found


def _paired(
    folder: Path, pictures: dict[str, Path], labels: dict[str, Path]
) -> list[tuple[Path, Path]]:
    if not pictures and not labels:
        raise DataError(f"{folder}: holds no pictures")
    problems = [f"{pictures[n]}: has no labels" for n in pictures if n not in labels]
    problems += [f"{labels[n]}: has no picture" for n in labels if n not in pictures]
    _raise_if_any(problems)
    return [(pictures[name], labels[name]) for name in sorted(pictures)]


def _raise_if_any(problems: Sequence[str]) -> None:
    if problems:
        more = len(problems) - _SHOWN
        tail = [f"... and {more} more"] if more > 0 else []
        raise DataError("\n".join([*problems[:_SHOWN], *tail]))


def _cityscapes(root: Path, split: str) -> Files:
    table = np.full(256, IGNORE, np.uint8)
    table[list(_CITYSCAPES_IDS)] = np.arange(len(_CITYSCAPES_IDS))
    pictures = _by_name(root / "leftImg8bit" / split, "_leftImg8bit")
    labels = _by_name(root / "gtFine" / split, "_gtFine_labelIds")
    pairs = _paired(root / "leftImg8bit" / split, pictures, labels)
    return Files(pairs, CITYSCAPES_CLASSES, IGNORE, table)


class Examples:
    """Every example of a source, read and checked once and kept in memory as far as it fits.

    Attributes:
        pixels: labelled pixels per class, (K,) int64.
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
        """Keeps at most ``memory`` bytes; ``progress(iterator, total)`` may show how far it is."""
        self.source, self.classes, self.ignore = source, source.classes, source.ignore
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
        _raise_if_any(problems)
        self.pixels: NDArray[np.int64] = counts[: len(self.classes)]
        if not self.pixels.any():
            raise DataError(f"{source.name(0)} and all others: no pixel has a class")

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


# --- augmentation ----------------------------------------------------------------------------------------

_BANK = 1 << 20


@dataclass(frozen=True)
class Augmentation:
    """Random views of an example: resize, crop, flip, colours.

    Args:
        crop: (height, width) of the network's input.
        size: (height, width) that a whole picture has as the network's input, before the random resize;
            the picture's own by default. Labels are not enlarged along: a crop of them is smaller than the
            input's by ``size / picture's size``.
        scale: bounds of the random resize, whose logarithm is uniform.
        flip: mirror every other example.
        colour: strength of the changes in brightness, contrast, saturation and hue; 0 for none.
        photo: strength of what cameras and weather do: gamma, colour cast, blur, noise; 0 for none.
        ignore: label of what a crop has beside the picture.
    """

    crop: tuple[int, int]
    size: tuple[int, int] | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    colour: float = 0.2
    photo: float = 0.0
    ignore: int = IGNORE

    def label_size(self, height: int, width: int) -> tuple[int, int]:
        """Size of a crop's labels, for pictures of height x width."""
        rows, columns = self.size or (height, width)
        return (
            max(1, round(self.crop[0] * height / rows)),
            max(1, round(self.crop[1] * width / columns)),
        )

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """One view; picture (*crop, 3) and labels of :meth:`label_size`."""
        height, width = example.labels.shape
        out = self.label_size(height, width)
        scale = math.exp(rng.uniform(math.log(self.scale[0]), math.log(self.scale[1])))
        boxes = [_span(rng, length, wanted / scale) for length, wanted in zip((height, width), out)]
        mirrored = self.flip and rng.random() < 0.5

        # Read from the picture the whole pixels under the box, change them, then resize.
        inside = [(max(0.0, a), min(float(n), b)) for (a, b), n in zip(boxes, (height, width))]
        rows, columns = (slice(math.floor(a), math.ceil(b)) for a, b in inside)
        picture = self._recoloured(example.picture[rows, columns], rng)
        labels = Image.fromarray(example.labels[rows, columns])
        part = tuple((a - s.start, b - s.start) for (a, b), s in zip(inside, (rows, columns)))
        mean = tuple(int(v) for v in example.picture[::16, ::16].mean((0, 1)))
        view = _resized(picture, part, boxes, inside, self.crop, Image.Resampling.BILINEAR, mean)
        truth = _resized(labels, part, boxes, inside, out, Image.Resampling.NEAREST, self.ignore)
        if mirrored:
            view, truth = (x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for x in (view, truth))
        return Example(np.asarray(view), np.asarray(truth))

    def _recoloured(self, pixels: Pixels, rng: np.random.Generator) -> Image.Image:
        image = Image.fromarray(np.ascontiguousarray(pixels))
        c, p = self.colour, self.photo
        if not (c or p):
            return image

        def spread(strength: float, size: int | None = None) -> NDArray[np.float64]:
            return np.asarray(rng.uniform(-strength, strength, size))

        brightness, contrast, saturation = 1 + spread(c, 3)
        hue = spread(0.3 * c)
        gamma = np.exp(spread(0.6 * p))
        cast = np.exp(spread(0.15 * p, 3))
        levels = (np.arange(256) / 255) ** gamma
        levels = ((levels - 0.5) * contrast + 0.5) * brightness
        table = np.clip(255 * cast[:, None] * levels, 0, 255)
        image = image.point(np.rint(table).astype(int).ravel().tolist())
        image = image.convert("RGB", _colour_matrix(float(saturation), float(hue)))
        if rng.random() < 0.3 * p:
            image = image.filter(ImageFilter.BoxBlur(rng.uniform(0.3, 1.5)))
        if rng.random() < 0.5 * p:
            image = _noisy(image, rng)
        return image


def _span(rng: np.random.Generator, length: int, wanted: float) -> tuple[float, float]:
    """A random window of ``wanted`` pixels over a side of ``length``; it contains the side or lies in it."""
    low, high = sorted((0.0, length - wanted))
    start = rng.uniform(low, high)
    return start, start + wanted


def _resized(
    image: Image.Image,
    part: Sequence[tuple[float, float]],
    boxes: Sequence[tuple[float, float]],
    inside: Sequence[tuple[float, float]],
    size: tuple[int, int],
    how: Image.Resampling,
    beside: int | tuple[int, ...],
) -> Image.Image:
    """``part`` of the image, which is what is ``inside`` the picture of ``boxes``, on (height, width)."""
    spans = []
    for (start, stop), (first, last), length in zip(boxes, inside, size):
        pitch = length / (stop - start)
        begin = min(length - 1, round((first - start) * pitch))
        spans.append((begin, max(begin + 1, round((last - start) * pitch))))
    (top, bottom), (left, right) = spans
    (y0, y1), (x0, x1) = part
    piece = image.resize((right - left, bottom - top), how, (x0, y0, x1, y1))
    if piece.size == size[::-1]:
        return piece
    canvas = Image.new(image.mode, size[::-1], beside)
    canvas.paste(piece, (left, top))
    return canvas


def _colour_matrix(saturation: float, hue: float) -> tuple[float, ...]:
    """RGB -> RGB: chroma scaled by ``saturation`` and turned by ``hue`` radians, in YIQ."""
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    cos, sin = saturation * math.cos(hue), saturation * math.sin(hue)
    turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    matrix = np.linalg.inv(to_yiq) @ turn @ to_yiq
    return tuple(np.concatenate([matrix, np.zeros((3, 1))], 1).ravel().tolist())


_noise: list[NDArray[np.float32]] = []


def _noisy(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Gaussian noise, taken from one fixed bank at a random place."""
    if not _noise:
        _noise.append(np.random.default_rng(0).standard_normal(_BANK, np.float32))
    bank, pixels = _noise[0], np.asarray(image)
    start = int(rng.integers(_BANK))
    noise = np.resize(
        np.roll(bank, -start) if pixels.size > _BANK - start else bank[start:], pixels.size
    )
    noise = noise.reshape(pixels.shape) * np.float32(rng.uniform(2, 12))
    noise += pixels
    return Image.fromarray(np.clip(noise, 0, 255, out=noise).astype(np.uint8))


# --- batches ---------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Pictures, uint8 (N, 3, H, W) in channels-last memory, and labels, uint8 (N, h, w)."""

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
        rank, world: this process makes its part of each batch; ``world`` divides ``batch``.
        workers: threads that prepare the next step; 0 prepares each when it is asked for.
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
        self.rank, self.world, self.workers = rank, world, workers
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
        return self.augmentation(examples[index], np.random.default_rng((self.seed, 3, position)))

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
