"""Pictures of any size of ``fastscnn_fast segment --tile``: read, run and written by rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..data.classes import label_colours
from ..data.pictures import CONFIDENCE, LABELS, OVERLAY, legend, named, pixels_of, tint
from ..data.rows import PngRows
from ..data.windows import open_rows
from ..runtime.beside import beside
from ..runtime.fused import FusedFastSCNN
from ..runtime.tiles import Tiling, bands
from ..writing import whole


def segment(
    fast: FusedFastSCNN,
    picture: Path,
    name: Path,
    cut: Tiling,
    bits: int | None = None,
    overlays: bool = True,
    confidence: bool = False,
) -> None:
    """Writes the results of one picture, called ``name``, each whole or not there.

    The next rows are read and run while the last ones are written.

    Raises:
        ValueError: the picture cannot be read.
        OSError: a file cannot be written.
    """
    with ExitStack() as held:
        rows = held.enter_context(open_rows(picture, fast.config.in_channels, bits))
        name.parent.mkdir(parents=True, exist_ok=True)

        def png(ending: str, width: int = rows.width, **options: Any) -> PngRows:
            return held.enter_context(_png(name.with_name(name.name + ending), width, **options))

        labels = png(LABELS, palette=label_colours(fast.palette))
        sure = png(CONFIDENCE) if confidence else None
        shown = _Shown(fast, rows.width) if overlays else None
        tinted = png(f"{OVERLAY}.png", shown.width, colour=True) if shown else None
        bar = held.enter_context(
            tqdm(total=rows.height, unit="row", desc=str(picture), disable=None)
        )
        steps = held.enter_context(closing(beside(bands(fast, rows, cut, confidence), 1)))
        for band in steps:
            labels.write(band.labels)
            if sure is not None and band.confidence is not None:
                sure.write(np.rint(255 * band.confidence).astype(np.uint8))
            if tinted is not None and shown is not None:
                tinted.write(shown.tinted(band.pixels, band.labels))
            bar.update(len(band.labels))
        if tinted is not None and shown is not None:
            tinted.write(shown.legend())


@contextmanager
def _png(path: Path, width: int, **options: Any) -> Iterator[PngRows]:
    try:
        with whole(path) as part, part.open("wb") as file:
            png = PngRows(file, width, **options)
            yield png
            png.close()
    except OSError as error:
        if error.filename is None:  # as on a full disk
            raise OSError(error.errno, error.strerror, str(path.parent)) from error
        if error.filename2 is not None or str(error.filename).endswith(".part"):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


class _Shown:
    """The tinted picture by rows, and below them the legend; narrow pictures get a wider frame."""

    def __init__(self, fast: FusedFastSCNN, width: int) -> None:
        self._fast, self._size = fast, max(13, width // 55)
        self._picture = width
        self._present = np.zeros(256, bool)
        everything = list(zip(fast.classes, fast.palette))
        self.width = legend(everything, width, self._size, width).width

    def tinted(self, pixels: NDArray[np.uint8], labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Rows (h, width, 3) of pixels (h, w, C) and labels (h, w)."""
        self._present[np.bincount(labels.reshape(-1), minlength=256) > 0] = True
        classes, palette = self._fast.classes, self._fast.palette
        rows = np.full((len(labels), self.width, 3), 255, np.uint8)
        rows[:, : self._picture] = np.asarray(
            tint(pixels_of(pixels, 3, None), labels, classes, palette)
        )
        return rows

    def legend(self) -> NDArray[np.uint8]:
        """That of the classes that occurred."""
        present = np.flatnonzero(self._present)
        entries = named(present, self._fast.classes, self._fast.palette)
        return np.asarray(legend(entries, self.width, self._size, self._picture))
