"""From the tensors of any known implementation to the network that they belong to."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..arch.config import MOST_BLOCKS, PRESETS, SHORT, Block, Config, preset as config_preset
from ..arch.structure import unsound
from ..runtime.model import FastSCNN
from .layouts import LAYOUTS, OURS, Layout, Shapes, names_in, shapes_of


class CheckpointError(ValueError):
    """A file or state_dict that is no checkpoint of a known Fast-SCNN; the message says why."""


_CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "network", "net")
_PREFIXES = ("module.", "model.", "network.", "net.", "_orig_mod.")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_DEEPEST = 8


def from_state_dict(
    state: Any, preset: str | None = None, source: str = "state_dict", **overrides: Any
) -> FastSCNN:
    """A FastSCNN in eval mode with a copy of the weights in ``state``, whatever its layout and wrapping.

    Args:
        state: a state_dict of any known layout, or a checkpoint that contains one.
        preset: for what shapes do not tell; by default the layout's own, and for our own layout the
            one published implementation that has these shapes.
        source: how errors name ``state``.
        overrides: fields of :class:`Config` that differ from the preset (``mean``, ``std``, ...). Widths are
            those of the tensors; ``bottlenecks`` need be given only for strides other than the paper's.

    Raises:
        CheckpointError: no known network, with the closest layout and what differs; or a tensor, which is
            named, holds NaN, infinity or a negative variance.
        ValueError: an unknown preset or field.
    """
    tensors = tensors_in(state, source)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    closest = max(LAYOUTS, key=lambda name: _resemblance(shapes, LAYOUTS[name]))
    layout = LAYOUTS[closest]
    if preset is not None:
        candidates = [preset]
    elif layout is OURS:
        candidates = list(PRESETS)
    else:
        candidates = [name for name in PRESETS if LAYOUTS.get(name) is layout]

    fits = []
    for name in candidates:
        base = config_preset(name)
        derived = _derive(shapes, layout, base)
        if SHORT.keys() & overrides:
            del derived["bottlenecks"]
        values = derived | overrides
        if "pyramid_bins" not in overrides and values["pyramid_bins"] is None:
            raise CheckpointError(
                f"{source}: pyramid_bins must be given, since the {_count(shapes, layout, 'pyramid_branch')} "
                f"branches are not the preset's {base.pyramid_bins}"
            )
        config = config_of(source, config_preset, name, **values)
        absent = [t for t in config.aux_taps if config.aux and f"aux_{t}" not in layout.blocks]
        if absent:
            raise CheckpointError(
                f"{source}: layout {closest!r} has no {absent[0]!r} auxiliary head"
            )
        fits.append((_Fit(source, config, layout, shapes), name))
    fit, name = min(fits, key=lambda pair: pair[0].problems)
    if fit.problems:
        which = f"layout {closest!r}" if name == closest else f"layout {closest!r}, preset {name!r}"
        raise CheckpointError(f"{source}: no known Fast-SCNN; closest is {which}: {fit}")
    return _build(fit, tensors)


def from_own(state: Any, config: Config, source: str) -> FastSCNN:
    """The network of ``config``, which a file of ours states, with the weights in ``state``, in eval mode.

    Raises:
        CheckpointError: the tensors are not those of ``config``; the message names what differs.
    """
    tensors = tensors_in(state, source)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for field, value in _derive(shapes, OURS, config).items():
        stated = getattr(config, field)
        if value != stated:
            raise CheckpointError(
                f"{source}: {field} is {stated!r} by its config, {value!r} by its tensors"
            )
    fit = _Fit(source, config, OURS, shapes)
    if fit.problems:
        raise CheckpointError(f"{source}: its tensors do not belong to its config: {fit}")
    return _build(fit, tensors)


def config_of(source: str, make: Any, *args: Any, **values: Any) -> Config:
    """``make(*args, **values)``, whose complaints become a :class:`CheckpointError` that names ``source``."""
    try:
        config: Config = make(*args, **values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from None
    return config


class _Fit:
    """How far the keys and shapes of a file are from those of one network in one layout."""

    def __init__(self, source: str, config: Config, layout: Layout, shapes: Shapes) -> None:
        self.source, self.config = source, config
        try:
            self.names = names_in(config, layout)
        except RuntimeError as error:  # more elements than torch can count
            raise CheckpointError(f"{source}: {error}") from None
        wanted = {self.names[name]: shape for name, shape in shapes_of(config).items()}
        self.missing = [k for k in wanted if k not in shapes and not _optional(k)]
        self.unexpected = [k for k in shapes if k not in wanted]
        self.misshaped = [
            f"{k} is {shapes[k]}, should be {shape}"
            for k, shape in wanted.items()
            if shapes.get(k, shape) != shape
        ]
        self.problems = len(self.missing) + len(self.unexpected) + len(self.misshaped)

    def __str__(self) -> str:
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": self.misshaped,
        }
        return "; ".join(
            f"{len(found)} {kind} (first: {found[0]})" for kind, found in kinds.items() if found
        )


def _optional(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _resemblance(shapes: Shapes, layout: Layout) -> int:
    return sum(f"{module}.weight" in shapes for module in layout.modules(Config()))


def _has(shapes: Shapes, layout: Layout, block: str, index: int = 0) -> bool:
    return block in layout.blocks and f"{layout.module(block, index=index)}.weight" in shapes


def _count(shapes: Shapes, layout: Layout, block: str) -> int:
    return next(n for n in itertools.count() if not _has(shapes, layout, block, n))


def _derive(shapes: Shapes, layout: Layout, base: Config) -> dict[str, Any]:
    """The free fields as the shapes tell them; the base's where a tensor is absent.

    ``pyramid_bins`` cannot be seen: the base's where there are as many branches, else None.
    """

    def size(default: int, dimension: int, block: str, part: int = 0, index: int = 0) -> int:
        shape = shapes.get(f"{layout.module(block, part, index)}.weight", ())
        return shape[dimension] if len(shape) == 4 else default

    def stage(index: int, blocks: Sequence[Block]) -> tuple[Block, ...]:
        """Widths by the tensors; strides, which they do not show, by the base."""
        name = f"bottleneck{index}"
        count = min(_count(shapes, layout, name), MOST_BLOCKS) or len(blocks)
        known = [*blocks, *[(0, 0, 1)] * (count - len(blocks))][:count]
        return tuple(
            (size(mid, 0, name, 0, i), size(out, 0, name, 4, i), stride)
            for i, (mid, out, stride) in enumerate(known)
        )

    down = base.downsample_channels
    taps = tuple(tap for tap in base.aux_taps if _has(shapes, layout, f"aux_{tap}"))
    as_many = _count(shapes, layout, "pyramid_branch") in (0, len(base.pyramid_bins))
    return {
        "num_classes": size(base.num_classes, 0, "logits"),
        "in_channels": size(base.in_channels, 1, "stem"),
        "downsample_channels": (
            size(down[0], 0, "stem"),
            *(size(down[i + 1], 0, "downsample", 2, i) for i in (0, 1)),
        ),
        "bottlenecks": tuple(
            stage(i, blocks) for i, blocks in enumerate(base.bottlenecks, start=1)
        ),
        "pyramid_bins": base.pyramid_bins if as_many else None,
        "pyramid_channels": size(base.pyramid_channels, 0, "pyramid_out"),
        "fusion_channels": size(base.fusion_channels, 0, "fusion_low"),
        "aux": bool(taps),
        "aux_taps": taps or base.aux_taps,
        "aux_channels": size(base.aux_channels, 0, f"aux_{taps[0]}") if taps else base.aux_channels,
    }


def tensors_in(state: Any, source: str) -> dict[str, Tensor]:
    """The state_dict inside a checkpoint, its keys without the wrappers' prefixes; no data is touched."""
    for _ in range(_DEEPEST):
        if not isinstance(state, Mapping):
            raise CheckpointError(
                f"{source}: holds a {type(state).__name__}, not a dictionary of tensors"
            )
        inner = [state[k] for k in _CONTAINERS if isinstance(state.get(k), Mapping)]
        if not inner:
            break
        state = inner[0]
    else:
        raise CheckpointError(f"{source}: nested more than {_DEEPEST} dictionaries deep")
    if not state:
        raise CheckpointError(f"{source}: holds no tensors")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            what = f"{key!r} is a {type(value).__name__}"
            raise CheckpointError(f"{source}: holds more than named tensors: {what}")
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise CheckpointError(f"{source}: {key} is not an ordinary dense tensor")
        if value.dtype not in DTYPES and not _optional(key):
            raise CheckpointError(f"{source}: {key} is of {value.dtype}, not of a floating type")
    tensors: dict[str, Tensor] = dict(state)
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in tensors)), ""):
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


def _build(fit: _Fit, tensors: Mapping[str, Tensor]) -> FastSCNN:
    """The network with copies of tensors that fit it; all in one type, the widest among them.

    Raises:
        CheckpointError: one holds what no trained network does; the message names it.
    """
    found = {ours: tensors[key] for ours, key in fit.names.items() if key in tensors}
    for ours, tensor in found.items():
        if (what := unsound(ours, tensor)) is not None:
            raise CheckpointError(f"{fit.source}: {fit.names[ours]} holds {what}")
    floats = [tensor for name, tensor in found.items() if not _optional(name)]
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in floats))
    device = floats[0].device
    with torch.device("meta"):
        model = FastSCNN.from_config(fit.config)
    state = {}
    for name, shape in shapes_of(fit.config).items():
        wanted = torch.int64 if _optional(name) else dtype
        state[name] = torch.zeros(shape, dtype=wanted, device=device)
        if name in found:
            state[name].copy_(found[name].detach())
    model.load_state_dict(state, assign=True)
    return model.eval()
