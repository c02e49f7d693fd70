"""``fastscnn_fast train``: learn from labelled pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar, get_type_hints

import torch

from ..data.classes import counted
from ..data.datasets import load
from ..train import Recipe, Trainer
from ..train.files import BEST, LAST, check_run, read_last
from ..train.processes import Processes, processes
from ..train.trainer import said
from ..writing import claimed
from . import options

Made = TypeVar("Made", bound=Recipe)

#: How a field of the recipe is written on the command line, by its type.
_WRITTEN: dict[Any, dict[str, Any]] = {
    bool: {"action": argparse.BooleanOptionalAction},
    int: {"type": int, "metavar": "N"},
    float: {"type": float, "metavar": "X"},
    float | None: {"type": float},
    str: {},
    str | None: {"metavar": "F"},
    float | tuple[float, ...]: {"type": float, "nargs": "+", "metavar": "X"},
    tuple[float, float]: {"type": float, "nargs": 2, "metavar": ("MIN", "MAX")},
    tuple[int, int] | None: options.SIZE,
}
#: The same by its name, where that says more.
_NAMED: dict[str, dict[str, Any]] = {"dtype": {"type": options.dtype}}


def add_options(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Train a network by the paper's recipe, or what the options make of it. Data errors are"
        " found first and named by file. Ctrl-C and SIGTERM save before they stop. Under torchrun the"
        " batch is shared by all processes."
    )
    add_run(command)
    add_recipe(command.add_argument_group("recipe"), Recipe, [f.name for f in fields(Recipe)])


def add_run(command: argparse.ArgumentParser) -> None:
    """The data and the run."""
    options.add_data(command)
    command.add_argument("-o", "--out", type=options.path, required=True, help="the run's folder")
    command.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in OUT by its own recipe; --epochs N goes on beyond its end",
    )
    command.add_argument(
        "--splits",
        nargs=2,
        default=("train", "val"),
        metavar=("TRAIN", "VAL"),
        help="parts of DATA to learn from and to choose by (train val)",
    )
    command.add_argument(
        "--in-channels",
        type=int,
        choices=range(1, 5),
        default=3,
        metavar="N",
        help="channels that pictures are read to: 1 grey, 2 with alpha, 3 RGB, 4 RGBA (%(default)s)",
    )
    command.add_argument(
        "--validations",
        type=options.count,
        default=100,
        metavar="N",
        help="how many over the run, at most one an epoch (%(default)s)",
    )
    command.add_argument("--device", default="auto", help="torch device (auto: GPU, else CPU)")
    command.add_argument(
        "--workers",
        type=options.count,
        default=2,
        metavar="N",
        help="threads that prepare examples (%(default)s)",
    )
    command.add_argument(
        "--memory",
        type=float,
        default=8.0,
        metavar="GIB",
        help="of each process, to keep examples in (%(default)s)",
    )
    command.set_defaults(given=())


def add_recipe(recipe: options.Parser, kind: type[Recipe], names: Collection[str]) -> None:
    """Those of ``kind``'s fields that are among ``names``, but for what is settled."""
    types = get_type_hints(kind)
    for field in fields(kind):
        if field.name not in names or "settled" in field.metadata:
            continue
        among = field.metadata["among"]
        written = {"action": argparse._StoreAction} | _WRITTEN[types[field.name]]
        written |= _NAMED.get(field.name, {})
        recipe.add_argument(
            "--" + field.name.replace("_", "-"),
            default=field.default,
            help=field.metadata["meaning"] + ("" if field.default is None else " (%(default)s)"),
            **(written | {"action": _noted(written["action"])}),
            **({"choices": among} if among else {}),
        )


def _noted(kind: type[argparse.Action]) -> type[argparse.Action]:
    """An action of that kind which also adds its option to ``given``, those that were not left out."""

    class Noted(kind):  # type: ignore[valid-type, misc]
        def __call__(self, parser: Any, namespace: argparse.Namespace, *value: Any) -> None:
            super().__call__(parser, namespace, *value)
            namespace.given = (*namespace.given, self.dest)

    return Noted


def _recipe(args: argparse.Namespace, kind: type[Made]) -> Made:
    """By the options; where a run goes on, those that are left out are as they were."""
    offered = [field.name for field in fields(kind) if "settled" not in field.metadata]
    values = {name: getattr(args, name) for name in offered}
    if not args.resume or not (args.out / LAST).exists():
        return kind(**values)
    before = read_last(args.out)["run"]
    own = {name: value for name, value in before.items() if name in values}
    values |= {name: value for name, value in own.items() if name not in args.given}
    try:
        return kind(**values)
    except ValueError:  # what is given beside the run's own may break a rule by being another's
        try:
            check_run({"run": own}, json.loads(json.dumps(values)), args.out)
        except ValueError as error:
            raise ValueError(f"--resume goes on by the run's own recipe: {error}") from None
        raise


def run(args: argparse.Namespace) -> int:
    return follow(args, Recipe, Trainer)


def follow(args: argparse.Namespace, kind: type[Made], trainer: Callable[..., Trainer]) -> int:
    """One run by a recipe of that kind."""
    recipe = _recipe(args, kind)
    device = options.device(args.device)
    with (
        processes(device) as group,
        options.out(args.out, claimed) if group.rank == 0 else nullcontext(),
    ):
        return _follow(args, partial(trainer, recipe), device, group)


def _follow(
    args: argparse.Namespace,
    prepared: Callable[..., Trainer],
    device: torch.device,
    group: Processes,
) -> int:
    there = (args.out / LAST).exists()
    if there and not args.resume:
        raise ValueError(f"{args.out}: holds a run already; add --resume, or name another folder")
    if args.resume and not there:
        raise ValueError(f"{args.out}: holds no run ({LAST}) for --resume to go on with")
    sources = [options.source(args, split, args.in_channels) for split in args.splits]
    limits = {"memory": args.memory * 2**30 / 2, "workers": args.workers}
    train, val = (load(source, **limits) for source in sources)
    trainer = prepared(
        train,
        val,
        args.out,
        device,
        args.validations,
        args.workers,
        args.command_line,
        group,
    )
    if args.resume:
        trainer.resume()
    if group.rank == 0:
        _announce(trainer)
    status = trainer.run()
    if group.rank == 0 and status == 0:
        history = trainer.history
        best = next((row for row in history if row.get("miou") == trainer.best), history[-1])
        print(f"{said(best)} on {args.splits[1]}: {args.out}/{BEST}")
    return status


def _announce(trainer: Trainer) -> None:
    parameters = sum(p.numel() for p in trainer.model.parameters())
    crop, classes = trainer.batches.augmentation.crop, counted(len(trainer.train.classes))
    print(
        f"{counted(len(trainer.train), 'example')}, {classes}, crops {crop[0]}x{crop[1]};"
        f" {parameters} parameters, {trainer.recipe.dtype}, {trainer.group.world} x {trainer.device};"
        f" step {trainer.step} of {trainer.steps}"
    )
