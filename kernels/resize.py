"""Bilinear resizing as torch.nn.functional.interpolate defines it, in integers."""

from __future__ import annotations


def fraction(size: int, out: int, align_corners: bool) -> tuple[int, int, int]:
    """(scale, shift, divisor): output i samples input position max((i * scale + shift) / divisor, 0)."""
    if align_corners:
        return size - 1, 0, max(out - 1, 1)
    return 2 * size, size - out, 2 * out
