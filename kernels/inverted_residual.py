"""inverted_residual: 1x1 expand + act -> depthwise 3x3 + act -> 1x1 [+ x]; nothing expanded is stored.

A depthwise needs its pixels' neighbours, and Triton has no shift within a tile. So a program owns a row of
blocks of ROWS x COLUMNS output pixels, one block a lane, and expands all of the (ROWS + 2)(COLUMNS + 2) pixels
that a block looks at (stride 1), lane by lane: all neighbours meet in the same lane. Expanded channels lie along
the products' rows and pixels along their columns, those of one row of the blocks in one product: which pixel of its
block a column is then is a register's number, and taking a product's result apart (:func:`halves`) moves nothing.
The price is that borders between blocks are expanded again: 6 times in 1 x 2 blocks, 4 times in 2 x 2.

On a small plane there are fewer tiles than multiprocessors. Then SLICES programs share a tile's expanded channels: each
stores its float32 share of the result, and the one that arrives last adds all shares in the order of the slices,
whatever the order of arrival: the same bits each time. An integer counter for each tile tells who is last. It is
at zero again when the launch ends, for the next call or a CUDA graph's next replay. Clusters of blocks, which would meet
in shared memory, exist from sm_90 on only; this one way serves every architecture.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastscnn_fast.lower.gpu import chunk, chunks, columns, computed_channels, powers
from fastscnn_fast.program.layers import Layer
from fastscnn_fast.program.memory import COUNTERS, PARTIALS, Buffer, cdiv, rounded_up, wide

from .common import activate, cast, offset, product
from .launch import Launch, Tile


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a (ROWS, COLUMNS) tile; which half is a register's number, so nothing moves."""
    parted = tl.reshape(tile, (ROWS, 2, COLUMNS // 2))
    return tl.split(tl.permute(parted, (0, 2, 1)))


@triton.jit
def beside(left, right, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Two (ROWS, COLUMNS) tiles as one of twice the columns."""
    joined = tl.permute(tl.join(left, right), (0, 2, 1))
    return tl.reshape(joined, (ROWS, 2 * COLUMNS))


@triton.jit
def apart(tile, COUNT: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """The ``COUNT`` tiles (ROWS, LANES) beside each other in one."""
    parts = (tile,)
    for level in tl.static_range(4):
        if COUNT >> level > 1:
            parted = ()
            for part in tl.static_range(1 << level):
                parted = parted + halves(parts[part], ROWS, (COUNT >> level) * LANES)
            parts = parted
    return parts


@triton.jit
def together(parts, COUNT: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """``COUNT`` tiles (ROWS, LANES) beside each other as one."""
    for level in tl.static_range(4):
        if COUNT >> level > 1:
            joined = ()
            for part in tl.static_range(COUNT >> level + 1):
                pair = beside(parts[2 * part], parts[2 * part + 1], ROWS, LANES << level)
                joined = joined + (pair,)  # noqa: RUF005
            parts = joined
    return parts[0]


@triton.jit
def arrives_last(counter, SLICES: tl.constexpr):
    """Whether this program is the last of ``SLICES`` that come here; the counter is then at zero again.

    What all of them wrote before is then to be read. The integer atomic releases it and acquires the others',
    the barriers before and after it do so for the whole program.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == SLICES - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def inverted_residual_kernel(
    x,
    expand_weight,
    expand_bias,
    depthwise_weight,
    depthwise_bias,
    project_weight,
    project_bias,
    partials,
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
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,
    PIECES: tl.constexpr,
    LOOPED: tl.constexpr,
    BLOCKS_IN: tl.constexpr,
    BLOCK_MID: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    SLICES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """x (H, W, IN_PITCH) -> out (H', W', OUT_PITCH) of image program // tiles; the third dimension are the slices."""
    image = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    x += image.to(tl.int64) * x_image
    out += image.to(tl.int64) * out_image
    o = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    MID_ROW: tl.constexpr = (MID + 63) // 64 * 64
    OUT_ROW: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT * BLOCK_OUT
    OUT_STORED: tl.constexpr = (OUT + 15) // 16 * 16
    PIXELS: tl.constexpr = ROWS * COLUMNS * LANES
    row = tile // tiles_across * ROWS
    column = tile % tiles_across * (LANES * COLUMNS)
    bias = tl.load(project_bias + o)
    if SLICES > 1:  # counted by the first slice
        bias = tl.where(tl.program_id(2) == 0, bias, 0.0)
    total = tl.broadcast_to(bias[:, None], (BLOCK_OUT, PIXELS))
    for step in range(STEPS):
        m = (tl.program_id(2) * STEPS + step) * BLOCK_MID + tl.arange(0, BLOCK_MID)
        taps = ()
        for tap in tl.static_range(9):
            taps = taps + (tl.load(depthwise_weight + tap * MID_ROW + m)[:, None],)  # noqa: RUF005
        expand_start = tl.load(expand_bias + m)[:, None]
        depthwise_start = tl.load(depthwise_bias + m)[:, None]
        sums = ()
        for _ in tl.static_range(ROWS * COLUMNS):
            sums = sums + (tl.broadcast_to(depthwise_start, (BLOCK_MID, LANES)),)  # noqa: RUF005
        for dy in tl.static_range((ROWS - 1) * STRIDE + 3):
            y = row * STRIDE + dy - 1
            # Outside the image it is the expanded value that is zero, not x.
            start = tl.where((y >= 0) & (y < height), expand_start, float("-inf"))
            dz = 0
            for piece in tl.static_range(len(PIECES)):
                seen = tl.arange(0, PIECES[piece] * LANES)
                z = column * STRIDE + dz - 1 + seen % LANES * (COLUMNS * STRIDE) + seen // LANES
                across = (z >= 0) & (z < width)
                inside = across & (y + tl.zeros_like(z) >= 0) & (y + tl.zeros_like(z) < height)
                expanded = tl.where(across[None, :], start, float("-inf"))
                if ACTIVATION == "none":
                    expanded = tl.broadcast_to(expand_start, (BLOCK_MID, PIECES[piece] * LANES))
                at = x + offset(y, z, width, IN_PITCH, WIDE)[:, None]
                if LOOPED:
                    for i0 in range(0, IN, BLOCKS_IN[0]):
                        i = i0 + tl.arange(0, BLOCKS_IN[0])
                        right = tl.load(at + i, mask=inside[:, None], other=0.0)
                        left = tl.load(expand_weight + i[:, None] * MID_ROW + m)
                        expanded = product(tl.trans(left), tl.trans(right), expanded, PRECISION)
                else:
                    i0 = 0
                    for number in tl.static_range(len(BLOCKS_IN)):
                        i = i0 + tl.arange(0, BLOCKS_IN[number])
                        right = tl.load(at + i, mask=inside[:, None], other=0.0)
                        left = tl.load(expand_weight + i[:, None] * MID_ROW + m)
                        expanded = product(tl.trans(left), tl.trans(right), expanded, PRECISION)
                        i0 += BLOCKS_IN[number]
                expanded = activate(expanded, ACTIVATION)
                if ACTIVATION == "none":
                    expanded = tl.where(inside[None, :], expanded, 0.0)
                if MID % BLOCK_MID != 0:  # even where x is infinite
                    expanded = tl.where((m < MID)[:, None], expanded, 0.0)
                parts = apart(expanded, PIECES[piece], BLOCK_MID, LANES)
                # Each block's pixel (r, k) looks at (dy, dz) through one tap, if at all; constants have no
                # names here, because an assignment would make them values.
                for part in tl.static_range(PIECES[piece]):
                    for r in tl.static_range(ROWS):
                        for k in tl.static_range(COLUMNS):
                            if (
                                dy - r * STRIDE >= 0
                                and dy - r * STRIDE < 3
                                and FIRST[piece] + part - k * STRIDE >= 0
                                and FIRST[piece] + part - k * STRIDE < 3
                            ):
                                by_tap = (
                                    parts[part]
                                    * taps[(dy - r * STRIDE) * 3 + FIRST[piece] + part - k * STRIDE]
                                )
                                more = sums[r * COLUMNS + k] + by_tap
                                sums = (
                                    sums[: r * COLUMNS + k] + (more,) + sums[r * COLUMNS + k + 1 :]  # noqa: RUF005
                                )
                dz += PIECES[piece]
        parts = ()
        for part in tl.static_range(ROWS * COLUMNS):
            parts = parts + (cast(activate(sums[part], ACTIVATION), project_weight, PRECISION),)  # noqa: RUF005
        right = together(parts, ROWS * COLUMNS, BLOCK_MID, LANES)
        left = tl.load(project_weight + m[:, None] * OUT_ROW + o)
        total = product(tl.trans(left), right, total, PRECISION)
    result = tl.trans(total)
    pixel = tl.arange(0, PIXELS)
    y = row + pixel // LANES // COLUMNS
    z = column + pixel % LANES * COLUMNS + pixel // LANES % COLUMNS
    mask = ((y < out_height) & (z < out_width))[:, None] & (o < OUT_STORED)
    residual = x + offset(y, z, width, IN_PITCH, WIDE)[:, None] + o
    to = out + offset(y, z, out_width, OUT_PITCH, WIDE)[:, None] + o
    if SLICES == 1:
        finish(result, residual, to, mask, o, OUT, RESIDUAL, PRECISION)
    else:
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        partials += tile.to(tl.int64) * (SLICES * PIXELS * BLOCK_OUT)
        partials += pixel[:, None] * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        tl.store(partials + tl.program_id(2) * (PIXELS * BLOCK_OUT), result)
        if arrives_last(counters + tile, SLICES):
            result = tl.zeros((PIXELS, BLOCK_OUT), tl.float32)
            for slice in range(SLICES):
                result += tl.load(partials + slice * (PIXELS * BLOCK_OUT), cache_modifier=".cg")
            finish(result, residual, to, mask, o, OUT, RESIDUAL, PRECISION)


@triton.jit
def finish(
    result,
    residual,
    to,
    mask,
    o,
    OUT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what the block was given, and stores zeros to channels that exist only in memory."""
    if RESIDUAL:
        result += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
    if OUT % 16 != 0:
        result = tl.where((o < OUT)[None, :], result, 0.0)
    tl.store(to, cast(result, to, PRECISION), mask=mask)


def launches(
    layer: Layer, x: Buffer, out: Buffer, weights: dict[str, Buffer], tile: Tile, precision: str
) -> list[Launch]:
    """x (N, H, W, C), out (N, H', W', O)."""
    images, height, width, _ = x.shape
    _, out_height, out_width, _ = out.shape
    across = cdiv(out_width, tile.columns * tile.pixels)
    tiles = across * cdiv(out_height, tile.rows)
    looped = x.dtype == torch.float32 and precision == "ieee"
    block_out = columns(layer.out_channels)
    across_out = cdiv(layer.out_channels, block_out)
    mid = rounded_up(layer.mid_channels, 64)
    block = min(mid & -mid, tile.block)
    steps = cdiv(layer.mid_channels, block)
    slices = max(n for n in range(1, tile.slices + 1) if steps % n == 0)
    shape = (tiles * images, across_out, slices, tile.rows * tile.columns * tile.pixels, block_out)
    partials = Buffer.dense(PARTIALS, torch.float32, shape)
    counters = Buffer.dense(COUNTERS, torch.int32, shape[:2])
    pieces = powers((tile.columns - 1) * layer.stride + 3)
    return [
        Launch(
            inverted_residual_kernel,
            (tiles * images, across_out, slices),
            {
                "x": x,
                **weights,
                "partials": partials if slices > 1 else out,
                "counters": counters if slices > 1 else out,
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
                "LANES": tile.pixels,
                "ROWS": tile.rows,
                "COLUMNS": tile.columns,
                "FIRST": tuple(sum(pieces[:i]) for i in range(len(pieces))),
                "PIECES": pieces,
                # Multiply-adds hold their operands in registers: not those of all input channels at once.
                "LOOPED": looped,
                "BLOCKS_IN": (min(chunk(layer.in_channels), tile.block),)
                if looped
                else chunks(layer.in_channels, tile.block),
                "BLOCK_MID": block,
                "BLOCK_OUT": block_out,
                "SLICES": slices,
                "STEPS": steps // slices,
            },
            tile.warps,
            tile.stages,
        )
    ]
