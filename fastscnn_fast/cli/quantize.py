"""``fastscnn_fast quantize``: the ranges that int8 needs, and what int8 then costs and brings."""

from __future__ import annotations

import argparse

import numpy as np
import torch

from ..backends import registry
from ..checkpoints import load_checkpoint, read_details, save_checkpoint, stored_dtype
from ..data.classes import counted
from ..runtime.calibrate import METHODS, calibrate
from ..train.evaluate import labeller
from . import evaluate, options


def add_options(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Measure the ranges of a network's values on pictures of DATA's training part, write the weights with"
        " them to OUT, and print mIoU, equal labels and milliseconds a picture in float32 and in int8 on the"
        " validation part. Everything else in the file stays what it is."
    )
    options.add_data(command)
    options.add_weights(command)
    command.add_argument(
        "-o",
        "--out",
        type=options.path,
        required=True,
        metavar="OUT",
        help="the .safetensors to write",
    )
    command.add_argument(
        "--splits",
        nargs=2,
        default=("train", "val"),
        metavar=("TRAIN", "VAL"),
        help="parts of DATA to measure ranges and scores on (train val)",
    )
    command.add_argument(
        "--pictures",
        type=options.count,
        metavar="N",
        default=32,
        help="of TRAIN, spread evenly, to measure ranges on (%(default)s, or all where there are fewer)",
    )
    command.add_argument(
        "--method",
        choices=METHODS,
        default=next(iter(METHODS)),
        help="what is taken for the range of a value: 256 levels with the least squared error, the least and"
        " the largest value, or what all but 0.005 %% at each end lie between (%(default)s)",
    )
    command.add_argument("--size", **options.SIZE, help="size the network runs at (as in segment)")


def run(args: argparse.Namespace) -> int:
    if args.out.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors, got {str(args.out)!r}")
    with options.out_file("--out", args.out):
        return _quantize(args)


def _quantize(args: argparse.Namespace) -> int:
    train, val = args.splits
    model = load_checkpoint(args.weights).float()
    source = options.source(args, train, model.config.in_channels)
    examples, _ = evaluate.labelled(args, val, model)
    chosen = np.linspace(0, len(source) - 1, min(args.pictures, len(source))).round().astype(int)
    pictures = [source.read(index).picture for index in chosen]
    calibrate(model, pictures, args.method, args.size)
    runs = {}
    for dtype in (torch.float32, torch.int8):
        backend = registry.choose("auto", model.config, torch.device("cpu"), dtype)
        name = str(dtype).removeprefix("torch.")
        runs[f"fused, {backend}, {name}"] = labeller(model, backend, dtype, args.size)
    _, text = evaluate.table(runs, examples)
    save_checkpoint(model, args.out, read_details(args.weights), stored_dtype(args.weights))
    print(f"ranges of {counted(len(pictures), 'picture')} of {train}, by {args.method}")
    print(f"{evaluate.described(examples, args.size, model.config)} of {val}\n{text}")
    print(f"wrote {args.out}")
    return 0
