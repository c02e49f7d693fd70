"""What the package says of its arithmetics' parity, against what the tests demand of them."""

from __future__ import annotations

import pytest
from helpers import BOUNDS

from fastscnn_fast.program.arithmetic import ARITHMETICS


@pytest.mark.parametrize("name", [name for name in ARITHMETICS if name not in ("float64", "int8")])
def test_bounds_are_no_looser_than_those_of_the_tests(name: str) -> None:
    """A GPU's "high" is TF32, which is coarser than the CPU's; int8 depends on its ranges, its tests are of equality."""
    ours, theirs = ARITHMETICS[name], BOUNDS["tf32" if name == "high" else name]
    for bounds, (factor, floor) in (
        (ours.layer_bounds, theirs.op),
        (ours.network_bounds, theirs.network),
    ):
        assert bounds.factor <= factor and bounds.error <= floor
        assert bounds.disagreement <= theirs.labels
