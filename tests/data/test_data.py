"""The drawn streets: exact, repeatable, varied, and with every class in most of them."""

from __future__ import annotations

import numpy as np
import pytest

from fastscnn_fast.data import classes as data
from fastscnn_fast.data.scenes import painter, street


@pytest.fixture(scope="module")
def streets() -> list[tuple[np.ndarray, np.ndarray]]:
    return [street(seed) for seed in range(24)]


def test_a_street_is_a_picture_and_its_labels(streets):
    for picture, labels in streets:
        assert (picture.shape, picture.dtype) == ((360, 480, 3), np.uint8)
        assert (labels.shape, labels.dtype) == ((360, 480), np.uint8)
        assert labels.max() <= data.CAMVID_IGNORE
        assert picture.flags.c_contiguous and labels.flags.c_contiguous


def test_the_same_numbers_give_the_same_bytes_and_leave_the_global_generator_alone(streets):
    before = np.random.get_state()[1].copy()
    again = street(5)
    assert all(map(np.array_equal, again, streets[5]))
    assert np.array_equal(np.random.get_state()[1], before)


def test_seeds_differ(streets):
    assert len({labels.tobytes() for _, labels in streets}) == len(streets)
    brightness = [picture.mean() for picture, _ in streets]
    assert max(brightness) - min(brightness) > 40


def test_every_class_is_in_most_scenes(streets):
    counts = np.array([np.bincount(labels.ravel(), minlength=12) for _, labels in streets])
    frequent = (counts[:, :11] >= 100).mean(axis=0)
    assert frequent.min() >= 0.75, dict(zip(data.CAMVID_CLASSES, frequent))
    assert counts[:, data.CAMVID_IGNORE].sum() > 0


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (33, 49), (200, 60), (128, 512)])
def test_any_size(size):
    picture, labels = street(3, *size)
    assert picture.shape == (*size, 3) and labels.shape == size


def test_the_size_is_only_the_resolution():
    small, large = street(7, 180, 240)[1], street(7, 360, 480)[1]
    same = np.repeat(np.repeat(small, 2, 0), 2, 1) == large
    assert same.mean() > 0.93


def test_labels_lie_exactly_on_the_picture(streets):
    """Moved by two pixels in any direction, the labels explain the colours less well."""
    for picture, labels in streets[:8]:
        scatter = {
            move: _scatter(picture, np.roll(labels, move, (0, 1)))
            for move in ((0, 0), (2, 0), (-2, 0), (0, 2), (0, -2))
        }
        assert min(scatter, key=scatter.__getitem__) == (0, 0), scatter


def _scatter(picture: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared distance of the pixels from the mean colour of the region that they belong to."""
    blocks = (np.arange(360)[:, None] // 24) * 20 + np.arange(480) // 24
    region = (blocks * 12 + labels).ravel()
    size = np.maximum(np.bincount(region), 1)
    values = picture.reshape(-1, 3).astype(float)
    return sum(
        ((v - (np.bincount(region, v) / size)[region]) ** 2).mean()
        for v in np.moveaxis(values, 1, 0)
    )


def test_what_no_street_can_be():
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        street(-1)
    with pytest.raises(ValueError, match="height and width must be at least 1, got 0x5"):
        street(0, 0, 5)


@pytest.mark.parametrize("count", [1, 2, 11, 19, 21, 150, 256])
def test_every_class_count_has_names_and_distinct_colours(count):
    names = data.numbered(count)
    palette = data.colours_of(names)
    assert len(names) == len(set(names)) == len(palette) == count
    assert count > 21 or len(set(palette)) == count
    assert all(0 <= channel <= 255 for colour in palette for channel in colour)


def test_the_ids_the_renderer_draws_are_camvids():
    for name in data.CAMVID_CLASSES:
        attribute = {"SignSymbol": "SIGN"}.get(name, name.upper())
        assert data.CAMVID_CLASSES[getattr(painter, attribute)] == name


def test_colours_are_camvids_and_cityscapes_for_their_names_alone():
    for names, palette in (
        (data.CAMVID_CLASSES, data.CAMVID_PALETTE),
        (data.CITYSCAPES_CLASSES, data.CITYSCAPES_PALETTE),
    ):
        assert data.colours_of(names) == data.colours_of(list(names)) == palette
        for other in (data.numbered(len(names)), names[::-1]):
            assert data.colours_of(other) != palette
            assert data.colours_of(other) == data.colours_of(data.numbered(len(names)))
    assert data.numbered(11)[3] == "class 3"
