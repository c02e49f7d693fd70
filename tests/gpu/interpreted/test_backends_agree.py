"""Both GPU backends against each other: Triton in its interpreter, CUDA C++ in its emulation, the same inputs."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import Case
from helpers import err, noise
from targets import ONE_OF_EACH, Target, slow_unless, small_model

CUDA, TRITON = Target("cuda", "emulation"), Target("triton", "interpreter")
pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(bool(CUDA.why_not()), reason=CUDA.why_not()),
]
TYPES = [
    slow_unless(name == "float16", name, id=name) for name in ("float32", "float16", "bfloat16")
]


@pytest.mark.parametrize("arithmetic", TYPES)
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_ops(case: Case, arithmetic: str) -> None:
    """No further from each other than either may be from the truth."""
    case = case.enlarged(1024)
    own = TRITON.case(case, arithmetic)
    inputs, weights = own.inputs(), own.weights()
    results = []
    for target in (CUDA, TRITON):
        with target.ready():
            results.append(target.case(case, arithmetic).run(inputs, weights))
    cuda, triton = results
    ref64 = own.reference64(inputs, weights)
    factor, floor = TRITON.bound(arithmetic).op
    bound = max(factor * err(own.reference(inputs, weights), ref64), floor)
    least = max(1.0, ref64.square().mean().sqrt().item())
    assert err(cuda, triton.double(), least) <= bound


@pytest.mark.parametrize("arithmetic", TYPES)
@torch.no_grad()
def test_a_network(arithmetic: str) -> None:
    x = noise(2, 3, 49, 65)
    results = []
    for target in (CUDA, TRITON):
        with target.ready():
            fast = target.fused("paper", arithmetic)
            results.append(fast(x.to(fast.dtype)).double())
    model64 = copy.deepcopy(small_model("paper")).double()
    ref64 = model64.reference(x.to(fast.dtype).double())
    errors = [err(y, ref64) for y in results]
    floor = TRITON.bound(arithmetic).network[1]
    assert err(results[0], results[1]) <= max(2 * max(errors), floor)
