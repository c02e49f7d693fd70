"""Layers as text and weights as one tagged tensor: what travels through the ops to every backend."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..program.layers import Layer

# The tag before packed weights (csrc/cpu/program.h): magic, version, layout, dtype, hash of the layers, bytes.
TAG = struct.Struct("<4I2Q32x")
LAYOUT_AT = 8  # bytes into the tag
MAGIC, VERSION = 0x4E435346, 1


class Program(NamedTuple):
    """Layers, as integers too, and a hash of those."""

    layers: tuple[Layer, ...]
    integers: tuple[int, ...]
    hash: int


def encode(layers: Sequence[Layer]) -> str:
    """The text by which layers travel: the dispatcher would copy a list of integers value by value."""
    return " ".join(str(value) for layer in layers for value in layer.encode())


@lru_cache(maxsize=256)
def parsed(program: str) -> Program:
    """What :func:`encode` wrote.

    Raises:
        ValueError: it did not write that.
    """
    try:
        integers = tuple(map(int, program.split()))
    except ValueError:
        raise ValueError(f"program must be as encode() writes it, got {program!r}") from None
    value = 0xCBF29CE484222325
    for v in integers:
        value = (value ^ v) * 0x100000001B3 % 2**64
    return Program(tuple(Layer.decode(integers)), integers, value)


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


def tag(program: Program, layout: int, dtype_index: int, size: int) -> Tensor:
    """The tag's bytes, of weights of ``size`` bytes with it."""
    bytes_ = TAG.pack(MAGIC, VERSION, layout, dtype_index, program.hash, size)
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


def layout_of(weights: Tensor, program: Program, backend: str) -> tuple[int, int]:
    """Layout and dtype index of weights that were packed in Python.

    Raises:
        ValueError: weights of another format or of other layers.
    """
    magic, version, layout, dtype_index, program_hash, size = _tag_of(weights)
    if (magic, version) != (MAGIC, VERSION):
        raise ValueError(f"weights must be packed for the {backend} backend, got another layout")
    if program_hash != program.hash or size != weights.numel():
        raise ValueError("weights must be packed for these layers, got weights of other layers")
    return layout, dtype_index


def check_dtype(packed: torch.dtype, dtype: torch.dtype) -> None:
    """Raises ValueError where weights were packed for another dtype."""
    if packed != dtype:
        raise ValueError(f"weights must be packed for {dtype}, got weights for {packed}")
