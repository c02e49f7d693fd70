"""Layers in int8 on GPUs: run as the other arithmetics' are, in poisoned memory, and compared with the specification."""

from __future__ import annotations

import torch
from cases import Size, quarter
from helpers import run_poisoned
from integers import random_integers, run_integers
from targets import Target
from torch import Tensor

from fastscnn_fast import ops
from fastscnn_fast.kernels.launch import Tile
from fastscnn_fast.program.layers import Layer


def pixels(batch: int, channels: int, size: Size) -> Tensor:
    return torch.randint(256, (batch, channels, *size), dtype=torch.uint8)


def inputs_of(layer: Layer, size: Size, batch: int = 2) -> tuple[Tensor, ...]:
    sizes = (size, quarter(size))
    return tuple(pixels(batch, c, s) for c, s in zip(layer.input_channels, sizes))


def run(
    layer: Layer, inputs: tuple[Tensor, ...], weights: dict[str, Tensor], target: Target
) -> Tensor:
    packed = ops.pack([layer], [weights], target.backend, torch.int8).to(target.device)
    rest = (torch.int8,) if layer.op == "stem_conv" else ()
    placed = tuple(x.to(target.device) for x in inputs)
    arguments = (*placed, packed, ops.encode([layer]), *rest)
    return run_poisoned(layer.op, *arguments, backend=target.backend).cpu()


def specified(layer: Layer, inputs: tuple[Tensor, ...], weights: dict[str, Tensor]) -> Tensor:
    return run_integers(layer, inputs, weights, "reference")


def check(layer: Layer, inputs: tuple[Tensor, ...], target: Target) -> None:
    weights = random_integers(layer)
    y, exact = run(layer, inputs, weights, target), specified(layer, inputs, weights)
    assert y.dtype == exact.dtype == (torch.float32 if layer.last_channels else torch.uint8)
    assert torch.equal(y, exact), (layer, [tuple(x.shape) for x in inputs])


def shared(slices: int) -> Tile:
    """Small blocks whose expanded channels so many programs share."""
    return Tile(16, block=32, columns=2, slices=slices)
