"""``fastscnn_fast bench``: plain torch, torch.compile and the fused kernels side by side."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

import torch

from .. import bench
from ..checkpoints import load_checkpoint
from ..runtime.fused import fuse
from ..runtime.model import FastSCNN
from . import options, results


def add_options(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Compare eager torch, eager channels-last torch, torch.compile with frozen weights and"
        " the fused kernels (logits and labels), in turns within one run, on a drawn street. Parity with"
        " float64 comes first: a contestant that fails it gets no speed-up, and the exit code is then 1."
    )
    options.add_sizes(command)
    command.add_argument(
        "--threads", type=options.count, metavar="N", help="CPU threads (torch's default)"
    )
    network = command.add_mutually_exclusive_group()
    options.add_preset(network)
    network.add_argument(
        "--weights",
        type=options.weights,
        metavar="F",
        help="that of a checkpoint instead of random weights (in int8 the package's own)",
    )
    options.add_dtype(command, "float32")
    command.add_argument(
        "--rounds",
        type=options.count,
        metavar="R",
        default=30,
        help="timings of each (%(default)s)",
    )
    command.add_argument(
        "--no-compile",
        action="store_true",
        help="leave out torch.compile, which takes a minute a size",
    )
    command.add_argument(
        "--plot",
        type=options.path,
        metavar="FILE",
        default=Path("bench.png"),
        help="the bars as PNG (%(default)s); needs the extra [plot]",
    )
    command.add_argument("--csv", type=options.path, metavar="FILE", help="write the table as CSV")


def run(args: argparse.Namespace) -> int:
    with ExitStack() as folders:  # which cannot be made shows before anything is measured
        for option, file in (("--csv", args.csv), ("--plot", args.plot)):
            if file is not None:
                folders.enter_context(options.out_file(option, file))
        return _bench(args)


def _bench(args: argparse.Namespace) -> int:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model = _model(args)
    fast = fuse(model, dtype=options.DTYPES[args.dtype])
    measured = bench.bench(model, fast, args.size, args.rounds, not args.no_compile)
    about = results.about(fast, args.command_line)
    results.report(measured, about)
    if args.csv is not None:
        bench.write_csv(args.csv, [result.fields() for result in measured], about)
        print(f"wrote {args.csv}")
    try:
        bench.plot(args.plot, measured, bench.chart_title(about))
    except ImportError as error:
        print(f"no plot: {error}")
    else:
        print(f"wrote {args.plot}")
    return 0 if all(result.passed for result in measured) else 1


def _model(args: argparse.Namespace) -> FastSCNN:
    if args.weights is not None:
        return load_checkpoint(args.weights)
    if args.dtype != "int8":
        return bench.untrained_model(args.preset)
    if args.preset != "paper":
        raise ValueError(
            "--weights must be given for int8, since rounding changes the labels of random weights,"
            f" got --preset {args.preset}"
        )
    return load_checkpoint()
