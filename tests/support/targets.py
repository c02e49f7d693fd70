"""What runs the GPU kernels of a test: Triton's interpreter, the emulation of CUDA, or a GPU; and cases that run there.

Results, guard zones, weights' surroundings and scratch arenas are poisoned with NaN before each run, so that one run
also shows that every element is written, nothing else is, and nothing else is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import cuda_host
import pytest
import torch
from cases import (
    DSCONV,
    FEATURE_FUSION,
    INVERTED_RESIDUAL,
    LABEL_ULPS,
    PYRAMID_POOLING,
    STEM_CONV,
    Case,
    upsample,
)
from helpers import (
    BOUNDS,
    GUARD,
    Bound,
    Guarded,
    assert_labels,
    assert_parity,
    in_layout,
    lifelike,
    run_poisoned,
    small_network,
)
from layouts import SMALL
from torch import Tensor

from fastscnn_fast import ops
from fastscnn_fast.arch.config import Config, preset
from fastscnn_fast.backends import registry
from fastscnn_fast.backends.gpu import arena, runner
from fastscnn_fast.backends.gpu.plan import Plan
from fastscnn_fast.lower.fold import fold
from fastscnn_fast.program import arithmetic
from fastscnn_fast.runtime.fused import FusedFastSCNN
from fastscnn_fast.runtime.model import FastSCNN

#: Triton decides it when it is imported, so the interpreter has a process of its own.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

#: Every arithmetic of floats that a GPU backend has; int8 has tests of its own, of equality.
NAMES = tuple(
    dict.fromkeys(
        name
        for backend in ("triton", "cuda")
        for name, one in arithmetic.of(backend).items()
        if not one.quantised
    )
)


@dataclass(frozen=True)
class Target:
    """A backend and what runs its kernels: "interpreter", "emulation" or "gpu"."""

    backend: str
    where: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.where}"

    @property
    def marks(self) -> pytest.MarkDecorator:
        """The group of tests that a case of this target belongs to."""
        groups = {"interpreter": "interpreted", "emulation": "emulated", "gpu": "gpu"}
        return getattr(pytest.mark, groups[self.where])

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.where == "gpu" else "cpu")

    def why_not(self) -> str:
        """Why it cannot run here, "" where it can."""
        if self.where == "emulation":
            return cuda_host.why_not()
        if self.where == "gpu" and not torch.cuda.is_available():
            return "there is no GPU"
        why_not = registry.BACKENDS[self.backend].why_not(Config(), self.device, torch.float32)
        return why_not or ""

    @contextmanager
    def ready(self) -> Iterator[Target]:
        """With plans, arenas and tiles of the test's own; the emulation stands in for the CUDA extension."""
        with pytest.MonkeyPatch.context() as monkeypatch:
            if self.where == "emulation":
                monkeypatch.setattr(registry, "_cuda_module", cuda_host.shared())
            monkeypatch.setattr(arena, "Bound", PoisonedBound)
            monkeypatch.setattr(runner, "_pool", arena.Pool())
            yield self
        runner._op_plan.cache_clear()
        runner._network_plan.cache_clear()

    def asked(self, name: str) -> tuple[torch.dtype, str]:
        """The arithmetic's dtype and precision; skips the test where the backend has no such arithmetic."""
        if name not in arithmetic.of(self.backend):
            pytest.skip(f"the {self.backend} backend has no arithmetic {name!r}")
        return arithmetic.ARITHMETICS[name].asked

    def bound(self, name: str) -> Bound:
        """In the interpreter "high" is as good as "highest"; on a GPU it is TF32."""
        high = "float32" if self.where == "interpreter" else "tf32"
        return BOUNDS[high if name == "high" else name]

    def case(self, case: Case, name: str | None = None) -> GpuCase:
        """``case`` on this target, in its own arithmetic or the one of that name."""
        return GpuCase(**{**vars(case), "arithmetic": name or case.arithmetic}, target=self)

    def fused(self, preset: str, name: str = "float32") -> FusedFastSCNN:
        """:func:`small_model`, without CUDA graphs, so that every call launches (graphs have tests of their own)."""
        folded = fold(small_model(preset))
        how = self.asked(name)
        return FusedFastSCNN(folded, self.backend, *how, cuda_graph="off").to(self.device)


#: Those of this process.
TARGETS = (
    [Target("triton", "interpreter")]
    if INTERPRETED
    else [Target("cuda", "emulation"), Target("triton", "gpu"), Target("cuda", "gpu")]
)


@dataclass(frozen=True)
class GpuCase(Case):
    """A :class:`Case` on a target."""

    target: Target = field(kw_only=True)

    def packed(self, weights: dict[str, Tensor]) -> Tensor:
        how = self.target.asked(self.arithmetic)
        packed = ops.pack([self.layer], [weights], self.target.backend, *how)
        return Guarded(packed.numel(), device=self.target.device).inside.copy_(packed)

    def run(self, inputs: Sequence[Tensor], weights: dict[str, Tensor]) -> Tensor:
        """The op's result, on the cpu."""
        placed = tuple(in_layout(x.to(self.target.device), self.layout) for x in inputs)
        arguments = self.arguments(placed, weights)
        return run_poisoned(self.layer.op, *arguments, backend=self.target.backend).cpu()


@contextmanager
def in_flight(*tensors: Tensor) -> Iterator[None]:
    """The emulation's launches must wait for those before them until they touch these tensors' memory."""
    if not getattr(registry._cuda_module, "on_host", False):
        yield
        return
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    registry._cuda_module.set_in_flight(list(storages.items()))
    try:
        yield
    finally:
        registry._cuda_module.set_in_flight([])


class PoisonedBound(arena.Bound):
    """Its arena lies between guard zones and holds NaN before each run, but for the counters: zeros, before and after.

    All memory but the weights is :func:`in_flight`.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        offsets = {name: at + GUARD for name, at in plan.offsets.items()}
        super().__init__(replace(plan, offsets=offsets, bytes=plan.bytes + 2 * GUARD), device)

    def run(self, tensors: Any) -> None:
        counted = self._counters.clone()
        self._arena.fill_(255)
        self._counters.copy_(counted)
        others = [x for name, x in tensors.items() if name != "weights"]
        with in_flight(self._arena, *others):
            super().run(tensors)
        assert not self._counters.any(), "a kernel left a counter"
        for zone in (self._arena[:GUARD], self._arena[-GUARD:]):
            assert (zone == 255).all(), "a kernel wrote outside of its scratch memory"


def check(case: GpuCase, least: float = 0.0) -> None:
    inputs, weights = case.inputs(), case.weights()
    own, ref64 = case.reference(inputs, weights), case.reference64(inputs, weights)
    bound = case.target.bound(case.arithmetic).op
    assert_parity(case.run(inputs, weights), own, ref64, *bound, least)


def check_odd(case: GpuCase) -> None:
    """As test_ops.size_of_numbers: the numbers that get rounded may be larger than the result's spread."""
    ref64 = case.reference64(case.inputs(), case.weights())
    check(case, max(1.0, ref64.square().mean().sqrt().item()))


def check_upsampling(case: GpuCase) -> None:
    """Logits, probabilities, and labels: the largest logit's class, but where two are within a few ulp."""
    check(case)
    check(replace(case, output="probabilities"))
    if case.layer.in_channels <= 256:
        inputs = case.inputs()
        labels = replace(case, output="labels").run(inputs, {})
        ref64 = case.reference64(inputs, {})
        largest = inputs[0].abs().max().item()
        gap = assert_labels(labels, ref64, LABEL_ULPS * largest)
        # Between logits that are equal (as of bfloat16 many are), float64's own choice is chance.
        assert (gap > 1e-12 * largest).double().mean() < 1e-3


def slow_unless(quick: bool, *values: Any, id: str | None = None) -> Any:
    marks = [] if quick else [pytest.mark.slow]
    return pytest.param(*values, id=id, marks=marks)


ONE_OF_EACH = [
    Case(STEM_CONV[5], ((9, 13),), batch=2),
    Case(DSCONV[7], ((5, 6),), batch=2),
    Case(INVERTED_RESIDUAL[2], ((5, 6),), batch=2),
    Case(INVERTED_RESIDUAL[1], ((5, 6),)),
    Case(PYRAMID_POOLING[6], ((5, 6),), batch=2),
    Case(FEATURE_FUSION[2], ((9, 7), (3, 2))),
    Case(FEATURE_FUSION[4], ((9, 7), (3, 2)), batch=2),
    Case(upsample(19, align_corners=True), ((2, 3), (9, 12)), batch=2),
]
each_op = pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)


@cache
def small_model(name: str) -> FastSCNN:
    """Of few classes: the interpreter takes them one after the other."""
    return lifelike(preset(name, **SMALL, num_classes=7))


def odd_network() -> FastSCNN:
    """All ops, channels that are no multiples of 16, and quick."""
    return small_network(
        num_classes=5,
        downsample_channels=(8, 16, 24),
        bottleneck_channels=(24, 32, 40),
        bottleneck_repeats=(1, 1, 2),
        expansion=2,
        pyramid_channels=40,
        fusion_channels=24,
    )
