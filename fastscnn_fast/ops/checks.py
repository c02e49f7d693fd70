"""What the ops are given: arguments that can be right or wrong, and tensors that only the dispatcher may handle."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import runners
from ..program import arithmetic
from ..program.layers import OUTPUTS, Layer
from ..program.program import parsed


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _known(backend: str) -> str:
    """``backend`` itself, a ValueError where there is none of that name."""
    runners.runner(backend)
    return backend


def check_input(
    name: str,
    x: Tensor,
    channels: int,
    weights: Tensor,
    backend: str,
    wanted: tuple[torch.dtype, ...] = (),
) -> None:
    """``wanted`` are the dtypes that x may have, where not all that lie between the backend's layers."""
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"{name} must be (N, {channels}, H, W), got shape {tuple(x.shape)}")
    if x.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got {x.layout}")
    if x.device != weights.device:
        raise ValueError(f"{name} must be on {weights.device}, got {x.device}")
    if weights.dtype != torch.uint8:
        raise TypeError(f"weights must be packed by pack(), got {weights.dtype}")
    if weights.dim() != 1 or not weights.is_contiguous():
        got = f"shape {tuple(weights.shape)}, strides {weights.stride()}"
        raise ValueError(f"weights must be contiguous and of one dimension, got {got}")
    wanted = wanted or arithmetic.activation_dtypes(_known(backend))
    if x.dtype not in wanted:
        allowed = ", ".join(map(str, wanted))
        raise TypeError(f"{name} must be of dtype {allowed} for backend {backend}, got {x.dtype}")


def picture_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Dtypes of the pictures that a network of ``dtype`` takes: its own floats, float32 where that is wider, raw pixels."""
    floats = arithmetic.floats_of(dtype)
    wider = (torch.float32,) if floats.itemsize < torch.float32.itemsize else ()
    return (floats, *wider, torch.uint8)


def check_picture(
    x: Tensor, channels: int, weights: Tensor, dtype: torch.dtype, backend: str
) -> None:
    """x may be raw pixels; ``dtype`` is what is computed in."""
    check_input("x", x, channels, weights, backend, picture_dtypes(dtype))
    if dtype not in arithmetic.dtypes(backend):
        allowed = ", ".join(map(str, arithmetic.dtypes(backend)))
        raise TypeError(f"dtype must be {allowed} for backend {backend}, got {dtype}")


class Spec(NamedTuple):
    """A full-size result."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def full_size(
    like: Tensor, classes: int, height: int, width: int, dtype: torch.dtype, output: str
) -> Spec:
    if output not in OUTPUTS:
        raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
    if output != "labels":
        return Spec((like.shape[0], classes, height, width), dtype)
    if classes > 256:
        raise ValueError(f"labels must be of at most 256 classes (uint8), got {classes}")
    return Spec((like.shape[0], height, width), torch.uint8)


def check_out(out: Tensor, x: Tensor, spec: Spec) -> None:
    if out.dtype != spec.dtype:
        raise TypeError(f"out must be of dtype {spec.dtype}, got {out.dtype}")
    if out.shape != spec.shape:
        raise ValueError(f"out must be of shape {tuple(spec.shape)}, got {tuple(out.shape)}")
    if out.device != x.device:
        raise ValueError(f"out must be on {x.device}, got {out.device}")
    if out.layout is not torch.strided or not out.is_contiguous():
        got = f"strides {out.stride()}" if out.layout is torch.strided else f"{out.layout}"
        raise ValueError(f"out must be contiguous, got {got}")


def layer_of(layer: str, op: str) -> Layer:
    layers = parsed(layer).layers
    require(len(layers) == 1 and layers[0].op == op, f"layer must be one encoded {op}")
    return layers[0]


def has_tangent(x: Tensor) -> bool:
    """Whether x is a dual tensor of forward-mode differentiation, which torch.no_grad() leaves on."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def is_differentiated(x: Tensor) -> bool:
    """Whether a gradient or a tangent of what is computed from x is wanted."""
    return (torch.is_grad_enabled() and x.requires_grad) or has_tangent(x)


def is_traced(x: Tensor) -> bool:
    """Exporting, tracing, or running under a mode, a transform or a kind of tensor that must see every op."""
    return (
        type(x) not in (Tensor, torch.nn.Parameter)
        or x.is_meta
        or x.layout is not torch.strided
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or has_tangent(x)
    )


def needs_dispatcher(x: Tensor) -> bool:
    """Whether anything but the op itself may have to happen to x."""
    return (
        torch.autograd._profiler_enabled()
        or torch._C._len_torch_function_stack() > 0
        or is_traced(x)
        or is_differentiated(x)
        or x.is_neg()
        or x._is_zerotensor()
    )
