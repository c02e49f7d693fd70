"""What ``fastscnn_fast tune`` found fastest on a GPU: one JSON file, read when a plan is made.

    {"schema": 4, "choices": {ENVIRONMENT: {LAYER: {"tile": {"pixels": 64, ...}}, {"cuda": {"slices": 3}}, "torch" or "cuda"}}}

ENVIRONMENT is what a time depends on but the layer (:func:`environment`), so that what was chosen with one Triton,
or a CUDA extension for some architectures, is not looked for with another, or without; LAYER is the layer and its
shapes (:func:`layer_key`). A file that cannot be read, or is of another schema, is ignored with one logged reason.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from ...kernels.launch import Tile
from ...program.layers import Layer
from ...program.memory import Buffer
from ...program.program import encode
from ...writing import write_whole
from ..gpus import INTERPRETER
from ..registry import architecture, cuda_code, log_once

#: Raised when the meaning of the file changes, or the kernels so much that old choices mislead.
SCHEMA = 4

VARIABLE = "FASTSCNN_TUNE_CACHE"

#: The plain-torch op, or the CUDA C++ kernel, instead of Triton's in some tile.
TORCH: Literal["torch"] = "torch"
CUDA: Literal["cuda"] = "cuda"


@dataclass(frozen=True)
class Sliced:
    """The CUDA C++ kernel of inverted_residual, its work cut along the expanded channels into so many slices at most."""

    slices: int


Choice = Tile | Sliced | Literal["torch", "cuda"]


@dataclass(frozen=True, eq=False)
class Choices:
    """The choices for one environment, by :func:`layer_key`; hashed by identity, for caches of plans."""

    by_layer: Mapping[str, Choice]

    def get(self, key: str) -> Choice | None:
        return self.by_layer.get(key)


NONE = Choices({})


def path() -> Path:
    """FASTSCNN_TUNE_CACHE, else ~/.cache/fastscnn_fast/tune.json."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "fastscnn_fast" / "tune.json"


def environment(device: torch.device) -> str:
    """GPU, compute capability, versions of triton and torch, what the CUDA extension was built for."""
    found = architecture(device)
    name = INTERPRETER if found == INTERPRETER else torch.cuda.get_device_name(device)
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return f"{name} | {found} | triton {triton} | torch {torch.__version__} | cuda {cuda_code()}"


def layer_key(
    layer: Layer,
    inputs: Sequence[Buffer],
    out: Buffer,
    dtype: torch.dtype,
    precision: str,
    output: str,
) -> str:
    """``precision`` as in common.py; ``output`` counts for upsample_classify only."""
    shapes = [
        f"{buffer.dtype}".removeprefix("torch.") + " " + "x".join(map(str, buffer.shape))
        for buffer in (*inputs, out)
    ]
    name = f"{layer.op} {output}" if layer.op == "upsample_classify" else layer.op
    return " | ".join([name, encode([layer]), *shapes, f"{dtype}", precision])


def load(device: torch.device) -> Choices:
    """The choices for ``device``, none where there is no file; read once until :func:`save` is called."""
    return _load(os.environ.get(VARIABLE), device)


@lru_cache(maxsize=16)
def _load(named: str | None, device: torch.device) -> Choices:
    file, where = path(), environment(device)
    try:
        known = _read(file)
    except FileNotFoundError:
        return NONE
    except (OSError, ValueError) as error:
        log_once(f"{file} is ignored: {error}")
        return NONE
    if where not in known:
        log_once(
            f"{file} is ignored: it has no choices for {where} (fastscnn_fast tune makes them)"
        )
        return NONE
    return Choices(known[where])


def _read(file: Path) -> dict[str, dict[str, Choice]]:
    """The choices by environment and layer.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged or of another schema.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"it is damaged ({error})") from None
    schema = value.get("schema") if isinstance(value, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"schema must be {SCHEMA}, got {schema!r}")
    try:
        return {
            where: {key: _decode(choice) for key, choice in layers.items()}
            for where, layers in value["choices"].items()
        }
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"it is damaged ({error!r})") from None


_NAMES = {Tile: "tile", Sliced: "cuda"}
_ANY = ("stages", "slices")  # of a tile: need not be a power of two


def _decode(value: Any) -> Choice:
    if value in (TORCH, CUDA):
        return value
    if "cuda" in value:
        slices = value["cuda"]["slices"]
        if type(slices) is not int or slices < 1:
            raise ValueError(f"slices must be a number from 1 on, got {slices!r}")
        return Sliced(slices)
    tile = value["tile"]
    known = {field.name for field in fields(Tile)}

    def sound(name: str, v: Any) -> bool:
        return type(v) is int and v >= 1 and (name in _ANY or v & (v - 1) == 0)

    if set(tile) != known or not all(sound(name, v) for name, v in tile.items()):
        names = ", ".join(sorted(known))
        rule = f"tile must have {names}, powers of two but for {' and '.join(_ANY)}"
        raise ValueError(f"{rule}, got {tile}")
    return Tile(**tile)


def save(found: Mapping[str, Choice], device: torch.device) -> Path:
    """Adds ``found`` to the file, which is replaced in one step; what it held for other layers stays.

    Raises:
        OSError: it cannot be written.
    """
    file, where = path(), environment(device)
    try:
        known = _read(file)
    except FileNotFoundError:
        known = {}
    except ValueError as error:
        log_once(f"{file} is replaced: {error}")
        known = {}
    known[where] = {**known.get(where, {}), **found}
    encoded = {
        place: {
            key: choice if isinstance(choice, str) else {_NAMES[type(choice)]: asdict(choice)}
            for key, choice in layers.items()
        }
        for place, layers in known.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps({"schema": SCHEMA, "choices": encoded}, indent=1).encode())
    _load.cache_clear()
    return file
