"""``fastscnn_fast prune``: a narrower network out of a trained one."""

from __future__ import annotations

import argparse
from dataclasses import fields

from ..train.pruner import Pruner
from ..train.recipe import PruneRecipe, Recipe
from . import train

#: What a run of pruning asks for beside what one of training does.
_OWN = [field.name for field in fields(PruneRecipe) if not hasattr(Recipe, field.name)]


def add_options(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Make the network of --weights narrower in steps: channels are cut where that costs the least for the time"
        " that it saves, and what is left learns from the labels and from what the network said before. The result is an"
        " ordinary network of other widths. Runs are as those of train: Ctrl-C and SIGTERM save before they stop, --resume goes on."
    )
    train.add_run(command)
    pruning = command.add_argument_group("pruning")
    train.add_recipe(pruning, PruneRecipe, ["weights", *_OWN])
    learning = command.add_argument_group("recipe")
    others = [field.name for field in fields(Recipe) if field.name != "weights"]
    train.add_recipe(learning, PruneRecipe, others)


def run(args: argparse.Namespace) -> int:
    return train.follow(args, PruneRecipe, Pruner)
