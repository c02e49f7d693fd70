"""``fastscnn_fast evaluate``: plain torch scored first, then each dtype on the fused path against it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import nullcontext

import torch

from ..arch.config import Config
from ..backends import registry
from ..checkpoints import load_checkpoint
from ..data.classes import counted, label_names
from ..data.datasets import Examples, load
from ..runtime.model import FastSCNN
from ..train.evaluate import (
    Confusion,
    Labeller,
    agreed,
    compare,
    labeller,
    save_csv,
    save_picture,
)
from . import options

_MEMORY = 2 * 2**30  # bytes of examples kept: each is used once


def add_options(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Print IoU per class, mIoU and pixel accuracy of plain torch on full-size labels, and how"
        " the fused network in each dtype differs from it. One class alone is scored beside its background: mIoU is"
        " the mean of both."
    )
    options.add_data(command)
    options.add_weights(command)
    command.add_argument("--split", default="val", help="part of DATA (%(default)s)")
    command.add_argument(
        "--size",
        **options.SIZE,
        help="size the network runs at (as in segment); scores are on labels of full size",
    )
    command.add_argument(
        "--dtype",
        nargs="+",
        type=options.dtype,
        choices=options.DTYPES,
        help="dtypes to compare on the fused path (all, but int8 for weights without ranges)"
        + options.SHORT,
    )
    options.add_precision(command)
    command.add_argument(
        "--device", default="auto", help="torch device for all of them (auto: GPU, else CPU)"
    )
    command.add_argument(
        "-o", "--out", type=options.path, help="folder for confusion.csv and confusion.png"
    )


def run(args: argparse.Namespace) -> int:
    with options.out(args.out) if args.out else nullcontext():
        return _evaluate(args)


def _evaluate(args: argparse.Namespace) -> int:
    device = options.device(args.device)
    model = load_checkpoint(args.weights).float().to(device)
    examples, names = labelled(args, args.split, model)
    runs = {"plain torch, float32": labeller(model, "plain", torch.float32, args.size)}
    for name in args.dtype or [n for n in options.DTYPES if n != "int8" or model.ranges]:
        dtype = options.DTYPES[name]
        precision = args.precision if dtype == torch.float32 else "highest"
        backend = registry.choose("auto", model.config, device, dtype, precision)
        precision = registry.choose_precision(precision, "auto", backend, device, dtype)
        shown = name if precision == "highest" else f"{name}, {precision}"
        runs[f"fused, {backend}, {shown}"] = labeller(model, backend, dtype, args.size, precision)
    scores, text = table(runs, examples)
    reference = next(iter(scores.values()))
    print(f"{reference.table(names)}\n\n{described(examples, args.size, model.config)}\n{text}")
    if args.out:
        save_csv(reference, names, args.out / "confusion.csv")
        print(f"wrote {args.out}/confusion.csv")
        try:
            save_picture(reference, names, args.out / "confusion.png")
        except ImportError as error:
            print(f"no picture: {error}")
        else:
            print(f"wrote {args.out}/confusion.png")
    return 0


def labelled(
    args: argparse.Namespace, split: str, model: FastSCNN
) -> tuple[Examples, tuple[str, ...]]:
    """The examples of one split of DATA, and what their labels are called; their classes must be those of the weights."""
    source = options.source(args, split, model.config.in_channels)
    examples = load(source, memory=_MEMORY, workers=2)
    if len(examples.classes) != model.config.num_classes:
        raise ValueError(
            f"{args.weights}: has {counted(model.config.num_classes)}, {args.data} has "
            f"{len(examples.classes)}"
        )
    classes = agreed(model.classes, examples.classes)
    if classes is None:
        raise ValueError(
            f"{args.weights}: has classes {', '.join(model.classes)}; {args.data} has"
            f" {', '.join(examples.classes)}"
        )
    if examples.absent:
        registry.logger.warning("nothing is said of what is not there: %s", examples.absent)
    return examples, label_names(classes)


def table(runs: Mapping[str, Labeller], examples: Examples) -> tuple[dict[str, Confusion], str]:
    """The scores of each network, and as text all that they differ in from the first: scores, labels, speed."""
    scores, equal, seconds = compare(runs, examples)
    first = scores[next(iter(runs))]
    lines = [
        f"{'network':<26}  {'mIoU':>7}  {'change':>9}  {'accuracy':>8}  {'equal pixels':>12}  {'ms':>7}"
    ]
    lines += [
        f"{name:<26}  {confusion.miou:7.5f}  {confusion.miou - first.miou:+9.6f}"
        f"  {confusion.accuracy:8.5f}  {100 * equal[name]:10.5f} %"
        f"  {1000 * seconds[name] / len(examples):7.1f}"
        for name, confusion in scores.items()
    ]
    return scores, "\n".join(lines)


def described(examples: Examples, asked: tuple[int, int] | None, config: Config) -> str:
    """How many pictures are scored, and at what size."""
    size = asked or config.size
    where = f", {'run' if asked else 'trained'} at {size[0]}x{size[1]}" if size else ""
    return f"{counted(len(examples), 'picture')}{where}"
