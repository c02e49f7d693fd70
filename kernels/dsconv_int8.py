"""dsconv in int8: depthwise 3x3 -> 1x1 [-> 1x1 to floats]; and feature_fusion's depthwise, whose 1x1 has a second input.

A program owns a tile of consecutive pixels with all their output channels. The depthwise takes four channels of a
pixel as one word: nine words are turned into words of four taps a channel, which are one instruction's factors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastscnn_fast.lower.gpu_int8 import chunk, columns, last_columns, terms
from fastscnn_fast.program.layers import Layer
from fastscnn_fast.program.memory import Buffer, cdiv, wide

from .common import lies_in, offset
from .integers import add_dot4, by_channel, factor, multiply, rounded, side_by_side, signed
from .launch import Launch, Tile


@triton.jit
def dsconv_int8_kernel(
    x,
    high,
    depthwise_weight,
    depthwise_bias,
    depthwise_multiplier,
    depthwise_zero,
    pointwise_weight,
    high_weight,
    pointwise_bias,
    pointwise_multiplier,
    pointwise_zero,
    last_weight,
    last_bias,
    last_multiplier,
    out,
    height,
    width,
    out_height,
    out_width,
    tiles,
    x_image,
    high_image,
    out_image,
    out_pixel,
    out_channel,
    X_PITCH: tl.constexpr,
    HIGH_PITCH: tl.constexpr,
    IN: tl.constexpr,
    MID: tl.constexpr,
    OUT: tl.constexpr,
    LAST: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_MID: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_LAST: tl.constexpr,
):
    """x (H, W, X_PITCH) [, high (H', W', HIGH_PITCH)] -> out (H', W', OUT or LAST) of image program // tiles."""
    image = tl.program_id(0) // tiles
    x += image.to(tl.int64) * x_image
    high += image.to(tl.int64) * high_image
    out += image.to(tl.int64) * out_image
    x = x.to(tl.pointer_type(tl.uint32), bitcast=True)
    pixel = tl.program_id(0) % tiles * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    row = pixel // out_width
    column = pixel % out_width
    exists = row < out_height
    to = offset(row, column, out_width, out_pixel, WIDE)
    o = tl.arange(0, BLOCK_OUT)
    i = tl.arange(0, BLOCK_IN)
    fours = tl.arange(0, BLOCK_IN // 4)
    OUT_ROWS: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT * BLOCK_OUT
    middle_zero = tl.load(depthwise_zero)
    own_zero = tl.load(pointwise_zero)
    if LAST > 0:
        last = tl.arange(0, BLOCK_LAST)
        result = tl.broadcast_to(tl.load(last_bias + last)[None, :], (BLOCK_PIXELS, BLOCK_LAST))
    for o0 in range(0, OUT, BLOCK_OUT):
        bias = tl.load(pointwise_bias + o0 + o)[None, :]
        total = tl.broadcast_to(bias, (BLOCK_PIXELS, BLOCK_OUT))
        for i0 in range(0, IN, BLOCK_IN):
            words = ()
            for tap in tl.static_range(9):
                y = row * STRIDE + (tap // 3 - 1) * DILATION
                z = column * STRIDE + (tap % 3 - 1) * DILATION
                inside = (exists & lies_in(y, height)) & lies_in(z, width)
                at = x + offset(y, z, width, X_PITCH // 4, WIDE)[:, None] + (i0 // 4 + fours)
                words = words + (tl.load(at, mask=inside[:, None], other=0),)  # noqa: RUF005
            first = by_channel(words[0], words[1], words[2], words[3], PRECISION)
            second = by_channel(words[4], words[5], words[6], words[7], PRECISION)
            parts = ()
            for k in tl.static_range(4):
                c = k * (IN // 4) + i0 // 4 + fours
                sums = tl.load(depthwise_bias + c)[None, :]
                sums = tl.broadcast_to(sums, (BLOCK_PIXELS, BLOCK_IN // 4))
                taps = tl.load(depthwise_weight + c)[None, :]
                sums = add_dot4(first[k], taps, sums, PRECISION)
                taps = tl.load(depthwise_weight + IN + c)[None, :]
                sums = add_dot4(second[k], taps, sums, PRECISION)
                taps = tl.load(depthwise_weight + 2 * IN + c)[None, :]
                sums = add_dot4(words[8], taps << (8 * k), sums, PRECISION)
                value = sums.to(tl.float32) * tl.load(depthwise_multiplier + c)[None, :]
                parts = parts + (value,)  # noqa: RUF005
            left = factor(side_by_side(parts, 4), middle_zero, PRECISION)
            right = tl.load(pointwise_weight + (o0 + o)[None, :] * IN + (i0 + i)[:, None])
            total = multiply(left, right, total, PRECISION)
        for m0 in range(0, MID, BLOCK_MID):
            m = m0 + tl.arange(0, BLOCK_MID)
            at = high + offset(row, column, out_width, HIGH_PITCH, WIDE)[:, None] + m
            left = signed(tl.load(at, mask=exists[:, None], other=0), PRECISION)
            right = tl.load(high_weight + (o0 + o)[None, :] * MID + m[:, None])
            total = multiply(left, right, total, PRECISION)
        value = total.to(tl.float32) * tl.load(pointwise_multiplier + o0 + o)
        if LAST > 0:
            left = factor(value, own_zero, PRECISION)
            right = tl.load(last_weight + last[None, :] * OUT_ROWS + (o0 + o)[:, None])
            result = multiply(left, right, result, PRECISION)
        else:
            mask = exists[:, None] & (o0 + o < OUT)
            tl.store(out + to[:, None] + o0 + o, rounded(value, own_zero, PRECISION), mask=mask)
    if LAST > 0:
        tl.store(
            out + to[:, None] + last.to(to.dtype) * out_channel,
            result.to(tl.float32) * tl.load(last_multiplier + last),
            mask=exists[:, None] & (last < LAST),
        )


def launch(
    layer: Layer,
    x: Buffer,
    out: Buffer,
    weights: dict[str, Buffer],
    channels: tuple[int, int],
    tile: Tile,
    precision: str,
    high: Buffer | None = None,
) -> Launch:
    """x (N, H, W, C), high (N, H', W', M) -> out (N, H', W', O); ``weights`` by the kernel's names, ``channels`` (C, O)."""
    images, height, width, _ = x.shape
    _, out_height, out_width, _ = out.shape
    tiles = cdiv(out_height * out_width, tile.pixels)
    last, (c, o) = layer.last_channels, channels
    absent = weights["pointwise_weight"]
    second = high or x
    return Launch(
        dsconv_int8_kernel,
        (tiles * images,),
        {
            "x": x,
            "high": second,
            **dict.fromkeys(("last_weight", "last_bias", "last_multiplier"), absent),
            "high_weight": absent,
            **weights,
            "out": out,
            "height": height,
            "width": width,
            "out_height": out_height,
            "out_width": out_width,
            "tiles": tiles,
            "x_image": x.strides[0],
            "high_image": second.strides[0],
            "out_image": out.strides[0],
            "out_pixel": out.strides[2],
            "out_channel": out.strides[3],
            "X_PITCH": x.strides[2],
            "HIGH_PITCH": second.strides[2],
            "IN": terms(c),
            "MID": terms(high.shape[3]) if high else 0,
            "OUT": terms(o),
            "LAST": min(last_columns(last), out.strides[2])
            if last and out.strides[3] == 1
            else last,
            "STRIDE": layer.stride,
            "DILATION": layer.dilation,
            "PRECISION": precision,
            "WIDE": wide(x, out, second),
            "BLOCK_PIXELS": tile.pixels,
            "BLOCK_IN": min(chunk(c), max(tile.block, 32)),
            "BLOCK_MID": chunk(second.shape[3]),
            "BLOCK_OUT": columns(o),
            "BLOCK_LAST": last_columns(last) if last else 16,
        },
        tile.warps,
        tile.stages,
        fused=False,
    )


def launches(
    layer: Layer, x: Buffer, out: Buffer, weights: dict[str, Buffer], tile: Tile, precision: str
) -> list[Launch]:
    """x (N, H, W, C), out (N, H', W', O); out's channels may be planes (the network's logits are)."""
    channels = (layer.in_channels, layer.out_channels)
    return [launch(layer, x, out, weights, channels, tile, precision)]
