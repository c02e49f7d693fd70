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
from fastscnn_fast.program.memory import Buffer, cdiv, power_of_two

from .integers import factor, multiply, rounded
from .launch import Launch, Tile
from .product_int8 import product, resize
from .pyramid_pooling import cells_of, row_sums


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
    branch, row_cell, before, cell, exists, j, top, bottom, area, first_row, end_row = cells_of(
        block, height, width, BINS, BLOCK_CELLS
    )
    share = tl.div_rn(tl.full((BLOCK_CELLS,), 1.0, tl.float32), area.to(tl.float32))
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
        row_sums(x, sums, bins, precision),
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
