"""The GPU backends on a GPU: every case of the interpreter's and the emulation's, and what only a device shows.

python -m pytest tests/gpu/test_gpu.py -m gpu
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from gpu_parity import DEVICE, INTERPRETED, fused
from helpers import noise
from triton_parity import *  # noqa: F403

from fastscnn_fast.arch.config import Config
from fastscnn_fast.backends import registry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 runs kernels on the cpu"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    why_not = registry.BACKENDS[name].why_not(Config(), DEVICE, torch.float32)
    if why_not is not None:
        pytest.skip(f"{name}: {why_not}")
    return name


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    """What waits for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_a_warm_call_does_not_wait_for_the_device(request: pytest.FixtureRequest) -> None:
    fast, x = fused("paper", "float16"), noise(1, 3, 64, 96).half().to(DEVICE)
    out = torch.empty_like(fast(x))
    labels = torch.empty_like(fast.labels(x))
    request.getfixturevalue("no_synchronisation")
    fast(x), fast.labels(x)
    fast(x, out=out), fast.labels(x, out=labels)


def test_streams_have_arenas_of_their_own() -> None:
    """Many calls at once on two streams, each with its own picture: the same bits as one after the other."""
    fast, x = fused("paper", "float16"), noise(2, 3, 128, 192).half().to(DEVICE)
    expected = [fast(x[i : i + 1]) for i in (0, 1)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(fast(x[i : i + 1]))
    torch.cuda.synchronize()
    for own, right in zip(results, expected):
        assert all(torch.equal(y, right) for y in own)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_a_device_that_is_not_the_current_one() -> None:
    fast, x = fused("paper"), noise(1, 3, 64, 96).to(DEVICE)
    other = fused("paper").to("cuda:1")
    assert torch.equal(other(x.to("cuda:1")).to(DEVICE), fast(x))
