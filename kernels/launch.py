"""What the host side of every kernel hands over: a launch, and the tile that its work was cut into.

A :class:`Launch` is described once and read by everyone: the arena binds tensors to its buffers and runs
it, ``dump`` and the ahead-of-time report compile it for any architecture and count its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from fastscnn_fast.program.memory import Buffer


@dataclass(frozen=True)
class Tile:
    """pixels: of a program (inverted_residual: lanes, each a block of rows x columns pixels).

    block: channels of a step (dsconv, feature_fusion: of the input; inverted_residual: expanded).
    rows, columns: inverted_residual: pixels of a block; upsample_classify: rows of a step.
    slices: inverted_residual: programs that share a tile's expanded channels, at most; as many as divide its steps.
    """

    pixels: int
    block: int = 32
    rows: int = 1
    columns: int = 1
    warps: int = 4
    stages: int = 2
    slices: int = 1


@dataclass(frozen=True)
class Launch:
    """One kernel launch; ``arguments`` in the kernel's order, compile-time constants among them.

    fused: whether a product and a sum may be rounded as one; int8's are rounded each by itself.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    warps: int
    stages: int
    fused: bool = True

    @property
    def buffers(self) -> dict[str, Buffer]:
        return {name: a for name, a in self.arguments.items() if isinstance(a, Buffer)}

    @property
    def bytes(self) -> int:
        """See :meth:`Buffer.moved`."""
        return Buffer.moved(self.buffers.values())

    def run(self, values: Mapping[str, Any]) -> None:
        """Launches on the current device and stream; ``values`` has a tensor for every buffer."""
        if prod(self.grid) > 0:
            self.kernel[self.grid](
                **values,
                num_warps=self.warps,
                num_stages=self.stages,
                enable_fp_fusion=self.fused,
            )
