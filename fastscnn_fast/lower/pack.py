"""Weights as one tagged tensor: what travels through the ops to every backend."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..program.arithmetic import ARITHMETICS, Arithmetic
from ..program.layers import Layer, Shape
from ..program.program import Program
from .quantise import check_sums

# The tag before packed weights (csrc/cpu/program.h): magic, version, layout, number of the arithmetic, hash of the
# program, bytes.
TAG = struct.Struct("<4I2Q32x")
ARITHMETIC_AT = 12  # bytes into the tag
MAGIC, VERSION = 0x4E435346, 2
#: Numbers of the layouts; the two backends on GPUs share one.
LAYOUTS = {"reference": 0, "cpu": 1, "triton": 2, "cuda": 2}
_NUMBERS = {one.number: one for one in ARITHMETICS.values()}


#: Each tensor of plain weights begins at a multiple of so many bytes.
ALIGNED = 8


def wanted_weights(
    layer: Layer, arithmetic: Arithmetic, dtype: torch.dtype
) -> dict[str, tuple[Shape, torch.dtype]]:
    """Names, shapes and dtypes of a layer's plain weights; ``dtype`` is that of floats."""
    if arithmetic.quantised:
        return layer.quantised_weights()
    return {name: (shape, dtype) for name, shape in layer.weights().items()}


def plain_weights(
    layers: Sequence[Layer],
    tensors: Sequence[Mapping[str, Tensor]],
    arithmetic: Arithmetic,
    dtype: torch.dtype,
) -> list[dict[str, Tensor]]:
    """Per layer what :func:`wanted_weights` names, detached and on the cpu.

    Raises:
        ValueError: a tensor is missing, of a wrong shape, or of floats where integers are wanted.
        Unfusable: a ValueError too: sums of integers may overflow.
    """
    plain = []
    for index, (layer, named) in enumerate(zip(layers, tensors, strict=True)):
        wanted = wanted_weights(layer, arithmetic, dtype)
        for name, (shape, kind) in wanted.items():
            found = named.get(name)
            what = f"weights of layer {index} ({layer.op}): {name} must be"
            if found is None or tuple(found.shape) != shape:
                got = "nothing" if found is None else tuple(found.shape)
                raise ValueError(f"{what} {shape}, got {got}")
            if arithmetic.quantised and found.dtype != kind:
                raise ValueError(f"{what} {kind}, got {found.dtype}")
        plain.append({n: named[n].detach().to("cpu", kind) for n, (_, kind) in wanted.items()})
        if arithmetic.quantised:
            check_sums(layer, plain[-1])
    return plain


def flat(plain: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """The bytes of all of them one after the other, each from a multiple of :data:`ALIGNED` on."""
    parts = [torch.zeros(0, dtype=torch.uint8, device="cpu")]
    for named in plain:
        for value in named.values():
            bytes_ = value.contiguous().view(-1).view(torch.uint8)
            parts.append(torch.nn.functional.pad(bytes_, (0, -bytes_.numel() % ALIGNED)))
    return torch.cat(parts)


def unflat(
    bytes_: Tensor, layers: Sequence[Layer], arithmetic: Arithmetic, dtype: torch.dtype
) -> list[dict[str, Tensor]]:
    """The tensors that :func:`flat` has written, as views."""
    tensors, at = [], 0
    for layer in layers:
        named = {}
        for name, (shape, kind) in wanted_weights(layer, arithmetic, dtype).items():
            size = prod(shape) * kind.itemsize
            named[name] = bytes_[at : at + size].view(kind).view(shape)
            at += size + -size % ALIGNED
        tensors.append(named)
    return tensors


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
    """Raises ValueError where weights were packed for an arithmetic of another dtype, also of activations."""
    one = _NUMBERS.get(number)
    if one is not None and dtype not in (one.dtype, one.activations):
        raise ValueError(f"weights must be packed for {dtype}, got weights for {one.dtype}")
