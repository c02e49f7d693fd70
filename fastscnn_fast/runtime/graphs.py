"""CUDA graphs: of whole calls, when they are captured and how they are replayed.

Not measured on a GPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import ops
from ..backends import registry, runners
from ..lower.pack import counted

POLICIES = ("auto", "on", "off")
#: Shapes that a network remembers, captured or seen once.
MOST = 8

_WARM_UPS = 3  # as torch documents: libraries choose algorithms and take workspaces
_one_at_a_time = Lock()

Call = Callable[[Tensor], Tensor]


class Replay(Protocol):
    """A captured call."""

    def result(self) -> Tensor:
        """Memory for a result."""

    def run(self, x: Tensor, out: Tensor) -> None:
        """Fills ``out`` with the call's result on x, which is like the one captured."""


class Captured:
    """``call`` on inputs like x as one graph, between an input and an output of its own.

    The network's scratch memory lies in the graph's private pool, so it lives as long as the graph does.

    Raises:
        RuntimeError: something in ``call`` cannot be captured.
    """

    def __init__(self, call: Call, x: Tensor) -> None:
        self._lock = Lock()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(x.device), torch.inference_mode(False), torch.no_grad():
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            self._input = torch.empty_like(x).copy_(x)
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    call(self._input)
            current.wait_stream(side)
            with torch.cuda.graph(
                self._graph, stream=side, capture_error_mode="thread_local"
            ):  # other threads may go on allocating
                self._output = call(self._input)
            self._done = torch.cuda.Event()
            self._done.record(current)

    def result(self) -> Tensor:
        return torch.empty_like(self._output)

    def run(self, x: Tensor, out: Tensor) -> None:
        with self._lock, torch.cuda.device(x.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)  # of the last call, perhaps on another stream
            self._input.copy_(x)
            self._graph.replay()
            out.copy_(self._output)
            self._done.record(stream)
            self._input.record_stream(stream)


class Graphs:
    """The graphs of one network; a copy or a pickle of it has none.

    Args:
        policy: "auto" captures a call that is seen a second time, "on" the first time, "off" never.
        captured: what captures.
        device: type of the devices that it captures on.

    Raises:
        ValueError: unknown policy.
    """

    def __init__(
        self,
        policy: str = "auto",
        captured: Callable[[Call, Tensor], Replay] = Captured,
        device: str = "cuda",
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"cuda_graph must be one of {', '.join(POLICIES)}, got {policy!r}")
        self.policy = policy
        self._captured = captured
        self._device = device
        self._lock = Lock()
        # Least recently used first; None: seen, but not captured. With the weights, which must stay.
        self._known: OrderedDict[Any, tuple[Replay | None, Tensor]] = OrderedDict()
        self._refused: set[Any] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, (self.policy, self._captured, self._device)

    def check(self, device: torch.device) -> None:
        """Raises CannotRun where "on" asks for what ``device`` has not."""
        if self.policy == "on" and device.type != self._device:
            raise registry.CannotRun(
                f"cuda_graph='on' cannot run: {registry.not_on(self._device, device)}"
            )

    def network(
        self,
        x: Tensor,
        weights: Tensor,
        program: str,
        output: str,
        backend: str,
        dtype: torch.dtype,
        out: Tensor | None,
    ) -> Tensor:
        """As :func:`ops.network`, replayed where it may be."""
        if (
            self.policy == "off"
            or torch.compiler.is_compiling()
            or (self.policy == "auto" and x.device.type != self._device)
            or ops.is_traced(x)
            or type(weights) is not Tensor
            or (out is not None and ops.is_traced(out))
        ):
            return ops.network(x, weights, program, output, backend, dtype, out)
        self.check(x.device)
        arguments = (weights, program, output, backend, dtype)
        tuned = runners.runner(backend).tuned(x.device)
        replay = self._find(lambda y: ops.network(y, *arguments), x, weights, (output, tuned))
        if replay is None:
            return ops.network(x, *arguments, out)
        if out is None:
            out = replay.result()
        else:
            ops.check_network_out(x, weights, program, dtype, output, backend, out=out)
        replay.run(x, out)
        return out

    def _find(self, call: Call, x: Tensor, weights: Tensor, how: Any) -> Replay | None:
        """The graph for x and ``how``, captured now where it is time; None where the call must run by itself."""
        if x.numel() == 0 or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        where = (tuple(x.shape), x.stride(), x.dtype, x.device)
        key = (how, *where, weights.data_ptr(), counted(weights))
        with self._lock:
            seen = key in self._known
            replay, _ = self._known.pop(key, (None, weights))
            self._remember(key, replay, weights)
            if replay is not None:
                return replay
            if key in self._refused or not (seen or self.policy == "on"):
                return None
        if not _one_at_a_time.acquire(blocking=False):
            return None
        try:
            replay = self._captured(call, x)
        except RuntimeError as error:
            if self.policy == "on":
                raise
            registry.log_once(f"running without a CUDA graph: {error}")
            with self._lock:
                self._refused.add(key)
            return None
        finally:
            _one_at_a_time.release()
        with self._lock:
            self._remember(key, replay, weights)
        return replay

    def _remember(self, key: Any, replay: Replay | None, weights: Tensor) -> None:
        self._known[key] = (replay, weights)
        self._known.move_to_end(key)
        while len(self._known) > MOST:
            dropped, _ = self._known.popitem(last=False)
            self._refused.discard(dropped)
