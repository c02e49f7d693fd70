"""Scores on labelled pictures: confusion matrix, IoU, accuracy; reference, fused network and dtypes compared."""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from . import backends
from .checkpoints import load_checkpoint, read_details
from .datasets import Examples, open_source
from .fused import fuse
from .model import FastSCNN
from .segment import resized, run_size

#: uint8 pictures (1, 3, H, W) -> uint8 labels (1, H, W)
Labeller = Callable[[Tensor], Tensor]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Confusion:
    """How often each class was taken for each.

    Attributes:
        matrix: (K, K) int64; row = true class, column = predicted class. Ignored pixels are not in it.
    """

    def __init__(self, num_classes: int) -> None:
        self.matrix: NDArray[np.int64] = np.zeros((num_classes, num_classes), np.int64)

    def add(self, labels: NDArray[np.uint8], predicted: NDArray[np.uint8]) -> None:
        """Counts pixels; labels that are no class are left out."""
        k = len(self.matrix)
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
        """Per class: IoU, recall, precision, pixels; in text."""
        hits, true, found = np.diag(self.matrix), self.matrix.sum(1), self.matrix.sum(0)
        wide = max(map(len, [*classes, "pixel accuracy"]))
        lines = [f"{'class':<{wide}}  {'IoU':>6}  {'recall':>6}  {'precision':>9}  {'pixels':>10}"]
        for k, name in enumerate(classes):
            recall, precision = _ratio(hits[k], true[k]), _ratio(hits[k], found[k])
            lines.append(
                f"{name:<{wide}}  {self.iou[k]:6.4f}  {recall:6.4f}  {precision:9.4f}  {true[k]:10d}"
            )
        lines.append(f"{'mIoU':<{wide}}  {self.miou:6.4f}")
        lines.append(f"{'pixel accuracy':<{wide}}  {self.accuracy:6.4f}")
        return "\n".join(lines)


def _ratio(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else float("nan")


def labeller(model: FastSCNN, backend: str, dtype: torch.dtype) -> Labeller:
    """Predicts with ``model`` fused by ``backend`` in ``dtype``, or with "plain" torch as it is."""
    device = model.classifier.conv.weight.device
    if backend == "plain":

        @torch.no_grad()
        def plain(x: Tensor) -> Tensor:
            logits: Tensor = model.reference(x.to(device))
            return logits.argmax(1).to(torch.uint8)

        return plain
    fast = fuse(model, backend, dtype)
    return lambda x: fast.labels(x.to(device))


def predict(
    run: Labeller, picture: NDArray[np.uint8], size: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """Labels of a picture (H, W, 3) at its own size, the network running at ``size``; see ``segment``."""
    x = torch.from_numpy(np.array(resized(picture, size or run_size(picture))))
    labels = Image.fromarray(run(x.permute(2, 0, 1)[None])[0].cpu().numpy())
    return np.array(labels.resize(picture.shape[1::-1], Image.Resampling.NEAREST))


def score(
    run: Labeller,
    examples: Examples,
    size: tuple[int, int] | None = None,
    indices: Iterable[int] | None = None,
) -> Confusion:
    """The confusion of the predictions for ``examples``, or for those at ``indices``."""
    confusion = Confusion(len(examples.classes))
    for index in range(len(examples)) if indices is None else indices:
        picture, labels = examples[index]
        confusion.add(labels, predict(run, picture, size))
    return confusion


def save_picture(confusion: Confusion, classes: Sequence[str], path: Path) -> None:
    """The confusion matrix as a PNG, each row divided by its sum.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from .plots import figure

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
    chart.savefig(path, dpi=120)


def save_csv(confusion: Confusion, classes: Sequence[str], path: Path) -> None:
    """The confusion matrix in pixels, with a column of IoU."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *classes, "IoU"])
        for name, row, iou in zip(classes, confusion.matrix, confusion.iou):
            writer.writerow([name, *row.tolist(), f"{iou:.6f}"])


# --- the command -----------------------------------------------------------------------------------------


def size(text: str) -> tuple[int, int]:
    """argparse type: HEIGHTxWIDTH."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and min(int(height), int(width)) >= 32):
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH, each at least 32, got {text!r}")
    return int(height), int(width)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """What says where examples are; the same in ``train`` and ``evaluate``."""
    parser.add_argument(
        "data",
        metavar="DATA",
        help="folder with SPLIT/images and SPLIT/labels, or Cityscapes' own, or streets[:COUNT]",
    )
    parser.add_argument(
        "--classes",
        type=int,
        metavar="K",
        help="number of classes, unless DATA/classes.txt names them",
    )
    parser.add_argument(
        "--ignore", type=int, metavar="ID", help="label id that counts as no class (255)"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``evaluate``."""
    add_data_arguments(parser)
    parser.add_argument("--weights", type=Path, required=True, metavar="F", help="checkpoint")
    parser.add_argument("--split", default="val", help="part of DATA (%(default)s)")
    parser.add_argument(
        "--size",
        type=size,
        metavar="HxW",
        help="size the network runs at (the size the weights were trained for, else the picture's own);"
        " scores are on labels of full size",
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=_DTYPES,
        default=list(_DTYPES),
        help="dtypes to compare on the fused path (all)",
    )
    parser.add_argument(
        "--device", default="cpu", help="torch device for all of them (%(default)s)"
    )
    parser.add_argument(
        "-o", "--out", type=Path, help="folder for confusion.csv and confusion.png"
    )
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    """Runs ``evaluate``: plain torch first, then each dtype on the fused path against it."""
    model = load_checkpoint(args.weights).float().to(args.device)
    examples = load(open_source(args.data, args.split, args.classes, args.ignore))
    if len(examples.classes) != model.config.num_classes:
        raise ValueError(
            f"{args.weights}: has {model.config.num_classes} classes, {args.data} has "
            f"{len(examples.classes)}"
        )
    at = args.size or read_details(args.weights).get("size")
    at = None if at is None else (int(at[0]), int(at[1]))
    runs = {"plain torch, float32": labeller(model, "plain", torch.float32)}
    for name in args.dtype:
        dtype = _DTYPES[name]
        backend = backends.choose("auto", model.config, torch.device(args.device), dtype)
        runs[f"fused, {backend}, {name}"] = labeller(model, backend, dtype)
    scores, equal, seconds = _compare(runs, examples, at)

    reference, *_ = runs
    print(scores[reference].table(examples.classes))
    print(f"\n{len(examples)} pictures" + (f" at {at[0]}x{at[1]}" if at else ""))
    print(
        f"{'network':<26}  {'mIoU':>7}  {'change':>9}  {'accuracy':>8}  {'equal pixels':>12}  {'ms':>7}"
    )
    for name, confusion in scores.items():
        print(
            f"{name:<26}  {confusion.miou:7.5f}  {confusion.miou - scores[reference].miou:+9.6f}"
            f"  {confusion.accuracy:8.5f}  {100 * equal[name]:10.5f} %"
            f"  {1000 * seconds[name] / len(examples):7.1f}"
        )
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        save_csv(scores[reference], examples.classes, args.out / "confusion.csv")
        save_picture(scores[reference], examples.classes, args.out / "confusion.png")
        print(f"wrote {args.out}/confusion.csv, {args.out}/confusion.png")
    return 0


def load(source: Any, **limits: Any) -> Examples:
    """The checked examples of a source, with a progress bar where reading takes long."""

    def bar(reading: Any, total: int) -> Any:
        return tqdm(reading, "checking", total, unit="picture", delay=2, leave=False)

    return Examples(source, progress=bar, **limits)


def _compare(
    runs: dict[str, Labeller], examples: Examples, at: tuple[int, int] | None
) -> tuple[dict[str, Confusion], dict[str, float], dict[str, float]]:
    """Confusion, share of pixels labelled as by the first, and seconds, by run."""
    scores = {name: Confusion(len(examples.classes)) for name in runs}
    equal, seconds, pixels = dict.fromkeys(runs, 0), dict.fromkeys(runs, 0.0), 0
    for index in tqdm(range(len(examples)), unit="picture", leave=False, delay=2):
        picture, labels = examples[index]
        first = None
        for name, run in runs.items():
            start = time.perf_counter()
            predicted = predict(run, picture, at)
            seconds[name] += time.perf_counter() - start
            first = predicted if first is None else first
            scores[name].add(labels, predicted)
            equal[name] += int((predicted == first).sum())
        pixels += labels.size
    return scores, {name: count / pixels for name, count in equal.items()}, seconds
