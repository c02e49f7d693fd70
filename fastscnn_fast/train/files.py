"""What a run leaves in its folder; each file is whole or not there."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import torch

from ..backends import registry
from ..plots import figure, png
from ..writing import write_whole

#: The file that a run goes on from, and the weights that it keeps.
LAST, BEST = "last.pt", "best.safetensors"


def write_history(history: list[dict[str, float]], folder: Path) -> None:
    """``metrics.csv``, a row a validation, empty where there is no number, and ``curves.png`` where it can be drawn."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(history[-1]))
    writer.writeheader()
    writer.writerows(
        {name: "" if math.isnan(value) else value for name, value in row.items()} for row in history
    )
    write_whole(folder / "metrics.csv", table.getvalue().encode())
    try:
        write_whole(folder / "curves.png", _curves(history))
    except Exception as error:  # no matplotlib, or no way to draw: the run is worth more
        registry.log_once(f"no curves.png: {error}")


def write_last(state: dict[str, Any], folder: Path) -> None:
    """``last.pt``: everything to go on from, with what must be the same then under "run"."""
    content = io.BytesIO()  # torch's own writer tells of a full disk in words of its own
    torch.save(state, content)
    write_whole(folder / LAST, content.getbuffer())


def read_last(folder: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What :func:`write_last` wrote.

    Raises:
        ValueError: it is damaged.
        OSError: it is not there.
    """
    path = folder / LAST
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state["run"], dict):
            raise TypeError(f"run must be a dictionary, got {state['run']!r}")
    except OSError:
        raise
    except Exception as error:  # torch raises nearly anything on a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: is damaged: {reason}") from error
    return state


def check_run(state: dict[str, Any], run: dict[str, Any], folder: Path) -> None:
    """What must be the same to go on; another number of epochs comes with validations at other steps.

    Raises:
        ValueError: it is the state of another run.
    """
    longer = run["epochs"] != state["run"]["epochs"]
    free = ("epochs", "steps between validations") if longer else ()
    for name, value in state["run"].items():
        if name not in free and run.get(name) != value:
            raise ValueError(
                f"{name} must be {value!r} to go on with {folder / LAST}, got {run.get(name)!r}"
            )


def _curves(history: list[dict[str, float]]) -> bytes:
    """The PNG."""
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
        ("flops", "operations, as a share of the unpruned network's"),
    ):
        if name in history[-1]:
            right.plot(epochs, [row[name] for row in history], label=text)
    right.set_xlabel("epoch")
    right.set_ylabel("mIoU")
    right.set_ylim(0, 1)
    right.grid(alpha=0.3)
    right.legend()
    return png(chart, dpi=120)
