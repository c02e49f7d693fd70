"""feature_fusion: resize of low -> depthwise 3x3 + ReLU -> 1x1, plus 1x1 of high, act; nothing resized is stored.

A program owns pixels of one row. The depthwise over a bilinear resize is done where that is cheap: the few low
rows are resized to the three rows that the taps look at and weighted by a column of taps, at the low columns; what
is left, resizing along the row, is a product with a matrix of hat functions, which is made in registers. The result
and high make one product over K = C + M. A dense refinement commutes with the resize: it runs at low resolution in a
launch of its own.
"""

from __future__ import annotations

from math import ceil

import triton
import triton.language as tl

from fastscnn_fast.lower.gpu import chunk, columns, computed_channels
from fastscnn_fast.program.layers import Layer
from fastscnn_fast.program.memory import Buffer, cdiv, wide

from .common import activate, cast, hat, offset, position, product
from .launch import Launch, Tile
from .pyramid_pooling import convolution
from .resize import arguments, fraction, is_long


@triton.jit
def feature_fusion_kernel(
    high,
    low,
    refine_weight,
    refine_bias,
    low_weight,
    high_weight,
    bias,
    out,
    height,
    width,
    low_height,
    low_width,
    tiles_across,
    y_scale,
    y_shift,
    y_divisor,
    x_scale,
    x_shift,
    x_divisor,
    high_image,
    low_image,
    out_image,
    HIGH_PITCH: tl.constexpr,
    LOW_PITCH: tl.constexpr,
    OUT_PITCH: tl.constexpr,
    IN: tl.constexpr,
    MID: tl.constexpr,
    OUT: tl.constexpr,
    TAPS: tl.constexpr,
    DILATION: tl.constexpr,
    Y_SPAN: tl.constexpr,
    X_SPAN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_LOW: tl.constexpr,
    BLOCK_MID: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """high (H, W, HIGH_PITCH), low (h, w, LOW_PITCH) -> out (H, W, OUT_PITCH)."""
    image = tl.program_id(0) // (height * tiles_across)
    high += image.to(tl.int64) * high_image
    low += image.to(tl.int64) * low_image
    out += image.to(tl.int64) * out_image
    row = tl.program_id(0) // tiles_across % height
    first = tl.program_id(0) % tiles_across * BLOCK_PIXELS
    column = first + tl.arange(0, BLOCK_PIXELS)
    exists = (column < width)[:, None]
    o = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    OUT_ROW: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT * BLOCK_OUT
    top, _ = position(tl.maximum(row - DILATION, 0), y_scale, y_shift, y_divisor, low_height, WIDE)
    left, _ = position(
        tl.maximum(first - DILATION, 0), x_scale, x_shift, x_divisor, low_width, WIDE
    )
    total = tl.broadcast_to(tl.load(bias + o)[None, :], (BLOCK_PIXELS, BLOCK_OUT))
    for c0 in range(0, IN, BLOCK_IN):
        c = c0 + tl.arange(0, BLOCK_IN)
        if TAPS > 1:
            start = tl.load(refine_bias + c)[None, :]
            refined = tl.broadcast_to(start, (BLOCK_PIXELS, BLOCK_IN))
        else:
            refined = tl.zeros((BLOCK_PIXELS, BLOCK_IN), tl.float32)
        for l0 in range(0, X_SPAN, BLOCK_LOW):
            k = left + l0 + tl.arange(0, BLOCK_LOW)
            x = tl.minimum(k, low_width - 1)
            # The low columns, resized to each of the rows that the taps look at.
            rows = (tl.zeros((BLOCK_LOW, BLOCK_IN), tl.float32),) * TAPS
            for i in tl.static_range(Y_SPAN):
                y = tl.minimum(top + i, low_height - 1)
                at = low + offset(y, x, low_width, LOW_PITCH, WIDE)[:, None] + c
                value = tl.load(at).to(tl.float32)
                for above in tl.static_range(TAPS):
                    r = row + (above - TAPS // 2) * DILATION
                    share = hat(r, y_scale, y_shift, y_divisor, low_height, top + i, WIDE)
                    share = tl.where((r >= 0) & (r < height), share, 0.0)
                    more = rows[above] + value * share
                    rows = rows[:above] + (more,) + rows[above + 1 :]  # noqa: RUF005
            for tap in tl.static_range(TAPS):
                # One column of the depthwise, and how much each pixel's sample counts each low column.
                weighted = rows[0]
                if TAPS > 1:
                    weighted = weighted * tl.load(refine_weight + tap * IN + c)
                    for above in tl.static_range(1, TAPS):
                        at = refine_weight + (above * TAPS + tap) * IN + c
                        weighted += rows[above] * tl.load(at)
                z = column + (tap - TAPS // 2) * DILATION
                share = hat(z[:, None], x_scale, x_shift, x_divisor, low_width, k[None, :], WIDE)
                share = tl.where(((z >= 0) & (z < width))[:, None], share, 0.0)
                share = cast(share, low, PRECISION)
                refined = product(share, cast(weighted, low, PRECISION), refined, PRECISION)
        refined = cast(activate(refined, "relu"), low_weight, PRECISION)
        right = tl.load(low_weight + c[:, None] * OUT_ROW + o)
        total = product(refined, right, total, PRECISION)
    for m0 in range(0, MID, BLOCK_MID):
        m = m0 + tl.arange(0, BLOCK_MID)
        at = high + offset(row, column, width, HIGH_PITCH, WIDE)[:, None] + m
        value = tl.load(at, mask=exists, other=0.0)
        right = tl.load(high_weight + m[:, None] * OUT_ROW + o)
        total = product(value, right, total, PRECISION)
    tl.store(
        out + offset(row, column, width, OUT_PITCH, WIDE)[:, None] + o,
        cast(activate(total, ACTIVATION), out, PRECISION),
        mask=exists & (o < OUT),
    )


def span(reach: int, size: int, out: int, align_corners: bool) -> int:
    """Most neighbouring input indices that samples at i to i + reach touch."""
    scale, _, divisor = fraction(size, out, align_corners)
    return min(ceil(reach * scale / divisor) + 2, size)


def launches(
    layer: Layer,
    high: Buffer,
    low: Buffer,
    out: Buffer,
    weights: dict[str, Buffer],
    tile: Tile,
    precision: str,
) -> list[Launch]:
    """high (N, H, W, M), low (N, h, w, C), out (N, H, W, O)."""
    images, height, width, _ = high.shape
    _, low_height, low_width, _ = low.shape
    c, o, align = layer.in_channels, layer.out_channels, layer.align_corners
    result = []
    refined = low
    if layer.dense:
        refined = Buffer.dense("fusion_refined", low.dtype, (*low.shape[:3], low.strides[2]))
        result.append(
            convolution(
                low,
                refined,
                weights["refine_weight"],
                weights["refine_bias"],
                (c, c),
                "none",
                tile,
                precision,
            )
        )
    across = cdiv(width, tile.pixels)
    block_out = columns(o)
    dilation = 0 if layer.dense else layer.dilation
    result.append(
        Launch(
            feature_fusion_kernel,
            (across * height * images, cdiv(computed_channels(o), block_out)),
            {
                "high": high,
                "low": refined,
                **weights,
                "out": out,
                "height": height,
                "width": width,
                "low_height": low_height,
                "low_width": low_width,
                "tiles_across": across,
                **arguments((low_height, low_width), (height, width), align),
                "high_image": high.strides[0],
                "low_image": refined.strides[0],
                "out_image": out.strides[0],
                "HIGH_PITCH": high.strides[2],
                "LOW_PITCH": refined.strides[2],
                "OUT_PITCH": out.strides[2],
                "IN": computed_channels(c),
                "MID": computed_channels(layer.mid_channels),
                "OUT": computed_channels(o),
                "TAPS": 1 if layer.dense else 3,
                "DILATION": dilation,
                "Y_SPAN": span(2 * dilation, low_height, height, align),
                "X_SPAN": span(tile.pixels - 1 + 2 * dilation, low_width, width, align),
                "ACTIVATION": layer.activation,
                "PRECISION": precision,
                "WIDE": wide(high, refined, out)
                or is_long((low_height, low_width), (height, width)),
                "BLOCK_PIXELS": tile.pixels,
                "BLOCK_IN": min(chunk(c), tile.block),
                "BLOCK_LOW": 16,
                "BLOCK_MID": chunk(layer.mid_channels),
                "BLOCK_OUT": block_out,
            },
            tile.warps,
            tile.stages,
        )
    )
    return result
