"""The fused ops as ``torch.ops.fastscnn.*``: schemas, fake kernels, argument checks and dispatch.

Every op takes its packed weights as one uint8 tensor (see :func:`pack`), its layers as the text that
:func:`encode` makes, and a backend's name. Activations are (N, C, H, W) tensors in channels-last memory; a
result's channels are padded to a multiple of 64 bytes in memory, not in its shape. Results have the dtype
that is computed in: x's own, or, for ops that also take raw pixels, the argument ``dtype``.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, reference
from .plan import OPS, Layer

OUTPUTS = ("logits", "probabilities", "labels")

# The tag before packed weights (csrc/cpu/program.h): magic, version, layout, dtype, hash of the layers, bytes.
_TAG = struct.Struct("<4I2Q32x")
_LAYOUT_AT = 8  # bytes into the tag
_MAGIC, _VERSION = 0x4E435346, 1
_REFERENCE_LAYOUT = 0
_CPU_LAYOUTS = {at: dtype for at, (dtype, _) in enumerate(backends.ARITHMETICS.values(), start=1)}
_BACKENDS = ("reference", "cpu")
_LINE = 64  # bytes of which every pixel of an activation takes a multiple

_PICTURE_KINDS = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.uint8: "uint8",
}


# ---------------------------------------------------------------- programs


class _Program(NamedTuple):
    layers: tuple[Layer, ...]
    integers: tuple[int, ...]
    hash: int


def encode(layers: Sequence[Layer]) -> str:
    """The text by which layers travel: the dispatcher would copy a list of integers value by value."""
    return " ".join(str(value) for layer in layers for value in layer.encode())


@lru_cache(maxsize=256)
def _parsed(program: str) -> _Program:
    try:
        integers = tuple(map(int, program.split()))
    except ValueError:
        raise ValueError(f"program must be as encode() writes it, got {program!r}") from None
    value = 0xCBF29CE484222325
    for v in integers:
        value = (value ^ v) * 0x100000001B3 % 2**64
    return _Program(tuple(Layer.decode(integers)), integers, value)


# ---------------------------------------------------------------- packed weights


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
        backend: "cpu" (float32 and bfloat16 only) or "reference".
        dtype: the dtype to compute in.
        precision: "highest", or "high" (cpu and float32 only): products of about 17 bits.

    Raises:
        ValueError: a tensor is missing or of a wrong shape, or the backend has no such layout.
    """
    _require(
        backend in _BACKENDS, f"backend must be one of {', '.join(_BACKENDS)}, got {backend!r}"
    )
    wanted = _dtypes(backend)
    _require(
        dtype in wanted,
        f"dtype must be {' or '.join(map(str, wanted))} for backend {backend}, got {dtype}",
    )
    _require(
        backend == "cpu" or precision == "highest",
        f"precision must be 'highest' for backend {backend}, got {precision!r}",
    )
    program = _parsed(encode(layers))
    plain_dtype = torch.float32 if backend == "cpu" else dtype
    flat = [torch.zeros(0, dtype=plain_dtype, device="cpu")]
    for index, (layer, named) in enumerate(zip(layers, tensors, strict=True)):
        for name, shape in layer.weights().items():
            if name not in named or tuple(named[name].shape) != shape:
                got = tuple(named[name].shape) if name in named else "nothing"
                raise ValueError(
                    f"weights of layer {index} ({layer.op}): {name} must be {shape}, got {got}"
                )
            flat.append(named[name].detach().to("cpu", plain_dtype).reshape(-1))
    plain = torch.cat(flat)
    if backend == "cpu":
        cpu, arithmetic = backends.cpu_module(), backends.arithmetic(dtype, precision)
        size = cpu.packed_bytes(program.integers, arithmetic)
        packed = torch.empty(size, dtype=torch.uint8, device="cpu")
        cpu.pack(program.integers, arithmetic, plain.data_ptr(), plain.numel(), packed.data_ptr())
        return packed
    size = _TAG.size + plain.numel() * plain.element_size()
    tag = _TAG.pack(
        _MAGIC, _VERSION, _REFERENCE_LAYOUT, backends.DTYPES.index(dtype), program.hash, size
    )
    return torch.cat([torch.frombuffer(bytearray(tag), dtype=torch.uint8), plain.view(torch.uint8)])


def _unpack(weights: Tensor, program: str, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """The reference layout's tensors, as views."""
    tag = (
        bytes(weights[: _TAG.size].cpu().numpy())
        if weights.numel() >= _TAG.size
        else bytes(_TAG.size)
    )
    magic, version, layout, packed_dtype, program_hash, size = _TAG.unpack(tag)
    if (magic, version, layout) != (_MAGIC, _VERSION, _REFERENCE_LAYOUT):
        raise ValueError("weights must be packed for the reference backend, got another layout")
    parsed = _parsed(program)
    if program_hash != parsed.hash or size != weights.numel():
        raise ValueError("weights must be packed for these layers, got weights of other layers")
    _check_packed_dtype(backends.DTYPES[packed_dtype], dtype)
    plain = weights[_TAG.size :].view(dtype)
    tensors, at = [], 0
    for layer in parsed.layers:
        named = {}
        for name, shape in layer.weights().items():
            named[name] = plain[at : at + prod(shape)].view(shape)
            at += prod(shape)
        tensors.append(named)
    return tensors


def _check_packed_dtype(packed: torch.dtype, dtype: torch.dtype) -> None:
    if packed != dtype:
        raise ValueError(f"weights must be packed for {dtype}, got weights for {packed}")


# ---------------------------------------------------------------- checks and shapes


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _dtypes(backend: str) -> tuple[torch.dtype, ...]:
    return backends.DTYPES if backend == "reference" else backends.CPU_DTYPES


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
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}, got {backend!r}")
    wanted = wanted or _dtypes(backend)
    if x.dtype not in wanted:
        allowed = ", ".join(map(str, wanted))
        raise TypeError(f"{name} must be of dtype {allowed} for backend {backend}, got {x.dtype}")


def _check_picture(
    x: Tensor, channels: int, weights: Tensor, dtype: torch.dtype, backend: str
) -> None:
    """x may be raw pixels; ``dtype`` is what is computed in."""
    _check_input("x", x, channels, weights, backend, (dtype, torch.uint8))
    if dtype not in _dtypes(backend):
        allowed = ", ".join(map(str, _dtypes(backend)))
        raise TypeError(f"dtype must be {allowed} for backend {backend}, got {dtype}")


def _padded(channels: int, dtype: torch.dtype) -> int:
    block = _LINE // dtype.itemsize
    return -(-channels // block) * block


def _activation(like: Tensor, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """An empty (N, channels, height, width) in channels-last memory with padded channels."""
    memory = like.new_empty((like.shape[0], height, width, _padded(channels, dtype)), dtype=dtype)
    return memory.permute(0, 3, 1, 2)[:, :channels]


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
    layers = _parsed(layer).layers
    _require(len(layers) == 1 and layers[0].op == op, f"layer must be one encoded {op}")
    return layers[0]


# ---------------------------------------------------------------- calls into the backends


def _batch(x: Tensor) -> tuple[int, int, int, int]:
    """Address and size of an activation that _activation or _dense made; the caller keeps it alive."""
    return (x.data_ptr(), x.shape[0], x.shape[2], x.shape[3])


def _dense(x: Tensor) -> Tensor:
    """x in channels-last memory with channels padded by zeros: itself where it already is so."""
    channels, memory = x.shape[1], x.permute(0, 2, 3, 1)
    padding = _padded(channels, x.dtype) - channels
    if padding:
        memory = torch.nn.functional.pad(memory, (0, padding))
    return memory.contiguous().permute(0, 3, 1, 2)  # pad keeps what it takes for x's layout


def _picture(x: Tensor) -> tuple[int, str, torch.Size, tuple[int, ...]]:
    return (x.data_ptr(), _PICTURE_KINDS[x.dtype], x.shape, x.stride())


def _call(
    program: str, weights: Tensor, dtype: torch.dtype
) -> tuple[str, tuple[int, ...], int, int, int]:
    if weights.device.type != "cpu":
        raise ValueError(f"weights must be on the cpu for backend cpu, got {weights.device}")
    address, size = weights.data_ptr(), weights.numel()
    if size >= _TAG.size:  # the layout alone decides how many bytes an element has
        layout = ctypes.c_uint32.from_address(address + _LAYOUT_AT).value
        _check_packed_dtype(_CPU_LAYOUTS.get(layout, dtype), dtype)
    threads = torch.get_num_threads()
    return (backends.isa(), _parsed(program).integers, address, size, threads)


def _by_reference(
    function: Callable[..., Tensor], out: Tensor, weights: Tensor, program: str, dtype: torch.dtype
) -> None:
    """``function(layers, tensors)`` in the dtype asked for, whatever surrounds the call."""
    tensors = _unpack(weights, program, dtype)
    with torch.autocast(out.device.type, enabled=False):
        out.copy_(function(_parsed(program).layers, tensors))


# ---------------------------------------------------------------- the ops
# Each pair below makes the result (the fake kernel) and fills it.


def _stem_result(
    x: Tensor, weights: Tensor, layer: str, dtype: torch.dtype, backend: str
) -> Tensor:
    one = _layer(layer, "stem_conv")
    _check_picture(x, one.in_channels, weights, dtype, backend)
    return _activation(x, one.out_channels, *one.output_size(x.shape[2], x.shape[3]), dtype)


def _stem_fill(
    out: Tensor, x: Tensor, weights: Tensor, layer: str, dtype: torch.dtype, backend: str
) -> None:
    if backend == "reference":
        _by_reference(
            lambda layers, tensors: reference.stem_conv(x, layers[0], tensors[0]),
            out,
            weights,
            layer,
            dtype,
        )
        return
    call = _call(layer, weights, dtype)
    backends.cpu_module().stem_conv(call, _picture(x), _batch(out))


def _plane_result(op: str) -> Callable[..., Tensor]:
    def result(x: Tensor, weights: Tensor, layer: str, backend: str) -> Tensor:
        one = _layer(layer, op)
        _check_input("x", x, one.in_channels, weights, backend)
        height, width = x.shape[2:]
        if op != "pyramid_pooling":
            height, width = one.output_size(height, width)
        return _activation(x, one.last_channels or one.out_channels, height, width, x.dtype)

    return result


def _plane_fill(op: str) -> Callable[..., None]:
    def fill(out: Tensor, x: Tensor, weights: Tensor, layer: str, backend: str) -> None:
        if backend == "reference":
            function = getattr(reference, op)
            _by_reference(
                lambda layers, tensors: function(x, layers[0], tensors[0]),
                out,
                weights,
                layer,
                x.dtype,
            )
            return
        x = _dense(x)
        call = _call(layer, weights, x.dtype)
        getattr(backends.cpu_module(), op)(call, _batch(x), _batch(out))

    return fill


def _fusion_result(high: Tensor, low: Tensor, weights: Tensor, layer: str, backend: str) -> Tensor:
    one = _layer(layer, "feature_fusion")
    _check_input("high", high, one.mid_channels, weights, backend)
    _check_input("low", low, one.in_channels, weights, backend, (high.dtype,))
    _require(
        high.shape[0] == low.shape[0],
        f"low must have high's batch {high.shape[0]}, got {low.shape[0]}",
    )
    return _activation(high, one.out_channels, high.shape[2], high.shape[3], high.dtype)


def _fusion_fill(
    out: Tensor, high: Tensor, low: Tensor, weights: Tensor, layer: str, backend: str
) -> None:
    if backend == "reference":
        _by_reference(
            lambda layers, tensors: reference.feature_fusion(high, low, layers[0], tensors[0]),
            out,
            weights,
            layer,
            high.dtype,
        )
        return
    high, low = _dense(high), _dense(low)
    call = _call(layer, weights, high.dtype)
    backends.cpu_module().feature_fusion(call, _batch(high), _batch(low), _batch(out))


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
    if backend == "reference":
        _by_reference(
            lambda layers, _: reference.upsample_classify(x, layers[0], (height, width), output),
            out,
            weights,
            layer,
            x.dtype,
        )
        return
    x = _dense(x)
    call = _call(layer, weights, x.dtype)
    backends.cpu_module().upsample_classify(call, _batch(x), output, out.data_ptr(), height, width)


def _network_spec(
    x: Tensor, weights: Tensor, program: str, dtype: torch.dtype, output: str, backend: str
) -> _Spec:
    layers = _parsed(program).layers
    _require(
        len(layers) >= 9 and layers[0].op == OPS[0] and layers[-1].op == OPS[-1],
        "program must be a whole network",
    )
    _check_picture(x, layers[0].in_channels, weights, dtype, backend)
    return _full_size(x, layers[-1].in_channels, x.shape[2], x.shape[3], dtype, output)


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
    if backend == "reference":
        _by_reference(
            lambda layers, tensors: reference.network(x, layers, tensors, output),
            out,
            weights,
            program,
            dtype,
        )
        return
    _run_network("network", out, x, weights, program, dtype, output)


def _run_network(
    function: str,
    out: Tensor,
    x: Tensor,
    weights: Tensor,
    program: str,
    dtype: torch.dtype,
    output: str,
) -> Any:
    run = getattr(backends.cpu_module(), function)
    return run(_call(program, weights, dtype), _picture(x), output, out.data_ptr())


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

    _library.define(f"{name}({arguments}) -> Tensor")
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


def _network_out(x: Tensor, *args: Any, out: Tensor) -> None:
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
    torch.autograd.graph.increment_version(out)
    _network_fill(out, x, *args)


_library.define(f"network.out({_NETWORK}, *, Tensor(a!) out) -> ()")
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
    return _run_network("network_stages", out, x, weights, program, dtype, output)
