"""Pictures in tiles: what blending is, what tiles share with the whole picture, how little is in memory."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from fastscnn_fast import FastSCNN, FusedFastSCNN, bench, fuse, segment
from fastscnn_fast.data.rows import PngRows
from fastscnn_fast.data.scenes import street
from fastscnn_fast.runtime.tiles import spans, tiling


@pytest.fixture(scope="module")
def model() -> FastSCNN:
    return bench.untrained_model(num_classes=5)


@pytest.fixture(scope="module")
def fast(model: FastSCNN) -> FusedFastSCNN:
    return fuse(model)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return street(3, 203, 331)[0]


def test_tiles_cover_a_side_and_never_three_meet() -> None:
    for length, tile, overlap in itertools.product(
        (1, 20, 63, 64, 65, 100, 128, 300, 1000, 1024),
        (64, 96, 100, 131, 256),
        (0, 1, 17, 32, 48, 64),
    ):
        try:
            tiling(tile, overlap)
        except ValueError:
            assert overlap > tile // 2 - 16
            continue
        found = spans(length, tile, overlap)
        assert found[0].start == 0 and found[-1].stop == length and found[0].blend == (0, 0)
        assert all(one.start % 32 == 0 and 0 < one.stop - one.start <= tile for one in found)
        assert all(one.stop - one.start == tile for one in found[:-1])
        assert len(found) == 1 or found[-1].stop - found[-1].start >= max(33, tile - 31)
        for one, other in itertools.pairwise(found):
            assert one.start < other.start < one.stop or overlap == 0
            assert other.blend == (one.stop - overlap, one.stop)
            assert other.blend[0] >= max(one.blend[1], other.start)


@pytest.mark.parametrize(
    ("tile", "overlap"), [((96, 128), 32), ((64, 64), 0), ((131, 100), 20), ((128, 160), 64)]
)
@pytest.mark.parametrize("classes", [1, 5])
def test_labels_are_those_of_the_blended_logits(
    fast: FusedFastSCNN, pixels: np.ndarray, tile: tuple[int, int], overlap: int, classes: int
) -> None:
    """Against weights written out for each pixel, in float64."""
    if classes == 1:
        fast = fuse(bench.untrained_model(num_classes=1))
    height, width = pixels.shape[:2]
    total, weights = np.zeros((classes, height, width)), np.zeros((height, width))
    own = np.full((height, width), 255, np.uint8)  # of pixels where no tiles are blended

    def weight(sides: list[Any], index: int) -> np.ndarray:
        one = sides[index]
        at = np.arange(one.start, one.stop)
        found = np.ones(len(at))
        if index > 0:
            first, last = sides[index - 1].stop - overlap, sides[index - 1].stop
            found[at < last] = (at[at < last] - first + 0.5) / max(overlap, 1)
        if index + 1 < len(sides):
            out = at >= one.stop - overlap
            found[out] = 1 - (at[out] - (one.stop - overlap) + 0.5) / max(overlap, 1)
        return found.clip(0, 1)

    down, across = spans(height, tile[0], overlap), spans(width, tile[1], overlap)
    for i, j in itertools.product(range(len(down)), range(len(across))):
        rows, columns = slice(*down[i][:2]), slice(*across[j][:2])
        x = torch.from_numpy(pixels[rows, columns].copy()).permute(2, 0, 1)[None]
        share = np.outer(weight(down, i), weight(across, j))
        total[:, rows, columns] += share * fast(x)[0].double().numpy()
        weights[rows, columns] += share
        own[rows, columns][share == 1] = fast.labels(x)[0].numpy()[share == 1]
    assert np.abs(weights - 1).max() < 1e-12 and (own != 255).any()
    labels, confidence = segment(fast, pixels, tile=tile, overlap=overlap, confidence=True)
    assert np.array_equal(labels[own != 255], own[own != 255])
    ordered = np.sort(total, 0) if classes > 1 else np.stack([np.zeros_like(total[0]), total[0]])
    clear = np.abs(ordered[-1] - ordered[-2]) > 1e-3
    expected = total.argmax(0) if classes > 1 else total[0] > 0
    assert clear.mean() > 0.9 and np.array_equal(labels[clear], expected[clear])
    odds = np.exp(total - total.max(0)) if classes > 1 else np.exp(-np.abs(total))
    probable = 1 / odds.sum(0) if classes > 1 else 1 / (1 + odds[0])
    assert np.abs(confidence - probable)[clear].max() < 1e-4
    assert np.array_equal(labels, segment(fast, pixels, tile=tile, overlap=overlap))


def test_one_tile_is_the_picture_in_one_piece(fast: FusedFastSCNN, pixels: np.ndarray) -> None:
    for picture in (pixels, pixels[:20, :40], pixels[:1, :1], pixels[:20]):
        size = (max(32, len(picture)), max(32, picture.shape[1]))
        found = segment(fast, picture, tile=(1024, 2048))
        assert found.shape == picture.shape[:2]
        if size == found.shape:
            assert np.array_equal(found, segment(fast, picture, size))
    assert segment(fast, pixels[:20], tile=64, overlap=16).shape == (20, 331)


def test_away_from_the_seams_labels_are_those_of_one_piece() -> None:
    """Where the network sees no further than a tile: here the pooled features, which see the whole picture, are
    taken away, and what is left reaches 320 pixels far. Sides are multiples of 32, as tiles begin."""
    model = bench.untrained_model(num_classes=5)
    with torch.no_grad():
        for branch in model.global_features.pyramid.branches:
            for norm in (one for one in branch.modules() if isinstance(one, torch.nn.BatchNorm2d)):
                norm.weight.zero_()
                norm.bias.zero_()
    fast = fuse(model)
    reach, tile, overlap = 320, 768, 64
    picture = np.ascontiguousarray(np.tile(street(3, 256, 331)[0], (1, 5, 1))[:, :1472])
    whole = segment(fast, picture, picture.shape[:2])
    found = segment(fast, picture, tile=tile, overlap=overlap)
    left, right = spans(1472, tile, overlap)
    away = np.ones(1472, bool)
    away[min(left.stop - reach, right.blend[0]) : right.start + reach] = False
    assert away.sum() > 700
    assert np.array_equal(found[:, away], whole[:, away])
    assert not np.array_equal(found, whole)


def test_lists_and_arrays_to_fill(fast: FusedFastSCNN, pixels: np.ndarray, tmp_path: Path) -> None:
    expected = segment(fast, pixels, tile=96, overlap=16)
    found = segment(fast, [pixels, pixels[:100]], tile=96, overlap=16)
    assert np.array_equal(found[0], expected) and found[1].shape == (100, 331)
    out = np.lib.format.open_memmap(tmp_path / "labels.npy", "w+", np.uint8, expected.shape)
    assert segment(fast, pixels, tile=96, overlap=16, out=out) is out
    assert np.array_equal(np.load(tmp_path / "labels.npy"), expected)
    own = np.zeros((203, 331), np.uint8)
    assert segment(fast, pixels, out=own) is own and np.array_equal(own, segment(fast, pixels))


def test_what_is_no_tiling_is_refused(fast: FusedFastSCNN, pixels: np.ndarray) -> None:
    wrong: Any
    for wrong, said in (
        ({"tile": 32}, "tile must be at least 64x64, got 32x32"),
        ({"tile": 8}, "tile must be at least 32x32, got 8x8"),
        ({"tile": (64, 64, 3)}, r"tile must be \(height, width\), two integers"),
        ({"tile": 128, "overlap": 65}, "overlap must be from 0 to 64, .*128x128.*, got 65"),
        ({"tile": (128, 100), "overlap": 50}, "overlap must be from 0 to 36, .*, got 50"),
        ({"tile": 128, "overlap": -1}, "overlap must be from 0 to 64, .*, got -1"),
        ({"tile": 256, "size": 256}, "size must be None with tile, .*, got 256"),
        ({"overlap": 64}, "overlap must be None without tile, got 64"),
        ({"tile": 256, "out": np.zeros((9, 9), np.uint8)}, r"out must be \(203, 331\) like the"),
    ):
        with pytest.raises(ValueError, match=said):
            segment(fast, pixels, **wrong)
    for wrong, said in (
        ({"tile": "big"}, "tile must be"),
        ({"tile": 128, "overlap": 1.5}, "overlap must be an integer, got 1.5"),
        ({"out": [[0]]}, r"out must be a uint8 array \(H, W\), got list"),
    ):
        with pytest.raises(TypeError, match=said):
            segment(fast, pixels, **wrong)
    with pytest.raises(ValueError, match="out must be None for a list of pictures"):
        segment(fast, [pixels], out=np.zeros((203, 331), np.uint8))


# ---------------------------------------------------------------- written by rows


@pytest.mark.parametrize("kind", ["grey", "palette", "colour"])
def test_png_by_rows_is_the_picture(tmp_path: Path, kind: str) -> None:
    rows = np.random.default_rng(1).integers(
        0, 5, (50, 33, 3)[: 3 if kind == "colour" else 2], np.uint8
    )
    palette = [(k, 2 * k, 99) for k in range(5)] if kind == "palette" else ()
    with (tmp_path / "a.png").open("xb") as file:
        png = PngRows(file, 33, kind == "colour", palette)
        for top in (0, 1, 8, 49):
            png.write(rows[top : {0: 1, 1: 8, 8: 49, 49: 50}[top]])
        png.close()
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == {"grey": "L", "palette": "P", "colour": "RGB"}[kind]
        assert np.array_equal(np.asarray(image), rows)
        if palette:
            assert (np.asarray(image.convert("RGB")) == np.array(palette)[rows]).all()


PEAK = """
import resource, sys
from fastscnn_fast import fuse, load_checkpoint
from fastscnn_fast.data.windows import open_rows
from fastscnn_fast.runtime.tiles import bands, tiling
fast = fuse(load_checkpoint())
for path in sys.argv[1:]:
    with open_rows(path, 3) as rows:
        print(sum(len(band.labels) for band in bands(fast, rows, tiling((256, 512), 32))))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_memory_is_that_of_a_row_of_tiles(tmp_path: Path) -> None:
    """A picture of 54 MB takes hardly more than one of 9 MB."""
    paths = []
    for height in (1000, 6000):
        paths.append(tmp_path / f"{height}.tif")
        with tifffile.TiffWriter(paths[-1]) as file:
            count = 12 * -(-height // 256)
            tiles = (np.full((256, 256, 3), 7 * k % 256, np.uint8) for k in range(count))
            stored = {"tile": (256, 256), "compression": "zlib", "photometric": "rgb"}
            file.write(tiles, shape=(height, 3000, 3), dtype=np.uint8, **stored)
    command = [sys.executable, "-c", PEAK, *map(str, paths)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert printed[::2] == ["1000", "6000"]
    assert float(printed[3]) - float(printed[1]) < 18
