"""The fused ops as functions, and as ``torch.ops.fastscnn.*`` (:mod:`.schemas`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import cpu, runners
from ..program import arithmetic, reference
from ..program.layers import OUTPUTS as OUTPUTS, Layer
from ..program.program import Program, encode as encode
from . import schemas
from .checks import (
    is_differentiated as is_differentiated,
    is_traced as is_traced,
    needs_dispatcher,
    picture_dtypes as picture_dtypes,
)
from .schemas import check_network_out as check_network_out


def pack(
    layers: Sequence[Layer],
    tensors: Sequence[reference.Weights],
    backend: str,
    dtype: torch.dtype = torch.float32,
    precision: str = "highest",
) -> Tensor:
    """The weights of ``layers`` as one tagged uint8 tensor in the backend's own layout.

    Args:
        tensors: per layer, what ``layer.weights()`` names, in any floating dtype.
        backend: "cpu", "triton", "cuda" or "reference"; weights of the two on a GPU are the same bytes.
        dtype: the dtype to compute in.
        precision: "highest", or "high" (float32 only): products of about 17 bits on the cpu backend, of
            TF32 on the triton backend.

    Raises:
        ValueError: a tensor is missing or of a wrong shape, or the backend has no such layout.
    """
    runner = runners.runner(backend)
    chosen = arithmetic.choose(backend, dtype, precision)
    return runner.pack(Program.of(layers), tensors, chosen)


def stem_conv(
    x: Tensor,
    weights: Tensor,
    layer: Layer,
    backend: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """x (N, C, H, W), of one of ``picture_dtypes(dtype)``, any strides -> (N, O, H', W') of ``dtype``."""
    return torch.ops.fastscnn.stem_conv(x, weights, encode([layer]), dtype, backend)


def dsconv(x: Tensor, weights: Tensor, layer: Layer, backend: str = "cpu") -> Tensor:
    """x (N, C, H, W) -> (N, O, H', W'), O the last 1x1's where the layer has one."""
    return torch.ops.fastscnn.dsconv(x, weights, encode([layer]), backend)


def inverted_residual(x: Tensor, weights: Tensor, layer: Layer, backend: str = "cpu") -> Tensor:
    """x (N, C, H, W) -> (N, O, H', W')."""
    return torch.ops.fastscnn.inverted_residual(x, weights, encode([layer]), backend)


def pyramid_pooling(x: Tensor, weights: Tensor, layer: Layer, backend: str = "cpu") -> Tensor:
    """x (N, C, H, W) -> (N, O, H, W)."""
    return torch.ops.fastscnn.pyramid_pooling(x, weights, encode([layer]), backend)


def feature_fusion(
    high: Tensor, low: Tensor, weights: Tensor, layer: Layer, backend: str = "cpu"
) -> Tensor:
    """high (N, M, H, W), low (N, C, h, w) -> (N, O, H, W)."""
    return torch.ops.fastscnn.feature_fusion(high, low, weights, encode([layer]), backend)


def upsample_classify(
    x: Tensor,
    weights: Tensor,
    layer: Layer,
    size: tuple[int, int],
    output: str = "logits",
    backend: str = "cpu",
) -> Tensor:
    """x (N, K, h, w) -> logits or probabilities (N, K, *size), or uint8 labels (N, *size)."""
    height, width = size
    return torch.ops.fastscnn.upsample_classify(
        x, weights, encode([layer]), height, width, output, backend
    )


def network(
    x: Tensor,
    weights: Tensor,
    program: str,
    output: str = "logits",
    backend: str = "cpu",
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """The whole network on x (N, C, H, W), of one of ``picture_dtypes(dtype)``, any strides.

    ``program`` comes from encode(). ``out`` is filled and returned where it is given: contiguous, of the
    result's shape and dtype.
    """
    arguments = (x, weights, program, dtype, output, backend)
    if (
        torch.compiler.is_compiling()
        or needs_dispatcher(x)
        or type(weights) is not Tensor
        or (out is not None and needs_dispatcher(out))
    ):
        op = torch.ops.fastscnn.network
        if out is None:
            return op.default(*arguments)
        op.out(*arguments, out=out)
    else:  # the dispatcher's detour would take as long as a tenth of a small picture
        if out is None:
            return schemas.run["network"](*arguments)
        schemas.network_out(*arguments, out=out)
    return out


def network_stages(
    x: Tensor,
    weights: Tensor,
    program: str,
    output: str = "logits",
    dtype: torch.dtype = torch.float32,
) -> list[tuple[str, float]]:
    """Name and seconds of each stage of :func:`network` on the cpu backend, for one image."""
    out = schemas.network_result(x, weights, program, dtype, output, "cpu")
    return cpu.RUNNERS["cpu"].network_stages(out, x, weights, program, dtype, output)
