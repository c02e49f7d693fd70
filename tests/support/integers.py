"""Layers and networks in int8: random weights, running a layer on a backend, and ranges."""

from __future__ import annotations

import torch
from helpers import noise
from torch import Tensor

from fastscnn_fast import FastSCNN, ops
from fastscnn_fast.lower.fold import fold
from fastscnn_fast.program import reference
from fastscnn_fast.program.layers import Layer


def random_integers(layer: Layer) -> dict[str, Tensor]:
    """All that a layer's tensors may hold, with multipliers by which most results lie within 8 bits.

    A quarter of the multipliers are powers of two, so that results lie in the middle of two integers too.
    """
    named, terms = {}, 1
    for name, (shape, dtype) in layer.quantised_weights().items():
        if dtype == torch.int8:
            value = torch.randint(-127, 128, shape)
            if name != "high_weight":  # which is summed with low_weight's
                terms = 0
            terms += value[(0,) * (2 if name == "branch_weight" else 1)].numel()
        elif name.endswith("bias"):
            most = int(8000 * terms**0.5)
            value = torch.randint(-most, most, shape)
        elif name.endswith("multiplier") and name != "residual_multiplier":
            value = (1.5e-2 * torch.rand(shape) + 1e-5) / terms**0.5
            value = torch.where(torch.rand(shape) < 0.25, value.log2().round().exp2(), value)
        elif dtype == torch.int32:  # zero points and the pad
            value = torch.randint(256, shape)
        else:
            ends = {"scale": 100.0, "shift": 255.0, "residual_multiplier": 2.0}
            value = torch.rand(shape) * ends[name]
        named[name] = value.to(dtype)
    return named


def run_integers(
    layer: Layer, inputs: tuple[Tensor, ...], weights: dict[str, Tensor], backend: str
) -> Tensor:
    packed = ops.pack([layer], [weights], backend, torch.int8)
    rest = {"dtype": torch.int8} if layer.op == "stem_conv" else {}
    result: Tensor = getattr(ops, layer.op)(*inputs, packed, layer, backend=backend, **rest)
    return result


def with_ranges(model: FastSCNN, size: tuple[int, int] = (97, 131)) -> FastSCNN:
    """Those of noise, as min and max."""
    model.eval()
    folded = fold(model)
    plain = [{k: v.float() for k, v in named.items()} for named in folded.tensors]
    ranges: dict[str, tuple[float, float]] = {}

    def tap(name: str, value: Tensor) -> Tensor:
        ranges[name] = (float(value.min()), float(value.max()))
        return value

    x = noise(2, model.config.in_channels, *size)
    reference.network(x, folded.program, plain, tap=tap)
    model.ranges = ranges
    return model
