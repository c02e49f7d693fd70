"""FastSCNN: the network as people use it, plain torch in training and fused by itself in inference."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, repeat
from operator import attrgetter, contains, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ..arch.network import PlainFastSCNN
from ..arch.structure import SETTINGS, Unfusable, submodules
from ..backends import registry
from ..data.classes import Named
from ..ops import is_traced
from .fused import FusedFastSCNN, fuse

_WATCHED = (*SETTINGS, "training", "_forward_hooks", "_forward_pre_hooks")
_END = object()


class _Decision:
    """The fused copy of a model, or why there is none, and everything whose change may make it another."""

    def __init__(self, model: PlainFastSCNN) -> None:
        self.modules = [module for _, module in submodules(model)]
        self.states = [vars(module) for module in self.modules]
        self.getters = [itemgetter(*(k for k in _WATCHED if k in state)) for state in self.states]
        self.hooks = [
            state[key] for state in self.states for key in ("_forward_hooks", "_forward_pre_hooks")
        ]
        self.tables = [
            table
            for module in (model, *self.modules)
            for table in (module._modules, module._parameters, module._buffers)
            if table
        ]
        self.forced, self.seen = registry.forced(), list(self._look(model))
        tensors = [value for value in self.seen if type(value) in (Tensor, nn.Parameter)]
        self.counted = not any(tensor.is_inference() for tensor in tensors)
        self.tensors = tensors if self.counted else []
        self.contents = self._contents()
        # While the storages live, nothing else can come to lie at their addresses.
        self.storages = [tensor.untyped_storage() for tensor in self.tensors]
        self.network: FusedFastSCNN | None = None
        self.refusal: str | None = None
        try:
            self._fuse(model)
        except (Unfusable, registry.CannotRun) as reason:
            self.refusal = str(reason)

    def _fuse(self, model: PlainFastSCNN) -> None:
        if any(state["training"] for state in self.states):
            raise Unfusable("a submodule is in training mode")
        if not self.counted:
            raise Unfusable(
                "a parameter is an inference tensor, whose changes torch does not count"
            )
        network = fuse(model)
        if network.backend != "reference":  # plain torch is that already; the reason was logged
            self.network = network

    def _look(self, model: PlainFastSCNN) -> Iterator[Any]:
        """What must stay the very same objects: settings, hooks, types, submodules, tensors."""
        return chain(
            (model.config,),
            chain.from_iterable([get(state) for get, state in zip(self.getters, self.states)]),
            map(bool, self.hooks),
            map(contains, self.states, repeat("forward")),
            map(type, self.modules),
            chain.from_iterable([table.values() for table in self.tables]),
            (_END,),  # so that a table that grew or shrank cannot go unnoticed
        )

    def _contents(self) -> list[int]:
        """What changes when a tensor is written to or its ``.data`` is replaced."""
        return [
            *map(attrgetter("_version"), self.tensors),
            *map(Tensor.data_ptr, self.tensors),
        ]

    def holds(self, model: PlainFastSCNN) -> bool:
        return (
            registry.forced() == self.forced
            and all(map(is_, self._look(model), self.seen))
            and self._contents() == self.contents
        )


class FastSCNN(Named, PlainFastSCNN):
    """Fast-SCNN: (N, C, H, W) normalised floats -> logits (N, num_classes, H, W).

    Any batch and any size from 32x32 up, odd sizes included. In training with ``aux=True`` the result
    is ``(logits, auxiliary)`` with one full-size tensor per entry of ``config.aux_taps``. In eval mode
    without gradients the fused kernels run by themselves (see :func:`fastscnn_fast.fuse`); what cannot
    be fused runs in plain torch, with the reason logged once. uint8 input is raw pixels 0..255
    and is normalised by ``config.mean`` and ``config.std`` first.

    Args:
        num_classes: number of classes K.
        preset: which published implementation to be, a key of :data:`fastscnn_fast.arch.config.PRESETS`.
        aux: build the auxiliary heads.
        overrides: any other field of :class:`fastscnn_fast.arch.config.Config`.

    Raises:
        ValueError: an impossible combination, or input of a wrong shape.
    """

    _fused: _Decision | None = None

    def forward(self, x: Tensor) -> Any:
        """Logits (N, K, H, W); in training with auxiliary heads ``(logits, (aux, ...))``."""
        fused = self.fused_for(x)
        return self.reference(x) if fused is None else fused(x)

    def reference(self, x: Tensor) -> Any:
        """What :meth:`forward` computes, always in plain torch."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.refuse()  # a step of an optimiser may follow; with fused=True it writes uncounted
        return super().forward(x)

    def refuse(self) -> None:
        """Fuse anew at the next call.

        Needed after writes that torch does not count: through ``.data``, numpy or torch.distributed, or by
        an optimiser with ``fused=True``, unless this model's own ``forward`` ran with gradients before it.
        """
        object.__setattr__(self, "_fused", None)

    def __getstate__(self) -> dict[str, Any]:
        """The fused copy is neither pickled nor deep-copied."""
        return {key: value for key, value in self.__dict__.items() if key != "_fused"}

    def fused_for(self, x: Tensor) -> FusedFastSCNN | None:
        """The fused network to run ``x`` with, or None where plain torch must run."""
        if torch.compiler.is_compiling() or self.training or torch.is_grad_enabled():
            return None
        if is_traced(x) or getattr(self, "_is_replica", False):
            return None
        decision = self._fused
        if decision is None or not decision.holds(self):
            decision = _Decision(self)
            object.__setattr__(self, "_fused", decision)
        reason = decision.refusal
        if decision.network is not None:
            reason = _refused_input(x, decision.network)
        if reason is None:
            return decision.network
        registry.log_once(f"FastSCNN runs unfused: {reason}")
        return None


def _refused_input(x: Tensor, network: FusedFastSCNN) -> str | None:
    """Why x, or what surrounds the call, is left to plain torch; None where it is not."""
    device, dtype = network.weights.device, network.dtype
    if x.device != device or x.dtype not in (dtype, torch.uint8):
        return f"x must be {dtype} or torch.uint8 on {device}, got {x.dtype} on {x.device}"
    if torch.is_autocast_enabled(device.type):
        return "autocast is enabled"
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return "a global forward hook is set"
    return None
