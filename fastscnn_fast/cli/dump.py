"""``fastscnn_fast dump``: the machine code of a fused op."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

import torch

from ..arch.config import preset
from ..backends import registry
from ..backends.gpu import dump
from ..program.arithmetic import choose, dtype_rule, dtypes
from ..program.layers import OPS
from . import options


def add_options(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Compile an op as one layer of the network runs it, and write each of its launches as"
        " OP_N.ptx, OP_N.cubin and OP_N.json: entry, grid, threads, shared memory, and the kernel's parameters"
        " in order with their shapes, strides and values. Needs no GPU, but Triton; for --backend cuda nvcc,"
        " the repository's sources and the built CUDA extension."
    )
    command.add_argument(
        "--backend",
        choices=("triton", "cuda"),
        default="triton",
        help="whose kernels (%(default)s)",
    )
    command.add_argument("--op", choices=OPS, required=True, help="the fused op")
    command.add_argument(
        "--layer",
        metavar="L",
        help="which layer of the network, by name or number (the op's first)",
    )
    command.add_argument(
        "--arch", type=options.count, required=True, metavar="N", help="80 for sm_80 and so on"
    )
    options.add_dtype(command, "float16", options.GPU_DTYPES)
    options.add_preset(command)
    command.add_argument(
        "--size",
        **options.SIZE,
        default=(1024, 2048),
        help="of the network's picture (1024x2048)",
    )
    command.add_argument(
        "--shape",
        type=options.count,
        nargs=2,
        metavar=("H", "W"),
        help="of the op's own input instead (feature_fusion: of high, low has a quarter of each side;"
        " upsample_classify: the result is 8 times as large)",
    )
    command.add_argument(
        "--output",
        choices=("logits", "probabilities", "labels"),
        default="logits",
        help="of upsample_classify (%(default)s)",
    )
    command.add_argument(
        "--raw", action="store_true", help="stem_conv takes uint8 pixels instead of floats"
    )
    command.add_argument(
        "-o", "--out", type=options.path, required=True, help="folder for the files"
    )


def run(args: argparse.Namespace) -> int:
    if args.backend == "triton" and find_spec("triton") is None:
        raise registry.CannotRun("dump needs the package triton, which is not installed")
    if args.arch not in dump.ARCHITECTURES:
        known = ", ".join(map(str, dump.ARCHITECTURES))
        raise ValueError(f"arch must be one of {known}, got {args.arch}")
    dtype = options.DTYPES[args.dtype]
    if dtype not in dtypes(args.backend):
        raise ValueError(f"{dtype_rule(args.backend)} for backend {args.backend}, got {dtype}")
    least = int(choose(args.backend, dtype).needs[args.backend])
    if args.arch < least and dtype == torch.int8:
        raise ValueError(f"arch must be at least {least} for int8, got {args.arch}")
    if args.arch < 80 and dtype == torch.bfloat16:
        raise ValueError(
            f"dtype must be float16 or float32 for sm_{args.arch}, which has no bfloat16"
        )
    shape = args.shape and (args.shape[0], args.shape[1])
    step = dump.step(preset(args.preset), args.op, args.layer, args.size, shape)
    plan = dump.launches(step, dtype, args.arch, args.output, args.raw, args.backend)
    with options.out(args.out):
        for path in dump.write(args.out, step, plan, args.arch):
            print(f"wrote {path}")
    return 0
