"""Rows of pictures that are too large to be read whole: of TIFFs and arrays without the rest, of others after all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .pictures import (
    Bits,
    Guess,
    Picture,
    checked_array,
    largest_colour,
    no_file,
    pixels_of,
    tensor_array,
)

#: Rows that are looked through at a time for the largest value.
_LOOK = 256
#: Photometric interpretations and the compression of TIFF, by their numbers there.
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
_JPEG, _ORIENTATION = 7, 274
_UNKNOWN, _PREMULTIPLIED = 0, 1  # what a channel beside the colours is


class Rows(NamedTuple):
    """A picture that is read by rows.

    Attributes:
        height: in pixels, ``width`` too, the picture upright.
        read: ``read(top, bottom)`` are the rows from top on, without bottom, uint8 (bottom - top, width, C).
    """

    height: int
    width: int
    read: Callable[[int, int], NDArray[np.uint8]]


@contextmanager
def open_rows(
    picture: Picture,
    channels: int,
    bits: int | None = None,
    name: str = "picture",
    tell: Callable[[Guess], None] = Guess.tell,
) -> Iterator[Rows]:
    """The rows of a picture, as :func:`~fastscnn_fast.data.pictures.read_picture` has them and raises.

    Of the path of a TIFF of 1 to 4 channels of 8 or 16 bits only the strips or tiles that hold the rows are read, with
    the extra ``tiff``; arrays and tensors are not copied; all others are read whole. Whether a picture of 16 bits a
    channel uses fewer is found out by looking through all of it once, unless ``bits`` says it.
    """
    if isinstance(picture, Tensor):
        picture = tensor_array(picture, name)
    if isinstance(picture, np.ndarray):
        array = checked_array(picture, name)
        height, width = array.shape[:2]
        stored = _Stored(height, width, lambda top, bottom: array[top:bottom], array.itemsize == 2)
        yield stored.eight(channels, Bits(bits, name, tell))
        return
    if isinstance(picture, (str, os.PathLike)):
        with _tiff(os.fspath(picture)) as tiff:
            if tiff is not None:
                yield tiff.eight(channels, Bits(bits, name, tell).of(_Named(os.fspath(picture))))
                return
    pixels = pixels_of(picture, channels, bits, name, tell)
    height, width = pixels.shape[:2]
    yield Rows(height, width, lambda top, bottom: pixels[top:bottom])


class _Named(NamedTuple):
    name: str


class _Stored(NamedTuple):
    """Rows as they are stored, uint8 or, if ``deep``, uint16, (rows, width, C) and upright."""

    height: int
    width: int
    read: Callable[[int, int], NDArray[Any]]
    deep: bool

    def eight(self, channels: int, bits: Bits) -> Rows:
        """The same of so many channels of 8 bits."""
        used = bits.bits
        if self.deep and used is None:
            tops = range(0, self.height, _LOOK)
            parts = (self.read(top, min(top + _LOOK, self.height)) for top in tops)
            used = bits.chosen(max(map(largest_colour, parts)))

        def read(top: int, bottom: int) -> NDArray[np.uint8]:
            return pixels_of(self.read(top, bottom), channels, used, bits.name)

        return Rows(self.height, self.width, read)


@contextmanager
def _tiff(path: str) -> Iterator[_Stored | None]:
    """The first picture of a TIFF, if that is what there is and it is of a kind that Pillow reads alike."""
    if not path.lower().endswith((".tif", ".tiff")) or no_file(path) or not find_spec("tifffile"):
        yield None
        return
    import tifffile

    with ExitStack() as held:
        found = None
        with suppress(Exception):  # of what is damaged Pillow says what is wrong with it
            page = held.enter_context(tifffile.TiffFile(path)).pages[0]
            found = _Tiff(page, path).stored() if _is_plain(page) else None
        yield found


def _is_plain(page: Any) -> bool:
    """Whether a page holds 1 to 4 channels of 8 or 16 bits, as its tags say it."""
    deep = page.dtype == np.uint16
    kinds = {
        _BLACK_IS_ZERO: (1, 2),
        _RGB: (3, 4),
        _WHITE_IS_ZERO: (1,),
        _PALETTE: (1,),
        _YCBCR: (3,),
    }
    return (
        page.dtype in (np.uint8, np.uint16)
        and page.bitspersample == 8 * page.dtype.itemsize
        and page.samplesperpixel in kinds.get(page.photometric, ())
        and _PREMULTIPLIED not in page.extrasamples
        and page.imagedepth == 1
        and not (deep and page.photometric in (_WHITE_IS_ZERO, _PALETTE, _YCBCR))
        and (page.photometric != _YCBCR or page.compression == _JPEG)
    )


class _Tiff:
    """A page of a TIFF, decoded segment by segment: its strips or tiles."""

    def __init__(self, page: Any, path: str) -> None:
        self._page, self._path = page, path
        self._separate, _, self._height, self._width, self._samples = page.shaped
        tiled = page.is_tiled
        self._rows = min(
            (page.tilelength if tiled else page.rowsperstrip) or self._height, self._height
        )
        self._columns = page.tilewidth if tiled else self._width
        self._kept = -1 if _UNKNOWN in page.extrasamples else None  # such a channel is no alpha
        self._colours: NDArray[np.uint8] | None = None
        if page.photometric == _PALETTE:
            self._colours = (page.colormap >> 8).astype(np.uint8).T
        tag = page.tags.get(_ORIENTATION)
        self._orientation = int(tag.value) if tag is not None and tag.value in range(1, 9) else 1

    def stored(self) -> _Stored:
        size = (self._height, self._width)
        height, width = size if self._orientation < 5 else size[::-1]
        return _Stored(height, width, self._upright, self._page.dtype.itemsize == 2)

    def _upright(self, top: int, bottom: int) -> NDArray[Any]:
        """Rows of the picture upright, which may be columns of what is stored, from behind."""
        turned = self._orientation >= 5
        length = self._width if turned else self._height
        if self._orientation in (3, 4, 7, 8):
            top, bottom = length - bottom, length - top
        window = (
            self._window(0, self._height, top, bottom)
            if turned
            else self._window(top, bottom, 0, self._width)
        )
        if turned:
            window = window.swapaxes(0, 1)
        if self._orientation in (3, 4, 7, 8):
            window = window[::-1]
        if self._orientation in (2, 3, 6, 7):
            window = window[:, ::-1]
        return window

    def _window(self, top: int, bottom: int, left: int, right: int) -> NDArray[Any]:
        """What is stored in rows and columns, (rows, columns, C)."""
        page = self._page
        try:
            if page.is_contiguous and self._separate == 1 and (left, right) == (0, self._width):
                window = self._plain(top, bottom)
            else:
                window = self._decoded(top, bottom, left, right)
        except Exception as error:  # decoders raise nearly anything on a damaged file
            raise ValueError(f"{self._path}: cannot be read: {error}") from error
        window = window[..., : self._kept]
        if self._colours is not None:
            window = self._colours[window[..., 0]]
        return 255 - window if page.photometric == _WHITE_IS_ZERO else window

    def _plain(self, top: int, bottom: int) -> NDArray[Any]:
        """Rows that lie in the file as they are, whatever strips it says."""
        file, row = self._page.parent.filehandle, self._width * self._samples
        dtype = np.dtype(self._page.parent.byteorder + self._page.dtype.char)
        file.seek(self._page.dataoffsets[0] + top * row * dtype.itemsize)
        content = file.read((bottom - top) * row * dtype.itemsize)
        if len(content) < (bottom - top) * row * dtype.itemsize:
            raise ValueError(f"it is cut off before row {bottom}")
        values = np.frombuffer(content, dtype)
        rows = values.reshape(bottom - top, self._width, self._samples)
        return rows.astype(self._page.dtype)

    def _decoded(self, top: int, bottom: int, left: int, right: int) -> NDArray[Any]:
        page, file = self._page, self._page.parent.filehandle
        window = np.zeros((self._separate, bottom - top, right - left, self._samples), page.dtype)
        down, across = -(-self._height // self._rows), -(-self._width // self._columns)
        decode = page.decode  # which moves the file when it is made, as these two do
        tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
        for index, (offset, count) in enumerate(zip(page.dataoffsets, page.databytecounts)):
            plane, place = divmod(index, down * across)
            y, x = place // across * self._rows, place % across * self._columns
            if not (top < y + self._rows and y < bottom and left < x + self._columns and x < right):
                continue
            if count == 0:  # as it is written where there is nothing
                continue
            file.seek(offset)
            segment, _, shape = decode(file.read(count), index, **tables)
            height, width = shape[1], shape[2]
            y0, y1, x0, x1 = (
                max(top, y),
                min(bottom, y + height),
                max(left, x),
                min(right, x + width),
            )
            part = segment[0, y0 - y : y1 - y, x0 - x : x1 - x]
            window[plane, y0 - top : y1 - top, x0 - left : x1 - left] = part
        return np.moveaxis(window, 0, 3).reshape(bottom - top, right - left, -1)
