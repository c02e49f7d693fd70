"""Types of command-line options that several commands share."""

from __future__ import annotations

import argparse
import os

import torch

from ..arch.config import SMALLEST_SIDE
from ..backends import registry

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=registry.PRECISIONS,
        default="highest",
        help="of float32 products (%(default)s); high is faster on processors with AMX",
    )


def device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one. Under torchrun each process has its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    chosen = torch.device(name)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return chosen


def size(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH"""
    sides = text.lower().split("x")
    if not (len(sides) == 2 and all(side.isdecimal() for side in sides)) or (
        min(map(int, sides)) < SMALLEST_SIDE
    ):
        rule = f"must be HEIGHTxWIDTH, each at least {SMALLEST_SIDE}"
        raise argparse.ArgumentTypeError(f"{rule}, got {text!r}")
    return int(sides[0]), int(sides[1])


def count(text: str) -> int:
    """An integer of at least 1."""
    if not (text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)
