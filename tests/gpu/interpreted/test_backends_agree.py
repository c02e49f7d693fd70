"""Both GPU backends against each other: Triton in its interpreter, CUDA C++ in its emulation, the same inputs."""

from __future__ import annotations

import copy

import cuda_host
import gpu_parity
import pytest
import torch
from cases import Case
from gpu_parity import (
    ONE_OF_EACH,
    GpuCase,
    fused,
    poisoned_arenas as poisoned_arenas,
    slow_unless,
    small_model,
)
from helpers import BOUNDS, err, noise

from fastscnn_fast.backends import registry

pytestmark = pytest.mark.skipif(bool(cuda_host.why_not()), reason=cuda_host.why_not())
TYPES = [
    slow_unless(name == "float16", name, id=name) for name in ("float32", "float16", "bfloat16")
]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(registry, "_cuda_module", cuda_host.shared())
    return "cuda"


@pytest.mark.parametrize("arithmetic", TYPES)
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_ops(case: Case, arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No further from each other than either may be from the truth."""
    own = GpuCase.of(case.enlarged(1024), arithmetic)
    inputs, weights = own.inputs(), own.weights()
    cuda = own.run(inputs, weights)
    monkeypatch.setattr(gpu_parity, "BACKEND", "triton")
    triton = own.run(inputs, weights)
    ref64 = own.reference64(inputs, weights)
    factor, floor = BOUNDS[arithmetic].op
    bound = max(factor * err(own.reference(inputs, weights), ref64), floor)
    least = max(1.0, ref64.square().mean().sqrt().item())
    assert err(cuda, triton.double(), least) <= bound


@pytest.mark.parametrize("arithmetic", TYPES)
@torch.no_grad()
def test_a_network(arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = noise(2, 3, 49, 65)
    results = []
    for name in ("cuda", "triton"):
        monkeypatch.setattr(gpu_parity, "BACKEND", name)
        fast = fused("paper", arithmetic)
        results.append(fast(x.to(fast.dtype)).double())
    model64 = copy.deepcopy(small_model("paper")).double()
    ref64 = model64.reference(x.to(fast.dtype).double())
    errors = [err(y, ref64) for y in results]
    assert err(results[0], results[1]) <= max(2 * max(errors), 1e-5)
