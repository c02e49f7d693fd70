"""stem_conv in int8: 3x3 stride 2 of pixels, from raw uint8 ones or floats of any strides, padded with ``pad``."""

from __future__ import annotations

import triton
import triton.language as tl

from fastscnn_fast.lower.gpu_int8 import columns, stem_terms, terms
from fastscnn_fast.program.layers import Layer
from fastscnn_fast.program.memory import Buffer

from .common import offset
from .integers import multiply, rounded, side_by_side, signed
from .launch import Launch, Tile
from .stem_conv import launch, lies_inside


@triton.jit
def position_of(term: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr):
    """The channel, row and column of a term (ky, kx, c)."""
    channel = term % CHANNELS
    dy = term // CHANNELS // 3
    dz = term // CHANNELS % 3
    if WIDE:
        return tl.cast(channel, tl.int64), tl.cast(dy, tl.int64), tl.cast(dz, tl.int64)
    else:
        return channel, dy, dz


@triton.jit
def terms_of(
    x,
    at,
    top,
    left,
    height,
    width,
    x_channel,
    x_row,
    x_column,
    pad,
    scale,
    shift,
    CHANNELS: tl.constexpr,
    TERMS: tl.constexpr,
    RAW: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Bytes (pixels, TERMS) of terms (ky, kx, c); those beyond the last repeat it, for weights of 0."""
    terms = ()
    for term in tl.static_range(TERMS):
        channel, dy, dz = position_of(min(term, 9 * CHANNELS - 1), CHANNELS, WIDE)
        from_pixel = x + (channel * x_channel + dy * x_row + dz * x_column) + at
        if MASKED:
            inside = (top + dy >= 0) & (top + dy < height)
            inside &= (left + dz >= 0) & (left + dz < width)
            value = tl.load(from_pixel, mask=inside, other=0)
        else:
            value = tl.load(from_pixel)
        if not RAW:
            value = value * tl.load(scale + channel) + tl.load(shift + channel)
            value = rounded(tl.where(value == value, value, 0.0), 0, PRECISION)
        if MASKED:
            value = tl.where(inside, value, tl.load(pad + channel).to(tl.uint8))
        terms = terms + (value,)  # noqa: RUF005
    return side_by_side(terms, TERMS)


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
    top = row * 2 - PADDING
    left = column * 2 - PADDING
    at = left * x_column
    if WIDE:
        at += top.to(tl.int64) * x_row
    else:
        at += top * x_row
    if lies_inside(first, out_width, height, width, PADDING, BLOCK_PIXELS):
        value = terms_of(
            x,
            at,
            top,
            left,
            tl.where(exists, height, 0),
            width,
            x_channel,
            x_row,
            x_column,
            pad,
            scale,
            shift,
            CHANNELS,
            TERMS,
            RAW,
            False,
            WIDE,
            PRECISION,
        )
    else:
        value = terms_of(
            x,
            at,
            top,
            left,
            tl.where(exists, height, 0),
            width,
            x_channel,
            x_row,
            x_column,
            pad,
            scale,
            shift,
            CHANNELS,
            TERMS,
            RAW,
            True,
            WIDE,
            PRECISION,
        )
    factors = signed(value, PRECISION)
    term = tl.arange(0, TERMS)
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
    own = {
        "OUT": terms(layer.out_channels),
        "TERMS": stem_terms(layer.in_channels),
        "BLOCK_OUT": columns(layer.out_channels),
    }
    return [launch(stem_conv_int8_kernel, layer, x, out, weights, own, tile, precision)]
