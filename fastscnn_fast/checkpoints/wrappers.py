"""Where in a checkpoint the tensors of the network are: containers, wrappers' prefixes, and what else is in there."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from operator import itemgetter
from typing import Any

from torch import Tensor

from ..arch.config import Config
from .layouts import LAYOUTS, Layout

#: Names that a network has in a checkpoint, or in the module around it; the first is taken where there are several.
_KNOWN = (
    *("state_dict", "model_state_dict", "model_state", "model", "module", "network", "net"),
    *("weights", "params"),
)
#: Words by which a name says that the weights are averages over the steps of a training.
_AVERAGED = {"ema", "swa", "average", "averaged", "avg", "shadow"}
#: Words that name what only a training needs, wherever in a module it is.
_TRAINING_ONLY = {"loss", "losses", "criterion", "criterions", "criteria", "metric", "metrics"}
#: What torch puts around a module, or around parts of it.
_TRANSPARENT = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
#: A dictionary in a checkpoint, after the names that lead to it.
_Container = tuple[tuple[str, ...], Mapping[Any, Any]]
_DEEPEST = 8
_MOST_PLACES = 16


class CheckpointError(ValueError):
    """A file or state_dict that is no checkpoint of a known Fast-SCNN; the message says why."""


@dataclass
class Place:
    """Part of a checkpoint that looks like a network in one layout.

    Attributes:
        layout: the name of the layout that it resembles most.
        alike: how many of that layout's modules are in it.
        path: the names of the containers around it.
        prefix: what its keys begin with there, wrappers of torch left out.
        values: what is in it, by the names that the layout has.
        beside: names of what else is in the innermost container.
    """

    layout: str
    alike: int
    path: tuple[str, ...]
    prefix: tuple[str, ...]
    values: dict[str, Any]
    beside: list[str] = field(default_factory=list)
    swapped: bool = False

    @property
    def name(self) -> str:
        return ".".join((*self.path, *self.prefix)) or "the top level"

    @property
    def averaged(self) -> bool:
        """Whether it is, by name, the average of weights that are elsewhere."""
        words = {word for part in (*self.path, *self.prefix) for word in _words(part)}
        return not self.swapped and not words.isdisjoint(_AVERAGED)

    @property
    def preference(self) -> int:
        """The less, the sooner it is taken: averages, then the known names in their order, then any other."""
        if self.averaged:
            return 0
        if self.swapped:
            return len(_KNOWN) + 2
        parts = (*self.path, *self.prefix)
        ranks = (_KNOWN.index(p) if p in _KNOWN else len(_KNOWN) for p in parts)
        return 1 + max(ranks, default=0)


def places(state: Any, source: str, size: float = math.inf) -> list[Place]:
    """Where a network may be, the likeliest first; at least one, and no data is touched.

    Raises:
        CheckpointError: there are no named tensors, or those of one place claim more than ``size`` bytes, the
            file's.
    """
    likely = _places(state, source)
    for place in likely:
        tensors = [value for value in place.values.values() if isinstance(value, Tensor)]
        claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if claimed > size:
            raise CheckpointError(
                f"{source}: its tensors claim {claimed} bytes, the file has {size}"
            )
    return likely


def _places(state: Any, source: str) -> list[Place]:
    found: list[Place] = []
    containers = list(_containers(state))
    for path, container in containers:
        found += _places_in(path, container)
    if not found:
        return [_nowhere(state, containers, source)]
    most = max(place.alike for place in found)
    likely = [place for place in found if 2 * place.alike >= most]
    likely.sort(key=lambda place: (-place.alike, place.preference))
    return likely[:_MOST_PLACES]


def _words(name: str) -> list[str]:
    """In lower case, those of camelCase too."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)]


def _containers(state: Any) -> Iterator[_Container]:
    """Every dictionary in ``state``, itself among them, with the names that lead to it, level by level."""
    level: dict[int, _Container] = {id(state): ((), state)} if isinstance(state, Mapping) else {}
    for _ in range(_DEEPEST + 1):
        yield from level.values()
        level = {
            id(inner): ((*path, str(name)), inner)
            for path, container in level.values()
            for name, inner in container.items()
            if isinstance(inner, Mapping)
        }


@cache
def _layouts_of() -> dict[tuple[str, ...], list[str]]:
    """A weight's name, in parts -> the layouts that have it."""
    names: dict[tuple[str, ...], list[str]] = {}
    for layout, table in LAYOUTS.items():
        for module in table.modules(Config()):
            names.setdefault((*module.split("."), "weight"), []).append(layout)
    return names


def _places_in(path: tuple[str, ...], container: Mapping[Any, Any]) -> list[Place]:
    known = _layouts_of()
    longest = max(map(len, known))
    keys = {key: tuple(key.split(".")) for key in container if isinstance(key, str)}
    bare = {key: tuple(p for p in parts if p not in _TRANSPARENT) for key, parts in keys.items()}
    if len(set(bare.values())) == len(keys):  # else a wrapper's name is somebody's own
        keys = bare
    alike: dict[tuple[str, ...], dict[str, int]] = {}
    for key, parts in keys.items():
        if not isinstance(container[key], Tensor):
            continue
        for start in range(max(0, len(parts) - longest), len(parts)):
            for layout in known.get(parts[start:], ()):
                counts = alike.setdefault(parts[:start], dict.fromkeys(LAYOUTS, 0))
                counts[layout] += 1
    found = []
    for prefix, counts in alike.items():
        layout = max(counts, key=counts.__getitem__)
        place = Place(layout, counts[layout], path, prefix, {})
        # mmengine's averaged model counts its steps; the hook that saves it swaps it with the state_dict.
        place.swapped = path[-1:] == ("ema_state_dict",) and "steps" in container
        found.append(place)
    found.sort(key=lambda place: -place.alike)
    for place in found[:_MOST_PLACES]:
        tops = _tops(LAYOUTS[place.layout])
        for key, parts in keys.items():
            inside = parts[: len(place.prefix)] == place.prefix
            rest = parts[len(place.prefix) :]
            if inside and _of_network(rest, tops):
                place.values[".".join(rest)] = container[key]
            else:
                place.beside.append(key)
        place.beside += [repr(key) for key in container if key not in keys]
    return found[:_MOST_PLACES]


def _tops(layout: Layout) -> set[str]:
    return {name.partition(".")[0] for name in layout.blocks.values()}


def _of_network(parts: tuple[str, ...], tops: set[str]) -> bool:
    """Whether what has that name would be part of a network of the layout whose modules begin with ``tops``."""
    if not parts or parts[0] not in tops:
        return False
    return all(_TRAINING_ONLY.isdisjoint(_words(part)) for part in parts)


def _nowhere(state: Any, containers: list[_Container], source: str) -> Place:
    """What stands for a network where nothing looks like one: the container of the most tensors."""
    if not containers:
        what = type(state).__name__
        raise CheckpointError(f"{source}: holds a {what}, not a dictionary of tensors")

    def tensors(pair: _Container) -> int:
        return sum(isinstance(k, str) and isinstance(v, Tensor) for k, v in pair[1].items())

    path, container = max(containers, key=tensors)
    if not tensors((path, container)):
        if len(containers[-1][0]) == _DEEPEST:
            raise CheckpointError(f"{source}: nested more than {_DEEPEST} dictionaries deep")
        leaves = [(p, c) for p, c in containers if not any(map(_is_container, c.values()))]
        path, container = next(filter(itemgetter(1), leaves), ((), {}))
    if not container:
        raise CheckpointError(f"{source}: holds no tensors")
    for key, value in container.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            what = f"{key!r} is a {type(value).__name__}"
            raise CheckpointError(f"{source}: holds more than named tensors: {what}")
    return Place(next(iter(LAYOUTS)), 0, path, (), dict(container))


def _is_container(value: Any) -> bool:
    return isinstance(value, Mapping)
