"""Scores on labelled pictures: confusion matrix, IoU, accuracy; reference, fused network and dtypes compared."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..data.classes import numbered
from ..data.datasets import Examples
from ..plots import figure, png
from ..program.labels import labels_of
from ..runtime.fused import fuse
from ..runtime.model import FastSCNN
from ..runtime.segment import labelled, segment
from ..writing import write_whole

#: A picture, uint8 (H, W, 3) -> its labels, uint8 (H, W)
Labeller = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]


def agreed(ours: Sequence[str], theirs: Sequence[str]) -> tuple[str, ...] | None:
    """What classes are called that are the same; None where they are not.

    That they are by number and names; where no one has said names, numbers stand for any.
    """
    both = (tuple(ours), tuple(theirs))
    known = {names for names in both if names != numbered(len(names))} or {*both}
    return known.pop() if len(known) == 1 and len(ours) == len(theirs) else None


class Confusion:
    """How often each class was taken for each.

    Attributes:
        matrix: (K, K) int64; row = true class, column = predicted class. Ignored pixels are not in it. One class
            alone has a background to be told from: K is 2.
    """

    def __init__(self, labels: int) -> None:
        """``labels`` is K."""
        self.matrix: NDArray[np.int64] = np.zeros((labels, labels), np.int64)

    def add(self, labels: NDArray[np.uint8], predicted: NDArray[np.uint8]) -> None:
        """Counts pixels; labels that are no class are left out.

        Raises:
            ValueError: something else is predicted than the K labels.
        """
        k = len(self.matrix)
        if (most := predicted.max(initial=0)) >= k:
            raise ValueError(f"predicted must be labels of 0 to {k - 1}, got {most}")
        known = labels < k
        pairs = labels[known].astype(np.int64) * k + predicted[known]
        self.matrix += np.bincount(pairs, minlength=k * k).reshape(k, k)

    @property
    def iou(self) -> NDArray[np.float64]:
        """Per class, intersection over union; NaN for a class that neither occurs nor is predicted."""
        hits = np.diag(self.matrix).astype(np.float64)
        union = self.matrix.sum(0) + self.matrix.sum(1) - hits
        with np.errstate(invalid="ignore"):
            return hits / union

    @property
    def miou(self) -> float:
        """The mean of :attr:`iou` over the classes that have one."""
        iou = self.iou
        return float(np.nanmean(iou)) if not np.isnan(iou).all() else float("nan")

    @property
    def accuracy(self) -> float:
        """The share of pixels that are right."""
        total = self.matrix.sum()
        return float(np.diag(self.matrix).sum() / total) if total else float("nan")

    def table(self, classes: Sequence[str]) -> str:
        """Per class: IoU, recall, precision, pixels; in text. What cannot be told is a dash.

        Which classes have no IoU, and so are not in the mean, is said beside it.
        """
        hits, true, found = np.diag(self.matrix), self.matrix.sum(1), self.matrix.sum(0)
        wide = max(map(len, [*classes, "pixel accuracy"]))
        lines = [f"{'class':<{wide}}  {'IoU':>6}  {'recall':>6}  {'precision':>9}  {'pixels':>10}"]
        for k, name in enumerate(classes):
            recall, precision = _ratio(hits[k], true[k]), _ratio(hits[k], found[k])
            shares = f"{_shown(self.iou[k], 6)}  {_shown(recall, 6)}  {_shown(precision, 9)}"
            lines.append(f"{name:<{wide}}  {shares}  {true[k]:10d}")
        absent = [name for name, iou in zip(classes, self.iou) if np.isnan(iou)]
        without = f"  without {', '.join(absent)}: neither there nor predicted" if absent else ""
        lines.append(f"{'mIoU':<{wide}}  {_shown(self.miou, 6)}{without}")
        lines.append(f"{'pixel accuracy':<{wide}}  {_shown(self.accuracy, 6)}")
        return "\n".join(lines)


def _shown(share: float, width: int) -> str:
    return f"{'-' if np.isnan(share) else format(share, '.4f'):>{width}}"


def _ratio(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else float("nan")


def labeller(
    model: FastSCNN,
    backend: str,
    dtype: torch.dtype,
    size: tuple[int, int] | None = None,
    precision: str = "highest",
) -> Labeller:
    """``segment`` by ``model`` fused by ``backend`` in ``dtype``, or by "plain" torch as it is."""
    if backend != "plain":
        return partial(segment, fuse(model, backend, dtype, precision), size=size)
    device = model.classifier.conv.weight.device

    @torch.no_grad()
    def plain(x: Tensor) -> Tensor:
        logits: Tensor = model.reference(x.to(device))
        return labels_of(logits).to(torch.uint8)

    return partial(labelled, plain, model.config, size=size)


def score(run: Labeller, examples: Examples, indices: Iterable[int] | None = None) -> Confusion:
    """The confusion of the predictions for ``examples``, or for those at ``indices``."""
    confusion = Confusion(len(examples.label_names))
    for index in range(len(examples)) if indices is None else indices:
        picture, labels = examples[index]
        confusion.add(labels, run(picture))
    return confusion


def save_picture(confusion: Confusion, classes: Sequence[str], path: Path) -> None:
    """The confusion matrix as a PNG, each row divided by its sum.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows = confusion.matrix.sum(1, keepdims=True)
    shares = confusion.matrix / np.maximum(rows, 1)
    side = 2.5 + 0.5 * len(classes)
    chart = figure((side, side))
    axes = chart.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(classes))
    axes.set_xticks(ticks, classes, rotation=60, ha="right")
    axes.set_yticks(ticks, classes)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"mIoU {confusion.miou:.4f}, pixel accuracy {confusion.accuracy:.4f}")
    for y in ticks:
        for x in ticks:
            if shares[y, x] >= 0.005:
                colour = "white" if shares[y, x] > 0.5 else "black"
                text = f"{100 * shares[y, x]:.0f}"
                axes.text(x, y, text, ha="center", va="center", fontsize=8, color=colour)
    write_whole(path, png(chart, dpi=120))


def save_csv(confusion: Confusion, classes: Sequence[str], path: Path) -> None:
    """The confusion matrix in pixels, with a column of IoU, empty where a class neither occurs nor is predicted."""
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["true \\ predicted", *classes, "IoU"])
    for name, row, iou in zip(classes, confusion.matrix, confusion.iou):
        writer.writerow([name, *row.tolist(), "" if np.isnan(iou) else f"{iou:.6f}"])
    write_whole(path, table.getvalue().encode())


def compare(
    runs: Mapping[str, Labeller], examples: Examples
) -> tuple[dict[str, Confusion], dict[str, float], dict[str, float]]:
    """Confusion, share of pixels labelled as by the first, and seconds, by run."""
    scores = {name: Confusion(len(examples.label_names)) for name in runs}
    equal, seconds, pixels = dict.fromkeys(runs, 0), dict.fromkeys(runs, 0.0), 0
    for index in tqdm(range(len(examples)), unit="picture", leave=False, delay=2):
        picture, labels = examples[index]
        first = None
        for name, run in runs.items():
            start = time.perf_counter()
            predicted = run(picture)
            seconds[name] += time.perf_counter() - start
            first = predicted if first is None else first
            scores[name].add(labels, predicted)
            equal[name] += int((predicted == first).sum())
        pixels += labels.size
    return scores, {name: count / pixels for name, count in equal.items()}, seconds
