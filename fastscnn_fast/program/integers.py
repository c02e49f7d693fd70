"""Each fused op in int8: the specification that every kernel follows to the last bit.

Values have 8 bits (uint8) with one scale and one zero point a tensor: ``scale * (q - zero)`` is what q stands for.
Weights are int8 with one scale an output channel, from -127 to 127, sums are int32 and cannot overflow
(:func:`fastscnn_fast.lower.quantise.check_sums`). What lies between two sums is this and nothing else:

- **Requantising** (:func:`requantise`): ``q = clamp(rint(float(sum) * multiplier) + zero, 0, 255)``. The conversion and
  the product are rounded to the nearest IEEE single, ties to even, each by itself; rint rounds to the nearest integer, ties
  to even. A residual x is added before rint, ``float(sum) * multiplier + float(x - zero_of_x) * multiplier_of_x``: two
  products and a sum, each rounded by itself, never a fused multiply-add.
- **Activations** need nothing of their own: after ReLU the zero point is 0 and the clamp is the ReLU; after ReLU6 255 stands
  for at most 6.
- **Zero points of inputs** are in the biases, but where zeros surround an input: a depthwise convolution's input has the
  zero point 0 (an activation precedes it), pictures are padded with ``pad``, the pixel that is nearest to the normalised zero,
  and the concatenation that a 3x3 out-convolution reads with its parts' zero points.
- **Pictures** of floats become pixels first: ``rint(clamp(x * scale + shift, 0, 255))``, the product and the sum rounded by
  themselves, NaN as 0.
- **Means** of pooling: ``rint(float(sum) * (1 / float(count)))``, in the input's own scale and zero point.
- **Resizing** is in fixed point, first along y, then along x (:func:`sample`, :func:`resize`).
- **Multipliers** are 0 or normal numbers: kernels run with denormals flushed.
- **Several inputs** of a product (pyramid, fusion) keep their own scales: these are in the weights.
- **Logits** at 1/8 are ``float(sum) * multiplier``; their resize is that of float32.

All take and return (N, C, H, W) tensors; ``weights`` holds what ``layer.quantised_weights()`` names. The sums are
computed in float64, which holds them exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .layers import Layer
from .reference import Weights

#: Bits of a fraction between two positions, and those that a value has more than its 8 between the two directions.
FRACTION, GUARD = 15, 7


def requantise(sums: Tensor, multiplier: Tensor, zero: Tensor, add: Tensor | None = None) -> Tensor:
    """uint8 of integer sums (N, C, H, W); ``multiplier`` (C,) float32, ``add`` float32 of the sums' shape."""
    values = sums.float() * multiplier[:, None, None]
    if add is not None:
        values = values + add
    return (values.round() + zero).clamp(0, 255).to(torch.uint8)


def _sums(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1, padding: int = 0, dilation: int = 1
) -> Tensor:
    """Integer sums, in float64. A depthwise ``weight`` is (C, 3, 3), a pointwise one (O, C)."""
    groups = weight.shape[0] if weight.dim() == 3 else 1
    if weight.dim() == 3:
        weight = weight[:, None]
    elif weight.dim() == 2:
        weight = weight[:, :, None, None]
    return F.conv2d(x.double(), weight.double(), bias.double(), stride, padding, dilation, groups)


def _product(x: Tensor, weights: Weights, name: str) -> Tensor:
    """uint8 of the pointwise product of that name."""
    sums = _sums(x, weights[f"{name}_weight"], weights[f"{name}_bias"])
    return requantise(sums, weights[f"{name}_multiplier"], weights[f"{name}_zero"])


def _depthwise(x: Tensor, weights: Weights, name: str, stride: int, dilation: int) -> Tensor:
    sums = _sums(x, weights[f"{name}_weight"], weights[f"{name}_bias"], stride, dilation, dilation)
    return requantise(sums, weights[f"{name}_multiplier"], weights[f"{name}_zero"])


def pixels(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """uint8 pixels of a picture (N, C, H, W): itself, or normalised floats."""
    if x.dtype == torch.uint8:
        return x
    x = x.float() * scale[:, None, None] + shift[:, None, None]
    return x.nan_to_num(nan=0.0).clamp(0, 255).round().to(torch.uint8)


def stem_conv(x: Tensor, layer: Layer, weights: Weights) -> Tensor:
    """3x3 stride 2 of pixels, padded with ``pad``, to uint8."""
    x = pixels(x, weights["scale"], weights["shift"])
    if layer.padding:
        pad = weights["pad"][None, :, None, None].to(torch.uint8)
        padded = pad.expand(x.shape[0], -1, x.shape[2] + 2, x.shape[3] + 2).clone()
        padded[:, :, 1:-1, 1:-1] = x
        x = padded
    sums = _sums(x, weights["weight"], weights["bias"], layer.stride)
    return requantise(sums, weights["multiplier"], weights["zero"])


def dsconv(x: Tensor, layer: Layer, weights: Weights) -> Tensor:
    """Depthwise 3x3, pointwise, uint8 each; float32 of the following 1x1 where there is one."""
    y = _depthwise(x, weights, "depthwise", layer.stride, layer.dilation)
    y = _product(y, weights, "pointwise")
    if layer.last_channels:
        sums = _sums(y, weights["last_weight"], weights["last_bias"])
        return sums.float() * weights["last_multiplier"][:, None, None]
    return y


def inverted_residual(x: Tensor, layer: Layer, weights: Weights) -> Tensor:
    """Expand, depthwise, project [+ x], uint8 each."""
    y = _product(x, weights, "expand")
    y = _depthwise(y, weights, "depthwise", layer.stride, 1)
    sums = _sums(y, weights["project_weight"], weights["project_bias"])
    add = None
    if layer.residual:
        add = (x.int() - weights["input_zero"]).float() * weights["residual_multiplier"]
    return requantise(sums, weights["project_multiplier"], weights["project_zero"], add)


def pool(x: Tensor, bins: int) -> Tensor:
    """uint8 means of x over bins x bins cells, those of torch.nn.functional.adaptive_avg_pool2d."""
    height, width = x.shape[2:]
    cells = []
    for i in range(bins):
        rows = slice(i * height // bins, -(-(i + 1) * height // bins))
        for j in range(bins):
            cell = x[:, :, rows, j * width // bins : -(-(j + 1) * width // bins)]
            count = torch.tensor(float(cell.shape[2] * cell.shape[3]))
            sums = cell.sum((2, 3), dtype=torch.int64).float()
            cells.append((sums * (torch.tensor(1.0) / count)).round())
    return torch.stack(cells, 2).view(*x.shape[:2], bins, bins).to(torch.uint8)


def sample(i: int, size: int, result: int, align_corners: bool) -> tuple[int, int, int]:
    """Position i of ``result`` along ``size``: the two that it lies between, and the upper one's share, of 2**FRACTION.

    In exact integers what torch.nn.functional.interpolate does in floats; the share is rounded to nearest, halves up.
    """
    if align_corners:
        over, unit = i * (size - 1), max(result - 1, 1)
    else:
        over, unit = max((2 * i + 1) * size - result, 0), 2 * result
    low = min(over // unit, size - 1)
    rest = over - low * unit
    share = min(((rest << FRACTION) + unit // 2) // unit, 2**FRACTION - 1)
    return low, min(low + 1, size - 1), share


def resize(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """uint8 x (N, C, h, w) resized to ``size``: v + ((next - v) * share + 2**14 >> 15) of values of 7 bits more, twice."""
    values = x.int() << GUARD
    for axis in (2, 3):
        table = torch.tensor(
            [
                sample(i, x.shape[axis], size[axis - 2], align_corners)
                for i in range(size[axis - 2])
            ],
            device=x.device,
        )
        low, high = (values.index_select(axis, table[:, side]) for side in (0, 1))
        share = table[:, 2].int()[:, None] if axis == 2 else table[:, 2].int()
        values = low + (((high - low) * share + (1 << FRACTION - 1)) >> FRACTION)
    return ((values + (1 << GUARD - 1)) >> GUARD).to(torch.uint8)


def pyramid_pooling(x: Tensor, layer: Layer, weights: Weights) -> Tensor:
    """The out-convolution of x and its branches, pooled, multiplied and resized, uint8 each."""
    parts = [x]
    for index, bins in enumerate(layer.bins):
        sums = _sums(pool(x, bins), weights["branch_weight"][index], weights["branch_bias"][index])
        multiplier = weights["branch_multiplier"][index]
        grid = requantise(sums, multiplier, weights["branch_zero"][index])
        parts.append(resize(grid, x.shape[2:], layer.align_corners))
    y = torch.cat(parts, 1)
    if layer.kernel == 3:
        y = F.pad(y, (1, 1, 1, 1))
        outside = torch.ones_like(y[:, : x.shape[1]], dtype=torch.bool)
        outside[:, :, 1:-1, 1:-1] = False
        y[:, : x.shape[1]][outside] = weights["input_zero"].to(torch.uint8)
    sums = _sums(y, weights["out_weight"], weights["out_bias"])
    return requantise(sums, weights["out_multiplier"], weights["out_zero"])


def feature_fusion(high: Tensor, low: Tensor, layer: Layer, weights: Weights) -> Tensor:
    """The product of the refined low branch and the high one, uint8 as what is refined."""
    if layer.dense:  # the ReLU comes after the resize
        y = resize(_product(low, weights, "refine"), high.shape[2:], layer.align_corners)
        y = y.maximum(weights["refine_zero"].to(torch.uint8))
    else:
        y = resize(low, high.shape[2:], layer.align_corners)
        y = _depthwise(y, weights, "refine", 1, layer.dilation)
    both = torch.cat([weights["low_weight"], weights["high_weight"]], 1)
    sums = _sums(torch.cat([y, high], 1), both, weights["bias"])
    return requantise(sums, weights["multiplier"], weights["zero"])


OPS: dict[str, Callable[..., Tensor]] = {
    "stem_conv": stem_conv,
    "dsconv": dsconv,
    "inverted_residual": inverted_residual,
    "pyramid_pooling": pyramid_pooling,
    "feature_fusion": feature_fusion,
}
