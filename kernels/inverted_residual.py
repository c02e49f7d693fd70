"""inverted_residual: 1x1 expand + act -> depthwise 3x3 + act -> 1x1 [+ x]; nothing expanded is stored.

A depthwise needs its pixels' neighbours, and Triton has no shift within a tile. So a program owns a grid of
blocks of ROWS x COLUMNS output pixels, one block a lane, and computes each of the (ROWS + 2)(COLUMNS + 2)
expanded pixels that a block looks at (stride 1) as a tile of its own, lane by lane, adding it at once to
every depthwise sum it belongs to. All neighbours thus meet in the same lane: no shuffles, no shared memory.
The price is that borders between blocks are expanded again: 4 times in 2 x 2 blocks instead of 9.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastscnn_fast.lower.gpu import chunks, columns, computed_channels
from fastscnn_fast.program.layers import Layer
from fastscnn_fast.program.memory import Buffer, cdiv, rounded_up, wide

from .common import activate, cast, offset, product
from .launch import Launch, Tile


@triton.jit
def inverted_residual_kernel(
    x,
    expand_weight,
    expand_bias,
    depthwise_weight,
    depthwise_bias,
    project_weight,
    project_bias,
    out,
    height,
    width,
    out_height,
    out_width,
    tiles,
    tiles_across,
    x_image,
    out_image,
    IN: tl.constexpr,
    IN_PITCH: tl.constexpr,
    MID: tl.constexpr,
    OUT: tl.constexpr,
    OUT_PITCH: tl.constexpr,
    STRIDE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS_IN: tl.constexpr,
    BLOCK_MID: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """x (H, W, IN_PITCH) -> out (H', W', OUT_PITCH) of image program // tiles."""
    image = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    x += image.to(tl.int64) * x_image
    out += image.to(tl.int64) * out_image
    row = tile // tiles_across * ROWS + tl.zeros((BLOCK_PIXELS,), tl.int32)
    column = (tile % tiles_across * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)) * COLUMNS
    o0 = tl.program_id(1) * BLOCK_OUT
    o = o0 + tl.arange(0, BLOCK_OUT)
    MID_ROW: tl.constexpr = (MID + 63) // 64 * 64
    OUT_ROW: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT * BLOCK_OUT
    OUT_STORED: tl.constexpr = (OUT + 15) // 16 * 16
    results = ()
    for _ in tl.static_range(ROWS * COLUMNS):
        start = tl.zeros((BLOCK_PIXELS, BLOCK_OUT), tl.float32) + tl.load(project_bias + o)
        results = results + (start,)  # noqa: RUF005
    for m0 in range(0, MID, BLOCK_MID):
        m = m0 + tl.arange(0, BLOCK_MID)
        taps = ()
        for tap in tl.static_range(9):
            taps = taps + (tl.load(depthwise_weight + tap * MID_ROW + m),)  # noqa: RUF005
        sums = ()
        for _ in tl.static_range(ROWS * COLUMNS):
            bias = tl.zeros((BLOCK_PIXELS, BLOCK_MID), tl.float32) + tl.load(depthwise_bias + m)
            sums = sums + (bias,)  # noqa: RUF005
        for dy in tl.static_range((ROWS - 1) * STRIDE + 3):
            for dz in tl.static_range((COLUMNS - 1) * STRIDE + 3):
                y = row * STRIDE + dy - 1
                z = column * STRIDE + dz - 1
                inside = (y >= 0) & (y < height) & (z >= 0) & (z < width)
                expanded = tl.zeros((BLOCK_PIXELS, BLOCK_MID), tl.float32)
                expanded += tl.load(expand_bias + m)
                i0 = 0
                for block in tl.static_range(len(BLOCKS_IN)):
                    i = i0 + tl.arange(0, BLOCKS_IN[block])
                    at = x + offset(y, z, width, IN_PITCH, WIDE)[:, None] + i
                    left = tl.load(at, mask=inside[:, None], other=0.0)
                    right = tl.load(expand_weight + i[:, None] * MID_ROW + m)
                    i0 += BLOCKS_IN[block]
                    expanded = product(left, right, expanded, PRECISION)
                # Outside the image it is the expanded value that is zero, not x.
                exists = inside[:, None]
                if MID % BLOCK_MID != 0:  # even where x is infinite
                    exists = exists & (m < MID)[None, :]
                expanded = tl.where(exists, activate(expanded, ACTIVATION), 0.0)
                # Each block's pixel (r, k) looks at (dy, dz) through one tap, if at all; constants have no
                # names here, because an assignment would make them values.
                for r in tl.static_range(ROWS):
                    for k in tl.static_range(COLUMNS):
                        if (
                            dy - r * STRIDE >= 0
                            and dy - r * STRIDE < 3
                            and dz - k * STRIDE >= 0
                            and dz - k * STRIDE < 3
                        ):
                            by_tap = expanded * taps[(dy - r * STRIDE) * 3 + dz - k * STRIDE]
                            total = sums[r * COLUMNS + k] + by_tap
                            sums = (
                                sums[: r * COLUMNS + k] + (total,) + sums[r * COLUMNS + k + 1 :]  # noqa: RUF005
                            )
        right = tl.load(project_weight + m[:, None] * OUT_ROW + o)
        for block in tl.static_range(ROWS * COLUMNS):
            left = cast(activate(sums[block], ACTIVATION), project_weight, PRECISION)
            total = product(left, right, results[block], PRECISION)
            results = results[:block] + (total,) + results[block + 1 :]  # noqa: RUF005
    for block in tl.static_range(ROWS * COLUMNS):
        y = row + block // COLUMNS
        z = column + block % COLUMNS
        result = results[block]
        mask = ((y < out_height) & (z < out_width))[:, None] & (o < OUT_STORED)
        if RESIDUAL:
            at = x + offset(y, z, width, IN_PITCH, WIDE)[:, None] + o
            result += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if OUT != OUT_STORED:
            result = tl.where((o < OUT)[None, :], result, 0.0)
        to = out + offset(y, z, out_width, OUT_PITCH, WIDE)[:, None] + o
        tl.store(to, cast(result, out, PRECISION), mask=mask)


def launches(
    layer: Layer, x: Buffer, out: Buffer, weights: dict[str, Buffer], tile: Tile, precision: str
) -> list[Launch]:
    """x (N, H, W, C), out (N, H', W', O)."""
    images, height, width, _ = x.shape
    _, out_height, out_width, _ = out.shape
    across = cdiv(out_width, tile.columns * tile.pixels)
    tiles = across * cdiv(out_height, tile.rows)
    block_out = columns(layer.out_channels)
    mid = rounded_up(layer.mid_channels, 64)
    return [
        Launch(
            inverted_residual_kernel,
            (tiles * images, cdiv(layer.out_channels, block_out)),
            {
                "x": x,
                **weights,
                "out": out,
                "height": height,
                "width": width,
                "out_height": out_height,
                "out_width": out_width,
                "tiles": tiles,
                "tiles_across": across,
                "x_image": x.strides[0],
                "out_image": out.strides[0],
                "IN": computed_channels(layer.in_channels),
                "IN_PITCH": x.strides[2],
                "MID": layer.mid_channels,
                "OUT": layer.out_channels,
                "OUT_PITCH": out.strides[2],
                "STRIDE": layer.stride,
                "RESIDUAL": layer.residual,
                "ACTIVATION": layer.activation,
                "PRECISION": precision,
                "WIDE": wide(x, out),
                "BLOCK_PIXELS": tile.pixels,
                "ROWS": tile.rows,
                "COLUMNS": tile.columns,
                "BLOCKS_IN": chunks(layer.in_channels),
                "BLOCK_MID": min(mid & -mid, tile.block),
                "BLOCK_OUT": block_out,
            },
            tile.warps,
            tile.stages,
        )
    ]
