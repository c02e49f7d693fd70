"""From a picture to the class of each of its pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..arch.config import SMALLEST_SIDE, Config
from ..data.pictures import Picture, read_picture, resized
from ..program.labels import labels_of
from .forked import serial
from .fused import FusedFastSCNN
from .model import FastSCNN


def segment(
    fast: FusedFastSCNN | FastSCNN,
    picture: Picture,
    size: tuple[int, int] | None = None,
    bits: int | None = None,
) -> NDArray[np.uint8]:
    """The class of every pixel of one picture, uint8 (H, W) at the picture's own size.

    A network of one class gives 1 where that is, and 0 for the background.

    Args:
        fast: the network; a :class:`FastSCNN` must be in eval mode and is fused at its first picture.
        picture: a path, a PIL image, or uint8 pixels (H, W) or (H, W, C), turned upright and brought to the
            network's channels as :func:`~fastscnn_fast.data.pictures.read_picture` says.
        size: (height, width) to run the network at, by default :func:`run_size`; the labels come back by
            nearest neighbour.
        bits: how many bits a channel a picture stored in more than 8 uses, by default a guess by
            :func:`~fastscnn_fast.data.pictures.read_picture`, which warns of it.

    Raises:
        ValueError: the picture cannot be read or has no pixels, ``size`` is below 32 a side, the model is in
            training mode or has more than 256 classes.
    """
    pixels = read_picture(picture, fast.config.in_channels, bits)
    if size is not None and min(size) < SMALLEST_SIDE:
        rule = f"size must be at least {SMALLEST_SIDE}x{SMALLEST_SIDE}"
        raise ValueError(f"{rule}, got {size[0]}x{size[1]}")
    return labelled(partial(_labels, fast), fast.config, pixels, size)


def labelled(
    labels: Callable[[Tensor], Tensor],
    config: Config,
    pixels: NDArray[np.uint8],
    size: tuple[int, int] | None = None,
) -> NDArray[np.uint8]:
    """``labels``, uint8 (1, C, h, w) -> (1, h, w), of pixels (H, W, C) as :func:`segment` has them."""
    x = torch.from_numpy(np.require(resized(pixels, size or run_size(pixels, config)), None, "W"))
    image = Image.fromarray(labels(x.permute(2, 0, 1)[None])[0].cpu().numpy())
    return np.array(image.resize(pixels.shape[1::-1], Image.Resampling.NEAREST))


def run_size(pixels: NDArray[np.uint8], config: Config) -> tuple[int, int]:
    """The (height, width) to run the network at for pixels (H, W, C).

    The picture's own size, or, where the config says at which ``size`` the weights were trained, as many
    pixels as that in the picture's own proportions; sides below 32 become 32.
    """
    height, width = pixels.shape[:2]
    scale = 1.0
    if config.size is not None:
        scale = math.sqrt(config.size[0] * config.size[1] / (height * width))
    return max(round(height * scale), SMALLEST_SIDE), max(round(width * scale), SMALLEST_SIDE)


@serial()
@torch.no_grad()
def _labels(fast: FusedFastSCNN | FastSCNN, x: Tensor) -> Tensor:
    """uint8 pixels (1, C, H, W) -> uint8 labels (1, H, W)."""
    if isinstance(fast, FusedFastSCNN):
        return fast.labels(x.to(fast.weights.device))
    if fast.training:
        raise ValueError("the model must be in eval mode (model.eval()), got one in training mode")
    if fast.config.num_classes > 256:
        raise ValueError(f"num_classes must be at most 256, got {fast.config.num_classes}")
    x = x.to(fast.classifier.conv.weight.device)
    fused = fast.fused_for(x)
    if fused is not None:
        return fused.labels(x)
    logits: Tensor = fast.reference(x)
    return labels_of(logits).to(torch.uint8)
