"""Plans with their scratch memory, ready to be called: what is bound once, and what at each call."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ...kernels.launch import Launch
from ...lower.pack import counted
from ...program.memory import COUNTERS, Buffer
from .cuda import CudaStep
from .plan import EXTERNAL, Plan
from .torch_step import TorchStep

_INTERPRETER = Lock()  # which patches triton.language for the whole process while a kernel runs


class _Call:
    """A step with what it is run on: scratch from the start, weights once bound, other tensors at each call."""

    def __init__(self, step: Any, scratch: Mapping[str, Tensor]) -> None:
        self._step = step
        self._values: dict[str, Any] = {}
        self._own: dict[str, Buffer] = {}  # pieces of the weights
        self._given: list[tuple[str, str]] = []  # name and memory
        for name, value in step.arguments.items():
            if not isinstance(value, Buffer):
                self._values[name] = value
            elif value.memory == "weights":
                self._own[name] = value
            elif value.memory in EXTERNAL:
                self._given.append((name, value.memory))
            else:
                self._values[name] = value.view(scratch[value.memory])

    def pieces(self, weights: Tensor) -> dict[str, Tensor]:
        return {name: buffer.view(weights) for name, buffer in self._own.items()}

    def given(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensors[memory] for name, memory in self._given}

    def bind(self, weights: Tensor) -> None:
        self._values |= self.pieces(weights)

    def forget(self) -> None:
        """Views would keep the memory of weights that are gone."""
        for name in self._own:
            self._values.pop(name, None)

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        self._step.run({**self._values, **self.given(tensors)})


class _CudaCall(_Call):
    """Its struct is filled as the tensors become known, so that a call sets few addresses."""

    def __init__(self, step: CudaStep, scratch: Mapping[str, Tensor]) -> None:
        super().__init__(step, scratch)
        self._arguments = step.struct()
        self._set(self._values)

    def _set(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            setattr(self._arguments, name, tensor.data_ptr())

    def bind(self, weights: Tensor) -> None:
        self._set(self.pieces(weights))

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        self._set(self.given(tensors))
        self._step.run(self._arguments)


class _TorchCall(_Call):
    """Its activations are (N, C, H, W), as torch has them; its weights are unpacked when they are bound."""

    def __init__(self, step: TorchStep, scratch: Mapping[str, Tensor]) -> None:
        super().__init__(step, scratch)
        self._values = {name: x.permute(0, 3, 1, 2) for name, x in self._values.items()}

    def bind(self, weights: Tensor) -> None:
        self._plain = self._step.weights(weights, self.pieces(weights))

    def forget(self) -> None:
        self._plain = None

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        self._step.run({**self._values, **self.given(tensors)}, self._plain)


_CALLS: dict[type, type[_Call]] = {Launch: _Call, CudaStep: _CudaCall, TorchStep: _TorchCall}


class Bound:
    """A plan with its arena, ready for one call at a time on one stream.

    Counters are zeroed here, once: every step leaves them at zero for the next. In a CUDA graph that captures a new
    arena its zeroing is captured too, so that each replay begins with zeros whatever else the graph kept there.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._one_at_a_time = _INTERPRETER if device.type == "cpu" else nullcontext()
        self._weights: weakref.ref[Tensor] | None = None
        self._bound_to = (0, 0)
        with torch.inference_mode(False):  # a later call may be outside of it
            self._arena = torch.empty(plan.bytes, dtype=torch.uint8, device=device)
            self._counters = self._arena[plan.offsets.get(COUNTERS, 0) :][: plan.counters]
            self._counters.zero_()
            scratch = {memory: self._arena[begin:] for memory, begin in plan.offsets.items()}
            self._calls = [_CALLS[type(step)](step, scratch) for step in plan.steps]

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        weights = tensors["weights"]
        if (
            self._weights is None
            or self._weights() is not weights
            or self._bound_to != (weights.data_ptr(), counted(weights))
        ):
            self._bind(weights)
        with self._one_at_a_time:
            for call in self._calls:
                call.run(tensors)

    def _bind(self, weights: Tensor) -> None:
        with torch.inference_mode(False):
            for call in self._calls:
                call.bind(weights)
        self._weights = weakref.ref(weights, lambda _: self._forget())
        self._bound_to = (weights.data_ptr(), counted(weights))

    def _forget(self) -> None:
        for call in self._calls:
            call.forget()


class Pool:
    """Bound plans by device, stream and plan: taken for a call and given back, bounded in number.

    On one stream calls run in order, so a given-back arena may be taken at once; another stream or a
    concurrent call gets one of its own, and so does a call that is captured as a CUDA graph.
    """

    def __init__(self, most: int = 16) -> None:
        self._most = most
        self._free: dict[Any, list[Bound]] = {}
        self._lock = Lock()

    def run(
        self, key: Any, plan: Plan, device: torch.device, tensors: Mapping[str, Tensor]
    ) -> None:
        if device.type != "cuda":
            self._run((key, device), plan, device, tensors)
            return
        with torch.cuda.device(device):  # kernels are launched on the current one
            key = (key, device, torch.cuda.current_stream().cuda_stream)
            if torch.cuda.is_current_stream_capturing():
                # An arena in the graph's private memory, which none but the graph uses.
                with self._lock:
                    self._free.pop(key, None)
                Bound(plan, device).run(tensors)
            else:
                self._run(key, plan, device, tensors)

    def _run(
        self, key: Any, plan: Plan, device: torch.device, tensors: Mapping[str, Tensor]
    ) -> None:
        with self._lock:
            free = self._free.pop(key, [])
            bound = free.pop() if free else None
            if free:
                self._free[key] = free
        if bound is None:
            bound = Bound(plan, device)
        bound.run(tensors)
        with self._lock:
            self._free.setdefault(key, []).append(bound)
            self._free[key] = self._free.pop(key)  # the most recently used is last
            while sum(map(len, self._free.values())) > self._most:
                oldest = next(iter(self._free))
                self._free[oldest].pop(0)
                if not self._free[oldest]:
                    del self._free[oldest]
