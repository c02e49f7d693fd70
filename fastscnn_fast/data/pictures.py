"""Pictures in and out: read to pixels, resized; labels as palette images and as a tint with a legend."""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import struct
import sys
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageDraw, ImageFile, ImageFont, UnidentifiedImageError
from torch import Tensor

from ..backends.registry import logger
from ..program.memory import check_memory
from ..writing import write_whole
from .classes import Colour, label_colours, label_count


class BinaryFile(Protocol):
    """What ``open`` gives in mode "rb", ``io.BytesIO``, an upload, an answer of a server."""

    def read(self) -> bytes: ...


#: What is read as one picture; pixels are RGB.
Picture = (
    Image.Image
    | str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | BinaryFile
    | NDArray[np.uint8]
    | NDArray[np.uint16]
    | Tensor
)

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
_TAKEN = "a path, a PIL image, the bytes of a file, a binary file, uint8 or uint16 pixels"
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/|data:", re.IGNORECASE)  # C:/ is none
#: What is wrong with a video where only pictures are taken.
VIDEO = "is a video, and only pictures are read here: fastscnn_fast.segment_video takes it, and the command segment"
_HEIC = "is HEIC, which is not read: convert it to JPEG or PNG first"
#: Endings by which files in a folder are taken for videos.
VIDEO_SUFFIXES = (
    *(".3gp", ".asf", ".avi", ".flv", ".h264", ".h265", ".hevc", ".m2ts", ".m4v", ".mkv", ".mov"),
    *(".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".vob", ".webm", ".wmv", ".y4m"),
)
#: Endings of files that people take for pictures, and what is wrong with them.
_OTHER_SUFFIXES = dict.fromkeys(VIDEO_SUFFIXES, VIDEO) | dict.fromkeys((".heic", ".heif"), _HEIC)
#: How such files begin.
_OTHER_STARTS = {
    rb"....ftyp(hei|hev|mif1|msf1)": _HEIC,
    rb"....(ftyp(?!avi)|moov|mdat|wide|skip)": VIDEO,  # MPEG-4, QuickTime; avif and avis are AVIF
    rb"\x1aE\xdf\xa3|RIFF....AVI |FLV\x01|OggS|0&\xb2u|\0\0\x01[\xba\xb3]|YUV4MPEG2": VIDEO,
    rb"G.{187}G.{187}G": VIDEO,  # MPEG-TS
}
#: What the results of a picture are called, after its name, and those of a video.
LABELS, CONFIDENCE, OVERLAY = "_labels.png", "_confidence.png", "_overlay"
VIDEO_LABELS, VIDEO_OVERLAY = "_labels.mkv", "_overlay.mp4"
#: How overlays are stored.
OVERLAY_FORMATS = ("png", "jpg")
#: Endings by which files are known to be results.
ENDINGS = (
    *(LABELS, CONFIDENCE, VIDEO_LABELS, VIDEO_OVERLAY),
    *(f"{OVERLAY}.{kind}" for kind in OVERLAY_FORMATS),
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
#: Formats whose colours may have 16 bits a channel here.
_DEEP = ("PNG", "TIFF")
#: How many of 16 bits a picture may use, besides all of them.
_FEWER_BITS = (8, 10, 12, 14)
#: Folders, and bits guessed there, that a warning told of.
_TOLD: set[tuple[str, int]] = set()
#: How a TIFF holds its channels, by its numbers.
_BITS, _PHOTOMETRIC, _PLANAR = 258, 262, 284
_WHITE_IS_ZERO, _APART = 0, 2
#: What turns a picture upright, by its EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: Pixels a side that libjpeg takes.
_JPEG_MOST = 65500
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


class Guess(NamedTuple):
    """That a picture of 16 bits a channel, whose largest value is ``largest``, was taken for one of ``bits``."""

    name: str
    folder: str | None
    largest: int
    bits: int

    def tell(self) -> None:
        """Warns, of files once a folder and number of bits."""
        if self.folder is not None:
            if (self.folder, self.bits) in _TOLD:
                return
            _TOLD.add((self.folder, self.bits))
        logger.warning(
            "%s: has 16 bits a channel and no value above %d, so it is taken for one of %d bits; say how many it has"
            " by bits= or --bits: a dark picture of more would come out too bright",
            self.name,
            self.largest,
            self.bits,
        )


def read_picture(picture: Picture, channels: int = 3, bits: int | None = None) -> NDArray[np.uint8]:
    """The upright pixels of a picture, uint8 (H, W, channels), RGB.

    Args:
        picture: one of

            - a path, the bytes of a picture's file, or a file opened in binary mode (which is read from its
              beginning where it can be rewound, as Pillow does) or a PIL image; of several frames the one that
              it stands at. They are turned upright as their EXIF orientation says. Of colours of 16 bits Pillow
              keeps the upper eight: a PIL image must be given before anything loads its pixels, reading it here
              too, if the others are to count.
            - an array of uint8 or uint16 pixels, grey (H, W) or (H, W, C), or a tensor of them (C, H, W) on
              any device. The colours of 3 and 4 channels are RGB: OpenCV's frames, which are BGR, are
              ``frame[:, :, ::-1]``.
        channels: 1 to 4: grey, grey + alpha, RGB or RGBA, to which pictures of other modes are converted;
            an alpha channel that is not asked for is ignored.
        bits: 8 to 16, how many bits a channel a picture stored in more than 8 uses: the upper eight of them
            are kept. By default the least of 8, 10, 12, 14 and 16 that holds its largest value, with a
            warning where it is not 16 (a dark picture may use more); PGM files say it themselves.

    Raises:
        TypeError: it is nothing of these, or ``bits`` is no integer.
        ValueError: it cannot be read, has no pixels, values of more than ``bits``, or another dtype or shape,
            or ``bits`` is less than 16 and a PIL image of a file of colours has been loaded; the message names
            the file where there is one.
        RuntimeError: a tensor has lost its memory.
    """
    return pixels_of(picture, channels, bits)


def pixels_of(
    picture: Picture,
    channels: int,
    bits: int | None,
    name: str = "picture",
    tell: Callable[[Guess], None] = Guess.tell,
) -> NDArray[np.uint8]:
    """As :func:`read_picture`; errors call what has no name of its own ``name``, and ``tell`` hears of guesses."""
    to_eight = Bits(check_bits(bits), name, tell)
    if isinstance(picture, Tensor):
        return _array_pixels(tensor_array(picture, name), channels, to_eight)
    if isinstance(picture, np.ndarray):
        return _array_pixels(np.asarray(picture), channels, to_eight)
    if isinstance(picture, Image.Image):
        try:
            return _image_pixels(picture, channels, to_eight)
        except Exception as error:  # as of files
            said = "" if type(error) is ValueError else "cannot be read: "
            raise ValueError(f"{to_eight.of(picture).name}: {said}{error}") from error
    if isinstance(picture, (bytes, bytearray, memoryview)):
        return _content_pixels(io.BytesIO(bytes(picture)), channels, to_eight)
    if isinstance(picture, (str, os.PathLike)):
        path = os.fspath(picture)
        if not isinstance(path, str) or path == "":
            raise ValueError(f"{name} must be {_TAKEN}, got the path {path!r}")
        if (why_not := no_file(path)) is not None:
            raise ValueError(f"{path}: {why_not}")
        try:
            with open(path, "rb") as file:
                return _content_pixels(file, channels, to_eight.of(file))
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if callable(getattr(picture, "read", None)):
        return _content_pixels(_rewound(picture, name), channels, to_eight.of(picture))
    raise TypeError(f"{name} must be {_TAKEN}, got {type(picture).__name__}")


def check_bits(bits: Any) -> int | None:
    """The number of ``bits``, if any, as an int of Python: numpy's of 8 bits would shift beyond themselves."""
    if bits is None:
        return None
    if isinstance(bits, bool) or not isinstance(bits, (int, np.integer)):
        raise TypeError(f"bits must be an integer from 8 to 16, got {bits!r}")
    if not 8 <= bits <= 16:
        raise ValueError(f"bits must be 8 to 16, got {bits}")
    return int(bits)


def no_file(path: str) -> str | None:
    """What ``path`` is where it is no regular file, in words that follow it; None where it is one."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a character that no path has
        link = os.path.islink(path)
        if _URL.match(path):
            return "is a URL, and only files are read: download it first"
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            return "is a link in a circle" if link else "is behind a link in a circle"
        if isinstance(error, (FileNotFoundError, ValueError)):
            return (
                f"is a link to {os.readlink(path)}, which does not exist"
                if link
                else "does not exist"
            )
        return f"cannot be read: {error.strerror}"
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return f"is a {kinds.get(stat.S_IFMT(mode), 'device')}"


def no_picture(name: str, start: bytes = b"") -> str | None:
    """What a file is that is taken for a picture and is none, by how it is called and begins."""
    for pattern, said in _OTHER_STARTS.items():
        if re.match(pattern, start, re.DOTALL):
            return said
    return _OTHER_SUFFIXES.get(os.path.splitext(name)[1].lower())


def is_video(path: Path) -> bool:
    """Whether a file is called as a video, or begins as one and is not called as a picture."""
    said = no_picture(path.name)
    if said is None and path.suffix.lower() not in PICTURE_SUFFIXES:
        with suppress(OSError), path.open("rb") as file:
            said = no_picture("", file.read(1024))
    return said == VIDEO


class Bits(NamedTuple):
    """How values of 16 bits become eight, and who hears of a guess."""

    bits: int | None
    name: str
    tell: Callable[[Guess], None]
    folder: str | None = None

    def of(self, source: object) -> Bits:
        """The same for a file or image that may have a name of its own."""
        found = getattr(source, "filename", None) or getattr(source, "name", None)
        if not isinstance(found, (str, os.PathLike)) or not os.fspath(found):
            return self
        name = os.fsdecode(found)
        return self._replace(name=name, folder=os.path.dirname(name))

    def chosen(self, largest: int) -> int:
        """How many bits a picture with this largest value has."""
        if self.bits is None:
            bits = next((b for b in _FEWER_BITS if largest < 1 << b), 16)
            if bits < 16 and largest:
                self.tell(Guess(self.name, self.folder, largest, bits))
            return bits
        if largest >= 1 << self.bits:
            raise ValueError(
                f"bits must be enough for the picture's largest value, {largest}, got {self.bits}"
            )
        return self.bits

    def __call__(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        """The upper eight of grey (H, W) or colours (H, W, C), as :func:`read_picture` has it."""
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("must have at most 16 bits a channel")
        bits = self.chosen(largest_colour(values))
        eight: NDArray[np.uint8] = np.minimum(values >> (bits - 8), 255).astype(np.uint8)
        return eight


def largest_colour(values: NDArray[Any]) -> int:
    """The largest of grey values (H, W) or colours (H, W, C); alpha has no say."""
    colours = values if values.ndim == 2 else values[..., : (values.shape[2] - 1) // 2 * 2 + 1]
    return int(colours.max())


def rewind(file: Any) -> None:
    """Takes a file to its beginning, where there is a way back."""
    with suppress(AttributeError, OSError, ValueError):  # ValueError: it is closed
        file.seek(0)


def _rewound(file: Any, name: str) -> io.BytesIO:
    """All of a binary file, from its beginning where there is a way back."""
    rewind(file)
    try:
        content = file.read()
    except UnicodeDecodeError:
        content = ""
    except (OSError, ValueError) as error:  # closed, or not open for reading
        raise ValueError(f"{name}: cannot be read: {error}") from error
    if not isinstance(content, bytes):
        kind = type(content).__name__
        raise TypeError(
            f'{name} must be a file opened in binary mode ("rb"), its read() gave {kind}'
        )
    return io.BytesIO(content)


def _content_pixels(file: IO[bytes], channels: int, to_eight: Bits) -> NDArray[np.uint8]:
    """The pixels of a picture's file."""
    try:
        with Image.open(file) as image:
            return _image_pixels(image, channels, to_eight)
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        why_not = f"cannot be read: {error}"
        if isinstance(error, UnidentifiedImageError):
            file.seek(0)
            start = file.read(1024)
            reason = "is of no known picture format" if start else "is empty"
            why_not = no_picture(to_eight.name, start) or f"cannot be read: it {reason}"
        elif isinstance(error, Image.DecompressionBombError):
            why_not += " (TIFFs of any size are read by segment(tile=) and segment --tile, with the extra tiff)"
        raise ValueError(f"{to_eight.name}: {why_not}") from error


def _image_pixels(image: Image.Image, channels: int, to_eight: Bits) -> NDArray[np.uint8]:
    if 0 in image.size:
        raise ValueError(f"must have pixels, got {image.size[1]}x{image.size[0]}")
    to_eight = to_eight.of(image)
    file, negative = load_whole(image), is_white_zero(image)
    image = _upright(image)
    if image.mode.startswith("I"):  # 16-bit grey; Pillow may keep it in 32 bits
        if file.decoder.startswith("ppm"):  # which brings what the file says to 16 bits
            to_eight = to_eight._replace(bits=16)
        eight = to_eight(np.asarray(image))
        image = Image.fromarray(255 - eight if negative else eight)
    elif file.deep_colour and (to_eight.bits or 0) < 16:
        high = np.asarray(image.convert("RGBA") if image.mode == "LA" else image)
        if to_eight.bits is not None or high[..., :3].max() < 1 << max(_FEWER_BITS) - 8:
            image = Image.fromarray(to_eight(high.astype(np.uint16) << 8 | _low_bytes(file)))
    elif file.loaded and image.mode in ("LA", "RGB", "RGBA") and (to_eight.bits or 16) < 16:
        rule = "bits must be 16 or left out for a file's colours that Pillow has loaded"
        raise ValueError(f"{rule}, since it keeps the upper 8 of 16, got {to_eight.bits}")
    if image.mode == "F":
        raise ValueError("must hold integers, got floating-point pixels of unknown range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    pixels = np.array(image.convert(_MODES[channels]))
    return pixels.reshape(*pixels.shape[:2], channels)


class _File(NamedTuple):
    """What an opened picture's file says of it that Pillow forgets when it reads the pixels.

    ``raw`` is how the file holds pixels, in Pillow's words, ``decoder`` what reads them, ``frame`` which of them
    and ``orientation`` how it says that they lie, as :func:`orientation` has it. Where they were ``loaded`` before
    there is only that.
    """

    content: bytes = b""
    raw: str = ""
    decoder: str = ""
    frame: int = 0
    orientation: int = 1
    loaded: bool = False

    @property
    def deep_colour(self) -> bool:
        """Whether there are 16 bits a channel, of which Pillow keeps the upper eight."""
        return ";16" in self.raw and self.raw.startswith(("RGB", "LA"))


def load_whole(image: Image.Image) -> _File:
    """Reads the pixels of an opened file; a PNG whose data end too soon is damaged, which Pillow does not notice.

    Raises:
        Exception: the file is damaged; Pillow's decoders raise nearly anything.
    """
    file, tags = _file_of(image), _tags(image)
    bits = tags.get(_BITS, (8,))
    if tags.get(_PLANAR) == _APART and len(bits) > 1:
        deep, grey = max(bits) > 8, image.mode in ("LA", "La", "PA")
        if deep or grey:  # read as if of 8, without its alpha
            where = "they have more than 8 bits" if deep else "one of two is alpha"
            rule = f"must hold its channels together where {where}"
            raise ValueError(f"{rule} (or be read in tiles, with the extra tiff)")
    stored = orientation(image) if tags else 1  # Pillow turns TIFFs as it loads them
    image.load()
    file = file._replace(orientation=max(stored, orientation(image)))
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
    if not isinstance(image, ImageFile.ImageFile):
        return _File()
    if not image.tile or image.fp is None:  # one that was pickled has no fp
        return _File(loaded=image.format in _DEEP)
    decoder, _, _, args = image.tile[0]
    raw = args if isinstance(args, str) else str(args[0]) if args else ""
    content = b""
    if image.format in _DEEP:
        place = image.fp.tell()
        image.fp.seek(0)
        content = image.fp.read()
        image.fp.seek(place)
    return _File(content, raw, decoder, image.tell())


def _tags(image: Image.Image) -> Any:
    """Those of an opened TIFF; none of others."""
    return getattr(image, "tag_v2", {})


def is_white_zero(image: Image.Image) -> bool:
    """Whether an opened picture is a TIFF that holds its grey as a negative, which Pillow turns round in 8 bits alone."""
    return bool(_tags(image).get(_PHOTOMETRIC) == _WHITE_IS_ZERO)


def orientation(image: Image.Image) -> int:
    """How the EXIF of an opened picture says that it lies, 1 to 8; 1, upright, where it says nothing or is damaged.

    Of TIFFs it is what is left to turn: Pillow turns them as it loads them.
    """
    with suppress(Exception):  # of damaged EXIF Pillow raises nearly anything
        found = image.getexif().get(ExifTags.Base.Orientation)
        if found in _TURNS:
            return int(found)
    return 1


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def _retell(image: ImageFile.ImageFile, change: Callable[[Any], Any]) -> None:
    """Has an opened picture, not loaded yet, be decoded with other arguments."""
    tiles: list[Any] = list(image.tile)
    make: Any = getattr(type(tiles[0]), "_make", tuple)  # plain tuples before Pillow 11
    image.tile = [make((*place, change(args))) for *place, args in tiles]


def unscale(image: ImageFile.ImageFile) -> None:
    """Has the values of an opened PGM or PPM be those that are stored.

    Pillow brings the largest that the file names to 255 or 65535.
    """
    if image.format == "PPM" and image.tile[0][0].startswith("ppm") and image.mode != "1":
        _retell(image, lambda args: (args[0], 255 if args[1] < 256 else 65535))


def _low_bytes(file: _File) -> NDArray[np.uint8]:
    """The lower eight of 16 bits a channel, upright: Pillow is told that the bytes lie the other way round."""
    other = {"B": "L", "L": "B", "N": {"little": "B", "big": "L"}[sys.byteorder]}
    grey = file.raw == "LA;16B"  # which there is no other way round of
    raw = "RGBA" if grey else file.raw[:-1] + other[file.raw[-1]]
    with Image.open(io.BytesIO(file.content)) as image:
        if file.frame and image.format == "PNG":  # laid over those before it, which bytes cannot be
            raise ValueError(
                "must be the first frame of a PNG of 16 bits a channel, unless bits is 16"
            )
        image.seek(file.frame)
        _retell(image, lambda args: raw if isinstance(args, str) else (raw, *args[1:]))
        image.load()
        low = np.asarray(_upright(image))
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


def tensor_array(x: Tensor, name: str) -> NDArray[Any]:
    """A tensor of pixels (C, H, W) as an array (H, W, C), in the tensor's memory where that is the CPU's."""
    if x.dtype not in (torch.uint8, torch.uint16):
        hint = "; the network itself takes normalised floats" if x.is_floating_point() else ""
        raise ValueError(f"{name} must be a uint8 or uint16 tensor, got {x.dtype}{hint}")
    if x.ndim != 3 or x.shape[0] not in _MODES:
        hint = "; a list holds several pictures" if x.ndim == 4 else ""
        raise ValueError(
            f"{name} must be a tensor (C, H, W) of 1 to 4 channels, got shape {tuple(x.shape)}{hint}"
        )
    if x.layout != torch.strided or x.device.type == "meta":
        raise ValueError(f"{name} must be a tensor with pixels, got {x.layout} on {x.device}")
    check_memory(name, x)
    return x.detach().cpu().permute(1, 2, 0).numpy()


def _array_pixels(pixels: NDArray[Any], channels: int, to_eight: Bits) -> NDArray[np.uint8]:
    """The array itself, where torch can take it as it is."""
    pixels = checked_array(pixels, to_eight.name)
    if pixels.dtype.itemsize == 2:
        pixels = to_eight(pixels)
    if pixels.shape[2] != channels:
        return _image_pixels(_to_image(pixels), channels, to_eight)
    writable: NDArray[np.uint8] = np.require(pixels, requirements=["C", "W"])
    return writable


def checked_array(pixels: NDArray[Any], name: str) -> NDArray[Any]:
    """Pixels (H, W, C), where they are of a dtype and shape that is taken."""
    shape = pixels.shape
    if pixels.dtype.kind != "u" or pixels.dtype.itemsize > 2:
        hint = "; the network itself takes normalised floats" if pixels.dtype.kind == "f" else ""
        raise ValueError(f"{name} must be a uint8 or uint16 array, got {pixels.dtype}{hint}")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in _MODES:
        hint = "; a list holds several pictures" if pixels.ndim == 4 else ""
        raise ValueError(f"{name} must be (H, W) or (H, W, 1 to 4), got shape {shape}{hint}")
    if 0 in shape:
        raise ValueError(f"{name} must have pixels, got shape {shape}")
    return pixels


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


def size_of(path: str | os.PathLike[str]) -> int:
    """How many pixels a picture's file says that it has; 0 where it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.width * image.height
    except Exception:  # as in reading it, which says what is wrong
        return 0


def encoded(image: Image.Image, kind: str = "png", compress_level: int = 6) -> memoryview:
    """The bytes of a PNG file, or, for ``kind`` "jpg", of a JPEG file of quality 90.

    Raises:
        ValueError: the image is too large for JPEG.
    """
    content = io.BytesIO()
    if kind == "png":
        # Of labels zlib is to look for runs alone: smaller files than by the whole search, in a third of the time.
        strategy = zlib.Z_RLE if image.mode == "P" else zlib.Z_DEFAULT_STRATEGY
        image.save(content, "PNG", compress_level=compress_level, compress_type=strategy)
    else:
        if max(image.size) > _JPEG_MOST:
            size = f"{image.height}x{image.width}"
            raise ValueError(f"a JPEG must have at most {_JPEG_MOST} pixels a side, got {size}")
        image.save(content, "JPEG", quality=90)
    return content.getbuffer()


def save_png(image: Image.Image, path: Path) -> None:
    """Writes a PNG that is whole or not there, but for power cuts; OSError names the file and the cause."""
    write_whole(path, encoded(image), durable=False)


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
    tinted = tint(pixels, labels, classes, palette, strength)
    return _with_legend(tinted, named(np.unique(labels), classes, palette))


def tint(
    pixels: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    classes: Sequence[str],
    palette: Sequence[Colour],
    strength: float = 0.55,
) -> Image.Image:
    """:func:`overlay` of pixels (H, W, 3), without the legend."""
    plain = Image.fromarray(pixels)
    tinted = Image.blend(plain, label_image(labels, palette).convert("RGB"), strength)
    first = label_count(len(classes)) - len(classes)  # label of the first class
    tinted.paste(plain, mask=Image.fromarray((labels < first) | (labels >= first + len(classes))))
    return tinted


def named(
    labels: NDArray[np.integer[Any]], classes: Sequence[str], palette: Sequence[Colour]
) -> list[tuple[str, Colour]]:
    """Names and colours of those of ``labels`` that have them."""
    first = label_count(len(classes)) - len(classes)
    present = [k - first for k in labels.tolist() if 0 <= k - first < len(classes)]
    return [(classes[k], palette[k]) for k in present]


def legend(entries: Sequence[tuple[str, Colour]], least: int, size: int, most: int) -> Image.Image:
    """Rows of colour swatches with names in letters of ``size`` pixels, at least ``least`` wide.

    It is wider than ``most`` only where a name is.
    """
    font: Any = ImageFont.load_default(size)
    gap, swatch, line = size // 2, round(size * 1.4), round(size * 1.7)
    steps = [swatch + gap + round(font.getlength(name)) + 2 * gap for name, _ in entries]
    most = max([most, *(gap + step for step in steps)])
    places, x, y, width = [], gap, gap, least
    for step in steps:
        if x > gap and x + step > most:
            x, y = gap, y + line
        places.append((x, y))
        x += step
        width = max(width, x)
    rows = Image.new("RGB", (width, y + line), (255, 255, 255))
    draw = ImageDraw.Draw(rows)
    for (name, colour), (x, y) in zip(entries, places):
        draw.rectangle((x, y, x + swatch, y + size), fill=colour, outline=(90, 90, 90))
        draw.text((x + swatch + gap, y + size / 2), name, fill=(20, 20, 20), font=font, anchor="lm")
    return rows


def _with_legend(image: Image.Image, entries: Sequence[tuple[str, Colour]]) -> Image.Image:
    """``image`` above a legend; small images get a wider frame."""
    below = legend(entries, image.width, max(13, image.width // 55), image.width)
    framed = Image.new("RGB", (below.width, image.height + below.height), (255, 255, 255))
    framed.paste(image, (0, 0))
    framed.paste(below, (0, image.height))
    return framed
