"""Pictures and videos whose files are unusual: frames, negatives, damaged EXIF, streams beside the pictures."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import clips
import numpy as np
import pytest
import tifffile
from PIL import Image

from fastscnn_fast.data.pictures import read_picture
from fastscnn_fast.data.videos import Video


def deep(shape: tuple[int, ...], bits: int = 12) -> np.ndarray:
    values = np.random.default_rng(7).integers(0, 1 << bits, shape, np.uint16)
    values.flat[0] = (1 << bits) - 1
    return values


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_each_frame_has_its_own_low_bytes(compression: str | None, tmp_path: Path) -> None:
    frames = [deep((8, 9, 3)), deep((5, 6, 3))[::-1]]
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for frame in frames:
            tags = [(274, "H", 1, 6, True)]
            file.write(frame, photometric="rgb", compression=compression, extratags=tags)
    for bits in (None, 12):
        for k, frame in enumerate(frames):
            with Image.open(tmp_path / "a.tif") as image:
                image.seek(k)
                assert np.array_equal(read_picture(image, bits=bits), np.rot90(frame >> 4, -1))


def test_low_bytes_of_an_animations_later_frames_are_not_mixed() -> None:
    """A PNG's are laid over those before, which Pillow does in eight bits."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    frames = [deep((8, 9, 3)), deep((8, 9, 3)) // 2]
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 8, 16, 2, 0, 0, 0))
    content += chunk(b"acTL", struct.pack(">II", 2, 0))
    for k, (name, number) in enumerate(((b"IDAT", b""), (b"fdAT", struct.pack(">I", 2)))):
        content += chunk(b"fcTL", struct.pack(">5I2H2B", k, 9, 8, 0, 0, 1, 10, 0, 0))
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in frames[k])
        content += chunk(name, number + zlib.compress(rows))
    with Image.open(io.BytesIO(content + chunk(b"IEND", b""))) as image:
        assert np.array_equal(read_picture(image, bits=12), frames[0] >> 4)
        image.seek(1)
        with pytest.raises(ValueError, match="must be the first frame of a PNG of 16 bits"):
            read_picture(image, bits=12)
        image.seek(0)
        image.seek(1)
        assert np.array_equal(read_picture(image, bits=16), frames[1] >> 8)


def test_what_pillow_has_dropped_is_not_made_up(tmp_path: Path) -> None:
    path, values = tmp_path / "a.tif", deep((8, 9, 3))
    tifffile.imwrite(path, values, photometric="rgb")
    with Image.open(path) as image:
        assert np.array_equal(read_picture(image, bits=12), values >> 4)
        with pytest.raises(ValueError, match=r"a\.tif: bits must be 16 or left out .*, got 12"):
            read_picture(image, bits=12)
        assert np.array_equal(read_picture(image, bits=16), values >> 8)
    with Image.open(path) as image:
        sent = pickle.loads(pickle.dumps(image))  # as to a DataLoader's worker
    assert np.array_equal(read_picture(sent), values >> 8)
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(tmp_path / "a.webp")
    assert not read_picture(tmp_path / "a.webp", bits=12).any()  # of 8 bits in any case


@pytest.mark.parametrize(("bits", "shift"), [(None, 4), (12, 4), (16, 8)])
def test_a_deep_negative_is_turned_round(bits: int | None, shift: int, tmp_path: Path) -> None:
    values = deep((8, 9))
    tags = [(274, "H", 1, 3, True)]
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="miniswhite", extratags=tags)
    expected = 255 - (values[::-1, ::-1] >> shift)
    assert np.array_equal(read_picture(tmp_path / "a.tif", 1, bits)[..., 0], expected)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_grey_and_alpha_apart_are_refused(compression: str | None, tmp_path: Path) -> None:
    path, planes = tmp_path / "a.tif", np.full((2, 8, 9), 7, np.uint8)
    options: dict[str, Any] = {"photometric": "minisblack", "planarconfig": "separate"}
    tifffile.imwrite(path, planes, compression=compression, extrasamples=["unassalpha"], **options)
    with pytest.raises(ValueError, match=r"a\.tif: .*must hold its channels together where one"):
        read_picture(path, 2)


def test_a_plain_grey_map_says_its_bits_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P2 2 1 1023\n100 4\n")
    assert read_picture(tmp_path / "a.pgm", 1).ravel().tolist() == [25, 1]
    assert not caplog.records


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\0\0", b"Exif\0\0"])
def test_damaged_exif_leaves_a_picture_as_it_is_stored(
    exif: bytes, ending: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{ending}"
    Image.new("RGB", (9, 8), (200, 200, 200)).save(path, exif=exif)
    assert np.abs(read_picture(path).astype(int) - 200).max() <= 2


# --- videos ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["mkv", "mp4"])
def test_a_longer_stream_beside_the_pictures_cuts_nothing_off(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    pixels = np.zeros((48, 64, 3), np.uint8)
    with av.open(str(path), "w") as file:
        streams = [file.add_stream("mpeg4", rate=10) for _ in range(2)]
        for stream in streams:
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for stream, count in zip(streams, (5, 50)):
            for k in range(count):
                frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
                frame.pts, frame.time_base = k, Fraction(1, 10)
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
    with Video(path) as video:
        assert len(list(video.read())) == 5 and video.seconds == pytest.approx(5, abs=0.1)
        assert video.damage is None


def test_a_binary_file_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = clips.write(tmp_path / "a.mkv", clips.drawn(3))
    with path.open("rb") as file:
        file.read(100)
        with Video(file) as video:
            assert len(list(video.read())) == 3
