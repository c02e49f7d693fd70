"""Pictures in and out: read to pixels, resized; labels as palette images and as a tint with a legend."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from ..writing import write_whole
from .classes import Colour

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
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def read_picture(picture: Picture, channels: int = 3) -> NDArray[np.uint8]:
    """The upright pixels of a picture, uint8 (H, W, channels).

    Args:
        picture: a path, a PIL image, or uint8 pixels (H, W) or (H, W, C). Files and PIL images are turned
            upright as their EXIF orientation says.
        channels: 1 to 4: grey, grey + alpha, RGB or RGBA, to which pictures of other modes are converted;
            16 bits become 8; an alpha channel that is not asked for is ignored.

    Raises:
        ValueError: it cannot be read, or has no pixels; the message names the file where there is one.
    """
    if isinstance(picture, np.ndarray):
        return _array_pixels(picture, channels)
    if isinstance(picture, Image.Image):
        return _image_pixels(picture, channels)
    if not Path(picture).is_file():
        what = "is a folder" if Path(picture).is_dir() else "does not exist"
        raise ValueError(f"{os.fspath(picture)}: {what}")
    try:
        with Image.open(picture) as image:
            return _image_pixels(image, channels)
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        raise ValueError(f"{os.fspath(picture)}: cannot be read: {error}") from error


def _image_pixels(image: Image.Image, channels: int) -> NDArray[np.uint8]:
    if 0 in image.size:
        raise ValueError(f"picture must have pixels, got {image.size[1]}x{image.size[0]}")
    load_whole(image)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey; Pillow may keep it in 32 bits
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("picture must have at most 16 bits a channel")
        bits = 8 if image.mode != "I" or values.max() > 0xFF else 0
        image = Image.fromarray((values >> bits).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("picture must hold integers, got floating-point pixels of unknown range")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    pixels = np.array(image.convert(_MODES[channels]))
    return pixels.reshape(*pixels.shape[:2], channels)


def load_whole(image: Image.Image) -> None:
    """Reads the pixels of an opened file; a PNG whose data end too soon is damaged, which Pillow does not notice.

    Raises:
        Exception: the file is damaged; Pillow's decoders raise nearly anything.
    """
    content = b""
    if isinstance(image, PngImagePlugin.PngImageFile) and image.fp is not None and image.tile:
        place = image.fp.tell()
        image.fp.seek(0)
        content = image.fp.read()
        image.fp.seek(place)
    image.load()
    if not content or image.size[1] == 0:
        return
    last = image.crop((0, image.height - 1, image.width, image.height))
    if "interlace" not in image.info and np.asarray(last).any():
        return  # rows that are not there are zeros
    missing = _png_missing(content)
    if missing:
        raise ValueError(f"image file is truncated ({missing} bytes of pixels are missing)")


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
    """Labels (H, W) as a palette image: the pixel values are the class ids, the colours show them."""
    image = Image.fromarray(np.ascontiguousarray(labels))
    image.putpalette([channel for colour in palette for channel in colour])
    return image


def overlay(
    picture: Picture,
    labels: NDArray[np.uint8],
    classes: Sequence[str],
    palette: Sequence[Colour],
    strength: float = 0.55,
) -> Image.Image:
    """The picture tinted by class, above a legend of the classes that occur, in RGB.

    ``labels`` (H, W) has the picture's size; labels without a name in ``classes`` are not tinted.

    Raises:
        ValueError: the sizes differ, or the picture cannot be read.
    """
    pixels = read_picture(picture)
    if labels.shape != pixels.shape[:2]:
        raise ValueError(f"labels must be {pixels.shape[:2]} like the picture, got {labels.shape}")
    plain = Image.fromarray(pixels)
    tinted = Image.blend(plain, label_image(labels, palette).convert("RGB"), strength)
    tinted.paste(plain, mask=Image.fromarray(labels >= len(classes)))
    present = [k for k in np.unique(labels).tolist() if k < len(classes)]
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
