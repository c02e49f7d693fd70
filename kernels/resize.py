"""Bilinear resizing as torch.nn.functional.interpolate defines it, in integers."""

from __future__ import annotations


def fraction(size: int, out: int, align_corners: bool) -> tuple[int, int, int]:
    """(scale, shift, divisor): output i samples input position max((i * scale + shift) / divisor, 0).

    The divisor is never 1, which Triton would take for a compile-time constant.
    """
    if align_corners:
        return 2 * (size - 1), 0, 2 * max(out - 1, 1)
    return 2 * size, size - out, 2 * out


def arguments(low: tuple[int, int], size: tuple[int, int], align_corners: bool) -> dict[str, int]:
    """The fractions of a resize from ``low`` to ``size`` (height, width), as kernels take them."""
    return {
        f"{axis}_{name}": value
        for axis, a, b in zip("yx", low, size)
        for name, value in zip(("scale", "shift", "divisor"), fraction(a, b, align_corners))
    }


def is_long(low: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether those integers may not fit 32 bits."""
    return any(2 * (a + 1) * (b + 1) >= 2**31 for a, b in zip(low, size))
