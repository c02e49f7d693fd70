"""Each fused op in plain torch: the specification that every kernel is checked against.

All take and return (N, C, H, W) tensors, in any floating dtype; ``weights`` holds the tensors that
``layer.weights()`` names, in the same dtype; those of products may have a convolution's four dimensions, and of branches
be a list. In float64 this is the ref64 of the parity tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arch.config import Activation
from .labels import labels_of, probabilities_of
from .layers import PICTURE, Layer
from .program import Program

Weights = Mapping[str, Tensor]
#: Sees each value that has 8 bits in int8, by its name in ``layer.values``, and again where it was resized; "input" is
#: the (low) input, pooled or resized. What it returns goes on in the value's place.
Tap = Callable[[str, Tensor], Tensor]


def untapped(name: str, value: Tensor) -> Tensor:
    """``value`` itself."""
    return value


def activate(x: Tensor, activation: Activation) -> Tensor:
    """x, max(x, 0) or min(max(x, 0), 6)."""
    if activation == "relu":
        return F.relu(x)
    return F.relu6(x) if activation == "relu6" else x


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight if weight.dim() == 4 else weight[:, :, None, None], bias)


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor, stride: int, dilation: int) -> Tensor:
    weight = weight if weight.dim() == 4 else weight[:, None]
    return F.conv2d(x, weight, bias, stride, dilation, dilation, groups=x.shape[1])


def _resize(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    return F.interpolate(x, list(size), mode="bilinear", align_corners=align_corners)


def stem_conv(x: Tensor, layer: Layer, weights: Weights, tap: Tap = untapped) -> Tensor:
    """3x3 stride 2 + bias + act; uint8 x is raw pixels, normalised (and only then padded with zeros)."""
    if x.dtype == torch.uint8:
        mean, std = (weights[name][:, None, None] for name in ("mean", "std"))
        x = (x.to(mean.dtype) / 255 - mean) / std
    y = F.conv2d(x, weights["weight"], weights["bias"], layer.stride, layer.padding)
    return tap("conv", activate(y, layer.activation))


def dsconv(x: Tensor, layer: Layer, weights: Weights, tap: Tap = untapped) -> Tensor:
    """Depthwise 3x3 + bias [+ act] -> pointwise + bias + act [-> 1x1 + bias]."""
    y = _depthwise(
        x, weights["depthwise_weight"], weights["depthwise_bias"], layer.stride, layer.dilation
    )
    y = tap("depthwise", activate(y, layer.mid_activation))
    y = _pointwise(y, weights["pointwise_weight"], weights["pointwise_bias"])
    y = tap("pointwise", activate(y, layer.activation))
    if layer.last_channels:
        y = _pointwise(y, weights["last_weight"], weights["last_bias"])
    return y


def inverted_residual(x: Tensor, layer: Layer, weights: Weights, tap: Tap = untapped) -> Tensor:
    """1x1 expand + act -> depthwise 3x3 + act -> 1x1 linear [+ x]."""
    y = _pointwise(x, weights["expand_weight"], weights["expand_bias"])
    y = tap("expand", activate(y, layer.activation))
    y = _depthwise(y, weights["depthwise_weight"], weights["depthwise_bias"], layer.stride, 1)
    y = tap("depthwise", activate(y, layer.activation))
    y = _pointwise(y, weights["project_weight"], weights["project_bias"])
    return tap("project", x + y if layer.residual else y)


def pyramid_pooling(
    x: Tensor,
    layer: Layer,
    weights: Weights,
    tap: Tap = untapped,
    pool: Callable[[Tensor, int], Tensor] = F.adaptive_avg_pool2d,
) -> Tensor:
    """out(concat [x, up(relu(branch_i(pool_i(x)))) ...]) with a 1x1 or 3x3 out-convolution + act."""
    parts = [x]
    branches = zip(layer.bins, weights["branch_weight"], weights["branch_bias"], strict=True)
    for index, (bins, weight, bias) in enumerate(branches):
        grid = _pointwise(tap("input", pool(x, bins)), weight, bias)
        grid = tap(f"branch{index}", F.relu(grid))
        grid = _resize(grid, x.shape[2:], layer.align_corners)
        parts.append(tap(f"branch{index}", grid))
    y = F.conv2d(
        torch.cat(parts, 1), weights["out_weight"], weights["out_bias"], padding=layer.kernel // 2
    )
    return tap("out", activate(y, layer.activation))


def feature_fusion(
    high: Tensor, low: Tensor, layer: Layer, weights: Weights, tap: Tap = untapped
) -> Tensor:
    """act(low_weight relu(refine(resize(low))) + high_weight high + bias)."""
    refine = weights["refine_weight"], weights["refine_bias"]
    if layer.dense:  # it commutes with the resize
        y = _resize(tap("refine", _pointwise(low, *refine)), high.shape[2:], layer.align_corners)
        y = F.relu(tap("refine", y))
    else:
        y = tap("input", _resize(low, high.shape[2:], layer.align_corners))
        y = tap("refine", F.relu(_depthwise(y, *refine, 1, layer.dilation)))
    y = _pointwise(y, weights["low_weight"], weights["bias"])
    y = activate(y + _pointwise(high, weights["high_weight"]), layer.activation)
    return tap("sum", y)


def upsample_classify(x: Tensor, layer: Layer, size: Sequence[int], output: str) -> Tensor:
    """Logits resized to ``size``: as they are, their probabilities, or uint8 labels (N, H, W)."""
    y = _resize(x, size, layer.align_corners)
    if output == "probabilities":
        return probabilities_of(y)
    return labels_of(y).to(torch.uint8) if output == "labels" else y


OPS: dict[str, Callable[..., Tensor]] = {
    "stem_conv": stem_conv,
    "dsconv": dsconv,
    "inverted_residual": inverted_residual,
    "pyramid_pooling": pyramid_pooling,
    "feature_fusion": feature_fusion,
}


def run(
    layer: Layer,
    inputs: Sequence[Tensor],
    weights: Weights,
    size: Sequence[int],
    output: str = "logits",
    ops: Mapping[str, Callable[..., Tensor]] = OPS,
    **more: Any,
) -> Tensor:
    """``layer``'s op on ``inputs``, feature_fusion's being (high, low).

    ``size`` and ``output`` count for upsample_classify only. ``ops`` are these, or those of
    integers.py; ``more`` is for them.
    """
    if layer.op == "upsample_classify":
        return upsample_classify(inputs[0], layer, size, output)
    return ops[layer.op](*inputs, layer, weights, **more)


_TF32 = RLock()


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether cuDNN's convolutions may round float32 to TF32."""
    where: Any = torch.backends.cudnn
    name = "allow_tf32"
    value: bool | str = allowed
    if hasattr(where, "conv"):  # torch 2.9 and later
        where, name, value = where.conv, "fp32_precision", "tf32" if allowed else "ieee"
    with _TF32:  # the setting is the process's
        before = getattr(where, name)
        if before == value:
            yield
            return
        setattr(where, name, value)
        try:
            yield
        finally:
            setattr(where, name, before)


def network(
    x: Tensor,
    program: Program,
    weights: Sequence[Weights],
    output: str = "logits",
    tap: Tap | None = None,
    ops: Mapping[str, Callable[..., Tensor]] = OPS,
) -> Tensor:
    """The whole of ``program`` on pictures x (N, C, H, W), along its edges; ``weights`` a layer.

    ``tap`` sees the values by the layer's name and their own, as in "bottleneck1.0.expand".
    """
    made: list[Tensor] = []
    for layer, tensors in zip(program.layers, weights, strict=True):
        inputs = [x if index == PICTURE else made[index] for index in layer.inputs]
        more = {}
        if tap is not None and layer.values:
            more["tap"] = partial(_named, tap, layer.name, program.value_read(layer))
        made.append(run(layer, inputs, tensors, x.shape[2:], output, ops, **more))
    return made[-1]


def _named(tap: Tap, layer: str, read: str, value: str, tensor: Tensor) -> Tensor:
    return tap(read if value == "input" else f"{layer}.{value}", tensor)
