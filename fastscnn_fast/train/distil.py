"""Learning from another network's logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arch.network import resize
from ..lower.fold import folded_tensors
from ..program import reference
from ..program.program import Program, fast_scnn
from ..runtime.model import FastSCNN
from .loss import Targets, of_labels
from .ops import normalised


class Folded:
    """A network with its batch norms folded, up to the small logits: what it computes in eval mode, in less time.

    Args:
        model: whose weights they are; where gradients are enabled they reach these.
    """

    def __init__(self, model: FastSCNN) -> None:
        whole = fast_scnn(model.config)
        self.config, self.program = model.config, Program(whole.layers[:-1])
        self.weights = [
            {name: tensor.float() for name, tensor in layer.items()}
            for layer in folded_tensors(model, whole)[:-1]
        ]

    def __call__(self, pictures: Tensor) -> Tensor:
        """The small logits (N, K, h, w) of raw pictures, uint8 (N, C, H, W)."""
        return reference.network(normalised(pictures, self.config), self.program, self.weights)


class Teacher:
    """A network whose probabilities another is to have as well (Hinton et al., 2015).

    Args:
        model: the network, whose weights are taken as they are.
        targets: what labels ask for.
        weight: of :meth:`loss` beside that of the labels.
        temperature: by which logits are divided, of both.
    """

    def __init__(
        self, model: FastSCNN, targets: Targets, weight: float, temperature: float
    ) -> None:
        with torch.no_grad():
            self.network = Folded(model)
        self.targets = targets
        self.weight, self.temperature = weight, temperature

    def loss(self, logits: Tensor, theirs: Tensor) -> Tensor:
        """The mean over pixels of the divergence of small logits (N, K, h, w) from ``theirs``, those of :attr:`network`,
        times weight and squared temperature.

        Where a stem of other padding makes theirs of another size, they are resized as full-size logits are.
        """
        theirs = resize(theirs.float(), logits.shape[2:], self.network.config.align_corners)
        own, theirs = (
            (of_labels(z.float(), self.targets) / self.temperature).log_softmax(1)
            for z in (logits, theirs)
        )
        divergence = F.kl_div(own, theirs, reduction="none", log_target=True)
        return self.weight * self.temperature**2 * divergence.sum(1).mean()
