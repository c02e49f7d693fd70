"""Rows of pictures are those of the whole picture, however it is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from fastscnn_fast.data import windows
from fastscnn_fast.data.pictures import Guess, read_picture
from fastscnn_fast.data.windows import open_rows

HEIGHT, WIDTH = 101, 77


def noise(shape: tuple[int, ...], dtype: Any = np.uint8, most: int = 256) -> np.ndarray:
    """Smooth enough for JPEG: a random picture, enlarged."""
    small = np.random.default_rng(5).integers(0, most, (13, 10, *shape[2:]))
    return small.repeat(8, 0).repeat(8, 1)[: shape[0], : shape[1]].astype(dtype)


def agrees(path: Path, channels: int = 3, bits: int | None = None) -> np.ndarray:
    """That rows from everywhere are those of the picture that Pillow reads; the picture."""
    with Image.open(path) as image:
        expected = read_picture(image, channels, bits)
    with open_rows(path, channels, bits) as rows:
        height, width = rows.height, rows.width
        assert (height, width) == expected.shape[:2]
        for top, bottom in ((0, height), (0, 1), (height - 1, height), (13, 64), (31, 33)):
            found = rows.read(top, bottom)
            assert found.dtype == np.uint8 and np.array_equal(found, expected[top:bottom])
    return expected


@pytest.fixture
def windowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading whole is an error."""

    def whole(picture: Any, *arguments: Any) -> Any:
        assert isinstance(picture, np.ndarray)
        return read(picture, *arguments)

    read = windows.pixels_of
    monkeypatch.setattr(windows, "pixels_of", whole)


@pytest.mark.usefixtures("windowed")
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "zstd", "packbits"])
@pytest.mark.parametrize(
    "stored",
    [
        {"rowsperstrip": 7},
        {"tile": (32, 16)},
        {"rowsperstrip": 1000},
        {"tile": (16, 16), "bigtiff": True, "byteorder": ">"},
        {"rowsperstrip": 7, "planarconfig": "separate"},
    ],
    ids=["strips", "tiles", "one strip", "big", "separate"],
)
def test_rows_of_tiffs_are_the_pictures(
    tmp_path: Path, stored: dict[str, Any], compression: str | None, dtype: Any
) -> None:
    pixels = noise((HEIGHT, WIDTH, 3), dtype, 4000 if dtype == np.uint16 else 256)
    given = np.moveaxis(pixels, 2, 0) if "planarconfig" in stored else pixels
    predictor = {"predictor": True} if compression in ("zlib", "lzw") else {}
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, given, photometric="rgb", compression=compression, **stored, **predictor)
    bits = 12 if dtype == np.uint16 else None
    with open_rows(path, 3, bits) as rows:
        for top, bottom in ((0, HEIGHT), (0, 1), (HEIGHT - 1, HEIGHT), (13, 64), (31, 33)):
            expected = pixels[top:bottom] >> (4 if bits else 0)
            assert np.array_equal(rows.read(top, bottom), expected)


@pytest.mark.usefixtures("windowed")
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("stored", [{"rowsperstrip": 9}, {"tile": (16, 32)}])
def test_tiffs_are_upright(tmp_path: Path, orientation: int, stored: dict[str, Any]) -> None:
    path = tmp_path / "a.tiff"
    tags = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(
        path,
        noise((HEIGHT, WIDTH, 3)),
        photometric="rgb",
        extratags=tags,
        compression="zlib",
        **stored,
    )
    agrees(path)


@pytest.mark.usefixtures("windowed")
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "I;16", "white"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tiffs_of_every_mode_have_the_networks_channels(
    tmp_path: Path, mode: str, channels: int
) -> None:
    path = tmp_path / "a.tif"
    pixels = noise((HEIGHT, WIDTH, 4))
    if mode == "white":
        tifffile.imwrite(path, pixels[..., 0], photometric="miniswhite")
    elif mode == "I;16":
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 200).save(path)
    else:
        Image.fromarray(pixels).convert(mode).save(path)
    agrees(path, channels)


@pytest.mark.usefixtures("windowed")
@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("photometric", ["minisblack", "rgb"])
def test_a_channel_of_unknown_meaning_is_no_alpha(
    tmp_path: Path, photometric: str, channels: int
) -> None:
    path, stored = tmp_path / "a.tif", noise((HEIGHT, WIDTH, 2 if photometric != "rgb" else 4))
    options: dict[str, Any] = {"photometric": photometric, "planarconfig": "contig"}
    tifffile.imwrite(path, stored, extrasamples=["unspecified"], **options)
    agrees(path, channels)


def test_premultiplied_colours_are_those_of_the_picture(tmp_path: Path) -> None:
    path, stored = tmp_path / "a.tif", noise((HEIGHT, WIDTH, 4))
    tifffile.imwrite(path, stored, photometric="rgb", extrasamples=["assocalpha"])
    agrees(path)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_deep_channels_apart_are_read_in_tiles_alone(
    tmp_path: Path, compression: str | None
) -> None:
    path, stored = tmp_path / "a.tif", noise((HEIGHT, WIDTH, 3), np.uint16, 4000)
    options: dict[str, Any] = {"photometric": "rgb", "planarconfig": "separate"}
    tifffile.imwrite(path, np.moveaxis(stored, 2, 0), compression=compression, **options)
    with open_rows(path, 3, 12) as rows:
        assert np.array_equal(rows.read(0, HEIGHT), stored >> 4)
    with pytest.raises(ValueError, match="a.tif: cannot be read: must hold its channels together"):
        read_picture(path, 3, 12)


def test_tiffs_in_jpeg_and_those_that_are_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    for options in ({"compression": "jpeg", "photometric": "rgb"}, {"compression": "jpeg"}):
        tifffile.imwrite(path, noise((HEIGHT, WIDTH, 3)), tile=(32, 32), **options)
        with Image.open(path) as image, open_rows(path, 3) as rows:
            difference = rows.read(0, HEIGHT).astype(int) - read_picture(image)
        assert np.abs(difference).max() <= 8 and np.abs(difference).mean() < 1
    for mode in ("1", "CMYK"):
        Image.fromarray(noise((HEIGHT, WIDTH, 3))).convert(mode).save(path)
        agrees(path)
    Image.fromarray(noise((HEIGHT, WIDTH, 3))).save(tmp_path / "a.png")
    agrees(tmp_path / "a.png")


def test_without_tifffile_a_tiff_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "find_spec", lambda name: None)
    tifffile.imwrite(tmp_path / "a.tif", noise((HEIGHT, WIDTH, 3)), photometric="rgb")
    agrees(tmp_path / "a.tif")


@pytest.mark.usefixtures("windowed")
def test_the_bits_of_a_picture_are_those_of_all_of_it(tmp_path: Path) -> None:
    """The largest value may be in rows that are read last, and is told of once."""
    pixels = noise((1000, 20), np.uint16, 200)
    pixels = np.resize(pixels, (1000, 20))
    pixels[990, 3] = 1000
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, compression="zlib", rowsperstrip=16)
    for picture in (path, pixels, torch.from_numpy(pixels)[None]):
        told: list[Guess] = []
        with open_rows(picture, 1, tell=told.append) as rows:
            assert np.array_equal(rows.read(0, 9)[..., 0], pixels[:9] >> 2)
        assert [(guess.largest, guess.bits) for guess in told] == [(1000, 10)]
        with open_rows(picture, 1, 16, tell=told.append) as rows:
            assert np.array_equal(rows.read(985, 1000)[..., 0], pixels[985:] >> 8)
        assert len(told) == 1


def test_what_pillow_takes_for_a_bomb_is_read_by_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = noise((HEIGHT, WIDTH, 3))
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", rowsperstrip=8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 3)
    with pytest.raises(
        ValueError, match=r"a\.tif: .* exceeds limit .*segment\(tile=\) and segment --tile"
    ):
        read_picture(tmp_path / "a.tif")
    with open_rows(tmp_path / "a.tif", 3) as rows:
        assert np.array_equal(rows.read(0, HEIGHT), pixels)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise((HEIGHT, WIDTH, 3)), compression="zlib", photometric="rgb")
    content = path.read_bytes()
    for damaged in (b"", b"II*\0nothing", content[: len(content) // 2][:300]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.tif: "), open_rows(path, 3) as rows:
            rows.read(0, HEIGHT)
    middle = content.index(b"x\x9c") + 40
    path.write_bytes(content[:middle] + bytes(200) + content[middle + 200 :])
    with pytest.raises(ValueError, match=r"a\.tif: cannot be read"), open_rows(path, 3) as rows:
        rows.read(0, HEIGHT)
    with pytest.raises(ValueError, match="picture must be a uint8 or uint16 array, got float64"):
        open_rows(np.zeros((40, 40)), 3).__enter__()
    with pytest.raises(ValueError, match=r"picture must be \(H, W\) or \(H, W, 1 to 4\)"):
        open_rows(np.zeros((1, 4, 40, 40), np.uint8), 3).__enter__()
    with pytest.raises(ValueError, match="nowhere.tif: does not exist"):
        open_rows("nowhere.tif", 3).__enter__()
