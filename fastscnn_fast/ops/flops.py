"""What torch.utils.flop_counter counts for the ops: as much as for the convolutions of the plain network."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

from ..program.layers import Shape, SizedLayer
from ..program.program import parsed

_COUNTER = "torch.utils.flop_counter"


def _flops(layers: Iterable[SizedLayer], images: int) -> int:
    return images * sum(layer.plain_flops for layer in layers)


def _network(x: Shape, weights: Shape, program: str, *_: Any, **__: Any) -> int:
    return _flops(parsed(program).sized(x[2], x[3]), x[0])


def _layer(*shapes: Any, out_shape: Shape, **_: Any) -> int:
    """Of an op that takes one or two planes, packed weights and the text of its layer."""
    text = next(one for one in shapes if isinstance(one, str))
    (layer,) = parsed(text).layers
    inputs = tuple(tuple(shape[1:]) for shape in shapes[: len(layer.input_channels)])
    return _flops([SizedLayer(layer, inputs, tuple(out_shape[1:]))], out_shape[0])


def _register(counter: ModuleType, names: Iterable[str]) -> None:
    for name in names:
        op = getattr(torch.ops.fastscnn, name)
        counter.register_flop_formula(op)(_network if name == "network" else _layer)


class _WhenImported(MetaPathFinder):
    """Registers as soon as the counter is imported: that imports Triton, which takes half a second."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(module, self._names)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register(names: Iterable[str]) -> None:
    """For the ops of these names, now or when the counter is imported."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER], names)
    else:
        sys.meta_path.insert(0, _WhenImported(names))
