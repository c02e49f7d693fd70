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
#: Beyond it nothing but its sign matters of what becomes a byte.
LARGE = tl.constexpr(4096.0)
#: Bits of a fraction between two positions, all of it, and its most; and bits that a value has more than its 8 between the
#: two directions.
FRACTION = tl.constexpr(15)
WHOLE_SHARE = tl.constexpr(2**15)
MOST_SHARE = tl.constexpr(2**15 - 1)
GUARD = tl.constexpr(7)
#: What is taken off the first direction's sums of products, and half of its unit.
FIRST = tl.constexpr(15 - 7)
FIRST_HALF = tl.constexpr(2**7)
#: The second direction's are four times as large, so that what is left of them are their highest bytes; the halves of both
#: its roundings, which are one: 255 * 2^GUARD * 4 * 2^FRACTION and these fit 32 bits.
SECOND_HALVES = tl.constexpr(4 * (2**14 + 2**21))


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
def side_by_side(columns, COUNT: tl.constexpr):
    """``COUNT`` tensors (N,), a power of two, as one (N, COUNT); or (N, M) as (N, M * COUNT), the columns of one M together.

    Which of them a value belongs to is a register's number, so nothing moves.
    """
    for level in tl.static_range(6):
        if COUNT >> level > 1:
            joined = ()
            for i in tl.static_range(COUNT >> level + 1):
                pair = tl.join(columns[i], columns[i + (COUNT >> level + 1)])
                joined = joined + (pair,)  # noqa: RUF005
            columns = joined
    return tl.reshape(columns[0], (columns[0].shape[0], columns[0].numel // columns[0].shape[0]))


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
def nearest(value, zero, PRECISION: tl.constexpr):
    """rint(value) + zero in int32, ties to even, of a value that check_sums bounds: one that is larger saturates first."""
    if PRECISION == "interpreted":
        inside = tl.minimum(tl.maximum(value, -LARGE), LARGE)
        result = (inside + MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS
    else:
        result = tl.inline_asm_elementwise(
            "cvt.rni.s32.f32 $0, $1;", "=r,r", [value], dtype=tl.int32, is_pure=True, pack=1
        )
    return result + zero


@triton.jit
def as_bytes(q, PRECISION: tl.constexpr):
    """clamp(q, 0, 255) of int32, as uint8; of four in a register at once."""
    if PRECISION == "interpreted":
        result = tl.minimum(tl.maximum(q, 0), 255).to(tl.uint8)
    else:
        result = tl.inline_asm_elementwise(
            "{ .reg .b32 t; cvt.pack.sat.u8.s32.b32 t, $4, $3, 0;"
            " cvt.pack.sat.u8.s32.b32 $0, $2, $1, t; }",
            "=r,r,r,r,r",
            [q],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    return result


@triton.jit
def rounded(value, zero, PRECISION: tl.constexpr):
    """clamp(rint(value) + zero, 0, 255) as uint8, ties to even."""
    return as_bytes(nearest(value, zero, PRECISION), PRECISION)


@triton.jit
def factor(value, zero, PRECISION: tl.constexpr):
    """What :func:`rounded` makes, less 128: what :func:`multiply` takes."""
    q = nearest(value, zero - 128, PRECISION)
    if PRECISION == "interpreted":
        result = tl.minimum(tl.maximum(q, -128), 127).to(tl.int8)
    else:
        result = tl.inline_asm_elementwise(
            "{ .reg .b32 t; cvt.pack.sat.s8.s32.b32 t, $4, $3, 0;"
            " cvt.pack.sat.s8.s32.b32 $0, $2, $1, t; }",
            "=r,r,r,r,r",
            [q],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    return result


@triton.jit
def word(a, b, c, d, PRECISION: tl.constexpr):
    """clamp(q, 0, 255) of four int32, a in the lowest byte of a word."""
    if PRECISION == "interpreted":
        result = as_bytes(a, PRECISION).to(tl.uint32)
        result |= as_bytes(b, PRECISION).to(tl.uint32) << 8
        result |= as_bytes(c, PRECISION).to(tl.uint32) << 16
        result |= as_bytes(d, PRECISION).to(tl.uint32) << 24
    else:
        result = tl.inline_asm_elementwise(
            "{ .reg .b32 t; cvt.pack.sat.u8.s32.b32 t, $4, $3, 0;"
            " cvt.pack.sat.u8.s32.b32 $0, $2, $1, t; }",
            "=r,r,r,r,r",
            [a, b, c, d],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    return result


@triton.jit
def within(first, size):
    """Words of bytes 255 where positions first .. first + 3 are from 0 to size - 1, of which the first is below it, else 0."""
    every = tl.full(first.shape, 0xFFFFFFFF, tl.uint32)
    before = tl.maximum(-first, 0)
    after = tl.minimum(tl.maximum(first + 4 - size, 0), 3)
    return (every << (8 * before).to(tl.uint32)) & (every >> (8 * after).to(tl.uint32))


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
def shares(share):
    """The two values' shares of 2^FRACTION as two halves of a word, the lower one's first."""
    return ((share << 16) - share + WHOLE_SHARE).to(tl.uint32)


@triton.jit
def add_dot2(halves, bytes, total, HIGH: tl.constexpr, PRECISION: tl.constexpr):
    """total + the dot product of a word's halves with the two low, or ``HIGH``, bytes of another; all unsigned."""
    if PRECISION == "interpreted":
        if HIGH:
            bytes = bytes >> 16
        total += (halves & 0xFFFF) * (bytes & 255) + (halves >> 16) * (bytes >> 8 & 255)
    else:
        total = tl.inline_asm_elementwise(
            "dp2a.hi.u32.u32 $0, $1, $2, $3;" if HIGH else "dp2a.lo.u32.u32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [halves, bytes, total],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    return total


@triton.jit
def between_rows(above, below, halves, PRECISION: tl.constexpr):
    """Four values in GUARD bits more of four bytes in words: low + ((high - low) * share rounded), in one sum of two products."""
    half = tl.zeros_like(above) + FIRST_HALF
    low = permuted(above, below, 0x5140, PRECISION)
    high = permuted(above, below, 0x7362, PRECISION)
    return (
        add_dot2(halves, low, half, False, PRECISION) >> FIRST,
        add_dot2(halves, low, half, True, PRECISION) >> FIRST,
        add_dot2(halves, high, half, False, PRECISION) >> FIRST,
        add_dot2(halves, high, half, True, PRECISION) >> FIRST,
    )


@triton.jit
def between_columns(left, right, share, least, PRECISION: tl.constexpr):
    """Words of four bytes, each at least ``least``, of what :func:`between_rows` makes of two columns."""
    less = ((-share + WHOLE_SHARE) << 2).to(tl.uint32)
    more = (share << 2).to(tl.uint32)
    sums = ()
    for i in tl.static_range(4):
        one = right[i] * more + (left[i] * less + SECOND_HALVES)
        sums = sums + (tl.maximum(one, least << 24),)  # noqa: RUF005
    low = permuted(sums[0], sums[1], 0x0073, PRECISION)
    high = permuted(sums[2], sums[3], 0x0073, PRECISION)
    return permuted(low, high, 0x5410, PRECISION)
