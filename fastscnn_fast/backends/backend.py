"""One engine a backend: how it packs weights, and how it fills the results of the ops.

ops.py has checked the arguments and made the result before an engine is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

from ..program.arithmetic import Arithmetic
from ..program.program import Program
from ..program.reference import Weights

#: The module of each backend's engine.
MODULES = {
    "reference": "reference",
    "cpu": "cpu",
    "triton": "gpu.backend",
    "cuda": "gpu.backend",
}


class Engine(Protocol):
    """``layer`` and ``program`` are texts of Program; ``op`` is one of layers.OPS of one activation."""

    def pack(
        self, program: Program, tensors: Sequence[Weights], arithmetic: Arithmetic
    ) -> Tensor: ...

    def tuned(self, device: torch.device) -> object:
        """What a call there depends on besides its arguments, by identity: other choices make another plan."""

    def stem_conv(
        self, out: Tensor, x: Tensor, weights: Tensor, layer: str, dtype: torch.dtype
    ) -> None: ...

    def plane(self, op: str, out: Tensor, x: Tensor, weights: Tensor, layer: str) -> None: ...

    def feature_fusion(
        self, out: Tensor, high: Tensor, low: Tensor, weights: Tensor, layer: str
    ) -> None: ...

    def upsample_classify(
        self, out: Tensor, x: Tensor, weights: Tensor, layer: str, output: str
    ) -> None: ...

    def network(
        self,
        out: Tensor,
        x: Tensor,
        weights: Tensor,
        program: str,
        dtype: torch.dtype,
        output: str,
    ) -> None: ...


@cache
def engine(backend: str) -> Engine:
    """The engine of that name, imported at its first use.

    Raises:
        ValueError: there is none.
    """
    if backend not in MODULES:
        raise ValueError(f"backend must be one of {', '.join(MODULES)}, got {backend!r}")
    made: Engine = import_module(f".{MODULES[backend]}", __package__).ENGINES[backend]
    return made
