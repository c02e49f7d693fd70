"""From the tensors of any known implementation to the network that they belong to."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..arch.config import (
    MOST_BLOCKS,
    PRESETS,
    SHORT,
    Block,
    Config,
    amended,
    preset as config_preset,
)
from ..arch.network import PlainFastSCNN
from ..arch.structure import changed, unsound
from ..backends import registry
from ..runtime.model import FastSCNN
from .layouts import LAYOUTS, OURS, Layout, Shapes, names_in, shapes_of, tensors_of
from .wrappers import CheckpointError, Place, places

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
#: What every batch norm of a network that is built adds to variances.
_EPS = nn.BatchNorm2d(1).eps
#: Fields of a config that may be asked for though a file has others: :func:`_refitted`.
_REFITTED = ("num_classes", "in_channels", "mean", "std")


def from_state_dict(
    state: Any, preset: str | None = None, source: str = "state_dict", **overrides: Any
) -> FastSCNN:
    """A FastSCNN in eval mode with a copy of the weights in ``state``, whatever its layout and wrapping.

    Of several networks in ``state`` an average of weights (``ema``, ``swa``) is taken, else the one with the
    most usual name; which, and what else is ignored beside it, is logged.

    Args:
        state: a state_dict of any known layout, or a checkpoint that contains one.
        preset: for what shapes do not tell; by default the layout's own, and for our own layout the
            one published implementation that has these shapes.
        source: how errors name ``state``.
        overrides: fields of :class:`Config` that differ from the preset (``mean``, ``std``, ...). Widths are
            those of the tensors; ``bottlenecks`` need be given only for strides other than the paper's.
            ``num_classes`` and ``in_channels`` other than those of the tensors make a new last, or adapt the
            first convolution, as :func:`load_checkpoint` says.

    Raises:
        CheckpointError: no known network, with the closest layout and what differs; two that nothing tells
            apart; or a tensor, which is named, holds NaN, infinity or a negative variance.
        ValueError: an unknown preset or field.
    """
    return recognise(places(state, source), preset, source, **overrides).model()


def recognise(likely: list[Place], preset: str | None, source: str, **overrides: Any) -> Found:
    """The network in one of some places, before any of its data is touched; raises as :func:`from_state_dict`."""
    asked = {name: overrides.pop(name) for name in _REFITTED if name in overrides}
    judged = [_judged(place, source, preset, overrides) for place in likely]
    networks = _networks(judged)
    if not networks:
        first = judged[0]
        raise first if isinstance(first, CheckpointError) else first.error()
    networks.sort(key=lambda found: found.place.preference)
    taken = networks[0]
    taken.asked = asked
    _tell_of_others(taken, networks[1:], judged, source)
    return taken


def recognise_own(place: Place, config: Config, source: str, **overrides: Any) -> Found:
    """The network of ``config``, which a file of ours states, with the weights in ``place``.

    Raises:
        CheckpointError: the tensors are not those of ``config``; the message names what differs.
    """
    asked = {name: overrides.pop(name) for name in _REFITTED if name in overrides}
    config = config_of(source, amended, config, **overrides)
    shapes = _shapes_in(place, source)
    for name, value in _derive(shapes, OURS, config).items():
        stated = getattr(config, name)
        if value != stated:
            raise CheckpointError(
                f"{source}: {name} is {stated!r} by its config, {value!r} by its tensors"
            )
    found = Found(source, config, OURS, shapes, place, asked)
    if found.problems:
        raise CheckpointError(f"{source}: its tensors do not belong to its config: {found}")
    _tell_of_others(found, (), (), source)
    return found


def tensors_in(likely: list[Place], source: str) -> dict[str, Tensor]:
    """The tensors of the network in one of some places; of no network, all of the likeliest place."""
    if _networks([_judged(place, source, None, {}) for place in likely]):
        return recognise(likely, None, source).place.values
    _shapes_in(likely[0], source)
    return likely[0].values


def _networks(judged: Sequence[Found | CheckpointError]) -> list[Found]:
    return [found for found in judged if isinstance(found, Found) and not found.problems]


def _judged(
    place: Place, source: str, preset: str | None, overrides: dict[str, Any]
) -> Found | CheckpointError:
    """The preset that fits a place best, or why none can be told."""
    layout = LAYOUTS[place.layout]
    if preset is not None:
        candidates = [preset]
    elif layout is OURS:
        candidates = list(PRESETS)
    else:
        candidates = [name for name in PRESETS if LAYOUTS.get(name) is layout]
    try:
        shapes = _shapes_in(place, source)
        fits = [_fit(place, source, shapes, name, overrides) for name in candidates]
    except CheckpointError as error:
        return error
    return min(fits, key=lambda found: found.problems)


def _fit(place: Place, source: str, shapes: Shapes, name: str, overrides: dict[str, Any]) -> Found:
    layout, base = LAYOUTS[place.layout], config_preset(name)
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
            f"{source}: layout {place.layout!r} has no {absent[0]!r} auxiliary head"
        )
    return Found(source, config, layout, shapes, place, preset=name)


def _shapes_in(place: Place, source: str) -> Shapes:
    """The shapes of what must be ordinary tensors of a floating type, but for batch norm's counters."""
    for key, value in place.values.items():
        if not isinstance(value, Tensor):
            what = f"{key!r} is a {type(value).__name__}"
            raise CheckpointError(f"{source}: holds more than named tensors: {what}")
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise CheckpointError(f"{source}: {key} is not an ordinary dense tensor")
        if value.dtype not in DTYPES and not _optional(key):
            raise CheckpointError(f"{source}: {key} is of {value.dtype}, not of a floating type")
    return {key: tuple(tensor.shape) for key, tensor in place.values.items()}


def _tell_of_others(
    taken: Found, others: Sequence[Found], judged: Sequence[Found | CheckpointError], source: str
) -> None:
    """Logs what is in a checkpoint besides the network that was taken.

    Raises:
        CheckpointError: another network may as well be meant.
    """
    place = taken.place
    others = [found for found in others if not _same_memory(place, found.place)]
    for other in others:
        if other.place.preference == place.preference:
            raise CheckpointError(
                f"{source}: holds more than one network, in {place.name} and in {other.place.name}, and nothing"
                " tells which is meant; give from_state_dict the tensors of one of them"
            )
    if others:
        names = ", ".join(found.place.name for found in others)
        what = ", an average of weights," if place.averaged else ""
        registry.log_once(
            f"{source}: holds networks in {place.name}, {names}: {place.name}{what} is taken;"
            " from_state_dict takes the tensors of another"
        )
    for found in judged:
        if isinstance(found, Found) and found.problems and found.place.path != place.path:
            registry.log_once(
                f"{source}: {found.place.name} is no whole network, and ignored: {found}"
            )
    inner = [o.place.prefix for o in others if o.place.path == place.path]
    strays = [k for k in place.beside if not any(_lies_in(k, prefix) for prefix in inner)]
    if strays:
        more = f" and {len(strays) - 3} more" if len(strays) > 3 else ""
        registry.log_once(
            f"{source}: ignored, as not of the network: {', '.join(strays[:3])}{more}"
        )


def _lies_in(key: str, prefix: tuple[str, ...]) -> bool:
    return f".{'.'.join(prefix)}." in f".{key}"


def _same_memory(a: Place, b: Place) -> bool:
    """Whether two places hold the very same tensors, as one network under two names does."""
    first, second = (
        {k: (v.data_ptr(), v.shape, v.stride()) for k, v in place.values.items()}
        for place in (a, b)
    )
    return first == second


def config_of(source: str, make: Any, *args: Any, **values: Any) -> Config:
    """``make(*args, **values)``, whose complaints become a :class:`CheckpointError` that names ``source``."""
    try:
        config: Config = make(*args, **values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from None
    return config


class Found:
    """The network that a place in a checkpoint has been taken for, and how far keys and shapes are from it.

    Attributes:
        config: what the place's tensors are.
        place: where they are.
        asked: fields of the config that are wanted other than they are.
    """

    def __init__(
        self,
        source: str,
        config: Config,
        layout: Layout,
        shapes: Shapes,
        place: Place,
        asked: Mapping[str, Any] | None = None,
        preset: str | None = None,
    ) -> None:
        self.source, self.config, self.place, self.preset = source, config, place, preset
        self.asked = dict(asked or {})
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
            "unexpected": [*self.unexpected, *self.place.beside],
            "of another shape": self.misshaped,
        }
        return "; ".join(
            f"{len(found)} {kind} (first: {found[0]})" for kind, found in kinds.items() if found
        )

    def error(self) -> CheckpointError:
        which = f"layout {self.place.layout!r}"
        if self.preset != self.place.layout:
            which += f", preset {self.preset!r}"
        return CheckpointError(f"{self.source}: no known Fast-SCNN; closest is {which}: {self}")

    def model(self) -> FastSCNN:
        """The network in eval mode, with copies of the tensors, all in one type, the widest among them.

        Raises:
            CheckpointError: a tensor holds what no trained network does, and is named; or what was asked for
                breaks a rule of :class:`Config`.
        """
        tensors = self.place.values
        found = {ours: tensors[key] for ours, key in self.names.items() if key in tensors}
        for ours, tensor in found.items():
            if (what := unsound(ours, tensor)) is not None:
                raise CheckpointError(f"{self.source}: {self.names[ours]} holds {what}")
        floats = [tensor for name, tensor in found.items() if not _optional(name)]
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in floats))
        device = floats[0].device
        with torch.device("meta"):
            model = FastSCNN.from_config(self.config)
        state = {}
        for name, shape in shapes_of(self.config).items():
            wanted = torch.int64 if _optional(name) else dtype
            state[name] = torch.zeros(shape, dtype=wanted, device=device)
            if name in found:
                state[name].copy_(found[name].detach())
        model.load_state_dict(state, assign=True)
        return _refitted(model, self.source, self.asked).eval()


def _optional(key: str) -> bool:
    return key.endswith("num_batches_tracked")


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


def _refitted(model: FastSCNN, source: str, asked: Mapping[str, Any]) -> FastSCNN:
    """``model`` with other classes, input channels or normalisation, where they are asked for.

    The last convolutions of other classes start at random. The first one of other channels is adapted as
    timm does: the sum over the channels for one; else the channels in turn, scaled so that the sum of all
    stays what it was; ``mean`` and ``std`` follow.
    """
    before = model.config
    values = dict(asked)
    channels = values.get("in_channels", before.in_channels)
    if channels != before.in_channels and channels in range(1, 5):
        values = _normalisation(before, channels) | values
    config = config_of(source, replace, before, **values)
    if (config.num_classes, channels) == (before.num_classes, before.in_channels):
        model.config = config
        return model
    new = FastSCNN.from_config(config)
    weight = model.learning_to_downsample.stem.conv.weight
    new.to(weight.device, weight.dtype)
    state = new.state_dict()
    kept = {k: v for k, v in model.state_dict().items() if v.shape == state[k].shape}
    if channels != before.in_channels:
        stem = "learning_to_downsample.stem.conv.weight"
        kept[stem] = _adapted(weight.detach(), channels)
        registry.logger.warning(
            "%s: has %d input channels: its first convolution is adapted to %d, with mean %s and std %s",
            *(source, before.in_channels, channels),
            *(tuple(round(v, 4) for v in values) for values in (config.mean, config.std)),
        )
    if config.num_classes != before.num_classes:
        heads = ", ".join(
            k.removesuffix(".weight") for k in state if k not in kept and "bias" not in k
        )
        registry.logger.warning(
            "%s: has %d classes: %s of %d starts at random, to be trained",
            *(source, before.num_classes, heads, config.num_classes),
        )
    new.load_state_dict(state | kept)
    return new


def _normalisation(config: Config, channels: int) -> dict[str, Any]:
    """``mean`` and ``std`` of ``config`` for another number of input channels."""
    return {name: _in_turn(getattr(config, name), channels) for name in ("mean", "std")}


def _in_turn(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One of ``values`` for each channel, in turn; their mean for a single one."""
    if channels == 1:
        return (sum(values) / len(values),)
    return tuple(values[k % len(values)] for k in range(channels))


def _adapted(weight: Tensor, channels: int) -> Tensor:
    """The weight (O, C, 3, 3) of a convolution for another number of input channels."""
    if channels == 1:
        return weight.float().sum(1, keepdim=True).to(weight.dtype)
    turns = torch.arange(channels, device=weight.device) % weight.shape[1]
    return (weight.float()[:, turns] * (weight.shape[1] / channels)).to(weight.dtype)


def config_followed(model: PlainFastSCNN) -> Config:
    """The config that describes ``model`` as it is now: its own, or, where its head, first convolution or
    widths were replaced since, that with the numbers of the tensors; mean and std follow the input channels, with
    a warning.

    Raises:
        ValueError: it is no longer a network that a config describes; the message names what was replaced.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
    derived = _derive(shapes, OURS, model.config)
    if derived["pyramid_bins"] is None:
        del derived["pyramid_bins"]
    channels = derived["in_channels"]
    if channels != model.config.in_channels and channels in range(1, 5):
        derived |= _normalisation(model.config, channels)
        registry.logger.warning(
            "model has %d input channels now, %d by its config: mean %s and std %s go with them; set model.config for"
            " others",
            *(channels, model.config.in_channels),
            *(tuple(round(v, 4) for v in derived[name]) for name in ("mean", "std")),
        )
    rule = "model must be a network that a file can describe"
    try:
        config = replace(model.config, **derived)
    except ValueError as error:
        raise ValueError(f"{rule}: {error}") from None
    found = Found("model", config, OURS, shapes, Place("fastscnn_fast", 0, (), (), {}))
    if found.problems:
        raise ValueError(f"{rule}: by its config there are {found}")
    if (name := changed(model, config)) is not None:
        raise ValueError(f"{rule}: submodule {name} was replaced or changed")
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.eps != _EPS:
            raise ValueError(f"{rule}: submodule {name} must have eps {_EPS}, got {module.eps}")
    return config
