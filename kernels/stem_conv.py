"""stem_conv: 3x3 stride 2 + bias + act from floats or raw uint8 pixels of any strides, in one pass.

A program gathers its pixels' 9 C terms with pixels along the fast axis, as pictures lie in memory, and
multiplies them as one matrix product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastscnn_fast.lower.gpu import columns, computed_channels, stem_terms
from fastscnn_fast.program.layers import Layer
from fastscnn_fast.program.memory import Buffer, cdiv, wide

from .common import activate, cast, offset, product
from .launch import Launch, Tile


@triton.jit
def stem_conv_kernel(
    x,
    weight,
    bias,
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
    ACTIVATION: tl.constexpr,
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
    pixel = tl.program_id(0) % tiles * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    row = pixel // out_width
    column = pixel % out_width
    exists = row < out_height
    term = tl.arange(0, TERMS)[:, None]  # (ky, kx, c)
    channel = term % CHANNELS
    y = row[None, :] * 2 + term // (3 * CHANNELS) - PADDING
    z = column[None, :] * 2 + term // CHANNELS % 3 - PADDING
    inside = exists[None, :] & (term < 9 * CHANNELS)
    inside &= (y >= 0) & (y < height) & (z >= 0) & (z < width)
    if WIDE:
        channel = channel.to(tl.int64)
        y = y.to(tl.int64)
        z = z.to(tl.int64)
    value = tl.load(x + (channel * x_channel + y * x_row + z * x_column), mask=inside, other=0)
    value = value.to(tl.float32)
    if RAW:
        # Only then padded: outside the picture is the normalised zero.
        value = value * tl.load(scale + channel) + tl.load(shift + channel)
        value = tl.where(inside, value, 0.0)
    o = tl.arange(0, BLOCK_OUT)[:, None]
    to = offset(row, column, out_width, OUT_PITCH, WIDE)[None, :]
    OUT_ROW: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT * BLOCK_OUT
    for o0 in range(0, OUT, BLOCK_OUT):
        left = tl.load(weight + tl.arange(0, TERMS)[None, :] * OUT_ROW + o0 + o)
        total = tl.zeros((BLOCK_OUT, BLOCK_PIXELS), tl.float32) + tl.load(bias + o0 + o)
        total = product(left, cast(value, weight, PRECISION), total, PRECISION)
        tl.store(
            out + to + o0 + o,
            cast(activate(total, ACTIVATION), out, PRECISION),
            mask=exists[None, :] & (o0 + o < OUT),
        )


def launches(
    layer: Layer, x: Buffer, out: Buffer, weights: dict[str, Buffer], tile: Tile, precision: str
) -> list[Launch]:
    """x (N, C, H, W), floats or uint8; out (N, H', W', O)."""
    images, channels, height, width = x.shape
    _, out_height, out_width, _ = out.shape
    tiles = cdiv(out_height * out_width, tile.pixels)
    x_image, x_channel, x_row, x_column = x.strides
    return [
        Launch(
            stem_conv_kernel,
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
                "OUT": computed_channels(layer.out_channels),
                "OUT_PITCH": out.strides[2],
                "PADDING": layer.padding,
                "ACTIVATION": layer.activation,
                "PRECISION": precision,
                "WIDE": wide(x, out),
                "RAW": x.dtype.itemsize == 1,
                "TERMS": stem_terms(channels),
                "BLOCK_PIXELS": tile.pixels,
                "BLOCK_OUT": columns(layer.out_channels),
            },
            tile.warps,
            tile.stages,
        )
    ]
