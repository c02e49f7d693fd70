"""Whether a FastSCNN still is the network that its config describes, which is all that folding knows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import repeat
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from . import network
from .config import Config
from .network import PlainFastSCNN

#: The attributes, besides its tensors, by which a submodule of FastSCNN decides what it computes in eval mode.
SETTINGS = (
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
    "eps",
    "min_val",
    "max_val",
    "bins",
    "input_first",
    "align_corners",
    "residual",
)
#: The methods by which a submodule computes, in the classes that one may be of.
_RUNS = (
    "__call__",
    "_call_impl",
    "__getattr__",
    "forward",
    "pool",
    "_conv_forward",
    "_check_input_dim",
)
KINDS = (
    *(network.ConvBNAct, network.DSConv, network.LearningToDownsample, network.InvertedResidual),
    *(network.PyramidPooling, network.GlobalFeatures, network.FeatureFusion, network.Classifier),
    *(nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.Identity, nn.ReLU, nn.ReLU6, nn.Sequential),
    *(
        nn.Dropout,
        nn.Dropout1d,
        nn.Dropout2d,
        nn.Dropout3d,
        nn.AlphaDropout,
        nn.FeatureAlphaDropout,
    ),
)
#: Those of the network itself that plain torch would run.
OF_NETWORK = ("_normalised", "_full_size")
METHODS: list[tuple[type[nn.Module], str]] = [
    (kind, name) for kind in KINDS for name in _RUNS if hasattr(kind, name)
]
METHODS += [(PlainFastSCNN, name) for name in ("forward", *OF_NETWORK)]
_OWNERS, _NAMES = zip(*METHODS)
_PARTS = ("learning_to_downsample", "global_features", "feature_fusion", "classifier")


class Unfusable(ValueError):
    """The model computes something else than its config says; the message says where."""


def unwrapped(module: Any) -> Any:
    """What DataParallel, DistributedDataParallel, an averaged model or torch.compile wrap; else the module itself."""
    while isinstance(
        inner := getattr(module, "module", getattr(module, "_orig_mod", None)), nn.Module
    ):
        module = inner
    return module


def submodules(model: PlainFastSCNN) -> list[tuple[str, nn.Module]]:
    """The submodules that run in eval mode, by name; one used twice is listed twice."""
    named = model.named_modules(remove_duplicate=False)
    return [(name, module) for name, module in named if name.split(".")[0] in _PARTS]


def parameters(model: PlainFastSCNN) -> Iterator[nn.Parameter]:
    """Those of the submodules that run in eval mode."""
    for _, module in submodules(model):
        yield from (p for p in module._parameters.values() if p is not None)


def methods() -> Iterator[Any]:
    """The methods by which a network computes, which must stay the very same functions."""
    return map(getattr, _OWNERS, _NAMES, repeat(None))


def check(model: PlainFastSCNN) -> None:
    """Every submodule must be of the kind, the settings and the shapes that ``model.config`` asks for.

    Raises:
        Unfusable: it is not, or it has a forward hook, or a method was replaced, its own or its class's.
    """
    for kind, name in METHODS:
        if not _is_own(kind, name):
            raise Unfusable(f"method {name} of {kind.__name__} was replaced")
    for name in OF_NETWORK:
        if getattr(getattr(model, name), "__func__", None) is not getattr(PlainFastSCNN, name):
            raise Unfusable(f"method {name} of {type(model).__name__} was replaced")
    if (other := changed(model, model.config)) is not None:
        raise Unfusable(f"submodule {other} was replaced or changed")
    modules = submodules(model)
    for name, module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            raise Unfusable(f"submodule {name} has a forward hook")
        if replaced := [method for method in _RUNS if method in vars(module)]:
            raise Unfusable(f"method {replaced[0]} of submodule {name} was replaced")
    tensors = [
        t
        for _, module in modules
        for t in (*module._parameters.values(), *module._buffers.values())
        if t is not None
    ]
    if odd := {type(t) for t in tensors} - {Tensor, nn.Parameter}:
        raise Unfusable(f"a parameter or buffer is of type {odd.pop().__name__}")
    if len({(t.device, t.dtype) for t in tensors if t.is_floating_point()}) > 1:
        raise Unfusable("parameters and buffers are of several devices or dtypes")


def changed(model: PlainFastSCNN, config: Config) -> str | None:
    """The first submodule that is not of the kind, the settings (whatever eps) and the shapes of ``config``, if any."""
    want, got = _structure(config), _describe(submodules(model))
    return next((name for name in {**want, **got} if want.get(name) != got.get(name)), None)


def unsound(name: str, tensor: Tensor) -> str | None:
    """What no trained parameter or buffer of that name holds, in words; None for a sound one."""
    wild = tensor.numel() - int(tensor.isfinite().sum())
    if wild:
        return f"NaN or infinity in {wild} of {tensor.numel()} values"
    if name.endswith("running_var") and tensor.numel() and (least := tensor.min().item()) < 0:
        return f"a negative variance, {least:.3g}"
    return None


def _is_own(kind: type, name: str) -> bool:
    """Whether a method is the one that ``kind``, or a class that it inherits from, was written with."""
    method = getattr(kind, name, None)
    return isinstance(method, FunctionType) and any(
        # functools.wraps copies a function's name, not its globals.
        _package(method.__globals__["__name__"]) == _package(cls.__module__)
        and method.__qualname__.startswith(f"{cls.__name__}.")
        for cls in kind.__mro__
    )


def _package(module: str) -> str:
    return module.partition(".")[0]


@lru_cache(maxsize=64)
def _structure(config: Config) -> dict[str, dict[str, Any]]:
    with torch.device("meta"):
        return _describe(submodules(PlainFastSCNN.from_config(config)))


def _describe(modules: list[tuple[str, nn.Module]]) -> dict[str, dict[str, Any]]:
    """Per submodule its kind, settings (whatever eps) and tensor shapes."""
    return {
        name: {
            "kind": _kind(module),
            **{
                key: value
                for key, value in vars(module).items()
                if key in SETTINGS and key != "eps"
            },
            **{key: t if t is None else t.shape for key, t in module._parameters.items()},
            **{key: t if t is None else t.shape for key, t in module._buffers.items()},
        }
        for name, module in modules
    }


def _kind(module: nn.Module) -> Any:
    """The module's type; torch's own batch norms are one kind, its dropouts another, in eval mode."""
    kind = type(module)
    if kind in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return nn.BatchNorm2d
    return nn.Dropout if kind.__module__ == nn.Dropout.__module__ else kind
