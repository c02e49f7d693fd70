"""FastSCNN: the network as people use it, plain torch in training and fused by itself in inference."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import chain, repeat
from operator import attrgetter, is_, itemgetter
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from ..arch.network import PlainFastSCNN
from ..arch.structure import (
    OF_NETWORK,
    SETTINGS,
    Unfusable,
    methods,
    parameters,
    submodules,
)
from ..backends import registry
from ..data.classes import Named
from ..lower.fold import check_memory_of
from ..ops import is_traced
from ..program.memory import addresses
from ..writing import check_path
from .fused import FusedFastSCNN, fuse

_WATCHED = (*SETTINGS, "training", "_forward_hooks", "_forward_pre_hooks")
_END = object()


class _Contents:
    """What lies in tensors on the CPU, by a fingerprint of all their bytes."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._fingerprint = registry.cpu_module().fingerprint
        pieces = [(begin, end - begin) for begin, end in map(addresses, tensors)]
        self._pieces = torch.tensor(pieces, dtype=torch.int64, device="cpu").view(-1, 2)
        self._seen = self._now()

    def _now(self) -> int:
        fingerprint: int = self._fingerprint(self._pieces.data_ptr(), len(self._pieces))
        return fingerprint

    def unchanged(self) -> bool:
        """The tensors must lie where they lay."""
        return self._now() == self._seen


class _Counts:
    """What torch counts of the writes to tensors, wherever they are, and the steps of its optimisers."""

    _alive: ClassVar[WeakSet[_Counts]] = WeakSet()

    def __init__(self, tensors: list[Tensor]) -> None:
        if any(tensor.is_inference() for tensor in tensors):
            raise Unfusable(
                "a parameter is an inference tensor, whose changes torch does not count"
            )
        self._tensors, self._stepped = tensors, False
        self._identities = set(map(id, tensors))
        self._seen = self._now()
        _count_steps()
        self._alive.add(self)

    def _now(self) -> list[int]:
        return list(map(attrgetter("_version"), self._tensors))

    def unchanged(self) -> bool:
        return not self._stepped and self._now() == self._seen

    @classmethod
    def after_step(cls, optimizer: Optimizer, *_: Any) -> None:
        """Those with ``fused=True`` write uncounted."""
        stepped = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        for counts in list(cls._alive):
            counts._stepped |= not stepped.isdisjoint(counts._identities)


@cache
def _count_steps() -> None:
    register_optimizer_step_post_hook(_Counts.after_step)


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
        self.tensors = [value for value in self.seen if type(value) in (Tensor, nn.Parameter)]
        self.places = self._places()
        # While the storages live, nothing else can come to lie at their addresses.
        self.storages = [tensor.untyped_storage() for tensor in self.tensors]
        self.written: _Contents | _Counts | None = None
        self.network: FusedFastSCNN | None = None
        self.refusal: str | None = None
        check_memory_of(model)
        try:
            self._fuse(model)
        except (Unfusable, registry.CannotRun) as reason:
            self.refusal = str(reason)

    def _fuse(self, model: PlainFastSCNN) -> None:
        if any(state["training"] for state in self.states):
            raise Unfusable("a submodule is in training mode")
        on_cpu = all(tensor.device.type == "cpu" for tensor in self.tensors)
        self.written = (_Contents if on_cpu and registry.isas() else _Counts)(self.tensors)
        network = fuse(model)
        if network.backend != "reference":  # plain torch is that already; the reason was logged
            self.network = network

    def _look(self, model: PlainFastSCNN) -> Iterator[Any]:
        """What must stay the very same objects: settings, hooks, types, methods, submodules, tensors."""
        return chain(
            (model.config, *map(vars(model).get, OF_NETWORK)),
            map(getattr, repeat(type(model)), OF_NETWORK),
            chain.from_iterable([get(state) for get, state in zip(self.getters, self.states)]),
            map(bool, self.hooks),
            map(len, self.states),  # a method of a submodule's own is one more
            map(type, self.modules),
            methods(),
            chain.from_iterable([table.values() for table in self.tables]),
            (_END,),  # so that a table that grew or shrank cannot go unnoticed
        )

    def _places(self) -> list[Any]:
        """What changes when a tensor's ``.data`` is replaced."""
        return [
            *map(Tensor.data_ptr, self.tensors),
            *map(Tensor.size, self.tensors),
            *map(Tensor.stride, self.tensors),
        ]

    def holds(self, model: PlainFastSCNN) -> bool:
        return (
            registry.forced() == self.forced
            and all(map(is_, self._look(model), self.seen))
            and self._places() == self.places
            and (self.written is None or self.written.unchanged())
        )


class FastSCNN(Named, PlainFastSCNN):
    """Fast-SCNN: (N, C, H, W) normalised floats -> logits (N, num_classes, H, W).

    Any batch and any size from 32x32 up, odd sizes included. In training with ``aux=True`` the result
    is ``(logits, auxiliary)`` with one full-size tensor per entry of ``config.aux_taps``. In eval mode,
    where no gradient is wanted (under ``torch.no_grad()``, or where neither the input nor a parameter
    requires one), the fused kernels run by themselves (see :func:`fastscnn_fast.fuse`); what cannot be
    fused runs in plain torch, with the reason logged once. uint8 input is raw pixels 0..255, RGB, and
    is normalised by ``config.mean`` and ``config.std`` first.

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
            decision = self._fused
            if decision is not None and isinstance(decision.written, _Counts):
                self.refuse()  # training follows, perhaps by writes that nobody counts
        return super().forward(x)

    def refuse(self) -> None:
        """Fuse anew at the next call.

        Never needed on the CPU, where the contents of all parameters and buffers are looked at in every call.
        Needed on a GPU after writes that torch does not count: through ``.data`` or torch.distributed, or by an
        optimiser that is not torch's, unless this model's own ``forward`` ran with gradients before it.
        """
        object.__setattr__(self, "_fused", None)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **options: Any) -> FastSCNN:
        """A ready model in eval mode, from the Hugging Face Hub, a folder, or by name.

        Args:
            source: the name of weights that come with the package (:class:`fastscnn_fast.Weights`), a folder of
                :meth:`save_pretrained`, a file that :func:`fastscnn_fast.load_checkpoint` takes, or, where there is
                nothing of these, a repository of the Hub, "OWNER/NAME".
            options: those of :func:`fastscnn_fast.load_checkpoint` (``num_classes=5``, ...) and, for the Hub, of
                huggingface_hub: ``revision``, ``token``, ``cache_dir``, ``force_download``, ``local_files_only``.

        Raises:
            ImportError: huggingface_hub, the extra ``hub``, is missing where a folder or the Hub is asked for.
            TypeError: called on a class derived from this one, whose forward may be another.
            ValueError: the folder or the file holds no such weights, the repository's name is none.
            OSError: there is no such repository or path, or it cannot be read.
        """
        if cls is not FastSCNN:
            raise TypeError(f"from_pretrained makes a FastSCNN, not a {cls.__qualname__}")
        from ..checkpoints.hub import from_pretrained

        return from_pretrained(source, **options)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        details: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> str | None:
        """Writes ``model.safetensors``, ``config.json`` and a model card, ``README.md`` unless there is one, to a folder.

        Args:
            folder: is made where it is missing.
            details: scores, command and recipe for the card and the file, as
                :func:`fastscnn_fast.checkpoints.read_details` gives them of a training run's file.
            options: of huggingface_hub's ``save_pretrained``; ``model_card_kwargs={"license": "mit"}`` adds to what
                the Hub finds models by.

        Raises:
            ImportError: huggingface_hub, the extra ``hub``, is missing.
            ValueError: as :func:`fastscnn_fast.checkpoints.save_checkpoint`.
            OSError: a file cannot be written.
        """
        from ..checkpoints.hub import on_hub

        check_path(folder)
        url: str | None = on_hub(self, details).save_pretrained(folder, **options)
        return url

    def push_to_hub(
        self, repo_id: str, details: Mapping[str, Any] | None = None, **options: Any
    ) -> str:
        """Puts what :meth:`save_pretrained` writes into a repository of the Hub; the address of the commit.

        Args:
            repo_id: "OWNER/NAME"; is made where it is missing.
            details: as :meth:`save_pretrained` has them.
            options: of huggingface_hub's ``push_to_hub``: ``private``, ``token``, ``branch``, ``commit_message``, ...

        Raises:
            ImportError: huggingface_hub, the extra ``hub``, is missing.
            ValueError: as :meth:`save_pretrained`, or the repository's name is none.
            OSError: the Hub refuses or cannot be reached.
        """
        from ..checkpoints.hub import on_hub

        return str(on_hub(self, details, repo_id).push_to_hub(repo_id, **options))

    def __getstate__(self) -> dict[str, Any]:
        """The fused copy is neither pickled nor deep-copied."""
        return {key: value for key, value in self.__dict__.items() if key != "_fused"}

    def fused_for(self, x: Tensor) -> FusedFastSCNN | None:
        """The fused network to run ``x`` with, or None where plain torch must run."""
        if torch.compiler.is_compiling() or self.training:
            return None
        if is_traced(x) or getattr(self, "_is_replica", False):
            return None
        decision = self._fused
        if decision is not None and not decision.holds(self):
            decision = None
        reason = self._wanted_gradient(x, decision) if torch.is_grad_enabled() else None
        if reason is None:
            if decision is None:
                decision = _Decision(self)
                object.__setattr__(self, "_fused", decision)
            reason = decision.refusal
            if decision.network is not None:
                reason = _refused_input(x, decision.network)
            if reason is None:
                return decision.network
        registry.log_once(f"FastSCNN runs unfused: {reason}")
        return None

    def _wanted_gradient(self, x: Tensor, decision: _Decision | None) -> str | None:
        """Why a result has a gradient; None where it has none."""
        if x.requires_grad:
            what = "the input"
        else:
            tensors = decision.tensors if decision is not None else parameters(self)
            if not any(map(attrgetter("requires_grad"), tensors)):
                return None
            what = "a parameter"
        return (
            f"gradients are enabled and {what} requires one, which is many times slower: to infer, write"
            " `with torch.no_grad():` around the call, or model.requires_grad_(False) once"
        )


def _refused_input(x: Tensor, network: FusedFastSCNN) -> str | None:
    """Why x, or what surrounds the call, is left to plain torch; None where it is not."""
    device, dtype = network.weights.device, network.dtype
    if x.device != device or x.dtype not in (dtype, torch.uint8):
        return f"x must be {dtype} or torch.uint8 on {device}, got {x.dtype} on {x.device}"
    if torch.is_autocast_enabled(device.type):
        wanted = torch.get_autocast_dtype(device.type)
        return f"autocast is enabled: fuse(model, dtype={wanted}) computes in that dtype, fused"
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return "a global forward hook is set"
    return None
