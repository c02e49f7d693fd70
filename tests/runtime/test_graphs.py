"""When a call is captured as a CUDA graph and replayed: the rules on the cpu with a stand-in, the rest on a GPU."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from threading import Barrier, Event
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fastscnn_fast import FastSCNN, FusedFastSCNN, fuse
from fastscnn_fast.backends import registry, runners
from fastscnn_fast.backends.gpu import measure
from fastscnn_fast.runtime import graphs
from fastscnn_fast.runtime.graphs import MOST, Call, Graphs


class Fake:
    """Captures on the cpu: replays by calling again, and counts."""

    made: ClassVar[list[Fake]] = []

    def __init__(self, call: Call, x: Tensor) -> None:
        self.call, self.runs = call, 0
        self.output = call(x)
        Fake.made.append(self)

    def result(self) -> Tensor:
        return torch.empty_like(self.output)

    def run(self, x: Tensor, out: Tensor) -> None:
        self.runs += 1
        out.copy_(self.call(x))


@pytest.fixture(autouse=True)
def nothing_captured() -> None:
    Fake.made = []


@pytest.fixture(scope="module")
def model() -> FastSCNN:
    return FastSCNN(num_classes=3).eval()


def with_graphs(model: FastSCNN, policy: str, captured: Any = Fake) -> FusedFastSCNN:
    fast = fuse(model, "reference")
    fast._graphs = Graphs(policy, captured, "cpu")
    return fast


def picture(height: int = 32, width: int = 32, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width)


@pytest.mark.parametrize(("policy", "captures_at"), [("auto", 2), ("on", 1), ("off", None)])
def test_a_shape_is_captured_when_the_policy_says(
    model: FastSCNN, policy: str, captures_at: int | None
) -> None:
    fast, plain = with_graphs(model, policy), fuse(model, "reference", cuda_graph="off")
    for call in range(1, 5):
        x = picture()
        assert torch.equal(fast(x), plain(x))
        assert len(Fake.made) == (captures_at is not None and call >= captures_at)
    if captures_at is not None:
        assert Fake.made[0].runs == 4 - captures_at + 1


def test_each_kind_of_call_has_its_own_graph(model: FastSCNN) -> None:
    fast = with_graphs(model, "on")
    x = picture()
    different = (
        lambda: fast(x),
        lambda: fast.labels(x),
        lambda: fast.probabilities(x),
        lambda: fast(x.contiguous(memory_format=torch.channels_last)),
        lambda: fast((x * 20).to(torch.uint8)),
        lambda: fast(picture(33, 49)),
        lambda: fast(picture(batch=2)),
    )
    for _ in range(2):
        for call in different:
            call()
    assert len(Fake.made) == len(different) and all(graph.runs == 2 for graph in Fake.made)


def test_out_is_filled_and_checked_as_without_a_graph(model: FastSCNN) -> None:
    fast = with_graphs(model, "on")
    x = picture()
    out = torch.full((1, 32, 32), 99, dtype=torch.uint8)
    assert fast.labels(x, out) is out and torch.equal(out, fast.labels(x))
    with pytest.raises(ValueError, match="out must be of shape"):
        fast.labels(x, torch.empty(1, 32, 33, dtype=torch.uint8))
    with pytest.raises(TypeError, match="out must be of dtype torch.uint8"):
        fast.labels(x, torch.empty(1, 32, 32))
    with pytest.raises(ValueError, match="out must not share memory with x"):
        pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
        fast.labels(pixels, pixels[:, 0])
    with pytest.raises(ValueError, match="x must be"):
        fast(x[:, :2])


def test_the_shape_that_was_not_used_for_longest_is_dropped(model: FastSCNN) -> None:
    fast = with_graphs(model, "on")
    for width in range(32, 32 + MOST):
        fast.labels(picture(width=width))
    fast.labels(picture(width=32))
    fast.labels(picture(width=90))
    assert len(Fake.made) == MOST + 1 and len(fast._graphs._known) == MOST
    fast.labels(picture(width=32))
    assert len(Fake.made) == MOST + 1
    fast.labels(picture(width=33))  # the oldest by then
    assert len(Fake.made) == MOST + 2 and len(fast._graphs._known) == MOST


def test_shapes_that_never_come_back_are_never_captured(model: FastSCNN) -> None:
    fast = with_graphs(model, "auto")
    for width in range(32, 32 + MOST + 2):
        fast.labels(picture(width=width))
    assert not Fake.made and len(fast._graphs._known) == MOST


def test_new_weights_are_captured_anew(model: FastSCNN) -> None:
    fast = with_graphs(model, "on")
    x = picture()
    before = fast(x)
    fast.load_state_dict(fuse(FastSCNN(num_classes=3).eval(), "reference").state_dict())
    assert not torch.equal(fast(x), before) and len(Fake.made) == 2
    fast._apply(torch.clone)  # as .to() makes new tensors
    fast(x)
    assert len(Fake.made) == 3


def test_new_choices_are_captured_anew(model: FastSCNN, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuning changes plans; a graph holds the old one."""
    fast, x, tuned = with_graphs(model, "on"), picture(), object()
    fast(x)
    monkeypatch.setattr(runners.runner("reference"), "tuned", lambda device: tuned)
    fast(x), fast(x)
    assert len(Fake.made) == 2


def test_a_call_that_cannot_be_captured_runs_by_itself(
    model: FastSCNN, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, said = [], []
    monkeypatch.setattr(registry, "log_once", said.append)

    def broken(call: Call, x: Tensor) -> Fake:
        tried.append(x)
        raise RuntimeError("operation not permitted when stream is capturing")

    fast, x = with_graphs(model, "auto", broken), picture()
    for _ in range(4):
        assert fast(x).isfinite().all()
    assert len(tried) == 1 and "not permitted" in said[0]
    fast = with_graphs(model, "on", broken)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not permitted"):
            fast(x)


def test_threads_share_a_graph_and_never_capture_at_once(model: FastSCNN) -> None:
    entered, release = Event(), Event()

    class Slow(Fake):
        def __init__(self, call: Call, x: Tensor) -> None:
            entered.set()
            assert release.wait(60)
            super().__init__(call, x)

    fast, other, x = with_graphs(model, "on", Slow), with_graphs(model, "on", Slow), picture()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(fast, x)
        assert entered.wait(60)
        for network in (fast, other):  # another capture is under way
            assert network(x).isfinite().all()
        assert not Fake.made
        release.set()
        assert torch.equal(first.result(60), fast(x))
    assert len(Fake.made) == 1

    barrier, fast = Barrier(4), with_graphs(model, "auto")
    pictures = [picture(width=32 + i % 3) for i in range(24)]
    plain = fuse(model, "reference", cuda_graph="off")

    def run(part: list[Tensor]) -> list[Tensor]:
        barrier.wait(60)
        return [fast.labels(x) for x in part]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, [pictures[i::4] for i in range(4)]))
    for i, part in enumerate(results):
        assert all(torch.equal(y, plain.labels(x)) for x, y in zip(pictures[i::4], part))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))])
def test_copies_have_the_policy_but_no_graphs(model: FastSCNN, way: Any) -> None:
    fast, x = with_graphs(model, "on"), picture()
    y = fast(x)
    other = way(fast)
    assert other._graphs.policy == "on" and not other._graphs._known
    assert torch.equal(other(x), y) and len(Fake.made) == 2


def test_nothing_is_captured_where_every_op_must_be_seen(model: FastSCNN) -> None:
    fast, x = with_graphs(model, "on"), picture()

    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fast(x)

    exported = torch.export.export(Wrapped(), (x,))
    assert "fastscnn.network" in exported.graph_module.code and not Fake.made
    torch.compile(fast, fullgraph=True, backend="eager")(x)
    assert not Fake.made
    assert fast(torch.empty(0, 3, 32, 32)).shape == (0, 3, 32, 32) and not Fake.made


def test_policies_are_checked(model: FastSCNN) -> None:
    with pytest.raises(ValueError, match="cuda_graph must be one of auto, on, off, got 'yes'"):
        fuse(model, cuda_graph="yes")
    with pytest.raises(
        registry.CannotRun, match="cuda_graph='on' cannot run: (there is no|device)"
    ):
        fuse(model, cuda_graph="on")
    fast = fuse(model)
    assert fast._graphs.policy == "auto"
    fast._graphs = Graphs("on")
    with pytest.raises(registry.CannotRun, match="cuda_graph='on'"):
        fast(picture())


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of torch.cuda, which does nothing."""
    log: list[str] = []

    class Stream:
        def wait_stream(self, other: Any) -> None:
            log.append("wait for stream")

        def wait_event(self, event: Any) -> None:
            log.append("wait for event")

    class CudaEvent:
        def __init__(self, enable_timing: bool = False) -> None:
            pass

        def record(self, stream: Any = None) -> None:
            log.append("record")

        def elapsed_time(self, end: Any) -> float:
            return 6.0

    class CUDAGraph:
        def replay(self) -> None:
            log.append("replay")

    arguments = inspect.signature(torch.cuda.graph)

    @contextmanager
    def graph(*args: Any, **named: Any) -> Iterator[None]:
        arguments.bind(*args, **named)
        log.append("capture")
        yield
        log.append("captured")

    fakes: dict[str, Any] = {
        "Stream": Stream,
        "Event": CudaEvent,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "current_stream": Stream,
        "stream": nullcontext,
        "device": nullcontext,
        "synchronize": lambda: log.append("synchronize"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: log.append("keep"))
    return log


def test_a_capture_warms_up_beside_and_replays_behind_the_last_replay(log: list[str]) -> None:
    def call(x: Tensor) -> Tensor:
        log.append("call")
        return x + 1

    with torch.inference_mode():
        captured = graphs.Captured(call, torch.ones(3))
    assert log == [
        *("wait for stream", "call", "call", "call", "wait for stream"),
        *("capture", "call", "captured", "record"),
    ]
    assert not captured._input.is_inference() and not captured._output.is_inference()
    log.clear()
    out = captured.result()
    captured.run(torch.full((3,), 5.0), out)
    assert log == ["wait for event", "replay", "record", "keep"]
    assert captured._input.tolist() == [5, 5, 5] and torch.equal(out, captured._output)


def test_runs_are_timed_within_one_graph(log: list[str]) -> None:
    runs = [lambda: log.append("call") for _ in range(4)]
    assert measure.milliseconds(runs, rounds=2) == [1.5, 1.5]
    assert log == [
        *("wait for stream", "call", "call", "call", "wait for stream"),
        *("capture", "call", "call", "call", "call", "captured", "replay"),
        *2 * ("record", "replay", "record"),
        "synchronize",
    ]


def test_as_many_copies_as_exceed_the_cache_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        L2_cache_size = 50_000_000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    device = torch.device("cuda:0")
    assert [measure.copies(n, device) for n in (10**9, 10**7, 10**3)] == [2, 11, 512]
    assert measure.copies(10**3, torch.device("cpu")) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_graph_on_a_gpu_gives_what_the_kernels_give(model: FastSCNN, backend: str) -> None:
    fast, plain = (
        fuse(copy.deepcopy(model).cuda(), backend, cuda_graph=policy) for policy in ("on", "off")
    )
    streams = [torch.cuda.Stream() for _ in range(2)]
    for width in (96, 64, 96):
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                x = picture(64, width).cuda()
                assert torch.equal(fast(x), plain(x))
                assert torch.equal(fast.labels(x), plain.labels(x))
    captured = [replay for replay, _ in fast._graphs._known.values()]
    assert len(captured) == 4 and all(type(replay) is graphs.Captured for replay in captured)
