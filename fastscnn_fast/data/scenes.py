"""The procedural street behind :func:`fastscnn_fast.data.street`: metres in, picture and labels out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

T = TypeVar("T")
Colour = tuple[int, int, int]
Point = tuple[float, float, float]
Pixel = tuple[float, float]

#: The labels: CamVid's classes in CamVid's order, and what belongs to none.
SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(11)
IGNORE = 11

_OVERSAMPLING = 2  # drawn this much larger: smooth edges in the picture, hard ones in the labels
_NEAR = 1.5  # metres; what is closer is drawn as if it were that far
_KERB = 0.12
_STRIPS = (1.5, 2, 2.7, 3.5, 5, 7, 9, 12, 16, 21, 28, 38, 52, 75, 110, 170)
_BACKGROUND, _BUILDINGS, _STREET, _BONNET = range(4)  # layers, each drawn from far to near

#: Strength of the random texture per label, in grey levels.
_TEXTURE = np.array([0, 5, 2, 6, 5, 14, 1, 3, 2, 4, 3, 2], np.float32)

_WALLS = (
    (158, 92, 72),
    (176, 122, 92),
    (206, 190, 160),
    (214, 208, 196),
    (168, 160, 148),
    (132, 120, 112),
    (190, 160, 110),
    (120, 82, 70),
    (222, 214, 206),
    (150, 150, 158),
)
_ROOFS = ((112, 66, 54), (84, 78, 80), (96, 84, 78), (66, 66, 74), (134, 84, 62))
_LEAVES = ((62, 96, 44), (84, 112, 50), (48, 80, 44), (104, 116, 54), (130, 106, 48), (70, 104, 70))
_PAINTS = (
    (188, 28, 32),
    (32, 52, 110),
    (228, 228, 230),
    (166, 170, 176),
    (28, 30, 34),
    (92, 98, 106),
    (34, 86, 62),
    (212, 184, 62),
    (88, 134, 178),
    (122, 30, 44),
)
_CLOTHES = (
    (30, 32, 44),
    (60, 62, 70),
    (128, 36, 40),
    (38, 66, 122),
    (204, 198, 188),
    (74, 92, 58),
    (196, 148, 52),
    (92, 62, 110),
    (214, 96, 60),
)
_SKINS = ((236, 196, 170), (206, 156, 124), (150, 104, 78), (96, 66, 52))
_SHOPS = ((36, 66, 120), (150, 32, 36), (30, 92, 70), (228, 222, 210), (200, 140, 36), (52, 48, 60))

# Cars seen from the side, rear to front: outline (share of the length, metres), the outline's edges that
# are glass, side windows, length and width in metres.
_Outline = tuple[tuple[float, float], ...]
_CARS: tuple[tuple[_Outline, tuple[int, ...], tuple[_Outline, ...], float, float], ...] = (
    (  # hatchback
        ((0, 0.24), (0, 0.9), (0.13, 1.42), (0.58, 1.46), (0.76, 0.95), (0.98, 0.8), (1, 0.24)),
        (1, 3),
        (
            ((0.12, 0.95), (0.18, 1.34), (0.4, 1.38), (0.4, 0.95)),
            ((0.43, 0.95), (0.43, 1.38), (0.57, 1.38), (0.71, 0.95)),
        ),
        3.9,
        1.7,
    ),
    (  # saloon
        (
            (0, 0.24),
            (0, 0.88),
            (0.15, 0.95),
            (0.29, 1.38),
            (0.58, 1.4),
            (0.74, 0.95),
            (0.98, 0.8),
            (1, 0.24),
        ),
        (2, 4),
        (
            ((0.2, 0.95), (0.31, 1.31), (0.43, 1.33), (0.43, 0.95)),
            ((0.45, 0.95), (0.45, 1.33), (0.57, 1.33), (0.69, 0.95)),
        ),
        4.5,
        1.75,
    ),
    (  # van
        ((0, 0.28), (0, 1.95), (0.74, 2.0), (0.87, 1.15), (0.98, 1.0), (1, 0.28)),
        (2,),
        (((0.6, 1.15), (0.6, 1.75), (0.73, 1.75), (0.83, 1.15)),),
        4.9,
        1.9,
    ),
    (  # bus
        ((0, 0.4), (0, 2.9), (0.99, 2.9), (1, 1.2), (1, 0.4)),
        (2,),
        tuple(
            ((a, 1.4), (a, 2.4), (a + 0.13, 2.4), (a + 0.13, 1.4))
            for a in (0.04, 0.2, 0.36, 0.52, 0.68, 0.84)
        ),
        9.5,
        2.4,
    ),
)


def _mix(a: Sequence[float], b: Sequence[float], share: float) -> Colour:
    """``a`` with a share of ``b``, kept within 0..255."""
    keep = 1 - share
    return (
        min(255, max(0, round(a[0] * keep + b[0] * share))),
        min(255, max(0, round(a[1] * keep + b[1] * share))),
        min(255, max(0, round(a[2] * keep + b[2] * share))),
    )


def _lit(colour: Sequence[float], light: float) -> Colour:
    return _mix((0, 0, 0), colour, light)


def _oval(x: float, y: float, rx: float, ry: float, corners: int = 14) -> list[Pixel]:
    turn = 2 * math.pi / corners
    return [(x + rx * math.cos(k * turn), y + ry * math.sin(k * turn)) for k in range(corners)]


class Scene:
    """A street seen from a car: x to the right, y up, z ahead, in metres; the camera is at x = z = 0.

    A shape with a label is drawn into the picture and, with the same corners, into the labels. A shape
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
        glow = _mix((206, 222, 240), (240, 212, 180), self.between(0, 1) ** 2)
        self.haze = _mix(glow, (222, 224, 228), overcast)
        self.zenith = _mix((78, 128, 204), (168, 174, 182), overcast)
        self.winter = self.chance(0.3)

        self.lane = self.between(2.9, 3.6)
        self.parking = {side: self.one_of((0.0, 2.2)) for side in (-1, 1)}
        self.edge = {
            -1: self.lane * self.one_of((1.5, 1.5, 2.5)) + self.parking[-1],
            1: self.lane * 0.5 + 0.3 + self.parking[1],
        }
        self.line = {side: self.edge[side] + self.between(2.0, 4.2) for side in (-1, 1)}
        self.garden = {side: self.one_of((0.0, 0.0, self.between(2, 5))) for side in (-1, 1)}

        self.picture = self._sky(rows, columns)
        self.labels = Image.new("L", (columns, rows), SKY)
        self.ink = ImageDraw.Draw(self.picture)
        self.glaze = ImageDraw.Draw(self.picture, "RGBA")
        self.truth = ImageDraw.Draw(self.labels)
        self.queue: list[tuple[int, float, int, Callable[[], None]]] = []

    def render(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Draw everything: picture (H, W, 3) and labels (H, W), both uint8."""
        self._ground()
        self._skyline()
        for side in (-1, 1):
            self._houses(side)
            self._furniture(side)
            self._people(side)
        self._traffic()
        if self.chance(0.2):
            self.later(_BONNET, 0, self._bonnet)
        mirrored = self.chance(0.5)
        for _, _, seed, draw in sorted(self.queue, key=lambda entry: (entry[0], -entry[1])):
            self.rng = np.random.default_rng(seed)
            draw()
        picture, labels = self._develop()
        if mirrored:
            picture, labels = picture[:, ::-1], labels[:, ::-1]
        return np.ascontiguousarray(picture), np.ascontiguousarray(labels)

    # Chance.

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.rng.random())

    def chance(self, probability: float) -> bool:
        return float(self.rng.random()) < probability

    def one_of(self, choices: Sequence[T]) -> T:
        return choices[int(self.rng.integers(len(choices)))]

    # Drawing.

    def pixel(self, x: float, y: float, z: float) -> Pixel:
        scale = self.focal / max(z, _NEAR)
        return self.centre + (x + self.bend * z * z) * scale, self.horizon + (self.eye - y) * scale

    def hazed(self, colour: Sequence[float], z: float) -> Colour:
        return _mix(colour, self.haze, 1 - math.exp(-max(z, 0) / self.haze_distance))

    def polygon(
        self,
        points: Sequence[Point],
        colour: Sequence[float],
        label: int | None = None,
        alpha: int = 255,
    ) -> None:
        pixels = [self.pixel(*point) for point in points]
        distance = sum(z for _, _, z in points) / len(points)
        self.paint(pixels, self.hazed(colour, distance), label, alpha)

    def paint(
        self, pixels: Sequence[Pixel], colour: Colour, label: int | None, alpha: int = 255
    ) -> None:
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
        """Draw once all that is behind is drawn, with chances of its own.

        Such a draw may take more chances at a higher resolution (smaller twigs) and still leave the
        rest of the scene as it is.
        """
        self.queue.append((layer, z, int(self.rng.integers(2**31)), lambda: draw(*args)))

    def board(self, x: float, z: float, label: int | None, squeeze: float = 1) -> _Board:
        return _Board(self, x, z, label, squeeze)

    # The scene's parts.

    def _sky(self, rows: int, columns: int) -> Image.Image:
        down = np.clip(np.arange(rows, dtype=np.float32) / max(self.horizon, 1), 0, 1)[:, None]
        ramp = np.array(self.zenith) * (1 - down) + np.array(self.haze) * down
        sky = Image.fromarray(ramp.astype(np.uint8)[:, None]).resize(
            (columns, rows), Image.Resampling.NEAREST
        )
        noise = sum(
            np.asarray(
                Image.fromarray(self.rng.random((2 * n, n), dtype=np.float32)).resize(
                    (64, 64), Image.Resampling.BICUBIC
                )
            )
            / n
            for n in (3, 6, 12, 24)
        )
        cover = self.between(0.35, 0.55)
        mask = np.clip((noise - cover) * self.between(400, 1500), 0, self.between(60, 230))
        clouds = Image.fromarray(mask.astype(np.uint8)).resize(
            (columns, rows), Image.Resampling.BICUBIC
        )
        sky.paste(
            _mix((250, 250, 250), (150, 154, 162), self.between(0, 1) * (1 - self.sunny)),
            mask=clouds,
        )
        return sky

    def _strip(
        self,
        left: float,
        right: float,
        colour: Sequence[float],
        label: int | None,
        height: float = 0,
        alpha: int = 255,
    ) -> None:
        """The ground between two distances from the middle, from here to the horizon."""
        for near, far in pairwise(_STRIPS):
            corners = ((left, near), (right, near), (right, far), (left, far))
            self.polygon([(x, height, z) for x, z in corners], colour, label, alpha)

    def _ground(self) -> None:
        asphalt = _mix((84, 84, 88), (128, 122, 116), self.between(0, 1))
        paving = _mix((140, 132, 126), (186, 176, 162), self.between(0, 1))
        columns, rows = self.picture.size
        below = [(0, self.horizon), (columns, self.horizon), (columns, rows), (0, rows)]
        self.paint(below, self.hazed(paving, 150), PAVEMENT)
        self._strip(-self.edge[-1], self.edge[1], asphalt, ROAD)
        self._marks(asphalt)
        for side in (-1, 1):
            edge, line, garden = (side * v[side] for v in (self.edge, self.line, self.garden))
            for near, far in pairwise(_STRIPS):
                face = [(edge, 0, near), (edge, _KERB, near), (edge, _KERB, far), (edge, 0, far)]
                self.polygon(face, _lit(paving, 0.8), PAVEMENT)
            self._strip(edge, line + side * 30, paving, PAVEMENT, _KERB)
            self._strip(edge, edge + side * 0.15, _lit(paving, 1.12), None, _KERB)
            z = _STRIPS[0]
            while z < 25:
                joint = [(edge, z), (line, z), (line, z + 0.04), (edge, z + 0.04)]
                self.polygon([(x, _KERB, at) for x, at in joint], _lit(paving, 0.85), None)
                z += 1.2
            if garden:
                self._strip(line, line + garden, self.one_of(_LEAVES), TREE, _KERB)

    def _marks(self, asphalt: Colour) -> None:
        white = _mix((250, 248, 240), asphalt, self.between(0, 0.5))
        yellow = _mix((226, 190, 70), asphalt, self.between(0, 0.4))

        def bar(left: float, right: float, near: float, far: float, colour: Colour) -> None:
            corners = ((left, near), (right, near), (right, far), (left, far))
            self.polygon([(x, 0, z) for x, z in corners], colour)

        for _ in range(int(self.rng.integers(5))):  # mended patches
            x, z = self.between(-self.edge[-1], self.edge[1] - 1), self.between(2, 25)
            patch = _lit(asphalt, self.between(0.8, 1.1))
            bar(x, x + self.between(0.5, 1.5), z, z + self.between(1, 6), patch)
        dash, gap = self.one_of(((2.0, 4.0), (3.0, 3.0), (4.0, 2.0)))
        divider = -self.lane / 2
        while divider > -self.edge[-1] + self.parking[-1] + 1:
            z = self.between(0, dash)
            while z < 90:
                bar(divider - 0.07, divider + 0.07, z, z + dash, white)
                z += dash + gap
            divider -= self.lane
        for side in (-1, 1):
            x = side * (self.edge[side] - 0.3 - self.parking[side])
            if self.parking[side]:
                self._strip(x - 0.06, x + 0.06, white, None)
            elif self.chance(0.6):
                self._strip(x - 0.05, x + 0.05, yellow, None)
                self._strip(x + side * 0.15 - 0.05, x + side * 0.15 + 0.05, yellow, None)
        if self.chance(0.35):  # zebra crossing
            z, x = self.between(6, 22), -self.edge[-1] + 0.4
            while x < self.edge[1] - 0.5:
                bar(x, x + 0.5, z, z + 2.8, white)
                x += 1.0
        elif self.chance(0.4):  # arrow
            z = self.between(4, 14)
            bar(-0.08, 0.08, z, z + 2.5, white)
            self.polygon([(-0.35, 0, z + 2.5), (0, 0, z + 4), (0.35, 0, z + 2.5)], white)

    def _skyline(self) -> None:
        for _ in range(14):
            x, z = self.between(-90, 90), self.between(130, 220)
            x -= self.bend * z * z
            if self.chance(0.5):
                wide, high = self.between(8, 25), self.between(6, 20)
                shape = ((x, 0), (x + wide, 0), (x + wide, high), (x, high))
                corners = [(a, b, z) for a, b in shape]
                self.later(_BACKGROUND, z, self.polygon, corners, self.one_of(_WALLS), BUILDING)
            else:
                self.later(_BACKGROUND, z, self._tree, x, z, self.between(6, 14))

    def _houses(self, side: int) -> None:
        x = side * (self.line[side] + self.garden[side])
        z = self.between(-6, 0)
        while z < 130:
            length = self.between(6, 16)
            if self.chance(0.14) and z > 3:
                for _ in range(3):
                    at = z + self.between(0, length)
                    self.later(
                        _BUILDINGS,
                        at,
                        self._tree,
                        x + side * self.between(1, 6),
                        at,
                        self.between(5, 9),
                    )
            else:
                self._house(side, x, z, z + length)
            z += length

    def _house(self, side: int, x: float, near: float, far: float) -> None:
        floors = self.one_of((2, 2, 3, 3, 4, 5))
        storey = self.between(2.8, 3.4)
        high, deep = floors * storey + 0.4, side * self.between(7, 11)
        wall, roof = self.one_of(_WALLS), self.one_of(_ROOFS)
        wall = _lit(wall, self.between(0.85, 1.1))
        street_light = 1 + (0.15 if side != self.sun_side else -0.3) * (0.4 + 0.6 * self.sunny)
        pitched = floors < 5 and self.chance(0.65)
        rise = self.between(1.8, 3.2) if pitched else 0.0
        shop = self.one_of(_SHOPS) if not self.garden[side] and self.chance(0.45) else None
        reach = high * 0.5 if self.sunny > 0.35 and side == self.sun_side else 0.0
        if reach:
            tip = max(-self.edge[-1], min(self.edge[1], x - side * reach), key=lambda v: v * side)
            shadow = [(x, 0.0, near), (tip, 0.0, near), (tip, 0.0, far), (x, 0.0, far)]
            start = max(near, _NEAR)
            shadow = [(a, b, max(c, start)) for a, b, c in shadow]
            self.polygon(shadow, (16, 20, 40), alpha=90)

        def draw() -> None:
            street = [(x, 0.0, near), (x, high, near), (x, high, far), (x, 0.0, far)]
            end = x + deep
            front = [(x, 0.0, near), (end, 0.0, near), (end, high, near), (x, high, near)]
            if pitched:
                ridge = x + deep / 2
                slope = [(x, high, near), (ridge, high + rise, near), (ridge, high + rise, far)]
                slope.append((x, high, far))
                self.polygon(slope, _lit(roof, street_light), BUILDING)
                front.insert(3, (ridge, high + rise, near))
            self.polygon(street, _lit(wall, street_light), BUILDING)
            if near > _NEAR:
                self.polygon(front, _lit(wall, 0.82), BUILDING)
            self._windows(
                lambda s, t: (x, t, near + s), far - near, floors, storey, wall, street_light, shop
            )
            if near > _NEAR:
                self._windows(
                    lambda s, t: (x + side * s, t, near),
                    abs(deep),
                    floors,
                    storey,
                    wall,
                    0.82,
                    None,
                )

        self.later(_BUILDINGS, near, draw)

    def _windows(
        self,
        face: Callable[[float, float], Point],
        length: float,
        floors: int,
        storey: float,
        wall: Colour,
        light: float,
        shop: Colour | None,
    ) -> None:
        """Windows, doors and a shop front on the wall that maps metres along and up to a point."""
        frame = _lit((232, 228, 220), light)
        count = max(1, int(length / self.between(2.0, 3.0)))
        wide, tall = self.between(0.8, 1.5), self.between(1.2, 1.8)
        spacing = length / count

        def panel(a: float, b: float, low: float, high: float, colour: Colour) -> None:
            self.polygon([face(a, low), face(a, high), face(b, high), face(b, low)], colour)

        if shop is not None:
            panel(0.3, length - 0.3, 0.1, 2.4, _lit((54, 60, 68), light))
            panel(0.2, length - 0.2, 2.4, 3.0, _lit(shop, light))
            panel(length * 0.3, length * 0.7, 2.55, 2.85, _mix(shop, (245, 240, 225), 0.7))
        for floor in range(1 if shop is not None else 0, floors):
            base = floor * storey + 0.95
            for k in range(count):
                middle = (k + 0.5) * spacing
                left, right = middle - wide / 2, middle + wide / 2
                (u0, v0), (u1, v1) = (
                    self.pixel(*face(left, base + tall)),
                    self.pixel(*face(right, base)),
                )
                inside = max(u0, u1) > 0 and min(u0, u1) < self.picture.width and v1 > 0
                if not inside or abs(u1 - u0) < 3 or v1 - v0 < 4:
                    continue
                glass = _mix((44, 52, 66), self.zenith, self.between(0, 1) * 0.5)
                if self.chance(0.08):
                    glass = (226, 200, 140)
                door = floor == 0 and k == count // 2
                bottom = 0.1 if door else base
                panel(left - 0.08, right + 0.08, bottom - 0.08, base + tall + 0.08, frame)
                fill = self.one_of(_SHOPS) if door else _lit(glass, light)
                panel(left, right, bottom, base + tall, fill)
                if not door and abs(u1 - u0) > 8:
                    panel(left, right, base + tall * 0.48, base + tall * 0.52, frame)
                    panel(middle - 0.03, middle + 0.03, base, base + tall, frame)

    def _furniture(self, side: int) -> None:
        """Lamp posts, signs, traffic lights, fences, trees and bins on one pavement."""
        edge, line = self.edge[side], self.line[side]
        kerb = side * (edge + 0.45)
        z = self.visible(edge) + self.between(0, 8)
        while z < 110:
            self.later(_STREET, z, self._lamp, kerb, z, -side, self.between(6, 9))
            z += self.between(15, 28)
        for _ in range(int(self.rng.integers(1, 4))):
            z = self.visible(edge) + self.between(0, 1) ** 2 * 30
            draw = self._traffic_light if self.chance(0.3) else self._sign
            self.later(_STREET, z, draw, kerb + side * 0.35, z)
        if self.chance(0.8):
            x = side * (line if self.garden[side] or self.chance(0.4) else edge + 0.25)
            z = self.visible(x) * self.between(0.6, 1.4)
            self._fence(x, z, z + self.between(8, 30))
        if self.garden[side] and self.chance(0.5):
            z = self.between(5, 25)
            for at in np.arange(z, z + self.between(5, 25), 0.8):
                self.later(_STREET, float(at), self._bush, side * (line + 0.6), float(at))
        spacing = self.one_of((0.0, 9.0, 14.0, 22.0))
        z = self.visible(line) * self.between(0.7, 1.5)
        while spacing and z < 100:
            x = side * (edge + 0.9 if not self.garden[side] else line + self.garden[side] / 2)
            self.later(_STREET, z, self._tree, x, z, self.between(4.5, 9))
            z += spacing * self.between(0.8, 1.3)
        if self.chance(0.4):
            z = self.visible(edge) + self.between(0, 12)
            self.later(_STREET, z, self._bin, kerb + side * 0.5, z)

    def _people(self, side: int) -> None:
        edge, line = self.edge[side], self.line[side]
        for k in range(int(self.rng.integers(1, 7))):
            x = side * self.between(edge + 0.7, line - 0.4)
            z = self.visible(x) + (self.between(0, 6) if k == 0 else self.between(0, 40))
            self.later(_STREET, z, self._pedestrian, x, z, _KERB)
        if self.chance(0.15):
            x, z = self.between(-self.edge[-1], self.edge[1]), self.between(9, 25)
            self.later(_STREET, z, self._pedestrian, x, z, 0.0)
        for k in range(self.one_of((0, 1, 1, 2)) if side < 0 else self.one_of((1, 1, 2))):
            x = side * (edge - self.parking[side] - self.between(0.5, 1.1))
            z = self.visible(x) + (self.between(0, 10) if k == 0 else self.between(4, 30))
            self.later(_STREET, z, self._cyclist, x, z)

    def _traffic(self) -> None:
        for side in (-1, 1):
            if self.parking[side]:
                z = self.visible(self.edge[side]) * self.between(0.5, 1.6)
                while z < 80:
                    if self.chance(0.75):
                        x = side * (self.edge[side] - 1.1)
                        self._car(x, z, self.chance(0.5), self.one_of((0, 0, 1, 1, 2)))
                    z += self.between(5.5, 8)
        z = self.between(9, 30)
        if self.chance(0.75):
            self._car(self.between(-0.3, 0.3), z, False, self.one_of((0, 0, 1, 1, 2, 3)))
        x = -self.lane
        while x > -self.edge[-1] + self.parking[-1] + 1:
            z = self.visible(x) + self.between(0, 15)
            while z < 90:
                self._car(
                    x + self.between(-0.3, 0.3), z, True, self.one_of((0, 0, 0, 1, 1, 1, 2, 3))
                )
                z += self.between(11, 50)
            x -= self.lane

    def _car(self, x: float, z: float, oncoming: bool, kind: int) -> None:
        self.later(_STREET, z, self._draw_car, x, z, oncoming, kind)

    def _draw_car(self, x: float, z: float, oncoming: bool, kind: int) -> None:
        paint = self.one_of(_PAINTS)
        outline, panes, windows, length, width = _CARS[kind]
        left, right = x - width / 2, x + width / 2
        glass = _mix((34, 40, 50), self.zenith, self.between(0, 0.3))

        def ahead(share: float) -> float:
            return z + length * (1 - share if oncoming else share)

        def lies(at: float, points: Sequence[tuple[float, float]]) -> list[Point]:
            return [(at, y, ahead(share)) for share, y in points]

        shadow = [
            (left - 0.15, z - 0.2),
            (right + 0.15, z - 0.2),
            (right + 0.15, z + length),
            (left - 0.15, z + length),
        ]
        self.polygon([(a, 0.0, b) for a, b in shadow], (12, 12, 16), alpha=150)
        for tyre in (left + 0.05, right - 0.3):
            box = ((tyre, 0), (tyre + 0.25, 0), (tyre + 0.25, 0.4), (tyre, 0.4))
            self.polygon([(a, b, z + 0.1) for a, b in box], (20, 20, 22), CAR)

        def across(k: int, inset: float) -> list[Point]:
            """The outline's edge k, seen from ahead: from the left to the right of the car."""
            low, high = outline[k : k + 2][:: -1 if oncoming else 1]
            ends = [
                (left + inset, low),
                (right - inset, low),
                (right - inset, high),
                (left + inset, high),
            ]
            return [(at, y, ahead(share)) for at, (share, y) in ends]

        count = len(outline) - 1
        for k in range(count) if oncoming else reversed(range(count)):
            if self._faces_camera(across(k, 0)):
                (s0, y0), (s1, y1) = outline[k : k + 2]
                upright = abs(y1 - y0) > abs(s1 - s0) * length
                self.polygon(across(k, 0), _lit(paint, 0.82 if upright else 1.12), CAR)
                if k in panes:
                    self.polygon(across(k, 0.12), glass)
        for at, turned in ((left, -1), (right, 1)):
            (near, _), (far, _) = self.pixel(at, 0, z), self.pixel(at, 0, z + length)
            if (near - far) * turned < 0:
                light = 0.95 + (0.12 if turned == self.sun_side else -0.15) * self.sunny
                for share in (0.18, 0.8):
                    wheel = _oval(share * length, 0.32, 0.32, 0.32)
                    self.polygon(lies(at, [(a / length, b) for a, b in wheel]), (18, 18, 20), CAR)
                self.polygon(lies(at, outline), _lit(paint, light), CAR)
                for share in (0.18, 0.8):
                    for radius, shade in ((0.32, (18, 18, 20)), (0.16, (120, 120, 124))):
                        wheel = _oval(share * length, 0.32, radius, radius)
                        self.polygon(lies(at, [(a / length, b) for a, b in wheel]), shade)
                for window in windows:
                    self.polygon(lies(at, window), glass)
        self._car_face(left, right, z, oncoming, kind, glass)

    def _car_face(
        self, left: float, right: float, z: float, oncoming: bool, kind: int, glass: Colour
    ) -> None:
        """Lights, number plate and bumper on the end that faces the camera."""

        def box(a: float, b: float, low: float, high: float, colour: Colour) -> None:
            self.polygon([(a, low, z), (b, low, z), (b, high, z), (a, high, z)], colour)

        middle = (left + right) / 2
        lamp = (250, 246, 220) if oncoming else (200, 30, 26)
        if not oncoming and kind >= 2:
            top = (1.8, 2.6)[kind - 2]
            box(left + 0.15, middle - 0.05, top - 0.6, top, glass)
            box(middle + 0.05, right - 0.15, top - 0.6, top, glass)
        box(left + 0.02, right - 0.02, 0.28, 0.42, (40, 40, 44))
        for a, b in ((left + 0.06, left + 0.36), (right - 0.36, right - 0.06)):
            box(a, b, 0.6, 0.76, lamp)
        box(
            middle - 0.26,
            middle + 0.26,
            0.46,
            0.57,
            (240, 238, 226) if oncoming else (232, 196, 60),
        )

    def _faces_camera(self, quad: Sequence[Point]) -> bool:
        p = [self.pixel(*point) for point in quad]
        area = sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(p, [*p[1:], p[0]]))
        return area < 0

    def _lamp(self, x: float, z: float, inward: int, high: float) -> None:
        grey = (96, 100, 104)
        post = self.board(x, z, POLE)
        post.line([(0, 0), (0, high)], 0.14, grey)
        post.line([(0, high), (inward * 1.3, high + 0.25)], 0.08, grey)
        post.polygon(
            [
                (inward * 1.0, high + 0.15),
                (inward * 1.8, high + 0.2),
                (inward * 1.8, high + 0.4),
                (inward * 1.0, high + 0.35),
            ],
            (150, 152, 150),
        )

    def _sign(self, x: float, z: float) -> None:
        high = self.between(2.0, 2.7)
        self.board(x, z, POLE).line([(0, 0), (0, high)], 0.09, (130, 132, 134))
        plate, r = self.board(x, z, SIGN), self.between(0.32, 0.5)
        shape = int(self.rng.integers(4))
        red, white, blue = (196, 32, 36), (244, 244, 240), (36, 78, 164)
        if shape == 0:  # limit
            plate.oval(0, high, r, r, red)
            plate.oval(0, high, r * 0.72, r * 0.72, white)
            plate.polygon(_oval(0, high, r * 0.3, r * 0.42), (30, 30, 32))
        elif shape == 1:  # warning
            for size, colour in ((1.0, red), (0.62, white)):
                plate.polygon(
                    [
                        (-r * size, high - r * 0.6 * size),
                        (r * size, high - r * 0.6 * size),
                        (0, high + r * 1.1 * size),
                    ],
                    colour,
                )
        elif shape == 2:  # order
            plate.oval(0, high, r, r, blue)
            plate.polygon(
                [
                    (-r * 0.1, high - r * 0.6),
                    (r * 0.1, high - r * 0.6),
                    (r * 0.1, high + r * 0.1),
                    (r * 0.35, high + r * 0.1),
                    (0, high + r * 0.7),
                    (-r * 0.35, high + r * 0.1),
                    (-r * 0.1, high + r * 0.1),
                ],
                white,
            )
        else:  # directions
            wide = r * self.between(1.3, 2.6)
            ground = self.one_of((blue, (24, 104, 70), white, (210, 150, 40)))
            plate.box(-wide, wide, high - r, high + r, ground)
            for row in (-0.45, 0.1):
                plate.box(
                    -wide * 0.8,
                    wide * 0.5,
                    high + r * row,
                    high + r * (row + 0.25),
                    _mix(ground, (255, 255, 255) if ground != white else (20, 20, 20), 0.85),
                )

    def _traffic_light(self, x: float, z: float) -> None:
        self.board(x, z, POLE).line([(0, 0), (0, 2.4)], 0.12, (60, 62, 64))
        head = self.board(x, z, SIGN)
        head.box(-0.2, 0.2, 2.2, 3.2, (24, 26, 28))
        on = int(self.rng.integers(3))
        colours = ((50, 230, 130), (250, 190, 40), (250, 50, 40))
        for k, colour in enumerate(colours):
            head.oval(0, 2.38 + 0.32 * k, 0.12, 0.12, colour if k == on else _lit(colour, 0.25))

    def _fence(self, x: float, near: float, far: float) -> None:
        metal, high = self.chance(0.6), self.between(0.9, 1.4)
        colour = self.one_of(
            ((46, 50, 52), (120, 124, 126), (38, 70, 54))
            if metal
            else ((140, 108, 78), (96, 78, 64), (176, 164, 150))
        )
        for z in np.arange(near, far, 2.0):
            self.later(_STREET, float(z), self._fence_panel, x, float(z), high, metal, colour)

    def _fence_panel(self, x: float, z: float, high: float, metal: bool, colour: Colour) -> None:
        far = z + 2.0
        top, foot = high + _KERB, 0.15 + _KERB
        panel = [(x, foot, z), (x, top, z), (x, top, far), (x, foot, far)]
        self.polygon(panel, colour, FENCE, alpha=90 if metal else 255)
        (u0, _), (u1, _) = self.pixel(x, 0, z), self.pixel(x, 0, far)
        bars = min(12, int(abs(u1 - u0) / 6))
        width = max(2, round(0.03 * self.focal / z))
        shade = self.hazed(_lit(colour, 1.0 if metal else 0.75), z)
        for k in range(bars):
            at = z + 2.0 * k / bars
            self.ink.line(
                [self.pixel(x, foot, at), self.pixel(x, top, at)], fill=shade, width=width
            )
        for y in (foot, top) if metal else ():
            self.ink.line([self.pixel(x, y, z), self.pixel(x, y, far)], fill=shade, width=width)

    def _tree(self, x: float, z: float, high: float) -> None:
        wood = _mix((70, 54, 42), (110, 98, 86), self.between(0, 1))
        tree = self.board(x, z, TREE)
        fork = high * self.between(0.22, 0.38)
        tree.line([(0, 0), (0, fork)], high * 0.04, wood)
        if self.winter:
            self._branch(tree, 0, fork * 0.95, math.pi / 2, high * 0.24, high * 0.03, wood)
            return
        leaf = self.one_of(_LEAVES)
        radius, middle = high * self.between(0.24, 0.34), (high + fork) / 2
        reach = (high - fork) / 2
        blobs = min(26, 4 + int(tree.scale * high / 20))
        for light in (0.62, 0.85, 1.1):
            lift = (light - 0.85) * 0.7
            for _ in range(blobs):
                angle, away = self.between(0, 2 * math.pi), self.between(0, 1) ** 0.5 * 0.75
                size = radius * self.between(0.16, 0.36) * (1.25 - 0.4 * light)
                tree.oval(
                    radius * (away * math.cos(angle) + lift * self.sun_side),
                    middle + reach * (away * math.sin(angle) + lift),
                    size,
                    size * 0.9,
                    _lit(leaf, light * self.between(0.9, 1.1)),
                )

    def _branch(
        self,
        tree: _Board,
        x: float,
        y: float,
        angle: float,
        length: float,
        width: float,
        wood: Colour,
    ) -> None:
        tip = (x + length * math.cos(angle), y + length * math.sin(angle))
        tree.line([(x, y), tip], width, wood)
        if length * tree.scale < 8 or length < 0.35:
            return
        for turn in (-0.5, 0.1, 0.55):
            bend = angle + turn + self.between(-0.25, 0.25)
            self._branch(tree, *tip, bend, length * self.between(0.6, 0.8), width * 0.6, wood)

    def _bush(self, x: float, z: float) -> None:
        bush, leaf = self.board(x, z, TREE), self.one_of(_LEAVES[:3])
        for light in (0.6, 0.85, 1.05):
            for _ in range(6):
                size = self.between(0.15, 0.4)
                bush.oval(
                    self.between(-0.5, 0.5),
                    self.between(0.2, 0.5) + light * 0.4,
                    size,
                    size,
                    _lit(leaf, light),
                )

    def _bin(self, x: float, z: float) -> None:
        colour = self.one_of(((40, 44, 46), (34, 70, 52), (60, 66, 96)))
        bin_ = self.board(x, z, IGNORE)
        bin_.box(-0.25, 0.25, _KERB, 0.95, colour)
        bin_.box(-0.29, 0.29, 0.9, 1.02, _lit(colour, 1.3))

    def _pedestrian(self, x: float, z: float, ground: float) -> None:
        size, stride = self.between(0.88, 1.08), self.between(0, 0.3)
        coat, legs = self.one_of(_CLOTHES), self.one_of(_CLOTHES[:4])
        skin = self.one_of(_SKINS)
        hair = self.one_of(((30, 24, 20), (96, 66, 40), (190, 160, 110), (120, 120, 122)))
        figure = self.board(x, z, PEDESTRIAN)
        figure.lift, figure.size = ground, size
        figure.shadow(0.35)
        for foot, light in ((-stride, 0.8), (stride, 1.0)):
            figure.line([(0, 0.9), (foot * 0.6, 0.45), (foot, 0.03)], 0.17, _lit(legs, light))
            figure.line([(foot - 0.05, 0.03), (foot + 0.09, 0.03)], 0.08, (24, 22, 22))
        figure.line([(0.0, 1.38), (-0.2, 1.1), (stride - 0.24, 0.85)], 0.12, _lit(coat, 0.75))
        figure.polygon(
            [(-0.17, 0.78), (0.17, 0.78), (0.23, 1.4), (0.1, 1.5), (-0.1, 1.5), (-0.23, 1.4)], coat
        )
        figure.line([(0.0, 1.38), (0.22, 1.1), (0.24 - stride, 0.85)], 0.12, _lit(coat, 1.2))
        figure.oval(0, 1.63, 0.105, 0.14, skin)
        figure.polygon(_oval(0, 1.69, 0.11, 0.1), hair)
        if self.chance(0.3):
            figure.box(0.2, 0.42, 0.55, 0.85, self.one_of(_CLOTHES))

    def _cyclist(self, x: float, z: float) -> None:
        coat, legs = self.one_of(_CLOTHES), self.one_of(_CLOTHES[:4])
        frame, skin = self.one_of(_PAINTS), self.one_of(_SKINS)
        rider = self.board(x, z, BICYCLIST, self.one_of((-1, 1)) * self.between(0.3, 1.0))
        rider.shadow(0.8)
        for hub in (-0.52, 0.52):
            rider.oval(hub, 0.34, 0.35, 0.35, (70, 70, 72), alpha=110)
            ring = [*_oval(hub, 0.34, 0.34, 0.34), (hub + 0.34, 0.34)]
            rider.line(ring, 0.05, (22, 22, 24))
        for bar in (
            ((-0.52, 0.34), (-0.15, 0.85), (0.38, 0.85), (0.52, 0.34)),
            ((-0.52, 0.34), (0.0, 0.34), (0.38, 0.85)),
            ((0.38, 0.85), (0.34, 1.05), (0.48, 1.08)),
        ):
            rider.line(bar, 0.05, frame)
        rider.line([(-0.15, 1.0), (0.16, 0.72), (0.02, 0.25)], 0.16, _lit(legs, 0.75))
        rider.line([(-0.15, 1.0), (0.2, 0.82), (0.06, 0.42)], 0.16, legs)
        rider.polygon([(-0.28, 0.9), (0.0, 0.92), (0.26, 1.42), (0.1, 1.55), (-0.1, 1.48)], coat)
        rider.line([(0.15, 1.42), (0.3, 1.15), (0.46, 1.08)], 0.11, _lit(coat, 1.15))
        rider.oval(0.22, 1.66, 0.13, 0.15, skin)
        rider.polygon(_oval(0.2, 1.73, 0.15, 0.11), self.one_of(_PAINTS))

    def _bonnet(self) -> None:
        columns, rows = self.picture.size
        shape = _oval(columns / 2, rows * 1.08, columns * 0.52, rows * self.between(0.12, 0.19), 60)
        paint = self.one_of(_PAINTS)
        self.paint(shape, paint, IGNORE)
        shine = [(x, y + rows * 0.012) for x, y in shape]
        self.paint(shine, _lit(paint, 0.75), IGNORE)

    # From the drawing to the photograph.

    def _develop(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Exposure, texture, vignette and noise."""
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


class _Board:
    """A flat figure that faces the camera at (x, 0, z); its points are metres right and up."""

    def __init__(self, scene: Scene, x: float, z: float, label: int | None, squeeze: float) -> None:
        self.scene, self.label, self.z = scene, label, z
        self.squeeze = squeeze
        self.scale = scene.focal / z
        self.foot = scene.pixel(x, 0, z)
        self.lift, self.size = 0.0, 1.0

    def _pixels(self, points: Sequence[Pixel]) -> list[Pixel]:
        (u, v), scale = self.foot, self.scale * self.size
        v -= self.lift * self.scale
        return [(u + x * self.squeeze * scale, v - y * scale) for x, y in points]

    def polygon(self, points: Sequence[Pixel], colour: Sequence[float], alpha: int = 255) -> None:
        self.scene.paint(self._pixels(points), self.scene.hazed(colour, self.z), self.label, alpha)

    def box(
        self, left: float, right: float, low: float, high: float, colour: Sequence[float]
    ) -> None:
        self.polygon([(left, low), (right, low), (right, high), (left, high)], colour)

    def oval(
        self, x: float, y: float, rx: float, ry: float, colour: Sequence[float], alpha: int = 255
    ) -> None:
        corners = 8 if rx * self.scale < 6 else 14
        self.polygon(_oval(x, y, rx, ry, corners), colour, alpha)

    def line(self, points: Sequence[Pixel], width: float, colour: Sequence[float]) -> None:
        """A line ``width`` metres wide, at least one pixel of the finished picture."""
        pixels, thick = self._pixels(points), max(_OVERSAMPLING, round(width * self.scale))
        self.scene.ink.line(
            pixels, fill=self.scene.hazed(colour, self.z), width=thick, joint="curve"
        )
        if self.label is not None:
            self.scene.truth.line(pixels, fill=self.label, width=thick, joint="curve")

    def shadow(self, radius: float) -> None:
        """The dark spot on the ground where the figure stands."""
        spot = _oval(0, 0, radius, 0.07)
        self.scene.paint(self._pixels(spot), (14, 14, 20), None, 110)
