"""upsample_classify: bilinear resize of low-resolution logits -> logits, softmax or labels of each pixel.

A program owns the columns of a tile in all rows that lie between the same two low rows: it blends each
class's two rows along the columns once, and every output row is one blend more. Labels and softmax keep
their maximum and sum in registers; full-size logits exist only where they are asked for. One class alone
has the sigmoid in place of the softmax, and label 1 where its logit is above 0, else 0, also where it is NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastscnn_fast.program.layers import Layer
from fastscnn_fast.program.memory import Buffer, cdiv, wide

from .common import cast, position
from .launch import Launch, Tile
from .resize import arguments, is_long


@triton.jit
def lerp(a, b, weight):
    """a (1 - weight) + b weight, infinite and NaN where torch's is."""
    return a.to(tl.float32) * (1.0 - weight) + b.to(tl.float32) * weight


@triton.jit
def plane_of(k, pitch, WIDE: tl.constexpr):
    """Elements to class ``k``."""
    if WIDE:
        k = tl.cast(k, tl.int64)
    return k * pitch


@triton.jit
def low_rows(corners, plane, weight):
    """One class's two low rows, blended along the columns; ``corners`` point to class 0, ``plane`` elements before it."""
    above = lerp(tl.load(corners[0] + plane), tl.load(corners[1] + plane), weight)
    below = lerp(tl.load(corners[2] + plane), tl.load(corners[3] + plane), weight)
    return above, below


@triton.jit
def blended(corners, plane, weight, by_row):
    """One class at all the tile's pixels."""
    above, below = low_rows(corners, plane, weight)
    return lerp(above[None, :], below[None, :], by_row)


@triton.jit
def largest(
    corners,
    x_class,
    weight,
    by_row,
    CLASSES: tl.constexpr,
    FINITE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The largest class's value and number, and whether all values were finite, as ``FINITE`` takes them to be.

    As torch.argmax: the first of equal ones, and NaN is the largest of all. That takes twice the comparisons, so
    it is asked for only where something is not finite.
    """
    best = tl.full((by_row.shape[0], weight.shape[0]), float("-inf"), tl.float32)
    label = tl.zeros((by_row.shape[0], weight.shape[0]), tl.int32)
    zero = tl.zeros_like(weight)
    for k in range(CLASSES):
        above, below = low_rows(corners, plane_of(k, x_class, WIDE), weight)
        if FINITE:  # one multiply-add a pixel
            step = below - above
            zero += step * 0.0  # NaN from then on where one is not, nor their difference
            value = above[None, :] + step[None, :] * by_row
        else:
            value = lerp(above[None, :], below[None, :], by_row)
        larger = value > best
        if not FINITE:
            larger = larger | ((value != value) & (best == best))
        best = tl.where(larger, value, best)
        label = tl.where(larger, k, label)
    return best, label, tl.sum(zero) == 0.0


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.div_rn(tl.where(x > 0, 1.0, e), 1.0 + e)


@triton.jit
def upsample_classify_kernel(
    x,
    out,
    low_height,
    low_width,
    height,
    width,
    tiles_across,
    y_scale,
    y_shift,
    y_divisor,
    x_scale,
    x_shift,
    x_divisor,
    x_image,
    x_class,
    x_row,
    x_column,
    out_image,
    out_class,
    CLASSES: tl.constexpr,
    OUTPUT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """x (h, w, CLASSES), any strides -> out (CLASSES, H, W) or labels (H, W)."""
    image = tl.program_id(0) // (low_height * tiles_across)
    x += image.to(tl.int64) * x_image
    out += image.to(tl.int64) * out_image
    low = tl.program_id(0) // tiles_across % low_height
    column = tl.program_id(0) % tiles_across * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    if WIDE:
        low = low.to(tl.int64)
    # The first output row that samples at or beyond the low row, and that of the next.
    begin = tl.cdiv(tl.maximum(low * y_divisor - y_shift, 0), tl.maximum(y_scale, 1))
    end = tl.cdiv(tl.maximum((low + 1) * y_divisor - y_shift, 0), tl.maximum(y_scale, 1))
    begin = tl.where(low == 0, 0, tl.minimum(begin, height))
    end = tl.where(low == low_height - 1, height, tl.minimum(end, height))
    left, weight = position(
        tl.minimum(column, width - 1), x_scale, x_shift, x_divisor, low_width, WIDE
    )
    right = tl.minimum(left + 1, low_width - 1) * x_column
    left = left * x_column
    top = x + low * x_row
    bottom = x + tl.minimum(low + 1, low_height - 1) * x_row
    corners = (top + left, top + right, bottom + left, bottom + right)
    for first in range(begin, end, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        mask = (row < end)[:, None] & (column < width)
        _, by_row = position(row, y_scale, y_shift, y_divisor, low_height, WIDE)
        by_row = by_row[:, None]
        if WIDE:
            row = row.to(tl.int64)
        to = out + row[:, None] * width + column
        if OUTPUT == "logits":
            for k in range(CLASSES):
                value = blended(corners, plane_of(k, x_class, WIDE), weight, by_row)
                plane = plane_of(k, out_class, WIDE)
                tl.store(to + plane, cast(value, out, PRECISION), mask=mask)
        elif CLASSES == 1:
            value = blended(corners, 0, weight, by_row)
            if OUTPUT == "labels":
                tl.store(to, (value > 0).to(tl.uint8), mask=mask)
            else:
                tl.store(to, cast(sigmoid(value), out, PRECISION), mask=mask)
        else:
            LABELS: tl.constexpr = OUTPUT == "labels"
            best, label, finite = largest(corners, x_class, weight, by_row, CLASSES, LABELS, WIDE)
            if LABELS:
                if not finite:
                    best, label, finite = largest(
                        corners, x_class, weight, by_row, CLASSES, False, WIDE
                    )
                tl.store(to, label.to(tl.uint8), mask=mask)
            else:
                total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
                for k in range(CLASSES):
                    value = blended(corners, plane_of(k, x_class, WIDE), weight, by_row)
                    total += tl.exp(value - best)
                for k in range(CLASSES):
                    value = blended(corners, plane_of(k, x_class, WIDE), weight, by_row)
                    plane = plane_of(k, out_class, WIDE)
                    value = tl.div_rn(tl.exp(value - best), total)
                    tl.store(to + plane, cast(value, out, PRECISION), mask=mask)


def launches(
    layer: Layer, x: Buffer, out: Buffer, output: str, tile: Tile, precision: str
) -> list[Launch]:
    """x (N, h, w, K), any strides; out (N, K, H, W), or (N, H, W) labels, contiguous."""
    images, low_height, low_width, classes = x.shape
    height, width = out.shape[-2:]
    across = cdiv(width, tile.pixels)
    return [
        Launch(
            upsample_classify_kernel,
            (across * low_height * images,),
            {
                "x": x,
                "out": out,
                "low_height": low_height,
                "low_width": low_width,
                "height": height,
                "width": width,
                "tiles_across": across,
                **arguments((low_height, low_width), (height, width), layer.align_corners),
                "x_image": x.strides[0],
                "x_class": x.strides[3],
                "x_row": x.strides[1],
                "x_column": x.strides[2],
                "out_image": out.strides[0],
                "out_class": height * width,
                "CLASSES": classes,
                "OUTPUT": output,
                "PRECISION": precision,
                "WIDE": wide(x, out) or is_long((low_height, low_width), (height, width)),
                "BLOCK_ROWS": tile.rows,
                "BLOCK_COLUMNS": tile.pixels,
            },
            tile.warps,
            tile.stages,
        )
    ]
