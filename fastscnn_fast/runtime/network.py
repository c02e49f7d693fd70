"""What runs: the network that somebody passed, its fused copy, and pixels as it takes them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ..arch.structure import unwrapped
from .forked import serial
from .fused import FusedFastSCNN
from .model import FastSCNN


def check_model(fast: nn.Module) -> FusedFastSCNN | FastSCNN:
    """The network in ``fast``, which may wrap it.

    Raises:
        TypeError: it is none.
    """
    fast = unwrapped(fast)
    if not isinstance(fast, (FusedFastSCNN, FastSCNN)):
        other = " (fastscnn_fast.accelerate takes other implementations)"
        raise TypeError(
            "fast, the first argument, must be a model: a fastscnn_fast.FastSCNN or its fused copy, got"
            f" {type(fast).__name__}{other if isinstance(fast, nn.Module) else ''}"
        )
    return fast


def fused_for(fast: FusedFastSCNN | FastSCNN, x: Tensor) -> tuple[FusedFastSCNN | None, Tensor]:
    """The fused network of ``fast``, None where plain torch must run, and x on its device."""
    if isinstance(fast, FusedFastSCNN):
        return fast, x.to(fast.weights.device)
    if fast.training:
        raise ValueError("the model must be in eval mode (model.eval()), got one in training mode")
    if fast.config.num_classes > 256:
        raise ValueError(f"num_classes must be at most 256, got {fast.config.num_classes}")
    x = x.to(fast.classifier.conv.weight.device)
    return fast.fused_for(x), x


@serial()
@torch.no_grad()
def logits(fast: FusedFastSCNN | FastSCNN, x: Tensor) -> Tensor:
    """The network's logits (N, K, h, w) of uint8 pixels (N, C, h, w), on its device."""
    fused, x = fused_for(fast, x)
    if fused is not None:
        return fused(x)
    assert isinstance(fast, FastSCNN)
    return fast.reference(x)


def as_input(pixels: NDArray[np.uint8], size: tuple[int, int]) -> Tensor:
    """Pixels (H, W, C) as the network takes them, (1, C, *size); a sixth of the time that Pillow takes."""
    # The batch comes first: so torch sees channels last, and resizes without taking them apart.
    x = torch.from_numpy(np.require(pixels, None, "W"))[None].permute(0, 3, 1, 2)
    if x.shape[2:] == size:
        return x
    return functional.interpolate(x, size=size, mode="bilinear", antialias=True)
