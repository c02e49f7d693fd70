"""A network in every form that the CPU's tests compare: plain, in float64, fused, and as the chain of its ops."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from helpers import assert_labels, noise, run_poisoned, threads
from torch import Tensor

from fastscnn_fast import ops
from fastscnn_fast.backends import registry
from fastscnn_fast.lower.fold import fold
from fastscnn_fast.program import arithmetic
from fastscnn_fast.program.layers import PICTURE, Layer
from fastscnn_fast.runtime.fused import FusedFastSCNN
from fastscnn_fast.runtime.model import FastSCNN


@dataclass(frozen=True)
class Network:
    """A network in plain torch, in float64, and fused; ``reference`` is torch's own in the same dtype."""

    model: FastSCNN
    model64: FastSCNN
    own: FastSCNN
    fast: FusedFastSCNN

    @staticmethod
    def of(model: FastSCNN, arithmetic: str = "float32") -> Network:
        dtype, precision = registry.CPU_ARITHMETICS[arithmetic].asked
        own, model64 = copy.deepcopy(model).to(dtype), copy.deepcopy(model).double()
        return Network(model, model64, own, fused(model, dtype, precision))

    @cached_property
    def layers(self) -> list[tuple[Layer, Tensor]]:
        """Each with its own packed weights."""
        folded = fold(self.model)
        dtype, precision = self.fast.dtype, self.fast.precision
        program = folded.program.computed_in(arithmetic.choose("cpu", dtype, precision))
        return [
            (layer, ops.pack([layer], [tensors], "cpu", dtype, precision))
            for layer, tensors in zip(program.layers, folded.tensors)
        ]

    @property
    def arithmetic(self) -> str:
        return arithmetic.choose("cpu", self.fast.dtype, self.fast.precision).name

    def run(self, x: Tensor, output: str = "logits") -> Tensor:
        """The fused result, poisoned."""
        fast = self.fast
        return run_poisoned("network", x, fast.weights, fast.program, fast.dtype, output)

    def noise(self, batch: int, height: int, width: int) -> Tensor:
        return noise(batch, self.model.config.in_channels, height, width).to(self.fast.dtype)

    @torch.no_grad()
    def reference64(self, x: Tensor) -> Tensor:
        with threads(1):
            return self.model64.reference(x if x.dtype == torch.uint8 else x.double())

    @torch.no_grad()
    def reference(self, x: Tensor) -> Tensor:
        with threads(1):
            return self.own.reference(x)


def fused(model: FastSCNN, dtype: torch.dtype, precision: str) -> FusedFastSCNN:
    """For the cpu backend, on whatever instruction set is forced."""
    return FusedFastSCNN(fold(model), "cpu", dtype, precision)


def chain(net: Network, x: Tensor) -> tuple[Tensor, Callable[[str], Tensor]]:
    """The network as separate ops, each with its own packed weights: the small logits, and what becomes of them."""
    size, made = (x.shape[2], x.shape[3]), []
    *layers, (last, last_packed) = net.layers
    for layer, packed in layers:
        inputs = [x if at == PICTURE else made[at] for at in layer.inputs]
        if layer.op == "stem_conv":
            made.append(ops.stem_conv(*inputs, packed, layer, dtype=net.fast.dtype))
        else:
            made.append(getattr(ops, layer.op)(*inputs, packed, layer))
    return made[-1], lambda output: ops.upsample_classify(made[-1], last_packed, last, size, output)


def assert_chain(net: Network, x: Tensor, outputs: Sequence[str] = ops.OUTPUTS) -> None:
    """The network is its ops, bit for bit, but for the small logits, which stay float32 inside it.

    In bfloat16 the op rounds these by 2^-8 of themselves, and both results are rounded once more. A
    probability follows by at most half of what the logits move.
    """
    small, expected = chain(net, x)
    moved = 2**-8 * small.abs().max().item()
    for output in outputs:
        y = net.run(x, output)
        if net.fast.dtype != torch.bfloat16:
            assert torch.equal(y, expected(output)), output
        elif output == "labels":
            assert_labels(y, expected("logits").double(), 4.1 * moved)
        else:
            largest = 3 * moved if output == "logits" else moved / 2 + 2 * 2**-8
            assert ((y.double() - expected(output).double()).abs() <= largest).all(), output
