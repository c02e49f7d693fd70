"""The C++ kernels: calls into the extension with addresses, sizes and the number of threads."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..lower.pack import ARITHMETIC_AT, TAG, check_dtype, flat, plain_weights
from ..program.arithmetic import Arithmetic
from ..program.memory import dense
from ..program.program import Program, parsed
from ..program.reference import Weights
from . import registry

_PICTURE_KINDS = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.uint8: "uint8",
}


def _batch(x: Tensor) -> tuple[int, int, int, int]:
    """Address and size of an activation in the layout of memory.py; the caller keeps it alive."""
    return (x.data_ptr(), x.shape[0], x.shape[2], x.shape[3])


def _picture(x: Tensor) -> tuple[int, str, torch.Size, tuple[int, ...]]:
    return (x.data_ptr(), _PICTURE_KINDS[x.dtype], x.shape, x.stride())


def _call(
    program: str, weights: Tensor, dtype: torch.dtype
) -> tuple[str, tuple[int, ...], int, int, int]:
    if weights.device.type != "cpu":
        raise ValueError(f"weights must be on the cpu for backend cpu, got {weights.device}")
    address, size = weights.data_ptr(), weights.numel()
    if size >= TAG.size:  # the arithmetic alone decides how many bytes an element has
        check_dtype(ctypes.c_uint32.from_address(address + ARITHMETIC_AT).value, dtype)
    threads = torch.get_num_threads()
    return (registry.isa(), parsed(program).integers, address, size, threads)


def _network(
    function: str,
    out: Tensor,
    x: Tensor,
    weights: Tensor,
    program: str,
    dtype: torch.dtype,
    output: str,
) -> Any:
    run = getattr(registry.cpu_module(), function)
    return run(_call(program, weights, dtype), _picture(x), output, out.data_ptr())


class _Runner:
    def pack(self, program: Program, tensors: Sequence[Weights], arithmetic: Arithmetic) -> Tensor:
        plain = flat(plain_weights(program.layers, tensors, arithmetic, torch.float32))
        cpu = registry.cpu_module()
        size = cpu.packed_bytes(program.integers, arithmetic.name)
        packed = torch.empty(size, dtype=torch.uint8, device="cpu")
        cpu.pack(
            program.integers, arithmetic.name, plain.data_ptr(), plain.numel(), packed.data_ptr()
        )
        return packed

    def tuned(self, device: torch.device) -> None:
        """Nothing is tuned."""

    def stem_conv(
        self, out: Tensor, x: Tensor, weights: Tensor, layer: str, dtype: torch.dtype
    ) -> None:
        call = _call(layer, weights, dtype)
        registry.cpu_module().stem_conv(call, _picture(x), _batch(out))

    def plane(self, op: str, out: Tensor, x: Tensor, weights: Tensor, layer: str) -> None:
        x = dense(x)
        call = _call(layer, weights, x.dtype)
        getattr(registry.cpu_module(), op)(call, _batch(x), _batch(out))

    def feature_fusion(
        self, out: Tensor, high: Tensor, low: Tensor, weights: Tensor, layer: str
    ) -> None:
        high, low = dense(high), dense(low)
        call = _call(layer, weights, high.dtype)
        registry.cpu_module().feature_fusion(call, _batch(high), _batch(low), _batch(out))

    def upsample_classify(
        self, out: Tensor, x: Tensor, weights: Tensor, layer: str, output: str
    ) -> None:
        x = dense(x)
        call = _call(layer, weights, x.dtype)
        height, width = out.shape[-2:]
        registry.cpu_module().upsample_classify(
            call, _batch(x), output, out.data_ptr(), height, width
        )

    def network(self, out: Tensor, *args: Any) -> None:
        _network("network", out, *args)

    def network_stages(self, out: Tensor, *args: Any) -> list[tuple[str, float]]:
        """As :meth:`network` for one image; name and seconds of each stage."""
        stages: list[tuple[str, float]] = _network("network_stages", out, *args)
        return stages


RUNNERS = {"cpu": _Runner()}
