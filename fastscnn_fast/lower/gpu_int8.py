"""Packed weights of int8 for GPUs: what :mod:`.gpu` says, but of program/integers.py's tensors.

Matrices are (N, K), as tensor cores take bytes; N is padded to whole blocks of :func:`columns`, K to :func:`terms`,
all with zeros, so that what lies beside an activation's channels does not matter. Tensor cores multiply signed bytes, so
kernels give them q - 128 of every activation, and the biases of products have 128 times the sum of their weights added:
the sums are what they were, and no part of one leaves 32 bits (quantise.check_sums). Depthwise weights are words of up
to four taps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..program.layers import Layer, Shape
from ..program.memory import power_of_two, rounded_up

Plain = Mapping[str, Tensor]
#: What is taken off an activation before tensor cores multiply it.
OFFSET = 128


def terms(channels: int) -> int:
    """Terms of a product: whole steps of tensor cores, and what a pixel of bytes has in memory."""
    return rounded_up(channels, 32)


def columns(channels: int) -> int:
    """Columns of a product that a program takes at a time, and then as terms of the next."""
    return min(power_of_two(terms(channels)), 128)


def chunk(channels: int) -> int:
    """The most terms, a power of two up to 128, of which all are a multiple."""
    return min(terms(channels) & -terms(channels), 128)


def last_columns(classes: int) -> int:
    """Columns of dsconv's second product, all of which one program takes."""
    return power_of_two(rounded_up(classes, 16))


def stem_terms(channels: int) -> int:
    return power_of_two(terms(9 * channels))


def branch_terms(channels: int) -> int:
    """Of the pyramid's branches, which one program takes whole."""
    return power_of_two(terms(channels))


def _padded(x: Tensor, *sizes: int) -> Tensor:
    """``x`` with zeros after its last dimensions, to ``sizes``."""
    last = x.shape[x.dim() - len(sizes) :]
    sides = [side for have, want in zip(last[::-1], sizes[::-1]) for side in (0, want - have)]
    return pad(x, sides)


def _rows(x: Tensor, channels: int) -> Tensor:
    """(..., O) padded as the rows of a matrix are."""
    return _padded(x, rounded_up(channels, columns(channels)))


def _matrix(weight: Tensor, k: int) -> Tensor:
    """(..., O, K) -> (..., N, k)."""
    o = weight.shape[-2]
    return _padded(weight, rounded_up(o, columns(o)), k)


def _bias(bias: Tensor, *weights: Tensor) -> Tensor:
    """(O,) for weights (O, K) whose factors have :data:`OFFSET` taken off."""
    moved = sum(weight.sum(-1, dtype=torch.int32) for weight in weights)
    return _rows(bias + OFFSET * moved, len(bias))


def _result(w: Plain, name: str, channels: int) -> dict[str, Tensor]:
    """What becomes of the sums of that name, "" or one that ends in "_"."""
    pieces = {f"{name}multiplier": _rows(w[f"{name}multiplier"], channels)}
    if f"{name}zero" in w:
        pieces[f"{name}zero"] = w[f"{name}zero"]
    return pieces


def _product(w: Plain, name: str) -> dict[str, Tensor]:
    weight = w[f"{name}_weight"]
    return {
        f"{name}_weight": _matrix(weight, terms(weight.shape[1])),
        f"{name}_bias": _bias(w[f"{name}_bias"], weight),
        **_result(w, f"{name}_", len(weight)),
    }


def _by_fours(x: Tensor) -> Tensor:
    """(C,) -> (4, C / 4): channel 4 i + k at (k, i)."""
    return _padded(x, terms(len(x))).view(-1, 4).T


def _depthwise(w: Plain, name: str) -> dict[str, Tensor]:
    """Of a kernel that has four channels in a word: (words of taps, k, i) of channel 4 i + k."""
    taps = _padded(w[f"{name}_weight"].flatten(1), terms(len(w[f"{name}_weight"])), 12)
    words = taps.view(-1, 4, 3, 4).permute(2, 1, 0, 3).contiguous().view(torch.int32)
    return {
        f"{name}_weight": words.flatten(2),
        f"{name}_bias": _by_fours(w[f"{name}_bias"]),
        f"{name}_multiplier": _by_fours(w[f"{name}_multiplier"]),
        f"{name}_zero": w[f"{name}_zero"],
    }


def pieces(layer: Layer, w: Plain) -> dict[str, Tensor]:
    """Each piece as it lies in memory, of what ``layer.quantised_weights()`` names."""
    if layer.op == "stem_conv":
        weight = w["weight"].permute(0, 2, 3, 1).flatten(1)
        channels = {name: _padded(w[name], 4) for name in ("pad", "scale", "shift")}
        return {
            "weight": _matrix(weight, stem_terms(layer.in_channels)),
            "bias": _bias(w["bias"], weight),
            **_result(w, "", len(weight)),
            **channels,
        }
    if layer.op == "dsconv":
        last = (
            _last(w["last_weight"], w["last_bias"], w["last_multiplier"])
            if layer.last_channels
            else {}
        )
        return _depthwise(w, "depthwise") | _product(w, "pointwise") | last
    if layer.op == "inverted_residual":
        return _inverted_residual(layer, w)
    if layer.op == "pyramid_pooling":
        return _pyramid(layer, w)
    if layer.op == "feature_fusion":
        low, high = w["low_weight"], w["high_weight"]
        return {
            **(_product if layer.dense else _depthwise)(w, "refine"),
            "low_weight": _matrix(low, terms(low.shape[1])),
            "high_weight": _matrix(high, terms(high.shape[1])),
            "bias": _bias(w["bias"], low, high),
            **_result(w, "", len(low)),
        }
    return {}


def _last(weight: Tensor, bias: Tensor, multiplier: Tensor) -> dict[str, Tensor]:
    """dsconv's second product, whose terms are the columns of its first."""
    (classes, o) = weight.shape
    n = last_columns(classes)
    moved = OFFSET * weight.sum(1, dtype=torch.int32)
    return {
        "last_weight": _padded(weight, n, rounded_up(o, columns(o))),
        "last_bias": _padded(bias + moved, n),
        "last_multiplier": _padded(multiplier, n),
    }


def _inverted_residual(layer: Layer, w: Plain) -> dict[str, Tensor]:
    """Expanded channels are padded to a multiple of 64; a word is a row of taps."""
    mid = rounded_up(layer.mid_channels, 64)
    taps = _padded(w["depthwise_weight"], mid, 3, 4).permute(1, 0, 2).contiguous()
    expand, project = w["expand_weight"], w["project_weight"]
    return {
        "expand_weight": _padded(expand, mid, terms(layer.in_channels)),
        "expand_bias": _padded(_bias(w["expand_bias"], expand)[: len(expand)], mid),
        "expand_multiplier": _padded(w["expand_multiplier"], mid),
        "expand_zero": w["expand_zero"],
        "depthwise_weight": taps.view(torch.int32).flatten(1),
        "depthwise_bias": _padded(w["depthwise_bias"], mid),
        "depthwise_multiplier": _padded(w["depthwise_multiplier"], mid),
        "depthwise_zero": w["depthwise_zero"],
        "project_weight": _matrix(project, mid),
        "project_bias": _bias(w["project_bias"], project),
        **_result(w, "project_", len(project)),
        "input_zero": w["input_zero"],
        "residual_multiplier": w["residual_multiplier"],
    }


def _pyramid(layer: Layer, w: Plain) -> dict[str, Tensor]:
    """The out-convolution's weights by tap: those of x, and those of the branches side by side."""
    c, m, branches = layer.in_channels, layer.mid_channels, len(layer.bins)
    mid, weight = branch_terms(m), w["branch_weight"]
    moved = OFFSET * weight.sum(-1, dtype=torch.int32)
    taps = w["out_weight"].flatten(2).permute(2, 0, 1)  # (taps, O, K)
    grids = _padded(taps[..., c:].unflatten(2, (branches, m)), mid).flatten(2)
    return {
        "branch_weight": _padded(weight, mid, terms(c)),
        "branch_bias": _padded(w["branch_bias"] + moved, mid),
        "branch_multiplier": _padded(w["branch_multiplier"], mid),
        "branch_zero": w["branch_zero"],
        "grid_weight": _matrix(grids, grids.shape[2]),
        "out_weight": _matrix(taps[..., :c], terms(c)),
        "out_bias": _bias(w["out_bias"], w["out_weight"].flatten(1)),
        **_result(w, "out_", layer.out_channels),
        "input_zero": w["input_zero"],
    }


def shapes(layer: Layer) -> dict[str, tuple[Shape, torch.dtype]]:
    """Shape and dtype of each piece."""
    named = {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for name, (shape, dtype) in layer.quantised_weights().items()
    }
    return {name: (tuple(x.shape), x.dtype) for name, x in pieces(layer, named).items()}
