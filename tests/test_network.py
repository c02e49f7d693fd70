"""The whole fused network against the module in float64, and against its own ops bit by bit.

No network here is trained: logits are standardised per class (helpers.lifelike), so that every class wins
somewhere. Such a network amplifies rounding: torch's own float32 result errs by up to 1.5e-5. Parity is
therefore 1e-5 or twice torch's own error, whichever is larger; that the network is, bit for bit, the chain
of its ops (which test_ops.py holds to 1e-6) leaves no room behind that bound.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    LAYOUTS,
    assert_labels,
    assert_parity,
    in_layout,
    lifelike,
    noise,
    random_weights,
    run_poisoned,
    threads,
)
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import Tensor

from fastscnn_fast import backends, ops
from fastscnn_fast.config import PRESETS, Config
from fastscnn_fast.data import street
from fastscnn_fast.fold import fold
from fastscnn_fast.fused import FusedFastSCNN, fuse
from fastscnn_fast.model import FastSCNN
from fastscnn_fast.plan import program

pytestmark = pytest.mark.skipif(not backends.isas(), reason="the C++ extension is not built")

Size = tuple[int, ...]  # (height, width)


@dataclass(frozen=True)
class Network:
    """A network in plain torch, in float64, and fused."""

    model: FastSCNN
    model64: FastSCNN
    fast: FusedFastSCNN

    @staticmethod
    def of(config: Config, pictures: Tensor | None = None) -> Network:
        model = lifelike(config, pictures)
        return Network(model, copy.deepcopy(model).double(), fuse(model, "cpu"))

    def run(self, x: Tensor, output: str = "logits") -> Tensor:
        """The fused result, poisoned."""
        return run_poisoned("network", x, self.fast.weights, self.fast.program, output)

    @torch.no_grad()
    def reference64(self, x: Tensor) -> Tensor:
        return self.model64.reference(x if x.dtype == torch.uint8 else x.double())

    @torch.no_grad()
    def reference(self, x: Tensor) -> Tensor:
        return self.model.reference(x)


@lru_cache(maxsize=1)
def network(name: str) -> Network:
    return Network.of(PRESETS[name])


@lru_cache(maxsize=1)  # the instruction sets share it
def prepared(name: str, batch: int, size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, torch's own float32 logits and the float64 ones."""
    net, x = network(name), noise(batch, 3, *size)
    return x, net.reference(x), net.reference64(x)


def assert_share(labels: Tensor, own: Tensor, ref64: Tensor) -> None:
    """At least 99.99 % of the labels are the reference's, or half as many are wrong in torch's own float32."""
    wrong, owns = ((y != ref64.argmax(1)).double().mean().item() for y in (labels, own.argmax(1)))
    assert wrong <= max(1e-4, 2 * owns), f"{wrong:.2e} of the labels are wrong, torch's {owns:.2e}"


def check(net: Network, x: Tensor, own: Tensor, ref64: Tensor) -> Tensor:
    """Parity of all three outputs; returns the labels."""
    logits, probabilities, labels = (net.run(x, output) for output in ops.OUTPUTS)
    assert_parity(logits, own, ref64, floor=1e-5)
    assert_parity(probabilities, own.softmax(1), ref64.softmax(1), floor=1e-5)
    # A label may differ where the logits' errors make the two largest change places, nowhere else.
    assert_labels(labels, ref64, tolerance=2.1 * (logits - ref64).abs().max().item())
    return labels


# 32x32, the smallest supported: the 1/32 features are one pixel. Odd sizes round differently in each of the
# five halvings; 160x224 has whole vectors and blocks everywhere.
@pytest.mark.parametrize(
    ("batch", "size"), [(2, (32, 32)), (3, (33, 49)), (1, (97, 131)), (1, (160, 224))]
)
@pytest.mark.parametrize("name", PRESETS)
def test_parity(name: str, batch: int, size: Size, isa: str) -> None:
    check(network(name), *prepared(name, batch, size))


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_parity_at_full_size(name: str, isa: str) -> None:
    x, own, ref64 = prepared(name, 1, (512, 1024))
    assert_share(check(network(name), x, own, ref64), own, ref64)


@pytest.mark.slow
def test_parity_at_cityscapes_size(isa: str) -> None:
    x, own, ref64 = prepared("paper", 1, (1024, 2048))
    assert_share(check(network("paper"), x, own, ref64), own, ref64)


# ---------------------------------------------------------------- pictures


def tensor(picture: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 as (1, 3, H, W) in the picture's own memory order."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None]


@lru_cache(maxsize=1)
def drawn_pictures(name: str, size: Size) -> tuple[Network, Tensor, Tensor, Tensor]:
    """A network that has seen street scenes, one of them at ``size``, and its logits."""
    scenes = torch.cat([tensor(street(seed, 120, 200)[0]) for seed in range(4)])
    net, x = Network.of(PRESETS[name], scenes), tensor(street(0, *size)[0])
    return net, x, net.reference(x), net.reference64(x)


@pytest.mark.parametrize("name", PRESETS)
def test_labels_of_street_scenes(name: str, isa: str) -> None:
    net, x, own, ref64 = drawn_pictures(name, (240, 400))
    labels = net.run(x, "labels")
    assert len(labels.unique()) >= 8
    assert_share(labels, own, ref64)


PICTURES = sorted(Path(os.environ.get("FASTSCNN_PICTURES") or os.devnull).glob("*.*"))


@pytest.mark.slow
@pytest.mark.skipif(not PICTURES, reason="FASTSCNN_PICTURES names no folder of pictures")
@pytest.mark.parametrize("name", PRESETS)
def test_photographs(name: str) -> None:
    """FASTSCNN_PICTURES=folder: parity of everything on photographs of one's own."""
    pictures = [tensor(np.asarray(Image.open(path).convert("RGB"))) for path in PICTURES[:12]]
    net = Network.of(PRESETS[name], torch.cat(pictures[:4]))
    wrong = 0.0
    for x in pictures:
        ref64 = net.reference64(x)
        labels = check(net, x, net.reference(x), ref64)
        wrong += (labels != ref64.argmax(1)).double().mean().item() / len(pictures)
    assert wrong <= 1e-4


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_of_any_strides(layout: str, raw: bool, isa: str) -> None:
    """The layout changes nothing; what surrounds a picture in memory neither."""
    net = network("paper")
    x = torch.randint(256, (2, 3, 40, 52), dtype=torch.uint8) if raw else noise(2, 3, 40, 52)
    results = []
    for byte in (0, 255):
        placed = in_layout(x, layout, byte)
        results += [net.run(placed), net.run(placed.contiguous())]
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("name", PRESETS)
def test_raw_pixels(name: str, isa: str) -> None:
    net = network(name)
    x = torch.randint(256, (1, 3, 65, 96), dtype=torch.uint8)
    assert_parity(net.run(x), net.reference(x), net.reference64(x), floor=1e-5)


def test_non_finite_pixels(isa: str) -> None:
    """The pyramid's coarsest bin spreads a NaN everywhere, and argmax of nothing but NaN is class 0."""
    net, x = network("paper"), noise(2, 3, 40, 52)
    clean = net.run(x)
    x[1, 0, 20, 20] = float("nan")
    assert torch.equal(net.run(x)[0], clean[0])
    assert net.run(x)[1].isnan().all() and net.reference(x)[1].isnan().all()
    assert net.run(x, "probabilities")[1].isnan().all()
    assert (net.run(x, "labels")[1] == 0).all()


# ---------------------------------------------------------------- arithmetic


def chain(model: FastSCNN, x: Tensor, output: str) -> Tensor:
    """The network as separate ops, each with its own packed weights."""
    folded, size, high = fold(model), (x.shape[2], x.shape[3]), x
    for index, (layer, tensors) in enumerate(zip(folded.layers, folded.tensors, strict=True)):
        packed = ops.pack([layer], [tensors], "cpu")
        if layer.op == "feature_fusion":
            x = ops.feature_fusion(high, x, packed, layer)
        elif layer.op == "upsample_classify":
            x = ops.upsample_classify(x, packed, layer, size, output)
        else:
            x = getattr(ops, layer.op)(x, packed, layer)
        if index == 2:
            high = x
    return x


@pytest.mark.parametrize("name", PRESETS)
def test_the_network_is_its_ops(name: str, isa: str) -> None:
    net = network(name)
    for x in (noise(1, 3, 33, 49), torch.randint(256, (2, 3, 97, 131), dtype=torch.uint8)):
        for output in ops.OUTPUTS:
            assert torch.equal(net.run(x, output), chain(net.model, x, output)), output


@pytest.mark.parametrize("name", ["paper", "mmseg", "segmentron"])
def test_threads_and_batches_do_not_change_a_bit(name: str, isa: str) -> None:
    """Rows shared among threads, whole images a thread and images by themselves are the same arithmetic."""
    net, x = network(name), noise(3, 3, 65, 88)
    for output in ops.OUTPUTS:
        with threads(1):
            alone = torch.cat([net.run(image[None], output) for image in x])
        for count in (1, 2, 3, 4):
            for batch in (1, 2, 3):
                with threads(count):
                    assert torch.equal(net.run(x[:batch], output), alone[:batch]), (count, batch)


# ---------------------------------------------------------------- other networks

WIDTH = st.integers(1, 40)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Any preset with widths, depths and bins of its own, few of them multiples of 16."""
    bins = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=8)))
    channels = draw(st.integers(1, 4))
    fields: dict[str, Any] = {
        "num_classes": draw(st.sampled_from([1, 2, 11, 19, 33, 256, 300])),
        "in_channels": channels,
        "mean": (0.4,) * channels,
        "std": (0.3,) * channels,
        "downsample_channels": draw(st.tuples(WIDTH, WIDTH, WIDTH)),
        "bottleneck_channels": (
            *draw(st.tuples(WIDTH, WIDTH)),
            len(bins) * draw(st.integers(1, 8)),
        ),
        "bottleneck_repeats": draw(st.tuples(*[st.integers(1, 2)] * 3)),
        "expansion": draw(st.integers(1, 6)),
        "pyramid_bins": bins,
        "pyramid_channels": draw(WIDTH),
        "fusion_channels": draw(WIDTH),
    }
    return replace(PRESETS[draw(st.sampled_from(sorted(PRESETS)))], **fields)


def check_random(config: Config, size: Size, batch: int, raw: bool, seed: int) -> None:
    """As there is no telling how such a network amplifies rounding, it is held to its ops, bit by bit."""
    torch.manual_seed(seed)
    model = FastSCNN.from_config(config).eval()
    fast = fuse(model, "cpu")
    x = torch.randint(256, (batch, config.in_channels, *size), dtype=torch.uint8)
    x = x if raw else x / 128 - 1
    outputs = ops.OUTPUTS if config.num_classes <= 256 else ops.OUTPUTS[:2]
    with pytest.MonkeyPatch.context() as monkeypatch:
        for isa in backends.isas():
            monkeypatch.setenv("FASTSCNN_ISA", isa)
            for output in outputs:
                y = run_poisoned("network", x, fast.weights, fast.program, output)
                assert torch.equal(y, chain(model, x, output)), (isa, output)


SIDE, SEEDS = st.integers(3, 80), st.integers(0, 2**31)


@given(configs(), st.tuples(SIDE, SIDE), st.integers(1, 3), st.booleans(), SEEDS)
@settings(max_examples=15)
def test_random_networks(config: Config, size: Size, batch: int, raw: bool, seed: int) -> None:
    check_random(config, size, batch, raw, seed)


@pytest.mark.slow
@given(configs(), st.tuples(SIDE, SIDE), st.integers(1, 3), st.booleans(), SEEDS)
@settings(max_examples=200)
def test_many_random_networks(config: Config, size: Size, batch: int, raw: bool, seed: int) -> None:
    check_random(config, size, batch, raw, seed)


# ---------------------------------------------------------------- the dispatcher's view


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("output", ops.OUTPUTS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str, output: str, raw: bool) -> None:
    fast = fuse(network("paper").model, backend)
    x = torch.randint(256, (2, 3, 33, 49), dtype=torch.uint8) if raw else noise(2, 3, 33, 49)
    arguments = (x, fast.weights, fast.program, output, backend)
    results = torch.library.opcheck(torch.ops.fastscnn.network.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_wrong_arguments() -> None:
    fast, x = network("paper").fast, torch.zeros(1, 3, 33, 49)
    layers = program(PRESETS["paper"])

    def run(x: Tensor = x, program: Any = fast.program, output: str = "logits") -> Tensor:
        return ops.network(x, fast.weights, program, output)

    with pytest.raises(ValueError, match=r"x must be \(N, 3, H, W\), got shape \(1, 4, 8, 8\)"):
        run(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="x must be at least 1x1, got 0x49"):
        run(x[:, :, :0])
    with pytest.raises(ValueError, match="output must be one of logits, .*, got 'scores'"):
        run(output="scores")
    for wrong in ((), layers[:8], layers[1:], layers[:-1]):
        with pytest.raises(ValueError, match="program must be a whole network"):
            run(program=ops.encode(wrong))
    with pytest.raises(ValueError, match="weights must be packed for these layers"):
        run(program=ops.encode(program(PRESETS["tramac"])))
    swapped = ops.encode((*layers[:4], layers[6], *layers[4:6], *layers[7:]))
    weights = ops.pack(
        ops._decoded(swapped), [random_weights(layer) for layer in ops._decoded(swapped)], "cpu"
    )
    with pytest.raises(ValueError, match="program must be a whole network, layer 5 does not fit"):
        ops.network(x, weights, swapped)


def test_smallest_pictures() -> None:
    """The first convolution decides: 1x1 with padding, 3x3 without."""
    assert network("paper").run(torch.zeros(1, 3, 1, 1)).shape == (1, 19, 1, 1)
    assert network("tramac").run(torch.zeros(1, 3, 3, 3)).shape == (1, 19, 3, 3)
    with pytest.raises(ValueError, match="x must be at least 3x3, got 2x3"):
        network("tramac").run(torch.zeros(1, 3, 2, 3))


def test_more_classes_than_labels_have_values() -> None:
    net = Network.of(replace(PRESETS["paper"], num_classes=257))
    assert net.run(noise(1, 3, 33, 49)).shape == (1, 257, 33, 49)
    with pytest.raises(ValueError, match="257"):
        net.fast.labels(noise(1, 3, 33, 49))
