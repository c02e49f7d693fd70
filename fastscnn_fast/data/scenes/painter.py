"""A camera and a brush: metres in, pixels of a picture and of its labels out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ..classes import CAMVID_IGNORE

T = TypeVar("T")
Colour = tuple[int, int, int]
Point = tuple[float, float, float]
Pixel = tuple[float, float]

#: The labels: CamVid's classes in CamVid's order, and what belongs to none.
SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(11)
IGNORE = CAMVID_IGNORE

#: Layers, each drawn from far to near.
BACKGROUND, BUILDINGS, STREET, BONNET = range(4)

NEAR = 1.5  # metres; what is closer is drawn as if it were that far
_OVERSAMPLING = 2  # drawn this much larger: smooth edges in the picture, hard ones in the labels

#: Strength of the random texture per label, in grey levels.
_TEXTURE = np.array([0, 5, 2, 6, 5, 14, 1, 3, 2, 4, 3, 2], np.float32)


def mix(a: Sequence[float], b: Sequence[float], share: float) -> Colour:
    """``a`` with a share of ``b``, kept within 0..255."""
    keep = 1 - share
    return (
        min(255, max(0, round(a[0] * keep + b[0] * share))),
        min(255, max(0, round(a[1] * keep + b[1] * share))),
        min(255, max(0, round(a[2] * keep + b[2] * share))),
    )


def lit(colour: Sequence[float], light: float) -> Colour:
    """``colour`` in so much light: 1 leaves it as it is."""
    return mix((0, 0, 0), colour, light)


def oval(x: float, y: float, rx: float, ry: float, corners: int = 14) -> list[Pixel]:
    """The corners of an ellipse around (x, y)."""
    turn = 2 * math.pi / corners
    return [(x + rx * math.cos(k * turn), y + ry * math.sin(k * turn)) for k in range(corners)]


class Painter:
    """Draws a picture and its labels as a car's camera sees them, in the weather that ``seed`` brings.

    x is to the right, y up and z ahead, in metres; the camera is at x = z = 0. A shape with a label is drawn into the picture and, with the same corners, into the labels. A shape
    without one (a window, a lane mark, a shadow) is a detail of what it lies on.
    """

    def __init__(self, seed: int, height: int, width: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.height, self.width = height, width
        rows, columns = height * _OVERSAMPLING, width * _OVERSAMPLING
        self.focal = rows * self.between(0.95, 1.35)
        self.horizon = rows * self.between(0.40, 0.54)
        self.centre = columns * self.between(0.42, 0.58)
        self.eye = self.between(1.25, 1.75)
        self.bend = self.between(-1, 1) ** 3 * 0.006
        self.half_view = columns / 2 / self.focal  # metres to the frame's side per metre ahead

        overcast = self.between(0, 1)
        self.sunny = 1 - overcast
        self.sun_side = self.one_of((-1, 1))
        self.haze_distance = self.between(120, 500)
        glow = mix((206, 222, 240), (240, 212, 180), self.between(0, 1) ** 2)
        self.haze = mix(glow, (222, 224, 228), overcast)
        self.zenith = mix((78, 128, 204), (168, 174, 182), overcast)
        self.winter = self.chance(0.3)

        self.picture = Image.new("RGB", (columns, rows))
        self.labels = Image.new("L", (columns, rows), SKY)
        self.ink = ImageDraw.Draw(self.picture)
        self.glaze = ImageDraw.Draw(self.picture, "RGBA")
        self.truth = ImageDraw.Draw(self.labels)
        self.queue: list[tuple[int, float, int, Callable[[], None]]] = []

    # Chance.

    def between(self, low: float, high: float) -> float:
        """A number of the interval, all alike."""
        return low + (high - low) * float(self.rng.random())

    def chance(self, probability: float) -> bool:
        return float(self.rng.random()) < probability

    def one_of(self, choices: Sequence[T]) -> T:
        return choices[int(self.rng.integers(len(choices)))]

    # Drawing.

    def pixel(self, x: float, y: float, z: float) -> Pixel:
        """Where the picture shows a point: column and row."""
        scale = self.focal / max(z, NEAR)
        return self.centre + (x + self.bend * z * z) * scale, self.horizon + (self.eye - y) * scale

    def hazed(self, colour: Sequence[float], z: float) -> Colour:
        """``colour`` as it looks from z metres away."""
        return mix(colour, self.haze, 1 - math.exp(-max(z, 0) / self.haze_distance))

    def polygon(
        self,
        points: Sequence[Point],
        colour: Sequence[float],
        label: int | None = None,
        alpha: int = 255,
    ) -> None:
        """Draws a flat shape; ``label`` as the class says, ``alpha`` from 0 (clear) to 255."""
        pixels = [self.pixel(*point) for point in points]
        distance = sum(z for _, _, z in points) / len(points)
        self.paint(pixels, self.hazed(colour, distance), label, alpha)

    def paint(
        self, pixels: Sequence[Pixel], colour: Colour, label: int | None, alpha: int = 255
    ) -> None:
        """:meth:`polygon` whose corners are pixels already, without haze."""
        if alpha == 255:
            self.ink.polygon(pixels, fill=colour)
        else:
            self.glaze.polygon(pixels, fill=(*colour, alpha))
        if label is not None:
            self.truth.polygon(pixels, fill=label)

    def visible(self, x: float) -> float:
        """The nearest z at which x metres to the side are well inside the frame."""
        return max(5.0, 1.25 * abs(x) / self.half_view)

    def later(self, layer: int, z: float, draw: Callable[..., None], *args: object) -> None:
        """Calls ``draw(self, *args)`` once all that is behind is drawn, with chances of its own.

        Such a draw may take more chances at a higher resolution (smaller twigs) and still leave the
        rest of the scene as it is.
        """
        self.queue.append((layer, z, int(self.rng.integers(2**31)), lambda: draw(self, *args)))

    def board(self, x: float, z: float, label: int | None, squeeze: float = 1) -> Board:
        """A flat figure to draw on, at (x, z)."""
        return Board(self, x, z, label, squeeze)

    def draw_queue(self) -> None:
        """Draws all that was put off, from the back to the front."""
        for _, _, seed, draw in sorted(self.queue, key=lambda entry: (entry[0], -entry[1])):
            self.rng = np.random.default_rng(seed)
            draw()

    # From the drawing to the photograph.

    def develop(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Picture (H, W, 3) and labels (H, W), uint8, with exposure, texture, vignette and noise."""
        rng, shape = self.rng, (self.height, self.width)
        labels = np.asarray(self.labels)[::_OVERSAMPLING, ::_OVERSAMPLING]
        gain, gamma = 1 - 0.55 * self.between(0, 1) ** 3, self.between(0.85, 1.3)
        warmth = self.between(-0.06, 0.06)
        tone = 255 * gain * (np.arange(256) / 255) ** gamma
        curve = [round(min(255, v * (1 + c))) for c in (warmth, 0.0, -warmth) for v in tone]
        pixels = np.asarray(self.picture.reduce(_OVERSAMPLING).point(curve)).astype(np.float32)

        coarse = rng.standard_normal((self.height // 3 + 1, self.width // 3 + 1), np.float32)
        smooth = Image.fromarray(coarse).resize(
            (self.width, self.height), Image.Resampling.BILINEAR
        )
        grain = np.asarray(smooth) + 0.5 * rng.standard_normal(shape, np.float32)
        y, x = (np.linspace(-1, 1, n, dtype=np.float32) ** 2 for n in shape)
        vignette = 1 - self.between(0, 0.22) * (y[:, None] + x) / 2
        pixels += (_TEXTURE[labels] * gain * grain)[..., None]
        pixels *= vignette[..., None]
        pixels += self.between(1, 5) * rng.standard_normal((*shape, 3), np.float32)
        picture = np.clip(pixels, 0, 255).astype(np.uint8)
        return picture, labels


class Board:
    """A flat figure that faces the camera at (x, 0, z); its points are metres right and up."""

    def __init__(
        self, painter: Painter, x: float, z: float, label: int | None, squeeze: float
    ) -> None:
        self.painter, self.label, self.z = painter, label, z
        self.squeeze = squeeze
        self.scale = painter.focal / z
        self.foot = painter.pixel(x, 0, z)
        self.lift, self.size = 0.0, 1.0

    def _pixels(self, points: Sequence[Pixel]) -> list[Pixel]:
        (u, v), scale = self.foot, self.scale * self.size
        v -= self.lift * self.scale
        return [(u + x * self.squeeze * scale, v - y * scale) for x, y in points]

    def polygon(self, points: Sequence[Pixel], colour: Sequence[float], alpha: int = 255) -> None:
        self.painter.paint(
            self._pixels(points), self.painter.hazed(colour, self.z), self.label, alpha
        )

    def box(
        self, left: float, right: float, low: float, high: float, colour: Sequence[float]
    ) -> None:
        self.polygon([(left, low), (right, low), (right, high), (left, high)], colour)

    def oval(
        self, x: float, y: float, rx: float, ry: float, colour: Sequence[float], alpha: int = 255
    ) -> None:
        corners = 8 if rx * self.scale < 6 else 14
        self.polygon(oval(x, y, rx, ry, corners), colour, alpha)

    def line(self, points: Sequence[Pixel], width: float, colour: Sequence[float]) -> None:
        """A line ``width`` metres wide, at least one pixel of the finished picture."""
        pixels, thick = self._pixels(points), max(_OVERSAMPLING, round(width * self.scale))
        self.painter.ink.line(
            pixels, fill=self.painter.hazed(colour, self.z), width=thick, joint="curve"
        )
        if self.label is not None:
            self.painter.truth.line(pixels, fill=self.label, width=thick, joint="curve")

    def shadow(self, radius: float) -> None:
        """The dark spot on the ground where the figure stands."""
        spot = oval(0, 0, radius, 0.07)
        self.painter.paint(self._pixels(spot), (14, 14, 20), None, 110)
