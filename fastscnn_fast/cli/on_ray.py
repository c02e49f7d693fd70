"""What ``segment --ray`` does: pictures on a cluster."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing, nullcontext

from tqdm import tqdm

from .. import cluster
from ..checkpoints import load_checkpoint
from ..data.pictures import ENDINGS
from ..data.results import endings
from . import options
from .results import check_kept


def add_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--ray",
        type=options.filled,
        metavar="ADDRESS",
        help="run on a Ray cluster: auto, HOST:6379, or local for this machine alone; pictures and"
        " OUT are folders that every machine has under the same path, or URIs, s3://, gs:// or abfss:// (extra ray)",
    )


def run(args: argparse.Namespace) -> int:
    model, found = load_checkpoint(args.weights), cluster.found(args.pictures)
    shared = isinstance(args.out, str)
    written = endings(args.overlay_format, args.confidence)
    if not shared:
        names = (args.out / job.name for job in found.jobs)
        read = [job.path for job in found.jobs if str(job.path).endswith(ENDINGS)]
        all_written = (name.with_name(name.name + ending) for name in names for ending in written)
        check_kept(args.out, read, all_written)
    results = cluster.Results(
        *(args.out if shared else os.path.abspath(args.out), args.size, args.bits),
        *(args.overlay_format, args.confidence),
    )
    said, done = {}, 0
    with nullcontext() if shared else options.out(args.out):
        outcomes = cluster.predict(
            *(found.jobs, results, model, args.ray, args.backend),
            *(options.DTYPES[args.dtype], args.precision),
        )
        bar = tqdm(total=len(found.jobs), unit="picture", disable=None)
        with closing(outcomes), bar:
            for job, error in outcomes:
                said[job] = error
                done += error is None
                bar.set_postfix(skipped=len(said) - done)
                bar.update()
    problems = [*found.problems, *filter(None, map(said.get, found.jobs))]
    for problem in problems:
        print(f"skipped {problem}", file=sys.stderr)
    for repeat in found.repeats:
        print(f"left out {repeat}", file=sys.stderr)
    left_out = f", {found.repeated} left out" if found.repeated else ""
    where = f"; results: {args.out}/*{', *'.join(written)}" if done else ""
    print(f"{done} segmented, {len(problems)} skipped{left_out}{where}")
    return 1 if problems or not done else 0
