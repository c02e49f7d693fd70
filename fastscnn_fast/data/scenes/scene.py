"""The street itself: ground, houses, and where everything stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from . import objects
from .objects import KERB, LEAVES
from .painter import (
    BACKGROUND,
    BONNET,
    BUILDING,
    BUILDINGS,
    NEAR,
    PAVEMENT,
    ROAD,
    STREET,
    TREE,
    Colour,
    Painter,
    Point,
    lit,
    mix,
)

#: Distances at which strips of ground are cut, metres: straight pieces that follow the street's bend.
_STRIPS = (1.5, 2, 2.7, 3.5, 5, 7, 9, 12, 16, 21, 28, 38, 52, 75, 110, 170)
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
_SHOPS = ((36, 66, 120), (150, 32, 36), (30, 92, 70), (228, 222, 210), (200, 140, 36), (52, 48, 60))


class Scene(Painter):
    """A street whose layout follows from chance: how wide it is, what stands along it and who is about.

    Lengths in metres from the middle of the camera's lane; ``side`` is -1 for the left and 1 for the right.
    """

    def __init__(self, seed: int, height: int, width: int) -> None:
        super().__init__(seed, height, width)
        self.lane = self.between(2.9, 3.6)
        self.parking = {side: self.one_of((0.0, 2.2)) for side in (-1, 1)}
        self.edge = {
            -1: self.lane * self.one_of((1.5, 1.5, 2.5)) + self.parking[-1],
            1: self.lane * 0.5 + 0.3 + self.parking[1],
        }
        self.line = {side: self.edge[side] + self.between(2.0, 4.2) for side in (-1, 1)}
        self.garden = {side: self.one_of((0.0, 0.0, self.between(2, 5))) for side in (-1, 1)}

        self.picture.paste(self._sky())

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
            self.later(BONNET, 0, objects.bonnet)
        mirrored = self.chance(0.5)
        self.draw_queue()
        picture, labels = self.develop()
        if mirrored:
            picture, labels = picture[:, ::-1], labels[:, ::-1]
        return np.ascontiguousarray(picture), np.ascontiguousarray(labels)

    def _sky(self) -> Image.Image:
        columns, rows = self.picture.size
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
            mix((250, 250, 250), (150, 154, 162), self.between(0, 1) * (1 - self.sunny)),
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
        asphalt = mix((84, 84, 88), (128, 122, 116), self.between(0, 1))
        paving = mix((140, 132, 126), (186, 176, 162), self.between(0, 1))
        columns, rows = self.picture.size
        below = [(0, self.horizon), (columns, self.horizon), (columns, rows), (0, rows)]
        self.paint(below, self.hazed(paving, 150), PAVEMENT)
        self._strip(-self.edge[-1], self.edge[1], asphalt, ROAD)
        self._marks(asphalt)
        for side in (-1, 1):
            edge, line, garden = (side * v[side] for v in (self.edge, self.line, self.garden))
            for near, far in pairwise(_STRIPS):
                face = [(edge, 0, near), (edge, KERB, near), (edge, KERB, far), (edge, 0, far)]
                self.polygon(face, lit(paving, 0.8), PAVEMENT)
            self._strip(edge, line + side * 30, paving, PAVEMENT, KERB)
            self._strip(edge, edge + side * 0.15, lit(paving, 1.12), None, KERB)
            z = _STRIPS[0]
            while z < 25:
                joint = [(edge, z), (line, z), (line, z + 0.04), (edge, z + 0.04)]
                self.polygon([(x, KERB, at) for x, at in joint], lit(paving, 0.85), None)
                z += 1.2
            if garden:
                self._strip(line, line + garden, self.one_of(LEAVES), TREE, KERB)

    def _marks(self, asphalt: Colour) -> None:
        white = mix((250, 248, 240), asphalt, self.between(0, 0.5))
        yellow = mix((226, 190, 70), asphalt, self.between(0, 0.4))

        def bar(left: float, right: float, near: float, far: float, colour: Colour) -> None:
            corners = ((left, near), (right, near), (right, far), (left, far))
            self.polygon([(x, 0, z) for x, z in corners], colour)

        for _ in range(int(self.rng.integers(5))):  # mended patches
            x, z = self.between(-self.edge[-1], self.edge[1] - 1), self.between(2, 25)
            patch = lit(asphalt, self.between(0.8, 1.1))
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
                self.later(BACKGROUND, z, Painter.polygon, corners, self.one_of(_WALLS), BUILDING)
            else:
                self.later(BACKGROUND, z, objects.tree, x, z, self.between(6, 14))

    def _houses(self, side: int) -> None:
        x = side * (self.line[side] + self.garden[side])
        z = self.between(-6, 0)
        while z < 130:
            length = self.between(6, 16)
            if self.chance(0.14) and z > 3:
                for _ in range(3):
                    at = z + self.between(0, length)
                    self.later(
                        BUILDINGS,
                        at,
                        objects.tree,
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
        wall = lit(wall, self.between(0.85, 1.1))
        street_light = 1 + (0.15 if side != self.sun_side else -0.3) * (0.4 + 0.6 * self.sunny)
        pitched = floors < 5 and self.chance(0.65)
        rise = self.between(1.8, 3.2) if pitched else 0.0
        shop = self.one_of(_SHOPS) if not self.garden[side] and self.chance(0.45) else None
        reach = high * 0.5 if self.sunny > 0.35 and side == self.sun_side else 0.0
        if reach:
            tip = max(-self.edge[-1], min(self.edge[1], x - side * reach), key=lambda v: v * side)
            shadow = [(x, 0.0, near), (tip, 0.0, near), (tip, 0.0, far), (x, 0.0, far)]
            start = max(near, NEAR)
            shadow = [(a, b, max(c, start)) for a, b, c in shadow]
            self.polygon(shadow, (16, 20, 40), alpha=90)

        def draw(_: Painter) -> None:
            street = [(x, 0.0, near), (x, high, near), (x, high, far), (x, 0.0, far)]
            end = x + deep
            front = [(x, 0.0, near), (end, 0.0, near), (end, high, near), (x, high, near)]
            if pitched:
                ridge = x + deep / 2
                slope = [(x, high, near), (ridge, high + rise, near), (ridge, high + rise, far)]
                slope.append((x, high, far))
                self.polygon(slope, lit(roof, street_light), BUILDING)
                front.insert(3, (ridge, high + rise, near))
            self.polygon(street, lit(wall, street_light), BUILDING)
            if near > NEAR:
                self.polygon(front, lit(wall, 0.82), BUILDING)
            self._windows(
                lambda s, t: (x, t, near + s), far - near, floors, storey, wall, street_light, shop
            )
            if near > NEAR:
                self._windows(
                    lambda s, t: (x + side * s, t, near),
                    abs(deep),
                    floors,
                    storey,
                    wall,
                    0.82,
                    None,
                )

        self.later(BUILDINGS, near, draw)

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
        frame = lit((232, 228, 220), light)
        count = max(1, int(length / self.between(2.0, 3.0)))
        wide, tall = self.between(0.8, 1.5), self.between(1.2, 1.8)
        spacing = length / count

        def panel(a: float, b: float, low: float, high: float, colour: Colour) -> None:
            self.polygon([face(a, low), face(a, high), face(b, high), face(b, low)], colour)

        if shop is not None:
            panel(0.3, length - 0.3, 0.1, 2.4, lit((54, 60, 68), light))
            panel(0.2, length - 0.2, 2.4, 3.0, lit(shop, light))
            panel(length * 0.3, length * 0.7, 2.55, 2.85, mix(shop, (245, 240, 225), 0.7))
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
                glass = mix((44, 52, 66), self.zenith, self.between(0, 1) * 0.5)
                if self.chance(0.08):
                    glass = (226, 200, 140)
                door = floor == 0 and k == count // 2
                bottom = 0.1 if door else base
                panel(left - 0.08, right + 0.08, bottom - 0.08, base + tall + 0.08, frame)
                fill = self.one_of(_SHOPS) if door else lit(glass, light)
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
            self.later(STREET, z, objects.lamp, kerb, z, -side, self.between(6, 9))
            z += self.between(15, 28)
        for _ in range(int(self.rng.integers(1, 4))):
            z = self.visible(edge) + self.between(0, 1) ** 2 * 30
            draw = objects.traffic_light if self.chance(0.3) else objects.sign
            self.later(STREET, z, draw, kerb + side * 0.35, z)
        if self.chance(0.8):
            x = side * (line if self.garden[side] or self.chance(0.4) else edge + 0.25)
            z = self.visible(x) * self.between(0.6, 1.4)
            self._fence(x, z, z + self.between(8, 30))
        if self.garden[side] and self.chance(0.5):
            z = self.between(5, 25)
            for at in np.arange(z, z + self.between(5, 25), 0.8):
                self.later(STREET, float(at), objects.bush, side * (line + 0.6), float(at))
        spacing = self.one_of((0.0, 9.0, 14.0, 22.0))
        z = self.visible(line) * self.between(0.7, 1.5)
        while spacing and z < 100:
            x = side * (edge + 0.9 if not self.garden[side] else line + self.garden[side] / 2)
            self.later(STREET, z, objects.tree, x, z, self.between(4.5, 9))
            z += spacing * self.between(0.8, 1.3)
        if self.chance(0.4):
            z = self.visible(edge) + self.between(0, 12)
            self.later(STREET, z, objects.litter_bin, kerb + side * 0.5, z)

    def _people(self, side: int) -> None:
        edge, line = self.edge[side], self.line[side]
        for k in range(int(self.rng.integers(1, 7))):
            x = side * self.between(edge + 0.7, line - 0.4)
            z = self.visible(x) + (self.between(0, 6) if k == 0 else self.between(0, 40))
            self.later(STREET, z, objects.pedestrian, x, z, KERB)
        if self.chance(0.15):
            x, z = self.between(-self.edge[-1], self.edge[1]), self.between(9, 25)
            self.later(STREET, z, objects.pedestrian, x, z, 0.0)
        for k in range(self.one_of((0, 1, 1, 2)) if side < 0 else self.one_of((1, 1, 2))):
            x = side * (edge - self.parking[side] - self.between(0.5, 1.1))
            z = self.visible(x) + (self.between(0, 10) if k == 0 else self.between(4, 30))
            self.later(STREET, z, objects.cyclist, x, z)

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
        self.later(STREET, z, objects.car, x, z, oncoming, kind)

    def _fence(self, x: float, near: float, far: float) -> None:
        metal, high = self.chance(0.6), self.between(0.9, 1.4)
        colour = self.one_of(
            ((46, 50, 52), (120, 124, 126), (38, 70, 54))
            if metal
            else ((140, 108, 78), (96, 78, 64), (176, 164, 150))
        )
        for z in np.arange(near, far, 2.0):
            self.later(STREET, float(z), objects.fence_panel, x, float(z), high, metal, colour)
