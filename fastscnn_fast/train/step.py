"""The parts of one step: the loss of a batch, which weights decay, the moving average."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..arch.config import Config
from ..arch.network import Ranges
from ..data.datasets import Examples
from ..runtime.model import FastSCNN
from . import quantised
from .dice import upsampled_dice
from .distil import Folded, Teacher
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
        teacher: whose logits those of the network are to be like, too.
    """

    ranges: Ranges | None = None
    teacher: Teacher | None = None

    def __init__(self, model: FastSCNN, targets: Targets, recipe: Recipe, world: int) -> None:
        super().__init__()
        self.model, self.targets, self.recipe, self.world = model, targets, recipe, world

    def forward(
        self, pictures: Tensor, labels: Tensor, denominator: Tensor, taught: Tensor | None = None
    ) -> Any:
        with self._autocast(pictures):
            logits = self._logits(pictures)
        align_corners = self.model.config.align_corners
        loss = torch.zeros((), device=pictures.device)
        if self.teacher is not None:
            theirs = self.taught(pictures) if taught is None else taught
            loss = loss + self.teacher.loss(logits[0], theirs) / self.recipe.accumulate
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

    @torch.no_grad()
    def taught(self, pictures: Tensor) -> Tensor:
        """The teacher's logits (N, K, h, w), which can be given to several calls for the same pictures."""
        assert self.teacher is not None
        with self._autocast(pictures):
            return self.teacher.network(pictures)

    def _autocast(self, pictures: Tensor) -> torch.autocast:
        bf16 = self.recipe.dtype == "bfloat16"
        return torch.autocast(pictures.device.type, torch.bfloat16, enabled=bf16)

    def _logits(self, pictures: Tensor) -> list[Tensor]:
        """The small logits, of the auxiliary heads too; those of the network alone where it is in eval mode."""
        if self.ranges is not None:
            return quantised.low_logits(self.model, pictures, self.ranges)
        if self.model.training:
            return low_logits(self.model, normalised(pictures, self.model.config))
        return [Folded(self.model)(pictures)]


def deployable(model: FastSCNN) -> FastSCNN:
    """A copy in eval mode without auxiliary heads."""
    return rebuilt(model, replace(model.config, aux=False))


def rebuilt(model: FastSCNN, config: Config) -> FastSCNN:
    """The network of ``config`` with the tensors of ``model``, on its device and in eval mode."""
    made = FastSCNN.from_config(config)
    wanted = made.state_dict()
    made.load_state_dict({k: v for k, v in model.state_dict().items() if k in wanted})
    for name, module in made.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = cast(nn.BatchNorm2d, model.get_submodule(name)).eps
    made.call_as(model)
    return made.to(model.classifier.conv.weight.device).eval()


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
