"""The parts of one step: the loss of a batch, which weights decay, the moving average."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..arch.network import Ranges
from ..data.datasets import Examples
from ..runtime.model import FastSCNN
from . import quantised
from .dice import upsampled_dice
from .loss import Targets, hard_examples, upsampled_cross_entropy
from .ops import low_logits, normalised
from .recipe import Recipe

_HARD_BELOW = 0.7


class Objective(nn.Module):
    """(pictures, labels, denominator) -> (loss, the small logits).

    The loss is the mean over the pixels of all processes; torch averages gradients over processes, so each
    process's sum is divided by its share of ``denominator``, the sum of all pixels' weights. The Dice loss is
    the mean over what each process computes at a time.

    Attributes:
        ranges: those of the values that int8 rounds, where ``recipe.quantize`` is set.
    """

    ranges: Ranges | None = None

    def __init__(self, model: FastSCNN, targets: Targets, recipe: Recipe, world: int) -> None:
        super().__init__()
        self.model, self.targets, self.recipe, self.world = model, targets, recipe, world

    def forward(self, pictures: Tensor, labels: Tensor, denominator: Tensor) -> Any:
        bf16 = self.recipe.dtype == "bfloat16"
        with torch.autocast(pictures.device.type, torch.bfloat16, enabled=bf16):
            if self.ranges is None:
                logits = low_logits(self.model, normalised(pictures, self.model.config))
            else:
                logits = quantised.low_logits(self.model, pictures, self.ranges)
        align_corners = self.model.config.align_corners
        loss = torch.zeros((), device=pictures.device)
        for index, z in enumerate(logits):
            hard, divisor = labels, denominator
            if self.recipe.ohem:
                hard = hard_examples(
                    z, labels, self.targets, align_corners, _HARD_BELOW, self.recipe.ohem
                )
                divisor = self.targets.denominator(hard) * self.world * self.recipe.accumulate
            total = upsampled_cross_entropy(z, hard, self.targets, align_corners)
            weight = self.recipe.aux_weight if index else 1.0
            loss = loss + weight * self.world * total / divisor.clamp(min=1e-12).float()
            if self.recipe.dice:
                dice = upsampled_dice(z, labels, self.targets, align_corners)
                loss = loss + weight * self.recipe.dice * dice / self.recipe.accumulate
        return loss, logits[0].detach()


def parameter_groups(model: FastSCNN, weight_decay: float) -> list[dict[str, Any]]:
    """Decay for the weights of ordinary convolutions, none for the rest."""
    groups: dict[float, list[nn.Parameter]] = {weight_decay: [], 0.0: []}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            convolution = isinstance(module, nn.Conv2d) and module.groups == 1
            groups[weight_decay if convolution and name == "weight" else 0.0].append(parameter)
    return [{"params": ps, "weight_decay": decay} for decay, ps in groups.items() if ps]


def class_weights(recipe: Recipe, examples: Examples) -> list[float] | None:
    """The recipe's weights of classes; of one number C, 1 / log(C + f) of each class's frequency f, scaled so
    that the mean over pixels is 1.

    Raises:
        ValueError: there are not as many weights as classes.
    """
    given = recipe.class_weights
    if isinstance(given, tuple):
        if len(given) != len(examples.pixels):
            raise ValueError(
                f"class_weights must be one number, or one for each class ({len(examples.pixels)}), got {len(given)}"
            )
        return list(given)
    if not given:
        return None
    f = examples.pixels / examples.pixels.sum()
    weights = 1 / np.log(given + f)
    return [float(w) for w in weights / (weights * f).sum()]


@torch.no_grad()
def update_average(average: FastSCNN, model: FastSCNN, decay: float, step: int) -> None:
    """average += (1 - decay) * (model - average); the first steps count for more."""
    decay = min(decay, (1 + step) / (10 + step))
    pairs = zip(average.state_dict().values(), model.state_dict().values())
    floats = [(a, b) for a, b in pairs if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], 1 - decay)


def seed_step(seed: int, step: int, rank: int) -> None:
    state = np.random.SeedSequence((seed, 4, step, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) >> 1)
