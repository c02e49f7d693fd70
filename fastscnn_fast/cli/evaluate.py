"""``fastscnn_fast evaluate``: plain torch scored first, then each dtype on the fused path against it."""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import torch

from ..backends import registry
from ..checkpoints import load_checkpoint
from ..data.classes import label_names, numbered
from ..data.datasets import load
from ..train.evaluate import compare, labeller, save_csv, save_picture
from ..writing import folder
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
        default=list(options.DTYPES),
        help=f"dtypes to compare on the fused path (all){options.SHORT}",
    )
    options.add_precision(command)
    command.add_argument(
        "--device", default="auto", help="torch device for all of them (auto: GPU, else CPU)"
    )
    command.add_argument(
        "-o", "--out", type=options.path, help="folder for confusion.csv and confusion.png"
    )


def run(args: argparse.Namespace) -> int:
    with folder(args.out) if args.out else nullcontext():
        return _evaluate(args)


def _evaluate(args: argparse.Namespace) -> int:
    device = options.device(args.device)
    model = load_checkpoint(args.weights).float().to(device)
    examples = load(
        options.source(args, args.split, model.config.in_channels), memory=_MEMORY, workers=2
    )
    if len(examples.classes) != model.config.num_classes:
        raise ValueError(
            f"{args.weights}: has {model.config.num_classes} classes, {args.data} has "
            f"{len(examples.classes)}"
        )
    known = [c for c in (model.classes, examples.classes) if c != numbered(len(c))]
    classes = known[0] if known else model.classes
    if any(names != classes for names in known):
        raise ValueError(
            f"{args.weights}: has classes {', '.join(model.classes)}; {args.data} has"
            f" {', '.join(examples.classes)}"
        )
    names = label_names(classes)
    if examples.absent:
        registry.logger.warning("nothing is said of what is not there: %s", examples.absent)
    runs = {"plain torch, float32": labeller(model, "plain", torch.float32, args.size)}
    for name in args.dtype:
        dtype = options.DTYPES[name]
        precision = args.precision if dtype == torch.float32 else "highest"
        backend = registry.choose("auto", model.config, device, dtype, precision)
        precision = registry.choose_precision(precision, "auto", backend, device, dtype)
        shown = name if precision == "highest" else f"{name}, {precision}"
        runs[f"fused, {backend}, {shown}"] = labeller(model, backend, dtype, args.size, precision)
    scores, equal, seconds = compare(runs, examples)

    reference, *_ = runs
    print(scores[reference].table(names))
    print(f"\n{len(examples)} pictures{_where(args.size, model.config.size)}")
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
        save_csv(scores[reference], names, args.out / "confusion.csv")
        print(f"wrote {args.out}/confusion.csv")
        try:
            save_picture(scores[reference], names, args.out / "confusion.png")
        except ImportError as error:
            print(f"no picture: {error}")
        else:
            print(f"wrote {args.out}/confusion.png")
    return 0


def _where(asked: tuple[int, int] | None, trained: tuple[int, int] | None) -> str:
    size = asked or trained
    if size is None:
        return ""
    return f", {'run' if asked else 'trained'} at {size[0]}x{size[1]}"
