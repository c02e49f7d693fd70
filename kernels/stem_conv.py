"""stem_conv: 3x3 stride 2 + bias + act from floats or raw uint8 pixels of any strides, in one pass.

A program gathers its pixels' 9 C terms with pixels along the fast axis, as pictures lie in memory, and
multiplies them as one matrix product. An address is a pixel's part plus a term's; only programs at the picture's
border ask which terms lie inside.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastscnn_fast.lower.gpu import columns, computed_channels, stem_terms
from fastscnn_fast.program.layers import Layer
from fastscnn_fast.program.memory import Buffer, cdiv, wide

from .common import activate, cast, offset, product
from .launch import Launch, Tile


@triton.jit
def lies_inside(first, out_width, height, width, PADDING: tl.constexpr, BLOCK_PIXELS: tl.constexpr):
    """Whether all that a block of pixels from number ``first`` looks at lies in the picture, and it in one row."""
    left = first % out_width
    above = first // out_width
    inside = (left >= PADDING) & (2 * (left + BLOCK_PIXELS) - PADDING < width)
    inside &= (left + BLOCK_PIXELS <= out_width) & (above >= PADDING)
    return inside & (2 * above + 2 - PADDING < height)


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
    # The sum of a pixel's part, in a pointer, and a term's: one addition a value.
    at = (x + (y * x_row + z * x_column))[None, :] + from_pixel[:, None]
    used = (term < 9 * CHANNELS)[:, None]
    if lies_inside(first, out_width, height, width, PADDING, BLOCK_PIXELS):
        value = normalised(tl.load(at, mask=used, other=0), scale, shift, channel, RAW)
    else:
        inside = used & ((y[None, :] + dy[:, None] >= 0) & (y[None, :] + dy[:, None] < height))
        inside &= (z[None, :] + dz[:, None] >= 0) & (z[None, :] + dz[:, None] < width)
        inside &= exists[None, :]
        value = normalised(tl.load(at, mask=inside, other=0), scale, shift, channel, RAW)
        # Only then padded: outside the picture is the normalised zero.
        value = tl.where(inside, value, 0.0)
    right = tl.trans(cast(value, weight, PRECISION))
    to = out + offset(row, column, out_width, OUT_PITCH, WIDE)[:, None]
    o = tl.arange(0, BLOCK_OUT)
    OUT_ROW: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT * BLOCK_OUT
    for o0 in range(0, OUT, BLOCK_OUT):
        total = tl.broadcast_to(tl.load(bias + o0 + o)[None, :], (BLOCK_PIXELS, BLOCK_OUT))
        weights = tl.load(weight + tl.arange(0, TERMS)[:, None] * OUT_ROW + o0 + o)
        total = product(right, weights, total, PRECISION)
        tl.store(
            to + o0 + o,
            cast(activate(total, ACTIVATION), out, PRECISION),
            mask=exists[:, None] & (o0 + o < OUT),
        )


@triton.jit
def normalised(value, scale, shift, channel, RAW: tl.constexpr):
    """(terms, pixels) of the picture in float32, of raw pixels less the mean and over the deviation."""
    value = value.to(tl.float32)
    if RAW:
        value = value * tl.load(scale + channel)[:, None] + tl.load(shift + channel)[:, None]
    return value


def launches(
    layer: Layer, x: Buffer, out: Buffer, weights: dict[str, Buffer], tile: Tile, precision: str
) -> list[Launch]:
    """x (N, C, H, W), floats or uint8; out (N, H', W', O)."""
    own = {
        "OUT": computed_channels(layer.out_channels),
        "ACTIVATION": layer.activation,
        "TERMS": stem_terms(layer.in_channels),
        "BLOCK_OUT": columns(layer.out_channels),
    }
    return [launch(stem_conv_kernel, layer, x, out, weights, own, tile, precision)]


def launch(
    kernel: Any,
    layer: Layer,
    x: Buffer,
    out: Buffer,
    weights: dict[str, Buffer],
    own: dict[str, Any],
    tile: Tile,
    precision: str,
) -> Launch:
    """Of a kernel of pixels, with what an arithmetic has of its ``own``."""
    images, channels, height, width = x.shape
    _, out_height, out_width, _ = out.shape
    tiles = cdiv(out_height * out_width, tile.pixels)
    x_image, x_channel, x_row, x_column = x.strides
    return Launch(
        kernel,
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
            "OUT_PITCH": out.strides[2],
            "PADDING": layer.padding,
            "PRECISION": precision,
            "WIDE": wide(x, out),
            "RAW": x.dtype.itemsize == 1,
            "BLOCK_PIXELS": tile.pixels,
            **own,
        },
        tile.warps,
        tile.stages,
        fused=out.dtype != torch.uint8,
    )
