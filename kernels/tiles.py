"""How each op's work is cut into programs: a small reviewed table, and the rule for what it does not list.

The table was chosen on machine code (no spills, resident warps, tensor-core instructions: tests/test_aot.py),
not by timing: it is not measured on a GPU. ``fastscnn_fast tune`` measures and keeps better ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastscnn_fast.plan import Layer

#: Where the kernels run: an NVIDIA compute capability (80 for sm_80), AMD's name, or the interpreter.
Architecture = int | str
INTERPRETER = "interpreter"


@dataclass(frozen=True)
class Tile:
    """pixels: of a program (inverted_residual: lanes, each a block of rows x columns pixels).

    block: channels of a step (dsconv, feature_fusion: of the input; inverted_residual: expanded).
    rows, columns: inverted_residual: pixels of a block; upsample_classify: rows of a step.
    """

    pixels: int
    block: int = 32
    rows: int = 1
    columns: int = 1
    warps: int = 4
    stages: int = 2


_HALF = {
    "stem_conv": Tile(128),
    "dsconv": Tile(64, block=32),
    "inverted_residual": Tile(16, block=32, rows=2, columns=2),
    "pyramid_pooling": Tile(32, block=64),
    "feature_fusion": Tile(32, block=32),
    "upsample_classify": Tile(128, rows=8),
}
_FLOAT = {
    "stem_conv": Tile(64),
    "dsconv": Tile(32, block=32),
    "inverted_residual": Tile(16, block=32),
    "pyramid_pooling": Tile(32, block=32),
    "feature_fusion": Tile(32, block=32),
    "upsample_classify": Tile(128, rows=8),
}
# One entry: numpy does as much as it is given, and tiles decide only how often Python is called.
_INTERPRETED = {
    "stem_conv": Tile(512),
    "dsconv": Tile(256, block=128),
    "inverted_residual": Tile(32, block=256, rows=4),
    "pyramid_pooling": Tile(256, block=128),
    "feature_fusion": Tile(64, block=128),
    "upsample_classify": Tile(128, rows=8),
}


def tile(layer: Layer, dtype: torch.dtype, architecture: Architecture) -> Tile:
    """The tile of ``layer`` on ``architecture``."""
    if architecture == INTERPRETER:
        return _INTERPRETED[layer.op]
    return (_FLOAT if dtype == torch.float32 else _HALF)[layer.op]
