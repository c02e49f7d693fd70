"""The ops in plain torch, from weights packed as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from ..lower.pack import TAG, arithmetic_of, flat, plain_weights, tag
from ..program import reference
from ..program.arithmetic import Arithmetic
from ..program.memory import picture
from ..program.program import Program, parsed
from ..program.reference import Weights


def _unpack(weights: Tensor, program: Program, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """The plain tensors, as views."""
    arithmetic_of(weights, program, "reference", dtype)
    plain = weights[TAG.size :].view(dtype)
    tensors, at = [], 0
    for layer in program.layers:
        named = {}
        for name, shape in layer.weights().items():
            named[name] = plain[at : at + prod(shape)].view(shape)
            at += prod(shape)
        tensors.append(named)
    return tensors


def _fill(
    function: Callable[..., Tensor], out: Tensor, weights: Tensor, text: str, dtype: torch.dtype
) -> None:
    """``function(program, tensors)`` in the dtype asked for, whatever surrounds the call."""
    program = parsed(text)
    tensors = _unpack(weights, program, dtype)
    with torch.autocast(out.device.type, enabled=False):
        out.copy_(function(program, tensors))


class _Runner:
    def pack(self, program: Program, tensors: Sequence[Weights], arithmetic: Arithmetic) -> Tensor:
        dtype = arithmetic.dtype
        plain = flat(plain_weights(program.layers, tensors, dtype), dtype)
        size = TAG.size + plain.numel() * plain.element_size()
        head = tag(program, "reference", arithmetic, size)
        return torch.cat([head, plain.view(torch.uint8)])

    def tuned(self, device: torch.device) -> None:
        """Nothing is tuned."""

    def stem_conv(
        self, out: Tensor, x: Tensor, weights: Tensor, layer: str, dtype: torch.dtype
    ) -> None:
        x = picture(x, dtype)
        _fill(lambda p, w: reference.stem_conv(x, p.layers[0], w[0]), out, weights, layer, dtype)

    def plane(self, op: str, out: Tensor, x: Tensor, weights: Tensor, layer: str) -> None:
        function = getattr(reference, op)
        _fill(lambda p, w: function(x, p.layers[0], w[0]), out, weights, layer, x.dtype)

    def feature_fusion(
        self, out: Tensor, high: Tensor, low: Tensor, weights: Tensor, layer: str
    ) -> None:
        _fill(
            lambda p, w: reference.feature_fusion(high, low, p.layers[0], w[0]),
            out,
            weights,
            layer,
            high.dtype,
        )

    def upsample_classify(
        self, out: Tensor, x: Tensor, weights: Tensor, layer: str, output: str
    ) -> None:
        _fill(
            lambda p, _: reference.upsample_classify(x, p.layers[0], out.shape[-2:], output),
            out,
            weights,
            layer,
            x.dtype,
        )

    def network(
        self,
        out: Tensor,
        x: Tensor,
        weights: Tensor,
        program: str,
        dtype: torch.dtype,
        output: str,
    ) -> None:
        x = picture(x, dtype)
        _fill(lambda p, w: reference.network(x, p, w, output), out, weights, program, dtype)


RUNNERS = {"reference": _Runner()}
