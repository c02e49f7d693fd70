"""``fastscnn_fast export``: the plain network as ONNX."""

from __future__ import annotations

import argparse

from ..checkpoints import load_checkpoint
from ..export import export_onnx
from . import options


def add_options(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Write the plain network as ONNX with free batch, height and width and exact pooling at"
        " every size. The input is float32 (n, C, h, w), normalised. Needs the extra [export]."
    )
    command.add_argument(
        "--onnx", type=options.path, required=True, metavar="OUT", help="the file to write"
    )
    options.add_weights(command)
    command.add_argument(
        "--size",
        type=options.size,
        metavar="HxW",
        default=(512, 1024),
        help="size to trace at, without influence on the result (512x1024)",
    )
    command.add_argument(
        "--output",
        choices=("logits", "labels"),
        default="logits",
        help="float32 (n, K, h, w) or uint8 (n, h, w) (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    model = load_checkpoint(args.weights)
    export_onnx(model, args.onnx, args.output, args.size)
    config = model.config
    print(
        f"wrote {args.onnx}: x float32 (n, {config.in_channels}, h, w) -> {args.output};"
        f" n free, h and w free from 32\n"
        f"x = (pixels / 255 - mean) / std with mean {config.mean}, std {config.std}"
    )
    return 0
