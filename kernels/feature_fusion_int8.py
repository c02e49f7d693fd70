"""feature_fusion in int8: the low branch is rounded to bytes where it is resized, so it is stored there.

A resize to 8 bits commutes with nothing: either the depthwise reads it nine times, or it is made once. Launches: the
resize and one of :mod:`.dsconv_int8`; or, of a dense refinement, its product, the resize and a product of both.
"""

from __future__ import annotations

from dataclasses import replace

from fastscnn_fast.program.layers import Layer
from fastscnn_fast.program.memory import Buffer

from .dsconv_int8 import launch as dsconv
from .launch import Launch, Tile
from .product_int8 import product, resize


def launches(
    layer: Layer,
    high: Buffer,
    low: Buffer,
    out: Buffer,
    weights: dict[str, Buffer],
    tile: Tile,
    precision: str,
) -> list[Launch]:
    """high (N, H, W, M), low (N, h, w, C), out (N, H, W, O)."""
    c, o, align = layer.in_channels, layer.out_channels, layer.align_corners
    shape = (*high.shape[:3], low.strides[2])
    resized = Buffer.dense("fusion_resized", low.dtype, shape)
    if layer.dense:
        refined = replace(low, memory="fusion_refined", offset=0)
        refine = {name: weights[f"refine_{name}"] for name in ("bias", "multiplier", "zero")}
        both = {name: weights[name] for name in ("bias", "multiplier", "zero")}
        return [
            product(
                low,
                refined,
                {"x_weight": weights["refine_weight"], **refine},
                (c, c),
                tile,
                precision,
            ),
            resize(refined, resized, c, align, precision, floor=weights["refine_zero"]),
            product(
                resized,
                out,
                {
                    "x_weight": weights["low_weight"],
                    "y_weight": weights["high_weight"],
                    **both,
                },
                (c, o),
                tile,
                precision,
                high,
            ),
        ]
    named = {
        "pointwise_weight": weights["low_weight"],
        "high_weight": weights["high_weight"],
    }
    for name in ("bias", "multiplier", "zero"):
        named[f"pointwise_{name}"] = weights[name]
    for name in ("weight", "bias", "multiplier", "zero"):
        named[f"depthwise_{name}"] = weights[f"refine_{name}"]
    return [
        resize(low, resized, c, align, precision),
        dsconv(layer, resized, out, named, (c, o), tile, precision, high),
    ]
