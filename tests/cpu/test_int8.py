"""int8 on the CPU: every instruction set gives the bits that program/integers.py specifies, up to the logits at 1/8."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import (
    DSCONV,
    FEATURE_FUSION,
    INVERTED_RESIDUAL,
    PYRAMID_POOLING,
    SIZES,
    STEM_CONV,
    Size,
    quarter,
)
from helpers import LAYOUTS, in_layout, noise, threads
from integers import random_integers, run_integers, with_ranges
from layouts import free_widths
from torch import Tensor

from fastscnn_fast import FastSCNN, fuse, ops
from fastscnn_fast.arch.config import PRESETS, preset
from fastscnn_fast.arch.structure import Unfusable
from fastscnn_fast.lower.fold import fold
from fastscnn_fast.lower.quantise import check_sums, quantise
from fastscnn_fast.program import integers, reference
from fastscnn_fast.program.layers import Layer
from fastscnn_fast.program.program import layer_sizes

#: All 64, 32 and 96 channels, so that blocks of 64 and what is left over of them both occur.
WIDER = [
    Layer("dsconv", "", 64, 96, stride=2),
    Layer("dsconv", "", 96, 160, dilation=4, last_channels=70),
    Layer("dsconv", "", 128, 128, last_channels=19),
    Layer("inverted_residual", "", 96, 96, 160, residual=True),
    Layer("inverted_residual", "", 64, 96, 384, stride=2),
    Layer("pyramid_pooling", "", 128, 96, 32, bins=(1, 2, 3, 6)),
    Layer("feature_fusion", "", 96, 64, 64, dilation=4),
]
#: Without an activation before its depthwise convolution an inverted residual does not quantise.
LAYERS = [
    *STEM_CONV,
    *DSCONV,
    *(layer for layer in INVERTED_RESIDUAL if layer.activation != "none"),
    *PYRAMID_POOLING,
    *FEATURE_FUSION,
    *WIDER,
]


def check(layer: Layer, inputs: tuple[Tensor, ...]) -> None:
    weights = random_integers(layer)
    y, exact = (run_integers(layer, inputs, weights, backend) for backend in ("cpu", "reference"))
    wanted = torch.float32 if layer.last_channels else torch.uint8
    assert y.dtype == exact.dtype == wanted
    assert torch.equal(y, exact), (layer, [tuple(x.shape) for x in inputs])


def pixels(batch: int, channels: int, size: Size) -> Tensor:
    return torch.randint(256, (batch, channels, *size), dtype=torch.uint8)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_ops_of_odd_sizes(layer: Layer, int8_isa: str) -> None:
    for size in SIZES:
        if layer.op == "stem_conv" and layer.padding == 0 and min(size) < 3:
            continue
        batch = 3 if size == (6, 5) else 1
        lows = {quarter(size), (3, 5), (1, 1)} if layer.op == "feature_fusion" else {()}
        for low in sorted(lows):
            print(size, low)
            sizes = (size, low) if low else (size,)
            channels = layer.input_channels
            check(layer, tuple(pixels(batch, c, s) for c, s in zip(channels, sizes)))


@pytest.mark.parametrize("name", ["paper", "mmseg", "segmentron"])
def test_real_layers(name: str, int8_isa: str) -> None:
    for step in layer_sizes(PRESETS[name], 128, 256):
        if step.layer.op != "upsample_classify":
            check(step.layer.alone, tuple(pixels(1, *_split(s)) for s in step.inputs))


def _split(shape: tuple[int, ...]) -> tuple[int, Size]:
    return shape[0], shape[1:]


@pytest.mark.parametrize("layer", STEM_CONV, ids=str)
def test_pictures_of_any_strides(layer: Layer, int8_isa: str) -> None:
    for layout in LAYOUTS:
        raw = pixels(2, layer.in_channels, (35, 50))
        floats = 2 * torch.randn(raw.shape)
        for x in (raw, floats):
            check(layer, (in_layout(x, layout),))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations_of_any_strides(layout: str, int8_isa: str) -> None:
    for layer in (DSCONV[1], INVERTED_RESIDUAL[0], PYRAMID_POOLING[0], FEATURE_FUSION[0]):
        sizes = ((34, 9), (9, 3))
        inputs = (pixels(2, c, size) for c, size in zip(layer.input_channels, sizes))
        check(layer, tuple(in_layout(x, layout) for x in inputs))


def test_pixels_of_floats(int8_isa: str) -> None:
    """NaN is 0, what lies outside of a picture is clamped, ties go to even."""
    layer = Layer("stem_conv", "", 1, 16, stride=2)
    weights = random_integers(layer)
    weights["scale"], weights["shift"] = torch.tensor([1.0]), torch.tensor([0.0])
    values = [float("nan"), float("inf"), -float("inf"), -1e30, 1e30, 0.5, 1.5, 2.5, 254.5, -0.5]
    x = torch.tensor(values).repeat(7, 3)[None, None]
    wanted = torch.tensor([0, 255, 0, 0, 255, 0, 2, 2, 254, 0], dtype=torch.uint8)
    for layout in LAYOUTS:
        y = run_integers(layer, (in_layout(x, layout),), weights, "cpu")
        pixels_of_x = in_layout(wanted.repeat(7, 3)[None, None], layout)
        exact = run_integers(layer, (pixels_of_x,), weights, "cpu")
        assert torch.equal(y, exact), layout


def test_extremes_saturate(int8_isa: str) -> None:
    """The largest sums that weights may ask for, of both signs: nothing wraps around."""
    layer = Layer("dsconv", "", 64, 96, last_channels=19)
    weights = random_integers(layer)
    for sign in (1, -1):
        for name, value in weights.items():
            if value.dtype == torch.int8:
                value.fill_(sign * 127)
                products = 255 * 127 * value[0].numel()
            elif name.endswith("bias"):
                value.fill_(sign * (2**31 - 300 - products))
            elif name.endswith("multiplier"):
                value.fill_(0.49)
        inputs = (torch.full((1, 64, 9, 11), 255, dtype=torch.uint8),)
        y, exact = (
            run_integers(layer, inputs, weights, backend) for backend in ("cpu", "reference")
        )
        assert torch.equal(y, exact)


# ---------------------------------------------------------------- networks


def lifelike(config_of: str, **fields: object) -> FastSCNN:
    """With statistics of batch norm that fit: an untrained network's values else die out."""
    model = FastSCNN.from_config(preset(config_of, num_classes=7, **fields)).train()
    with torch.no_grad():
        for _ in range(2):
            model(noise(4, model.config.in_channels, 128, 160))
    return with_ranges(model)


def low_logits(model: FastSCNN, x: Tensor, backend: str) -> Tensor:
    """The logits at 1/8, by running the layers one by one."""
    folded = fold(model)
    program = folded.program
    made: list[Tensor] = []
    for layer, weights in zip(program.layers[:-1], quantise(folded)):
        inputs = tuple(x if at < 0 else made[at] for at in layer.inputs)
        made.append(run_integers(layer.alone, inputs, weights, backend))
    return made[-1]


@pytest.mark.parametrize("name", PRESETS)
def test_networks(name: str, int8_isa: str) -> None:
    model = lifelike(name)
    fast, exact = (fuse(model, backend, torch.int8) for backend in ("cpu", "reference"))
    for x in (pixels(2, 3, (97, 131)), noise(1, 3, 64, 96)):
        logits = low_logits(model, x, "reference")
        assert torch.equal(low_logits(model, x, "cpu"), logits)
        layer, size = fold(model).layers[-1].alone, (x.shape[2], x.shape[3])
        packed = ops.pack([layer], [{}], "cpu")  # the last resize is that of float32
        results = (fast(x), fast.probabilities(x), fast.labels(x))
        for output, y in zip(ops.OUTPUTS, results):
            own = ops.upsample_classify(logits, packed, layer, size, output)
            assert torch.equal(y, own), output
        torch.testing.assert_close(results[0], exact(x), rtol=1e-5, atol=1e-5)


def test_free_widths(int8_isa: str) -> None:
    widths = free_widths(least=9, most=90)
    print(widths)
    model, x = lifelike("paper", **widths), pixels(2, 3, (97, 131))
    assert torch.equal(low_logits(model, x, "cpu"), low_logits(model, x, "reference"))


@pytest.mark.parametrize("name", ["paper", "mmseg", "segmentron"])
def test_threads_and_batches_do_not_change_a_bit(name: str, int8_isa: str) -> None:
    fast, x = fuse(lifelike(name), "cpu", torch.int8), pixels(3, 3, (65, 88))
    with threads(1):
        alone = torch.cat([fast(image[None]) for image in x])
    for count in (1, 2, 3, 4):
        with threads(count):
            for batch in (1, 2, 3):
                assert torch.equal(fast(x[:batch]), alone[:batch]), (count, batch)


# ---------------------------------------------------------------- as the other arithmetics


@pytest.fixture
def model() -> FastSCNN:
    return lifelike("paper")


@pytest.mark.parametrize("output", ops.OUTPUTS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str, output: str, model: FastSCNN) -> None:
    fast, x = fuse(model, backend, torch.int8), pixels(2, 3, (33, 49))
    arguments = (x, fast.weights, fast.program, torch.int8, output, backend)
    out = torch.empty_like(torch.ops.fastscnn.network(*arguments))
    network = torch.ops.fastscnn.network
    for op, keywords in ((network.default, {}), (network.out, {"out": out})):
        results = torch.library.opcheck(op, arguments, keywords)
        assert set(results.values()) == {"SUCCESS"}


def test_compiled_exported_and_copied(model: FastSCNN) -> None:
    fast, x = fuse(model, dtype=torch.int8), pixels(2, 3, (65, 97))
    y = fast(x)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    exported = torch.export.export(fast, (x,)).module()
    for other in (compiled, exported, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(x), y)
    torch.compiler.reset()


def test_what_is_refused(model: FastSCNN) -> None:
    fast, x = fuse(model, dtype=torch.int8), pixels(1, 3, (64, 64))
    with pytest.raises(TypeError, match=r"torch\.float32 or torch\.uint8, got torch\.int8"):
        fast(x.to(torch.int8))
    plain = copy.deepcopy(model)
    plain.ranges = None
    with pytest.raises(Unfusable, match=r"fastscnn_fast\.calibrate\(model, pictures\)"):
        fuse(plain, dtype=torch.int8)
    plain.ranges = {k: v for k, v in (model.ranges or {}).items() if k != "fusion.sum"}
    with pytest.raises(Unfusable, match=r"fusion\.sum is missing"):
        fuse(plain, dtype=torch.int8)
    plain.ranges = {**(model.ranges or {}), "stem.conv": (0.0, float("nan"))}
    with pytest.raises(Unfusable, match=r"range of stem\.conv must be two finite numbers in order"):
        fuse(plain, dtype=torch.int8)


def test_weights_that_could_overflow_are_refused() -> None:
    layer = Layer("dsconv", "", 16, 16)
    weights = random_integers(layer)
    check_sums(layer, weights)
    for name, value in (("pointwise_bias", 2**31 - 1), ("pointwise_multiplier", 1e6)):
        worse = {**weights, name: torch.full_like(weights[name], value)}
        with pytest.raises(ValueError, match="more than int8's arithmetic holds"):
            ops.pack([layer], [worse], "cpu", torch.int8)
    for name, value in (("pointwise_zero", 256), ("depthwise_zero", -1)):
        worse = {**weights, name: torch.full_like(weights[name], value)}
        with pytest.raises(ValueError, match=f"{name} of dsconv .* from 0 to 255"):
            ops.pack([layer], [worse], "cpu", torch.int8)
    denormal = {**weights, "pointwise_multiplier": weights["pointwise_multiplier"] * 0 + 1e-40}
    with pytest.raises(ValueError, match="must be 0 or at least"):
        ops.pack([layer], [denormal], "cpu", torch.int8)
    floats = {**weights, "depthwise_weight": weights["depthwise_weight"].float()}
    with pytest.raises(ValueError, match=r"must be torch\.int8, got torch\.float32"):
        ops.pack([layer], [floats], "cpu", torch.int8)


# ---------------------------------------------------------------- the specification itself


def test_resizing_is_torchs_up_to_half_a_step() -> None:
    for size, result in (
        ((5, 7), (17, 30)),
        ((4, 8), (16, 32)),
        ((9, 40), (4, 9)),
        ((1, 1), (3, 2)),
    ):
        x = pixels(2, 3, size)
        for align in (False, True):
            exact = reference._resize(x.double(), result, align)
            assert (integers.resize(x, result, align).double() - exact).abs().max() < 0.52


def test_means_are_torchs_up_to_half_a_step() -> None:
    x = pixels(2, 3, (13, 22))
    for bins in (1, 2, 3, 6):
        exact = torch.nn.functional.adaptive_avg_pool2d(x.double(), bins)
        assert (integers.pool(x, bins).double() - exact).abs().max() <= 0.5 + 1e-4


def test_quantised_networks_are_close_to_what_they_come_from(model: FastSCNN) -> None:
    x = noise(2, 3, 97, 131)
    with torch.no_grad():
        exact = model.reference(x)
    spread = (exact - exact.mean((0, 2, 3), keepdim=True)).norm()
    y = fuse(model, "reference", torch.int8)(x)
    assert (y - exact).norm() / spread < 0.5
