"""Names and colours of classes: CamVid's, Cityscapes', and some for any other number."""

from __future__ import annotations

import colorsys

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


def class_names(num_classes: int) -> tuple[tuple[str, ...], tuple[Colour, ...]]:
    """Names and colours for ``num_classes`` classes: CamVid's for 11, Cityscapes' for 19, else numbers."""
    if num_classes == len(CAMVID_CLASSES):
        return CAMVID_CLASSES, CAMVID_PALETTE
    if num_classes == len(CITYSCAPES_CLASSES):
        return CITYSCAPES_CLASSES, CITYSCAPES_PALETTE
    return tuple(f"class {k}" for k in range(num_classes)), _spread_colours(num_classes)


def _spread_colours(count: int) -> tuple[Colour, ...]:
    """``count`` colours; neighbours differ in hue by the golden angle, and in brightness."""
    golden, colours = (5**0.5 - 1) / 2, []
    for k in range(count):
        r, g, b = colorsys.hsv_to_rgb(k * golden % 1, 0.75, (0.95, 0.7, 0.5)[k % 3])
        colours.append((round(r * 255), round(g * 255), round(b * 255)))
    return tuple(colours)
