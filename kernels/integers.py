"""Device functions of int8: what program/integers.py specifies, to the last bit.

Activations are bytes; tensor cores multiply q - 128 of them (lower/gpu_int8.py says why that is exact). Launches are
not ``fused``, so that a product and a sum round each by itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: 1.5 * 2^23: what is added to a float up to 2^22 leaves the nearest integer, ties to even, in the low bits.
MAGIC = tl.constexpr(12582912.0)
MAGIC_BITS = tl.constexpr(0x4B400000)
#: Bits of a fraction between two positions, its most and half of it; and bits that a value has more than its 8 between
#: the two directions, and half of their unit.
FRACTION = tl.constexpr(15)
MOST_SHARE = tl.constexpr(2**15 - 1)
HALF_SHARE = tl.constexpr(2**14)
GUARD = tl.constexpr(7)
HALF_GUARD = tl.constexpr(2**6)


@triton.jit
def signed(x, PRECISION: tl.constexpr):
    """q - 128 of bytes q, as int8; of four in a register at once, which Triton itself would take apart."""
    if PRECISION == "interpreted":
        result = (x ^ 128).to(tl.int8, bitcast=True)
    else:
        result = tl.inline_asm_elementwise(
            "xor.b32 $0, $1, 0x80808080;", "=r,r", [x], dtype=tl.int8, is_pure=True, pack=4
        )
    return result


@triton.jit
def multiply(left, right, total, PRECISION: tl.constexpr):
    """total + left @ right, int8 times int8 in int32; all sums are exact."""
    if PRECISION == "interpreted":  # whose products of integers are slow
        exact = tl.dot(left.to(tl.float64), right.to(tl.float64), out_dtype=tl.float64)
        total += exact.to(tl.int32)
    else:
        total = tl.dot(left, right, total, out_dtype=tl.int32)
    return total


@triton.jit
def clamped(value, least, most):
    """rint(clamp(value, least, most)), ties to even, of integers for bounds: in int32, MAGIC_BITS too large."""
    return (tl.minimum(tl.maximum(value, least), most) + MAGIC).to(tl.int32, bitcast=True)


@triton.jit
def rounded(value, zero):
    """clamp(rint(value) + zero, 0, 255) in int32, ties to even; clamped first, which comes to the same."""
    least = -zero.to(tl.float32)
    return clamped(value, least, least + 255.0) + (zero - MAGIC_BITS)


@triton.jit
def factor(q):
    """Bytes in int32 as what :func:`multiply` takes."""
    return (q - 128).to(tl.int8)


@triton.jit
def permuted(a, b, SELECT: tl.constexpr, PRECISION: tl.constexpr):
    """The word whose byte i is byte (SELECT >> 4 i) % 8 of the words a, then b."""
    if PRECISION == "interpreted":
        both = a.to(tl.uint64) | (b.to(tl.uint64) << 32)
        result = both & 0
        for i in tl.static_range(4):
            result |= ((both >> (8 * (SELECT >> (4 * i) & 7))) & 255) << (8 * i)
        result = result.to(tl.uint32)
    else:
        result = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [a, b, SELECT],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    return result


@triton.jit
def add_dot4(bytes, weights, total, PRECISION: tl.constexpr):
    """total + the dot product of four bytes in a word with four int8 in another."""
    if PRECISION == "interpreted":
        for i in tl.static_range(4):
            byte = (bytes >> (8 * i)) & 255
            total += byte.to(tl.int32) * ((weights << (24 - 8 * i)) >> 24)
    else:
        total = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [bytes, weights, total],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return total


@triton.jit
def by_channel(a, b, c, d, PRECISION: tl.constexpr):
    """Four words of four channels as the four channels' words: byte t of the k-th is byte k of the t-th."""
    low = permuted(a, b, 0x5140, PRECISION)
    lower = permuted(c, d, 0x5140, PRECISION)
    high = permuted(a, b, 0x7362, PRECISION)
    higher = permuted(c, d, 0x7362, PRECISION)
    return (
        permuted(low, lower, 0x5410, PRECISION),
        permuted(low, lower, 0x7632, PRECISION),
        permuted(high, higher, 0x5410, PRECISION),
        permuted(high, higher, 0x7632, PRECISION),
    )


@triton.jit
def fixed_position(i, size, out, ALIGN_CORNERS: tl.constexpr, LONG: tl.constexpr):
    """Where output ``i`` of ``out`` samples ``size`` inputs: the low index, and the share of the one above it."""
    if LONG:
        i = i.to(tl.int64)
    if ALIGN_CORNERS:
        over = i * (size - 1)
        unit = tl.maximum(out - 1, 1)
    else:
        over = tl.maximum((2 * i + 1) * size - out, 0)
        unit = 2 * out
    low = tl.minimum(over // unit, size - 1)
    share = (((over - low * unit) << FRACTION) + unit // 2) // unit
    return low.to(tl.int32), tl.minimum(share, MOST_SHARE).to(tl.int32)


@triton.jit
def between(low, high, share):
    """low + ((high - low) * share, of 2^FRACTION, rounded to nearest, halves up)."""
    return low + (((high - low) * share + HALF_SHARE) >> FRACTION)
