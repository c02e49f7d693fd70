"""The plan against the network itself: shapes by forward hooks, operations by torch's own counter."""

from __future__ import annotations

import re
from math import prod
from typing import Any

import pytest
import torch
from helpers import ROOT
from hypothesis import given, strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastscnn_fast.arch.config import PRESETS, Config, preset
from fastscnn_fast.program.arithmetic import ARITHMETICS
from fastscnn_fast.program.layers import ACTIVATIONS, OPS, Layer, SizedLayer
from fastscnn_fast.program.program import fast_scnn, layer_sizes
from fastscnn_fast.runtime.model import FastSCNN

# Remainders of every kind through five halvings, with and without padding in the first convolution.
SIZES = ((32, 32), (33, 49), (97, 131), (375, 1242))
CONFIGS = {
    **PRESETS,
    "narrow": preset(
        "paper",
        num_classes=2,
        in_channels=1,
        downsample_channels=(8, 12, 20),
        bottleneck_channels=(24, 24, 33),
        bottleneck_repeats=(1, 2, 4),
        expansion=3,
        pyramid_bins=(1, 4, 5),
        pyramid_channels=40,
        fusion_channels=56,
    ),
}


def modules(model: FastSCNN) -> dict[str, nn.Module]:
    """The module that ends each layer of the plan, by the layer's name."""
    downsample, features = model.learning_to_downsample, model.global_features
    named: dict[str, nn.Module] = {
        "stem": downsample.stem,
        "downsample.dsconv1": downsample.dsconv1,
        "downsample.dsconv2": downsample.dsconv2,
        "pyramid": features.pyramid,
        "fusion": model.feature_fusion,
        "classifier.dsconv1": model.classifier.dsconv1,
        "classifier.dsconv2": model.classifier.conv,
    }
    for index in (1, 2, 3):
        stage = getattr(features, f"bottleneck{index}")
        named |= {f"bottleneck{index}.{i}": block for i, block in enumerate(stage)}
    return named


def shapes_of(config: Config, height: int, width: int) -> dict[str, tuple[int, ...]]:
    """The (C, H, W) that each layer really makes; on the meta device, where nothing is computed."""
    shapes = {}
    with torch.device("meta"):
        model = FastSCNN.from_config(config).eval()
        x = torch.empty(1, config.in_channels, height, width)

    def hook(name: str) -> Any:
        def take(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            shapes[name] = tuple(output.shape[1:])

        return take

    for name, module in modules(model).items():
        module.register_forward_hook(hook(name))
    shapes["upsample"] = tuple(model.reference(x).shape[1:])
    return shapes


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", CONFIGS)
def test_shapes(name: str, size: tuple[int, int]) -> None:
    steps = layer_sizes(CONFIGS[name], *size)
    made = {step.layer.name: step.output for step in steps}
    assert made == shapes_of(CONFIGS[name], *size)
    assert [step.layer for step in steps] == list(fast_scnn(CONFIGS[name]).layers)
    x: tuple[int, ...] = (CONFIGS[name].in_channels, *size)
    for (
        step
    ) in steps:  # each layer takes what the one before it made, the fusion the 1/8 features too
        high = made["downsample.dsconv2"]
        assert step.inputs == ((high, x) if step.layer.op == "feature_fusion" else (x,))
        x = step.output


def test_names_and_weights() -> None:
    for config in CONFIGS.values():
        names = [layer.name for layer in fast_scnn(config).layers]
        assert len(set(names)) == len(names)
        assert all(
            min(shape) > 0
            for layer in fast_scnn(config).layers
            for shape in layer.weights().values()
        )


def test_too_small() -> None:
    assert layer_sizes(PRESETS["paper"], 1, 1)[-1].output == (19, 1, 1)
    assert layer_sizes(PRESETS["tramac"], 3, 3)[-1].output == (19, 3, 3)
    with pytest.raises(ValueError, match="height and width must be at least 3, got 3x2"):
        layer_sizes(PRESETS["tramac"], 3, 2)
    with pytest.raises(ValueError, match="height and width must be at least 1, got 0x5"):
        layer_sizes(PRESETS["paper"], 0, 5)


COUNTS = st.integers(1, 300)
LAYERS = st.builds(
    Layer,
    op=st.sampled_from(OPS),
    name=st.just(""),
    in_channels=COUNTS,
    out_channels=COUNTS,
    mid_channels=st.integers(0, 900),
    last_channels=st.integers(0, 300),
    stride=st.integers(1, 2),
    dilation=COUNTS,
    padding=st.integers(0, 1),
    kernel=st.sampled_from([1, 3]),
    activation=st.sampled_from(ACTIVATIONS),
    mid_activation=st.sampled_from(ACTIVATIONS),
    residual=st.booleans(),
    dense=st.booleans(),
    align_corners=st.booleans(),
    bins=st.lists(COUNTS, max_size=8).map(tuple),
)


@given(st.lists(LAYERS))
def test_encoding_round_trip(layers: list[Layer]) -> None:
    encoded = [value for layer in layers for value in layer.encode()]
    assert Layer.decode(encoded) == layers
    assert len({layer.encode() for layer in layers}) == len(set(layers))


@pytest.mark.parametrize(
    ("at", "value"), [(0, 13), (0, 2**40), (1, len(OPS)), (2, -1), (10, 3), (11, 3)]
)
def test_wrong_encodings_are_refused(at: int, value: int) -> None:
    encoded = list(Layer("dsconv", "", 16, 16).encode())
    encoded[at] = value
    with pytest.raises(ValueError, match="layers must be as encode"):
        Layer.decode(encoded)


# ---------------------------------------------------------------- operations and bytes


def counted_flops(config: Config, height: int, width: int) -> dict[str, int]:
    """Operations of the convolutions in each layer of the unfused network, as torch counts them."""
    with torch.device("meta"):
        model = FastSCNN.from_config(config).eval()
        x = torch.empty(1, config.in_channels, height, width)
    layers = {**modules(model), "last": model.classifier.conv}
    layers["classifier.dsconv2"] = model.classifier.dsconv2
    inputs: dict[nn.Module, tuple[Tensor, ...]] = {}
    for module in layers.values():
        module.register_forward_pre_hook(lambda module, x: inputs.setdefault(module, x) and None)
    model.reference(x)
    counts = {}
    for name, module in layers.items():
        with FlopCounterMode(display=False) as counter:
            module(*inputs[module])
        counts[name] = counter.get_total_flops()
    counts["classifier.dsconv2"] += counts.pop("last")
    return counts


def expected_difference(step: SizedLayer) -> int:
    """What the fused algorithm computes on top of the plain convolutions, less what it saves."""
    layer, pixels = step.layer, prod(step.output[1:])
    c, o, m = layer.in_channels, layer.out_channels, layer.mid_channels
    macs = 0
    if layer.op == "pyramid_pooling":
        cells, branches = sum(bins * bins for bins in layer.bins), len(layer.bins)
        macs += branches * pixels * c  # pooling
        macs += branches * pixels * 3 * (o if layer.kernel == 1 else m)  # interpolation
        if layer.kernel == 1:  # out's share of each branch, on the grid instead of every pixel
            macs += cells * m * o - branches * pixels * m * o
    if layer.op == "feature_fusion":
        macs += 3 * pixels * c  # interpolation
        if layer.dense:  # on the low branch's grid instead of every pixel
            macs += (prod(step.inputs[1][1:]) - pixels) * c * c
    return 2 * macs


@pytest.mark.parametrize("name", CONFIGS)
def test_flops(name: str) -> None:
    counts = counted_flops(CONFIGS[name], 97, 131)
    for step in layer_sizes(CONFIGS[name], 97, 131):
        plain = counts.get(step.layer.name, 0)
        assert step.plain_flops == plain, step.layer.name
        if step.layer.op != "upsample_classify":
            assert step.flops == plain + expected_difference(step), step.layer.name


@pytest.mark.parametrize("name", CONFIGS)
def test_elements(name: str) -> None:
    """All weights of the plan are the network's parameters, batch norm folded to one bias per channel."""
    config = CONFIGS[name]
    steps = layer_sizes(config, 33, 49)
    weights = sum(step.elements - prod(step.output) - sum(map(prod, step.inputs)) for step in steps)
    with torch.device("meta"):
        model = FastSCNN.from_config(config)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    wanted = sum(m.weight.numel() + m.out_channels for m in convolutions)
    wanted += 2 * config.in_channels  # mean and std
    wanted -= config.fusion_channels  # the fusion's two projections share a bias
    assert weights == wanted


def test_work_says_the_measured_time_of_stages() -> None:
    """Of the CPU's recorded ones in each arithmetic, but for a factor that is the arithmetic's own; the pyramid, of a
    hundredth of the time, aside."""
    stages: dict[str, list[SizedLayer]] = {}
    for layer in layer_sizes(preset("paper", num_classes=11), 512, 1024):
        stages.setdefault(stage_of(layer.layer.name), []).append(layer)
    text = (ROOT / "benchmarks" / "results" / "zen5" / "bench_model.md").read_text()
    row = re.compile(
        r"^\| 512x1024 \| 2 +\| (\w+) +\| (\w+) +\| \d+ +\| [\d.]+ +\| ([\d.]+) ", re.M
    )
    measured: dict[str, dict[str, float]] = {}
    for arithmetic, stage, ms in row.findall(text):
        measured.setdefault(arithmetic, {})[stage] = float(ms)
    assert set(measured) == {"float32", "bfloat16", "int8"}
    for arithmetic, times in measured.items():
        channels = ARITHMETICS[arithmetic].channels
        ratios = [
            ms / sum(layer.work(channels) for layer in stages[stage])
            for stage, ms in times.items()
            if stage not in ("all", "pyramid")
        ]
        assert len(ratios) == 11 and max(ratios) < 1.5 * min(ratios), arithmetic


def stage_of(name: str) -> str:
    """What a layer's time is measured as a part of."""
    part, _, block = name.partition(".")
    if part.startswith("bottleneck"):
        return f"block{3 * (int(part[-1]) - 1) + int(block)}"
    return {"stem": "downsample", "fusion": "classifier", "upsample": "classifier"}.get(part, part)
