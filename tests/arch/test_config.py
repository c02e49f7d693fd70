from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from fastscnn_fast.arch.config import PRESETS, Config, preset

RULES = [
    ({"num_classes": 0}, "num_classes must be an integer of at least 1, got 0"),
    ({"num_classes": True}, "num_classes must be an integer of at least 1, got True"),
    ({"num_classes": 19.0}, "num_classes must be an integer of at least 1, got 19.0"),
    ({"in_channels": 5}, "in_channels must be from 1 to 4, got 5"),
    ({"in_channels": 10**9}, "in_channels must be from 1 to 4, got 1000000000"),
    ({"in_channels": 0}, "in_channels must be an integer of at least 1, got 0"),
    ({"pyramid_channels": 0}, "pyramid_channels must be an integer of at least 1, got 0"),
    ({"fusion_channels": "128"}, "fusion_channels must be an integer of at least 1, got '128'"),
    ({"aux_channels": 0}, "aux_channels must be an integer of at least 1, got 0"),
    ({"fusion_dilation": 0}, "fusion_dilation must be an integer of at least 1, got 0"),
    (
        {"downsample_channels": (32, 48)},
        "downsample_channels must be three integers of at least 1, got (32, 48)",
    ),
    (
        {"bottlenecks": (((384, 64, 2),), ((384, 96, 3),), ((576, 128, 1),))},
        "bottlenecks must be three stages of 1 to 64 blocks (expanded, output, stride 1 or 2), "
        "got (((384, 64, 2),), ((384, 96, 3),), ((576, 128, 1),))",
    ),
    (
        {"bottlenecks": (((384, 64, 2),), ((384, 96, 2),))},
        "bottlenecks must be three stages of 1 to 64 blocks (expanded, output, stride 1 or 2), "
        "got (((384, 64, 2),), ((384, 96, 2),))",
    ),
    (
        {"pyramid_bins": ()},
        "pyramid_bins must be a non-empty tuple of integers of at least 1, got ()",
    ),
    (
        {"pyramid_bins": (0, 1)},
        "pyramid_bins must be a non-empty tuple of integers of at least 1, got (0, 1)",
    ),
    (
        {"pyramid_bins": (1, 2, 3)},
        "pyramid_bins must divide the 128 channels of the last bottleneck by their number without remainder, "
        "got (1, 2, 3)",
    ),
    ({"stem_padding": 2}, "stem_padding must be one of (0, 1), got 2"),
    ({"stem_padding": True}, "stem_padding must be one of (0, 1), got True"),
    (
        {"dsconv_mid_activation": "gelu"},
        "dsconv_mid_activation must be one of ('none', 'relu', 'relu6'), got 'gelu'",
    ),
    (
        {"bottleneck_activation": None},
        "bottleneck_activation must be one of ('none', 'relu', 'relu6'), got None",
    ),
    ({"pyramid_input_first": 1}, "pyramid_input_first must be one of (False, True), got 1"),
    ({"pyramid_kernel": 5}, "pyramid_kernel must be one of (1, 3), got 5"),
    ({"fusion_refine": "full"}, "fusion_refine must be one of ('depthwise', 'dense'), got 'full'"),
    (
        {"fusion_refine": "dense"},
        "fusion_dilation must be 1 where fusion_refine is 'dense' (a 1x1 convolution), got 4",
    ),
    (
        {"fusion_norm": False},
        "fusion_bias must be True where fusion_norm is False (nothing else shifts the sum), "
        "got False",
    ),
    ({"fusion_bias": 1}, "fusion_bias must be one of (False, True), got 1"),
    ({"fusion_norm": 0}, "fusion_norm must be one of (False, True), got 0"),
    ({"align_corners": None}, "align_corners must be one of (False, True), got None"),
    (
        {"dropout_whole_channels": "yes"},
        "dropout_whole_channels must be one of (False, True), got 'yes'",
    ),
    ({"dropout": 1}, "dropout must be at least 0 and below 1, got 1"),
    ({"dropout": -0.1}, "dropout must be at least 0 and below 1, got -0.1"),
    ({"dropout": float("nan")}, "dropout must be at least 0 and below 1, got nan"),
    ({"aux": 1}, "aux must be one of (False, True), got 1"),
    (
        {"aux": True, "aux_taps": ()},
        "aux must be False where aux_taps is empty (the network has no auxiliary heads), got True",
    ),
    (
        {"aux_taps": ("global", "global")},
        "aux_taps must hold 'downsample' and 'global' at most once each, got ('global', 'global')",
    ),
    (
        {"aux_taps": ("stem",)},
        "aux_taps must hold 'downsample' and 'global' at most once each, got ('stem',)",
    ),
    (
        {"mean": (0.5,)},
        "mean must hold one finite number per input channel (3), got (0.5,)",
    ),
    (
        {"std": (1.0, 1.0, float("inf"))},
        "std must hold one finite number per input channel (3), got (1.0, 1.0, inf)",
    ),
    ({"std": (1.0, 0.0, 1.0)}, "std must be positive, got (1.0, 0.0, 1.0)"),
    (
        {"size": (720, 31)},
        "size must be None or (height, width), each at least 32, got (720, 31)",
    ),
    (
        {"size": (10**6, 10**6)},
        "size must be at most 1073741824 pixels, got 1000000x1000000, which takes 1000000000000 bytes for each channel of the picture alone",
    ),
    ({"size": 720}, "size must be None or (height, width), each at least 32, got 720"),
]


@pytest.mark.parametrize(("values", "message"), RULES, ids=lambda v: str(v)[:40])
def test_each_broken_rule_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        preset("paper", **values)
    assert str(caught.value) == message


def test_every_field_has_a_rule() -> None:
    checked = {name for values, _ in RULES for name in values}
    assert checked == {field.name for field in fields(Config)}


def test_presets_differ_as_published() -> None:
    """The README's table of presets, row by row."""

    def column(name: str) -> list[Any]:
        return [getattr(PRESETS[p], name) for p in PRESETS]

    assert list(PRESETS) == [
        *("paper", "tramac", "mmseg", "mmseg_legacy", "segmentron", "zacario", "leftthomas")
    ]
    assert column("stem_padding") == [1, 0, 1, 0, 0, 0, 1]
    assert column("dsconv_mid_activation") == [
        *("none", "relu", "none", "relu", "relu", "relu", "none")
    ]
    assert column("bottleneck_activation") == [
        *("relu", "relu", "relu", "relu6", "relu6", "relu", "relu")
    ]
    assert column("pyramid_input_first") == [True] * 6 + [False]
    assert column("pyramid_kernel") == [1, 1, 3, 1, 1, 1, 1]
    dense = [refine == "dense" for refine in column("fusion_refine")]
    assert dense == [False, False, False, True, True, False, False]
    assert column("fusion_dilation") == [4, 1, 1, 1, 1, 1, 4]
    assert column("fusion_bias") == [False, True, False, False, True, True, True]
    assert column("fusion_norm") == [True] * 6 + [False]
    assert column("align_corners") == [False, True, False, False, True, True, True]
    assert column("dropout") == [0.1, 0.1, 0.1, 0.1, 0.1, 0.0, 0.1]
    assert [len(taps) for taps in column("aux_taps")] == [2, 1, 2, 2, 2, 1, 0]
    for same in ("pyramid_bins", "bottlenecks", "num_classes", "mean", "std"):
        assert len(set(column(same))) == 1


def test_preset_replaces_fields() -> None:
    assert preset("paper") == Config()
    assert preset("tramac", num_classes=3).num_classes == 3
    assert preset("tramac", num_classes=3).stem_padding == 0
    with pytest.raises(ValueError, match=r"preset must be one of paper, tramac, .*, got 'papier'"):
        preset("papier")
    with pytest.raises(ValueError, match=r"overrides must be fields of Config .*, got 'colour'"):
        preset("paper", colour=1)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_input_channels_get_a_mean_of_their_own(channels: int) -> None:
    config = preset("paper", in_channels=channels)
    assert config.mean == (0.5,) * channels
    assert config.std == (0.25,) * channels
    mean = (0.1,) * channels
    assert preset("paper", in_channels=channels, mean=mean).mean == mean


SHORT_RULES = [
    ({"expansion": -1}, "expansion must be an integer of at least 1, got -1"),
    (
        {"bottleneck_channels": (64, 96, 0)},
        "bottleneck_channels must be three integers of at least 1, got (64, 96, 0)",
    ),
    ({"bottleneck_repeats": 3}, "bottleneck_repeats must be three integers of at least 1, got 3"),
    (
        {"bottleneck_repeats": [10**9, 2, 1]},
        "bottleneck_repeats must be at most 64 each, got (1000000000, 2, 1)",
    ),
    (
        {"expansion": 2, "bottlenecks": Config().bottlenecks},
        "bottlenecks must not be given together with bottleneck_channels, bottleneck_repeats, expansion, "
        "got {'expansion': 2}",
    ),
]


@pytest.mark.parametrize(("values", "message"), SHORT_RULES)
def test_rules_of_the_short_way_to_write_bottlenecks(values: dict[str, Any], message: str) -> None:
    for make in (lambda: preset("tramac", **values), lambda: Config.from_dict(values)):
        with pytest.raises(ValueError) as error:
            make()
        assert str(error.value) == message


def test_the_short_way_to_write_bottlenecks() -> None:
    short = {"bottleneck_channels": [64, 96, 128], "bottleneck_repeats": [3, 3, 3], "expansion": 6}
    assert Config.from_dict(short) == Config() == preset("paper", **short)
    narrow = preset("paper", downsample_channels=(8, 12, 20), bottleneck_repeats=(1, 2, 1))
    assert narrow.bottlenecks == (
        ((120, 64, 2),),
        ((384, 96, 2), (576, 96, 1)),
        ((576, 128, 1),),
    )
    assert narrow.stage_channels == (64, 96, 128)
    free = (((33, 7, 1),), ((5, 16, 2), (90, 16, 1)), ((64, 24, 2),))
    assert preset("paper", downsample_channels=(8, 12, 20), bottlenecks=free).bottlenecks == free


def test_config_is_a_value() -> None:
    config = preset("mmseg", aux=True, pyramid_bins=[1, 2])
    assert config.pyramid_bins == (1, 2)
    assert config.pyramid_branch_channels == 64
    assert Config.from_dict(config.to_dict()) == config
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(Config.from_dict(config.to_dict()))
    with pytest.raises(FrozenInstanceError):
        config.aux = False  # type: ignore[misc]
