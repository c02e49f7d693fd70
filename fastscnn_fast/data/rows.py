"""PNG files that are written by rows, for pictures that are too large to be held."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import IO

import numpy as np
from numpy.typing import NDArray

from .classes import Colour

_GREY, _COLOUR, _PALETTE = 0, 2, 3  # kinds of PNG, by their numbers there
_AS_IT_IS, _FROM_THE_LEFT = 0, 1  # and its filters


class PngRows:
    """A PNG of 8 bits a channel whose rows come one after the other; how many they are it knows at the end.

    Rows are uint8 (rows, width): grey, or, with a ``palette``, its indices; or (rows, width, 3): RGB.
    """

    def __init__(
        self, file: IO[bytes], width: int, colour: bool = False, palette: Sequence[Colour] = ()
    ) -> None:
        self._file, self._width, self._height = file, width, 0
        self._kind = _COLOUR if colour else _PALETTE if palette else _GREY
        strategy = zlib.Z_RLE if palette else zlib.Z_DEFAULT_STRATEGY  # labels are runs
        self._packed = zlib.compressobj(3, strategy=strategy)
        file.write(b"\x89PNG\r\n\x1a\n")
        self._header()
        if palette:
            self._chunk(b"PLTE", bytes(channel for one in palette for channel in one))

    def _header(self) -> None:
        sides = struct.pack(">II", self._width, max(self._height, 1))
        self._chunk(b"IHDR", sides + bytes((8, self._kind, 0, 0, 0)))

    def _chunk(self, kind: bytes, content: bytes) -> None:
        check = struct.pack(">I", zlib.crc32(kind + content))
        self._file.write(struct.pack(">I", len(content)) + kind + content + check)

    def write(self, rows: NDArray[np.uint8]) -> None:
        """Adds rows below those that are there."""
        flat = rows.reshape(len(rows), -1)
        filtered = np.empty((len(rows), 1 + flat.shape[1]), np.uint8)
        if self._kind == _COLOUR:
            filtered[:, 0] = _FROM_THE_LEFT
            filtered[:, 1:4] = flat[:, :3]
            np.subtract(flat[:, 3:], flat[:, :-3], out=filtered[:, 4:])
        else:
            filtered[:, 0] = _AS_IT_IS
            filtered[:, 1:] = flat
        self._height += len(rows)
        if content := self._packed.compress(filtered.data):
            self._chunk(b"IDAT", content)

    def close(self) -> None:
        """Ends the picture; the file stays open."""
        self._chunk(b"IDAT", self._packed.flush())
        self._chunk(b"IEND", b"")
        self._file.seek(8)
        self._header()
