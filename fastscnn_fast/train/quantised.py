"""The forward that learns int8: what the integers compute, in floats, through which gradients pass."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from ..arch.network import AuxiliaryHead, Ranges, normalise
from ..lower.fold import folded_tensors
from ..lower.quantise import LEVELS, Value, fake_quantise, padding_pixels
from ..program import reference
from ..program.program import Program, fast_scnn
from ..program.reference import Weights
from ..runtime.model import FastSCNN
from .ops import auxiliary_head, dropped

#: Where the auxiliary heads read, and what the last convolution does.
_TAPS = {"downsample": "downsample.dsconv2.pointwise", "global": "pyramid.out"}
_LAST = "classifier.dsconv2.pointwise"


def round_value(x: Tensor, value: Value) -> Tensor:
    """``x`` as the nearest of the 256 levels of ``value``; what lies beyond them has no gradient."""
    levels = torch.fake_quantize_per_tensor_affine(x / value.scale, 1.0, value.zero, 0, LEVELS)
    return levels * value.scale


def low_logits(
    model: FastSCNN, pictures: Tensor, ranges: Ranges, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The logits before the resize to full size, the network's own, then the auxiliary heads', of raw pixels.

    Batch norms of the network itself are folded with the statistics that they have, which stay; weights, biases and
    all values of 8 bits are rounded where the integers are (:mod:`fastscnn_fast.program.integers`), by torch's
    fake-quantise ops. What comes out differs from the integers' results where a float lies beside the middle of two
    levels: by one level of that value. Resizes in fixed point err by up to 1/64 of a level more.

    Args:
        model: in training mode it drops out what it does.
        pictures: uint8 (N, C, H, W).
        ranges: of its values.
        dtype: that it computes in; tests use torch.float64.

    Returns:
        (N, K, h, w) each.
    """
    program = fast_scnn(model.config)
    named, values = fake_quantise(program, folded_tensors(model, program), ranges)
    weights = [{name: tensor.to(dtype) for name, tensor in layer.items()} for layer in named]
    seen: dict[str, Tensor] = {}

    def tap(name: str, value: Tensor) -> Tensor:
        value = round_value(value, values[name])
        seen.setdefault(name, value)  # it comes again where it was resized
        return dropped(model.classifier.dropout, value) if name == _LAST else value

    stem, *layers, _ = program.layers
    x = _padded(normalise(pictures, model.config, dtype), weights[0], stem.padding)
    small = Program((replace(stem, padding=0), *layers))
    logits = reference.network(x, small, weights[:-1], tap=tap)
    heads = [
        auxiliary_head(cast(AuxiliaryHead, head), seen[_TAPS[where]])
        for where, head in model.auxiliary.items()
    ]
    return [logits, *heads]


def _padded(x: Tensor, stem: Weights, padding: int) -> Tensor:
    """Normalised pictures within ``padding`` pixels of what surrounds them in integers."""
    outside = (padding_pixels(stem["mean"]) / LEVELS - stem["mean"]) / stem["std"]
    n, c, h, w = x.shape
    whole = outside[:, None, None].expand(n, c, h + 2 * padding, w + 2 * padding).clone()
    whole[:, :, padding : padding + h, padding : padding + w] = x
    return whole.contiguous(memory_format=torch.channels_last)
