"""``fastscnn_fast tune``: how each layer runs fastest on this GPU."""

from __future__ import annotations

import argparse

import torch

from .. import bench
from ..backends import registry
from ..backends.gpu import choices, tune
from ..checkpoints import load_checkpoint
from ..lower.fold import fold
from . import options


def add_options(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Time each layer's Triton kernel in several tiles, its CUDA kernel (a bottleneck's in several"
        " slices), and plain torch with batch norm folded, on the GPU in use, after parity. What is fastest is kept in"
        " ~/.cache/fastscnn_fast/tune.json, or where FASTSCNN_TUNE_CACHE says, by GPU, versions of torch and"
        " triton and what the CUDA extension was built for; both GPU backends follow it at these sizes from"
        " then on. Not measured on a GPU yet."
    )
    network = command.add_mutually_exclusive_group()
    options.add_preset(network)
    network.add_argument(
        "--weights", type=options.weights, metavar="F", help="that of a checkpoint instead"
    )
    options.add_sizes(command)
    command.add_argument(
        "--batch", type=options.count, metavar="N", default=1, help="pictures a call (%(default)s)"
    )
    options.add_dtype(command, "float16", options.GPU_DTYPES)
    options.add_precision(command)


def run(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise registry.CannotRun(f"tune measures on a GPU: {registry.NO_GPU}")
    device, dtype = torch.device("cuda", torch.cuda.current_device()), options.DTYPES[args.dtype]
    if args.weights is None:
        model = bench.untrained_model(args.preset)
    else:
        model = load_checkpoint(args.weights)
    layers = []
    chosen: dict[str, choices.Choice] = {}
    for found in tune.tune(fold(model), args.size, args.batch, dtype, args.precision, device):
        print(found.summary, flush=True)
        layers.append(found)
        if found.best is not None:
            chosen[found.key] = found.best.choice
            file = choices.save(chosen, device)  # at once: an interruption loses one layer
    print("\n" + bench.markdown([found.row() for found in layers]))
    for found in layers:
        for trial in found.trials:
            if trial.problem:
                print(f"left out: {found.name}, {tune.named(trial.choice)}: {trial.problem}")
    if chosen:
        print(f"wrote {file}")
    return 0 if len(chosen) == len(layers) else 1
