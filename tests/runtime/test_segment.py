"""Pictures of every kind in, labels and overlays out."""

from __future__ import annotations

import io
import os
import pickle
import re
import socket
import struct
import zlib

import numpy as np
import pytest
import torch
from helpers import png
from PIL import Image
from torch import nn

from fastscnn_fast import FastSCNN, bench, calibrate, fuse, segment
from fastscnn_fast.data import classes as data
from fastscnn_fast.data.pictures import _TOLD, label_image, overlay, read_picture
from fastscnn_fast.data.scenes import street
from fastscnn_fast.runtime import segment as segmenting
from fastscnn_fast.runtime.segment import Transform


@pytest.fixture(scope="module")
def model() -> FastSCNN:
    return bench.untrained_model(num_classes=11)


@pytest.fixture(scope="module")
def fast(model):
    return fuse(model)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return street(1, 75, 101)[0]


def test_labels_of_raw_pixels_at_the_pictures_own_size(fast, pixels):
    labels = segment(fast, pixels)
    assert (labels.shape, labels.dtype) == ((75, 101), np.uint8)
    assert len(np.unique(labels)) > 3
    expected = fast.labels(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
    assert np.array_equal(labels, expected)


def test_a_path_an_image_an_array_and_a_module_agree(fast, model, pixels, tmp_path):
    expected = segment(fast, pixels)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "street.png")
    readonly = pixels.copy()
    readonly.setflags(write=False)
    mirrored = np.ascontiguousarray(pixels[:, ::-1])[:, ::-1]
    for picture in (
        image,
        tmp_path / "street.png",
        str(tmp_path / "street.png"),
        readonly,
        mirrored,
    ):
        assert np.array_equal(segment(fast, picture), expected)
    assert np.array_equal(segment(model, pixels), expected)


def as_file(image: Image.Image, kind: str = "png") -> bytes:
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


class Answer:
    """A server's: it can be read once and not rewound."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def read(self) -> bytes:
        content, self.content = self.content, b""
        return content


def test_every_feed_is_the_same_picture(fast, pixels, tmp_path):
    """Contents, open files wherever they stand, tensors of any strides, and all of them in a list."""
    expected = segment(fast, pixels)
    content = as_file(Image.fromarray(pixels))
    twice = bytes(byte for byte in content for _ in range(2))
    path = tmp_path / "street.png"
    path.write_bytes(content)
    x = torch.from_numpy(pixels).permute(2, 0, 1)
    at_its_end = io.BytesIO(content)
    at_its_end.read()
    with open(path, "rb") as file:
        feeds = [
            *(content, bytearray(content), memoryview(content), memoryview(twice)[::2]),
            *(io.BytesIO(content), at_its_end, file),
            *(x, x.contiguous(), x.flip(2).flip(2), torch.cat([x, x])[:3]),
            *(pixels, Image.fromarray(pixels), path),
        ]
        for feed in (*feeds, Answer(content)):
            assert np.array_equal(segment(fast, feed), expected)
        for several in ([*feeds, Answer(content)], (*feeds, Answer(content))):
            results = segment(fast, several)
            assert isinstance(results, list) and len(results) == len(several)
            assert all(np.array_equal(labels, expected) for labels in results)
    assert segment(fast, []) == []


@pytest.mark.parametrize("confidence", [False, True])
def test_pictures_of_one_size_run_in_batches_with_the_same_labels(
    fast, pixels, confidence, monkeypatch
):
    """Whatever stands between them; each batch has at most so many pixels, and what waits is bounded."""
    sizes = [(64, 64), (64, 96), (64, 64), (75, 101), (64, 64), (64, 96), (64, 64)]
    pictures = [
        np.ascontiguousarray(np.roll(pixels, 9 * k, 1)[:h, :w]) for k, (h, w) in enumerate(sizes)
    ]
    alone = [segment(fast, picture, confidence=confidence) for picture in pictures]
    counts = []
    labels = type(fast).labels
    monkeypatch.setattr(
        type(fast), "labels", lambda self, x: counts.append(len(x)) or labels(self, x)
    )
    monkeypatch.setattr(segmenting, "BATCH_PIXELS", 3 * 64 * 64)
    for most, expected in ((2**26, [3, 2, 1, 1]), (1, [1] * 7)):
        monkeypatch.setattr(segmenting, "_MOST_WAITING", most)
        counts.clear()
        together = segment(fast, pictures, confidence=confidence)
        assert sorted(counts, reverse=True) == expected
        for one, other in zip(alone, together):
            pairs = zip(one, other) if confidence else [(one, other)]
            assert all(np.array_equal(*pair) for pair in pairs)


class Pictures(torch.utils.data.Dataset):
    def __init__(self, paths, transform):
        self.paths, self.transform = paths, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(self.paths[index])


def test_a_transform_makes_batches_in_a_dataloaders_workers(fast, pixels, tmp_path):
    paths = [tmp_path / f"{k}.png" for k in range(3)]
    for k, path in enumerate(paths):
        Image.fromarray(pixels[k:, : 101 - 2 * k]).save(path)
    transform = Transform(fast.config, (64, 96))
    again = pickle.loads(pickle.dumps(transform))
    assert again == transform and "size=(64, 96)" in repr(transform)
    assert torch.equal(again(paths[0]), transform(Image.fromarray(pixels)))
    for workers in (0, 2):
        (batch,) = torch.utils.data.DataLoader(
            Pictures(paths, transform), batch_size=3, num_workers=workers
        )
        assert (batch.shape, batch.dtype) == ((3, 3, 64, 96), torch.uint8)
        for path, labels in zip(paths, fast.labels(batch).numpy()):
            with Image.open(path) as image:
                own = Image.fromarray(labels).resize(image.size, Image.Resampling.NEAREST)
            assert np.array_equal(own, segment(fast, path, (64, 96)))
    with pytest.raises(ValueError, match="size must be at least 32x32, got 8x8"):
        Transform(fast.config, 8)(pixels)
    with pytest.raises(TypeError, match="config must be a network's config, as fast.config, got F"):
        Transform(fast)  # type: ignore[arg-type]


def test_opencvs_frames_by_the_line_that_the_documents_give(fast, pixels):
    frame = np.ascontiguousarray(pixels[:, :, ::-1])  # BGR
    assert np.array_equal(segment(fast, frame[:, :, ::-1]), segment(fast, pixels))
    assert not np.array_equal(segment(fast, frame), segment(fast, pixels))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_tensors_have_the_networks_channels_or_are_converted(channels):
    own = np.random.default_rng(0).integers(0, 256, (40, 50, channels), np.uint8)
    x = torch.from_numpy(own).permute(2, 0, 1)
    assert np.shares_memory(read_picture(x, channels), own)
    for wanted in (1, 3):
        assert np.array_equal(read_picture(x, wanted), read_picture(own, wanted))


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_arrays_and_tensors_of_sixteen_bits_are_as_files_of_them(channels, bits, caplog):
    own = np.random.default_rng(0).integers(0, 256, (20, 30, channels), np.uint8)
    own[..., 1::2] //= 2  # alpha, where there are 2 or 4, has no say
    values = deep(own, bits)
    own[..., 0].flat[0] = 255
    tensor = torch.from_numpy(values).permute(2, 0, 1)
    assert tensor.dtype == torch.uint16
    for picture in (values, values.astype(">u2"), values[::-1].copy()[::-1], tensor):
        caplog.clear()
        assert np.array_equal(read_picture(picture, channels, bits), own)
        assert not caplog.records
        assert np.array_equal(read_picture(picture, channels), own)
        assert len(caplog.records) == (bits < 16)
        assert (
            f"picture: has 16 bits a channel and no value above {(1 << bits) - 1}" in caplog.text
        ) == (bits < 16)
        assert np.array_equal(read_picture(picture, channels, 16), own >> (16 - bits))
    if channels == 1:
        assert np.array_equal(read_picture(values[..., 0], 1, bits), own)
        file = as_file(Image.fromarray(values[..., 0]))
        for channels in (1, 3, 4):
            assert np.array_equal(
                read_picture(values, channels, bits), read_picture(file, channels, bits)
            )
    if bits > 8:
        with pytest.raises(ValueError, match=rf"bits must be enough.*, {values.max()}, got 8"):
            read_picture(values, channels, 8)


def test_confidence_is_the_probability_of_each_label(fast, model, pixels, monkeypatch):
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    labels, confidence = segment(fast, pixels, confidence=True)
    assert (confidence.shape, confidence.dtype) == ((75, 101), np.float32)
    assert np.array_equal(labels, segment(fast, pixels))
    assert np.array_equal(confidence, fast.probabilities(x)[0].amax(0))
    assert 1 / 11 <= confidence.min() < 0.9 and confidence.max() <= 1
    several = segment(fast, [pixels, pixels[:40]], confidence=True)
    assert np.array_equal(several[0][1], confidence) and several[1][1].shape == (40, 101)
    monkeypatch.setattr(FastSCNN, "fused_for", lambda self, x: None)
    plain = segment(model, pixels, confidence=True)
    assert np.abs(plain[1] - confidence).max() < 1e-4


def test_confidence_goes_along_with_labels_to_the_pictures_size(fast, pixels):
    labels, confidence = segment(fast, pixels, (64, 96), confidence=True)
    image = Image.fromarray(pixels).resize((96, 64), Image.Resampling.BILINEAR)
    small = segment(fast, image, confidence=True)
    for values, found in zip((labels, confidence), small):
        resized = Image.fromarray(found).resize((101, 75), Image.Resampling.NEAREST)
        assert np.array_equal(values, np.asarray(resized))


def test_a_module_that_cannot_be_fused_runs_in_plain_torch(model, pixels, monkeypatch):
    monkeypatch.setattr(FastSCNN, "fused_for", lambda self, x: None)
    plain = segment(model, pixels)
    assert (plain == segment(fuse(model), pixels)).mean() > 0.999


def test_modes_of_images(pixels):
    image = Image.fromarray(pixels)
    grey = image.convert("L")
    rgb_of_grey = np.stack([np.asarray(grey)] * 3, -1)
    assert np.array_equal(read_picture(grey), rgb_of_grey)
    assert np.array_equal(read_picture(np.asarray(grey)), rgb_of_grey)
    assert np.array_equal(read_picture(np.asarray(grey)[..., None]), rgb_of_grey)
    assert np.array_equal(read_picture(image.convert("RGBA")), pixels)
    assert np.array_equal(read_picture(np.asarray(image.convert("RGBA"))), pixels)
    palette = image.quantize(64)
    assert np.array_equal(read_picture(palette), np.asarray(palette.convert("RGB")))
    palette.info["transparency"] = bytes(range(64))
    assert np.array_equal(read_picture(palette), np.asarray(image.quantize(64).convert("RGB")))
    assert read_picture(image.convert("1")).max() == 255
    assert read_picture(image.convert("CMYK")).shape == pixels.shape


def test_sixteen_bits_become_eight(tmp_path, pixels):
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    deep = grey.astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    expected = np.stack([grey] * 3, -1)
    assert np.array_equal(read_picture(tmp_path / "deep.png"), expected)
    assert np.array_equal(read_picture(Image.fromarray(deep.astype(np.int32))), expected)
    assert np.array_equal(read_picture(Image.fromarray(grey.astype(np.int32))), expected)
    with pytest.raises(ValueError, match="at most 16 bits"):
        read_picture(Image.fromarray(deep.astype(np.int32) * 2))


def deep(pixels: np.ndarray, bits: int) -> np.ndarray:
    """8-bit values as ``bits`` bits, with noise below the upper eight, and the largest value in it."""
    noise = np.random.default_rng(bits).integers(0, 1 << (bits - 8), pixels.shape)
    values = (pixels.astype(np.uint16) << (bits - 8)) + noise.astype(np.uint16)
    values.flat[0] = (1 << bits) - 1
    return values


def deep_png(values: np.ndarray) -> bytes:
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[values.size // (height * width)]
    return png(width, height, rows, 16, kind)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_the_bits_that_deep_grey_uses(bits, tmp_path, pixels, caplog):
    """One rule for every mode that Pillow has for it, told where it is a guess."""
    grey = np.asarray(Image.fromarray(pixels).convert("L")).copy()
    grey.flat[0] = 255
    values, expected = deep(grey, bits), np.stack([grey] * 3, -1)
    Image.fromarray(values).save(tmp_path / "deep.tif")
    (tmp_path / "deep.png").write_bytes(deep_png(values))
    big = Image.frombytes("I;16B", grey.shape[::-1], values.astype(">u2").tobytes())
    images = [Image.fromarray(values), Image.fromarray(values.astype(np.int32)), big]
    assert [image.mode for image in images] == ["I;16", "I", "I;16B"]
    for picture in (*images, tmp_path / "deep.tif", tmp_path / "deep.png"):
        caplog.clear()
        _TOLD.clear()
        assert np.array_equal(read_picture(picture, bits=bits), expected)
        assert not caplog.records
        assert np.array_equal(read_picture(picture), expected)
        assert len(caplog.records) == (bits < 16)
        assert (f"one of {bits} bits" in caplog.text) == (bits < 16)
        assert np.array_equal(read_picture(picture, bits=16), expected >> (16 - bits))
        if bits > 8:
            with pytest.raises(ValueError, match=rf"bits must be enough.*, {values.max()}, got 8"):
                read_picture(picture, bits=8)
    for wrong in (7, 17):
        with pytest.raises(ValueError, match=f"bits must be 8 to 16, got {wrong}"):
            read_picture(images[0], bits=wrong)


@pytest.mark.parametrize("wrong", [12.0, "12", True, (12,)], ids=str)
def test_bits_that_are_no_integer_are_named(fast, tmp_path, wrong):
    values = np.full((40, 50), 4095, np.uint16)
    Image.fromarray(values).save(tmp_path / "u12.png")
    for picture in (values, tmp_path / "u12.png"):
        message = f"bits must be an integer from 8 to 16, got {wrong!r}"
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            segment(fast, picture, bits=wrong)
        for twelve in (np.uint8(12), np.int64(12)):
            assert (read_picture(picture, 1, bits=twelve) == 255).all()


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_the_bits_that_deep_colours_use(channels, bits, tmp_path, pixels, caplog):
    """Pillow itself keeps the upper eight of 16 and loses the rest."""
    own = np.random.default_rng(0).integers(0, 256, (*pixels.shape[:2], channels), np.uint8)
    own[..., : channels // 2 * 2 - 1].flat[0] = 255
    values = deep(own, bits)
    values[..., 0].flat[0], own[..., 0].flat[0] = (1 << bits) - 1, 255
    path = tmp_path / "deep.png"
    path.write_bytes(deep_png(values))
    assert np.array_equal(read_picture(path, channels, bits), own)
    assert not caplog.records
    assert np.array_equal(read_picture(path, channels), own)
    assert len(caplog.records) == (bits < 16)
    with Image.open(path) as image:
        assert np.array_equal(read_picture(image, channels), own)
    assert np.array_equal(read_picture(path, channels, 16), own >> (16 - bits))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [1, 8])
def test_the_bits_that_a_colour_tiff_uses(order, compression, tmp_path):
    own = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    own.flat[0] = 255
    data = deep(own, 12).astype(order + "u2").tobytes()
    data = data if compression == 1 else zlib.compress(data)
    tags = {256: 30, 257: 20, 258: 8 + 2 + 12 * 10 + 4, 259: compression, 262: 2}
    tags |= {273: 8 + 2 + 12 * 10 + 4 + 6, 277: 3, 278: 20, 279: len(data), 284: 1}
    content = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, 10)
    for tag, value in tags.items():
        count, kind = (3, 3) if tag == 258 else (1, 4)
        content += struct.pack(order + "HHII", tag, kind, count, value)
    path = tmp_path / "deep.tif"
    path.write_bytes(content + struct.pack(order + "IHHH", 0, 16, 16, 16) + data)
    assert np.array_equal(read_picture(path), own)
    assert np.array_equal(read_picture(path, bits=12), own)


def test_a_grey_map_says_its_bits_itself(tmp_path, caplog):
    """Pillow brings its values to 16 bits: there is nothing to guess, however dark it is."""
    path = tmp_path / "dark.pgm"
    path.write_bytes(b"P5 2 1 1023\n" + struct.pack(">2H", 100, 4))
    for bits in (None, 10):
        assert read_picture(path, 1, bits).ravel().tolist() == [25, 1]
    assert not caplog.records


def test_a_guess_is_told_once_a_folder(tmp_path, caplog):
    for name in ("a", "b"):
        Image.fromarray(np.full((40, 50), 1000, np.uint16)).save(tmp_path / f"{name}.png")
        read_picture(tmp_path / f"{name}.png")
    assert [record.getMessage()[: len(str(tmp_path)) + 6] for record in caplog.records] == [
        f"{tmp_path / 'a.png'}"
    ]


def test_exif_turns_pictures_upright(tmp_path, pixels):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held turned: the picture is the file turned by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_picture(tmp_path / "turned.png"), np.rot90(pixels, -1))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_the_networks_own_channels(channels, pixels):
    fast = fuse(FastSCNN(5, in_channels=channels))
    assert segment(fast, pixels).shape == (75, 101)
    own = np.random.default_rng(0).integers(0, 256, (40, 50, channels), np.uint8)
    assert np.shares_memory(read_picture(own, channels), own)
    assert segment(fast, own).shape == (40, 50)


def test_size_is_the_networks_and_the_labels_stay_the_pictures(fast, pixels):
    labels = segment(fast, pixels, (64, 96))
    assert labels.shape == (75, 101)
    image = Image.fromarray(pixels).resize((96, 64), Image.Resampling.BILINEAR)
    at_64 = Image.fromarray(segment(fast, image)).resize((101, 75), Image.Resampling.NEAREST)
    assert np.array_equal(labels, np.asarray(at_64))
    with pytest.raises(ValueError, match="size must be at least 32x32, got 31x64"):
        segment(fast, pixels, (31, 64))
    for size in ([64, 96], np.array([64, 96]), torch.tensor([64, 96]), torch.Size((64, 96))):
        assert np.array_equal(segment(fast, pixels, size), labels)
    for side in (64, np.int64(64)):
        assert np.array_equal(segment(fast, pixels, side), segment(fast, pixels, (64, 64)))


@pytest.mark.parametrize(
    ("size", "kind", "message"),
    [
        ("96x160", TypeError, r"size must be \(height, width\).* side of a square, got '96x160'$"),
        (b"ab", TypeError, "size must be .*, got b'ab'$"),
        (96.0, TypeError, r"size must be .*, got 96\.0$"),
        ((96.0, 160.0), TypeError, r"size must be .*, got \(96\.0, 160\.0\)$"),
        (True, TypeError, "size must be .*, got True$"),
        ({96, 160}, TypeError, "size must be .*, got {"),
        ((96, 160, 3), ValueError, r"size must be .* two integers.*, got \(96, 160, 3\)$"),
        ((), ValueError, r"size must be .*, got \(\)$"),
        (31, ValueError, "size must be at least 32x32, got 31x31$"),
        (-512, ValueError, "size must be at least 32x32, got -512x-512$"),
        (
            (10**6, 10**6),
            ValueError,
            "size must be at most 1073741824 pixels, got 1000000x1000000, which takes 1000000000000 bytes",
        ),
        (1 << 15 | 1, ValueError, "size must be at most 1073741824 pixels, got 32769x32769"),
    ],
    ids=str,
)
def test_what_is_no_size_is_named(fast, model, pixels, size, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        segment(fast, pixels, size)
    with pytest.raises(kind, match=f"^{message}"):
        calibrate(model, pixels, size=size)
    assert model.ranges is None


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (31, 32)])
def test_small_pictures(fast, size):
    assert segment(fast, np.full((*size, 3), 99, np.uint8)).shape == size


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (
            np.zeros((8, 8, 3), np.float32),
            "uint8 or uint16 array, got float32; .*normalised floats",
        ),
        (np.zeros((8, 8, 3), np.int32), "uint8 or uint16 array, got int32$"),
        (np.zeros((8, 8, 3), bool), "uint8 or uint16 array, got bool$"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"got shape \(2, 8, 8, 3\); a list holds several"),
        (torch.zeros(3, 8, 8), "uint8 or uint16 tensor, got torch.float32; .*normalised floats"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "uint8 or uint16 tensor, got torch.int64$"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"\(1, 3, 8, 8\); a list holds several"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"\(C, H, W\).*, got shape \(8, 8, 3\)$"),
        (torch.zeros(8, 8, dtype=torch.uint8), r"\(C, H, W\).*, got shape \(8, 8\)$"),
        (torch.zeros(3, 0, 8, dtype=torch.uint8), "must have pixels"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8, device="meta"), "got torch.strided on meta"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8).to_sparse(), "got torch.sparse_coo on cpu"),
        (b"", "picture: cannot be read: it is empty"),
        (b"street.png", "picture: cannot be read: it is of no known picture format"),
        (io.BytesIO(), "picture: cannot be read: it is empty"),
        ("", "picture must be a path, .*, got the path ''"),
        ("no\0where", "does not exist"),
        ("n" * 300, "cannot be read: File name too long"),
        ("https://example.org/street.jpg", "^https://example.org/street.jpg: is a URL"),
        ("s3://bucket/" + "n" * 300, "is a URL"),
        ("data:image/png;base64,iVBORw0KGgo=", "is a URL"),
        ("/dev/null", "/dev/null: is a device"),
        (np.zeros((8, 8, 5), np.uint8), r"got shape \(8, 8, 5\)"),
        (np.zeros((0, 8, 3), np.uint8), "must have pixels"),
        (np.zeros(8, np.uint8), r"got shape \(8,\)"),
        (Image.new("RGB", (0, 5)), "^picture: must have pixels, got 5x0"),
        (Image.new("F", (5, 5)), "^picture: must hold integers, got floating-point"),
        ("nowhere.jpg", "nowhere.jpg: does not exist"),
        (".", ".: is a folder"),
    ],
)
def test_what_is_no_picture(fast, picture, message):
    with pytest.raises(ValueError, match=message):
        segment(fast, picture)


@pytest.mark.parametrize(
    ("picture", "got"),
    [(None, "NoneType"), (0, "int"), ({}, "dict"), (iter([]), "list_iterator"), (open, "builtin_")],
)
def test_what_is_nothing_like_a_picture_is_called_by_its_type(fast, picture, got):
    with pytest.raises(TypeError, match=rf"^picture must be a path, .* pixels, got {got}"):
        segment(fast, picture)


def test_a_file_that_gives_no_bytes_says_so(fast, pixels, tmp_path):
    path = tmp_path / "street.png"
    Image.fromarray(pixels).save(path)
    with (
        open(path, encoding="utf-8") as text,
        open(path, "ab") as written,
        open(path, "rb") as file,
    ):
        for opened in (text, io.StringIO("")):
            with pytest.raises(TypeError, match=r'binary mode \("rb"\), its read\(\) gave str'):
                segment(fast, opened)
        with pytest.raises(ValueError, match="^picture: cannot be read: .*read"):
            segment(fast, written)
    with pytest.raises(ValueError, match="^picture: cannot be read: .*closed file"):
        segment(fast, file)


def test_what_is_wrong_in_a_list_is_named_by_its_place(fast, pixels):
    """Files have names of their own."""
    for bad, message in (
        (b"no", r"^picture\[1\]: cannot be read"),
        (Image.new("F", (5, 5)), r"^picture\[1\]: must hold integers"),
        (pixels.astype(np.float32), r"^picture\[1\] must be a uint8"),
        ("nowhere.jpg", "^nowhere.jpg: does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            segment(fast, [pixels, bad, pixels])
    for bad, got in (([pixels], "list"), (None, "NoneType")):
        with pytest.raises(TypeError, match=rf"^picture\[1\] must be .*, got {got}"):
            segment(fast, (pixels, bad))


def test_a_tensor_without_its_memory_is_refused(fast):
    x = torch.zeros(3, 40, 50, dtype=torch.uint8)
    x.untyped_storage().resize_(10)
    with pytest.raises(RuntimeError, match=r"^picture\[0\] must have memory of 6000 bytes"):
        segment(fast, [x])


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"\0\0\0\x20ftypisom", "is a video"),
        (b"\0\0\0\x14ftypqt  ", "is a video"),
        (b"\0\0\0\x08wide\0\0\0\0mdat", "is a video"),
        (b"\x1aE\xdf\xa3", "is a video"),
        (b"RIFF\0\0\1\0AVI LIST", "is a video"),
        ((b"G" + bytes(187)) * 3, "is a video"),
        (b"\0\0\0\x18ftypheic", "is HEIC"),
        (b"\0\0\0\x18ftypmif1", "is HEIC"),
        (b"\0\0\0\x18ftypavif", "cannot be read"),
        (b"<!DOCTYPE html>", "cannot be read: it is of no known picture format"),
    ],
)
def test_videos_and_heic_are_named_whatever_they_are_called(start, said, fast, tmp_path):
    content = start + bytes(2000)
    (tmp_path / "street.png").write_bytes(content)
    for picture in (content, io.BytesIO(content), tmp_path / "street.png"):
        with pytest.raises(ValueError, match=f": {said}"):
            segment(fast, picture)


@pytest.mark.parametrize(("name", "said"), [("a.MP4", "is a video"), ("a.heic", "is HEIC")])
def test_videos_and_heic_are_named_by_what_they_are_called(name, said, fast, pixels, tmp_path):
    (tmp_path / name).write_bytes(b"of some unknown kind")
    with pytest.raises(ValueError, match=rf"{name}: {said}"):
        segment(fast, tmp_path / name)
    (tmp_path / name).write_bytes(as_file(Image.fromarray(pixels)))
    assert np.array_equal(segment(fast, tmp_path / name), segment(fast, pixels))


def test_what_paths_lead_to_is_named(fast, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        for name, said in (
            ("loop.png", "is a link in a circle"),
            ("loop.png/a.png", "is behind a link in a circle"),
            ("gone.png", "is a link to nowhere.png, which does not exist"),
            ("pipe.png", "is a pipe"),
            ("socket.png", "is a socket"),
            ("pipe.png/a.png", "cannot be read: Not a directory"),
        ):
            with pytest.raises(ValueError, match=f"^{name}: {said}$"):
                segment(fast, name)


def test_a_damaged_image_is_named_too(fast, pixels):
    content = as_file(Image.fromarray(pixels))
    with (
        Image.open(io.BytesIO(content[: len(content) // 2])) as image,
        pytest.raises(ValueError, match="^picture: cannot be read: "),
    ):
        segment(fast, image)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_damaged_files_name_themselves(fast, tmp_path, pixels, damage):
    path = tmp_path / "broken.png"
    Image.fromarray(pixels).save(path)
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}[damage]
    )
    with pytest.raises(ValueError, match=r"broken\.png: cannot be read: "):
        segment(fast, path)


@pytest.mark.parametrize(
    ("kind", "channels", "depth"),
    [(3, 1, 8), *((k, c, d) for k, c in ((0, 1), (2, 3), (4, 2), (6, 4)) for d in (8, 16))],
)
def test_a_png_of_fewer_rows_is_no_whole_picture(kind, channels, depth, tmp_path):
    """Even where its data end as they should; a picture that is black below is whole."""
    row, path = 56 * channels * depth // 8, tmp_path / "rows.png"
    full, black = b"\0" + b"\x11" * row, b"\0" * (1 + row)
    for rows in (full * 40, full * 4 + black * 36, full * 41):
        path.write_bytes(png(56, 40, rows, depth, kind))
        with Image.open(path) as image:
            assert read_picture(path).shape == read_picture(image).shape == (40, 56, 3)
    for rows in (full * 4, full * 39, full * 4 + black * 35, full * 39 + full[:-1], b""):
        path.write_bytes(png(56, 40, rows, depth, kind))
        with pytest.raises(ValueError, match=r"rows\.png: cannot be read: .*truncated"):
            read_picture(path)
        with (
            pytest.raises((ValueError, OSError), match="truncated"),
            Image.open(path) as image,
        ):
            read_picture(image)


def test_an_interlaced_png_of_fewer_rows_is_no_whole_picture(tmp_path):
    """5x5 grey: passes of 1x1, 1x1, 2x1, 1x2, 3x1, 2x3 and 5x2 pixels."""
    rows = [1, 1, 2, 1, 1, 3, 2, 2, 2, 5, 5]
    data = [b"\0" + b"\x63" * n for n in rows]
    (tmp_path / "whole.png").write_bytes(png(5, 5, b"".join(data), 8, 0, 1))
    assert (read_picture(tmp_path / "whole.png") == 0x63).all()
    for count in (1, 5, 10):
        (tmp_path / "part.png").write_bytes(png(5, 5, b"".join(data[:count]), 8, 0, 1))
        with pytest.raises(ValueError, match=r"part\.png: cannot be read: .*truncated"):
            read_picture(tmp_path / "part.png")


def test_a_model_in_training_mode_is_refused(pixels):
    with pytest.raises(ValueError, match="must be in eval mode"):
        segment(FastSCNN(3), pixels)


def test_what_wraps_a_model_is_looked_through(model, fast, pixels):
    expected = segment(model, pixels)
    for wrapped in (
        nn.DataParallel(model),
        nn.DataParallel(fast),
        torch.optim.swa_utils.AveragedModel(model).eval(),
        torch.compile(model),
    ):
        assert np.array_equal(segment(wrapped, pixels), expected)


def test_what_is_no_model_is_named(fast, pixels):
    rule = "fast, the first argument, must be a model: a fastscnn_fast.FastSCNN or its fused copy"
    for other, picture, got in (
        (nn.Conv2d(3, 3, 1), pixels, r"Conv2d \(fastscnn_fast.accelerate takes other"),
        (nn.DataParallel(nn.Conv2d(3, 3, 1)), pixels, "Conv2d"),
        (pixels, fast, "ndarray$"),
        ("camvid.pth", pixels, "str$"),
        (None, [pixels], "NoneType$"),
    ):
        with pytest.raises(TypeError, match=f"^{rule}, got {got}"):
            segment(other, picture)


def test_more_classes_than_a_byte_holds_are_refused(pixels):
    model = FastSCNN(257).eval()
    for network in (model, fuse(model)):
        with pytest.raises(ValueError, match="256"):
            segment(network, pixels)


def test_a_label_image_holds_the_ids_and_shows_the_colours():
    labels = np.arange(11, dtype=np.uint8).repeat(4).reshape(11, 4)
    image = label_image(labels, data.CAMVID_PALETTE)
    assert image.mode == "P" and np.array_equal(np.asarray(image), labels)
    assert np.array_equal(np.asarray(image.convert("RGB"))[:, 0], data.CAMVID_PALETTE)


@pytest.mark.parametrize("size", [(1, 1), (60, 40), (500, 1500)])
def test_an_overlay_tints_by_class_and_names_what_is_there(size):
    pixels = np.full((*size, 3), 100, np.uint8)
    labels = np.zeros(size, np.uint8)
    labels[:, size[1] // 2 :] = 8
    labels[0, 0] = data.CAMVID_IGNORE
    image = np.asarray(overlay(pixels, labels, data.CAMVID_CLASSES, data.CAMVID_PALETTE, 0.5))
    height, width = size
    assert image.shape[0] > height and image.shape[1] >= width
    assert np.array_equal(image[0, 0], pixels[0, 0])
    legend = {tuple(colour) for colour in image[height:].reshape(-1, 3).tolist()}
    for k in range(11):
        assert (data.CAMVID_PALETTE[k] in legend) == bool((labels == k).any())
    if width > 1:
        assert (
            np.abs(image[-1 - (image.shape[0] - height), width - 1] - np.array([82, 50, 114])).max()
            <= 1
        )


def test_one_class_is_shown_on_an_untouched_background():
    pixels = np.full((60, 80, 3), 100, np.uint8)
    labels = np.zeros((60, 80), np.uint8)
    labels[:, 40:60], labels[:, 60:] = 1, 255
    colours = ((250, 10, 20),)
    image = label_image(labels[:, :60], colours)
    assert np.array_equal(np.asarray(image), labels[:, :60])
    shown = np.asarray(image.convert("RGB"))
    assert (shown[:, :40] == 0).all() and (shown[:, 40:] == colours[0]).all()
    tinted = np.asarray(overlay(pixels, labels, ["road"], colours, 0.5))
    assert (tinted[:60, :40] == 100).all() and (tinted[:60, 60:80] == 100).all()
    assert (tinted[:60, 40:60] == (175, 55, 60)).all()
    assert (tinted[60:] == colours[0]).all(-1).any()  # in the legend
    nothing = np.asarray(overlay(pixels, np.zeros_like(labels), ["road"], colours, 0.5))
    assert (nothing[:60, :80] == 100).all() and (nothing[60:] == 255).all()


@pytest.mark.parametrize("unfused", [False, True])
def test_one_class_is_segmented(unfused, pixels):
    model = bench.untrained_model(num_classes=1)
    if unfused:
        model.classifier.conv.register_forward_hook(lambda *_: None)
    labels = segment(model, pixels)
    assert labels.shape == pixels.shape[:2] and set(np.unique(labels)) == {0, 1}
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = model.double().reference(x)[0, 0] > 0
    assert (torch.from_numpy(labels) == expected).double().mean() > 0.999


def test_an_overlay_needs_labels_of_the_pictures_size(pixels):
    with pytest.raises(ValueError, match=r"labels must be \(75, 101\)"):
        overlay(pixels, np.zeros((3, 3), np.uint8), data.CAMVID_CLASSES, data.CAMVID_PALETTE)


def test_confidence_of_one_class_is_that_of_the_label(pixels, monkeypatch):
    """Of the class where it is, else of the background: never below a half."""
    model = bench.untrained_model(num_classes=1)
    fast = fuse(model, "reference")
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    labels, confidence = segment(fast, pixels, confidence=True)
    probable = fast.probabilities(x)[0, 0].numpy()
    assert set(np.unique(labels)) == {0, 1} and confidence.min() >= 0.5
    assert np.array_equal(confidence, np.where(labels == 1, probable, 1 - probable))
    monkeypatch.setattr(FastSCNN, "fused_for", lambda self, x: None)
    plain = segment(model, pixels, confidence=True)
    assert np.array_equal(plain[0], labels) and np.abs(plain[1] - confidence).max() < 1e-4
