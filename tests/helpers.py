"""What the tests share: how equality is measured, and networks whose every parameter matters."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def err(y: Tensor, ref64: Tensor) -> float:
    """``||y - ref64|| / ||ref64 - its mean per channel||``; channels are dimension 1.

    A constant offset cannot hide an error that way. Where a channel holds one value, its mean is left in.
    A result with NaN or infinity is infinitely wrong.
    """
    assert ref64.dtype == torch.float64, "the reference must be computed in float64"
    assert ref64.isfinite().all(), "the reference itself is not finite"
    assert y.shape == ref64.shape, f"shape {tuple(y.shape)}, expected {tuple(ref64.shape)}"
    if not y.isfinite().all():
        return float("inf")
    others = [d for d in range(ref64.ndim) if d != 1]
    one_value = ref64.numel() == ref64.shape[1]
    centred = ref64 if one_value else ref64 - ref64.mean(others, keepdim=True)
    difference, spread = (y.double() - ref64).norm().item(), centred.norm().item()
    if difference == 0:
        return 0.0
    return difference / spread if spread > 0 else float("inf")


def border(x: Tensor, width: int = 4) -> Tensor:
    """The outermost ``width`` rows and columns of (N, C, H, W) as (N, C, values)."""
    strips = (x[..., :width, :], x[..., -width:, :], x[..., :width], x[..., -width:])
    return torch.cat([strip.flatten(2) for strip in strips], dim=2)


def assert_parity(
    y: Tensor, own: Tensor, ref64: Tensor, factor: float = 2.0, floor: float = 1e-6
) -> None:
    """``y`` (N, C, H, W) errs at most ``factor`` times as much as torch's ``own`` result in that dtype.

    Both are measured against ``ref64``, over everything and over the border alone; errors up to
    ``floor`` pass in any case.
    """
    for where, part in (("everywhere", lambda x: x), ("on the border", border)):
        ours, torchs = err(part(y), part(ref64)), err(part(own), part(ref64))
        bound = max(factor * torchs, floor)
        assert ours <= bound < float("inf"), (
            f"error {where} {ours:.2e}, bound {bound:.2e}, torch's {torchs:.2e}"
        )


def randomise(model: nn.Module) -> nn.Module:
    """Gives every batch norm statistics and an affine of its own, so that folding cannot go unnoticed."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model
