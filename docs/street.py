"""Draws docs/street.png: a street scene, and beside it the labels that the weights that come along give it.

    python docs/street.py [FILE]

The scene's seed is one of those that validation draws from: no network here was trained on it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from fastscnn_fast import fuse, load_checkpoint, segment
from fastscnn_fast.data.classes import CAMVID_CLASSES, CAMVID_PALETTE
from fastscnn_fast.data.pictures import overlay
from fastscnn_fast.data.scenes import street

SEED, HEIGHT, WIDTH = 1_000_002, 240, 480


def draw() -> Image.Image:
    """The scene, its labels at its right, and a legend below, in 256 colours to keep the file small."""
    picture, _ = street(SEED, HEIGHT, WIDTH)
    labels = segment(fuse(load_checkpoint()), picture)
    untinted = np.full_like(labels, len(CAMVID_CLASSES))
    pair, classes = np.hstack([picture, picture]), np.hstack([untinted, labels])
    image = overlay(pair, classes, CAMVID_CLASSES, CAMVID_PALETTE, strength=1)
    return image.quantize(256, dither=Image.Dither.NONE)


if __name__ == "__main__":
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("street.png")
    draw().save(file, optimize=True)
    print(f"wrote {file}")
