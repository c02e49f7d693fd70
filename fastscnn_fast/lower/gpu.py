"""Packed weights: which pieces a layer has, where they lie, and how they are filled.

Matrices are (K, N) row-major, so that a program's loads are contiguous; K is padded to :func:`computed_channels`, N to
whole blocks of :func:`columns`, all with zeros: kernels load them without masks, and channels that exist
only in memory come out as zeros. Biases, depthwise weights and the stem's normalisation are float32. Those of int8
are :mod:`.gpu_int8`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..program.layers import Layer
from ..program.memory import Buffer, power_of_two, rounded_up
from . import gpu_int8

Plain = Mapping[str, Tensor]

_ALIGNMENT = 128  # bytes: a line of the memory
_MOST_COLUMNS = 128
CELLS = 16  # of the pooled grids that one program takes


def computed_channels(channels: int) -> int:
    """Channels that kernels compute: those and zeros to a multiple of 16; pixel_pitch() has as many or more."""
    return rounded_up(channels, 16)


def chunk(channels: int) -> int:
    """The most channels, a power of two up to 128, of which the padded channels are a multiple."""
    return min(computed_channels(channels) & -computed_channels(channels), 128)


def chunks(channels: int, most: int) -> tuple[int, ...]:
    """The padded channels in as few powers of two up to ``most``, at least 16, as there are, the largest first."""
    whole, rest = divmod(computed_channels(channels), most)
    return (most,) * whole + powers(rest)


def powers(count: int) -> tuple[int, ...]:
    """``count`` as a sum of powers of two, the largest first."""
    return tuple(1 << bit for bit in reversed(range(count.bit_length())) if count >> bit & 1)


def columns(channels: int) -> int:
    """Columns of a product that a program takes at a time."""
    return min(power_of_two(computed_channels(channels)), _MOST_COLUMNS)


def last_columns(classes: int) -> int:
    """Columns of dsconv's second product, all of which one program takes."""
    return power_of_two(computed_channels(classes))


def stem_terms(channels: int) -> int:
    return power_of_two(9 * channels)


def _matrix(k: int, n: int) -> tuple[int, int]:
    return (k, rounded_up(n, columns(n)))


def shapes(layer: Layer) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Shape of each piece, and whether it has the network's dtype (else float32)."""
    c, o, m = computed_channels(layer.in_channels), layer.out_channels, layer.mid_channels
    o_row = _matrix(0, o)[1]
    if layer.op == "stem_conv":
        return {
            "weight": (_matrix(stem_terms(layer.in_channels), o), True),
            "bias": ((o_row,), False),
            "scale": ((4,), False),
            "shift": ((4,), False),
        }
    if layer.op == "dsconv":
        pieces = {
            "depthwise_weight": ((9, c), False),
            "depthwise_bias": ((c,), False),
            "pointwise_weight": (_matrix(c, o), True),
            "pointwise_bias": ((o_row,), False),
        }
        if layer.last_channels:
            last = (o_row, last_columns(layer.last_channels))
            pieces |= {"last_weight": (last, True), "last_bias": (last[1:], False)}
        return pieces
    if layer.op == "inverted_residual":
        mid = rounded_up(m, 64)
        return {
            "expand_weight": ((c, mid), True),
            "expand_bias": ((mid,), False),
            "depthwise_weight": ((9, mid), False),
            "depthwise_bias": ((mid,), False),
            "project_weight": (_matrix(mid, o), True),
            "project_bias": ((o_row,), False),
        }
    if layer.op == "pyramid_pooling":
        branches, taps, mid = len(layer.bins), layer.kernel**2, power_of_two(computed_channels(m))
        return {
            "branch_weight": ((branches, c, mid), True),
            "branch_bias": ((branches, mid), False),
            "grid_weight": ((branches, taps, *_matrix(mid, o)), True),
            "out_weight": ((taps, *_matrix(c, o)), True),
            "out_bias": ((o_row,), False),
        }
    if layer.op == "feature_fusion":
        refine = (_matrix(c, layer.in_channels), True) if layer.dense else ((9, c), False)
        return {
            "refine_weight": refine,
            "refine_bias": ((refine[0][1],), False),
            "low_weight": (_matrix(c, o), True),
            "high_weight": (_matrix(computed_channels(m), o), True),
            "bias": ((o_row,), False),
        }
    return {}


def _shapes(layer: Layer, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each piece in a network of ``dtype``."""
    if dtype == torch.int8:
        return gpu_int8.shapes(layer)
    return {
        name: (shape, dtype if own else torch.float32)
        for name, (shape, own) in shapes(layer).items()
    }


def layout(
    layers: Sequence[Layer], dtype: torch.dtype, start: int
) -> tuple[list[dict[str, Buffer]], int]:
    """Per layer the pieces as buffers of the memory "weights" from byte ``start`` on, and the end."""
    result, at = [], rounded_up(start, _ALIGNMENT)
    for layer in layers:
        pieces = {}
        for name, (shape, kind) in _shapes(layer, dtype).items():
            pieces[name] = Buffer.dense("weights", kind, shape, at)
            at += rounded_up(pieces[name].bytes, _ALIGNMENT)
        result.append(pieces)
    return result, at


def _columns_of(weight: Tensor) -> Tensor:
    """(O, K) -> (K, O)."""
    return weight.transpose(-1, -2)


def plain_pieces(layer: Layer, w: Plain) -> dict[str, Tensor]:
    """What is to be written to the corner of each piece."""
    if layer.op == "stem_conv":
        return {
            "weight": w["weight"].permute(2, 3, 1, 0).flatten(0, 2),
            "bias": w["bias"],
            "scale": 1 / (255 * w["std"]),
            "shift": -w["mean"] / w["std"],
        }
    if layer.op == "dsconv":
        pieces = {
            "depthwise_weight": w["depthwise_weight"].flatten(1).T,
            "depthwise_bias": w["depthwise_bias"],
            "pointwise_weight": _columns_of(w["pointwise_weight"]),
            "pointwise_bias": w["pointwise_bias"],
        }
        if layer.last_channels:
            pieces |= {"last_weight": _columns_of(w["last_weight"]), "last_bias": w["last_bias"]}
        return pieces
    if layer.op == "inverted_residual":
        return {
            "expand_weight": _columns_of(w["expand_weight"]),
            "expand_bias": w["expand_bias"],
            "depthwise_weight": w["depthwise_weight"].flatten(1).T,
            "depthwise_bias": w["depthwise_bias"],
            "project_weight": _columns_of(w["project_weight"]),
            "project_bias": w["project_bias"],
        }
    if layer.op == "pyramid_pooling":
        c, o, m = layer.in_channels, layer.out_channels, layer.mid_channels
        taps = w["out_weight"].flatten(2).permute(2, 1, 0)  # (taps, K, O)
        grids = taps[:, c:].reshape(len(taps), len(layer.bins), m, o)
        return {
            "branch_weight": _columns_of(w["branch_weight"]),
            "branch_bias": w["branch_bias"],
            "grid_weight": grids.transpose(0, 1),
            "out_weight": taps[:, :c],
            "out_bias": w["out_bias"],
        }
    if layer.op == "feature_fusion":
        refine = w["refine_weight"]
        return {
            "refine_weight": _columns_of(refine) if layer.dense else refine.flatten(1).T,
            "refine_bias": w["refine_bias"],
            "low_weight": _columns_of(w["low_weight"]),
            "high_weight": _columns_of(w["high_weight"]),
            "bias": w["bias"],
        }
    return {}


def fill(
    memory: Tensor,
    pieces: Sequence[Mapping[str, Buffer]],
    layers: Sequence[Layer],
    plain: Sequence[Plain],
) -> None:
    """Writes the layers' weights to ``memory``, which holds zeros where the pieces lie."""
    for layer, buffers, tensors in zip(layers, pieces, plain, strict=True):
        whole = any(value.dtype == torch.int8 for value in tensors.values())
        made = (gpu_int8.pieces if whole else plain_pieces)(layer, tensors)
        for name, value in made.items():
            corner = buffers[name].view(memory)
            for dimension, size in enumerate(value.shape):
                corner = corner.narrow(dimension, 0, size)
            corner.copy_(value)


def unpacked(layer: Layer, pieces: Plain) -> dict[str, Tensor]:
    """The plain weights (``layer.weights()``, float32) of packed ``pieces``: undoes :func:`plain_pieces`."""
    shapes = layer.weights()
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    w = {}
    for name, corner in plain_pieces(layer, empty).items():
        value = pieces[name]
        for dimension, size in enumerate(corner.shape):
            value = value.narrow(dimension, 0, size)
        w[name] = value.float()
    if layer.op == "stem_conv":
        w["weight"] = w["weight"].T.unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
        w["std"] = 1 / (255 * w.pop("scale"))
        w["mean"] = -w.pop("shift") * w["std"]
    if layer.op == "pyramid_pooling":
        grids = w.pop("grid_weight").transpose(0, 1).flatten(1, 2)
        w["out_weight"] = torch.cat([w["out_weight"], grids], 1).permute(2, 1, 0)
        w["branch_weight"] = w["branch_weight"].transpose(-1, -2)
    elif layer.op != "stem_conv":  # matrices lie transposed, depthwise weights too
        w = {name: value.transpose(0, -1) for name, value in w.items()}
    return {name: w[name].reshape(shape) for name, shape in shapes.items()}
