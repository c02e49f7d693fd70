"""A fused op by plain torch, as one step of a plan on a GPU, where :mod:`.choices` says that it is the fastest."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...lower import gpu as layout
from ...lower.pack import counted
from ...program import reference
from ...program.layers import Layer
from ...program.memory import Buffer


@dataclass(frozen=True)
class TorchStep:
    """``arguments`` are the op's ``inputs``, "out" and the pieces of its packed weights, by name."""

    layer: Layer
    inputs: tuple[str, ...]
    arguments: Mapping[str, Buffer]
    dtype: torch.dtype
    output: str
    tf32: bool

    @property
    def buffers(self) -> Mapping[str, Buffer]:
        return self.arguments

    def weights(self, packed: Tensor, pieces: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The op's weights as :mod:`fastscnn_fast.program.reference` takes them.

        Unpacked from ``pieces``, views of the tensor ``packed``, once for each tensor and whenever that was
        written to.
        """
        version = counted(packed)
        known = _unpacked.get(packed)
        if known is None or known[0] != version:
            known = _unpacked[packed] = (version, {})
        by_step: dict[Any, Mapping[str, Tensor]] = known[1]
        key = (self.layer, self.dtype, *(buffer.offset for buffer in self.buffers.values()))
        if key not in by_step:
            unpacked = self._unpack(pieces)
            if packed.is_cuda:
                if torch.cuda.is_current_stream_capturing():
                    return unpacked  # of the graph's own memory, and not filled before it runs
                # Once: other streams read them too.
                torch.cuda.current_stream(packed.device).synchronize()
            by_step[key] = unpacked
        return by_step[key]

    def _unpack(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: value.to(self.dtype, copy=True, memory_format=torch.channels_last)
            if value.dim() == 4
            else value.to(self.dtype, copy=True)
            for name, value in layout.unpacked(self.layer, pieces).items()
        }

    def run(self, activations: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """On the current device and stream; ``activations`` are (N, C, H, W), labels (N, H, W)."""
        layer = self.layer
        *inputs, out = (activations[name] for name in (*self.inputs, "out"))
        with (
            torch.autocast(out.device.type, enabled=False),
            torch.no_grad(),
            reference.tf32(self.tf32) if self.dtype == torch.float32 else nullcontext(),
        ):
            out.copy_(reference.run(layer, inputs, weights, out.shape[-2:], self.output))
            channels = out.shape[1]
            padding = layout.computed_channels(channels) - channels
            if layer.op != "upsample_classify" and padding and out.stride(3) >= channels + padding:
                shape = (out.shape[0], padding, *out.shape[2:])
                out.as_strided(shape, out.stride(), out.storage_offset() + channels).zero_()


# By packed weights: how often those were written to, and what was unpacked since.
_unpacked = WeakTensorKeyDictionary()
