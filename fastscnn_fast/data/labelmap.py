"""What the values of label files mean: colours or ids to classes, as a file says it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .classes import Colour, label_names

#: The word for what belongs to no class, and the value that stands for all that have no line.
IGNORED, REST = "ignore", "*"
_MOST = 65535
_VALUE = r"(?P<value>\*|#[0-9a-fA-F]{6}|\d+(?:[,\s]+\d+[,\s]+\d+)?)"
_VALUE_FIRST = re.compile(_VALUE + r"\s*(?:->|=>|[,;:=\s])\s*(?P<means>\S.*)")
_NAME_FIRST = re.compile(r"(?P<means>[^\d\s#*].*?)\s*[,;:=\s]\s*" + _VALUE + r"[,;:\s]*")
_COMMENT = re.compile(r"(^|\s)#(?![0-9a-fA-F]{6}\b).*")
_FORM = (
    "must be a value and what it means: an id, a colour (R G B or #RRGGBB) or *, then a class's id or name or"
    f" {IGNORED!r}"
)


class DataError(ValueError):
    """What is wrong with a data set, one line per file."""


class _Line(NamedTuple):
    place: str  # for errors
    value: int | Colour | None  # None for the rest
    means: str


class LabelMap:
    """A table from the values of label files, all ids or all colours, to classes.

    A line of its file is ``VALUE CLASS``, separated by blanks, a comma, a colon, ``=`` or ``->``: an id (``255
    1``), a colour (``128 64 128 road``, ``#804080 road``), or ``*`` for whatever has no line; then a class's id
    or name, or ``ignore``. The name may come first where there is one (``road,128,64,128``), as in the tables
    that come with CamVid and that labelling tools write; ``#`` begins a comment, a first line without numbers is
    a heading. A JSON object says the same.

    Args:
        lines: what lines say, after where each of them stands.
        name: what errors call the table.

    Raises:
        DataError: a line that says something else, or says another thing of a value than one before.
    """

    def __init__(self, lines: Sequence[tuple[str, str]], name: str) -> None:
        self.name = name
        self.lines = [_parsed(place, text) for place, text in lines]
        values = [line.value for line in self.lines if line.value is not None]
        if not values:
            raise DataError(f"{name}: must say what a value of label files means, got no such line")
        self.colours = isinstance(values[0], tuple)
        seen: dict[int | Colour | None, str] = {}
        for place, value, means in self.lines:
            if value is not None and isinstance(value, tuple) != self.colours:
                raise DataError(f"{place}: values must be all ids or all colours, got {value}")
            if seen.setdefault(value, means) != means:
                shown = REST if value is None else value
                raise DataError(
                    f"{place}: {shown} must mean one thing, got {seen[value]} and {means}"
                )

    @staticmethod
    def of(table: str | os.PathLike[str] | Mapping[Any, Any]) -> LabelMap:
        """From a file, or a dictionary such as ``{255: 1, 0: None}`` or ``{(128, 64, 128): "road"}``; None is ignored.

        Raises:
            DataError: as the class, and for a file that is no text.
            OSError: the file cannot be opened.
        """
        if isinstance(table, Mapping):
            return LabelMap(_entries(table.items(), "label_map"), "label_map")
        name = os.fspath(table)
        try:
            text = Path(table).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{name}: must be text in UTF-8: {error}") from None
        if text.lstrip().startswith("{"):
            try:
                entries = json.loads(text, object_pairs_hook=list)  # a key may come twice
            except (ValueError, RecursionError) as error:
                raise DataError(f"{name}: is no JSON object: {error}") from None
            return LabelMap(_entries(entries, name), name)
        return LabelMap(_text_lines(text, name), name)

    @property
    def names(self) -> tuple[str, ...]:
        """The classes that are named, in the order in which they are."""
        named = (line.means for line in self.lines)
        return tuple(dict.fromkeys(n for n in named if n != IGNORED and not n.isdecimal()))

    def table(self, classes: Sequence[str], ignore: int) -> Table:
        """The table for these classes; ``ignore`` is the id of what belongs to none.

        Raises:
            DataError: a line that means none of them, or one by its id and another by its name.
        """
        names = label_names(classes)
        known = {str(ignore): {ignore}} | {str(k): {k} for k in range(len(names))}
        for name, k in ((IGNORED, ignore), *zip(map(_meant, names), range(len(names)))):
            known.setdefault(name, set()).add(k)
        means: dict[int | None, int] = {}
        for place, value, said in self.lines:
            if said not in known:
                raise DataError(
                    f"{place}: a class must be 0 to {len(names) - 1}, {IGNORED!r} or one of"
                    f" {', '.join(names)}, got {said!r}"
                )
            label, *others = sorted(known[said])
            if others:
                raise DataError(
                    f"{place}: a class must be said by what means no other, got {said!r}, which may be id {label} or"
                    f" {others[0]}: call it otherwise in classes.txt"
                )
            means[_code(value) if isinstance(value, tuple) else value] = label
        rest = means.pop(None, None)
        codes = np.array(sorted(k for k in means if k is not None), np.int64)
        targets = np.array([means[int(code)] for code in codes], np.uint8)
        return Table(self.name, self.colours, codes, targets, rest)


class Table(NamedTuple):
    """A :class:`LabelMap` for some classes: which values become which ids."""

    name: str
    colours: bool
    values: NDArray[np.int64]  #: sorted; colours as one number
    ids: NDArray[np.uint8]
    rest: int | None  #: the id of what is not in it; None: there may be nothing else

    def __call__(self, image: Image.Image, name: str) -> NDArray[np.uint8]:
        """The ids (H, W) of a label file's picture.

        Raises:
            ValueError: it holds something else than the table, or a value that has no line.
        """
        values = self._colours_in(image, name) if self.colours else self._ids_in(image, name)
        places = np.searchsorted(self.values, values).clip(max=len(self.values) - 1)
        ids, known = self.ids[places], self.values[places] == values
        if self.rest is not None:
            return np.where(known, ids, np.uint8(self.rest))
        if not known.all():
            y, x = np.argwhere(~known)[0]
            value = int(values[y, x])
            shown = f"colour {_colour(value)}" if self.colours else f"label id {value}"
            raise ValueError(
                f"{name}: {shown} (row {y}, column {x}) is not in {self.name}; a line"
                f" '{REST} {IGNORED}' there is for all that is not"
            )
        return ids

    def _ids_in(self, image: Image.Image, name: str) -> NDArray[np.int64]:
        values = _ids_in(image, name)
        # Masks of one bit hold 0 and 1, which viewers show, and other tools read, as 0 and 255.
        spread = image.mode == "1" and 255 in self.values and 1 not in self.values
        return values * 255 if spread else values

    def _colours_in(self, image: Image.Image, name: str) -> NDArray[np.int64]:
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
            rule = f"labels must be colours of 8 bits, as in {self.name}"
            raise ValueError(f"{name}: {rule}, got an image of mode {image.mode}")
        rgb = np.asarray(image.convert("RGB")).astype(np.int64)
        return _code((rgb[..., 0], rgb[..., 1], rgb[..., 2]))


def _ids_in(image: Image.Image, name: str) -> NDArray[np.int64]:
    """The values of one channel, or of several that are all the same, alpha aside."""
    if image.mode in ("RGB", "RGBA", "LA"):
        channels = np.asarray(image)[..., : 1 if image.mode == "LA" else 3]
        if (channels != channels[..., :1]).any():
            raise ValueError(f"{name}: labels must be ids, as in the label map, got colours")
        return channels[..., 0].astype(np.int64)
    if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
        raise ValueError(f"{name}: labels must be ids, got an image of mode {image.mode}")
    return np.asarray(image).astype(np.int64)


def _code(colour: Sequence[Any]) -> Any:
    red, green, blue = colour
    return red << 16 | green << 8 | blue


def _colour(code: int) -> Colour:
    return code >> 16, code >> 8 & 255, code & 255


def _entries(table: Iterable[tuple[Any, Any]], name: str) -> list[tuple[str, str]]:
    def text(part: Any) -> str:
        if part is None:
            return IGNORED
        return ", ".join(map(str, part)) if isinstance(part, (list, tuple)) else str(part)

    return [(f"{name}[{key!r}]", f"{text(key)}: {text(value)}") for key, value in table]


def _text_lines(text: str, name: str) -> list[tuple[str, str]]:
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        if bare := _COMMENT.sub("", line).strip():
            lines.append((f"{name}: line {number}", bare))
    if lines and not re.search(r"[\d*#]", lines[0][1]):  # a heading, as "name,r,g,b"
        del lines[0]
    return lines


def _meant(text: str) -> str:
    return IGNORED if text.lower() == IGNORED else text


def _parsed(place: str, text: str) -> _Line:
    bare = text
    if text[0] in "([\"'":
        bare = re.sub(r"[()\[\]\"']", "", text)
    found = _VALUE_FIRST.fullmatch(bare) or _NAME_FIRST.fullmatch(bare)
    means = found["means"].strip().rstrip(",;:").strip() if found else ""
    if found is None or not re.fullmatch(r"\d{1,5}|.*[^\d\s,;:].*", means):
        raise DataError(f"{place}: {_FORM}, got {text!r}")
    means = _meant(means)
    value = found["value"]
    if value == REST:
        return _Line(place, None, means)
    if value.startswith("#"):
        return _Line(place, _colour(int(value[1:], 16)), means)
    numbers = [int(number[:9]) for number in re.findall(r"\d+", value)]
    most = 255 if len(numbers) == 3 else _MOST
    if max(numbers) > most:
        raise DataError(f"{place}: values must be 0 to {most}, got {value}")
    if len(numbers) == 1:
        return _Line(place, numbers[0], means)
    return _Line(place, (numbers[0], numbers[1], numbers[2]), means)
