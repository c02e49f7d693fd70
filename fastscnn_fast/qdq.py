"""A network in the arithmetic of int8 as plain torch that ONNX can hold: QuantizeLinear and DequantizeLinear around each product."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .lower.fold import fold
from .lower.quantise import LEVELS, fake_quantise, quantise
from .program import reference
from .runtime.model import FastSCNN


@torch.library.custom_op("fastscnn_fast::eight_bits", mutates_args=())
def eight_bits(x: Tensor, scale: float, zero: int) -> Tensor:
    """The nearest of the 256 levels ``scale * (q - zero)``."""
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, LEVELS)


@eight_bits.register_fake
def _(x: Tensor, scale: float, zero: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fastscnn_fast::dequantise", mutates_args=())
def dequantise(integers: Tensor, scale: Tensor) -> Tensor:
    """``integers`` (O, ...), int8, times ``scale`` (O,), float32: a weight."""
    return integers * scale.view(-1, *[1] * (integers.dim() - 1))


@dequantise.register_fake
def _(integers: Tensor, scale: Tensor) -> Tensor:
    return integers.new_empty(integers.shape, dtype=scale.dtype)


def translations() -> dict[Any, Callable[..., Any]]:
    """How torch's exporter is to write the ops of :class:`Quantised`."""
    import onnxscript

    op: Any = onnxscript.opset18

    def value(x: Any, scale: float, zero: int) -> Any:
        to = op.Constant(value_float=scale), op.Cast(op.Constant(value_int=zero), to=2)  # uint8
        return op.DequantizeLinear(op.QuantizeLinear(x, *to), *to)

    def weight(integers: Any, scale: Any) -> Any:
        return op.DequantizeLinear(integers, scale, axis=0)

    return {
        torch.ops.fastscnn_fast.eight_bits.default: value,
        torch.ops.fastscnn_fast.dequantise.default: weight,
    }


class Quantised(nn.Module):
    """(N, C, H, W) normalised floats -> logits (N, K, H, W), rounded where int8 rounds.

    Args:
        model: with ranges; a copy of its weights is taken.
        pool: adaptive average pooling of (N, C, H, W) to so many bins.

    Raises:
        Unfusable: it has no ranges, or none that fit.
    """

    def __init__(self, model: FastSCNN, pool: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        folded = fold(model)
        exact = quantise(folded)
        floats, values = fake_quantise(folded.program, folded.tensors, folded.ranges or {})
        self.program = folded.program
        self.values = {name: (value.scale, value.zero) for name, value in values.items()}
        self.ops: dict[str, Callable[..., Tensor]] = {
            **reference.OPS,
            "pyramid_pooling": partial(reference.pyramid_pooling, pool=pool),
        }
        self.names: list[dict[str, list[str]]] = []  # per layer and weight the buffers that hold it
        for index, (integers, named) in enumerate(zip(exact, floats)):
            self.names.append({})
            for name, weight in named.items():
                parts = [(f"{index}_{name}", integers.get(name), weight.cpu())]
                if name.startswith("branch_"):  # one a branch
                    parts = [
                        (f"{index}_{name}{branch}", integers[name][branch], part)
                        for branch, part in enumerate(weight.cpu())
                    ]
                for part in parts:
                    self._keep(*part)
                self.names[-1][name] = [whole for whole, *_ in parts]

    def _keep(self, name: str, integers: Tensor | None, weight: Tensor) -> None:
        """As integers and a scale an output channel where it is of one, else as floats: inputs may have several scales."""
        if weight.dim() > 1:
            weight = _of_convolution(weight)
        if integers is not None and integers.dtype == torch.int8:
            integers = integers.view(weight.shape)
            rows, whole = integers.flatten(1).double(), weight.flatten(1)
            scale = whole.abs().amax(1) / rows.abs().amax(1).clamp(min=1)
            if torch.allclose(rows * scale[:, None], whole, rtol=1e-6, atol=0):
                self.register_buffer(f"{name}_integers", integers.clone())
                self.register_buffer(f"{name}_scale", scale.float())
                return
        self.register_buffer(name, weight.float())

    def _weight(self, name: str) -> Tensor:
        if name in self._buffers:
            weight: Tensor = getattr(self, name)
            return weight
        made: Tensor = dequantise(getattr(self, f"{name}_integers"), getattr(self, f"{name}_scale"))
        return made

    def forward(self, x: Tensor) -> Tensor:
        def tap(name: str, value: Tensor) -> Tensor:
            made: Tensor = eight_bits(value, *self.values[name])
            return made

        weights: list[dict[str, Any]] = []
        for layer in self.names:
            found = {name: list(map(self._weight, parts)) for name, parts in layer.items()}
            weights.append({k: v if k.startswith("branch_") else v[0] for k, v in found.items()})
        return reference.network(x, self.program, weights, tap=tap, ops=self.ops)


def _of_convolution(weight: Tensor) -> Tensor:
    """A pointwise (O, C) or depthwise (C, 3, 3) weight with four dimensions; others as they are."""
    if weight.dim() == 2:
        return weight[:, :, None, None]
    return weight[:, None] if weight.dim() == 3 else weight
