"""``fastscnn_fast demo``: one picture, with speed and parity beside it."""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from .. import bench
from ..checkpoints import load_checkpoint
from ..data.classes import CAMVID_CLASSES, CAMVID_PALETTE
from ..data.pictures import overlay, read_picture, resized, save_png
from ..data.scenes import street
from ..runtime.fused import FusedFastSCNN, fuse
from ..runtime.model import FastSCNN
from ..runtime.segment import run_size, segment
from ..train.evaluate import Confusion
from . import options, results

_STREET = (12, 512, 1024)  # seed, height, width
_ROUNDS = 10
_PIXELS = 1024 * 2048  # speed is measured on at most so many: a large photo would take minutes


def add_options(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Segment a picture with the fused kernels, then compare speed and results with plain"
        " torch. Without IMAGE the package draws a street itself."
    )
    command.add_argument(
        "image", nargs="?", type=options.path, metavar="IMAGE", help="a picture of yours"
    )
    command.add_argument(
        "-o",
        "--out",
        type=options.path,
        default=Path("demo_out"),
        help="folder for the results (%(default)s)",
    )
    options.add_weights(command)
    options.add_backend(command)
    options.add_dtype(command, "float32")
    options.add_bits(command)


def run(args: argparse.Namespace) -> int:
    model = load_checkpoint(args.weights)
    fast = fuse(model, args.backend, options.DTYPES[args.dtype])
    with options.out(args.out):
        return _demo(args, model, fast)


def _demo(args: argparse.Namespace, model: FastSCNN, fast: FusedFastSCNN) -> int:
    files, truth = [], None
    if args.image is None:
        name = "street"
        picture, truth = street(*_STREET)
        files = [args.out / "street.png", args.out / "street_truth.png"]
        save_png(Image.fromarray(picture), files[0])
        save_png(overlay(picture, truth, CAMVID_CLASSES, CAMVID_PALETTE), files[1])
        pixels = read_picture(picture, model.config.in_channels)
    else:
        name = args.image.stem
        pixels = read_picture(args.image, model.config.in_channels, args.bits)
    labels = segment(fast, pixels)
    files += results.write(args.out / name, pixels, labels, fast)
    print("wrote " + ", ".join(map(str, files)))
    if truth is not None and fast.classes == CAMVID_CLASSES:
        scores = Confusion(len(fast.classes))
        scores.add(truth, labels)
        print(f"labels of the street: {scores.accuracy:.1%} right, mIoU {scores.miou:.3f}")

    height, width = run_size(pixels, model.config)
    shrink = min(1.0, (_PIXELS / (height * width)) ** 0.5)
    pixels = resized(pixels, (max(32, round(height * shrink)), max(32, round(width * shrink))))
    x = bench.normalised(model, bench.picture_tensor(pixels))
    measured = bench.compare(model, fast, x, _ROUNDS, compiled=False)
    results.report(measured, results.about(fast, args.command_line))
    return 0 if all(result.passed for result in measured) else 1
