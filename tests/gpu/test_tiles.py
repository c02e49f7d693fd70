"""What only the Triton kernels have: tiles, and two sizes of offsets."""

from __future__ import annotations

import pytest
from cases import (
    DSCONV,
    FEATURE_FUSION,
    INVERTED_RESIDUAL,
    PYRAMID_POOLING,
    STEM_CONV,
    Case,
    Size,
    upsample,
)
from targets import Target, check_odd, each_op

from fastscnn_fast.backends.gpu import plan, tiles
from fastscnn_fast.kernels import (
    dsconv,
    feature_fusion,
    inverted_residual,
    pyramid_pooling,
    stem_conv,
    upsample_classify,
)
from fastscnn_fast.kernels.launch import Tile
from fastscnn_fast.program.layers import Layer

KERNELS = (
    dsconv,
    feature_fusion,
    inverted_residual,
    pyramid_pooling,
    stem_conv,
    upsample_classify,
)


@each_op
def test_offsets_of_64_bits(case: Case, monkeypatch: pytest.MonkeyPatch, triton: Target) -> None:
    for op in KERNELS:
        monkeypatch.setattr(op, "wide", lambda *_: True)
    check_odd(triton.case(case, "float32"))


@pytest.mark.parametrize(
    ("layer", "tile"),
    [
        (INVERTED_RESIDUAL[1], Tile(16, block=32, rows=2, columns=2)),
        (INVERTED_RESIDUAL[2], Tile(16, block=16, rows=2, columns=2)),
        (INVERTED_RESIDUAL[0], Tile(16, block=64, rows=2, columns=4)),
        (INVERTED_RESIDUAL[3], Tile(16, block=32, rows=2, columns=4)),
        (INVERTED_RESIDUAL[1], Tile(16, block=32, columns=2, slices=6)),
        (INVERTED_RESIDUAL[2], Tile(16, block=16, rows=2, columns=2, slices=2)),
        (DSCONV[2], Tile(16, block=16)),
        (DSCONV[7], Tile(32, block=16)),
        (FEATURE_FUSION[1], Tile(16, block=16)),
        (FEATURE_FUSION[3], Tile(16, block=16)),
        (PYRAMID_POOLING[0], Tile(16, block=16)),
        (PYRAMID_POOLING[4], Tile(16, block=16)),
        (STEM_CONV[8], Tile(16)),
        (upsample(19), Tile(16, rows=2)),
        (upsample(11, align_corners=True), Tile(16, rows=16)),
    ],
    ids=lambda value: (
        f"{value.op}{value.in_channels}"
        if isinstance(value, Layer)
        else f"{value.pixels}x{value.block} {value.rows}x{value.columns}"
    ),
)
def test_other_tiles(
    layer: Layer, tile: Tile, monkeypatch: pytest.MonkeyPatch, triton: Target
) -> None:
    monkeypatch.setattr(plan, "tile", lambda *_: tile)
    sizes: tuple[Size, ...] = ((5, 17),)
    if layer.op in ("feature_fusion", "upsample_classify"):
        sizes = ((5, 17), (2, 5)) if layer.op == "feature_fusion" else ((3, 5), (11, 37))
    check_odd(triton.case(Case(layer, sizes), "float32"))


@pytest.mark.parametrize("architecture", [75, 80, 90])
@pytest.mark.parametrize("arithmetic", ["float32", "float16"])
@each_op
@pytest.mark.slow
def test_tiles_of_gpus(
    case: Case, arithmetic: str, architecture: int, monkeypatch: pytest.MonkeyPatch, triton: Target
) -> None:
    """The tiles of the table, whatever runs them."""
    monkeypatch.setattr(
        plan,
        "tile",
        lambda layer, dtype, _, pixels: tiles.tile(layer, dtype, architecture, pixels),
    )
    check_odd(triton.case(case, arithmetic))
