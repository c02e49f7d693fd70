"""The fused ops as ``torch.ops.fastscnn.*``: schemas, fake kernels, argument checks and dispatch.

Every op takes its packed weights as one uint8 tensor (see :func:`pack`), its layers as the text of their
program, and a backend's name. Activations are (N, C, H, W) tensors in channels-last memory; a
result's channels are padded to a multiple of 64 bytes in memory, not in its shape. Results have the dtype
that is computed in: x's own, or, for ops that also take raw pixels, the argument ``dtype``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import cpu, runners
from ..program import arithmetic, reference
from ..program.layers import OUTPUTS as OUTPUTS, Layer
from ..program.memory import activation
from ..program.program import Program, encode as encode, parsed


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


# ---------------------------------------------------------------- checks and shapes


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _known(backend: str) -> str:
    """``backend`` itself, a ValueError where there is none of that name."""
    runners.runner(backend)
    return backend


def _check_input(
    name: str,
    x: Tensor,
    channels: int,
    weights: Tensor,
    backend: str,
    wanted: tuple[torch.dtype, ...] = (),
) -> None:
    """``wanted`` are the dtypes that x may have, where not all that the backend computes in."""
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
    wanted = wanted or arithmetic.dtypes(_known(backend))
    if x.dtype not in wanted:
        allowed = ", ".join(map(str, wanted))
        raise TypeError(f"{name} must be of dtype {allowed} for backend {backend}, got {x.dtype}")


def _check_picture(
    x: Tensor, channels: int, weights: Tensor, dtype: torch.dtype, backend: str
) -> None:
    """x may be raw pixels; ``dtype`` is what is computed in."""
    _check_input("x", x, channels, weights, backend, (dtype, torch.uint8))
    if dtype not in arithmetic.dtypes(backend):
        allowed = ", ".join(map(str, arithmetic.dtypes(backend)))
        raise TypeError(f"dtype must be {allowed} for backend {backend}, got {dtype}")


class _Spec(NamedTuple):
    """A full-size result."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _full_size(
    like: Tensor, classes: int, height: int, width: int, dtype: torch.dtype, output: str
) -> _Spec:
    if output not in OUTPUTS:
        raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
    if output != "labels":
        return _Spec((like.shape[0], classes, height, width), dtype)
    if classes > 256:
        raise ValueError(f"labels must be of at most 256 classes (uint8), got {classes}")
    return _Spec((like.shape[0], height, width), torch.uint8)


def _check_out(out: Tensor, x: Tensor, spec: _Spec) -> None:
    if out.dtype != spec.dtype:
        raise TypeError(f"out must be of dtype {spec.dtype}, got {out.dtype}")
    if out.shape != spec.shape:
        raise ValueError(f"out must be of shape {tuple(spec.shape)}, got {tuple(out.shape)}")
    if out.device != x.device:
        raise ValueError(f"out must be on {x.device}, got {out.device}")
    if out.layout is not torch.strided or not out.is_contiguous():
        got = f"strides {out.stride()}" if out.layout is torch.strided else f"{out.layout}"
        raise ValueError(f"out must be contiguous, got {got}")


def _layer(layer: str, op: str) -> Layer:
    layers = parsed(layer).layers
    _require(len(layers) == 1 and layers[0].op == op, f"layer must be one encoded {op}")
    return layers[0]


# ---------------------------------------------------------------- the ops
# Each pair below makes the result (the fake kernel) and fills it.


def _stem_result(
    x: Tensor, weights: Tensor, layer: str, dtype: torch.dtype, backend: str
) -> Tensor:
    one = _layer(layer, "stem_conv")
    _check_picture(x, one.in_channels, weights, dtype, backend)
    return activation(x, one.out_channels, *one.output_size(x.shape[2], x.shape[3]), dtype)


def _stem_fill(
    out: Tensor, x: Tensor, weights: Tensor, layer: str, dtype: torch.dtype, backend: str
) -> None:
    runners.runner(backend).stem_conv(out, x, weights, layer, dtype)


def _plane_result(op: str) -> Callable[..., Tensor]:
    def result(x: Tensor, weights: Tensor, layer: str, backend: str) -> Tensor:
        one = _layer(layer, op)
        _check_input("x", x, one.in_channels, weights, backend)
        size = (x.shape[2], x.shape[3])
        height, width = one.result_size([size], size)
        return activation(x, one.result_channels, height, width, x.dtype)

    return result


def _plane_fill(op: str) -> Callable[..., None]:
    def fill(out: Tensor, x: Tensor, weights: Tensor, layer: str, backend: str) -> None:
        runners.runner(backend).plane(op, out, x, weights, layer)

    return fill


def _fusion_result(high: Tensor, low: Tensor, weights: Tensor, layer: str, backend: str) -> Tensor:
    one = _layer(layer, "feature_fusion")
    _check_input("high", high, one.mid_channels, weights, backend)
    _check_input("low", low, one.in_channels, weights, backend, (high.dtype,))
    _require(
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
    one = _layer(layer, "upsample_classify")
    _check_input("x", x, one.in_channels, weights, backend)
    spec = _full_size(x, one.in_channels, height, width, x.dtype, output)
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
) -> _Spec:
    whole = parsed(program)
    _require(
        whole.is_network,
        "program must be a whole network, from stem_conv on the picture to upsample_classify",
    )
    _check_picture(x, whole.layers[0].in_channels, weights, dtype, backend)
    return _full_size(x, whole.layers[-1].in_channels, x.shape[2], x.shape[3], dtype, output)


def _network_result(x: Tensor, *args: Any) -> Tensor:
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
_DEFINITIONS: dict[str, tuple[str, Callable[..., Tensor], Callable[..., None]]] = {
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
    "network": (_NETWORK, _network_result, _network_fill),
}
_library = torch.library.Library("fastscnn", "DEF")

# Scratch memory outlives a call: torch.compile must not record one into a CUDA graph of its own.
_TAGS = tuple(filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)]))


def _no_gradient(*_: Any) -> None:
    raise RuntimeError(
        "fused ops have no gradient: train FastSCNN itself, or call its reference(x) method"
    )


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


def _needs_dispatcher(x: Tensor) -> bool:
    """Whether anything but the op itself may have to happen to x."""
    return (
        torch.autograd._profiler_enabled()
        or torch._C._len_torch_function_stack() > 0
        or is_traced(x)
        or is_differentiated(x)
        or x.is_neg()
        or x._is_zerotensor()
    )


def _register(
    name: str, arguments: str, result: Callable[..., Tensor], fill: Callable[..., None]
) -> Callable[..., Tensor]:
    """Returns what the dispatcher calls in the end."""

    def run(*args: Any) -> Tensor:
        out = result(*args)
        fill(out, *args)
        return out

    _library.define(f"{name}({arguments}) -> Tensor", tags=_TAGS)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastscnn::{name}", result, lib=_library)
    torch.library.register_autograd(f"fastscnn::{name}", _no_gradient, lib=_library)
    return run


_run = {name: _register(name, *definition) for name, definition in _DEFINITIONS.items()}


def _network_check_out(x: Tensor, *args: Any, out: Tensor) -> None:
    _check_out(out, x, _network_spec(x, *args))


def _addresses(x: Tensor) -> tuple[int, int]:
    """Where the memory of a strided tensor begins and ends."""
    if x.numel() == 0:
        return (0, 0)
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return (x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size())


def check_network_out(x: Tensor, *args: Any, out: Tensor) -> None:
    """Whether ``out`` can be filled by the network on x; ``args`` as of the op.

    Raises:
        TypeError, ValueError: it cannot, and why.
        RuntimeError: a gradient is wanted.
    """
    _network_check_out(x, *args, out=out)
    begin, end = _addresses(out)
    if begin % out.element_size():
        raise ValueError(f"out must be aligned to its dtype {out.dtype}, got address {begin:#x}")
    for name, other in (("x", x), ("weights", args[0])):
        first, last = _addresses(other)
        if begin < last and first < end:
            raise ValueError(f"out must not share memory with {name}, got overlapping memory")
    if is_differentiated(x) or is_differentiated(out):
        _no_gradient()


def _network_out(x: Tensor, *args: Any, out: Tensor) -> None:
    check_network_out(x, *args, out=out)
    torch.autograd.graph.increment_version(out)
    _network_fill(out, x, *args)


_library.define(f"network.out({_NETWORK}, *, Tensor(a!) out) -> ()", tags=_TAGS)
_library.impl("network.out", _network_out, "CompositeExplicitAutograd")
torch.library.register_fake("fastscnn::network.out", _network_check_out, lib=_library)


# ---------------------------------------------------------------- public functions


def stem_conv(
    x: Tensor,
    weights: Tensor,
    layer: Layer,
    backend: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """x (N, C, H, W), of ``dtype`` or raw uint8, any strides -> (N, O, H', W') of ``dtype``."""
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
    """The whole network on x (N, C, H, W), of ``dtype`` or raw uint8, any strides.

    ``program`` comes from encode(). ``out`` is filled and returned where it is given: contiguous, of the
    result's shape and dtype.
    """
    arguments = (x, weights, program, dtype, output, backend)
    if (
        torch.compiler.is_compiling()
        or _needs_dispatcher(x)
        or type(weights) is not Tensor
        or (out is not None and _needs_dispatcher(out))
    ):
        op = torch.ops.fastscnn.network
        if out is None:
            return op.default(*arguments)
        op.out(*arguments, out=out)
    else:  # the dispatcher's detour would take as long as a tenth of a small picture
        if out is None:
            return _run["network"](*arguments)
        _network_out(*arguments, out=out)
    return out


def network_stages(
    x: Tensor,
    weights: Tensor,
    program: str,
    output: str = "logits",
    dtype: torch.dtype = torch.float32,
) -> list[tuple[str, float]]:
    """Name and seconds of each stage of :func:`network` on the cpu backend, for one image."""
    out = _network_result(x, weights, program, dtype, output, "cpu")
    return cpu.RUNNERS["cpu"].network_stages(out, x, weights, program, dtype, output)
