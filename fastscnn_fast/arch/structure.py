"""Whether a FastSCNN still is the network that its config describes, which is all that folding knows."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

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
_PARTS = ("learning_to_downsample", "global_features", "feature_fusion", "classifier")


class Unfusable(ValueError):
    """The model computes something else than its config says; the message says where."""


def submodules(model: PlainFastSCNN) -> list[tuple[str, nn.Module]]:
    """The submodules that run in eval mode, by name; one used twice is listed twice."""
    named = model.named_modules(remove_duplicate=False)
    return [(name, module) for name, module in named if name.split(".")[0] in _PARTS]


def check(model: PlainFastSCNN) -> None:
    """Every submodule must be of the kind, the settings and the shapes that ``model.config`` asks for.

    Raises:
        Unfusable: it is not, or it has a forward hook or a forward method of its own.
    """
    modules = submodules(model)
    want, got = _structure(model.config), _describe(modules)
    for name in {**want, **got}:
        if want.get(name) != got.get(name):
            raise Unfusable(f"submodule {name} was replaced or changed")
    for name, module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            raise Unfusable(f"submodule {name} has a forward hook")
        if "forward" in vars(module):
            raise Unfusable(f"the forward method of submodule {name} was replaced")
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
