"""How activations lie in memory: channels-last, each pixel a multiple of 64 bytes, the rest zeros."""

from __future__ import annotations

import torch
from torch import Tensor

LINE = 64  # bytes of which every pixel of an activation takes a multiple


def padded(channels: int, dtype: torch.dtype) -> int:
    """Channels that a pixel has in memory."""
    block = LINE // dtype.itemsize
    return -(-channels // block) * block


def activation(like: Tensor, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """An empty (N, channels, height, width) in channels-last memory with padded channels."""
    memory = like.new_empty((like.shape[0], height, width, padded(channels, dtype)), dtype=dtype)
    return memory.permute(0, 3, 1, 2)[:, :channels]


def dense(x: Tensor) -> Tensor:
    """x in channels-last memory with channels padded by zeros: itself where it already is so."""
    channels, memory = x.shape[1], x.permute(0, 2, 3, 1)
    padding = padded(channels, x.dtype) - channels
    if padding:
        memory = torch.nn.functional.pad(memory, (0, padding))
    return memory.contiguous().permute(0, 3, 1, 2)  # pad keeps what it takes for x's layout
