"""Launches that several ops have in int8: a convolution of one or two inputs, and the resize in fixed point."""

from __future__ import annotations

import triton
import triton.language as tl

from fastscnn_fast.lower.gpu_int8 import chunk, columns, terms
from fastscnn_fast.program.memory import Buffer, cdiv, wide

from .common import offset
from .integers import (
    between_columns,
    between_rows,
    fixed_position,
    multiply,
    rounded,
    shares,
    signed,
)
from .launch import Launch, Tile
from .resize import is_long


@triton.jit
def product_int8_kernel(
    x,
    y,
    x_weight,
    y_weight,
    bias,
    multiplier,
    zero,
    outside,
    out,
    height,
    width,
    tiles,
    x_image,
    y_image,
    out_image,
    X_PITCH: tl.constexpr,
    Y_PITCH: tl.constexpr,
    OUT_PITCH: tl.constexpr,
    IN: tl.constexpr,
    MID: tl.constexpr,
    OUT: tl.constexpr,
    SIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_MID: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """x (H, W, X_PITCH), y (H, W, Y_PITCH) -> out (H, W, OUT_PITCH); ``outside`` surrounds x, 0 y."""
    image = tl.program_id(0) // tiles
    x += image.to(tl.int64) * x_image
    y += image.to(tl.int64) * y_image
    out += image.to(tl.int64) * out_image
    pixel = tl.program_id(0) % tiles * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    row = pixel // width
    column = pixel % width
    exists = row < height
    o = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    OUT_ROWS: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT * BLOCK_OUT
    total = tl.broadcast_to(tl.load(bias + o)[None, :], (BLOCK_PIXELS, BLOCK_OUT))
    around = tl.load(outside).to(tl.uint8)
    for tap in range(SIDE * SIDE):
        r = row + tap // SIDE - SIDE // 2
        k = column + tap % SIDE - SIDE // 2
        inside = (exists & (r >= 0) & (r < height) & (k >= 0) & (k < width))[:, None]
        at_row = tap * OUT_ROWS + o
        for c0 in range(0, IN, BLOCK_IN):
            c = c0 + tl.arange(0, BLOCK_IN)
            at = x + offset(r, k, width, X_PITCH, WIDE)[:, None] + c
            left = signed(tl.load(at, mask=inside, other=around), PRECISION)
            right = tl.load(x_weight + at_row[None, :] * IN + c[:, None])
            total = multiply(left, right, total, PRECISION)
        for m0 in range(0, MID, BLOCK_MID):
            m = m0 + tl.arange(0, BLOCK_MID)
            at = y + offset(r, k, width, Y_PITCH, WIDE)[:, None] + m
            left = signed(tl.load(at, mask=inside, other=0), PRECISION)
            right = tl.load(y_weight + at_row[None, :] * MID + m[:, None])
            total = multiply(left, right, total, PRECISION)
    value = rounded(total.to(tl.float32) * tl.load(multiplier + o), tl.load(zero), PRECISION)
    to = out + offset(row, column, width, OUT_PITCH, WIDE)[:, None] + o
    tl.store(to, value, mask=exists[:, None] & (o < OUT))


def product(
    x: Buffer,
    out: Buffer,
    weights: dict[str, Buffer],
    channels: tuple[int, int],
    tile: Tile,
    precision: str,
    y: Buffer | None = None,
    side: int = 1,
) -> Launch:
    """x (N, H, W, C) [and y (N, H, W, M)] -> out (N, H, W, O) by 1x1s or 3x3s; ``weights`` by the kernel's names."""
    images, height, width, _ = x.shape
    c, o = channels
    tiles = cdiv(height * width, tile.pixels)
    second = y or x
    block_out = columns(o)
    return Launch(
        product_int8_kernel,
        (tiles * images, cdiv(terms(o), block_out)),
        {
            "x": x,
            "y": second,
            "y_weight": weights["x_weight"],
            "outside": weights["zero"],
            **weights,
            "out": out,
            "height": height,
            "width": width,
            "tiles": tiles,
            "x_image": x.strides[0],
            "y_image": second.strides[0],
            "out_image": out.strides[0],
            "X_PITCH": x.strides[2],
            "Y_PITCH": second.strides[2],
            "OUT_PITCH": out.strides[2],
            "IN": terms(c),
            "MID": terms(y.shape[3]) if y else 0,
            "OUT": terms(o),
            "SIDE": side,
            "PRECISION": precision,
            "WIDE": wide(x, out, second),
            "BLOCK_PIXELS": tile.pixels,
            "BLOCK_IN": min(chunk(c), max(tile.block, 32)),
            "BLOCK_MID": min(chunk(second.shape[3]), max(tile.block, 32)),
            "BLOCK_OUT": block_out,
        },
        tile.warps,
        tile.stages,
        fused=False,
    )


@triton.jit
def resize_int8_kernel(
    x,
    floor,
    out,
    low_height,
    low_width,
    height,
    width,
    tiles_across,
    x_image,
    out_image,
    X_PITCH: tl.constexpr,
    OUT_PITCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BINS: tl.constexpr,
    FLOOR: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    WIDE: tl.constexpr,
    LONG: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """x (h, w, X_PITCH) -> out (H, W, OUT_PITCH), at least ``floor`` where FLOOR says so.

    With BINS x holds a grid of each, one after the other, and out their channels side by side.
    """
    image = tl.program_id(0) // (height * tiles_across)
    x += image.to(tl.int64) * x_image
    out += image.to(tl.int64) * out_image
    x = x.to(tl.pointer_type(tl.uint32), bitcast=True)
    out = out.to(tl.pointer_type(tl.uint32), bitcast=True)
    row = tl.program_id(0) // tiles_across % height
    column = tl.program_id(0) % tiles_across * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    c = tl.program_id(1) * (BLOCK_CHANNELS // 4) + tl.arange(0, BLOCK_CHANNELS // 4)
    if len(BINS) > 0:
        cells = 0
        out += tl.program_id(2) * (CHANNELS // 4)
        for b in tl.static_range(len(BINS)):
            if tl.program_id(2) == b:
                low_height = BINS[b]
                low_width = BINS[b]
                x += cells * (X_PITCH // 4)
            cells += BINS[b] ** 2
    top, by_row = fixed_position(row, low_height, height, ALIGN_CORNERS, LONG)
    left, share = fixed_position(column, low_width, width, ALIGN_CORNERS, LONG)
    bottom = tl.minimum(top + 1, low_height - 1)
    right = tl.minimum(left + 1, low_width - 1)
    mask = (column < width)[:, None] & (c < CHANNELS // 4)
    by_row = shares(by_row) + tl.zeros((1, 1), tl.uint32)
    sides = ()
    for side in tl.static_range(2):
        z = left if side == 0 else right
        at = x + offset(top, z, low_width, X_PITCH // 4, WIDE)[:, None] + c
        above = tl.load(at, mask=mask, other=0)
        at = x + offset(bottom, z, low_width, X_PITCH // 4, WIDE)[:, None] + c
        below = tl.load(at, mask=mask, other=0)
        sides = sides + (between_rows(above, below, by_row, PRECISION),)  # noqa: RUF005
    least = tl.zeros((1, 1), tl.uint32)
    if FLOOR:
        least += tl.load(floor).to(tl.uint32)
    value = between_columns(sides[0], sides[1], share[:, None], least, PRECISION)
    to = out + offset(row, column, width, OUT_PITCH // 4, WIDE)[:, None] + c
    tl.store(to, value, mask=mask)


def resize(
    x: Buffer,
    out: Buffer,
    channels: int,
    align_corners: bool,
    precision: str,
    floor: Buffer | None = None,
    bins: tuple[int, ...] = (),
) -> Launch:
    """x (N, h, w, C) -> out (N, H, W, C) in fixed point; with ``bins`` x is (N, cells, C), out (N, H, W, bins * C)."""
    images, height, width, _ = out.shape
    low = (max(bins),) * 2 if bins else (x.shape[1], x.shape[2])
    block, pixels = min(chunk(channels), 128), 32
    across = cdiv(width, pixels)
    long = is_long(low, (height, width)) or max(height, width) >= 2**15
    return Launch(
        resize_int8_kernel,
        (across * height * images, cdiv(terms(channels), block), max(len(bins), 1)),
        {
            "x": x,
            "floor": floor or x,
            "out": out,
            "low_height": low[0],
            "low_width": low[1],
            "height": height,
            "width": width,
            "tiles_across": across,
            "x_image": x.strides[0],
            "out_image": out.strides[0],
            "X_PITCH": x.strides[-2],
            "OUT_PITCH": out.strides[2],
            "CHANNELS": terms(channels),
            "BINS": bins,
            "FLOOR": floor is not None,
            "ALIGN_CORNERS": align_corners,
            "WIDE": wide(x, out),
            "LONG": long,
            "PRECISION": precision,
            "BLOCK_PIXELS": pixels,
            "BLOCK_CHANNELS": block,
        },
        max(block // 32, 1),
        1,
        fused=False,
    )
