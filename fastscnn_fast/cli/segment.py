"""``fastscnn_fast segment``: pictures to labels."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from ..checkpoints import load_checkpoint
from ..data.pictures import PICTURE_SUFFIXES, read_picture
from ..runtime.fused import fuse
from ..runtime.segment import segment
from . import options, results
from .results import LABELS, OVERLAY


def add_options(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Write, for each picture NAME.*, its class ids as a palette PNG of the picture's own"
        f" size (NAME{LABELS}) and the picture tinted by class with a legend (NAME{OVERLAY}). Pictures that"
        " cannot be read are reported and skipped; the exit code is then 1."
    )
    command.epilog = (
        "Folders are searched with their subfolders, which reappear in OUT. Earlier results"
        f" (*{LABELS}, *{OVERLAY}) in them are no pictures. Where two pictures have one name, the second"
        " gets its ending added: NAME_png."
    )
    command.add_argument(
        "pictures", nargs="+", type=Path, metavar="PICTURE_OR_FOLDER", help="what to segment"
    )
    command.add_argument("-o", "--out", type=Path, required=True, help="folder for the results")
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


def run(args: argparse.Namespace) -> int:
    model = load_checkpoint(args.weights)
    fast = fuse(model, args.backend, options.DTYPES[args.dtype], args.precision)
    args.out.mkdir(parents=True, exist_ok=True)
    jobs, problems = _jobs(args.pictures)
    for problem in problems:
        print(f"skipped {problem}", file=sys.stderr)
    skipped = len(problems)
    for path, name in tqdm(jobs, unit="picture", disable=True if len(jobs) == 1 else None):
        try:
            pixels = read_picture(path, fast.config.in_channels, args.bits)
            labels = segment(fast, pixels, args.size)
        except ValueError as error:
            tqdm.write(f"skipped {error}", file=sys.stderr)
            skipped += 1
        else:
            results.write(args.out / name, pixels, labels, fast)
    done = len(jobs) + len(problems) - skipped
    print(f"{done} segmented, {skipped} skipped; results: {args.out}/*{LABELS}, *{OVERLAY}")
    return 1 if skipped or not done else 0


def _jobs(arguments: Sequence[Path]) -> tuple[list[tuple[Path, Path]], list[str]]:
    """The pictures, each once, with distinct names for their results; and what is wrong with the rest."""
    jobs: dict[Path, tuple[Path, Path]] = {}
    problems, taken = [], set()
    for argument in arguments:
        if argument.is_dir():
            pictures = list(_pictures_in(argument))
            if not pictures:
                problems.append(f"{argument}: no pictures in this folder")
        else:
            pictures = [(argument, Path(argument.name))]
        for path, relative in pictures:
            if path.resolve() in jobs:
                continue
            name = next(name for name in _names(relative) if str(name).casefold() not in taken)
            taken.add(str(name).casefold())
            jobs[path.resolve()] = path, name
    return list(jobs.values()), problems


def _pictures_in(folder: Path) -> Iterator[tuple[Path, Path]]:
    for path in sorted(folder.rglob("*")):
        known = path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")
        if known and not path.name.endswith((LABELS, OVERLAY)) and path.is_file():
            yield path, path.relative_to(folder)


def _names(picture: Path) -> Iterator[Path]:
    """Names for the results of ``picture``, the plainest first."""
    plain = picture.with_suffix("")
    yield plain
    full = plain.with_name(f"{plain.name}_{picture.suffix[1:]}")
    yield full
    number = 2
    while True:
        yield full.with_name(f"{full.name}_{number}")
        number += 1
