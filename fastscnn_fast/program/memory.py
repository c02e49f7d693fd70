"""How activations lie in memory, channels-last with each pixel a multiple of 64 bytes (of uint8 32), the rest zeros (of uint8 anything); and buffers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

LINE = (
    64  # bytes of which every pixel of an activation takes a multiple; of one of bytes half of it
)

#: Scratch of int32 that holds zeros before and after every step, so no other memory ever lies there.
COUNTERS = "counters"
#: Scratch of float32 in which a step's programs leave their share of a sum; a step's own, like any scratch.
PARTIALS = "partials"


def pixel_pitch(channels: int, dtype: torch.dtype) -> int:
    """Channels that a pixel has in memory."""
    block = LINE // max(dtype.itemsize, 2)
    return -(-channels // block) * block


def activation(like: Tensor, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """An empty (N, channels, height, width) in channels-last memory with padded channels."""
    memory = like.new_empty(
        (like.shape[0], height, width, pixel_pitch(channels, dtype)), dtype=dtype
    )
    return memory.permute(0, 3, 1, 2)[:, :channels]


def dense(x: Tensor) -> Tensor:
    """x in channels-last memory with channels padded by zeros: itself where it already is so."""
    channels, memory = x.shape[1], x.permute(0, 2, 3, 1)
    padding = pixel_pitch(channels, x.dtype) - channels
    if padding:
        memory = torch.nn.functional.pad(memory, (0, padding))
    return memory.contiguous().permute(0, 3, 1, 2)  # pad keeps what it takes for x's layout


def picture(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixels or floats for kernels that read floats of ``dtype`` alone."""
    return x if x.dtype in (dtype, torch.uint8) else x.to(dtype)


def addresses(x: Tensor) -> tuple[int, int]:
    """Where the memory of a strided tensor begins and ends."""
    if x.numel() == 0:
        return (0, 0)
    return (x.data_ptr(), x.data_ptr() + _span(x) * x.element_size())


def check_memory(name: str, x: Tensor) -> None:
    """A strided tensor must lie within its storage, which somebody may have emptied.

    Raises:
        RuntimeError: it does not; plain torch raises one too, where it does not crash.
    """
    held = x.untyped_storage().nbytes()
    needed = (x.storage_offset() + _span(x)) * x.element_size()
    if held < needed and x.numel() > 0:
        raise RuntimeError(f"{name} must have memory of {needed} bytes, its storage holds {held}")


def _span(x: Tensor) -> int:
    """Elements from the first to the last of a tensor that has any."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) + 1


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

    @staticmethod
    def moved(buffers: Iterable[Buffer]) -> int:
        """Bytes of device memory that must move: the extent of every region, each once.

        Not of what a step's programs hand to each other: that is read as soon as it is written, from the cache.
        """
        regions = {(b.memory, b.offset): b.bytes for b in buffers}
        return sum(n for (memory, _), n in regions.items() if memory not in (COUNTERS, PARTIALS))

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


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def rounded_up(a: int, multiple: int) -> int:
    return cdiv(a, multiple) * multiple


def power_of_two(a: int) -> int:
    """The smallest power of two that is at least ``a``."""
    return 1 << max(a - 1, 0).bit_length()
