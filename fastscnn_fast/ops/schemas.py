"""The ops as torch knows them: schemas, results (which are the fake kernels too), what fills them, registration.

Every op takes its packed weights as one uint8 tensor, its layers as the text of their program, and a backend's
name. Activations are (N, C, H, W) tensors in channels-last memory; a result's channels are padded to a multiple of
64 bytes in memory, not in its shape. Results have the dtype that is computed in: x's own, or, for ops that also
take raw pixels, the argument ``dtype``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import runners
from ..program.arithmetic import activation_dtypes, activations_of, floats_of
from ..program.memory import activation, addresses, check_memory
from ..program.program import parsed
from .checks import (
    Spec,
    check_input,
    check_out,
    check_picture,
    full_size,
    is_differentiated,
    layer_of,
    require,
)
from .flops import register as register_flops

# Each pair below makes the result (the fake kernel) and fills it.


def _stem_result(
    x: Tensor, weights: Tensor, layer: str, dtype: torch.dtype, backend: str
) -> Tensor:
    one = layer_of(layer, "stem_conv")
    check_picture(x, one.in_channels, weights, dtype, backend)
    size = one.output_size(x.shape[2], x.shape[3])
    return activation(x, one.out_channels, *size, activations_of(dtype))


def _stem_fill(
    out: Tensor, x: Tensor, weights: Tensor, layer: str, dtype: torch.dtype, backend: str
) -> None:
    runners.runner(backend).stem_conv(out, x, weights, layer, dtype)


def _plane_result(op: str) -> Callable[..., Tensor]:
    def result(x: Tensor, weights: Tensor, layer: str, backend: str) -> Tensor:
        one = layer_of(layer, op)
        check_input("x", x, one.in_channels, weights, backend)
        size = (x.shape[2], x.shape[3])
        height, width = one.result_size([size], size)
        dtype = floats_of(x.dtype) if one.last_channels else x.dtype
        return activation(x, one.result_channels, height, width, dtype)

    return result


def _plane_fill(op: str) -> Callable[..., None]:
    def fill(out: Tensor, x: Tensor, weights: Tensor, layer: str, backend: str) -> None:
        runners.runner(backend).plane(op, out, x, weights, layer)

    return fill


def _fusion_result(high: Tensor, low: Tensor, weights: Tensor, layer: str, backend: str) -> Tensor:
    one = layer_of(layer, "feature_fusion")
    check_input("high", high, one.mid_channels, weights, backend)
    check_input("low", low, one.in_channels, weights, backend, (high.dtype,))
    require(
        high.shape[0] == low.shape[0],
        f"low must have high's batch {high.shape[0]}, got {low.shape[0]}",
    )
    return activation(high, one.out_channels, high.shape[2], high.shape[3], high.dtype)


def _fusion_fill(
    out: Tensor, high: Tensor, low: Tensor, weights: Tensor, layer: str, backend: str
) -> None:
    runners.runner(backend).feature_fusion(out, high, low, weights, layer)


def _upsample_result(
    x: Tensor, weights: Tensor, layer: str, height: int, width: int, output: str, backend: str
) -> Tensor:
    one = layer_of(layer, "upsample_classify")
    floats = tuple(d for d in activation_dtypes(backend) if d.is_floating_point)
    check_input("x", x, one.in_channels, weights, backend, floats)
    spec = full_size(x, one.in_channels, height, width, x.dtype, output)
    return x.new_empty(spec.shape, dtype=spec.dtype)


def _upsample_fill(
    out: Tensor,
    x: Tensor,
    weights: Tensor,
    layer: str,
    height: int,
    width: int,
    output: str,
    backend: str,
) -> None:
    runners.runner(backend).upsample_classify(out, x, weights, layer, output)


def _network_spec(
    x: Tensor, weights: Tensor, program: str, dtype: torch.dtype, output: str, backend: str
) -> Spec:
    whole = parsed(program)
    require(
        whole.is_network,
        "program must be a whole network, from stem_conv on the picture to upsample_classify",
    )
    check_picture(x, whole.layers[0].in_channels, weights, dtype, backend)
    classes, floats = whole.layers[-1].in_channels, floats_of(dtype)
    return full_size(x, classes, x.shape[2], x.shape[3], floats, output)


def network_result(x: Tensor, *args: Any) -> Tensor:
    spec = _network_spec(x, *args)
    return x.new_empty(spec.shape, dtype=spec.dtype)


def _network_fill(
    out: Tensor,
    x: Tensor,
    weights: Tensor,
    program: str,
    dtype: torch.dtype,
    output: str,
    backend: str,
) -> None:
    runners.runner(backend).network(out, x, weights, program, dtype, output)


_PLANE = "Tensor x, Tensor weights, str layer, str backend"
_NETWORK = "Tensor x, Tensor weights, str program, ScalarType dtype, str output, str backend"
DEFINITIONS: dict[str, tuple[str, Callable[..., Tensor], Callable[..., None]]] = {
    "stem_conv": (
        "Tensor x, Tensor weights, str layer, ScalarType dtype, str backend",
        _stem_result,
        _stem_fill,
    ),
    "dsconv": (_PLANE, _plane_result("dsconv"), _plane_fill("dsconv")),
    "inverted_residual": (
        _PLANE,
        _plane_result("inverted_residual"),
        _plane_fill("inverted_residual"),
    ),
    "pyramid_pooling": (_PLANE, _plane_result("pyramid_pooling"), _plane_fill("pyramid_pooling")),
    "feature_fusion": (
        "Tensor high, Tensor low, Tensor weights, str layer, str backend",
        _fusion_result,
        _fusion_fill,
    ),
    "upsample_classify": (
        "Tensor x, Tensor weights, str layer, SymInt height, SymInt width, str output, str backend",
        _upsample_result,
        _upsample_fill,
    ),
    "network": (_NETWORK, network_result, _network_fill),
}
_library = torch.library.Library("fastscnn", "DEF")

# Scratch memory outlives a call: torch.compile must not record one into a CUDA graph of its own.
_TAGS = tuple(filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)]))


def _no_gradient(*_: Any) -> None:
    raise RuntimeError(
        "fused ops have no gradient: train FastSCNN itself, or call its reference(x) method"
    )


def _register(
    name: str, arguments: str, result: Callable[..., Tensor], fill: Callable[..., None]
) -> Callable[..., Tensor]:
    """Returns what the dispatcher calls in the end."""

    names = re.findall(r"Tensor (\w+)", arguments)  # they come first

    def made(*args: Any) -> Tensor:
        out = result(*args)
        for tensor, x in zip(names, args):
            check_memory(tensor, x)
        fill(out, *args)
        return out

    _library.define(f"{name}({arguments}) -> Tensor", tags=_TAGS)
    _library.impl(name, made, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastscnn::{name}", result, lib=_library)
    torch.library.register_autograd(f"fastscnn::{name}", _no_gradient, lib=_library)
    return made


run = {name: _register(name, *definition) for name, definition in DEFINITIONS.items()}


def _network_check_out(x: Tensor, *args: Any, out: Tensor) -> None:
    check_out(out, x, _network_spec(x, *args))


def check_network_out(x: Tensor, *args: Any, out: Tensor) -> None:
    """Whether ``out`` can be filled by the network on x; ``args`` as of the op.

    Raises:
        TypeError, ValueError: it cannot, and why.
        RuntimeError: a gradient is wanted, or a tensor has lost its memory.
    """
    _network_check_out(x, *args, out=out)
    for name, tensor in (("x", x), ("weights", args[0]), ("out", out)):
        check_memory(name, tensor)
    begin, end = addresses(out)
    if begin % out.element_size():
        raise ValueError(f"out must be aligned to its dtype {out.dtype}, got address {begin:#x}")
    for name, other in (("x", x), ("weights", args[0])):
        first, last = addresses(other)
        if begin < last and first < end:
            raise ValueError(f"out must not share memory with {name}, got overlapping memory")
    if is_differentiated(x) or is_differentiated(out):
        _no_gradient()


def network_out(x: Tensor, *args: Any, out: Tensor) -> None:
    check_network_out(x, *args, out=out)
    torch.autograd.graph.increment_version(out)
    _network_fill(out, x, *args)


_library.define(f"network.out({_NETWORK}, *, Tensor(a!) out) -> ()", tags=_TAGS)
_library.impl("network.out", network_out, "CompositeExplicitAutograd")
torch.library.register_fake("fastscnn::network.out", _network_check_out, lib=_library)

register_flops(DEFINITIONS)
