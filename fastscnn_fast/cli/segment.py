"""``fastscnn_fast segment``: pictures to labels."""

from __future__ import annotations

import argparse
import errno
import sys
from contextlib import closing

import torch
from tqdm import tqdm

from ..checkpoints import load_checkpoint
from ..data.jobs import Found, Job, find
from ..data.pictures import (
    CONFIDENCE,
    ENDINGS,
    LABELS,
    OVERLAY,
    OVERLAY_FORMATS,
    Guess,
    size_of,
)
from ..data.results import endings
from ..runtime.fused import FusedFastSCNN, fuse
from ..runtime.overlapped import overlapped
from ..runtime.segment import Classified, Prepared, classify, fits, prepare
from . import on_ray, options, results

#: Pixels of pictures in memory at a time, or of one larger one alone; 10 to 25 bytes each.
_MOST_PIXELS = 2**26
#: What is wrong with one picture's results alone, unlike a full disk.
_OF_ONE = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST)


def add_options(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Write, for each picture NAME.*, its class ids as a palette PNG of the picture's own"
        f" size (NAME{LABELS}) and the picture tinted by class with a legend"
        f" (NAME{OVERLAY}.png). Pictures that cannot be read are reported and skipped, as are links in"
        " circles, pipes, devices and videos; the exit code is then 1."
    )
    command.epilog = (
        "Folders are searched with their subfolders, which reappear in OUT, and links are followed. A picture"
        f" that is met again is left out, and said. Earlier results (*{', *'.join(ENDINGS)}) in"
        " folders are no pictures. Equal names from two folders keep their folders; where two pictures in one"
        " have one name, the second gets its ending added: NAME_png."
    )
    command.add_argument(
        "pictures",
        nargs="+",
        type=options.filled,
        metavar="PICTURE_OR_FOLDER",
        help="what to segment: files, no videos, and URLs only with --ray",
    )
    command.add_argument(
        "-o", "--out", type=options.place, required=True, help="folder for the results"
    )
    on_ray.add_option(command)
    options.add_weights(command)
    options.add_backend(command)
    options.add_dtype(command, "float32")
    options.add_precision(command)
    options.add_bits(command)
    command.add_argument(
        "--size",
        **options.SIZE,
        help="size the network runs at (as many pixels as the weights were trained at, else the picture's"
        " own size); the labels keep the picture's own size",
    )
    command.add_argument(
        "--confidence",
        action="store_true",
        help="also write how probable the network takes each pixel's label to be, as a grey PNG in which"
        f" 255 is certain (NAME{CONFIDENCE}); the network then runs twice",
    )
    overlays = command.add_mutually_exclusive_group()
    overlays.add_argument(
        "--overlay-format",
        choices=OVERLAY_FORMATS,
        default="png",
        help="of the tinted picture (%(default)s); jpg is smaller and several times faster to write",
    )
    overlays.add_argument(
        "--no-overlay",
        "--labels-only",
        dest="overlay_format",
        action="store_const",
        const=None,
        help="write no tinted picture",
    )


def run(args: argparse.Namespace) -> int:
    if args.ray is not None:
        return on_ray.run(args)
    if isinstance(args.out, str):
        raise ValueError(f"--out must be a folder unless --ray is given, got {args.out}")
    model = load_checkpoint(args.weights)
    fast = fuse(model, args.backend, options.DTYPES[args.dtype], args.precision)
    with options.out(args.out):
        return _segment(args, fast, find(args.pictures))


def _segment(args: argparse.Namespace, fast: FusedFastSCNN, found: Found) -> int:
    for said in found.problems:
        print(f"skipped {said}", file=sys.stderr)
    for said in found.repeats:
        print(f"left out {said}", file=sys.stderr)

    def read(job: Job) -> tuple[Prepared, list[Guess]]:
        guesses: list[Guess] = []  # told in the order of the pictures
        return prepare(job.path, fast.config, args.size, args.bits, tell=guesses.append), guesses

    def label(
        read: list[tuple[Prepared, list[Guess]]], busy: int
    ) -> list[tuple[Prepared, list[Guess], Classified]]:
        # Threads of the network wait for each other: one whose processor encodes holds up all.
        torch.set_num_threads(max(1, threads - busy))
        found = classify(fast, [prepared.x for prepared, _ in read], args.confidence)
        return [(*one, classified) for one, classified in zip(read, found)]

    def joins(read: list[tuple[Prepared, list[Guess]]], one: tuple[Prepared, list[Guess]]) -> bool:
        x = one[0].x
        return x.shape == read[0][0].x.shape and fits(len(read), x)

    def write(job: Job, made: tuple[Prepared, list[Guess], Classified]) -> list[Guess]:
        (pixels, _), guesses, classified = made
        labels, confidence = classified.at(pixels.shape)
        try:
            results.write(
                args.out / job.name, pixels, labels, fast, args.overlay_format, confidence
            )
        except ValueError as error:
            raise ValueError(f"{job.path}: {error}") from error
        except OSError as error:
            if error.errno not in _OF_ONE:
                raise
            said = f"{job.path}: {error.filename} cannot be written: {error.strerror}"
            raise ValueError(said) from error
        return guesses

    threads = torch.get_num_threads()
    done, jobs = 0, found.jobs
    steps = overlapped(
        jobs,
        read,
        label,
        write,
        size=lambda job: size_of(job.path),
        most=_MOST_PIXELS,
        workers=threads,
        joins=joins,
    )
    bar = tqdm(total=len(jobs), unit="picture", disable=True if len(jobs) == 1 else None)
    try:
        with closing(steps), bar:
            for _, outcome in steps:
                try:
                    guesses = outcome.result()
                except ValueError as error:
                    tqdm.write(f"skipped {error}", file=sys.stderr)
                else:
                    done += 1
                    for guess in guesses:
                        guess.tell()
                bar.update()
    finally:
        torch.set_num_threads(threads)
    skipped = len(jobs) - done + len(found.problems)
    left_out = (
        f", {found.repeated} left out (links to others, or given twice)" if found.repeated else ""
    )
    written = ", *".join(endings(args.overlay_format, args.confidence))
    where = f"; results: {args.out}/*{written}" if done else ""
    print(f"{done} segmented, {skipped} skipped{left_out}{where}")
    return 1 if skipped or not done else 0
