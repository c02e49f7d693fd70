"""Runs that make a trained network narrower, cut by cut, while it learns from what it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..checkpoints import load_checkpoint
from ..program.arithmetic import ARITHMETICS
from ..program.program import operations
from ..runtime.model import FastSCNN
from .prune import SIZE, Pruning
from .recipe import PruneRecipe
from .step import Objective, rebuilt
from .trainer import Trainer

_CHOSEN_BY = 2  # batches that a cut is chosen by


class Pruner(Trainer):
    """A run that begins with trained weights, and in which the network loses channels, cut by cut.

    A cut takes the weights that are kept and leaves off the channels that they can best do without
    (:class:`~fastscnn_fast.train.prune.Pruning`); each takes as large a share of the operations as the others.
    Learning goes on with what is left, from the labels and from what the network said before the first.
    ``best.safetensors`` holds the best since the last cut, which at least one step follows.

    Args:
        recipe: what to prune, and what to learn by; where it has no size and no teacher, they are those of the weights, and these.
        given: as :class:`Trainer` takes them.

    Raises:
        ImportError: torch-pruning is not installed.
        ValueError: weights, recipe and examples do not fit together, or widths of ``recipe.arithmetic`` allow
            no network of so few operations.
    """

    recipe: PruneRecipe

    def __init__(self, recipe: PruneRecipe, *given: Any, **named: Any) -> None:
        assert recipe.weights is not None  # a rule of the recipe
        self.unpruned = load_checkpoint(recipe.weights).float()
        recipe = replace(
            recipe,
            size=recipe.size or self.unpruned.config.size,
            teacher=recipe.teacher or recipe.weights,
        )
        super().__init__(recipe, *given, **named)
        # The epochs are more than those until the last cut; where that is not a whole step, it becomes one.
        self.steps = max(self.steps, self._step_of(recipe.cuts - 1) + 1)
        self._pruning(self.unpruned).choose(recipe.flops * self._whole)  # whether there is one

    def _network(self) -> FastSCNN:
        config, recipe = self.unpruned.config, self.recipe
        self.classes = self._classes_with("weights", self.unpruned)
        dropout = config.dropout if recipe.dropout is None else recipe.dropout
        return rebuilt(self.unpruned, replace(config, aux=False, size=recipe.size, dropout=dropout))

    def _call(self, model: FastSCNN) -> None:
        """As the examples' classes are, or as those of the weights are where nobody has named the former."""
        if self.classes == tuple(self.train.classes):
            super()._call(model)
        else:
            model.call_as(self.unpruned)

    @property
    def _size(self) -> tuple[int, int]:
        return self.recipe.size or SIZE

    @property
    def _whole(self) -> int:
        return operations(self.unpruned.config, *self._size)

    def _pruning(self, model: FastSCNN) -> Pruning:
        return Pruning(model, ARITHMETICS[self.recipe.arithmetic], self._size)

    def _step_of(self, cut: int) -> int:
        """The step before which a cut comes."""
        return round(cut * self.recipe.spacing * self.epoch_steps)

    def _before_step(self) -> None:
        for cut in range(self.recipe.cuts):
            if self._step_of(cut) == self.step:
                self._cut(self.recipe.flops ** ((cut + 1) / self.recipe.cuts))

    def _cut(self, share: float) -> None:
        """Goes on with a network of that share of the operations."""
        self._agree()
        pruning = self._pruning(self._kept())
        alone = replace(self.recipe, accumulate=1)
        plain = Objective(pruning.model, self.targets, alone, self.group.world)
        plain.teacher = self.teacher
        batches = []
        for shown in self.batches.steps(self.step, self.step + _CHOSEN_BY):
            both = (part.to(self.device).chunk(self.recipe.accumulate) for part in shown)
            for pictures, labels in zip(*both):
                denominator = self.group.sum(self.targets.denominator(labels))
                taught = plain.taught(pictures) if plain.teacher else None
                batches.append((pictures, labels, denominator, taught))

        def loss() -> float:
            total = sum(plain(*batch)[0] for batch in batches)
            return float(self.group.sum(total.double())) / len(batches) / self.group.world

        if self.recipe.importance == "taylor":
            for batch in batches:
                plain(*batch)[0].backward()
                pruning.observe()
            for conv in pruning.scores:
                self.group.sum(pruning.scores[conv])
        self._take(pruning.cut(pruning.choose(share * self._whole, loss)))
        self._mode()
        self.best = -1.0

    def _row(self) -> dict[str, float]:
        return super()._row() | {"flops": operations(self.model.config, *self._size) / self._whole}
