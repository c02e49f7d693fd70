"""Weights as one tagged tensor: what travels through the ops to every backend."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..program.arithmetic import ARITHMETICS, Arithmetic
from ..program.layers import Layer
from ..program.program import Program

# The tag before packed weights (csrc/cpu/program.h): magic, version, layout, number of the arithmetic, hash of the
# program, bytes.
TAG = struct.Struct("<4I2Q32x")
ARITHMETIC_AT = 12  # bytes into the tag
MAGIC, VERSION = 0x4E435346, 2
#: Numbers of the layouts; the two backends on GPUs share one.
LAYOUTS = {"reference": 0, "cpu": 1, "triton": 2, "cuda": 2}
_NUMBERS = {one.number: one for one in ARITHMETICS.values()}


def plain_weights(
    layers: Sequence[Layer], tensors: Sequence[Mapping[str, Tensor]], dtype: torch.dtype
) -> list[dict[str, Tensor]]:
    """Per layer what ``layer.weights()`` names, detached, on the cpu, in ``dtype``.

    Raises:
        ValueError: a tensor is missing or of a wrong shape.
    """
    plain = []
    for index, (layer, named) in enumerate(zip(layers, tensors, strict=True)):
        for name, shape in layer.weights().items():
            if name not in named or tuple(named[name].shape) != shape:
                got = tuple(named[name].shape) if name in named else "nothing"
                raise ValueError(
                    f"weights of layer {index} ({layer.op}): {name} must be {shape}, got {got}"
                )
        plain.append({name: named[name].detach().to("cpu", dtype) for name in layer.weights()})
    return plain


def flat(plain: Sequence[Mapping[str, Tensor]], dtype: torch.dtype) -> Tensor:
    """All of them one after the other."""
    parts = [value.reshape(-1) for named in plain for value in named.values()]
    return torch.cat([torch.zeros(0, dtype=dtype, device="cpu"), *parts])


def tag(program: Program, backend: str, arithmetic: Arithmetic, size: int) -> Tensor:
    """The tag's bytes, of weights of ``size`` bytes with it."""
    bytes_ = TAG.pack(MAGIC, VERSION, LAYOUTS[backend], arithmetic.number, program.hash, size)
    return torch.frombuffer(bytearray(bytes_), dtype=torch.uint8)


_tags = WeakTensorKeyDictionary()


def counted(weights: Tensor) -> int:
    """How often ``weights`` was written to, as far as torch counts."""
    return 0 if weights.is_inference() else weights._version


def _tag_of(weights: Tensor) -> tuple[int, ...]:
    """Read once: on a GPU that waits for the device, which the capture of a CUDA graph forbids."""
    version = counted(weights)
    known = _tags.get(weights)
    if known is None or known[0] != version:
        whole = weights.numel() >= TAG.size
        bytes_ = bytes(weights[: TAG.size].cpu().numpy()) if whole else bytes(TAG.size)
        known = _tags[weights] = (version, TAG.unpack(bytes_))
    fields: tuple[int, ...] = known[1]
    return fields


def arithmetic_of(
    weights: Tensor, program: Program, backend: str, dtype: torch.dtype
) -> Arithmetic:
    """The arithmetic that weights were packed for, in Python, for ``backend`` and ``dtype``.

    Raises:
        ValueError: weights of another format, of other layers or for another dtype.
    """
    magic, version, layout, number, program_hash, size = _tag_of(weights)
    if (magic, version, layout) != (MAGIC, VERSION, LAYOUTS[backend]) or number not in _NUMBERS:
        raise ValueError(f"weights must be packed for the {backend} backend, got another layout")
    if program_hash != program.hash or size != weights.numel():
        raise ValueError("weights must be packed for these layers, got weights of other layers")
    check_dtype(number, dtype)
    return _NUMBERS[number]


def check_dtype(number: int, dtype: torch.dtype) -> None:
    """Raises ValueError where weights were packed for an arithmetic of another dtype."""
    if number in _NUMBERS and _NUMBERS[number].dtype != dtype:
        packed = _NUMBERS[number].dtype
        raise ValueError(f"weights must be packed for {dtype}, got weights for {packed}")
