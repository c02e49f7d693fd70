"""What is wrong in int8's kernels is found: each mutant gives other bits than the specification."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from cases import DSCONV, FEATURE_FUSION, INVERTED_RESIDUAL, PYRAMID_POOLING
from gpu_integers import inputs_of, run, shared, specified
from integers import random_integers
from targets import Target

from fastscnn_fast.backends.gpu import plan
from fastscnn_fast.kernels import (
    dsconv_int8,
    integers as device,
    inverted_residual_int8,
    product_int8,
)
from fastscnn_fast.program.layers import Layer

pytestmark = pytest.mark.interpreted
TRITON = Target("triton", "interpreter")


@triton.jit
def halves_up(value, zero, PRECISION: tl.constexpr):
    q = tl.minimum(tl.maximum(tl.floor(value + 0.5).to(tl.int32) + zero, 0), 255)
    return q.to(tl.uint8)


@triton.jit
def wraps_around(value, zero, PRECISION: tl.constexpr):
    return (tl.floor(value + 0.5).to(tl.int32) + zero).to(tl.uint8)


@triton.jit
def everywhere(first, size):
    return tl.full(first.shape, 0xFFFFFFFF, tl.uint32)


@triton.jit
def a_byte_later(bytes, weights, total, PRECISION: tl.constexpr):
    for i in tl.static_range(3):
        byte = (bytes >> (8 * i + 8)) & 255
        total += byte.to(tl.int32) * ((weights << (24 - 8 * i)) >> 24)
    return total


@triton.jit
def first_to_arrive(counter, SLICES: tl.constexpr):
    return tl.atomic_add(counter, 1) == 0


@pytest.mark.parametrize(
    ("where", "name", "mutant", "layer"),
    [
        (dsconv_int8, "rounded", halves_up, DSCONV[0]),
        (dsconv_int8, "rounded", wraps_around, DSCONV[0]),
        (dsconv_int8, "add_dot4", a_byte_later, DSCONV[0]),
        (device, "SECOND_HALVES", tl.constexpr(4 * 2**14), FEATURE_FUSION[0]),
        (product_int8, "signed", lambda x, _: x.to(tl.int8), PYRAMID_POOLING[4]),
        (inverted_residual_int8, "within", everywhere, INVERTED_RESIDUAL[4]),
        (inverted_residual_int8, "arrives_last", first_to_arrive, INVERTED_RESIDUAL[4]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_it_is_found(
    where: ModuleType, name: str, mutant: Any, layer: Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where is inverted_residual_int8:
        monkeypatch.setattr(plan, "tile", lambda *_: shared(2))
    weights, inputs = random_integers(layer), inputs_of(layer, (4, 9), 1)
    if name == "rounded":  # results beside the middle of two integers, and beyond 255
        weights["pointwise_weight"].zero_()
        weights["pointwise_bias"] = 1 + 14 * torch.arange(layer.out_channels, dtype=torch.int32)
        weights["pointwise_multiplier"].fill_(0.5)
        weights["pointwise_zero"].zero_()
    exact = specified(layer, inputs, weights)
    monkeypatch.setattr(where, name, mutant)
    with TRITON.ready():
        try:
            y = run(layer, inputs, weights, TRITON)
        except AssertionError as error:
            assert "left a counter" in str(error)
        else:
            assert not torch.equal(y, exact)
