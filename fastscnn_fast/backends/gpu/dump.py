"""The machine code of a fused op's launches, Triton's or CUDA's, with all that another launcher needs to run it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...arch.config import Config
from ...kernels.launch import Launch
from ...lower import gpu as weights
from ...lower.pack import TAG
from ...program.arithmetic import floats_of
from ...program.layers import Layer, SizedLayer
from ...program.memory import Buffer
from ...program.program import fast_scnn, layer_sizes
from ...writing import write_whole
from ..gpus import MULTIPROCESSORS, Architecture
from . import cuda, nvcc
from .cuda import CudaStep
from .plan import PlacedLayer, Plan, activation_buffer, logits_buffer, op_plan

if TYPE_CHECKING:
    from . import aot

#: Architectures that PTX is written for.
ARCHITECTURES = tuple(MULTIPROCESSORS)

_MATRIX = (
    "(K, N) row-major, K padded to a multiple of 16 and N to whole blocks of columns with zeros"
)
_VECTOR = "one value a channel, padded with zeros"
_TAPS = "(9, C) row-major: tap ky * 3 + kx, channel; C padded with zeros"
#: Of a pointer that a launch takes and leaves alone.
UNUSED = "not read by this launch"
_HOLDS = {
    (
        "stem_conv_kernel",
        "weight",
    ): "(K, N) row-major: row (ky * 3 + kx) * C + c, column output channel;"
    " K padded to a power of two, N to whole blocks of columns with zeros",
    ("stem_conv_kernel", "bias"): _VECTOR,
    (
        "stem_conv_kernel",
        "scale",
    ): "1 / (255 std) of each picture channel; read for uint8 pictures only",
    (
        "stem_conv_kernel",
        "shift",
    ): "-mean / std of each picture channel; read for uint8 pictures only",
    ("dsconv_kernel", "depthwise_weight"): _TAPS,
    ("dsconv_kernel", "depthwise_bias"): _VECTOR,
    ("dsconv_kernel", "pointwise_weight"): f"{_MATRIX}: row input channel, column output channel",
    ("dsconv_kernel", "pointwise_bias"): _VECTOR,
    ("dsconv_kernel", "last_weight"): f"{_MATRIX}: row channel of the pointwise, column class",
    ("dsconv_kernel", "last_bias"): "one value a class, padded with zeros",
    (
        "inverted_residual_kernel",
        "expand_weight",
    ): "(C, M) row-major: row input channel, column expanded"
    " channel; C padded to a multiple of 16 and M of 64 with zeros",
    ("inverted_residual_kernel", "expand_bias"): _VECTOR,
    ("inverted_residual_kernel", "depthwise_weight"): _TAPS,
    ("inverted_residual_kernel", "depthwise_bias"): _VECTOR,
    (
        "inverted_residual_kernel",
        "project_weight",
    ): f"{_MATRIX}: row expanded, column output channel",
    ("inverted_residual_kernel", "project_bias"): _VECTOR,
    (
        "row_sums_kernel",
        "sums",
    ): "sums over the columns of each bin: row of x, bin (the branches' bins one"
    " after the other; Triton's kernels pad them), channel",
    ("grids_kernel", "sums"): "what row_sums_kernel wrote",
    ("grids_kernel", "branch_weight"): "(branch, C, M) row-major 1x1 weights, padded with zeros",
    ("grids_kernel", "branch_bias"): "(branch, M) row-major, padded with zeros",
    (
        "grids_kernel",
        "grid_weight",
    ): "(branch, tap, M, O) row-major: the out-convolution's share of each"
    " branch, padded with zeros",
    (
        "grids_kernel",
        "shares",
    ): "what each grid cell (1, 4, 9, 36 of bins 1, 2, 3, 6, one after the other)"
    " adds to the output: tap, cell, output channel",
    **{
        (kernel, name): held
        for kernel in ("out_convolution_kernel", "convolution_kernel")  # Triton's and CUDA's
        for name, held in {
            "shares": "what grids_kernel wrote",
            "weight": f"(tap, K, N) row-major, {_MATRIX}",
            "bias": _VECTOR,
        }.items()
    },
    ("feature_fusion_kernel", "refine_weight"): _TAPS,
    ("feature_fusion_kernel", "refine_bias"): _VECTOR,
    (
        "feature_fusion_kernel",
        "low_weight",
    ): f"{_MATRIX}: row refined channel, column output channel",
    (
        "feature_fusion_kernel",
        "high_weight",
    ): f"{_MATRIX}: row channel of high, column output channel",
    ("feature_fusion_kernel", "bias"): "sum of both 1x1s' biases, padded with zeros",
}
_BYTES = "(N, K) row-major, padded with zeros"
_OFFSET = "128 times the sum of the channel's weights added, since bytes are multiplied as q - 128"
_FOURS = "channel 4 i + k at (k, i), padded with zeros"
#: Of every kernel of int8; what the numbers mean is said in program/integers.py.
_HOLDS_INT8 = {
    "weight": f"{_BYTES}: row output channel, column (ky * 3 + kx) * C + c",
    "pad": "the pixel that surrounds pictures, by channel",
    "scale": "255 std of each picture channel; read for pictures of floats only",
    "shift": "255 mean of each picture channel; read for pictures of floats only",
    "pointwise_weight": f"{_BYTES}: row output channel, column input channel",
    "high_weight": f"{_BYTES}: row output channel, column channel of high",
    "last_weight": f"{_BYTES}: row class, column channel of the pointwise",
    "expand_weight": f"{_BYTES}: row expanded channel, column input channel",
    "project_weight": f"{_BYTES}: row output channel, column expanded channel",
    "branch_weight": "(branch, M, C) row-major, padded with zeros",
    "x_weight": f"(tap, N, K), each {_BYTES}: row output channel, column channel of x",
    "y_weight": f"(tap, N, K), each {_BYTES}: row output channel, column channel of y",
    **dict.fromkeys(
        ("bias", "pointwise_bias", "last_bias", "expand_bias", "project_bias"),
        f"int32, {_VECTOR}; {_OFFSET}",
    ),
    "branch_bias": f"int32 (branch, M), padded with zeros; {_OFFSET}",
    "branch_multiplier": "(branch, M), padded with zeros",
    "branch_zero": "zero points of the branches' grids",
    **{
        f"{name}multiplier": f"what sums are multiplied by, {_VECTOR}"
        for name in ("", "pointwise_", "last_", "expand_", "project_")
    },
    "residual_multiplier": "what the input less its zero point is multiplied by",
    "outside": "the pixel that surrounds x",
    "floor": "what results are at least",
    "sums": "int32 sums over the columns of each bin: row of x, bin, channel",
    "grids": "the branches' grids, one after the other: cell, channel",
    "counters": "zeros before the launch and after it: of each tile how many slices are there, then their sums",
}


def _by_fours(name: str) -> dict[str, str]:
    return {
        f"{name}_weight": f"words of four taps: (third of the taps, k, i), {_FOURS}",
        f"{name}_bias": f"int32, {_FOURS}",
        f"{name}_multiplier": _FOURS,
    }


#: What differs from those, or is added, by kernel.
_HOLDS_BY_KERNEL_INT8 = {
    "dsconv_int8_kernel": _by_fours("depthwise"),
    "feature_fusion_int8_kernel": {
        **_by_fours("refine"),
        "low_weight": f"{_BYTES}: row output channel, column refined channel",
    },
    "convolution_int8_kernel": {
        "weight": f"(tap, N, K), each {_BYTES}: row output channel, column channel of x",
        "grid_weight": f"(tap, N, K), each {_BYTES}: row output channel, column channel of the grids",
        "grids": "what is resized: the branches' grids, or low refined; cell, channel",
    },
    "inverted_residual_int8_kernel": {
        "depthwise_weight": "(3, M): words of a row of taps, the last byte 0; M padded with zeros",
        "depthwise_bias": f"int32, {_VECTOR}",
        "depthwise_multiplier": f"what sums are multiplied by, {_VECTOR}",
    },
}
_PLANE = "(N, H, W, C): channels are adjacent, pixels padded to 64 bytes; C padded to 16 with zeros"
_PLANE_INT8 = "(N, H, W, C): channels are adjacent, pixels padded to 32 bytes with anything"
_LOGITS = "(N, H, W, K) logits of which each class is a plane"
# Scratch of any kernel that cuts a sum along its channels.
_SHARED = {
    "partials": "float32 shares of each slice of the expanded channels, written and read by this launch",
    "counters": "zeros before the launch and after it: how many slices of each tile are there",
}
# What Triton adds to every kernel's parameters.
_TRAILING = {
    "global_scratch": "null: memory that Triton's own features would use, none here",
    "profile_scratch": "null: memory of Triton's profiler, not in use",
}


def find(config: Config, op: str, name: str | None) -> int:
    """The index of the layer called or numbered ``name``; without, of the first of ``op``.

    Raises:
        ValueError: no such layer, or one of another op.
    """
    layers = fast_scnn(config).layers
    if name is None:
        return next(i for i, layer in enumerate(layers) if layer.op == op)
    names = [layer.name for layer in layers]
    index = int(name) if name.isdecimal() else names.index(name) if name in names else len(layers)
    if index >= len(layers):
        raise ValueError(
            f"layer must be below {len(layers)} or one of {', '.join(names)}; got {name}"
        )
    if layers[index].op != op:
        raise ValueError(f"layer {name} must be of op {op}, it is of {layers[index].op}")
    return index


def step(
    config: Config, op: str, name: str | None, size: tuple[int, int], shape: tuple[int, int] | None
) -> SizedLayer:
    """The layer in the network for pictures of ``size``; or alone, with ``shape`` its input's size.

    Alone, feature_fusion's low branch has a quarter of that (its high branch's), rounded up, and the result
    of upsample_classify is eight times as large.

    Raises:
        ValueError: no such layer, or one of another op; a picture too small.
    """
    index = find(config, op, name)
    found = layer_sizes(config, *size)[index]
    if shape is None:
        return found
    if op == "stem_conv":
        return layer_sizes(config, *shape)[index]
    layer, (height, width) = found.layer, shape
    inputs = [(x[0], *shape) for x in found.inputs]
    out = layer.output_size(height, width)
    if op == "feature_fusion":
        inputs[1] = (inputs[1][0], -(-height // 4), -(-width // 4))
    elif op == "upsample_classify":
        out = (8 * height, 8 * width)
    return SizedLayer(layer, tuple(inputs), (found.output[0], *out))


def launches(
    step: SizedLayer,
    dtype: torch.dtype,
    architecture: Architecture,
    output: str = "logits",
    raw: bool = False,
    backend: str = "triton",
) -> Plan:
    """The launches of one image of ``step``, its activations laid out as the network does."""
    layer = step.layer
    (pieces,), _ = weights.layout([layer], dtype, TAG.size)
    floats = floats_of(dtype)

    def plane(memory: str, channels: int, height: int, width: int) -> Buffer:
        return activation_buffer(memory, dtype, 1, height, width, channels)

    if layer.op == "stem_conv":
        inputs = [Buffer.dense("x", torch.uint8 if raw else floats, (1, *step.inputs[0]))]
    elif layer.op == "feature_fusion":
        inputs = [plane(name, *x) for name, x in zip(("high", "low"), step.inputs)]
    elif layer.op == "upsample_classify":
        classes, height, width = step.inputs[0]
        inputs = [logits_buffer("x", 1, height, width, classes)]
    else:
        inputs = [plane("x", *step.inputs[0])]
    channels, height, width = step.output
    if layer.op == "upsample_classify":
        labels = output == "labels"
        shape = (1, height, width) if labels else (1, *step.output)
        out = Buffer.dense("out", torch.uint8 if labels else floats, shape)
    elif layer.last_channels:
        out = logits_buffer("out", 1, height, width, channels)
    else:
        out = plane("out", channels, height, width)
    place = PlacedLayer(layer, tuple(inputs), out, pieces)
    return op_plan(place, dtype, architecture, output, backend=backend)


def _role(buffer: Buffer) -> str:
    if buffer.memory == "weights":
        return "weight"
    if buffer.memory == "out":
        return "output"
    return "input" if buffer.memory in ("x", "high", "low") else "scratch"


def _unused(launch: Launch, layer: Layer) -> tuple[str, ...]:
    """Pointers that the kernel's constants make it not read."""
    a = launch.arguments
    return {
        "inverted_residual_kernel": ()
        if launch.arguments.get("SLICES", 1) > 1
        else ("partials", "counters"),
        "dsconv_int8_kernel": (
            () if a.get("LAST") else ("last_weight", "last_bias", "last_multiplier")
        )
        + (() if a.get("MID") else ("high", "high_weight")),
        "product_int8_kernel": () if a.get("MID") else ("y", "y_weight"),
        "resize_int8_kernel": () if a.get("FLOOR") else ("floor",),
        "inverted_residual_int8_kernel": (() if a.get("SLICES", 1) > 1 else ("counters",))
        + (() if a.get("RESIDUAL") else ("input_zero", "residual_multiplier")),
        "dsconv_kernel": () if layer.last_channels else ("last_weight", "last_bias"),
        "feature_fusion_kernel": ("refine_weight", "refine_bias") if layer.dense else (),
        "out_convolution_kernel": () if launch.arguments.get("BINS") else ("shares",),
    }.get(launch.kernel.__name__, ())


def _holds(kernel: str, layer: Layer, name: str, buffer: Buffer) -> str:
    if "_int8_" in kernel:
        held = _HOLDS_BY_KERNEL_INT8.get(kernel, {}).get(name) or _HOLDS_INT8.get(name)
        if held is None and name.endswith("zero"):
            held = "the zero point"
    else:
        held = _HOLDS.get((kernel, name)) or _SHARED.get(name)
    if held is not None:
        return held
    if layer.op == "stem_conv" and name == "x":
        return "(N, C, H, W) picture, " + (
            "raw pixels" if buffer.dtype == torch.uint8 else "normalised"
        )
    if layer.op == "upsample_classify" and name == "out":
        return f"(N, {'K, ' if len(buffer.shape) == 4 else ''}H, W) result"
    if buffer.strides[-1] != 1:
        return _LOGITS
    return _PLANE_INT8 if buffer.dtype == torch.uint8 else _PLANE


def _parameter(launch: Launch, layer: Layer, name: str, type_: str) -> dict[str, Any]:
    value = launch.arguments[name]
    if not isinstance(value, Buffer):
        return {"name": name, "kind": "scalar", "dtype": type_, "value": value}
    unused = name in _unused(launch, layer)
    return _pointer(
        name, value, UNUSED if unused else _holds(launch.kernel.__name__, layer, name, value)
    )


def _pointer(name: str, buffer: Buffer, holds: str) -> dict[str, Any]:
    return {
        "name": name,
        "kind": "pointer",
        "dtype": str(buffer.dtype).removeprefix("torch."),
        "role": _role(buffer),
        "memory": buffer.memory,
        "offset_bytes": buffer.offset,
        "bytes": buffer.bytes,
        "shape": list(buffer.shape),
        "strides": list(buffer.strides),
        "holds": holds,
    }


def _null(name: str, holds: str) -> dict[str, Any]:
    return {"name": name, "kind": "pointer", "role": "null", "value": 0, "holds": holds}


def describe(code: aot.Code, step: SizedLayer, index: int, count: int) -> dict[str, Any]:
    """Everything a launcher needs; parameters in the order of the PTX kernel's."""
    launch, layer = code.launch, step.layer
    signature = code.specialisation.signature
    parameters = [
        _parameter(launch, layer, name, type_)
        for name, type_ in signature.items()
        if type_ != "constexpr"
    ]
    for name, meaning in _TRAILING.items():
        parameters.append(_null(name, meaning))
    grid = (*launch.grid, 1, 1)[:3]
    return {
        "op": layer.op,
        "layer": layer.name,
        "launch": index,
        "launches": count,
        "architecture": f"sm_{code.architecture}",
        "entry": code.compiled.metadata.name,
        "grid": list(grid),
        "programs": prod(grid),
        "warps": launch.warps,
        "block": [32 * launch.warps, 1, 1],
        "dynamic_shared_bytes": code.shared,
        "registers": code.registers,
        "parameters": parameters,
        "constants": dict(code.specialisation.constants),
    }


def _cuda_unused(launch: cuda.Described) -> tuple[str, ...]:
    """Pointers that the launch does not read, whatever they hold."""
    kernel, _, template = launch.kernel.partition("<")
    values = {name: value for name, _, value in launch.parameters}
    if (
        kernel == "feature_fusion_kernel"
    ):  # a dense refinement is a launch of its own, without a low branch
        taps = template.split(", ")[4]
        refine = ("refine_weight", "refine_bias") if taps == "1" else ()
        return (*refine, *(() if values["low_channels"] else ("low", "low_weight")))
    if kernel == "convolution_int8_kernel":
        return ("outside",) if template == "1>" else ()
    return ("shares",) if kernel == "convolution_kernel" and not values["cells"] else ()


def _cuda_parameter(
    name: str, type_: str, value: Any, launch: cuda.Described, layer: Layer
) -> dict[str, Any]:
    if value is None:
        return _null(name, UNUSED)
    if not isinstance(value, Buffer):
        return {"name": name, "kind": "scalar", "dtype": type_, "value": value}
    kernel = launch.kernel.partition("<")[0]
    unused = name in _cuda_unused(launch)
    return _pointer(name, value, UNUSED if unused else _holds(kernel, layer, name, value))


def _cuda_code(
    step: SizedLayer, launched: CudaStep, architecture: int
) -> Iterator[tuple[dict[str, Any], nvcc.Code]]:
    launches = cuda.described(launched)
    for index, one in enumerate(launches):
        code = nvcc.compiled(launched.op, architecture)[one.kernel]
        about = {
            "op": step.layer.op,
            "layer": step.layer.name,
            "launch": index,
            "launches": len(launches),
            "architecture": f"sm_{architecture}",
            "kernel": one.kernel,
            "entry": code.entry,
            "grid": list(one.grid),
            "programs": prod(one.grid),
            "warps": one.threads // 32,
            "block": [one.threads, 1, 1],
            "dynamic_shared_bytes": one.shared,
            "registers": code.registers,
            "parameters": [
                _cuda_parameter(*parameter, one, step.layer) for parameter in one.parameters
            ],
            "constants": {},
        }
        yield about, code


def _triton_code(
    step: SizedLayer, plan: Plan, architecture: Architecture
) -> Iterator[tuple[dict[str, Any], aot.Code]]:
    from . import aot

    for index, launch in enumerate(plan.launches):
        code = aot.compiled(launch, architecture)
        yield describe(code, step, index, len(plan.launches)), code


def described(
    step: SizedLayer, plan: Plan, architecture: Architecture
) -> Iterator[tuple[dict[str, Any], aot.Code | nvcc.Code]]:
    """All that a launcher needs of each launch of the plan, and its code.

    Raises:
        RuntimeError: a compiler failed, or there is none.
    """
    (first, *_) = plan.steps
    if isinstance(first, CudaStep):
        assert isinstance(architecture, int), "CUDA C++ is NVIDIA's"
        yield from _cuda_code(step, first, architecture)
    else:
        yield from _triton_code(step, plan, architecture)


def write(folder: Path, step: SizedLayer, plan: Plan, architecture: int) -> list[Path]:
    """Compiles each launch and writes OP_N.ptx, OP_N.cubin and OP_N.json; returns their paths.

    Raises:
        RuntimeError: a compiler failed, or there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for about, code in described(step, plan, architecture):
        name = f"{step.layer.op}_{about['launch']}"
        text = (json.dumps(about, indent=2) + "\n").encode()
        contents = {"ptx": code.ptx.encode(), "cubin": code.cubin, "json": text}
        for ending, content in contents.items():
            paths.append(folder / f"{name}.{ending}")
            write_whole(paths[-1], content)
    return paths
