"""What a run leaves in its folder; each file is whole or not there."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..backends import registry
from ..plots import figure

#: The file that a run goes on from, and the weights that it keeps.
LAST, BEST = "last.pt", "best.safetensors"


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path to write to; only when all is written does it become ``path``."""
    new = path.with_name(f".{path.stem}.new{path.suffix}")
    try:
        yield new
        with new.open("r+b") as file:
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def write_history(history: list[dict[str, float]], folder: Path) -> None:
    """``metrics.csv``, a row a validation, and ``curves.png`` where it can be drawn."""
    with atomic(folder / "metrics.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(history[-1]))
        writer.writeheader()
        writer.writerows(history)
    try:
        with atomic(folder / "curves.png") as path:
            _draw_curves(history, path)
    except Exception as error:  # no matplotlib, or no way to draw: the run is worth more
        registry.log_once(f"no curves.png: {error}")


def write_last(state: dict[str, Any], folder: Path) -> None:
    """``last.pt``: everything to go on from, with what must be the same then under "run"."""
    with atomic(folder / LAST) as path:
        torch.save(state, path)


def read_last(folder: Path, run: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What :func:`write_last` wrote, whose "run" must be the given one.

    Raises:
        ValueError: it is damaged, or of another run.
        OSError: it is not there.
    """
    path = folder / LAST
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises nearly anything on a damaged file
        raise ValueError(f"{path}: is damaged: {str(error).splitlines()[0]}") from error
    for name, value in state["run"].items():
        if run.get(name) != value:
            raise ValueError(
                f"{name} must be {value!r} to go on with {path}, got {run.get(name)!r}"
            )
    return state


def _draw_curves(history: list[dict[str, float]], path: Path) -> None:
    epochs = [row["epoch"] for row in history]
    chart = figure((10, 4))
    left, right = chart.subplots(1, 2)
    left.plot(epochs, [row["loss"] for row in history], label="loss")
    left.set_xlabel("epoch")
    left.set_ylabel("training loss")
    rates = left.twinx()
    rates.plot(epochs, [row["lr"] for row in history], color="grey", linestyle=":")
    rates.set_ylabel("learning rate")
    for name, text in (
        ("train_miou", "training (1/8 resolution)"),
        ("miou", "validation"),
        ("accuracy", "validation, pixel accuracy"),
    ):
        if name in history[-1]:
            right.plot(epochs, [row[name] for row in history], label=text)
    right.set_xlabel("epoch")
    right.set_ylabel("mIoU")
    right.set_ylim(0, 1)
    right.grid(alpha=0.3)
    right.legend()
    chart.savefig(path, dpi=120)
