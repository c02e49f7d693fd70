"""What the host side of every op is made of: buffers that need no memory yet, and launches over them.

A :class:`Launch` is described once and read by everyone: the engine binds tensors to its buffers and runs
it, ``dump`` and the ahead-of-time report compile it for any architecture and count its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Buffer:
    """A strided region of a named memory: ``strides`` in elements, ``offset`` in bytes."""

    memory: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @staticmethod
    def dense(memory: str, dtype: torch.dtype, shape: tuple[int, ...], offset: int = 0) -> Buffer:
        strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
        return Buffer(memory, dtype, shape, strides, offset)

    @property
    def bytes(self) -> int:
        """From the first element to the last."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))
        return (last + 1) * self.dtype.itemsize

    @property
    def reach(self) -> int:
        """Elements from the first to the last of one image, the first dimension's stride left out."""
        return sum((n - 1) * abs(stride) for n, stride in zip(self.shape[1:], self.strides[1:])) + 1

    def view(self, memory: Tensor) -> Tensor:
        """This region of ``memory``, a tensor whose first byte is the memory's."""
        bytes_ = memory.view(torch.uint8)[self.offset : self.offset + self.bytes]
        return bytes_.view(self.dtype).as_strided(self.shape, self.strides)


def wide(*buffers: Buffer) -> bool:
    """Whether an offset within one image may not fit 32 bits."""
    return any(buffer.reach >= 2**31 for buffer in buffers)


@dataclass(frozen=True)
class Launch:
    """One kernel launch; ``arguments`` in the kernel's order, compile-time constants among them."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    warps: int
    stages: int

    @property
    def buffers(self) -> dict[str, Buffer]:
        return {name: a for name, a in self.arguments.items() if isinstance(a, Buffer)}

    @property
    def bytes(self) -> int:
        """Of device memory that must move: the extent of every region, each once."""
        regions = {(b.memory, b.offset): b.bytes for b in self.buffers.values()}
        return sum(regions.values())

    def run(self, values: Mapping[str, Any]) -> None:
        """Launches on the current device and stream; ``values`` has a tensor for every buffer."""
        if prod(self.grid) > 0:
            self.kernel[self.grid](
                **values, num_warps=self.warps, num_stages=self.stages, enable_fp_fusion=True
            )


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def rounded_up(a: int, multiple: int) -> int:
    return cdiv(a, multiple) * multiple


def power_of_two(a: int) -> int:
    """The smallest power of two that is at least ``a``."""
    return 1 << max(a - 1, 0).bit_length()
