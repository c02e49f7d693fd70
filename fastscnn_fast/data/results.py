"""What is written of a labelled picture: class ids, how probable they are, and the picture tinted by class."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .classes import Named
from .pictures import CONFIDENCE, LABELS, OVERLAY, encoded, label_image, overlay


def endings(overlay_format: str | None = "png", confidence: bool = False) -> list[str]:
    """Those of the files of :func:`encode`, after a picture's name."""
    sure = [CONFIDENCE] if confidence else []
    shown = [] if overlay_format is None else [f"{OVERLAY}.{overlay_format}"]
    return [LABELS, *sure, *shown]


def encode(
    pixels: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    network: Named,
    overlay_format: str | None = "png",
    confidence: NDArray[np.float32] | None = None,
) -> dict[str, memoryview]:
    """The results of a picture of ``pixels`` (H, W, C), the content of each file by its ending.

    Class ids of ``labels`` (H, W) as a palette PNG, ``confidence`` (H, W) as a grey one in which 255 is 1, and the
    picture tinted with a legend unless ``overlay_format`` is None.

    Raises:
        ValueError: the picture is too large for ``overlay_format``.
    """
    contents = {LABELS: encoded(label_image(labels, network.palette))}
    if confidence is not None:
        grey = Image.fromarray(np.rint(255 * confidence).astype(np.uint8))
        contents[CONFIDENCE] = encoded(grey, compress_level=3)
    if overlay_format is not None:
        shown = overlay(pixels, labels, network.classes, network.palette)
        contents[f"{OVERLAY}.{overlay_format}"] = encoded(shown, overlay_format, compress_level=3)
    return contents
