"""Bilinear resizing as torch.nn.functional.interpolate defines it, in integers."""

from __future__ import annotations


def fraction(size: int, out: int, align_corners: bool) -> tuple[int, int, int]:
    """(scale, shift, divisor): output i samples input position max((i * scale + shift) / divisor, 0).

    The divisor is never 1, which Triton would take for a compile-time constant.
    """
    if align_corners:
        return 2 * (size - 1), 0, 2 * max(out - 1, 1)
    return 2 * size, size - out, 2 * out


def is_long(size: int, out: int) -> bool:
    """Whether those integers may not fit 32 bits."""
    return 2 * (size + 1) * (out + 1) >= 2**31
