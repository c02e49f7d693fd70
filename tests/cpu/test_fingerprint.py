"""The fingerprint of memory by which a FastSCNN sees that its parameters were written to."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastscnn_fast.backends import registry
from fastscnn_fast.program.memory import addresses

pytestmark = pytest.mark.skipif(not registry.isas(), reason="the C++ extension is not built")


def fingerprint(*tensors: Tensor) -> int:
    pieces = [(begin, end - begin) for begin, end in map(addresses, tensors)]
    table = torch.tensor(pieces, dtype=torch.int64).view(-1, 2)
    result: int = registry.cpu_module().fingerprint(table.data_ptr(), len(pieces))
    return result


@pytest.mark.parametrize("size", [1, 3, 4, 63, 64, 65, 127, 128, 1000])
def test_any_bit_counts(size: int) -> None:
    memory = torch.randint(256, (size + 3,), dtype=torch.uint8)[3:]  # at an odd address
    seen = {fingerprint(memory)}
    for byte in range(size):
        for bit in range(8):
            memory[byte] ^= 1 << bit
            seen.add(fingerprint(memory))
            memory[byte] ^= 1 << bit
    assert len(seen) == 1 + 8 * size
    assert fingerprint(memory) == fingerprint(memory.clone())


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": torch.neg,
    "two signs": lambda x: torch.cat([-x[:1], x[1:-1], -x[-1:]]),
    "reversed": lambda x: x.flip(0),
    "rolled by a block": lambda x: x.roll(16),
    "halves swapped": lambda x: x.roll(2048),
    "neighbours swapped": lambda x: x.view(-1, 2).flip(1).reshape(-1),
    "doubled": lambda x: x * 2,
    "zero": torch.zeros_like,
    "signs of zeros": lambda x: torch.where(x == 0, -0.0, x),
    "next number": lambda x: torch.nextafter(x, torch.tensor(9.0)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("values", ["random", "ones", "sparse"])
def test_changes_of_many_values_count(change: str, values: str) -> None:
    x = torch.randn(4096)
    if values == "ones":
        x = torch.ones(4096)
    elif values == "sparse":
        x = x.relu()
    y = CHANGES[change](x)
    same = torch.equal(x.view(torch.int32), y.view(torch.int32))
    assert (fingerprint(x) == fingerprint(y)) == same


def test_pieces_count_in_their_order() -> None:
    pieces = [torch.randn(random.randint(1, 200)) for _ in range(20)]
    swapped = [*pieces[:7], pieces[8], pieces[7], *pieces[9:]]
    assert fingerprint(*pieces) == fingerprint(*(piece.clone() for piece in pieces))
    assert len({fingerprint(*pieces), fingerprint(*swapped), fingerprint(*pieces[:-1])}) == 3
    assert fingerprint() != fingerprint(torch.zeros(1))
