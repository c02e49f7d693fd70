"""The fused ops by csrc/cuda: how a layer and its buffers become the arguments of its C interface."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...lower.gpu import computed_channels
from ...lower.gpu_int8 import terms
from ...program.layers import ACTIVATIONS, OUTPUTS, Layer
from ...program.memory import COUNTERS, PARTIALS, Buffer
from .. import registry
from . import nvcc

# As csrc/cuda/fastscnn_cuda.h numbers them.
_TYPES = {
    dtype: number
    for number, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.uint8))
}
#: Bytes of which the address of every plane and piece of weights is a multiple.
ALIGNMENT = 16


@dataclass(frozen=True)
class CudaStep:
    """One call of the C interface: ``sizes`` and the addresses of ``arguments`` fill the op's struct.

    Of ``sizes`` the struct takes what it has; addresses that a layer has not stay null. ``follows``: nothing is
    queued between the CUDA step before and this one, which may begin while that one ends (fastscnn_stream).
    """

    op: str
    sizes: Mapping[str, Any]
    arguments: Mapping[str, Buffer]
    follows: bool = False

    @property
    def buffers(self) -> Mapping[str, Buffer]:
        return self.arguments

    @property
    def bytes(self) -> int:
        """See :meth:`Buffer.moved`."""
        return Buffer.moved(self.arguments.values())

    def struct(self) -> Any:
        """The arguments without addresses.

        Raises:
            KeyError: the struct has a size that the step has not.
        """
        filled = registry.cuda_module().arguments[self.op]()
        for name in filled.sizes:
            setattr(filled, name, self.sizes[name])
        return filled

    def run(self, arguments: Any) -> None:
        """On the current device and stream; ``arguments`` is a :meth:`struct` with an address for every buffer.

        Raises:
            ValueError: an argument breaks a rule, which is named.
            RuntimeError: the launch failed, with CUDA's own text.
        """
        module = registry.cuda_module()
        stream = 0 if module.on_host else torch.cuda.current_stream().cuda_stream
        getattr(module, self.op)(arguments, stream, self.follows)


@dataclass(frozen=True)
class Described:
    """A launch of a step: ``kernel`` as nvcc.kernel_of names it, parameters in order with buffers for pointers."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    parameters: tuple[tuple[str, str, Any], ...]  # name, type, Buffer (None: null) or number

    @property
    def bytes(self) -> int:
        """See :meth:`Buffer.moved`."""
        return Buffer.moved(v for _, _, v in self.parameters if isinstance(v, Buffer))


def described(made: CudaStep) -> list[Described]:
    """The launches of a step; no GPU is needed."""
    arguments = made.struct()
    buffers = [None, *made.arguments.values()]
    for number, name in enumerate(made.arguments, start=1):
        setattr(arguments, name, number * ALIGNMENT)  # in place of an address
    return [
        Described(
            nvcc.kernel_of(one.kernel),
            tuple(one.grid),
            one.threads,
            one.shared,
            tuple((p.name, p.type, _argument(p.type, p.value, buffers)) for p in one.parameters),
        )
        for one in registry.cuda_module().describe(arguments)
    ]


def _argument(type_: str, bits: int, buffers: Sequence[Buffer | None]) -> Any:
    if type_ == "pointer":
        return buffers[bits // ALIGNMENT]
    (value,) = struct.unpack(
        {"int32": "<i4x", "int64": "<q", "float32": "<f4x"}[type_], bits.to_bytes(8, "little")
    )
    return value


def step(
    layer: Layer,
    inputs: Sequence[Buffer],
    out: Buffer,
    weights: Mapping[str, Buffer],
    dtype: torch.dtype,
    output: str,
    processors: int,
    slices: int | None = None,
) -> CudaStep:
    """``layer`` on ``inputs`` (feature_fusion: (high, low)), laid out as plan.placed() does.

    Its work is cut for a GPU of so many multiprocessors, inverted_residual's into ``slices`` where they are given.
    """
    made = _STEPS[layer.op](layer, inputs, out, weights, output)
    sizes = {**_of_layer(layer), **made.sizes}
    if dtype == torch.int8:
        made = replace(made, op=f"{layer.op}_int8", sizes=sizes)
    else:
        made = replace(made, sizes={"type": _TYPES[dtype], **sizes})
    return _cut(made, processors, slices) if layer.op == "inverted_residual" else made


def _cut(made: CudaStep, processors: int, slices: int | None) -> CudaStep:
    """With ``slices`` or those that fill the GPU, and the scratch in which their sums meet."""
    module = registry.cuda_module()
    made = replace(made, sizes={**made.sizes, "slices": 1})
    if slices is None:
        slices = module.inverted_residual_slices(made.struct(), processors)
    made = replace(made, sizes={**made.sizes, "slices": slices})
    partials, counters = module.inverted_residual_scratch(made.struct())
    scratch = {
        "partials": Buffer.dense(PARTIALS, torch.float32, (partials // 4,)),
        "counters": Buffer.dense(COUNTERS, torch.int32, (counters // 4,)),
    }
    return replace(made, arguments={**made.arguments, **(scratch if counters else {})})


def _of_layer(layer: Layer) -> dict[str, int]:
    """The layer's numbers under their own names, which most structs share."""
    return {
        "in_channels": layer.in_channels,
        "mid_channels": layer.mid_channels,
        "out_channels": layer.out_channels,
        "last_channels": layer.last_channels,
        "stride": layer.stride,
        "dilation": layer.dilation,
        "padding": layer.padding,
        "kernel": layer.kernel,
        "activation": ACTIVATIONS.index(layer.activation),
        "mid_activation": ACTIVATIONS.index(layer.mid_activation),
        "residual": int(layer.residual),
        "dense": int(layer.dense),
        "align_corners": int(layer.align_corners),
    }


def _planes(name: str, plane: Buffer) -> dict[str, int]:
    """Strides of an (N, H, W, C) activation."""
    return {f"{name}_image": plane.strides[0], f"{name}_pixel": plane.strides[2]}


def _sizes(x: Buffer, out: Buffer) -> dict[str, int]:
    """Of (N, H, W, C) activations."""
    images, height, width, _ = x.shape
    _, out_height, out_width, _ = out.shape
    return {
        "images": images,
        "height": height,
        "width": width,
        "out_height": out_height,
        "out_width": out_width,
        **_planes("x", x),
        **_planes("out", out),
    }


def _stem_conv(
    layer: Layer, inputs: Sequence[Buffer], out: Buffer, weights: Mapping[str, Buffer], _: str
) -> CudaStep:
    (x,) = inputs
    images, channels, height, width = x.shape
    x_image, x_channel, x_row, x_column = x.strides
    sizes = {
        "x_type": _TYPES[x.dtype],
        "channels": channels,
        "images": images,
        "height": height,
        "width": width,
        "out_height": out.shape[1],
        "out_width": out.shape[2],
        "x_image": x_image,
        "x_channel": x_channel,
        "x_row": x_row,
        "x_column": x_column,
        **_planes("out", out),
    }
    return CudaStep("stem_conv", sizes, {"x": x, **weights, "out": out})


def _dsconv(
    layer: Layer, inputs: Sequence[Buffer], out: Buffer, weights: Mapping[str, Buffer], _: str
) -> CudaStep:
    (x,) = inputs
    sizes = {
        "out_type": _TYPES[out.dtype],
        **_sizes(x, out),
        "out_channel": out.strides[3],
    }
    return CudaStep("dsconv", sizes, {"x": x, **weights, "out": out})


def _inverted_residual(
    layer: Layer, inputs: Sequence[Buffer], out: Buffer, weights: Mapping[str, Buffer], _: str
) -> CudaStep:
    (x,) = inputs
    return CudaStep("inverted_residual", _sizes(x, out), {"x": x, **weights, "out": out})


def _pyramid_pooling(
    layer: Layer, inputs: Sequence[Buffer], out: Buffer, weights: Mapping[str, Buffer], _: str
) -> CudaStep:
    (x,) = inputs
    images, height, width, channels = x.shape
    cells = sum(bins**2 for bins in layer.bins)
    # Sums over the columns of each bin of a row; of each cell of all grids the channels, or its share of each tap.
    rows = (images, height, sum(layer.bins))
    if x.dtype == torch.uint8:
        grids = (images, cells, weights["branch_bias"].shape[-1])
        scratch = {
            "sums": Buffer.dense("pyramid_sums", torch.int32, (*rows, terms(channels))),
            "grids": Buffer.dense("pyramid_grids", x.dtype, grids),
        }
    else:
        sums = (*rows, computed_channels(channels))
        shares = (images, layer.kernel**2, cells, weights["grid_weight"].shape[-1])
        scratch = {
            "sums": Buffer.dense("pyramid_sums", torch.float32, sums),
            "shares": Buffer.dense("pyramid_shares", x.dtype, shares),
        }
    sizes = {
        "branches": len(layer.bins),
        "bins": list(layer.bins),
        "images": images,
        "height": height,
        "width": width,
        **_planes("x", x),
        **_planes("out", out),
    }
    return CudaStep("pyramid_pooling", sizes, {"x": x, **weights, **scratch, "out": out})


def _feature_fusion(
    layer: Layer, inputs: Sequence[Buffer], out: Buffer, weights: Mapping[str, Buffer], _: str
) -> CudaStep:
    high, low = inputs
    sizes = {
        "low_channels": layer.in_channels,
        "high_channels": layer.mid_channels,
        "images": high.shape[0],
        "height": high.shape[1],
        "width": high.shape[2],
        "low_height": low.shape[1],
        "low_width": low.shape[2],
        **_planes("high", high),
        **_planes("low", low),
        **_planes("out", out),
    }
    arguments = {"high": high, "low": low, **weights, "out": out}
    if layer.dense:
        arguments["refined"] = replace(low, memory="refined", offset=0)
    return CudaStep("feature_fusion", sizes, arguments)


def _upsample_classify(
    layer: Layer,
    inputs: Sequence[Buffer],
    out: Buffer,
    weights: Mapping[str, Buffer],
    output: str,
) -> CudaStep:
    (x,) = inputs
    images, low_height, low_width, classes = x.shape
    height, width = out.shape[-2:]
    sizes = {
        "type": _TYPES[x.dtype],
        "out_type": _TYPES[out.dtype],
        "classes": classes,
        "output": OUTPUTS.index(output),
        "images": images,
        "low_height": low_height,
        "low_width": low_width,
        "height": height,
        "width": width,
        "x_image": x.strides[0],
        "x_class": x.strides[3],
        "x_row": x.strides[1],
        "x_column": x.strides[2],
    }
    return CudaStep("upsample_classify", sizes, {"x": x, "out": out})


_STEPS: dict[str, Callable[..., CudaStep]] = {
    "stem_conv": _stem_conv,
    "dsconv": _dsconv,
    "inverted_residual": _inverted_residual,
    "pyramid_pooling": _pyramid_pooling,
    "feature_fusion": _feature_fusion,
    "upsample_classify": _upsample_classify,
}
