"""dsconv: depthwise 3x3 + bias [+ act] -> 1x1 + bias + act [-> 1x1 + bias], the depthwise in registers only.

A program owns a tile of consecutive pixels with all their output channels, so that the depthwise result is
computed once: chunk by chunk of input channels it is summed over nine taps in registers and multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastscnn_fast.lower.gpu import chunk, columns, computed_channels, last_columns
from fastscnn_fast.program.layers import Layer
from fastscnn_fast.program.memory import Buffer, cdiv, wide

from .common import activate, cast, offset, product
from .launch import Launch, Tile


@triton.jit
def dsconv_kernel(
    x,
    depthwise_weight,
    depthwise_bias,
    pointwise_weight,
    pointwise_bias,
    last_weight,
    last_bias,
    out,
    height,
    width,
    out_height,
    out_width,
    tiles,
    x_image,
    out_image,
    out_pixel,
    out_channel,
    X_PITCH: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    LAST: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    MID_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_LAST: tl.constexpr,
):
    """x (H, W, X_PITCH) -> out (H', W', OUT or LAST) of image program // tiles."""
    image = tl.program_id(0) // tiles
    x += image.to(tl.int64) * x_image
    out += image.to(tl.int64) * out_image
    pixel = tl.program_id(0) % tiles * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    row = pixel // out_width
    column = pixel % out_width
    exists = row < out_height
    to = offset(row, column, out_width, out_pixel, WIDE)
    o = tl.arange(0, BLOCK_OUT)
    i = tl.arange(0, BLOCK_IN)
    if LAST > 0:
        last = tl.arange(0, BLOCK_LAST)
        result = tl.zeros((BLOCK_PIXELS, BLOCK_LAST), tl.float32) + tl.load(last_bias + last)
    for o0 in range(0, OUT, BLOCK_OUT):
        total = tl.zeros((BLOCK_PIXELS, BLOCK_OUT), tl.float32) + tl.load(pointwise_bias + o0 + o)
        for i0 in range(0, IN, BLOCK_IN):
            # Always true. But a sum of nothing but loads would be computed in the layout of the product's operand:
            # every tap through shared memory, and by two warps each.
            start = tl.where(i0 + i < IN, tl.load(depthwise_bias + i0 + i), 0.0)
            depthwise = tl.broadcast_to(start[None, :], (BLOCK_PIXELS, BLOCK_IN))
            for tap in tl.static_range(9):
                y = row * STRIDE + (tap // 3 - 1) * DILATION
                z = column * STRIDE + (tap % 3 - 1) * DILATION
                inside = exists & (y >= 0) & (y < height) & (z >= 0) & (z < width)
                at = x + offset(y, z, width, X_PITCH, WIDE)[:, None] + (i0 + i)
                value = tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)
                depthwise += value * tl.load(depthwise_weight + tap * IN + i0 + i)
            left = cast(activate(depthwise, MID_ACTIVATION), pointwise_weight, PRECISION)
            right = tl.load(
                pointwise_weight + (i0 + i)[:, None] * tl.cdiv(OUT, BLOCK_OUT) * BLOCK_OUT + o0 + o
            )
            total = product(left, right, total, PRECISION)
        total = activate(total, ACTIVATION)
        if LAST > 0:
            right = tl.load(last_weight + (o0 + o)[:, None] * BLOCK_LAST + last)
            result = product(cast(total, last_weight, PRECISION), right, result, PRECISION)
        else:
            tl.store(
                out + to[:, None] + o0 + o,
                cast(total, out, PRECISION),
                mask=exists[:, None] & (o0 + o < OUT),
            )
    if LAST > 0:
        tl.store(
            out + to[:, None] + last.to(to.dtype) * out_channel,
            cast(result, out, PRECISION),
            mask=exists[:, None] & (last < LAST),
        )


def launches(
    layer: Layer, x: Buffer, out: Buffer, weights: dict[str, Buffer], tile: Tile, precision: str
) -> list[Launch]:
    """x (N, H, W, C), out (N, H', W', O); out's channels may be planes (the network's logits are)."""
    images, height, width, _ = x.shape
    _, out_height, out_width, _ = out.shape
    tiles = cdiv(out_height * out_width, tile.pixels)
    last = layer.last_channels
    return [
        Launch(
            dsconv_kernel,
            (tiles * images,),
            {
                "x": x,
                "depthwise_weight": weights["depthwise_weight"],
                "depthwise_bias": weights["depthwise_bias"],
                "pointwise_weight": weights["pointwise_weight"],
                "pointwise_bias": weights["pointwise_bias"],
                "last_weight": weights.get("last_weight", weights["pointwise_weight"]),
                "last_bias": weights.get("last_bias", weights["pointwise_bias"]),
                "out": out,
                "height": height,
                "width": width,
                "out_height": out_height,
                "out_width": out_width,
                "tiles": tiles,
                "x_image": x.strides[0],
                "out_image": out.strides[0],
                "out_pixel": out.strides[2],
                "out_channel": out.strides[3],
                "X_PITCH": x.strides[2],
                "IN": computed_channels(layer.in_channels),
                "OUT": computed_channels(layer.out_channels),
                "LAST": computed_channels(last)
                if out.strides[2] >= computed_channels(last)
                else last,
                "STRIDE": layer.stride,
                "DILATION": layer.dilation,
                "MID_ACTIVATION": layer.mid_activation,
                "ACTIVATION": layer.activation,
                "PRECISION": precision,
                "WIDE": wide(x, out),
                "BLOCK_PIXELS": tile.pixels,
                "BLOCK_IN": min(chunk(layer.in_channels), tile.block),
                "BLOCK_OUT": columns(layer.out_channels),
                "BLOCK_LAST": last_columns(last) if last else 16,
            },
            tile.warps,
            tile.stages,
        )
    ]
