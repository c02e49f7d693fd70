"""Where labelled pictures come from: folders, Cityscapes, drawn streets; and the checks of each file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .classes import (
    CAMVID_CLASSES,
    CAMVID_IGNORE,
    CITYSCAPES_CLASSES,
    counted,
    label_count,
    label_names,
    numbered,
)
from .labelmap import IGNORED, DataError, LabelMap, Table
from .pictures import (
    PICTURE_SUFFIXES,
    is_white_zero,
    load_whole,
    orientation,
    read_picture,
    unscale,
)
from .scenes import street

Pixels = NDArray[np.uint8]

#: The label that belongs to no class, unless a data set has another.
IGNORE = 255
#: What stands for a data set's folder where the streets are to be drawn.
STREETS = "streets"
_SHOWN = 20  # problems that an error lists
# The first seed and the usual count of each split.
_STREETS_OF = {"train": (0, 1000), "val": (1_000_000, 100)}

#: Cityscapes' labelIds -> its 19 train ids; everything else is ignored.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CITYSCAPES_LAST = 33


class Example(NamedTuple):
    """A picture, uint8 (H, W, C), three channels RGB, and its labels, uint8 (H, W), as
    :func:`~.classes.label_count` has them."""

    picture: Pixels
    labels: Pixels


class Source(Protocol):
    """Where examples come from. ``read`` raises ValueError or OSError for a damaged example."""

    classes: tuple[str, ...]
    ignore: int
    channels: int
    table: Table | None

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
        table: Table | None = None,
        bits: int | None = None,
        channels: int = 3,
    ) -> None:
        """``table`` says what the values of the label files mean; by default they are the labels.

        ``bits`` and ``channels`` are those of :func:`~fastscnn_fast.data.pictures.read_picture`.
        """
        self.pairs, self.classes, self.ignore, self.table = list(pairs), classes, ignore, table
        self.bits, self.channels = bits, channels

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return str(self.pairs[index][0])

    def read(self, index: int) -> Example:
        picture, labels = self.pairs[index]
        pixels = _read_upright(picture, self.bits, self.channels)
        ids = _read_labels(labels, self.table)
        if ids.shape != pixels.shape[:2]:
            raise ValueError(
                f"{labels}: is {ids.shape[0]}x{ids.shape[1]}, its picture {picture} is "
                f"{pixels.shape[0]}x{pixels.shape[1]}"
            )
        _check_ids(ids, range(label_count(len(self.classes))), self.ignore, str(labels))
        return Example(pixels, ids)


class Streets:
    """``count`` procedural street scenes with CamVid's classes, drawn from ``seed`` on."""

    classes: tuple[str, ...] = CAMVID_CLASSES
    channels = 3
    table: Table | None = None

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


def _read_upright(path: Path, bits: int | None, channels: int) -> Pixels:
    pixels = read_picture(path, channels, bits)
    with Image.open(path) as image:
        _check_upright(path, "a picture with labels", orientation(image))
    return pixels


def _check_upright(path: Path, what: str, turned: int) -> None:
    if turned != 1:  # the other of the pair need not have such a tag, nor its writer have heeded it
        raise ValueError(f"{path}: {what} must be stored upright, got EXIF orientation {turned}")


def _read_labels(path: Path, table: Table | None) -> Pixels:
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is no regular file")
    try:
        with Image.open(path) as image:
            lossy = _lossy(path, image)
            raw = [part for tile in image.tile for part in np.atleast_1d(tile[3]).tolist()]
            if not (table and table.colours):
                unscale(image)
            file = load_whole(image)
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if lossy is not None:  # ids come back as other ids, some of them ids of classes
        raise ValueError(f"{path}: labels must be stored without loss, as in PNG, got {lossy}")
    _check_upright(path, "labels", file.orientation)
    rule = "labels must be 8-bit class ids in one channel"
    if table is None and image.mode not in ("1", "L", "P"):
        hint = "--label-map says what other values mean"
        raise ValueError(f"{path}: {rule}, got an image of mode {image.mode} ({hint})")
    packed = [mode for mode in raw if str(mode).startswith("L;")]
    if packed and not (table and table.colours):  # Pillow spreads fewer bits over 0 to 255
        raise ValueError(f"{path}: {rule}, got an image of raw mode {packed[0]}")
    if image.mode.startswith("I") and is_white_zero(image):
        raise ValueError(
            f"{path}: labels must not be a negative, got a TIFF of 16 bits whose 0 is white"
        )
    return np.array(image, np.uint8) if table is None else table(image, str(path))


def _lossy(path: Path, image: Image.Image) -> str | None:
    """What an opened file is called that need not give back the ids that were written; None for others."""
    kind, packed = str(image.format), image.info.get("compression")
    if kind in ("JPEG", "MPO", "JPEG2000", "AVIF"):
        return kind
    if kind == "TIFF" and packed in ("jpeg", "tiff_jpeg", "webp"):
        return f"TIFF with {packed} inside"
    return "lossy WEBP" if kind == "WEBP" and b"VP8L" not in path.read_bytes() else None


def _check_ids(labels: Pixels, known: range, ignore: int, name: str) -> None:
    counts = np.bincount(labels.ravel(), minlength=256)
    counts[known.start : known.stop] = 0
    if 0 <= ignore < 256:
        counts[ignore] = 0
    if counts.any():
        label = int(counts.argmax())
        y, x = np.argwhere(labels == label)[0]
        hint = "; masks of one or two classes must hold 0 and 1" if len(known) == 2 else ""
        raise ValueError(
            f"{name}: label id {label} (row {y}, column {x}) is neither a class, "
            f"0 to {known.stop - 1}, nor the ignored id {ignore}{hint}"
        )


def open_source(
    root: str | os.PathLike[str],
    split: str,
    num_classes: int | None = None,
    ignore: int | None = None,
    bits: int | None = None,
    label_map: str | os.PathLike[str] | Mapping[Any, Any] | None = None,
    label_suffix: str = "",
    channels: int = 3,
) -> Source:
    """The examples of one split of a data set.

    ``root`` is a folder with ``<split>/images`` and ``<split>/labels`` (the same names, any suffix) whose
    class names are the lines of ``classes.txt`` or numbers 0 to ``num_classes - 1`` (of one class, its pixels are
    1 and the background 0); or Cityscapes' own
    folder (``leftImg8bit`` and ``gtFine``); or "streets", the procedural ones ("streets:500" for 500; a folder
    of that name is "./streets").

    ``bits`` is that of :func:`~fastscnn_fast.data.pictures.read_picture`, for pictures stored in more than 8.

    ``label_map`` says what the values of label files mean, :meth:`LabelMap.of <fastscnn_fast.data.labelmap.LabelMap.of>`;
    without ``classes.txt`` the names in it are the classes. ``label_suffix`` is what the names of label files have
    after their pictures': "_mask" for ``0_mask.png`` beside ``0.jpg``; files without it are left alone.

    ``channels`` is what pictures are read to: 1 for grey, 2 with alpha, 3 for RGB, 4 for RGBA.

    The latter two have their own classes, ignored ids, labels and names: ``num_classes`` and ``ignore``,
    ``label_map`` and ``label_suffix`` must be left out.

    Raises:
        DataError: no such folder, an empty one, pictures without labels or the reverse, a wrong argument.
    """
    kind, _, count = os.fspath(root).partition(":")
    root = Path(root)
    if kind == STREETS and root.is_dir():
        raise DataError(
            f"{root}: is a folder here and the name of drawn streets: say {os.path.join('.', root)} for the folder,"
            f" {STREETS}:N for N drawn ones"
        )
    own = kind == STREETS or (root / "leftImg8bit").is_dir()
    for name, value in (
        ("--classes", num_classes),
        ("--ignore", ignore),
        ("--label-map", label_map),
        ("--label-suffix", label_suffix or None),
    ):
        if own and value is not None:
            raise DataError(f"{name} must be left out: {root} has its own, got {value}")
    if kind == STREETS:
        if count and not (count.isdecimal() and int(count) > 0):
            raise DataError(f"streets must be followed by a number above 0, got {str(root)!r}")
        if split not in _STREETS_OF:
            raise DataError(f"split of streets must be train or val, got {split!r}")
        if channels != 3:
            raise DataError(
                f"--in-channels must be 3 for streets, which are drawn in RGB, got {channels}"
            )
        first, usual = _STREETS_OF[split]
        return Streets(int(count or usual), first)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    if own:
        return _cityscapes(root, split, bits, channels)
    table = None if label_map is None else LabelMap.of(label_map)
    classes = _classes(root, num_classes, table)
    ignore = IGNORE if ignore is None else ignore
    least = label_count(len(classes))
    if not least <= ignore <= 255:
        rule = f"--ignore must be {least} to 255, beyond the classes"
        raise DataError(f"{rule} (--label-map may ignore others), got {ignore}")
    folder = root / split
    pictures, labels = (
        _by_name(folder / "images"),
        _by_name(folder / "labels", _ending(label_suffix)),
    )
    meaning = None if table is None else table.table(classes, ignore)
    return Files(_paired(folder, pictures, labels), classes, ignore, meaning, bits, channels)


def _classes(root: Path, num_classes: int | None, table: LabelMap | None) -> tuple[str, ...]:
    """The names in ``classes.txt``, else those in the label map, else numbers."""
    if num_classes is not None and not 1 <= num_classes <= 255:
        raise DataError(f"--classes must be 1 to 255, got {num_classes}")
    names = root / "classes.txt"
    if names.is_file():
        classes, where = _read_names(names), str(names)
    elif table is not None and table.names:
        classes, where = table.names, table.name
    elif num_classes is not None:
        classes, where = numbered(num_classes), "--classes"
    else:
        raise DataError(f"{names}: missing; name the classes there, one a line, or give --classes")
    if num_classes == 1 and classes == label_names(classes[1:]):
        classes = classes[1:]  # told from the background, which is none then
    if num_classes not in (None, len(classes)):
        raise DataError(f"{where}: names {counted(len(classes))}, --classes says {num_classes}")
    if not 1 <= len(classes) <= 255:
        raise DataError(f"{root}: must have 1 to 255 classes, got {len(classes)}")
    return classes


def _ending(suffix: str) -> str:
    """A label suffix without a picture's ending, which does not matter."""
    name, dot, kind = suffix.rpartition(".")
    return name if dot and f".{kind.lower()}" in PICTURE_SUFFIXES else suffix


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
    for path in sorted(_below(folder, ())):
        name = str(path.relative_to(folder).with_suffix(""))
        known = path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")
        if known and name.endswith(ending):
            name = name.removesuffix(ending)
            if name in found:
                raise DataError(f"{path}: has the same name as {found[name]}")
            found[name] = path
    return found


def _below(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    """What is below a folder, also behind links; ``above`` are the real paths of the folders around it."""
    here = os.path.realpath(folder)
    if here in above:
        raise DataError(f"{folder}: is a link in a circle, to {here}")
    for path in folder.iterdir():
        if path.is_dir():
            yield from _below(path, (*above, here))
        else:
            yield path


def _paired(
    folder: Path, pictures: dict[str, Path], labels: dict[str, Path]
) -> list[tuple[Path, Path]]:
    if not pictures and not labels:
        raise DataError(f"{folder}: holds no pictures")
    problems = [f"{pictures[n]}: has no labels" for n in pictures if n not in labels]
    problems += [f"{labels[n]}: has no picture" for n in labels if n not in pictures]
    raise_problems(problems)
    return [(pictures[name], labels[name]) for name in sorted(pictures)]


def raise_problems(problems: Sequence[str]) -> None:
    """Raises :class:`DataError` with the first of them, where there are any."""
    if problems:
        more = len(problems) - _SHOWN
        tail = [f"... and {more} more"] if more > 0 else []
        raise DataError("\n".join([*problems[:_SHOWN], *tail]))


def _cityscapes(root: Path, split: str, bits: int | None, channels: int) -> Files:
    means: dict[int, Any] = dict.fromkeys((*range(_CITYSCAPES_LAST + 1), 255), IGNORED)
    means |= {value: k for k, value in enumerate(_CITYSCAPES_IDS)}
    lines = [(f"id {value}", f"{value} {label}") for value, label in means.items()]
    table = LabelMap(lines, "Cityscapes' label ids").table(CITYSCAPES_CLASSES, IGNORE)
    pictures = _by_name(root / "leftImg8bit" / split, "_leftImg8bit")
    labels = _by_name(root / "gtFine" / split, "_gtFine_labelIds")
    pairs = _paired(root / "leftImg8bit" / split, pictures, labels)
    return Files(pairs, CITYSCAPES_CLASSES, IGNORE, table, bits, channels)
