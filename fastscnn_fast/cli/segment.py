"""``fastscnn_fast segment``: pictures, videos and cameras to labels."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..checkpoints import load_checkpoint
from ..data.jobs import Found, Job, find
from ..data.pictures import (
    CONFIDENCE,
    ENDINGS,
    LABELS,
    OVERLAY,
    OVERLAY_FORMATS,
    PICTURE_SUFFIXES,
    VIDEO_LABELS,
    VIDEO_OVERLAY,
    VIDEO_SUFFIXES,
    Guess,
    no_file,
    size_of,
)
from ..data.results import endings
from ..data.videos import CONTAINERS, LOSSLESS
from ..runtime.flow import flow
from ..runtime.fused import FusedFastSCNN, fuse
from ..runtime.segment import Confidence, Labels, Prepared, prepare
from ..runtime.tiles import OVERLAP, Tiling, tiling
from ..writing import OF_ONE
from . import clips, on_ray, options, results, tiled


def add_options(command: argparse.ArgumentParser) -> None:
    videos = ", ".join(CONTAINERS)
    command.description = (
        "Write, for each picture NAME.*, its class ids as a palette PNG of the picture's own"
        f" size (NAME{LABELS}) and the picture tinted by class with a legend"
        f" (NAME{OVERLAY}.png); for each video or camera a video of the frames tinted by class, with the sound"
        f" (NAME{VIDEO_OVERLAY}). What cannot be read is reported and skipped, as are links in"
        " circles, pipes and devices; the exit code is then 1. A video that is damaged or cut off ends with what could be"
        " read, is reported, and the exit code is 1."
    )
    command.epilog = (
        "Folders are searched with their subfolders, which reappear in OUT, and links are followed. What"
        f" is met again is left out, and said. Earlier results (*{', *'.join(ENDINGS)}) in"
        " folders are no pictures. Equal names from two folders keep their folders; where two in one"
        " have one name, the second gets its ending added: NAME_png. Videos and cameras need the extra video."
    )
    command.add_argument(
        "pictures",
        nargs="+",
        type=options.filled,
        metavar="PICTURE_VIDEO_FOLDER_OR_CAMERA",
        help="what to segment: files, folders of files, a camera's number, from 0 up, and URLs only with --ray",
    )
    command.add_argument(
        "-o",
        "--out",
        type=options.place,
        help=f"folder for the results, or, of one video or camera, the video to write ({videos}); needed unless --show",
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
        "--tile",
        **options.SIZE,
        help="run pictures at their own size in tiles of this size, at least 64, with memory for a row of them only:"
        " for pictures that are too large otherwise; TIFFs are read by rows, with the extra tiff, PNGs written by rows",
    )
    command.add_argument(
        "--overlap",
        type=int,
        metavar="N",
        help=f"pixels that neighbouring tiles share, in which they are blended ({OVERLAP})",
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
        help="write no tinted picture; of a video write its class ids, as grey frames without loss, instead"
        f" (NAME{VIDEO_LABELS})",
    )
    command.add_argument(
        "--every",
        type=options.count,
        default=1,
        metavar="N",
        help="of a video or camera take every Nth frame only (%(default)s)",
    )
    command.add_argument(
        "--show",
        action="store_true",
        help="show a video or camera in a window while it is segmented, until that is closed (Escape or q)",
    )


def run(args: argparse.Namespace) -> int:
    if args.out is None and (args.ray is not None or not args.show):
        args.error("the following arguments are required: -o/--out, unless --show is given")
    if args.ray is not None:
        _check_ray(args)
        return on_ray.run(args)
    if isinstance(args.out, str):
        raise ValueError(f"--out must be a folder unless --ray is given, got {args.out}")
    cameras = [int(one) for one in args.pictures if _is_camera(one)]
    found = find([one for one in args.pictures if not _is_camera(one)])
    _check(args, found, cameras)
    model = load_checkpoint(args.weights)
    fast = fuse(model, args.backend, options.DTYPES[args.dtype], args.precision)
    with _ended_alike():
        if args.out is None:
            return _segment(args, fast, found, cameras)
        with options.out(args.out.parent if _is_video_file(args.out) else args.out):
            return _segment(args, fast, found, cameras)


@contextmanager
def _ended_alike() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does: nothing half-written stays, and what a camera brought until then does."""
    if threading.current_thread() is not threading.main_thread():  # which alone may ask for it
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_ray(args: argparse.Namespace) -> None:
    """Refuses what one machine does alone."""
    for name, given in (
        ("tile", args.tile),
        ("overlap", args.overlap is not None),
        ("show", args.show),
        ("every", args.every > 1),
    ):
        if given:
            raise ValueError(f"--{name} must not go with --ray, which spreads whole pictures")


def _is_camera(argument: str) -> bool:
    return argument.isdecimal() and not os.path.lexists(argument)


def _is_video_file(out: Path) -> bool:
    return out.suffix.lower() in CONTAINERS and not out.is_dir()


def _check(args: argparse.Namespace, found: Found, cameras: list[int]) -> None:
    """Refuses options that go with nothing that there is to segment.

    Raises:
        ValueError: and which, and why.
    """
    pictures = [job for job in found.jobs if not job.video]
    videos = [str(job.path) for job in found.jobs if job.video] + [str(one) for one in cameras]
    if args.show and pictures:
        raise ValueError(f"--show must go with videos and cameras alone, got {pictures[0].path}")
    if args.every > 1 and pictures and not videos:
        raise ValueError(
            f"--every must go with a video or camera, got {args.every} for {pictures[0].path}"
        )
    if args.confidence and videos and not pictures:
        raise ValueError(f"--confidence must go with pictures, got {videos[0]} alone")
    if args.tile is not None:
        if args.size is not None:
            height, width = args.size
            raise ValueError(f"--size must not go with --tile, got {height}x{width}")
        if args.overlay_format == "jpg":
            raise ValueError(
                "--overlay-format must be png with --tile, which writes by rows, got jpg"
            )
        if videos:
            raise ValueError(f"--tile must go with pictures alone, got {videos[0]}")
        _cut(args)
    elif args.overlap is not None:
        raise ValueError(f"--overlap must go with --tile, got {args.overlap}")
    if args.out is not None:
        _check_out(args, found, len(pictures), videos)


def _check_out(args: argparse.Namespace, found: Found, pictures: int, videos: list[str]) -> None:
    """Refuses a place for results that they cannot have."""
    file = _is_video_file(args.out)
    read = [job.path for job in found.jobs if file or job.path.name.endswith(ENDINGS)]
    results.check_kept(args.out, read, (one for job in found.jobs for one in _results(args, job)))
    if not file:
        if (
            args.out.suffix.lower() in (*PICTURE_SUFFIXES, *VIDEO_SUFFIXES)
            and not args.out.exists()
        ):
            rule = f"--out must be a folder, or, of one video or camera, end in {', '.join(CONTAINERS)}"
            raise ValueError(f"{rule}, got {args.out}")
        return
    if args.out.exists() and not args.out.is_file():
        raise ValueError(
            f"--out must be a regular file, got {args.out}, which {no_file(str(args.out))}"
        )
    if pictures or len(videos) > 1:
        rule = "--out must be a folder, unless there is one video or camera"
        got = f"{pictures} pictures and {len(videos)} videos"
        raise ValueError(f"{rule}, got {args.out} for {got}")
    if args.overlay_format is None and CONTAINERS[args.out.suffix.lower()] not in LOSSLESS:
        taken = ", ".join(end for end, kind in CONTAINERS.items() if kind in LOSSLESS)
        rule = f"--out must end in {taken}, which keep labels without loss, with --labels-only"
        raise ValueError(f"{rule}, got {args.out}")


def _results(args: argparse.Namespace, job: Job) -> list[Path]:
    """The files to be written for a job."""
    if _is_video_file(args.out):
        return [args.out]
    names = [_video_ending(args)] if job.video else endings(args.overlay_format, args.confidence)
    return [args.out / job.name.with_name(job.name.name + name) for name in names]


def _segment(
    args: argparse.Namespace, fast: FusedFastSCNN, found: Found, cameras: list[int]
) -> int:
    for said in found.problems:
        print(f"skipped {said}", file=sys.stderr)
    for said in found.repeats:
        print(f"left out {said}", file=sys.stderr)
    pictures = [job for job in found.jobs if not job.video]
    sources: list[tuple[Path | int, Job]] = [(job.path, job) for job in found.jobs if job.video]
    for number in cameras:
        sources.append((number, Job(Path(str(number)), Path(f"camera{number}"), video=True)))
    done = (_pictures if args.tile is None else _tiled)(args, fast, pictures)
    shown, damaged = 0, 0
    for source, job in sources:
        out = None if args.out is None else _results(args, job)[0]
        labels_only = args.overlay_format is None
        clip = clips.Clip(source, out, args.size, args.every, labels_only, args.show)
        try:
            with _of_one(job.path):
                damaged += not clips.segment(fast, clip)
        except ValueError as error:
            print(f"skipped {error}", file=sys.stderr)
        except ImportError as error:
            print(f"skipped {source}: {error}", file=sys.stderr)
        else:
            shown += 1
    segmented, skipped = done + shown, len(pictures) - done + len(sources) - shown
    skipped += len(found.problems)
    said = f"{segmented} segmented, {skipped} skipped"
    if damaged:
        said += f", {damaged} damaged"
    if found.repeated:
        said += f", {found.repeated} left out (links to others, or given twice)"
    written = endings(args.overlay_format, args.confidence) if done else []
    written += [_video_ending(args)] if shown else []
    if written and args.out is not None and not _is_video_file(args.out):
        said += f"; results: {args.out}/*{', *'.join(written)}"
    print(said)
    return 1 if skipped or damaged or not segmented else 0


def _video_ending(args: argparse.Namespace) -> str:
    return VIDEO_LABELS if args.overlay_format is None else VIDEO_OVERLAY


@contextmanager
def _of_one(path: Path) -> Iterator[None]:
    """What is wrong with the results of one picture or video alone, unlike a full disk, is a ValueError that names it."""
    try:
        yield
    except OSError as error:
        if error.errno not in OF_ONE:
            raise
        said = f"{path}: {error.filename} cannot be written: {error.strerror}"
        raise ValueError(said) from error


def _cut(args: argparse.Namespace) -> Tiling:
    return tiling(args.tile, args.overlap)


def _tiled(args: argparse.Namespace, fast: FusedFastSCNN, jobs: list[Job]) -> int:
    """As :func:`_pictures`, in tiles."""
    cut, done = _cut(args), 0
    overlays = args.overlay_format is not None
    for job in jobs:
        try:
            name = args.out / job.name
            with _of_one(job.path):
                tiled.segment(fast, job.path, name, cut, args.bits, overlays, args.confidence)
        except ValueError as error:
            print(f"skipped {error}", file=sys.stderr)
        else:
            done += 1
    return done


def _pictures(args: argparse.Namespace, fast: FusedFastSCNN, jobs: list[Job]) -> int:
    """How many of ``jobs`` were segmented; what is wrong with the others is said."""

    guesses: dict[Job, list[Guess]] = {}  # told in the order of the pictures

    def read(job: Job) -> Prepared:
        tell = guesses.setdefault(job, []).append
        return prepare(job.path, fast.config, args.size, args.bits, tell=tell)

    def write(
        job: Job, pixels: NDArray[np.uint8], labels: Labels, confidence: Confidence | None
    ) -> None:
        with _of_one(job.path):
            try:
                results.write(
                    args.out / job.name, pixels, labels, fast, args.overlay_format, confidence
                )
            except ValueError as error:
                raise ValueError(f"{job.path}: {error}") from error

    done = 0
    steps = flow(fast, jobs, read, write, lambda job: size_of(job.path), args.confidence)
    bar = tqdm(total=len(jobs), unit="picture", disable=True if len(jobs) == 1 else None)
    with closing(steps), bar:
        for job, outcome in steps:
            told = guesses.pop(job, [])
            try:
                outcome.result()
            except ValueError as error:
                tqdm.write(f"skipped {error}", file=sys.stderr)
            else:
                done += 1
                for guess in told:
                    guess.tell()
            bar.update()
    return done
