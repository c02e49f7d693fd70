"""What only a GPU shows of the GPU backends; their numerics there are test_parity.py's.

python -m pytest tests/gpu -m gpu
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import err, noise
from targets import Target, odd_network

from fastscnn_fast import bench, fuse
from fastscnn_fast.backends.gpu import choices, tune
from fastscnn_fast.lower.fold import fold


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    """What waits for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_a_warm_call_does_not_wait_for_the_device(
    on_gpu: Target, request: pytest.FixtureRequest
) -> None:
    fast, x = on_gpu.fused("paper", "float16"), noise(1, 3, 64, 96).half().to(on_gpu.device)
    out = torch.empty_like(fast(x))
    labels = torch.empty_like(fast.labels(x))
    request.getfixturevalue("no_synchronisation")
    fast(x), fast.labels(x)
    fast(x, out=out), fast.labels(x, out=labels)


def test_streams_have_arenas_of_their_own(on_gpu: Target) -> None:
    """Many calls at once on two streams, each with its own picture: the same bits as one after the other."""
    fast, x = on_gpu.fused("paper", "float16"), noise(2, 3, 128, 192).half().to(on_gpu.device)
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
def test_a_device_that_is_not_the_current_one(on_gpu: Target) -> None:
    fast, x = on_gpu.fused("paper"), noise(1, 3, 64, 96).to(on_gpu.device)
    other = on_gpu.fused("paper").to("cuda:1")
    assert torch.equal(other(x.to("cuda:1")).to(on_gpu.device), fast(x))


def test_no_layer_is_slower_than_torch_and_the_network_is_right(
    on_gpu: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is tuned."""
    monkeypatch.setenv(choices.VARIABLE, str(tmp_path / "tune.json"))
    choices._load.cache_clear()
    size, device = (64, 96), torch.device("cuda", torch.cuda.current_device())
    network = odd_network().to(device)
    found = list(tune.tune(fold(network), [size], 1, torch.float32, "highest", device))
    for layer in found:
        *_, torchs = layer.trials
        assert layer.best is not None and torchs.ms is not None, layer
        assert layer.best.ms is not None and layer.best.ms <= torchs.ms
    choices.save({f.key: f.best.choice for f in found if f.best}, device)
    x = noise(1, 3, *size).to(device)
    for policy in ("off", "on"):
        y = fuse(network, on_gpu.backend, cuda_graph=policy)(x)
        assert err(y, bench.exact_logits(network, x)) < 1e-5
