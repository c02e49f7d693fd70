"""What several commands write and print: labelled pictures, measurements."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import bench
from ..backends import registry
from ..data.classes import Named
from ..data.results import encode
from ..runtime.fused import FusedFastSCNN
from ..writing import write_whole


def write(
    name: Path,
    pixels: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    network: Named,
    overlay_format: str | None = "png",
    confidence: NDArray[np.float32] | None = None,
) -> list[Path]:
    """The results of one picture, as :func:`~fastscnn_fast.data.results.encode` has them; returns their paths.

    Each is whole or not there, and nothing is written before all of them are encoded.

    Raises:
        ValueError: the picture is too large for ``overlay_format``.
        OSError: a file cannot be written.
    """
    contents = encode(pixels, labels, network, overlay_format, confidence)
    name.parent.mkdir(parents=True, exist_ok=True)
    files = {name.with_name(name.name + ending): content for ending, content in contents.items()}
    for path, content in files.items():
        write_whole(path, content, durable=False)
    return list(files)


def check_kept(out: Path, read: Sequence[Path], written: Iterable[Path]) -> None:
    """Refuses files to be written, below ``out``, over those that are read.

    Raises:
        ValueError: and which.
    """
    met = {os.path.realpath(path) for path in read}
    for path in written if met else ():
        if os.path.realpath(path) in met:
            rule = "--out must keep what is segmented"
            raise ValueError(f"{rule}, got {out}: {path} would be written over")


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
