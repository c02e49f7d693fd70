"""stem_conv in int8: 3x3 stride 2 of pixels, from raw uint8 ones or floats of any strides, padded with ``pad``."""

from __future__ import annotations

import triton
import triton.language as tl

from fastscnn_fast.lower.gpu_int8 import columns, stem_terms, terms
from fastscnn_fast.program.layers import Layer
from fastscnn_fast.program.memory import Buffer, cdiv, wide

from .common import offset
from .integers import multiply, rounded, signed
from .launch import Launch, Tile


@triton.jit
def pixels_of(value, scale, shift, channel, RAW: tl.constexpr, PRECISION: tl.constexpr):
    """(terms, pixels) of a picture as bytes: themselves, or of normalised floats."""
    if not RAW:
        value = value * tl.load(scale + channel)[:, None] + tl.load(shift + channel)[:, None]
        value = tl.where(value == value, value, 0.0)
        value = rounded(value, 0, PRECISION)
    return value


@triton.jit
def stem_conv_int8_kernel(
    x,
    weight,
    bias,
    multiplier,
    zero,
    pad,
    scale,
    shift,
    out,
    height,
    width,
    out_height,
    out_width,
    tiles,
    x_image,
    x_channel,
    x_row,
    x_column,
    out_image,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    OUT_PITCH: tl.constexpr,
    PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    RAW: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """x (C, H, W), any strides -> out (H', W', OUT_PITCH) of image program // tiles."""
    image = tl.program_id(0) // tiles
    x += image.to(tl.int64) * x_image
    out += image.to(tl.int64) * out_image
    first = tl.program_id(0) % tiles * BLOCK_PIXELS
    pixel = first + tl.arange(0, BLOCK_PIXELS)
    row = pixel // out_width
    column = pixel % out_width
    exists = row < out_height
    term = tl.arange(0, TERMS)  # (ky, kx, c)
    channel = term % CHANNELS
    dy = term // (3 * CHANNELS) - PADDING
    dz = term // CHANNELS % 3 - PADDING
    if WIDE:
        y = row.to(tl.int64) * 2
        z = column.to(tl.int64) * 2
        from_pixel = channel.to(tl.int64) * x_channel + dy.to(tl.int64) * x_row
        from_pixel += dz.to(tl.int64) * x_column
    else:
        y = row * 2
        z = column * 2
        from_pixel = channel * x_channel + dy * x_row + dz * x_column
    at = (x + (y * x_row + z * x_column))[None, :] + from_pixel[:, None]
    used = (term < 9 * CHANNELS)[:, None]
    left = first % out_width
    above = first // out_width
    within = (left >= PADDING) & (2 * (left + BLOCK_PIXELS) + 1 - PADDING < width)
    within &= (left + BLOCK_PIXELS <= out_width) & (above >= PADDING)
    within &= 2 * above + 2 - PADDING < height
    if within:
        value = pixels_of(tl.load(at, mask=used, other=0), scale, shift, channel, RAW, PRECISION)
    else:
        inside = used & ((y[None, :] + dy[:, None] >= 0) & (y[None, :] + dy[:, None] < height))
        inside &= (z[None, :] + dz[:, None] >= 0) & (z[None, :] + dz[:, None] < width)
        inside &= exists[None, :]
        value = pixels_of(tl.load(at, mask=inside, other=0), scale, shift, channel, RAW, PRECISION)
        value = tl.where(inside, value, tl.load(pad + channel).to(tl.uint8)[:, None])
    factors = tl.trans(signed(value, PRECISION))
    to = out + offset(row, column, out_width, OUT_PITCH, WIDE)[:, None]
    o = tl.arange(0, BLOCK_OUT)
    own_zero = tl.load(zero)
    for o0 in range(0, OUT, BLOCK_OUT):
        right = tl.load(weight + (o0 + o)[None, :] * TERMS + term[:, None])
        total = tl.broadcast_to(tl.load(bias + o0 + o)[None, :], (BLOCK_PIXELS, BLOCK_OUT))
        total = multiply(factors, right, total, PRECISION)
        result = rounded(total.to(tl.float32) * tl.load(multiplier + o0 + o), own_zero, PRECISION)
        mask = exists[:, None] & (o0 + o < OUT)
        tl.store(to + o0 + o, result, mask=mask)


def launches(
    layer: Layer, x: Buffer, out: Buffer, weights: dict[str, Buffer], tile: Tile, precision: str
) -> list[Launch]:
    """x (N, C, H, W), float32 or uint8; out (N, H', W', O)."""
    images, channels, height, width = x.shape
    _, out_height, out_width, _ = out.shape
    tiles = cdiv(out_height * out_width, tile.pixels)
    x_image, x_channel, x_row, x_column = x.strides
    return [
        Launch(
            stem_conv_int8_kernel,
            (tiles * images,),
            {
                "x": x,
                **weights,
                "out": out,
                "height": height,
                "width": width,
                "out_height": out_height,
                "out_width": out_width,
                "tiles": tiles,
                "x_image": x_image,
                "x_channel": x_channel,
                "x_row": x_row,
                "x_column": x_column,
                "out_image": out.strides[0],
                "CHANNELS": channels,
                "OUT": terms(layer.out_channels),
                "OUT_PITCH": out.strides[2],
                "PADDING": layer.padding,
                "PRECISION": precision,
                "WIDE": wide(x, out),
                "RAW": x.dtype.itemsize == 1,
                "TERMS": stem_terms(channels),
                "BLOCK_PIXELS": tile.pixels,
                "BLOCK_OUT": columns(layer.out_channels),
            },
            tile.warps,
            tile.stages,
            fused=False,
        )
    ]
