"""One runner a backend: how it packs weights, and how it fills the results of the ops.

fastscnn_fast.ops has checked the arguments and made the result before a runner is called.
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

#: The module of each backend's runner.
MODULES = {
    "reference": "reference",
    "cpu": "cpu",
    "triton": "gpu.runner",
    "cuda": "gpu.runner",
}


class Runner(Protocol):
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
def runner(backend: str) -> Runner:
    """The runner of that name, imported at its first use.

    Raises:
        ValueError: there is none.
    """
    if backend not in MODULES:
        raise ValueError(f"backend must be one of {', '.join(MODULES)}, got {backend!r}")
    made: Runner = import_module(f".{MODULES[backend]}", __package__).RUNNERS[backend]
    return made
