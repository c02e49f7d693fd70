"""The fused ops as ``torch.ops.fastscnn.*``: schemas, fake kernels, argument checks and dispatch.

Every op takes its packed weights as one uint8 tensor (see :func:`pack`), its layer as the integers of
:meth:`fastscnn_fast.plan.Layer.encode`, and a backend's name. Activations are (N, C, H, W) tensors in
channels-last memory; a result's channels are padded to a multiple of 16 in memory, not in its shape.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import backends, reference
from .plan import OPS, Layer

OUTPUTS = ("logits", "probabilities", "labels")

# The tag before packed weights (csrc/cpu/program.h): magic, version, layout, dtype, hash of the layers, bytes.
_TAG = struct.Struct("<4I2Q32x")
_MAGIC, _VERSION = 0x4E435346, 1
_LAYOUTS = {"reference": 0, "cpu": 1}


# ---------------------------------------------------------------- packed weights


def encode(layers: Sequence[Layer]) -> tuple[int, ...]:
    """The integers by which layers travel."""
    return tuple(value for layer in layers for value in layer.encode())


@lru_cache(maxsize=256)
def _decoded(program: tuple[int, ...]) -> tuple[Layer, ...]:
    return tuple(Layer.decode(program))


@lru_cache(maxsize=256)
def _hash(program: tuple[int, ...]) -> int:
    value = 0xCBF29CE484222325
    for v in program:
        value = (value ^ v) * 0x100000001B3 % 2**64
    return value


def pack(
    layers: Sequence[Layer],
    tensors: Sequence[reference.Weights],
    backend: str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weights of ``layers`` as one tagged uint8 tensor in the backend's own layout.

    Args:
        tensors: per layer, what ``layer.weights()`` names, in any floating dtype.
        backend: "cpu" (float32 only) or "reference".
        dtype: the dtype to compute in.

    Raises:
        ValueError: a tensor is missing or of a wrong shape, or the backend has no such layout.
    """
    _require(backend in _LAYOUTS, f"backend must be one of {', '.join(_LAYOUTS)}, got {backend!r}")
    wanted = _dtypes(backend)
    _require(
        dtype in wanted,
        f"dtype must be {' or '.join(map(str, wanted))} for backend {backend}, got {dtype}",
    )
    program = encode(layers)
    flat = [torch.zeros(0, dtype=dtype, device="cpu")]
    for index, (layer, named) in enumerate(zip(layers, tensors, strict=True)):
        for name, shape in layer.weights().items():
            if name not in named or tuple(named[name].shape) != shape:
                got = tuple(named[name].shape) if name in named else "nothing"
                raise ValueError(
                    f"weights of layer {index} ({layer.op}): {name} must be {shape}, got {got}"
                )
            flat.append(named[name].detach().to("cpu", dtype).reshape(-1))
    plain = torch.cat(flat)
    if backend == "cpu":
        cpu = backends.cpu_module()
        packed = torch.empty(cpu.packed_bytes(program), dtype=torch.uint8, device="cpu")
        cpu.pack(program, plain.data_ptr(), plain.numel(), packed.data_ptr())
        return packed
    size = _TAG.size + plain.numel() * plain.element_size()
    tag = _TAG.pack(
        _MAGIC, _VERSION, _LAYOUTS["reference"], backends.DTYPES.index(dtype), _hash(program), size
    )
    return torch.cat([torch.frombuffer(bytearray(tag), dtype=torch.uint8), plain.view(torch.uint8)])


def _unpack(weights: Tensor, program: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """The reference layout's tensors, as views."""
    tag = (
        bytes(weights[: _TAG.size].cpu().numpy())
        if weights.numel() >= _TAG.size
        else bytes(_TAG.size)
    )
    magic, version, layout, dtype, program_hash, size = _TAG.unpack(tag)
    if (magic, version, layout) != (_MAGIC, _VERSION, _LAYOUTS["reference"]):
        raise ValueError("weights must be packed for the reference backend, got another layout")
    if program_hash != _hash(program) or size != weights.numel():
        raise ValueError("weights must be packed for these layers, got weights of other layers")
    plain = weights[_TAG.size :].view(backends.DTYPES[dtype])
    tensors, at = [], 0
    for layer in _decoded(program):
        named = {}
        for name, shape in layer.weights().items():
            named[name] = plain[at : at + prod(shape)].view(shape)
            at += prod(shape)
        tensors.append(named)
    return tensors


# ---------------------------------------------------------------- checks and shapes


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _dtypes(backend: str) -> tuple[torch.dtype, ...]:
    return backends.DTYPES if backend == "reference" else (torch.float32,)


def _check_input(
    name: str, x: Tensor, channels: int, weights: Tensor, backend: str, raw: bool = False
) -> None:
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
    if backend not in _LAYOUTS:
        raise ValueError(f"backend must be one of {', '.join(_LAYOUTS)}, got {backend!r}")
    wanted = (*_dtypes(backend), torch.uint8) if raw else _dtypes(backend)
    if x.dtype not in wanted:
        allowed = ", ".join(map(str, wanted))
        raise TypeError(f"{name} must be of dtype {allowed} for backend {backend}, got {x.dtype}")


def _padded(channels: int) -> int:
    return (channels + 15) // 16 * 16


def _activation(like: Tensor, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """An empty (N, channels, height, width) in channels-last memory with padded channels."""
    memory = like.new_empty((like.shape[0], height, width, _padded(channels)), dtype=dtype)
    return memory.permute(0, 3, 1, 2)[:, :channels]


def _float_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype == torch.uint8 else x.dtype


def _full_size(like: Tensor, classes: int, height: int, width: int, output: str) -> Tensor:
    _require(output in OUTPUTS, f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
    if output != "labels":
        return like.new_empty((like.shape[0], classes, height, width), dtype=_float_dtype(like))
    _require(classes <= 256, f"labels must be of at most 256 classes (uint8), got {classes}")
    return like.new_empty((like.shape[0], height, width), dtype=torch.uint8)


def _layer(values: Sequence[int], op: str) -> Layer:
    layers = _decoded(tuple(values))
    _require(len(layers) == 1 and layers[0].op == op, f"layer must be one encoded {op}")
    return layers[0]


# ---------------------------------------------------------------- calls into the extension


def _batch(x: Tensor) -> tuple[int, int, int, int]:
    """Address and size of an activation that _activation or _dense made."""
    return (x.data_ptr(), x.shape[0], x.shape[2], x.shape[3])


def _dense(x: Tensor) -> Tensor:
    """x in channels-last memory with channels padded by zeros: itself where it already is so."""
    channels, memory = x.shape[1], x.permute(0, 2, 3, 1)
    if channels % 16:
        memory = torch.nn.functional.pad(memory, (0, -channels % 16))
    return memory.contiguous().permute(0, 3, 1, 2)  # pad keeps what it takes for x's layout


def _picture(x: Tensor) -> tuple[int, bool, torch.Size, tuple[int, ...]]:
    return (x.data_ptr(), x.dtype == torch.uint8, x.shape, x.stride())


def _call(program: Sequence[int], weights: Tensor) -> tuple[str, tuple[int, ...], int, int, int]:
    if weights.device.type != "cpu":
        raise ValueError(f"weights must be on the cpu for backend cpu, got {weights.device}")
    threads = torch.get_num_threads()
    return (backends.isa(), tuple(program), weights.data_ptr(), weights.numel(), threads)


# ---------------------------------------------------------------- the ops
# Each pair below makes the result (the fake kernel) and fills it.


def _plane_result(op: str, raw: bool = False) -> Callable[..., Tensor]:
    def result(x: Tensor, weights: Tensor, layer: Sequence[int], backend: str) -> Tensor:
        one = _layer(layer, op)
        _check_input("x", x, one.in_channels, weights, backend, raw)
        height, width = x.shape[2:]
        if op != "pyramid_pooling":
            height, width = one.output_size(height, width)
        return _activation(x, one.last_channels or one.out_channels, height, width, _float_dtype(x))

    return result


def _plane_fill(op: str, picture: bool = False) -> Callable[..., None]:
    def fill(out: Tensor, x: Tensor, weights: Tensor, layer: Sequence[int], backend: str) -> None:
        if backend == "reference":
            (named,) = _unpack(weights, tuple(layer))
            out.copy_(getattr(reference, op)(x, _layer(layer, op), named))
            return
        x = x if picture else _dense(x)
        argument = _picture(x) if picture else _batch(x)
        getattr(backends.cpu_module(), op)(_call(layer, weights), argument, _batch(out))

    return fill


def _fusion_result(
    high: Tensor, low: Tensor, weights: Tensor, layer: Sequence[int], backend: str
) -> Tensor:
    one = _layer(layer, "feature_fusion")
    _check_input("high", high, one.mid_channels, weights, backend)
    _check_input("low", low, one.in_channels, weights, backend)
    _require(
        high.shape[0] == low.shape[0],
        f"low must have high's batch {high.shape[0]}, got {low.shape[0]}",
    )
    return _activation(high, one.out_channels, high.shape[2], high.shape[3], high.dtype)


def _fusion_fill(
    out: Tensor, high: Tensor, low: Tensor, weights: Tensor, layer: Sequence[int], backend: str
) -> None:
    if backend == "reference":
        (named,) = _unpack(weights, tuple(layer))
        out.copy_(reference.feature_fusion(high, low, _layer(layer, "feature_fusion"), named))
        return
    high, low = _dense(high), _dense(low)
    call = _call(layer, weights)
    backends.cpu_module().feature_fusion(call, _batch(high), _batch(low), _batch(out))


def _upsample_result(
    x: Tensor,
    weights: Tensor,
    layer: Sequence[int],
    height: int,
    width: int,
    output: str,
    backend: str,
) -> Tensor:
    one = _layer(layer, "upsample_classify")
    _check_input("x", x, one.in_channels, weights, backend)
    return _full_size(x, one.in_channels, height, width, output)


def _upsample_fill(
    out: Tensor,
    x: Tensor,
    weights: Tensor,
    layer: Sequence[int],
    height: int,
    width: int,
    output: str,
    backend: str,
) -> None:
    if backend == "reference":
        one = _layer(layer, "upsample_classify")
        _unpack(weights, tuple(layer))
        out.copy_(reference.upsample_classify(x, one, (height, width), output))
        return
    x = _dense(x)
    backends.cpu_module().upsample_classify(
        _call(layer, weights), _batch(x), output, out.data_ptr(), height, width
    )


def _network_result(
    x: Tensor, weights: Tensor, program: Sequence[int], output: str, backend: str
) -> Tensor:
    layers = _decoded(tuple(program))
    _require(
        len(layers) >= 9 and layers[0].op == OPS[0] and layers[-1].op == OPS[-1],
        "program must be a whole network",
    )
    _check_input("x", x, layers[0].in_channels, weights, backend, raw=True)
    return _full_size(x, layers[-1].in_channels, x.shape[2], x.shape[3], output)


def _network_fill(
    out: Tensor, x: Tensor, weights: Tensor, program: Sequence[int], output: str, backend: str
) -> None:
    if backend == "reference":
        layers = _decoded(tuple(program))
        out.copy_(reference.network(x, layers, _unpack(weights, tuple(program)), output))
        return
    call = _call(program, weights)
    backends.cpu_module().network(call, _picture(x), output, out.data_ptr())


_PLANE = "(Tensor x, Tensor weights, int[] layer, str backend) -> Tensor"
_DEFINITIONS: dict[str, tuple[str, Callable[..., Tensor], Callable[..., None]]] = {
    "stem_conv": (
        _PLANE,
        _plane_result("stem_conv", raw=True),
        _plane_fill("stem_conv", picture=True),
    ),
    "dsconv": (_PLANE, _plane_result("dsconv"), _plane_fill("dsconv")),
    "inverted_residual": (
        _PLANE,
        _plane_result("inverted_residual"),
        _plane_fill("inverted_residual"),
    ),
    "pyramid_pooling": (_PLANE, _plane_result("pyramid_pooling"), _plane_fill("pyramid_pooling")),
    "feature_fusion": (
        "(Tensor high, Tensor low, Tensor weights, int[] layer, str backend) -> Tensor",
        _fusion_result,
        _fusion_fill,
    ),
    "upsample_classify": (
        "(Tensor x, Tensor weights, int[] layer, SymInt height, SymInt width, str output,"
        " str backend) -> Tensor",
        _upsample_result,
        _upsample_fill,
    ),
    "network": (
        "(Tensor x, Tensor weights, int[] program, str output, str backend) -> Tensor",
        _network_result,
        _network_fill,
    ),
}

_library = torch.library.Library("fastscnn", "DEF")


def _no_gradient(*_: Any) -> None:
    raise RuntimeError(
        "fused ops have no gradient: train FastSCNN itself, or call its reference(x) method"
    )


def _register(
    name: str, schema: str, result: Callable[..., Tensor], fill: Callable[..., None]
) -> None:
    def run(*args: Any) -> Tensor:
        out = result(*args)
        # In the dtype asked for, whatever surrounds the call.
        with torch.autocast(out.device.type, enabled=False):
            fill(out, *args)
        return out

    _library.define(name + schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastscnn::{name}", result, lib=_library)
    torch.library.register_autograd(f"fastscnn::{name}", _no_gradient, lib=_library)


for _name, _definition in _DEFINITIONS.items():
    _register(_name, *_definition)


# ---------------------------------------------------------------- public functions


def stem_conv(x: Tensor, weights: Tensor, layer: Layer, backend: str = "cpu") -> Tensor:
    """x (N, C, H, W), float32 or raw uint8, any strides -> (N, O, H', W')."""
    return torch.ops.fastscnn.stem_conv(x, weights, layer.encode(), backend)


def dsconv(x: Tensor, weights: Tensor, layer: Layer, backend: str = "cpu") -> Tensor:
    """x (N, C, H, W) float32 -> (N, O, H', W'), O the last 1x1's where the layer has one."""
    return torch.ops.fastscnn.dsconv(x, weights, layer.encode(), backend)


def inverted_residual(x: Tensor, weights: Tensor, layer: Layer, backend: str = "cpu") -> Tensor:
    """x (N, C, H, W) float32 -> (N, O, H', W')."""
    return torch.ops.fastscnn.inverted_residual(x, weights, layer.encode(), backend)


def pyramid_pooling(x: Tensor, weights: Tensor, layer: Layer, backend: str = "cpu") -> Tensor:
    """x (N, C, H, W) float32 -> (N, O, H, W)."""
    return torch.ops.fastscnn.pyramid_pooling(x, weights, layer.encode(), backend)


def feature_fusion(
    high: Tensor, low: Tensor, weights: Tensor, layer: Layer, backend: str = "cpu"
) -> Tensor:
    """high (N, M, H, W), low (N, C, h, w) float32 -> (N, O, H, W)."""
    return torch.ops.fastscnn.feature_fusion(high, low, weights, layer.encode(), backend)


def upsample_classify(
    x: Tensor,
    weights: Tensor,
    layer: Layer,
    size: tuple[int, int],
    output: str = "logits",
    backend: str = "cpu",
) -> Tensor:
    """x (N, K, h, w) float32 -> logits or probabilities (N, K, *size), or uint8 labels (N, *size)."""
    height, width = size
    return torch.ops.fastscnn.upsample_classify(
        x, weights, layer.encode(), height, width, output, backend
    )


def network(
    x: Tensor,
    weights: Tensor,
    program: Sequence[int],
    output: str = "logits",
    backend: str = "cpu",
) -> Tensor:
    """The whole network on x (N, C, H, W), float32 or raw uint8, any strides; ``program`` from encode()."""
    return torch.ops.fastscnn.network(x, weights, program, output, backend)
