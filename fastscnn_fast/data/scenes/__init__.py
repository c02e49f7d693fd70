"""Street scenes that the package draws itself, with exact labels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .scene import Scene


def street(
    seed: int, height: int = 360, width: int = 480
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A street scene, drawn from the driver's seat, and its labels.

    The scene follows from ``seed``; ``height`` and ``width`` only choose its resolution and frame. The
    same three numbers always give the same bytes (with the same NumPy and Pillow).

    Returns:
        picture (height, width, 3) uint8 and labels (height, width) uint8 in CamVid's classes;
        ``CAMVID_IGNORE`` marks litter bins and the driver's own bonnet.

    Raises:
        ValueError: a negative seed, or a side below 1 pixel.
    """
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1, got {height}x{width}")
    return Scene(seed, height, width).render()
