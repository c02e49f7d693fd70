"""Device functions that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """x, max(x, 0) or min(max(x, 0), 6); NaN stays NaN, as in torch."""
    if ACTIVATION != "none":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "relu6":
        x = tl.minimum(x, 6.0, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def product(left, right, total, PRECISION: tl.constexpr):
    """total + left @ right in float32. PRECISION: of float32 operands "ieee" or "tf32"; or "interpreted"."""
    if PRECISION == "interpreted":  # whose bfloat16 arithmetic is that of the bit patterns
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total)
    else:
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def cast(value, pointer, PRECISION: tl.constexpr):
    """Float32 ``value`` as what ``pointer`` points to, rounded to nearest even.

    The interpreter by itself cuts bfloat16 off.
    """
    if PRECISION == "interpreted" and pointer.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)
    return value.to(pointer.dtype.element_ty)


@triton.jit
def offset(row, column, width, pitch, WIDE: tl.constexpr):
    """Elements from an image's start to pixel (row, column), in 64 bits where 32 may not do."""
    if WIDE:
        row = row.to(tl.int64)
    return (row * width + column) * pitch


@triton.jit
def lies_in(i, size):
    """0 <= i < size, in one comparison."""
    return i.to(tl.uint32, bitcast=True) < tl.cast(size, tl.uint32)


@triton.jit
def position(i, scale, shift, divisor, size, WIDE: tl.constexpr):
    """Where output ``i`` of a resize samples: the low index and the weight of the one above it.

    The position (i * scale + shift) / divisor is a fraction of integers, see resize.py: exact until its one
    division. Above the last index lies the last again, with its weight: torch's infinities stay infinite.
    """
    if WIDE:
        i = i.to(tl.int64)
    numerator = tl.maximum(i * scale + shift, 0)
    low = numerator // divisor
    weight = tl.div_rn((numerator - low * divisor).to(tl.float32), divisor.to(tl.float32))
    return tl.minimum(low, size - 1), weight


@triton.jit
def hat(i, scale, shift, divisor, size, at, WIDE: tl.constexpr):
    """The weight with which output ``i`` of a resize counts input ``at``; see :func:`position`."""
    if WIDE:
        i = i.to(tl.int64)
        at = at.to(tl.int64)
        divisor = divisor.to(tl.int64)
    sample = tl.minimum(tl.maximum(i * scale + shift, 0), (size - 1) * divisor)
    distance = tl.abs(sample - at * divisor).to(tl.float32)
    return tl.maximum(1.0 - tl.div_rn(distance, divisor.to(tl.float32)), 0.0)


@triton.jit
def branch_of(cell, BINS: tl.constexpr, POWER: tl.constexpr):
    """The bins of a cell's branch, its number within the branch, and the branch: bins^POWER cells each."""
    bins = tl.zeros_like(cell) + 1
    branch = tl.zeros_like(cell)
    for b in tl.static_range(len(BINS)):
        first = 0
        for before in tl.static_range(b):
            first += BINS[before] ** POWER
        later = cell >= first
        bins = tl.where(later, BINS[b], bins)
        branch = tl.where(later, b, branch)
    within = cell
    for b in tl.static_range(len(BINS)):
        within = tl.where(branch > b, within - BINS[b] ** POWER, within)
    return bins, within, branch
