"""Pieces land where they can stand, with their labels; colours move; weather leaves labels; all of it by seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from fastscnn_fast.data import scenery
from fastscnn_fast.data.scenery import Pieces, Scenery, Styles, components, mixed
from fastscnn_fast.data.scenes import street

Pixels = NDArray[np.uint8]
SKY, POLE, ROAD = 0, 2, 3


@pytest.fixture(scope="module")
def streets() -> list[tuple[Pixels, Pixels]]:
    return [street(seed, 90, 120) for seed in range(6)]


def coloured(labels: Pixels) -> Pixels:
    """A picture whose red tells each pixel's label."""
    return np.stack([labels * 20, labels * 0 + 90, labels * 0 + 9], -1)


def flooded(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Connected parts, the slow way: each pixel takes its neighbours' least number until none changes."""
    height, width = mask.shape
    ids = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(np.where(mask, ids, mask.size + 1), 1, constant_values=mask.size + 1)
        shifted = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
        least = np.where(mask, np.min(shifted, 0), 0)
        if np.array_equal(least, ids):
            return ids
        ids = least


@pytest.mark.parametrize("density", [0.0, 0.2, 0.45, 0.7, 1.0])
def test_components(density: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for shape in ((1, 1), (1, 9), (9, 1), (17, 23), (40, 31)):
        mask = rng.random(shape) < density
        ids, boxes = components(mask)
        assert ids.shape == shape and np.array_equal(ids > 0, mask)
        expected = flooded(mask)
        pairs = set(zip(ids[mask].tolist(), expected[mask].tolist()))
        assert len(pairs) == len(boxes) == len(np.unique(expected[mask]))
        assert {part for part, _ in pairs} == set(range(1, len(boxes) + 1))
        for part, box in enumerate(boxes.tolist(), 1):
            rows, columns = np.nonzero(ids == part)
            assert box == [rows.min(), rows.max() + 1, columns.min(), columns.max() + 1]


def road_with_poles() -> Pixels:
    """Sky above a road on which poles stand: one whole, one cut off by the border, one of a single pixel."""
    labels = np.full((100, 140), SKY, np.uint8)
    labels[60:] = ROAD
    labels[40:70, 50:55] = labels[30:80, :4] = labels[90, 100] = POLE
    return labels


def test_pieces_are_whole_and_large_enough() -> None:
    labels = road_with_poles()
    pieces = Pieces([(coloured(labels), labels)], [POLE])
    ((piece,),) = pieces.by_class
    assert piece.labels.shape == (30, 5) and (piece.labels == POLE).all() and piece.mask.all()
    assert np.array_equal(piece.picture, coloured(piece.labels))
    assert (piece.top, piece.height, piece.width, piece.foot) == (0.4, 0.3, 0.05, 0.5)
    assert piece.ground == ROAD


def test_pieces_touch_what_they_stood_on(seed: int) -> None:
    source, target = road_with_poles(), np.full((75, 110), SKY, np.uint8)
    target[45:, 30:80] = ROAD
    pieces = Pieces([(coloured(source), source)], [POLE])
    rng, pasted = np.random.default_rng(seed), 0
    before = coloured(target)
    for _ in range(60):
        picture, labels = pieces.pasted(before, target, 1, rng)
        assert np.array_equal(before, coloured(target))  # new arrays
        rows, columns = np.nonzero(labels == POLE)
        changed = labels != target
        assert (labels[changed] == POLE).all()
        assert np.array_equal(np.rint(picture[..., 0] / 20)[changed], labels[changed])
        if not len(rows):
            continue
        pasted += 1
        below = labels[rows.max() + 1, columns.min() : columns.max() + 1]
        assert ROAD in below
        near = (rows.max() + 1 - rows.min()) / (0.3 * 75)
        assert 0.5 < near < 1.7
        assert rows.min() == pytest.approx(75 * (0.5 + near * (0.4 - 0.5)), abs=1.5)
    assert pasted > 40
    untouched = pieces.pasted(before, np.full_like(target, SKY), 5, rng)
    assert np.array_equal(untouched[0], before) and (untouched[1] == SKY).all()


def test_every_class_is_pasted_as_often(streets: list[tuple[Pixels, Pixels]]) -> None:
    pieces = Pieces(streets, [2, 6, 9, 10])
    assert len(pieces.by_class) > 1
    counts = [len(kind) for kind in pieces.by_class]
    few = Pieces(streets, [2, 6, 9, 10], memory=0)
    assert sum(len(kind) for kind in few.by_class) < sum(counts)
    nothing = Pieces(streets, [])
    assert nothing.by_class == []
    picture, labels = nothing.pasted(*streets[0], 3, np.random.default_rng(0))
    assert np.array_equal(picture, streets[0][0]) and np.array_equal(labels, streets[0][1])


@pytest.mark.parametrize("size", [(90, 120), (45, 77)])
def test_mixed_takes_half_of_the_classes(size: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    own = np.zeros((90, 120), np.uint8)
    rows = np.arange(size[0]) * 4 // size[0] + 1  # labels 1 to 4, in bands
    other = np.repeat(rows[:, None], size[1], 1).astype(np.uint8)
    for _ in range(10):
        picture, labels = mixed(coloured(own), own, (coloured(other), other), rng)
        assert picture.shape == (90, 120, 3) and labels.shape == (90, 120)
        assert picture.dtype == labels.dtype == np.uint8
        assert len(np.unique(labels)) == 3 and labels.min() == 0
        same = np.rint(picture[..., 0] / 20) == labels
        assert same.all() if size == own.shape else same.mean() > 0.9


def test_styles_reach_the_other_pictures_statistics(
    streets: list[tuple[Pixels, Pixels]], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = streets[0][0] // 4 + 96  # far from black and white, where nothing is clipped
    styles = Styles([(streets[1][0] // 4 + 80, streets[1][1])])
    assert styles.statistics.shape == (1, 2, 3)
    own = scenery._statistics(picture)
    for k in range(5):
        share = np.random.default_rng(k)
        share.integers(1)
        moved = own + share.uniform(0.3, 1) * (styles.statistics[0] - own)
        seen = scenery._statistics(styles.applied(picture, np.random.default_rng(k)))
        assert np.allclose(seen[0], moved[0], atol=1)
        assert (np.abs(seen[1] - moved[1]) < 2).all()  # deviations move by ratios
    monkeypatch.setattr(scenery, "_MOST_STYLES", 2)
    assert len(Styles(streets, streets[:3]).statistics) == 4
    assert Styles().statistics.size == 0


@pytest.mark.parametrize("change", [change for change, _ in scenery._WEATHER])
@pytest.mark.parametrize("size", [(1, 1), (33, 49), (90, 120)])
def test_weather(
    change: Callable[[Pixels, np.random.Generator], Pixels], size: tuple[int, int], seed: int
) -> None:
    picture = street(3, *size)[0]
    before = picture.copy()
    changed = 0
    for k in range(5):
        one, two = (change(picture, np.random.default_rng((seed, k))) for _ in range(2))
        assert one.shape == picture.shape and one.dtype == np.uint8
        assert np.array_equal(one, two)
        changed += not np.array_equal(one, picture)
    assert np.array_equal(picture, before)
    assert changed >= 2 or size == (1, 1)  # a shadow may fall beside the picture


def test_grey_and_shadow_do_what_they_say() -> None:
    picture = street(3, 90, 120)[0]
    rng = np.random.default_rng(0)
    for _ in range(5):
        spread = np.ptp(scenery.grey(picture, rng).astype(int), -1)
        assert spread.mean() < 0.4 * np.ptp(picture.astype(int), -1).mean() + 1
        assert (scenery.shadow(picture, rng) <= picture).all()


def test_scenery(streets: list[tuple[Pixels, Pixels]], seed: int) -> None:
    """By seed alone; what is switched off changes nothing; weather and styles leave labels alone."""
    pieces, styles = Pieces(streets, [2, 6, 9, 10]), Styles(streets)
    off = Scenery(streets, pieces, styles)
    colours = Scenery(streets, pieces, styles, style=1.0, weather=1.0)
    things = Scenery(streets, pieces, styles, mix=0.5, paste=4.0)
    everything = Scenery(streets, pieces, styles, 0.5, 4.0, 1.0, 1.0)
    recoloured = moved = 0
    for k in range(12):
        own = streets[k % 6]

        def run(change: Scenery, k: int = k, own: tuple[Pixels, Pixels] = own) -> list[Pixels]:
            return list(change(*own, np.random.default_rng((seed, k))))

        assert all(map(np.array_equal, run(off), own))
        assert all(map(np.array_equal, run(everything), run(everything)))
        picture, labels = run(colours)
        recoloured += not np.array_equal(picture, own[0])  # a picture may get its own colours
        assert np.array_equal(labels, own[1])
        picture, labels = run(things)
        assert picture.shape == own[0].shape and labels.shape == own[1].shape
        moved += not np.array_equal(labels, own[1])
    assert recoloured >= 4 and moved >= 4
    for k, before in enumerate(streets):  # what was changed were copies
        assert all(map(np.array_equal, before, street(k, 90, 120)))
