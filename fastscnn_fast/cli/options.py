"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from ..arch.config import PRESETS, SMALLEST_SIDE, picture_size
from ..backends import registry
from ..checkpoints import CAMVID11, SHIPPED, located
from ..data.remote import is_uri
from ..data.sources import Source, open_source
from ..program.arithmetic import ARITHMETICS, PRECISIONS
from ..writing import folder, folder_of
from .parser import like

#: A parser, or a group of its options.
Parser = argparse._ActionsContainer

#: The dtypes that some backend has kernels for, by name.
DTYPES = {
    name: one.dtype
    for name, one in ARITHMETICS.items()
    if one.precision == "highest" and set(one.needs) != {"reference"}
}
#: Those that a backend on GPUs has kernels for.
GPU_DTYPES = {
    name: chosen
    for name, chosen in DTYPES.items()
    if not ARITHMETICS[name].needs.keys().isdisjoint(registry.GPU_BACKENDS)
}
_NAMES = ", ".join(SHIPPED)
_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add_weights(command: Parser) -> None:
    command.add_argument(
        "--weights",
        type=weights,
        metavar="F",
        default=CAMVID11,
        help=f"checkpoint, .safetensors or .pth, or one of the package's own by name: {_NAMES} ({CAMVID11.stem})",
    )


def add_backend(command: Parser) -> None:
    command.add_argument(
        "--backend",
        choices=("auto", *registry.BACKENDS),
        default="auto",
        help="kernels to run on (%(default)s: the best that can)",
    )


def add_preset(command: Parser) -> None:
    command.add_argument(
        "--preset", choices=PRESETS, default="paper", help="architecture (%(default)s)"
    )


def add_sizes(command: Parser) -> None:
    command.add_argument(
        "--size",
        nargs="+",
        default=[(512, 1024)],
        help="picture sizes (512x1024)",
        **SIZE,
    )


def add_dtype(command: Parser, default: str, choices: Mapping[str, torch.dtype] = DTYPES) -> None:
    command.add_argument(
        "--dtype",
        type=dtype,
        choices=choices,
        default=default,
        help=f"dtype to compute in (%(default)s){SHORT}",
    )


def add_precision(command: Parser) -> None:
    command.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="highest",
        help="of float32 products (%(default)s); high is faster on processors with AMX",
    )


def add_bits(command: Parser) -> None:
    command.add_argument(
        "--bits",
        type=int,
        choices=range(8, 17),
        metavar="N",
        help="bits that pictures of more than 8 a channel use, 8 to 16, of which the upper 8 are kept (the least of"
        " 8, 10, 12, 14, 16 that holds a picture's largest value, with a warning)",
    )


def add_data(command: Parser) -> None:
    """Where labelled pictures are."""
    command.add_argument(
        "data",
        type=filled,
        metavar="DATA",
        help="folder with SPLIT/images and SPLIT/labels, or Cityscapes' own, or streets[:COUNT]",
    )
    command.add_argument(
        "--classes",
        type=int,
        metavar="K",
        help="number of classes, unless DATA/classes.txt names them",
    )
    command.add_argument(
        "--ignore", type=int, metavar="ID", help="label id that counts as no class (255)"
    )
    command.add_argument(
        "--label-map",
        type=path,
        metavar="FILE",
        help="what the values of label files mean, a line each: an id, a colour (R G B or #RRGGBB) or * for all others,"
        " then a class's id or name or 'ignore', as in '255 1', '0 ignore', '128 64 128 road'",
    )
    command.add_argument(
        "--label-suffix",
        default="",
        metavar="TEXT",
        help="what label files' names have after their pictures', as in _mask for 0_mask.png beside 0.jpg",
    )
    add_bits(command)


def source(args: argparse.Namespace, split: str, channels: int) -> Source:
    """The labelled pictures of a split, of so many channels, as the options of :func:`add_data` say."""
    return open_source(
        *(args.data, split, args.classes, args.ignore, args.bits),
        *(args.label_map, args.label_suffix, channels),
    )


def device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one. Under torchrun each process has its own.

    Raises:
        CannotRun: it is a GPU, and there is none.
        RuntimeError: torch knows no device of that name.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    chosen = torch.device(name)
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise registry.CannotRun(f"device {name} cannot be used: {registry.NO_GPU}")
        torch.cuda.set_device(chosen)
    return chosen


@contextmanager
def out(
    path: Path, hold: Callable[[Path], AbstractContextManager[None]] = folder
) -> Iterator[None]:
    """The folder that ``--out`` names, as :func:`~fastscnn_fast.writing.folder` or another of its kind holds it.

    Raises:
        ValueError: it cannot be made or written to; and as ``hold``.
    """
    with _held("--out", "a folder that can be made and written to", path, hold):
        yield


@contextmanager
def out_file(option: str, path: Path) -> Iterator[None]:
    """The file that ``option`` names, with its folder made.

    Raises:
        ValueError: it is a folder, or its own can't be made or written to.
    """
    with _held(option, "a file that can be written", path, folder_of):
        yield


@contextmanager
def _held(
    option: str, rule: str, path: Path, hold: Callable[[Path], AbstractContextManager[None]]
) -> Iterator[None]:
    with ExitStack() as held:
        try:
            held.enter_context(hold(path))
        except OSError as error:
            where = "" if error.filename == str(path) else f"{error.filename}: "
            raise ValueError(
                f"{option} must be {rule}, got {path} ({where}{error.strerror})"
            ) from error
        yield


def filled(text: str) -> str:
    """A name that is not empty: as a path, that would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty, got ''")
    return text


def weights(text: str) -> Path:
    """The file of weights of that path, or of those of that name that come with the package."""
    file = located(filled(text))
    if not file.suffix and not file.exists():
        rule = f"must be a file, or one of {_NAMES}"
        raise argparse.ArgumentTypeError(f"{rule}, got {text!r}{like(text, SHIPPED)}")
    return file


def path(text: str) -> Path:
    """The path of a file or folder."""
    return Path(filled(text))


def place(text: str) -> Path | str:
    """A path, or a URI as it is."""
    return text if is_uri(text) else path(text)


def dtype(text: str) -> str:
    """A dtype's name, however it is written: float16, torch.float16 or fp16."""
    name = text.lower().removeprefix("torch.")
    return _SHORT_DTYPES.get(name, name)


def size(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH, or the side of a square."""
    sides = text.lower().split("x")
    if (
        len(sides) > 2
        or not all(side.isdecimal() for side in sides)
        or min(map(int, sides)) < SMALLEST_SIDE
    ):
        rule = f"must be HEIGHTxWIDTH or the side of a square, each at least {SMALLEST_SIDE}"
        raise argparse.ArgumentTypeError(f"{rule}, got {text!r}")
    try:
        return picture_size((int(sides[0]), int(sides[-1])))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("size ")) from None


def count(text: str) -> int:
    """An integer of at least 1."""
    if not (text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


#: Of an option that is a size, and what follows the help of one that is a dtype.
SIZE: dict[str, Any] = {"type": size, "metavar": "HxW|N"}
SHORT = f"; {', '.join(_SHORT_DTYPES)} for short"
