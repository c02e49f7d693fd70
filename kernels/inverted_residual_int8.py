"""inverted_residual in int8: 1x1 expand -> depthwise 3x3 -> 1x1 [+ x], bytes each; nothing expanded is stored.

A program owns a row of blocks of ROWS x COLUMNS output pixels, one block a lane, and some of the expanded channels: each
expanded pixel that the blocks look at is a tile of its own, lane by lane, of which three beside each other are packed
into a word, one instruction's factors with a row of taps. Programs add their shares of the projection to sums of int32,
which are exact in any order; the one that arrives last makes bytes of them and leaves zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastscnn_fast.lower.gpu import powers
from fastscnn_fast.lower.gpu_int8 import columns, terms
from fastscnn_fast.program.layers import Layer
from fastscnn_fast.program.memory import COUNTERS, Buffer, cdiv, rounded_up, wide

from .common import lies_in, offset
from .integers import add_dot4, factor, multiply, nearest, rounded, signed, within, word
from .inverted_residual import apart, arrives_last, together
from .launch import Launch, Tile

#: A zero point that leaves nothing of a sum, whose product is below 2^30 (quantise.check_sums).
OUTSIDE = tl.constexpr(-(2**30))


@triton.jit
def finish(
    total,
    residual,
    to,
    mask,
    multiplier,
    input_zero,
    residual_multiplier,
    project_zero,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums of the projection to bytes, what the block was given added before they are rounded."""
    value = total.to(tl.float32) * multiplier
    if RESIDUAL:
        own = tl.load(residual, mask=mask, other=0).to(tl.int32) - tl.load(input_zero)
        value += own.to(tl.float32) * tl.load(residual_multiplier)
    tl.store(to, rounded(value, tl.load(project_zero), PRECISION), mask=mask)


@triton.jit
def inverted_residual_int8_kernel(
    x,
    expand_weight,
    expand_bias,
    expand_multiplier,
    expand_zero,
    depthwise_weight,
    depthwise_bias,
    depthwise_multiplier,
    depthwise_zero,
    project_weight,
    project_bias,
    project_multiplier,
    project_zero,
    input_zero,
    residual_multiplier,
    counters,
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
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCKS_IN: tl.constexpr,
    BLOCK_MID: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    SLICES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """x (H, W, IN_PITCH) -> out (H', W', OUT_PITCH) of image program // tiles."""
    image = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    x += image.to(tl.int64) * x_image
    out += image.to(tl.int64) * out_image
    row = tile // tiles_across * ROWS
    column = tile % tiles_across * (LANES * COLUMNS)
    o = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    lane = tl.arange(0, LANES)
    first = column * STRIDE - 1
    PIXELS: tl.constexpr = ROWS * COLUMNS * LANES
    zero = tl.load(expand_zero)
    depthwise_out = tl.load(depthwise_zero)
    total = tl.zeros((BLOCK_OUT, PIXELS), tl.int32)
    for step in range(STEPS):
        m = (tl.program_id(2) * STEPS + step) * BLOCK_MID + tl.arange(0, BLOCK_MID)
        taps = ()
        for above in tl.static_range(3):
            tap = tl.load(depthwise_weight + above * MID + m)[:, None]
            taps = taps + (tap, tap << 8)  # noqa: RUF005
        sums = ()
        for _ in tl.static_range(ROWS * COLUMNS):
            of_depthwise = tl.load(depthwise_bias + m)[:, None]
            sums = sums + (tl.broadcast_to(of_depthwise, (BLOCK_MID, LANES)),)  # noqa: RUF005
        of_expand = tl.load(expand_bias + m)[:, None]
        by_expand = tl.load(expand_multiplier + m)[:, None]
        for dy in tl.static_range((ROWS - 1) * STRIDE + 3):
            y = row * STRIDE + dy - 1
            dz = 0
            seen = ()
            for piece in tl.static_range(len(PIECES)):
                pixel = tl.arange(0, PIECES[piece] * LANES)
                z = column * STRIDE + dz - 1 + pixel % LANES * (COLUMNS * STRIDE) + pixel // LANES
                inside = lies_in(z, width) & lies_in(y + tl.zeros_like(z), height)
                expanded = tl.broadcast_to(of_expand, (BLOCK_MID, PIECES[piece] * LANES))
                at = x + offset(y, z, width, IN_PITCH, WIDE)[:, None]
                i0 = 0
                for number in tl.static_range(len(BLOCKS_IN)):
                    i = i0 + tl.arange(0, BLOCKS_IN[number])
                    right = signed(tl.load(at + i, mask=inside[:, None], other=0), PRECISION)
                    left = tl.load(expand_weight + m[:, None] * IN + i)
                    expanded = multiply(left, tl.trans(right), expanded, PRECISION)
                    i0 += BLOCKS_IN[number]
                q = nearest(expanded.to(tl.float32) * by_expand, zero, PRECISION)
                seen = seen + apart(q, PIECES[piece], BLOCK_MID, LANES)
                dz += PIECES[piece]
            for k in tl.static_range(COLUMNS):
                # The first of a word's four pixels is even, so that at stride 1 two outputs share one.
                if k * STRIDE % 2 == 0:
                    four = word(
                        seen[k * STRIDE],
                        seen[k * STRIDE + 1],
                        seen[k * STRIDE + 2],
                        seen[min(k * STRIDE + 3, (COLUMNS - 1) * STRIDE + 2)],
                        PRECISION,
                    )
                    # Outside the image it is the expanded byte that is zero, not x.
                    inside = within(first + lane * (COLUMNS * STRIDE) + k * STRIDE, width)
                    inside = tl.where(lies_in(y + lane * 0, height), inside, 0)
                    four = four & inside[None, :]
                for r in tl.static_range(ROWS):
                    if dy - r * STRIDE >= 0 and dy - r * STRIDE < 3:
                        more = add_dot4(
                            four,
                            taps[(dy - r * STRIDE) * 2 + k * STRIDE % 2],
                            sums[r * COLUMNS + k],
                            PRECISION,
                        )
                        sums = sums[: r * COLUMNS + k] + (more,) + sums[r * COLUMNS + k + 1 :]  # noqa: RUF005
        value = together(sums, ROWS * COLUMNS, BLOCK_MID, LANES).to(tl.float32)
        value *= tl.load(depthwise_multiplier + m)[:, None]
        left = tl.load(project_weight + o[:, None] * MID + m)
        total = multiply(left, factor(value, depthwise_out, PRECISION), total, PRECISION)
    ready = True
    total = tl.trans(total)
    if SLICES > 1:
        at_tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        counters += at_tile.to(tl.int64) * (PIXELS * BLOCK_OUT + 32)
        shared = (
            counters + 32 + (tl.arange(0, PIXELS)[:, None] * BLOCK_OUT + tl.arange(0, BLOCK_OUT))
        )
        tl.atomic_add(shared, total, sem="relaxed")
        ready = arrives_last(counters, SLICES)
    if ready:
        if SLICES > 1:
            total = tl.load(shared, cache_modifier=".cg")
            tl.store(shared, tl.zeros_like(total))
        pixel = tl.arange(0, PIXELS)
        y = row + pixel // LANES // COLUMNS
        z = column + pixel % LANES * COLUMNS + pixel // LANES % COLUMNS
        finish(
            total + tl.load(project_bias + o)[None, :],
            x + offset(y, z, width, IN_PITCH, WIDE)[:, None] + o,
            out + offset(y, z, out_width, OUT_PITCH, WIDE)[:, None] + o,
            ((y < out_height) & (z < out_width))[:, None] & (o < OUT),
            tl.load(project_multiplier + o)[None, :],
            input_zero,
            residual_multiplier,
            project_zero,
            RESIDUAL,
            PRECISION,
        )


def launches(
    layer: Layer, x: Buffer, out: Buffer, weights: dict[str, Buffer], tile: Tile, precision: str
) -> list[Launch]:
    """x (N, H, W, C), out (N, H', W', O)."""
    images, height, width, _ = x.shape
    _, out_height, out_width, _ = out.shape
    across = cdiv(out_width, tile.columns * tile.pixels)
    tiles = across * cdiv(out_height, tile.rows)
    block_out = columns(layer.out_channels)
    across_out = cdiv(terms(layer.out_channels), block_out)
    mid = rounded_up(layer.mid_channels, 64)
    block = min(mid & -mid, max(tile.block, 32))
    slices = max(n for n in range(1, tile.slices + 1) if mid // block % n == 0)
    # Of each tile a count, in a line of its own, and its sums.
    held = 32 + tile.rows * tile.columns * tile.pixels * block_out
    counters = Buffer.dense(COUNTERS, torch.int32, (tiles * images, across_out, held))
    return [
        Launch(
            inverted_residual_int8_kernel,
            (tiles * images, across_out, slices),
            {
                "x": x,
                **weights,
                "counters": counters if slices > 1 else weights["expand_bias"],
                "out": out,
                "height": height,
                "width": width,
                "out_height": out_height,
                "out_width": out_width,
                "tiles": tiles,
                "tiles_across": across,
                "x_image": x.strides[0],
                "out_image": out.strides[0],
                "IN": terms(layer.in_channels),
                "IN_PITCH": x.strides[2],
                "MID": mid,
                "OUT": terms(layer.out_channels),
                "OUT_PITCH": out.strides[2],
                "STRIDE": layer.stride,
                "RESIDUAL": layer.residual,
                "PRECISION": precision,
                "WIDE": wide(x, out),
                "LANES": tile.pixels,
                "ROWS": tile.rows,
                "COLUMNS": tile.columns,
                "PIECES": powers((tile.columns - 1) * layer.stride + 3),
                "BLOCKS_IN": powers(terms(layer.in_channels)),
                "BLOCK_MID": block,
                "BLOCK_OUT": block_out,
                "SLICES": slices,
                "STEPS": mid // block // slices,
            },
            tile.warps,
            tile.stages,
            fused=False,
        )
    ]
