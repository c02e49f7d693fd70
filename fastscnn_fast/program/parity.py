"""How far a result is from the truth."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from .labels import labels_of


def relative_error(y: Tensor, exact: Tensor) -> float:
    """``||y - exact|| / ||exact - its mean per channel||`` over (N, C, H, W): no offset can hide an error.

    A NaN or infinity anywhere in ``y`` gives infinity.
    """
    if not y.isfinite().all():
        return float("inf")
    spread = (exact - exact.mean((0, 2, 3), keepdim=True)).norm()
    return float((y.double() - exact).norm() / spread)


@dataclass(frozen=True)
class Parity:
    """How far a result is from float64: :func:`relative_error` of logits, and the share of other labels."""

    error: float | None
    disagreement: float

    @staticmethod
    def of(y: Tensor, exact: Tensor) -> Parity:
        """Of logits (N, K, H, W), or of uint8 labels (N, H, W), whose error is None."""
        labels = y if y.dtype == torch.uint8 else labels_of(y)
        error = None if y.dtype == torch.uint8 else relative_error(y, exact)
        return Parity(error, float((labels != labels_of(exact)).double().mean()))


@dataclass(frozen=True)
class Bounds:
    """What parity allows, or ``factor`` times what eager torch itself errs, whichever is larger."""

    error: float
    disagreement: float
    factor: float

    def hold(self, result: Parity, eager: Parity) -> bool:
        assert eager.error is not None
        error = max(self.error, self.factor * eager.error)
        disagreement = max(self.disagreement, self.factor * eager.disagreement)
        return result.disagreement <= disagreement and (result.error or 0) <= error < inf
