"""What stands and moves in a street: cars, people, trees, posts, fences. Each is drawn where it is asked to be."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .painter import (
    BICYCLIST,
    CAR,
    FENCE,
    IGNORE,
    PEDESTRIAN,
    POLE,
    SIGN,
    TREE,
    Board,
    Colour,
    Painter,
    Point,
    lit,
    mix,
    oval,
)

LEAVES = ((62, 96, 44), (84, 112, 50), (48, 80, 44), (104, 116, 54), (130, 106, 48), (70, 104, 70))
PAINTS = (
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
#: The height of the pavement, metres.
KERB = 0.12

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


def car(painter: Painter, x: float, z: float, oncoming: bool, kind: int) -> None:
    """A car of one of the four kinds, its near end at z, that comes towards the camera or drives away."""
    paint = painter.one_of(PAINTS)
    outline, panes, windows, length, width = _CARS[kind]
    left, right = x - width / 2, x + width / 2
    glass = mix((34, 40, 50), painter.zenith, painter.between(0, 0.3))

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
    painter.polygon([(a, 0.0, b) for a, b in shadow], (12, 12, 16), alpha=150)
    for tyre in (left + 0.05, right - 0.3):
        box = ((tyre, 0), (tyre + 0.25, 0), (tyre + 0.25, 0.4), (tyre, 0.4))
        painter.polygon([(a, b, z + 0.1) for a, b in box], (20, 20, 22), CAR)

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
        if _faces_camera(painter, across(k, 0)):
            (s0, y0), (s1, y1) = outline[k : k + 2]
            upright = abs(y1 - y0) > abs(s1 - s0) * length
            painter.polygon(across(k, 0), lit(paint, 0.82 if upright else 1.12), CAR)
            if k in panes:
                painter.polygon(across(k, 0.12), glass)
    for at, turned in ((left, -1), (right, 1)):
        (near, _), (far, _) = painter.pixel(at, 0, z), painter.pixel(at, 0, z + length)
        if (near - far) * turned < 0:
            light = 0.95 + (0.12 if turned == painter.sun_side else -0.15) * painter.sunny
            for share in (0.18, 0.8):
                wheel = oval(share * length, 0.32, 0.32, 0.32)
                painter.polygon(lies(at, [(a / length, b) for a, b in wheel]), (18, 18, 20), CAR)
            painter.polygon(lies(at, outline), lit(paint, light), CAR)
            for share in (0.18, 0.8):
                for radius, shade in ((0.32, (18, 18, 20)), (0.16, (120, 120, 124))):
                    wheel = oval(share * length, 0.32, radius, radius)
                    painter.polygon(lies(at, [(a / length, b) for a, b in wheel]), shade)
            for window in windows:
                painter.polygon(lies(at, window), glass)
    _car_face(painter, left, right, z, oncoming, kind, glass)


def _car_face(
    painter: Painter, left: float, right: float, z: float, oncoming: bool, kind: int, glass: Colour
) -> None:
    """Lights, number plate and bumper on the end that faces the camera."""

    def box(a: float, b: float, low: float, high: float, colour: Colour) -> None:
        painter.polygon([(a, low, z), (b, low, z), (b, high, z), (a, high, z)], colour)

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


def _faces_camera(painter: Painter, quad: Sequence[Point]) -> bool:
    p = [painter.pixel(*point) for point in quad]
    area = sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(p, [*p[1:], p[0]]))
    return area < 0


def lamp(painter: Painter, x: float, z: float, inward: int, high: float) -> None:
    """A street lamp whose arm points to the street."""
    grey = (96, 100, 104)
    post = painter.board(x, z, POLE)
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


def sign(painter: Painter, x: float, z: float) -> None:
    """A limit, a warning, an order or directions on a post."""
    high = painter.between(2.0, 2.7)
    painter.board(x, z, POLE).line([(0, 0), (0, high)], 0.09, (130, 132, 134))
    plate, r = painter.board(x, z, SIGN), painter.between(0.32, 0.5)
    shape = int(painter.rng.integers(4))
    red, white, blue = (196, 32, 36), (244, 244, 240), (36, 78, 164)
    if shape == 0:  # limit
        plate.oval(0, high, r, r, red)
        plate.oval(0, high, r * 0.72, r * 0.72, white)
        plate.polygon(oval(0, high, r * 0.3, r * 0.42), (30, 30, 32))
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
        wide = r * painter.between(1.3, 2.6)
        ground = painter.one_of((blue, (24, 104, 70), white, (210, 150, 40)))
        plate.box(-wide, wide, high - r, high + r, ground)
        for row in (-0.45, 0.1):
            plate.box(
                -wide * 0.8,
                wide * 0.5,
                high + r * row,
                high + r * (row + 0.25),
                mix(ground, (255, 255, 255) if ground != white else (20, 20, 20), 0.85),
            )


def traffic_light(painter: Painter, x: float, z: float) -> None:
    """One of its three lights is on."""
    painter.board(x, z, POLE).line([(0, 0), (0, 2.4)], 0.12, (60, 62, 64))
    head = painter.board(x, z, SIGN)
    head.box(-0.2, 0.2, 2.2, 3.2, (24, 26, 28))
    on = int(painter.rng.integers(3))
    colours = ((50, 230, 130), (250, 190, 40), (250, 50, 40))
    for k, colour in enumerate(colours):
        head.oval(0, 2.38 + 0.32 * k, 0.12, 0.12, colour if k == on else lit(colour, 0.25))


def fence_panel(
    painter: Painter, x: float, z: float, high: float, metal: bool, colour: Colour
) -> None:
    """Two metres of a fence along the street."""
    far = z + 2.0
    top, foot = high + KERB, 0.15 + KERB
    panel = [(x, foot, z), (x, top, z), (x, top, far), (x, foot, far)]
    painter.polygon(panel, colour, FENCE, alpha=90 if metal else 255)
    (u0, _), (u1, _) = painter.pixel(x, 0, z), painter.pixel(x, 0, far)
    bars = min(12, int(abs(u1 - u0) / 6))
    width = max(2, round(0.03 * painter.focal / z))
    shade = painter.hazed(lit(colour, 1.0 if metal else 0.75), z)
    for k in range(bars):
        at = z + 2.0 * k / bars
        painter.ink.line(
            [painter.pixel(x, foot, at), painter.pixel(x, top, at)], fill=shade, width=width
        )
    for y in (foot, top) if metal else ():
        painter.ink.line(
            [painter.pixel(x, y, z), painter.pixel(x, y, far)], fill=shade, width=width
        )


def tree(painter: Painter, x: float, z: float, high: float) -> None:
    """In leaf, or bare in winter."""
    wood = mix((70, 54, 42), (110, 98, 86), painter.between(0, 1))
    tree = painter.board(x, z, TREE)
    fork = high * painter.between(0.22, 0.38)
    tree.line([(0, 0), (0, fork)], high * 0.04, wood)
    if painter.winter:
        _branch(painter, tree, 0, fork * 0.95, math.pi / 2, high * 0.24, high * 0.03, wood)
        return
    leaf = painter.one_of(LEAVES)
    radius, middle = high * painter.between(0.24, 0.34), (high + fork) / 2
    reach = (high - fork) / 2
    blobs = min(26, 4 + int(tree.scale * high / 20))
    for light in (0.62, 0.85, 1.1):
        lift = (light - 0.85) * 0.7
        for _ in range(blobs):
            angle, away = painter.between(0, 2 * math.pi), painter.between(0, 1) ** 0.5 * 0.75
            size = radius * painter.between(0.16, 0.36) * (1.25 - 0.4 * light)
            tree.oval(
                radius * (away * math.cos(angle) + lift * painter.sun_side),
                middle + reach * (away * math.sin(angle) + lift),
                size,
                size * 0.9,
                lit(leaf, light * painter.between(0.9, 1.1)),
            )


def _branch(
    painter: Painter,
    tree: Board,
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
        bend = angle + turn + painter.between(-0.25, 0.25)
        _branch(painter, tree, *tip, bend, length * painter.between(0.6, 0.8), width * 0.6, wood)


def bush(painter: Painter, x: float, z: float) -> None:
    """A piece of a hedge."""
    bush, leaf = painter.board(x, z, TREE), painter.one_of(LEAVES[:3])
    for light in (0.6, 0.85, 1.05):
        for _ in range(6):
            size = painter.between(0.15, 0.4)
            bush.oval(
                painter.between(-0.5, 0.5),
                painter.between(0.2, 0.5) + light * 0.4,
                size,
                size,
                lit(leaf, light),
            )


def litter_bin(painter: Painter, x: float, z: float) -> None:
    """A bin, which belongs to no class."""
    colour = painter.one_of(((40, 44, 46), (34, 70, 52), (60, 66, 96)))
    bin_ = painter.board(x, z, IGNORE)
    bin_.box(-0.25, 0.25, KERB, 0.95, colour)
    bin_.box(-0.29, 0.29, 0.9, 1.02, lit(colour, 1.3))


def pedestrian(painter: Painter, x: float, z: float, ground: float) -> None:
    """Somebody who walks on ``ground``, metres above the street."""
    size, stride = painter.between(0.88, 1.08), painter.between(0, 0.3)
    coat, legs = painter.one_of(_CLOTHES), painter.one_of(_CLOTHES[:4])
    skin = painter.one_of(_SKINS)
    hair = painter.one_of(((30, 24, 20), (96, 66, 40), (190, 160, 110), (120, 120, 122)))
    figure = painter.board(x, z, PEDESTRIAN)
    figure.lift, figure.size = ground, size
    figure.shadow(0.35)
    for foot, light in ((-stride, 0.8), (stride, 1.0)):
        figure.line([(0, 0.9), (foot * 0.6, 0.45), (foot, 0.03)], 0.17, lit(legs, light))
        figure.line([(foot - 0.05, 0.03), (foot + 0.09, 0.03)], 0.08, (24, 22, 22))
    figure.line([(0.0, 1.38), (-0.2, 1.1), (stride - 0.24, 0.85)], 0.12, lit(coat, 0.75))
    figure.polygon(
        [(-0.17, 0.78), (0.17, 0.78), (0.23, 1.4), (0.1, 1.5), (-0.1, 1.5), (-0.23, 1.4)], coat
    )
    figure.line([(0.0, 1.38), (0.22, 1.1), (0.24 - stride, 0.85)], 0.12, lit(coat, 1.2))
    figure.oval(0, 1.63, 0.105, 0.14, skin)
    figure.polygon(oval(0, 1.69, 0.11, 0.1), hair)
    if painter.chance(0.3):
        figure.box(0.2, 0.42, 0.55, 0.85, painter.one_of(_CLOTHES))


def cyclist(painter: Painter, x: float, z: float) -> None:
    """Somebody on a bicycle, seen from any side."""
    coat, legs = painter.one_of(_CLOTHES), painter.one_of(_CLOTHES[:4])
    frame, skin = painter.one_of(PAINTS), painter.one_of(_SKINS)
    rider = painter.board(x, z, BICYCLIST, painter.one_of((-1, 1)) * painter.between(0.3, 1.0))
    rider.shadow(0.8)
    for hub in (-0.52, 0.52):
        rider.oval(hub, 0.34, 0.35, 0.35, (70, 70, 72), alpha=110)
        ring = [*oval(hub, 0.34, 0.34, 0.34), (hub + 0.34, 0.34)]
        rider.line(ring, 0.05, (22, 22, 24))
    for bar in (
        ((-0.52, 0.34), (-0.15, 0.85), (0.38, 0.85), (0.52, 0.34)),
        ((-0.52, 0.34), (0.0, 0.34), (0.38, 0.85)),
        ((0.38, 0.85), (0.34, 1.05), (0.48, 1.08)),
    ):
        rider.line(bar, 0.05, frame)
    rider.line([(-0.15, 1.0), (0.16, 0.72), (0.02, 0.25)], 0.16, lit(legs, 0.75))
    rider.line([(-0.15, 1.0), (0.2, 0.82), (0.06, 0.42)], 0.16, legs)
    rider.polygon([(-0.28, 0.9), (0.0, 0.92), (0.26, 1.42), (0.1, 1.55), (-0.1, 1.48)], coat)
    rider.line([(0.15, 1.42), (0.3, 1.15), (0.46, 1.08)], 0.11, lit(coat, 1.15))
    rider.oval(0.22, 1.66, 0.13, 0.15, skin)
    rider.polygon(oval(0.2, 1.73, 0.15, 0.11), painter.one_of(PAINTS))


def bonnet(painter: Painter) -> None:
    """The lower end of the picture: the camera's own car, which belongs to no class."""
    columns, rows = painter.picture.size
    shape = oval(columns / 2, rows * 1.08, columns * 0.52, rows * painter.between(0.12, 0.19), 60)
    paint = painter.one_of(PAINTS)
    painter.paint(shape, paint, IGNORE)
    shine = [(x, y + rows * 0.012) for x, y in shape]
    painter.paint(shine, lit(paint, 0.75), IGNORE)
