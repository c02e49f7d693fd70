"""How far a result is from the truth."""

from __future__ import annotations

from torch import Tensor


def relative_error(y: Tensor, exact: Tensor) -> float:
    """``||y - exact|| / ||exact - its mean per channel||`` over (N, C, H, W): no offset can hide an error.

    A NaN or infinity anywhere in ``y`` gives infinity.
    """
    if not y.isfinite().all():
        return float("inf")
    spread = (exact - exact.mean((0, 2, 3), keepdim=True)).norm()
    return float((y.double() - exact).norm() / spread)
