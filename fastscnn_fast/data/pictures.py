"""Pictures in and out: read to pixels, resized; labels as palette images and as a tint with a legend."""

from __future__ import annotations

import io
import os
import struct
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFile, ImageFont, ImageOps

from ..backends.registry import logger
from ..writing import write_whole
from .classes import Colour, label_colours, label_count

Picture = Image.Image | str | os.PathLike[str] | NDArray[np.uint8]

#: Endings by which files in a folder are taken for pictures.
PICTURE_SUFFIXES = (
    ".avif",
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
#: The passes of an interlaced PNG: first column and row, distance of columns and of rows.
_ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
#: How many of 16 bits a picture may use, besides all of them.
_FEWER_BITS = (8, 10, 12, 14)
#: Folders, and bits guessed there, that a warning told of.
_TOLD: set[tuple[str, int]] = set()
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def read_picture(picture: Picture, channels: int = 3, bits: int | None = None) -> NDArray[np.uint8]:
    """The upright pixels of a picture, uint8 (H, W, channels).

    Args:
        picture: a path, a PIL image, or uint8 pixels (H, W) or (H, W, C). Files and PIL images are turned
            upright as their EXIF orientation says.
        channels: 1 to 4: grey, grey + alpha, RGB or RGBA, to which pictures of other modes are converted;
            an alpha channel that is not asked for is ignored.
        bits: 8 to 16, how many bits a channel a picture stored in more than 8 uses: the upper eight of them
            are kept. By default the least of 8, 10, 12, 14 and 16 that holds its largest value, with a
            warning where it is not 16 (a dark picture may use more); PGM files say it themselves.

    Raises:
        ValueError: it cannot be read, has no pixels, or values of more than ``bits``; the message names the
            file where there is one.
    """
    if bits is not None and not 8 <= bits <= 16:
        raise ValueError(f"bits must be 8 to 16, got {bits}")
    if isinstance(picture, np.ndarray):
        return _array_pixels(picture, channels)
    if isinstance(picture, Image.Image):
        return _image_pixels(picture, channels, bits)
    if not Path(picture).is_file():
        what = "is a folder" if Path(picture).is_dir() else "does not exist"
        raise ValueError(f"{os.fspath(picture)}: {what}")
    try:
        with Image.open(picture) as image:
            return _image_pixels(image, channels, bits)
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        raise ValueError(f"{os.fspath(picture)}: cannot be read: {error}") from error


def _image_pixels(image: Image.Image, channels: int, bits: int | None = None) -> NDArray[np.uint8]:
    if 0 in image.size:
        raise ValueError(f"picture must have pixels, got {image.size[1]}x{image.size[0]}")
    name = os.fspath(getattr(image, "filename", "")) or "picture"
    file = load_whole(image)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey; Pillow may keep it in 32 bits
        bits = 16 if file.decoder == "ppm" else bits  # which brings what the file says to 16 bits
        image = Image.fromarray(_eight_bits(np.asarray(image), bits, name))
    elif file.deep_colour and (bits or 0) < 16:
        high = np.asarray(image.convert("RGBA") if image.mode == "LA" else image)
        if bits is not None or high[..., :3].max() < 1 << max(_FEWER_BITS) - 8:
            values = high.astype(np.uint16) << 8 | _low_bytes(file)
            image = Image.fromarray(_eight_bits(values, bits, name))
    if image.mode == "F":
        raise ValueError("picture must hold integers, got floating-point pixels of unknown range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    pixels = np.array(image.convert(_MODES[channels]))
    return pixels.reshape(*pixels.shape[:2], channels)


def _eight_bits(values: NDArray[Any], bits: int | None, name: str) -> NDArray[np.uint8]:
    """The upper eight of ``bits`` of grey (H, W) or colours (H, W, 3 or 4), as :func:`read_picture` has it."""
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("picture must have at most 16 bits a channel")
    largest = int((values if values.ndim == 2 else values[..., :3]).max())
    if bits is None:
        bits = next((b for b in _FEWER_BITS if largest < 1 << b), 16)
        if bits < 16 and largest:
            _tell_of_guess(name, largest, bits)
    elif largest >= 1 << bits:
        raise ValueError(
            f"bits must be enough for the picture's largest value, {largest}, got {bits}"
        )
    eight: NDArray[np.uint8] = np.minimum(values >> (bits - 8), 255).astype(np.uint8)
    return eight


def _tell_of_guess(name: str, largest: int, bits: int) -> None:
    """Warns, of files once a folder and number of bits."""
    place = os.path.dirname(name), bits
    if place in _TOLD:
        return
    if name != "picture":
        _TOLD.add(place)
    logger.warning(
        "%s: has 16 bits a channel and no value above %d, so it is taken for one of %d bits; say how many it has"
        " by bits= or --bits: a dark picture of more would come out too bright",
        name,
        largest,
        bits,
    )


class _File(NamedTuple):
    """What an opened picture's file says of it that Pillow forgets when it reads the pixels.

    ``raw`` is how the file holds pixels, in Pillow's words, and ``decoder`` what reads them.
    """

    content: bytes = b""
    raw: str = ""
    decoder: str = ""

    @property
    def deep_colour(self) -> bool:
        """Whether there are 16 bits a channel, of which Pillow keeps the upper eight."""
        return ";16" in self.raw and self.raw.startswith(("RGB", "LA"))


def load_whole(image: Image.Image) -> _File:
    """Reads the pixels of an opened file; a PNG whose data end too soon is damaged, which Pillow does not notice.

    Raises:
        Exception: the file is damaged; Pillow's decoders raise nearly anything.
    """
    file = _file_of(image)
    image.load()
    if image.format != "PNG" or not file.content:
        return file
    last = image.crop((0, image.height - 1, image.width, image.height))
    if "interlace" not in image.info and np.asarray(last).any():
        return file  # rows that are not there are zeros
    if missing := _png_missing(file.content):
        raise ValueError(f"image file is truncated ({missing} bytes of pixels are missing)")
    return file


def _file_of(image: Image.Image) -> _File:
    """The file of a picture whose pixels are not read yet; nothing of others."""
    if not isinstance(image, ImageFile.ImageFile) or image.fp is None or not image.tile:
        return _File()
    decoder, _, _, args = image.tile[0]
    raw = args if isinstance(args, str) else str(args[0]) if args else ""
    content = b""
    if image.format in ("PNG", "TIFF"):
        place = image.fp.tell()
        image.fp.seek(0)
        content = image.fp.read()
        image.fp.seek(place)
    return _File(content, raw, decoder)


def _low_bytes(file: _File) -> NDArray[np.uint8]:
    """The lower eight of 16 bits a channel, upright: Pillow is told that the bytes lie the other way round."""
    other = {"B": "L", "L": "B", "N": {"little": "B", "big": "L"}[sys.byteorder]}
    grey = file.raw == "LA;16B"  # which there is no other way round of
    raw = "RGBA" if grey else file.raw[:-1] + other[file.raw[-1]]
    with Image.open(io.BytesIO(file.content)) as image:
        assert isinstance(image, ImageFile.ImageFile)
        tiles: list[Any] = list(image.tile)
        make: Any = getattr(type(tiles[0]), "_make", tuple)  # plain tuples before Pillow 11
        image.tile = [
            make((*place, raw if isinstance(args, str) else (raw, *args[1:])))
            for *place, args in tiles
        ]
        low = np.asarray(ImageOps.exif_transpose(image))
    return low[..., [1, 1, 1, 3]] if grey else low


def _png_missing(content: bytes) -> int:
    """How many bytes the pixels of a PNG lack."""
    width, height, depth, kind, *_, interlaced = struct.unpack_from(">IIBBBBB", content, 16)
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    grids = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    size = 0
    for x, y, dx, dy in grids:
        columns, rows = -(-(width - x) // dx), -(-(height - y) // dy)
        size += rows * (1 + -(-columns * bits // 8)) if columns > 0 else 0
    data, place = [], 8
    while place + 8 <= len(content):
        length, name = struct.unpack_from(">I4s", content, place)
        if name == b"IDAT":
            data.append(content[place + 8 : place + 8 + length])
        place += length + 12
    return size - len(zlib.decompressobj().decompress(b"".join(data), size))


def _array_pixels(pixels: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """The array itself, where torch can take it as it is."""
    if pixels.dtype != np.uint8:
        raise ValueError(f"picture must be a uint8 array, got {pixels.dtype}")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in _MODES:
        raise ValueError(f"picture must be (H, W) or (H, W, 1 to 4), got shape {pixels.shape}")
    if 0 in pixels.shape:
        raise ValueError(f"picture must have pixels, got shape {pixels.shape}")
    if pixels.shape[2] != channels:
        return _image_pixels(_to_image(pixels), channels)
    writable: NDArray[np.uint8] = np.require(pixels, requirements=["C", "W"])
    return writable


def _to_image(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def resized(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W, C) brought to (height, width), bilinear with antialiasing, every channel by itself."""
    if pixels.shape[:2] == size:
        return pixels
    channels = [
        np.asarray(Image.fromarray(channel).resize(size[::-1], Image.Resampling.BILINEAR))
        for channel in np.moveaxis(pixels, -1, 0)
    ]
    return np.stack(channels, -1)


def save_png(image: Image.Image, path: Path, compress_level: int = 6) -> None:
    """Writes a PNG that is whole or not there, but for power cuts; OSError names the file and the cause."""
    content = io.BytesIO()
    image.save(content, "PNG", compress_level=compress_level)
    write_whole(path, content.getbuffer(), durable=False)


def label_image(labels: NDArray[np.uint8], palette: Sequence[Colour]) -> Image.Image:
    """Labels (H, W) as a palette image: the pixel values are the class ids, the colours show them.

    ``palette`` has the classes' colours; of one class alone, label 1 is the class and 0 the background, in black.
    """
    image = Image.fromarray(np.ascontiguousarray(labels))
    image.putpalette([channel for colour in label_colours(palette) for channel in colour])
    return image


def overlay(
    picture: Picture,
    labels: NDArray[np.uint8],
    classes: Sequence[str],
    palette: Sequence[Colour],
    strength: float = 0.55,
) -> Image.Image:
    """The picture tinted by class, above a legend of the classes that occur, in RGB.

    ``labels`` (H, W) has the picture's size. Labels without a name in ``classes`` are not tinted, nor is the
    background, label 0, of one class alone.

    Raises:
        ValueError: the sizes differ, or the picture cannot be read.
    """
    pixels = read_picture(picture)
    if labels.shape != pixels.shape[:2]:
        raise ValueError(f"labels must be {pixels.shape[:2]} like the picture, got {labels.shape}")
    plain = Image.fromarray(pixels)
    tinted = Image.blend(plain, label_image(labels, palette).convert("RGB"), strength)
    first = label_count(len(classes)) - len(classes)  # label of the first class
    tinted.paste(plain, mask=Image.fromarray((labels < first) | (labels >= first + len(classes))))
    present = [k - first for k in np.unique(labels).tolist() if 0 <= k - first < len(classes)]
    return _with_legend(tinted, [(classes[k], palette[k]) for k in present])


def _with_legend(image: Image.Image, entries: Sequence[tuple[str, Colour]]) -> Image.Image:
    """``image`` above rows of colour swatches with names; small images get a wider frame."""
    size = max(13, image.width // 55)
    font: Any = ImageFont.load_default(size)
    gap, swatch, line = size // 2, round(size * 1.4), round(size * 1.7)
    steps = [swatch + gap + round(font.getlength(name)) + 2 * gap for name, _ in entries]
    width = max([image.width, *(gap + step for step in steps)])
    places, x, y = [], gap, gap
    for step in steps:
        if x > gap and x + step > width:
            x, y = gap, y + line
        places.append((x, y))
        x += step
    framed = Image.new("RGB", (width, image.height + y + line), (255, 255, 255))
    framed.paste(image, (0, 0))
    draw = ImageDraw.Draw(framed)
    for (name, colour), (x, y) in zip(entries, places):
        y += image.height
        draw.rectangle((x, y, x + swatch, y + size), fill=colour, outline=(90, 90, 90))
        draw.text((x + swatch + gap, y + size / 2), name, fill=(20, 20, 20), font=font, anchor="lm")
    return framed
