"""What several commands write and print: labelled pictures, measurements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import bench
from ..data.pictures import label_image, overlay, save_png
from ..runtime.fused import FusedFastSCNN

#: Endings of the two results of a picture.
LABELS, OVERLAY = "_labels.png", "_overlay.png"


def write(
    name: Path, pixels: NDArray[np.uint8], labels: NDArray[np.uint8], fast: FusedFastSCNN
) -> list[Path]:
    """Both results of one picture, each whole or not there; returns their paths."""
    files = [name.with_name(name.name + ending) for ending in (LABELS, OVERLAY)]
    name.parent.mkdir(parents=True, exist_ok=True)
    save_png(label_image(labels, fast.palette), files[0])
    save_png(overlay(pixels, labels, fast.classes, fast.palette), files[1], compress_level=3)
    return files


def about(fast: FusedFastSCNN, command: str) -> dict[str, str]:
    """What the measurements of ``fast`` depend on."""
    return {"backend": fast.backend, **bench.machine(command)}


def report(results: Sequence[bench.Result], about: dict[str, str]) -> None:
    """Prints them as a table, what its columns mean, and what they depend on."""
    print()
    print(bench.table(results))
    print()
    print(bench.LEGEND)
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
