"""The ops in plain torch, from weights packed as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..lower.pack import TAG, arithmetic_of, flat, plain_weights, tag, unflat
from ..program import integers, reference
from ..program.arithmetic import Arithmetic, floats_of
from ..program.memory import picture
from ..program.program import Program, parsed
from ..program.reference import Weights


def _fill(
    function: Callable[..., Tensor], out: Tensor, weights: Tensor, text: str, dtype: torch.dtype
) -> None:
    """``function(program, tensors, ops)`` in the arithmetic of ``weights``, whatever surrounds the call."""
    program = parsed(text)
    arithmetic = arithmetic_of(weights, program, "reference", dtype)
    tensors = unflat(weights[TAG.size :], program.layers, arithmetic, arithmetic.dtype)
    ops = integers.OPS if arithmetic.quantised else reference.OPS
    with torch.autocast(out.device.type, enabled=False):
        out.copy_(function(program, tensors, ops))


class _Runner:
    def pack(self, program: Program, tensors: Sequence[Weights], arithmetic: Arithmetic) -> Tensor:
        plain = flat(plain_weights(program.layers, tensors, arithmetic, arithmetic.dtype))
        head = tag(program, "reference", arithmetic, TAG.size + plain.numel())
        return torch.cat([head, plain])

    def tuned(self, device: torch.device) -> None:
        """Nothing is tuned."""

    def stem_conv(
        self, out: Tensor, x: Tensor, weights: Tensor, layer: str, dtype: torch.dtype
    ) -> None:
        self._alone((picture(x, floats_of(dtype)),), out, weights, layer, dtype)

    def plane(self, op: str, out: Tensor, x: Tensor, weights: Tensor, layer: str) -> None:
        self._alone((x,), out, weights, layer, x.dtype)

    def feature_fusion(
        self, out: Tensor, high: Tensor, low: Tensor, weights: Tensor, layer: str
    ) -> None:
        self._alone((high, low), out, weights, layer, high.dtype)

    def _alone(
        self,
        inputs: tuple[Tensor, ...],
        out: Tensor,
        weights: Tensor,
        text: str,
        dtype: torch.dtype,
    ) -> None:
        def run(program: Program, tensors: Sequence[Weights], ops: Any) -> Tensor:
            return reference.run(program.layers[0], inputs, tensors[0], (), ops=ops)

        _fill(run, out, weights, text, dtype)

    def upsample_classify(
        self, out: Tensor, x: Tensor, weights: Tensor, layer: str, output: str
    ) -> None:
        _fill(
            lambda p, *_: reference.upsample_classify(x, p.layers[0], out.shape[-2:], output),
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
        x = picture(x, floats_of(dtype))

        def run(program: Program, tensors: Sequence[Weights], ops: Any) -> Tensor:
            return reference.network(x, program, tensors, output, ops=ops)

        _fill(run, out, weights, program, dtype)


RUNNERS = {"reference": _Runner()}
