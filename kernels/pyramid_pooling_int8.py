"""pyramid_pooling in int8: the branches' grids are bytes and are resized to bytes, so nothing commutes with the resize.

Launches: sums over the columns of every bin; grids (sums over rows, mean, 1x1); the grids resized side by side; and the
out-convolution, one product of x and of these.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastscnn_fast.lower.gpu import CELLS
from fastscnn_fast.lower.gpu_int8 import branch_terms, chunk, terms
from fastscnn_fast.program.layers import Layer
from fastscnn_fast.program.memory import Buffer, cdiv, power_of_two, wide

from .common import branch_of, offset
from .integers import factor, multiply, rounded, signed
from .launch import Launch, Tile
from .product_int8 import product, resize


@triton.jit
def row_sums_int8_kernel(
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
    """x (H, W, X_PITCH) -> sums (H, cells of one row, IN) over each cell's columns, int32."""
    image = tl.program_id(0) // height
    row = tl.program_id(0) % height
    x += image.to(tl.int64) * x_image + offset(row, 0, width, X_PITCH, WIDE)
    sums += image.to(tl.int64) * sums_image + row * BLOCK_CELLS * IN
    c = tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    cell = tl.arange(0, BLOCK_CELLS)
    bins, within, _ = branch_of(cell, BINS, 1)
    begin = (within * width // bins)[:, None]
    end = tl.cdiv((within + 1) * width, bins)[:, None]
    # Each column is counted less 128.
    total = tl.broadcast_to((end - begin) * 128, (BLOCK_CELLS, BLOCK_IN))
    for first in range(0, width, BLOCK_PIXELS):
        column = first + tl.arange(0, BLOCK_PIXELS)
        value = tl.load(x + column[:, None] * X_PITCH + c, mask=(column < width)[:, None], other=0)
        counts = (column[None, :] >= begin) & (column[None, :] < end)
        total = multiply(counts.to(tl.int8), signed(value, PRECISION), total, PRECISION)
    tl.store(sums + cell[:, None] * IN + c, total)


@triton.jit
def grids_int8_kernel(
    sums,
    branch_weight,
    branch_bias,
    branch_multiplier,
    branch_zero,
    grids,
    height,
    width,
    sums_image,
    grids_image,
    IN: tl.constexpr,
    MID: tl.constexpr,
    BINS: tl.constexpr,
    ROW_CELLS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """sums (H, ROW_CELLS, IN) -> grids (cells of all branches, MID)."""
    image = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    sums += image.to(tl.int64) * sums_image
    grids += image.to(tl.int64) * grids_image
    # The block's branch, its first cell there, the branch's first column of sums and cell of all.
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
    exists = cell < bins * bins
    i = cell // bins
    j = cell % bins
    top = i * height // bins
    bottom = tl.cdiv((i + 1) * height, bins)
    area = (bottom - top) * (tl.cdiv((j + 1) * width, bins) - j * width // bins)
    share = tl.div_rn(tl.full((BLOCK_CELLS,), 1.0, tl.float32), area.to(tl.float32))
    first_row = first // bins * height // bins
    last_cell = tl.minimum(first + BLOCK_CELLS, bins * bins) - 1
    end_row = tl.cdiv((last_cell // bins + 1) * height, bins)
    mid = branch * MID + tl.arange(0, MID)
    value = tl.broadcast_to(tl.load(branch_bias + mid)[None, :], (BLOCK_CELLS, MID))
    for c0 in range(0, IN, BLOCK_IN):
        c = c0 + tl.arange(0, BLOCK_IN)
        pooled = tl.zeros((BLOCK_CELLS, BLOCK_IN), tl.int64 if LONG else tl.int32)
        for y in range(first_row, end_row):
            pooled += tl.load(
                sums + (y * ROW_CELLS + row_cell + j)[:, None] * IN + c,
                mask=(exists & (y >= top) & (y < bottom))[:, None],
                other=0,
            )
        mean = factor(pooled.to(tl.float32) * share[:, None], 0, PRECISION)
        right = tl.load(branch_weight + mid[None, :] * IN + c[:, None])
        value = multiply(mean, right, value, PRECISION)
    value = value.to(tl.float32) * tl.load(branch_multiplier + mid)
    value = rounded(value, tl.load(branch_zero + branch), PRECISION)
    to = grids + (before + cell)[:, None] * MID + tl.arange(0, MID)
    tl.store(to, value, mask=exists[:, None])


def launches(
    layer: Layer, x: Buffer, out: Buffer, weights: dict[str, Buffer], tile: Tile, precision: str
) -> list[Launch]:
    """x (N, H, W, C), out (N, H, W, O)."""
    images, height, width, _ = x.shape
    c, bins, mid = layer.in_channels, layer.bins, branch_terms(layer.mid_channels)
    row_cells = max(power_of_two(sum(bins)), 16)
    cells = sum(b * b for b in bins)
    block_in = min(chunk(c), 64)
    blocks = sum(cdiv(b * b, CELLS) for b in bins)
    sums = Buffer.dense("pyramid_sums", torch.int32, (images, height, row_cells, terms(c)))
    grids = Buffer.dense("pyramid_grids", x.dtype, (images, cells, mid))
    parts = Buffer.dense("pyramid_parts", x.dtype, (images, height, width, len(bins) * mid))
    of_branches = ("branch_weight", "branch_bias", "branch_multiplier", "branch_zero")
    return [
        Launch(
            row_sums_int8_kernel,
            (height * images, terms(c) // block_in),
            {
                "x": x,
                "sums": sums,
                "height": height,
                "width": width,
                "x_image": x.strides[0],
                "sums_image": sums.strides[0],
                "X_PITCH": x.strides[2],
                "IN": terms(c),
                "BINS": bins,
                "BLOCK_CELLS": row_cells,
                "PRECISION": precision,
                "WIDE": wide(x),
                "BLOCK_PIXELS": 32,
                "BLOCK_IN": block_in,
            },
            4,
            1,
            fused=False,
        ),
        Launch(
            grids_int8_kernel,
            (blocks * images,),
            {
                "sums": sums,
                **{name: weights[name] for name in of_branches},
                "grids": grids,
                "height": height,
                "width": width,
                "sums_image": sums.strides[0],
                "grids_image": grids.strides[0],
                "IN": terms(c),
                "MID": mid,
                "BINS": bins,
                "ROW_CELLS": row_cells,
                "BLOCKS": blocks,
                "PRECISION": precision,
                "LONG": 255 * height * width >= 2**31,
                "BLOCK_CELLS": CELLS,
                "BLOCK_IN": block_in,
            },
            4,
            2,
            fused=False,
        ),
        resize(grids, parts, mid, layer.align_corners, precision, bins=bins),
        product(
            x,
            out,
            {
                "x_weight": weights["out_weight"],
                "y_weight": weights["grid_weight"],
                "bias": weights["out_bias"],
                "multiplier": weights["out_multiplier"],
                "zero": weights["out_zero"],
                "outside": weights["input_zero"],
            },
            (c, layer.out_channels),
            tile,
            precision,
            parts,
            layer.kernel,
        ),
    ]
