"""When FastSCNN.forward may run fused, and the cached fused copy behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from . import backends
from .fused import FusedFastSCNN, fuse

if TYPE_CHECKING:
    from .model import FastSCNN


class Unfusable(Exception):
    """The module's structure is not the one its config describes; the message says where."""


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """What must be equal for a submodule to compute, in eval mode, what the config says it does."""
    if type(module) is nn.Conv2d:
        m = module
        shape = (m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation)
        return (nn.Conv2d, *shape, m.groups, m.padding_mode, m.bias is None)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return (nn.BatchNorm2d, module.num_features, module.affine, module.running_mean is None)
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return (nn.Dropout,)
    return (type(module),)


class _Fused:
    """A fused copy and everything whose change makes it stale."""

    def __init__(self, model: FastSCNN) -> None:
        self._check_structure(model)
        modules = [m for name, m in model.named_modules() if name]
        parents = [model, *modules]
        self.children = [(m._modules, k, c) for m in parents for k, c in m._modules.items()]
        self.modules = [(m, type(m), m.__dict__) for m in modules]
        self.tensors = [
            (table, key, tensor, tensor._version, tensor.data_ptr())
            for m in parents
            for table in (m._parameters, m._buffers)
            for key, tensor in cast(dict[str, Any], table).items()
            if tensor is not None
        ]
        self.network = fuse(model)

    @staticmethod
    def _check_structure(model: FastSCNN) -> None:
        with torch.device("meta"):
            plain = type(model).from_config(model.config)
        for part in ("learning_to_downsample", "global_features", "feature_fusion", "classifier"):
            got, want = (
                {name: _kind(m) for name, m in cast(nn.Module, getattr(net, part)).named_modules()}
                for net in (model, plain)
            )
            changed = [name for name in {**want, **got} if want.get(name) != got.get(name)]
            if changed:
                raise Unfusable(f"submodule {part}.{changed[0]} was replaced")

    def stale(self) -> bool:
        return any(table.get(key) is not child for table, key, child in self.children) or any(
            table.get(key) is not tensor
            or tensor._version != version
            or tensor.data_ptr() != address
            for table, key, tensor, version, address in self.tensors
        )

    def overridden(self) -> str | None:
        """Why the submodules must run one by one just now, or None."""
        for module, kind, state in self.modules:
            if state["training"]:
                return "a submodule is in training mode"
            if state["_forward_hooks"] or state["_forward_pre_hooks"]:
                return "a submodule has a forward hook"
            if type(module) is not kind or "forward" in state:
                return "a submodule's forward was replaced"
        return None


class LazyFusion:
    """Mixin of FastSCNN: ``fused_for(x)`` is the fused network where it may stand in for plain torch."""

    _fused: _Fused | Unfusable | None = None

    def refuse(self) -> None:
        """Fuse anew at the next call: needed after writes through ``.data``, which torch does not count."""
        object.__setattr__(self, "_fused", None)

    def __getstate__(self) -> dict[str, Any]:
        """The fused copy is neither pickled nor deep-copied."""
        return {key: value for key, value in self.__dict__.items() if key != "_fused"}

    def fused_for(self, x: Tensor) -> FusedFastSCNN | None:
        """The fused network to run ``x`` with, or None where plain torch must run."""
        model = cast("FastSCNN", self)
        if model.training or torch.is_grad_enabled() or _being_traced(x):
            return None
        reason = self._refused_input(x)
        if reason is None:
            fused = self._current(model)
            if isinstance(fused, Unfusable):
                reason = str(fused)
            elif fused.network.backend == "reference":  # the reason is logged where it was chosen
                return None
            else:
                reason = fused.overridden()
                if reason is None:
                    return fused.network
        backends.log_once(f"FastSCNN runs unfused: {reason}")
        return None

    def _refused_input(self, x: Tensor) -> str | None:
        """Why x, or what surrounds the call, is left to plain torch; None where it is not."""
        model = cast("FastSCNN", self)
        weight = model.classifier.conv.weight
        if torch.is_autocast_enabled(x.device.type):
            return "autocast is enabled"
        if any(tensor.is_inference() for tensor in (weight, model.classifier.conv.weight)):
            return "the parameters are inference tensors, whose changes torch does not count"
        if x.device != weight.device or x.dtype not in (weight.dtype, torch.uint8):
            return f"x must be {weight.dtype} or torch.uint8 on {weight.device}, got {x.dtype} on {x.device}"
        if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
            return "a global forward hook is set"
        return None

    def _current(self, model: FastSCNN) -> _Fused | Unfusable:
        fused = self._fused
        if not isinstance(fused, _Fused) or fused.stale():
            try:
                fused = _Fused(model)
            except Unfusable as error:
                return error
            object.__setattr__(self, "_fused", fused)
        return fused


def _being_traced(x: Tensor) -> bool:
    """Compiling, exporting, tracing, or running under a mode or subclass that must see every op."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_scripting()
        or torch.jit.is_tracing()
        or torch.onnx.is_in_onnx_export()
        or type(x) not in (Tensor, nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
