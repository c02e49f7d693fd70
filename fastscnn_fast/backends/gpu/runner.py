"""The GPU kernels, Triton's and CUDA's: plans of steps, cached per shape, on the device and current stream.

The two backends share packed weights and plans; they differ in who runs a layer that was not tuned.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ...lower import gpu as layout
from ...lower.pack import TAG, arithmetic_of, plain_weights, tag
from ...program.arithmetic import Arithmetic, floats_of
from ...program.memory import Buffer, dense, picture
from ...program.program import Program, parsed
from ...program.reference import Weights
from .. import registry
from ..gpus import INTERPRETER, Architecture
from . import choices
from .arena import Pool
from .choices import Choices
from .cuda import ALIGNMENT
from .plan import PlacedLayer, Plan, activation_buffer, input_names, network_plan, op_plan


def products(precision: str, architecture: Architecture) -> str:
    """PRECISION of kernels/common.py."""
    if architecture == INTERPRETER:
        return "interpreted"
    return "tf32" if precision == "high" else "ieee"


_pool = Pool()


@lru_cache(maxsize=256)
def _pieces(program: str, dtype: torch.dtype) -> tuple[list[dict[str, Buffer]], int]:
    return layout.layout(parsed(program).layers, dtype, TAG.size)


Where = tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]  # dtype, shape, strides


def _where(x: Tensor) -> Where:
    return (x.dtype, tuple(x.shape), x.stride())


def _picture(where: Where) -> Buffer:
    return Buffer("x", *where)


def _plane(name: str, where: Where) -> Buffer:
    """A plane in the layout of memory.py, whatever strides torch tells of dimensions of size 1."""
    dtype, (n, c, h, w), _ = where
    return activation_buffer(name, dtype, n, h, w, c)


def _strided(name: str, where: Where) -> Buffer:
    dtype, (n, c, h, w), (sn, sc, sh, sw) = where
    return Buffer(name, dtype, (n, h, w, c), (sn, sh, sw, sc))


@lru_cache(maxsize=256)
def _op_plan(
    text: str,
    inputs: tuple[Where, ...],
    out: Where,
    dtype: torch.dtype,
    output: str,
    architecture: Architecture,
    precision: str,
    chosen: Choices,
    backend: str,
) -> Plan:
    (layer,) = parsed(text).layers
    (pieces,), _ = _pieces(text, dtype)
    if layer.op == "stem_conv":
        buffers = [_picture(inputs[0])]
    else:
        of = _strided if layer.op == "upsample_classify" else _plane
        buffers = [of(name, where) for name, where in zip(input_names(layer), inputs)]
    result = Buffer("out", *out) if layer.op == "upsample_classify" else _plane("out", out)
    place = PlacedLayer(layer, tuple(buffers), result, pieces)
    how = products(precision, architecture)
    return op_plan(place, dtype, architecture, output, how, chosen, backend)


@lru_cache(maxsize=256)
def _network_plan(
    text: str,
    x: Where,
    out: Where,
    dtype: torch.dtype,
    output: str,
    architecture: Architecture,
    precision: str,
    chosen: Choices,
    backend: str,
) -> Plan:
    pieces, _ = _pieces(text, dtype)
    return network_plan(
        parsed(text),
        _picture(x),
        Buffer("out", *out),
        pieces,
        dtype,
        architecture,
        output,
        products(precision, architecture),
        chosen,
        backend,
    )


def _arithmetic(weights: Tensor, text: str, dtype: torch.dtype, backend: str) -> Arithmetic:
    """What the weights are packed for; ``dtype`` may be that of activations."""
    arithmetic = arithmetic_of(weights, parsed(text), backend, dtype)
    if weights.data_ptr() % ALIGNMENT:
        rule = f"weights must be aligned to {ALIGNMENT} bytes"
        raise ValueError(f"{rule}, got an address {weights.data_ptr() % ALIGNMENT} beyond")
    return arithmetic


def _dense(x: Tensor) -> Tensor:
    """memory.dense, at an address that CUDA C++ takes."""
    x = dense(x)
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


class _Runner:
    def __init__(self, backend: str) -> None:
        self._backend = backend

    def pack(self, program: Program, tensors: Sequence[Weights], arithmetic: Arithmetic) -> Tensor:
        pieces, size = layout.layout(program.layers, arithmetic.weights, TAG.size)
        packed = torch.zeros(size, dtype=torch.uint8, device="cpu")
        packed[: TAG.size] = tag(program, self._backend, arithmetic, size)
        plain = plain_weights(program.layers, tensors, arithmetic, torch.float32)
        layout.fill(packed, pieces, program.layers, plain)
        return packed

    def tuned(self, device: torch.device) -> Choices:
        return choices.load(device)

    def stem_conv(
        self, out: Tensor, x: Tensor, weights: Tensor, layer: str, dtype: torch.dtype
    ) -> None:
        self._op(out, {"x": picture(x, floats_of(dtype))}, weights, layer, dtype)

    def plane(self, op: str, out: Tensor, x: Tensor, weights: Tensor, layer: str) -> None:
        self._op(out, {"x": _dense(x)}, weights, layer, x.dtype)

    def feature_fusion(
        self, out: Tensor, high: Tensor, low: Tensor, weights: Tensor, layer: str
    ) -> None:
        self._op(out, {"high": _dense(high), "low": _dense(low)}, weights, layer, high.dtype)

    def upsample_classify(
        self, out: Tensor, x: Tensor, weights: Tensor, layer: str, output: str
    ) -> None:
        self._op(out, {"x": x}, weights, layer, x.dtype, output)

    def _op(
        self,
        out: Tensor,
        inputs: dict[str, Tensor],
        weights: Tensor,
        layer: str,
        dtype: torch.dtype,
        output: str = "logits",
    ) -> None:
        arithmetic = _arithmetic(weights, layer, dtype, self._backend)
        key = (layer, tuple(map(_where, inputs.values())), _where(out), arithmetic.dtype, output)
        architecture = registry.architecture(out.device)
        chosen = choices.load(out.device)
        how = (arithmetic.precision, chosen, self._backend)
        plan = _op_plan(*key, architecture, *how)
        tensors = {**inputs, "weights": weights, "out": out}
        _pool.run((*key, *how), plan, out.device, tensors)

    def network(
        self,
        out: Tensor,
        x: Tensor,
        weights: Tensor,
        program: str,
        dtype: torch.dtype,
        output: str,
    ) -> None:
        x = picture(x, floats_of(dtype))
        arithmetic = _arithmetic(weights, program, dtype, self._backend)
        key = (program, _where(x), _where(out), dtype, output)
        chosen = choices.load(out.device)
        how = (arithmetic.precision, chosen, self._backend)
        plan = _network_plan(*key, registry.architecture(out.device), *how)
        tensors = {"x": x, "weights": weights, "out": out}
        _pool.run((*key, *how), plan, out.device, tensors)


RUNNERS = {
    "triton": _Runner("triton"),
    "cuda": _Runner("cuda"),
}
