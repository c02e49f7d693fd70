"""Every switch by which the published Fast-SCNN implementations differ, and their settings as presets."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

Activation = Literal["none", "relu", "relu6"]
AuxTap = Literal["downsample", "global"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
#: An inverted residual's width after expansion, its output channels and the stride of its depthwise convolution.
Block = tuple[int, int, int]
Stages = tuple[tuple[Block, ...], ...]
#: (height, width), or the side of a square.
Size = Sequence[int] | int

#: The short way to write bottlenecks, with the paper's values (Table 1): :func:`bottlenecks`.
SHORT: dict[str, Any] = {
    "bottleneck_channels": (64, 96, 128),
    "bottleneck_repeats": (3, 3, 3),
    "expansion": 6,
}
#: The fields that say how wide and deep a network is; apart from strides, a checkpoint's tensors show them.
WIDTHS = (
    "downsample_channels",
    "bottlenecks",
    "pyramid_channels",
    "fusion_channels",
    "aux_channels",
)
#: More blocks than any network has: a config from a file may ask for any number.
MOST_BLOCKS = 64

#: The smallest height and width of the network's input: one pixel of the 1/32 features.
SMALLEST_SIDE = 32

#: The most pixels of a size that is asked for. What a network keeps of a picture takes tens of bytes a pixel, so that
#: beyond it a machine of tens of gigabytes ends the process without a word; no camera or scanner is near it, and
#: Pillow refuses files of a sixth.
MOST_PIXELS = 1 << 30


@dataclass(frozen=True)
class Config:
    """One Fast-SCNN architecture (Poudel et al., BMVC 2019, Table 1). The defaults are the ``paper`` preset.

    Sizes are channel counts unless said otherwise. ``bottlenecks`` holds the blocks of each of the three
    stages as (expanded, output, stride); :func:`preset` also takes the short way to write them, stages of
    ``bottleneck_channels`` channels, ``bottleneck_repeats`` blocks and an ``expansion``. More than 8 pooling bins run unfused. ``mean`` and
    ``std`` normalise pictures scaled to [0, 1], one value per input channel; three are RGB. ``size`` (height, width) is that
    of the whole pictures that the weights were trained on: ``segment`` runs every picture at that many
    pixels; None: at its own size.

    Raises:
        ValueError: a field breaks a rule; the message names the field, the rule and the value.
    """

    num_classes: int = 19
    in_channels: int = 3
    downsample_channels: tuple[int, int, int] = (32, 48, 64)
    bottlenecks: Stages = (
        ((384, 64, 2), (384, 64, 1), (384, 64, 1)),
        ((384, 96, 2), (576, 96, 1), (576, 96, 1)),
        ((576, 128, 1), (768, 128, 1), (768, 128, 1)),
    )
    pyramid_bins: tuple[int, ...] = (1, 2, 3, 6)
    pyramid_channels: int = 128
    fusion_channels: int = 128
    aux_channels: int = 32

    stem_padding: int = 1
    dsconv_mid_activation: Activation = "none"
    bottleneck_activation: Activation = "relu"
    pyramid_input_first: bool = True
    pyramid_kernel: int = 1
    fusion_refine: Literal["depthwise", "dense"] = "depthwise"
    fusion_dilation: int = 4
    fusion_bias: bool = False
    fusion_norm: bool = True
    align_corners: bool = False
    dropout: float = 0.1
    dropout_whole_channels: bool = False
    aux: bool = False
    aux_taps: tuple[AuxTap, ...] = ("downsample", "global")

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in _TUPLES:
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, _frozen(value))
        self._check_counts()
        self._check_switches()
        self._check_normalisation()
        self._check_size()

    def _check_counts(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            _rule(_is_count(value), name, "must be an integer of at least 1", value)
        _check_triple("downsample_channels", self.downsample_channels)
        stages = self.bottlenecks
        good = isinstance(stages, tuple) and len(stages) == 3
        good = good and all(isinstance(s, tuple) and 1 <= len(s) <= MOST_BLOCKS for s in stages)
        good = good and all(map(_is_block, (block for stage in stages for block in stage)))
        rule = (
            f"must be three stages of 1 to {MOST_BLOCKS} blocks (expanded, output, stride 1 or 2)"
        )
        _rule(good, "bottlenecks", rule, stages)
        _rule(self.in_channels <= 4, "in_channels", "must be from 1 to 4", self.in_channels)
        bins = self.pyramid_bins
        good = isinstance(bins, tuple) and len(bins) > 0 and all(map(_is_count, bins))
        _rule(good, "pyramid_bins", "must be a non-empty tuple of integers of at least 1", bins)
        last = self.stage_channels[2]
        rule = f"must divide the {last} channels of the last bottleneck by their number without remainder"
        _rule(last % len(bins) == 0, "pyramid_bins", rule, bins)

    def _check_switches(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            known = any(type(value) is type(choice) and value == choice for choice in choices)
            _rule(known, name, f"must be one of {choices}", value)
        _rule(
            self.fusion_refine == "depthwise" or self.fusion_dilation == 1,
            "fusion_dilation",
            "must be 1 where fusion_refine is 'dense' (a 1x1 convolution)",
            self.fusion_dilation,
        )
        _rule(
            self.fusion_norm or self.fusion_bias,
            "fusion_bias",
            "must be True where fusion_norm is False (nothing else shifts the sum)",
            self.fusion_bias,
        )
        good = isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1
        _rule(good, "dropout", "must be at least 0 and below 1", self.dropout)
        taps = self.aux_taps
        good = isinstance(taps, tuple) and set(taps) <= {"downsample", "global"}
        rule = "must hold 'downsample' and 'global' at most once each"
        _rule(good and len(set(taps)) == len(taps), "aux_taps", rule, taps)
        rule = "must be False where aux_taps is empty (the network has no auxiliary heads)"
        _rule(not self.aux or len(taps) > 0, "aux", rule, self.aux)

    def _check_normalisation(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            good = isinstance(value, tuple) and len(value) == self.in_channels
            good = good and all(isinstance(v, (int, float)) and math.isfinite(v) for v in value)
            rule = f"must hold one finite number per input channel ({self.in_channels})"
            _rule(good, name, rule, value)
        _rule(all(v > 0 for v in self.std), "std", "must be positive", self.std)

    def _check_size(self) -> None:
        value = self.size
        good = isinstance(value, tuple) and len(value) == 2 and all(map(_is_count, value))
        rule = f"must be None or (height, width), each at least {SMALLEST_SIDE}"
        _rule(value is None or (good and min(value) >= SMALLEST_SIDE), "size", rule, value)
        if value is not None:
            picture_size(value)

    @property
    def pyramid_branch_channels(self) -> int:
        """Channels of one pyramid branch: the paper's 128 -> 32 for four bins."""
        return self.stage_channels[2] // len(self.pyramid_bins)

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Output channels of each stage of bottlenecks: the paper's 64, 96 and 128."""
        return tuple(stage[-1][1] for stage in self.bottlenecks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that :meth:`from_dict` takes back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Config:
        """The config with these fields, the paper's values where one is missing; bottlenecks also the short way.

        Raises:
            ValueError: an unknown field, or a rule of :class:`Config` is broken.
        """
        return replace(_PAPER, **_written_out(values))


_SIZE = "must be (height, width), two integers, or the side of a square"


def picture_size(value: Any, name: str = "size") -> tuple[int, int]:
    """The (height, width) that ``value``, a size that is asked for, means: itself, or the square of that side.

    ``name`` is what the argument is called.

    Raises:
        TypeError: it is neither an integer nor a sequence of them.
        ValueError: it has other than two sides, one below 32, or more than 2^30 pixels.
    """
    sides = _sides(value, name)
    _rule(len(sides) == 2, name, _SIZE, value)
    height, width = sides
    if min(sides) < SMALLEST_SIDE:
        rule = f"{name} must be at least {SMALLEST_SIDE}x{SMALLEST_SIDE}"
        raise ValueError(f"{rule}, got {height}x{width}")
    if height * width > MOST_PIXELS:
        raise ValueError(
            f"{name} must be at most {MOST_PIXELS} pixels, got {height}x{width}, which takes {height * width} bytes"
            " for each channel of the picture alone"
        )
    return height, width


def _sides(value: Any, name: str) -> tuple[int, ...]:
    """An integer twice; the integers of a list, tuple, array or tensor."""
    try:
        if isinstance(value, (bool, bytes, bytearray, Mapping, set, frozenset)):
            raise TypeError  # though they count, or hold integers
        if hasattr(value, "__index__") and not getattr(value, "ndim", 0):
            return (operator.index(value),) * 2
        return tuple(map(operator.index, value))
    except TypeError:
        raise TypeError(f"{name} {_SIZE}, got {value!r}") from None


def amended(config: Config, **values: Any) -> Config:
    """``config`` with other values in some fields.

    Raises:
        ValueError: an unknown field, or a rule of :class:`Config` is broken.
    """
    _check_known(values, {field.name for field in fields(Config)})
    return replace(config, **values)


def _check_known(names: Iterable[str], known: set[str]) -> None:
    if unknown := sorted(set(names) - known):
        like = difflib.get_close_matches(unknown[0], sorted(known), 1, 0.7)
        raise ValueError(
            f"overrides must be fields of Config ({', '.join(sorted(known))}), got {unknown[0]!r}"
            + (f", did you mean {like[0]}?" if like else "")
        )


def bottlenecks(
    in_channels: int, channels: Sequence[int], repeats: Sequence[int], expansion: int
) -> Stages:
    """Three stages of like blocks, the first blocks of the first two with stride 2 (Poudel et al., Table 1).

    Args:
        in_channels: channels of the first block's input.
        channels: output channels of each stage.
        repeats: blocks of each stage.
        expansion: by how much a block expands its input channels.

    Raises:
        ValueError: an argument is not an integer of at least 1 or three of them; the message names it.
    """
    _check_triple("bottleneck_channels", channels)
    _check_triple("bottleneck_repeats", repeats)
    _rule(
        max(repeats) <= MOST_BLOCKS,
        "bottleneck_repeats",
        f"must be at most {MOST_BLOCKS} each",
        tuple(repeats),
    )
    _rule(_is_count(expansion), "expansion", "must be an integer of at least 1", expansion)
    stages = []
    for index, (out, blocks) in enumerate(zip(channels, repeats)):
        stride = 2 if index < 2 else 1
        first = (expansion * in_channels, out, stride)
        stages.append((first, *((expansion * out, out, 1),) * (blocks - 1)))
        in_channels = out
    return tuple(stages)


def _written_out(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` for fields of Config, bottlenecks that are written the short way in full.

    Raises:
        ValueError: an unknown field, or bottlenecks in both ways.
    """
    known = {*(field.name for field in fields(Config)), *SHORT}
    _check_known(values, known)
    full = {name: value for name, value in values.items() if name not in SHORT}
    short = {name: _frozen(value) for name, value in values.items() if name in SHORT}
    if "bottlenecks" in full:
        _rule(
            not short, "bottlenecks", f"must not be given together with {', '.join(SHORT)}", short
        )
    elif short or "downsample_channels" in full:
        before = _frozen(full.get("downsample_channels", _PAPER.downsample_channels))
        _check_triple("downsample_channels", before)
        channels, repeats, expansion = (SHORT | short).values()
        full["bottlenecks"] = bottlenecks(before[2], channels, repeats, expansion)
    return full


def _frozen(value: Any) -> Any:
    """Lists, also within lists, as tuples."""
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


_COUNTS = (
    "num_classes",
    "in_channels",
    "pyramid_channels",
    "fusion_channels",
    "aux_channels",
    "fusion_dilation",
)
_TUPLES = (
    "downsample_channels",
    "bottlenecks",
    "pyramid_bins",
    "aux_taps",
    "mean",
    "std",
    "size",
)
_CHOICES: dict[str, tuple[Any, ...]] = {
    "stem_padding": (0, 1),
    "dsconv_mid_activation": ("none", "relu", "relu6"),
    "bottleneck_activation": ("none", "relu", "relu6"),
    "pyramid_input_first": (False, True),
    "pyramid_kernel": (1, 3),
    "fusion_refine": ("depthwise", "dense"),
    "fusion_bias": (False, True),
    "fusion_norm": (False, True),
    "align_corners": (False, True),
    "dropout_whole_channels": (False, True),
    "aux": (False, True),
}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_block(value: Any) -> bool:
    good = isinstance(value, tuple) and len(value) == 3 and all(map(_is_count, value))
    return good and value[2] in (1, 2)


def _check_triple(name: str, value: Any) -> None:
    good = isinstance(value, tuple) and len(value) == 3 and all(map(_is_count, value))
    _rule(good, name, "must be three integers of at least 1", value)


def _rule(holds: bool, name: str, rule: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{name} {rule}, got {value!r}")


_PAPER = Config()
_TRAMAC = replace(
    _PAPER,
    stem_padding=0,
    dsconv_mid_activation="relu",
    fusion_dilation=1,
    fusion_bias=True,
    align_corners=True,
    aux_taps=("downsample",),
)
_MMSEG = replace(
    _PAPER,
    pyramid_kernel=3,
    fusion_dilation=1,
    dropout_whole_channels=True,
    aux_taps=("global", "downsample"),
)

#: The published implementations by name. Sources and facts: docs/dropins.md.
PRESETS: dict[str, Config] = {
    "paper": _PAPER,
    "tramac": _TRAMAC,
    "mmseg": _MMSEG,
    "mmseg_legacy": replace(
        _MMSEG,
        stem_padding=0,
        dsconv_mid_activation="relu",
        bottleneck_activation="relu6",
        pyramid_kernel=1,
        fusion_refine="dense",
        dropout_whole_channels=False,
    ),
    "segmentron": replace(
        _TRAMAC,
        bottleneck_activation="relu6",
        fusion_refine="dense",
        dropout_whole_channels=True,
        aux_taps=("downsample", "global"),
    ),
    "zacario": replace(_TRAMAC, dropout=0.0),
    "leftthomas": replace(
        _PAPER,
        pyramid_input_first=False,
        fusion_bias=True,
        fusion_norm=False,
        align_corners=True,
        aux_taps=(),
    ),
}


def preset(name: str, **overrides: Any) -> Config:
    """The preset called ``name`` with some fields replaced; bottlenecks also the short way (:data:`SHORT`).

    Grey, RGBA or other input: ``mean`` and ``std`` must then be given too unless ``in_channels`` is 3;
    left out, they become 0.5 and 0.25 for every channel.

    Raises:
        ValueError: unknown preset or field, or a rule of :class:`Config` is broken.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    channels = overrides.get("in_channels", 3)
    if channels in (1, 2, 4):
        overrides.setdefault("mean", (0.5,) * channels)
        overrides.setdefault("std", (0.25,) * channels)
    return replace(PRESETS[name], **_written_out(overrides))
