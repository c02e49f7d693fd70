"""``fastscnn_fast export``: the plain network as ONNX."""

from __future__ import annotations

import argparse

import torch

from ..checkpoints import load_checkpoint
from ..export import export_onnx
from . import options

_PIXELS = {"uint8": torch.uint8, "float32": torch.float32}


def add_options(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Write the plain network as ONNX with free batch, height and width and exact pooling at"
        " every size. The input is float32 (n, C, h, w), normalised. Needs the extra [export]. In int8 weights"
        " and values have 8 bits, by the ranges of the weights, as QuantizeLinear and DequantizeLinear."
    )
    command.add_argument(
        "--onnx", type=options.path, required=True, metavar="OUT", help="the file to write"
    )
    options.add_weights(command)
    command.add_argument(
        "--size",
        **options.SIZE,
        default=(512, 1024),
        help="size to trace at, without influence on the result but for --fixed-size (512x1024)",
    )
    command.add_argument(
        "--fixed-size",
        action="store_true",
        help="x is (1, C, *SIZE) and nothing else, for runtimes that plan ahead",
    )
    command.add_argument(
        "--pixels",
        type=options.dtype,
        choices=_PIXELS,
        help="x is raw RGB pixels, 0 to 255, of this dtype, and is normalised in the graph",
    )
    command.add_argument(
        "--opset", type=options.count, metavar="N", default=18, help="11 or later (%(default)s)"
    )
    command.add_argument(
        "--dtype",
        type=options.dtype,
        choices=("float32", "int8"),
        default="float32",
        help="of weights and values (%(default)s)",
    )
    command.add_argument(
        "--output",
        choices=("logits", "labels"),
        default="logits",
        help="float32 (n, K, h, w) or uint8 (n, h, w) (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    with options.out_file("--onnx", args.onnx):
        return _export(args)


def _export(args: argparse.Namespace) -> int:
    model = load_checkpoint(args.weights)
    pixels, dtype = _PIXELS.get(args.pixels), options.DTYPES[args.dtype]
    export_onnx(
        model, args.onnx, args.output, args.size, args.opset, args.fixed_size, pixels, dtype
    )
    config = model.config
    n, height, width = (1, *args.size) if args.fixed_size else ("n", "h", "w")
    print(
        f"wrote {args.onnx}: x {args.pixels or 'float32'} ({n}, {config.in_channels}, {height}, {width})"
        f" -> {args.output}; opset {args.opset}"
    )
    if not args.fixed_size:
        print("n free, h and w free from 32")
    if args.pixels:
        print(f"x = {'RGB ' * (config.in_channels == 3)}pixels, 0 to 255")
    else:
        print(
            f"x = (pixels / 255 - mean) / std with mean {config.mean}, std {config.std}; --pixels has that in the graph"
        )
    return 0
