"""Layers in int8: random weights, and running one on a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from fastscnn_fast import ops
from fastscnn_fast.program.layers import Layer


def random_integers(layer: Layer) -> dict[str, Tensor]:
    """All that a layer's tensors may hold, with multipliers that leave most values within 8 bits."""
    named = {}
    for name, (shape, dtype) in layer.quantised_weights().items():
        if dtype == torch.int8:
            value = torch.randint(-127, 128, shape)
        elif name.endswith("bias"):
            value = torch.randint(-(2**16), 2**16, shape)
        elif dtype == torch.int32:  # zero points and the pad
            value = torch.randint(256, shape)
        else:
            most = {"scale": 100.0, "shift": 255.0, "residual_multiplier": 2.0}.get(name, 1e-2)
            value = torch.rand(shape) * most
        named[name] = value.to(dtype)
    return named


def run_integers(
    layer: Layer, inputs: tuple[Tensor, ...], weights: dict[str, Tensor], backend: str
) -> Tensor:
    packed = ops.pack([layer], [weights], backend, torch.int8)
    rest = {"dtype": torch.int8} if layer.op == "stem_conv" else {}
    result: Tensor = getattr(ops, layer.op)(*inputs, packed, layer, backend=backend, **rest)
    return result
