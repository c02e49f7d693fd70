"""How each op's work is cut into programs: a small reviewed table, and the rule for what it does not list.

The table was chosen on machine code (resident warps, tensor-core instructions, no spills: tests/gpu/test_aot.py),
not by timing: it is not measured on a GPU. ``fastscnn_fast tune`` measures and keeps better ones.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import prod

import torch

from ...kernels.launch import Tile
from ...lower.gpu import chunk, chunks, computed_channels, powers
from ...lower.gpu_int8 import terms
from ...program.layers import Layer
from ...program.memory import cdiv
from ..gpus import GPUS, INTERPRETER, MULTIPROCESSORS, Architecture

# Eight warps and one stage: the nine taps' loads fly together from registers, where a pipeline would first
# copy them through shared memory 8 bytes at a time; four warps of 64 pixels spill.
_HALF = {
    "stem_conv": Tile(256, stages=1),
    "dsconv": Tile(64, block=32, warps=8, stages=1),
    "inverted_residual": Tile(16, block=64, stages=1),
    "pyramid_pooling": Tile(32, block=64),
    "feature_fusion": Tile(32, block=128, stages=1),
    "upsample_classify": Tile(256, rows=8),
}
# Triton multiplies on sm_75 without tensor cores, from operands in shared memory (64 KiB in all) and with
# each thread's share in registers: half the tile and more warps.
_TURING = {
    "dsconv": Tile(32, block=16, stages=1),
    "inverted_residual": Tile(8, block=32, warps=8, stages=1),
    "pyramid_pooling": Tile(16, block=16, stages=1),
    "feature_fusion": Tile(16, block=16, warps=8, stages=1),
}
# Tensor memory holds sm_100's sums: four warps do not spill there, eight do.
_BLACKWELL = {"dsconv": Tile(64, block=32, stages=1)}
# Where warps multiply on their own, 64 pixels of channels that come by 16 spill under Triton 3.6; so do, 32 channels at
# a time, those with a last 1x1 on sm_80 and those of 128 channels without one on sm_86 to sm_89.
_BY_WARPS = (80, 86, 87, 89, 120)
_NARROW = Tile(32, block=16, stages=1)
_WITH_LAST = Tile(64, block=16, warps=8, stages=1)
_WIDE = Tile(32, block=32, stages=1)
_HALF_BY_ARCHITECTURE: dict[Architecture, dict[str, Tile]] = {75: _TURING, 100: _BLACKWELL}
# NVIDIA's products of float32 are multiply-adds: smaller tiles on more warps.
_FLOAT = {
    "stem_conv": Tile(64, stages=1),
    "dsconv": Tile(32, block=32, warps=8, stages=1),
    "inverted_residual": Tile(16, block=32, stages=1),
    "pyramid_pooling": Tile(16, block=32, warps=8, stages=1),
    "feature_fusion": Tile(8, block=32, warps=8, stages=1),
    "upsample_classify": Tile(256, rows=8),
}
# AMD's are matrix instructions, with 512 registers a lane for four waves and half of them for eight.
_FLOAT_AMD = {
    "dsconv": Tile(32, block=32, stages=1),
    "feature_fusion": Tile(16, block=32, warps=8, stages=1),
}
_FLOAT_BY_ARCHITECTURE: dict[Architecture, dict[str, Tile]] = {
    "gfx90a": _FLOAT_AMD,
    "gfx942": _FLOAT_AMD,
}
# Of dsconv 128 channels spill by 32 at a time on some of NVIDIA's under Triton 3.6 or 3.9; by 16 none does.
_FLOAT_BY_16 = (("dsconv", 128),)
# Of bytes: with all channels at a time a thread has the same ones of several pixels, whose weights it loads once.
_INT8 = {
    "stem_conv": Tile(256, stages=1),
    "dsconv": Tile(64, block=128, stages=1),
    "inverted_residual": Tile(8, block=64, stages=1),
    "pyramid_pooling": Tile(16, block=128),
    "feature_fusion": Tile(64, block=128, stages=1),
}
# Blocks of a lane in int8, the largest first.
_BLOCKS_INT8 = ((4, 4), (4, 2), (2, 2), (1, 1))
# Warp instructions as counted on sm_90 (inverted_residual, 8 lanes, 64 channels): of a step for each pixel that a lane
# expands, each of its outputs and each product; of a program besides, and for each channel of its outputs.
_OF_EXPANDED_INT8, _OF_OUTPUT_INT8, _OF_PRODUCT_INT8 = 127, 92, 89
_OF_PROGRAM_INT8, _OF_CHANNEL_INT8 = 861, 75 / 64
# Outputs of a lane with which a program has one step or spills; and where warps multiply on their own, that spill.
_MOST_IN_A_LOOP, _MOST_BY_WARPS = 4, 8
# One entry: numpy does as much as it is given, and tiles decide only how often Python is called.
_INTERPRETED = {
    "stem_conv": Tile(512),
    "dsconv": Tile(256, block=128),
    "inverted_residual": Tile(32, block=64, rows=4, slices=3),
    "pyramid_pooling": Tile(256, block=128),
    "feature_fusion": Tile(64, block=128),
    "upsample_classify": Tile(128, rows=8),
}


# An unlisted GPU is taken for one of A100's multiprocessors, of 100 KiB of shared memory each.
_UNKNOWN_PROCESSORS = GPUS[80].processors


def processors(architecture: Architecture) -> int:
    """Multiprocessors of a usual GPU of that architecture."""
    gpu = GPUS.get(architecture)
    return _UNKNOWN_PROCESSORS if gpu is None else gpu.processors


def _most_pixels(architecture: Architecture) -> int:
    """Bytes of x that a program of inverted_residual may keep in shared memory while it goes over the expanded channels.

    So that eight warps share a multiprocessor of 164 KiB and more; of sm_75's 64 KiB, where products copy them
    once more; of 100 KiB, the rule for unknown architectures too.
    """
    held = MULTIPROCESSORS.get(architecture)
    if held is None or 64 * 1024 < held.shared < 164 * 1024:
        return 36 * 1024
    return (24 if held.shared == 64 * 1024 else 64) * 1024


# Blocks of a lane. The larger, the less is expanded twice: 4, 6 and 9 times each pixel at stride 1.
_BLOCKS = ((2, 2), (1, 2), (1, 1))


def _most_outputs(layer: Layer, dtype: torch.dtype, architecture: Architecture) -> int:
    """Pixels of a block that spill nowhere under Triton 3.9: sm_90's products take their operands from shared memory."""
    narrow = computed_channels(layer.in_channels) <= 64
    if dtype == torch.float32 or not isinstance(architecture, int):
        return 2
    if architecture == 90:
        return 4 if narrow and layer.stride == 1 else 2
    return 2 if narrow and (layer.stride == 1 or architecture == 80) else 1


# Warp instructions as counted on sm_90 in half precision (inverted_residual, 64 expanded channels a step): of a step for
# each pixel that it expands, each of its outputs and each of its products; of a program besides its steps; of the
# program that arrives last for each partial sum.
_OF_EXPANDED, _OF_OUTPUT, _OF_PRODUCT, _OF_PROGRAM, _OF_PARTIAL = 6, 18, 80, 2500, 1 / 13
# A program alone on a multiprocessor waits for itself: its way counts as if there were some more of them.
_ALONE = 1.125


def tile(layer: Layer, dtype: torch.dtype, architecture: Architecture, pixels: int) -> Tile:
    """The tile of ``layer`` with ``pixels`` output pixels, of all images together, on ``architecture``."""
    if architecture == INTERPRETER:
        return _INTERPRETED[layer.op]
    table, others = _HALF, _HALF_BY_ARCHITECTURE
    if dtype == torch.float32:
        table, others = _FLOAT, _FLOAT_BY_ARCHITECTURE
    if dtype == torch.int8:
        table, others = _INT8, {}
    chosen = (table | others.get(architecture, {}))[layer.op]
    if layer.op == "dsconv" and table is _HALF and architecture in _BY_WARPS:
        if chunk(layer.in_channels) == 16:
            return _NARROW
        if layer.last_channels and architecture == 80:
            return _WITH_LAST
        wide = chunk(layer.in_channels) == 128 and architecture in (86, 87, 89)
        if wide and not layer.last_channels:
            return _WIDE
    by_16 = table is _FLOAT and isinstance(architecture, int)
    if by_16 and (layer.op, chunk(layer.in_channels)) in _FLOAT_BY_16:
        chosen = replace(chosen, block=16)
    if layer.op != "inverted_residual":
        return chosen
    if dtype == torch.int8:
        return _cut_int8(chosen, layer, architecture, pixels)
    if table is _HALF and architecture in _BY_WARPS:
        chosen = replace(chosen, block=32)
    return _cut(chosen, layer, dtype, architecture, pixels)


def _cut_int8(chosen: Tile, layer: Layer, architecture: Architecture, pixels: int) -> Tile:
    """With the block and the slices with which the busiest multiprocessor has the least to do."""
    count = cdiv(layer.mid_channels, chosen.block)

    def longest(cut: tuple[tuple[int, int], int]) -> float:
        (rows, columns), slices = cut
        high, wide = (rows - 1) * layer.stride + 3, (columns - 1) * layer.stride + 3
        products = high * len(powers(wide)) * len(powers(terms(layer.in_channels)))
        step = _OF_EXPANDED_INT8 * high * wide + _OF_OUTPUT_INT8 * rows * columns
        step += _OF_PRODUCT_INT8 * products
        outputs = rows * columns * layer.out_channels
        program = count // slices * step + _OF_PROGRAM_INT8 + _OF_CHANNEL_INT8 * outputs
        programs = cdiv(pixels, chosen.pixels * rows * columns) * slices
        return cdiv(programs, processors(architecture)) * program

    by_warps = architecture in _BY_WARPS
    (rows, columns), slices = min(
        (
            (block, slices)
            for block in _BLOCKS_INT8
            for slices in range(1, count + 1)
            if count % slices == 0
            and (slices == count or prod(block) <= _MOST_IN_A_LOOP)
            and (prod(block) <= _MOST_BY_WARPS or not by_warps)
        ),
        key=longest,
    )
    return replace(chosen, rows=rows, columns=columns, slices=slices)


def _cut(
    chosen: Tile, layer: Layer, dtype: torch.dtype, architecture: Architecture, pixels: int
) -> Tile:
    """With the block and the slices with which the longest way through the launch is the shortest, if they fit.

    The way: what a multiprocessor executes, at least one program, and the sum of the partial sums after it. On a
    small plane small blocks and many slices fill the machine although they expand more in all; on a large plane
    there are pixels enough, and slices would cost for nothing.
    """
    most = _most_pixels(architecture)
    count = processors(architecture)
    channels = computed_channels(layer.in_channels) * dtype.itemsize
    steps = cdiv(layer.mid_channels, chosen.block)

    def seen(block: tuple[int, int]) -> tuple[int, int]:
        rows, columns = block
        return (rows - 1) * layer.stride + 3, (columns - 1) * layer.stride + 3

    def longest(cut: tuple[tuple[int, int], int]) -> float:
        block, slices = cut
        rows, columns = seen(block)
        outputs = chosen.pixels * prod(block)
        values = _OF_EXPANDED * chosen.pixels * rows * columns + _OF_OUTPUT * outputs
        step = values * chosen.block / 64
        step += (
            _OF_PRODUCT * rows * len(powers(columns)) * len(chunks(layer.in_channels, chosen.block))
        )
        programs = cdiv(pixels, outputs) * slices
        partials = slices * outputs * layer.out_channels if slices > 1 else 0
        program = steps // slices * step + _OF_PROGRAM
        return max(_ALONE, programs / count) * program + partials * _OF_PARTIAL

    small = [b for b in _BLOCKS if prod(b) <= _most_outputs(layer, dtype, architecture)]
    fitting = [block for block in small if prod(seen(block)) * chosen.pixels * channels <= most]
    equal = [slices for slices in range(1, steps + 1) if steps % slices == 0]
    (rows, columns), slices = min(product(fitting or _BLOCKS[-1:], equal), key=longest)
    return replace(chosen, rows=rows, columns=columns, slices=slices)
