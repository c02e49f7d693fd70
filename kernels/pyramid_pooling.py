"""pyramid_pooling: adaptive average pools, a 1x1 + ReLU each, resize, concat, out-convolution + act.

Neither the concatenation nor a resized grid exists. Whatever its kernel, the out-convolution commutes with
the resize tap by tap: each branch's share of a tap is computed on the grid (1 + 4 + 9 + 36 cells for 1, 2,
3, 6), and the interpolation is a matrix of few non-zeros, made in registers, that multiplies it. Three
launches, deterministic:

1. a program a row: sums over the columns of every bin at once, a product with a matrix of zeros and ones;
2. a program for 16 cells of a branch: sums over their rows, mean, 1x1 + ReLU, shares of the out-convolution;
3. a program a tile of pixels: one product over K = taps * (C + cells).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastscnn_fast.lower.gpu import CELLS, chunk, columns, computed_channels
from fastscnn_fast.program.layers import Layer
from fastscnn_fast.program.memory import Buffer, cdiv, power_of_two, wide

from .common import activate, branch_of, cast, offset, product
from .integers import multiply, signed
from .launch import Launch, Tile


@triton.jit
def row_sums_kernel(
    x,
    sums,
    height,
    width,
    x_image,
    sums_image,
    X_PITCH: tl.constexpr,
    IN: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """x (H, W, X_PITCH) -> sums (H, cells of one row, IN) over each cell's columns, float32, or int32 of bytes."""
    image = tl.program_id(0) // height
    row = tl.program_id(0) % height
    x += image.to(tl.int64) * x_image + offset(row, 0, width, X_PITCH, WIDE)
    sums += image.to(tl.int64) * sums_image + row * BLOCK_CELLS * IN
    c = tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    cell = tl.arange(0, BLOCK_CELLS)
    bins, within, _ = branch_of(cell, BINS, 1)
    begin = (within * width // bins)[:, None]
    end = tl.cdiv((within + 1) * width, bins)[:, None]
    BYTES: tl.constexpr = x.dtype.element_ty == tl.uint8
    total = tl.zeros((BLOCK_CELLS, BLOCK_IN), sums.dtype.element_ty)
    if BYTES:  # each column is counted less 128
        total += (end - begin) * 128
    for first in range(0, width, BLOCK_PIXELS):
        column = first + tl.arange(0, BLOCK_PIXELS)
        value = tl.load(x + column[:, None] * X_PITCH + c, mask=(column < width)[:, None], other=0)
        counts = (column[None, :] >= begin) & (column[None, :] < end)
        if BYTES:
            total = multiply(counts.to(tl.int8), signed(value, PRECISION), total, PRECISION)
        else:
            left = cast(tl.where(counts, 1.0, 0.0), x, PRECISION)
            total = product(left, value, total, PRECISION)
    tl.store(sums + cell[:, None] * IN + c, total)


@triton.jit
def cells_of(block, height, width, BINS: tl.constexpr, BLOCK_CELLS: tl.constexpr):
    """Of a block of cells: its branch, that one's first column of sums and first cell of all; then by cell its number there,
    whether it exists, its column, its rows' begin and end and its area; and the rows' begin and end of all."""
    branch = 0
    bins = 0
    first = 0
    row_cell = 0
    before = 0
    blocks = 0
    cells = 0
    row_cells = 0
    for b in tl.static_range(len(BINS)):
        if block >= blocks:
            branch = b
            bins = BINS[b]
            first = (block - blocks) * BLOCK_CELLS
            row_cell = row_cells
            before = cells
        blocks += tl.cdiv(BINS[b] ** 2, BLOCK_CELLS)
        cells += BINS[b] ** 2
        row_cells += BINS[b]
    cell = first + tl.arange(0, BLOCK_CELLS)
    i = cell // bins
    j = cell % bins
    top = i * height // bins
    bottom = tl.cdiv((i + 1) * height, bins)
    area = (bottom - top) * (tl.cdiv((j + 1) * width, bins) - j * width // bins)
    first_row = first // bins * height // bins
    last_cell = tl.minimum(first + BLOCK_CELLS, bins * bins) - 1
    end_row = tl.cdiv((last_cell // bins + 1) * height, bins)
    exists = cell < bins * bins
    return branch, row_cell, before, cell, exists, j, top, bottom, area, first_row, end_row


@triton.jit
def grids_kernel(
    sums,
    branch_weight,
    branch_bias,
    grid_weight,
    shares,
    height,
    width,
    sums_image,
    shares_image,
    IN: tl.constexpr,
    MID: tl.constexpr,
    OUT: tl.constexpr,
    TAPS: tl.constexpr,
    BINS: tl.constexpr,
    ROW_CELLS: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """sums (H, ROW_CELLS, IN) -> shares (TAPS, CELLS, OUT) of the out-convolution."""
    image = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    sums += image.to(tl.int64) * sums_image
    shares += image.to(tl.int64) * shares_image
    branch, row_cell, share, cell, exists, j, top, bottom, area, first_row, end_row = cells_of(
        block, height, width, BINS, BLOCK_CELLS
    )
    mid = tl.arange(0, MID)
    value = tl.zeros((BLOCK_CELLS, MID), tl.float32)
    value += tl.load(branch_bias + branch * MID + mid)
    for c0 in range(0, IN, BLOCK_IN):
        c = c0 + tl.arange(0, BLOCK_IN)
        pooled = tl.zeros((BLOCK_CELLS, BLOCK_IN), tl.float32)
        for y in range(first_row, end_row):
            pooled += tl.load(
                sums + (y * ROW_CELLS + row_cell + j)[:, None] * IN + c,
                mask=(exists & (y >= top) & (y < bottom))[:, None],
                other=0.0,
            )
        pooled = tl.div_rn(pooled, tl.zeros_like(pooled) + area.to(tl.float32)[:, None])
        right = tl.load(branch_weight + branch * IN * MID + c[:, None] * MID + mid)
        left = cast(pooled, branch_weight, PRECISION)
        value = product(left, right, value, PRECISION)
    left = cast(activate(value, "relu"), grid_weight, PRECISION)
    OUT_ROW: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT * BLOCK_OUT
    for tap in range(TAPS):
        for o0 in range(0, OUT, BLOCK_OUT):
            o = o0 + tl.arange(0, BLOCK_OUT)
            right = tl.load(
                grid_weight + (branch * TAPS + tap) * MID * OUT_ROW + mid[:, None] * OUT_ROW + o
            )
            total = product(left, right, tl.zeros((BLOCK_CELLS, BLOCK_OUT), tl.float32), PRECISION)
            tl.store(
                shares + (tap * CELLS + share + cell)[:, None] * OUT_ROW + o,
                cast(total, shares, PRECISION),
                mask=exists[:, None],
            )


@triton.jit
def out_convolution_kernel(
    x,
    shares,
    weight,
    bias,
    out,
    height,
    width,
    tiles,
    x_image,
    shares_image,
    out_image,
    X_PITCH: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    OUT_PITCH: tl.constexpr,
    SIDE: tl.constexpr,
    BINS: tl.constexpr,
    CELLS: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """x (H, W, X_PITCH), shares (SIDE^2, CELLS, OUT) -> out (H, W, OUT_PITCH); without BINS a convolution."""
    image = tl.program_id(0) // tiles
    x += image.to(tl.int64) * x_image
    shares += image.to(tl.int64) * shares_image
    out += image.to(tl.int64) * out_image
    pixel = tl.program_id(0) % tiles * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    row = pixel // width
    column = pixel % width
    exists = row < height
    o = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    OUT_ROW: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT * BLOCK_OUT
    total = tl.zeros((BLOCK_PIXELS, BLOCK_OUT), tl.float32) + tl.load(bias + o)
    for tap in range(SIDE * SIDE):
        y = row + tap // SIDE - SIDE // 2
        z = column + tap % SIDE - SIDE // 2
        inside = (exists & (y >= 0) & (y < height) & (z >= 0) & (z < width))[:, None]
        for c0 in range(0, IN, BLOCK_IN):
            c = c0 + tl.arange(0, BLOCK_IN)
            at = x + offset(y, z, width, X_PITCH, WIDE)[:, None] + c
            left = tl.load(at, mask=inside, other=0.0)
            right = tl.load(weight + (tap * IN + c)[:, None] * OUT_ROW + o)
            total = product(left, right, total, PRECISION)
        for first in range(0, CELLS, BLOCK_CELLS):
            cell = first + tl.arange(0, BLOCK_CELLS)
            bins, within, _ = branch_of(cell, BINS, 2)
            left = interpolation(y, within // bins, height, bins, ALIGN_CORNERS)
            left *= interpolation(z, within % bins, width, bins, ALIGN_CORNERS)
            left = cast(tl.where(inside & (cell < CELLS), left, 0.0), shares, PRECISION)
            right = tl.load(
                shares + (tap * CELLS + cell)[:, None] * OUT_ROW + o,
                mask=(cell < CELLS)[:, None],
                other=0.0,
            )
            total = product(left, right, total, PRECISION)
    tl.store(
        out + offset(row, column, width, OUT_PITCH, WIDE)[:, None] + o,
        cast(activate(total, ACTIVATION), out, PRECISION),
        mask=exists[:, None] & (o < OUT),
    )


@triton.jit
def interpolation(i, at, size, bins, ALIGN_CORNERS: tl.constexpr):
    """(pixels, cells): the weight of grid index ``at`` for pixel ``i`` of ``size``; see resize.py."""
    if ALIGN_CORNERS:
        sample = i[:, None] * (bins - 1)[None, :]
        divisor = tl.maximum(size - 1, 1)
    else:
        sample = (2 * i + 1)[:, None] * bins[None, :] - size
        divisor = 2 * size
    last = ((bins - 1) * divisor)[None, :]
    distance = tl.abs(tl.minimum(tl.maximum(sample, 0), last) - (at * divisor)[None, :])
    return tl.maximum(1.0 - distance.to(tl.float32) / divisor.to(tl.float32), 0.0)


def convolution(
    x: Buffer,
    out: Buffer,
    weight: Buffer,
    bias: Buffer,
    channels: tuple[int, int],
    activation: str,
    tile: Tile,
    precision: str,
    shares: Buffer | None = None,
    bins: tuple[int, ...] = (),
    align_corners: bool = False,
) -> Launch:
    """x (N, H, W, C) -> out (N, H, W, O) by a 1x1 or 3x3 ``weight``, and what the grids' shares add."""
    images, height, width, _ = x.shape
    c, o = channels
    tiles = cdiv(height * width, tile.pixels)
    block_out = columns(o)
    cells = sum(b * b for b in bins)
    side = 3 if len(weight.shape) == 3 and weight.shape[0] == 9 else 1
    return Launch(
        out_convolution_kernel,
        (tiles * images, cdiv(computed_channels(o), block_out)),
        {
            "x": x,
            "shares": shares or x,
            "weight": weight,
            "bias": bias,
            "out": out,
            "height": height,
            "width": width,
            "tiles": tiles,
            "x_image": x.strides[0],
            "shares_image": (shares or x).strides[0],
            "out_image": out.strides[0],
            "X_PITCH": x.strides[2],
            "IN": computed_channels(c),
            "OUT": computed_channels(o),
            "OUT_PITCH": out.strides[2],
            "SIDE": side,
            "BINS": bins,
            "CELLS": cells,
            "ALIGN_CORNERS": align_corners,
            "ACTIVATION": activation,
            "PRECISION": precision,
            "WIDE": wide(x, out),
            "BLOCK_PIXELS": tile.pixels,
            "BLOCK_IN": min(chunk(c), tile.block),
            "BLOCK_CELLS": min(max(power_of_two(cells), 16), 64),
            "BLOCK_OUT": block_out,
        },
        tile.warps,
        tile.stages,
    )


def row_sums(x: Buffer, sums: Buffer, bins: tuple[int, ...], precision: str) -> Launch:
    """x (N, H, W, C) -> sums (N, H, cells of one row, C')."""
    images, height, row_cells, c = sums.shape
    block = min(c & -c, 64)
    of_bytes = x.dtype == torch.uint8
    return Launch(
        row_sums_kernel,
        (height * images, c // block),
        {
            "x": x,
            "sums": sums,
            "height": height,
            "width": x.shape[2],
            "x_image": x.strides[0],
            "sums_image": sums.strides[0],
            "X_PITCH": x.strides[2],
            "IN": c,
            "BINS": bins,
            "BLOCK_CELLS": row_cells,
            "PRECISION": precision,
            "WIDE": wide(x),
            "BLOCK_PIXELS": 32,
            "BLOCK_IN": block,
        },
        4,
        1 if of_bytes else 2,  # a pipeline would copy bytes by fewer than 16 a thread
        fused=not of_bytes,
    )


def launches(
    layer: Layer, x: Buffer, out: Buffer, weights: dict[str, Buffer], tile: Tile, precision: str
) -> list[Launch]:
    """x (N, H, W, C), out (N, H, W, O)."""
    images, height, width, _ = x.shape
    c, o, bins = layer.in_channels, layer.out_channels, layer.bins
    taps = layer.kernel**2
    row_cells = max(power_of_two(sum(bins)), 16)
    cells = sum(b * b for b in bins)
    block_in = min(chunk(c), 64)
    sums = Buffer.dense(
        "pyramid_sums", torch.float32, (images, height, row_cells, computed_channels(c))
    )
    out_row = weights["grid_weight"].shape[-1]
    shares = Buffer.dense("pyramid_shares", x.dtype, (images, taps, cells, out_row))
    blocks = sum(cdiv(b * b, CELLS) for b in bins)
    return [
        row_sums(x, sums, bins, precision),
        Launch(
            grids_kernel,
            (blocks * images,),
            {
                "sums": sums,
                "branch_weight": weights["branch_weight"],
                "branch_bias": weights["branch_bias"],
                "grid_weight": weights["grid_weight"],
                "shares": shares,
                "height": height,
                "width": width,
                "sums_image": sums.strides[0],
                "shares_image": shares.strides[0],
                "IN": computed_channels(c),
                "MID": weights["branch_weight"].shape[-1],
                "OUT": computed_channels(o),
                "TAPS": taps,
                "BINS": bins,
                "ROW_CELLS": row_cells,
                "CELLS": cells,
                "BLOCKS": blocks,
                "PRECISION": precision,
                "BLOCK_CELLS": CELLS,
                "BLOCK_IN": block_in,
                "BLOCK_OUT": columns(o),
            },
            8,  # four spill on sm_90 under Triton 3.6
            2,
        ),
        convolution(
            x,
            out,
            weights["out_weight"],
            weights["out_bias"],
            (c, o),
            layer.activation,
            tile,
            precision,
            shares,
            bins,
            layer.align_corners,
        ),
    ]
