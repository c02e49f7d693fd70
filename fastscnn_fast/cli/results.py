"""What several commands write and print: labelled pictures, measurements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .. import bench
from ..backends import registry
from ..data.pictures import (
    CONFIDENCE,
    LABELS,
    OVERLAY,
    encoded,
    label_image,
    overlay,
)
from ..runtime.fused import FusedFastSCNN
from ..writing import write_whole


def endings(overlay_format: str | None = "png", confidence: bool = False) -> list[str]:
    """Those that :func:`write` writes."""
    sure = [CONFIDENCE] if confidence else []
    shown = [] if overlay_format is None else [f"{OVERLAY}.{overlay_format}"]
    return [LABELS, *sure, *shown]


def write(
    name: Path,
    pixels: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    fast: FusedFastSCNN,
    overlay_format: str | None = "png",
    confidence: NDArray[np.float32] | None = None,
) -> list[Path]:
    """The results of one picture, each whole or not there; returns their paths.

    Nothing is written before all of them are encoded. Confidence becomes a grey value, 255 for 1.

    Raises:
        ValueError: the picture is too large for ``overlay_format``.
        OSError: a file cannot be written.
    """
    contents = {LABELS: encoded(label_image(labels, fast.palette))}
    if confidence is not None:
        grey = Image.fromarray(np.rint(255 * confidence).astype(np.uint8))
        contents[CONFIDENCE] = encoded(grey, compress_level=3)
    if overlay_format is not None:
        shown = overlay(pixels, labels, fast.classes, fast.palette)
        contents[f"{OVERLAY}.{overlay_format}"] = encoded(shown, overlay_format, compress_level=3)
    name.parent.mkdir(parents=True, exist_ok=True)
    files = {name.with_name(name.name + ending): content for ending, content in contents.items()}
    for path, content in files.items():
        write_whole(path, content, durable=False)
    return list(files)


def about(fast: FusedFastSCNN, command: str) -> dict[str, str]:
    """What the measurements of ``fast`` depend on."""
    computed = bench.arithmetic_of(fast).name
    said = {"backend": fast.backend, "arithmetic": computed, **bench.machine(command)}
    if fast.backend == "cpu":
        said["instruction set"] = registry.isa_of(computed)
    return said


def report(results: Sequence[bench.Result], about: dict[str, str]) -> None:
    """Prints them as a table, what its columns mean, and what they depend on."""
    print()
    print(bench.table(results))
    print()
    print(bench.legend(about["arithmetic"]))
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
