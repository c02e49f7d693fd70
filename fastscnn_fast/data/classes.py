"""Names and colours of classes: CamVid's, Cityscapes', and those that a network has."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

from ..arch.config import Config

Colour = tuple[int, int, int]

CAMVID_CLASSES = (
    "Sky",
    "Building",
    "Pole",
    "Road",
    "Pavement",
    "Tree",
    "SignSymbol",
    "Fence",
    "Car",
    "Pedestrian",
    "Bicyclist",
)
CAMVID_PALETTE: tuple[Colour, ...] = (
    (128, 128, 128),
    (128, 0, 0),
    (192, 192, 128),
    (128, 64, 128),
    (60, 40, 222),
    (128, 128, 0),
    (192, 128, 128),
    (64, 64, 128),
    (64, 0, 128),
    (64, 64, 0),
    (0, 128, 192),
)
CITYSCAPES_CLASSES = (
    "road",
    "sidewalk",
    "building",
    "wall",
    "fence",
    "pole",
    "traffic light",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
)
CITYSCAPES_PALETTE: tuple[Colour, ...] = (
    (128, 64, 128),
    (244, 35, 232),
    (70, 70, 70),
    (102, 102, 156),
    (190, 153, 153),
    (153, 153, 153),
    (250, 170, 30),
    (220, 220, 0),
    (107, 142, 35),
    (152, 251, 152),
    (70, 130, 180),
    (220, 20, 60),
    (255, 0, 0),
    (0, 0, 142),
    (0, 0, 70),
    (0, 60, 100),
    (0, 80, 100),
    (0, 0, 230),
    (119, 11, 32),
)
#: The label that belongs to no class in CamVid; the losses and scores leave it out.
CAMVID_IGNORE = 11


_PALETTES = {CAMVID_CLASSES: CAMVID_PALETTE, CITYSCAPES_CLASSES: CITYSCAPES_PALETTE}


def counted(number: int, noun: str = "class") -> str:
    """So many in words: "1 class", "2 classes", "3 pictures"."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number} {noun if number == 1 else plural}"


def numbered(num_classes: int) -> tuple[str, ...]:
    """What classes are called whose names no one has said: "class 0" and so on."""
    return tuple(f"class {k}" for k in range(num_classes))


def colours_of(classes: Sequence[str]) -> tuple[Colour, ...]:
    """A colour for each class: CamVid's and Cityscapes' own for theirs, which are known by all their names."""
    return _PALETTES.get(tuple(classes)) or _spread_colours(len(classes))


def label_count(num_classes: int) -> int:
    """How many labels so many classes have: one class alone has two, 0 for the background and 1 for itself."""
    return max(2, num_classes)


def label_names(classes: Sequence[str]) -> tuple[str, ...]:
    """What those labels are called: as the classes are, and "background"."""
    return ("background",) * (label_count(len(classes)) - len(classes)) + tuple(classes)


def label_colours(palette: Sequence[Colour]) -> tuple[Colour, ...]:
    """Their colours; the background's is black."""
    return ((0, 0, 0),) * (label_count(len(palette)) - len(palette)) + tuple(palette)


class Named:
    """What the classes of a network are called and how they are shown: by the data that it learnt, else numbers."""

    config: Config
    _classes: tuple[str, ...] | None = None
    _palette: tuple[Colour, ...] | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """A name for each of the ``config.num_classes`` classes; "class 0" and so on where none are known.

        They can be set, and travel with checkpoints, fused copies and ONNX files; ValueError where they do
        not fit.
        """
        return self._classes or numbered(self.config.num_classes)

    @classes.setter
    def classes(self, names: Sequence[str]) -> None:
        count = self.config.num_classes
        known = isinstance(names, Sequence) and not isinstance(names, str)
        if not known or len(names) != count or not all(isinstance(name, str) for name in names):
            raise ValueError(f"classes must be {counted(count, 'name')}, got {names!r}")
        self._classes = tuple(names)

    @property
    def palette(self) -> tuple[Colour, ...]:
        """An (R, G, B) of 0 to 255 for each class, by default :func:`colours_of` its name; set as :attr:`classes`."""
        return self._palette or colours_of(self.classes)

    @palette.setter
    def palette(self, colours: Sequence[Sequence[int]]) -> None:
        count = self.config.num_classes
        if not _are_colours(colours) or len(colours) != count:
            raise ValueError(
                f"palette must be {count} times (R, G, B) of 0 to 255, got {colours!r}"
            )
        self._palette = tuple((r, g, b) for r, g, b in colours)

    @property
    def named(self) -> bool:
        """Whether names or colours were set."""
        return self._classes is not None or self._palette is not None

    def call_as(self, other: Named) -> None:
        """Takes names and colours over from another network of as many classes."""
        self._classes, self._palette = other._classes, other._palette


def _are_colours(colours: Any) -> bool:
    return isinstance(colours, Sequence) and all(
        isinstance(colour, Sequence)
        and len(colour) == 3
        and all(type(channel) is int and 0 <= channel <= 255 for channel in colour)
        for colour in colours
    )


def _spread_colours(count: int) -> tuple[Colour, ...]:
    """``count`` colours; neighbours differ in hue by the golden angle, and in brightness."""
    golden, colours = (5**0.5 - 1) / 2, []
    for k in range(count):
        r, g, b = colorsys.hsv_to_rgb(k * golden % 1, 0.75, (0.95, 0.7, 0.5)[k % 3])
        colours.append((round(r * 255), round(g * 255), round(b * 255)))
    return tuple(colours)
