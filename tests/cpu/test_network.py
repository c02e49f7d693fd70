"""The whole fused network against the module in float64, and against its own ops bit by bit.

Most networks here are not trained: logits are standardised per class (helpers.lifelike), so that every class
wins somewhere. Such a network amplifies rounding: torch's own float32 result errs by up to 1.5e-5. Parity is
therefore 1e-5 or twice torch's own error, whichever is larger; that the network is, bit for bit, the chain
of its ops (which test_ops.py holds to 1e-6) leaves no room behind that bound. "high" rounds as if to 17 bits
and is held to the float32 bound where weights are trained.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Size
from helpers import (
    BOUNDS,
    LAYOUTS,
    Kernels,
    assert_labels,
    assert_parity,
    drawn_once,
    in_layout,
    lifelike,
    noise,
    probabilities_of,
    random_weights,
    threads,
)
from layouts import free_widths
from networks import Network, assert_chain
from PIL import Image
from torch import Tensor

from fastscnn_fast import load_checkpoint, ops
from fastscnn_fast.arch.config import PRESETS, preset
from fastscnn_fast.backends import registry
from fastscnn_fast.data.scenes import street
from fastscnn_fast.program import arithmetic as records
from fastscnn_fast.program.layers import Layer
from fastscnn_fast.program.program import fast_scnn
from fastscnn_fast.runtime.fused import fuse
from fastscnn_fast.runtime.model import FastSCNN

pytestmark = pytest.mark.skipif(not registry.isas(), reason="the C++ extension is not built")


@cache
def lifelike_model(name: str) -> FastSCNN:
    with drawn_once():
        return lifelike(PRESETS[name])


@lru_cache(maxsize=len(registry.CPU_ARITHMETICS))
def network(name: str, arithmetic: str = "float32") -> Network:
    return Network.of(lifelike_model(name), arithmetic)


Prepared = tuple[Tensor, Tensor, Tensor]  # pictures, torch's own logits and the float64 ones
DTYPES = len(
    records.dtypes("cpu")
)  # arithmetics and instruction sets share what is prepared for one


@lru_cache(maxsize=DTYPES)
def prepared(name: str, dtype: torch.dtype, batch: int, size: Size, raw: bool = False) -> Prepared:
    net = network(name, records.choose("cpu", dtype).name)
    pixels = torch.randint(256, (batch, 3, *size), dtype=torch.uint8)
    x = pixels if raw else net.noise(batch, *size)
    return x, net.reference(x), net.reference64(x)


def assert_share(labels: Tensor, own: Tensor, ref64: Tensor, arithmetic: str) -> None:
    wrong, owns = ((y != ref64.argmax(1)).double().mean().item() for y in (labels, own.argmax(1)))
    largest = max(BOUNDS[arithmetic].labels, BOUNDS[arithmetic].network[0] * owns)
    assert wrong <= largest, f"{wrong:.2e} of the labels are wrong, torch's {owns:.2e}"


def check(net: Network, x: Tensor, own: Tensor, ref64: Tensor) -> Tensor:
    """Parity of all three outputs; returns the labels."""
    bound = BOUNDS[net.arithmetic].network
    logits, probabilities, labels = (net.run(x, output) for output in ops.OUTPUTS)
    assert_parity(logits, own, ref64, *bound)
    assert_parity(probabilities, probabilities_of(own), probabilities_of(ref64), *bound)
    # A label may differ where the errors of the logits, before they were rounded to their dtype, make the two
    # largest change places, nowhere else.
    rounding = torch.finfo(logits.dtype).eps / 2 * ref64.abs().max().item()
    tolerance = 2.1 * ((logits - ref64).abs().max().item() + rounding)
    assert_labels(labels, ref64, tolerance)
    return labels


# 32x32, the smallest supported: the 1/32 features are one pixel. Odd sizes round differently in each of the
# five halvings; 160x224 has whole vectors and blocks everywhere.
@pytest.mark.parametrize(
    ("batch", "size"), [(2, (32, 32)), (3, (33, 49)), (1, (97, 131)), (1, (160, 224))]
)
@pytest.mark.parametrize("name", PRESETS)
def test_parity(name: str, batch: int, size: Size, best_kernels: Kernels) -> None:
    case = prepared(name, best_kernels.dtype, batch, size)
    check(network(name, best_kernels.arithmetic), *case)


@lru_cache(maxsize=len(registry.CPU_ARITHMETICS))
def network_of_one_class(arithmetic: str) -> Network:
    with drawn_once():
        return Network.of(lifelike(preset("paper", num_classes=1)), arithmetic)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(("batch", "size"), [(2, (32, 32)), (3, (33, 49)), (1, (97, 131))])
def test_one_class(batch: int, size: Size, raw: bool, kernels: Kernels) -> None:
    """The sigmoid's, with a background beside it.

    Drawn once: the error of a single channel's few logits in bfloat16 is not 1.5 times torch's for every draw.
    """
    net = network_of_one_class(kernels.arithmetic)
    with drawn_once():
        x = net.noise(batch, *size)
        if raw:
            x = torch.randint(256, x.shape, dtype=torch.uint8)
    labels = check(net, x, net.reference(x), net.reference64(x))
    assert_chain(net, x)
    if not raw:
        assert 0.02 < labels.double().mean() < 0.98
        x[0, 0, 20, 20] = float("nan")
        assert net.run(x, "probabilities")[0].isnan().all()
        assert (net.run(x, "labels")[0] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_parity_at_full_size(name: str, kernels: Kernels) -> None:
    _, own, ref64 = case = prepared(name, kernels.dtype, 1, (512, 1024))
    labels = check(network(name, kernels.arithmetic), *case)
    assert_share(labels, own, ref64, kernels.arithmetic)


@pytest.mark.slow
def test_parity_at_cityscapes_size(kernels: Kernels) -> None:
    _, own, ref64 = case = prepared("paper", kernels.dtype, 1, (1024, 2048))
    labels = check(network("paper", kernels.arithmetic), *case)
    assert_share(labels, own, ref64, kernels.arithmetic)


# ---------------------------------------------------------------- pictures


def tensor(picture: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 as (1, 3, H, W) in the picture's own memory order."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None]


@cache
def scene(seed: int, height: int, width: int) -> Tensor:
    return tensor(street(seed, height, width)[0])


@lru_cache(maxsize=1)
def model_of_streets(name: str) -> FastSCNN:
    """A network that has seen street scenes."""
    with drawn_once():
        return lifelike(PRESETS[name], torch.cat([scene(seed, 120, 200) for seed in range(4)]))


@lru_cache(maxsize=len(registry.CPU_ARITHMETICS))
def network_of_streets(name: str, arithmetic: str) -> Network:
    return Network.of(model_of_streets(name), arithmetic)


@lru_cache(maxsize=DTYPES)
def drawn_picture(name: str, dtype: torch.dtype) -> Prepared:
    net, x = network_of_streets(name, records.choose("cpu", dtype).name), scene(0, 160, 264)
    return x, net.reference(x), net.reference64(x)


@pytest.mark.parametrize("name", PRESETS)
def test_labels_of_street_scenes(name: str, best_kernels: Kernels) -> None:
    x, own, ref64 = drawn_picture(name, best_kernels.dtype)
    labels = network_of_streets(name, best_kernels.arithmetic).run(x, "labels")
    assert len(labels.unique()) >= 8
    assert_share(labels, own, ref64, best_kernels.arithmetic)


@lru_cache(maxsize=1)
def trained(arithmetic: str) -> tuple[Network, Tensor, Tensor, Tensor]:
    """The weights that come along, on a street scene."""
    net, x = Network.of(load_checkpoint(), arithmetic), scene(0, 360, 480)
    return net, x, net.reference(x), net.reference64(x)


def test_trained_weights(best_kernels: Kernels) -> None:
    net, x, own, ref64 = trained(best_kernels.arithmetic)
    bound = BOUNDS["bfloat16" if best_kernels.dtype == torch.bfloat16 else "float32"]
    assert_parity(net.run(x), own, ref64, *bound.network)
    wrong = (net.run(x, "labels") != ref64.argmax(1)).double().mean().item()
    assert wrong <= bound.labels


PICTURES = sorted(Path(os.environ.get("FASTSCNN_PICTURES") or os.devnull).glob("*.*"))


@pytest.mark.slow
@pytest.mark.skipif(not PICTURES, reason="FASTSCNN_PICTURES names no folder of pictures")
@pytest.mark.parametrize("name", PRESETS)
def test_photographs(name: str) -> None:
    """FASTSCNN_PICTURES=folder: parity of everything on photographs of one's own."""
    pictures = [tensor(np.asarray(Image.open(path).convert("RGB"))) for path in PICTURES[:12]]
    net = Network.of(lifelike(PRESETS[name], torch.cat(pictures[:4])))
    wrong = 0.0
    for x in pictures:
        ref64 = net.reference64(x)
        labels = check(net, x, net.reference(x), ref64)
        wrong += (labels != ref64.argmax(1)).double().mean().item() / len(pictures)
    assert wrong <= 1e-4


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_of_any_strides(layout: str, raw: bool, best_kernels: Kernels) -> None:
    """The layout changes nothing; what surrounds a picture in memory neither."""
    net = network("paper", best_kernels.arithmetic)
    x = torch.randint(256, (2, 3, 40, 52), dtype=torch.uint8) if raw else net.noise(2, 40, 52)
    results = []
    for byte in (0, 255):
        placed = in_layout(x, layout, byte)
        results += [net.run(placed), net.run(placed.contiguous())]
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("name", PRESETS)
def test_raw_pixels(name: str, best_kernels: Kernels) -> None:
    x, own, ref64 = prepared(name, best_kernels.dtype, 2, (65, 96), raw=True)
    net = network(name, best_kernels.arithmetic)
    assert_parity(net.run(x), own, ref64, *BOUNDS[net.arithmetic].network)


def test_non_finite_pixels(kernels: Kernels) -> None:
    """The pyramid's coarsest bin spreads a NaN everywhere, and argmax of nothing but NaN is class 0."""
    net = network("paper", kernels.arithmetic)
    x = net.noise(2, 40, 52)
    clean = net.run(x)
    x[1, 0, 20, 20] = float("nan")
    assert torch.equal(net.run(x)[0], clean[0])
    assert net.run(x)[1].isnan().all() and net.reference(x)[1].isnan().all()
    assert net.run(x, "probabilities")[1].isnan().all()
    assert (net.run(x, "labels")[1] == 0).all()


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("name", PRESETS)
def test_the_network_is_its_ops(name: str, kernels: Kernels) -> None:
    net = network(name, kernels.arithmetic)
    for x in (net.noise(1, 33, 49), torch.randint(256, (2, 3, 97, 131), dtype=torch.uint8)):
        assert_chain(net, x)


@pytest.mark.parametrize("name", ["paper", "mmseg", "segmentron"])
def test_threads_and_batches_do_not_change_a_bit(name: str, best_kernels: Kernels) -> None:
    """Rows shared among threads, whole images a thread and images by themselves are the same arithmetic."""
    net = network(name, best_kernels.arithmetic)
    x = net.noise(3, 65, 88)
    for output in ops.OUTPUTS:
        with threads(1):
            alone = torch.cat([net.run(image[None], output) for image in x])
        for count in (1, 2, 3, 4):
            for batch in (1, 2, 3):
                with threads(count):
                    assert torch.equal(net.run(x[:batch], output), alone[:batch]), (count, batch)


# ---------------------------------------------------------------- the dispatcher's view


@pytest.mark.parametrize(
    ("dtype", "raw"),
    [
        (torch.float32, False),
        (torch.bfloat16, True),
        pytest.param(torch.float32, True, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("output", ops.OUTPUTS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str, dtype: torch.dtype, output: str, raw: bool) -> None:
    fast = fuse(lifelike_model("paper"), backend, dtype)
    x = torch.randint(256, (2, 3, 33, 49), dtype=torch.uint8) if raw else noise(2, 3, 33, 49)
    x = x if raw else x.to(dtype)
    arguments = (x, fast.weights, fast.program, dtype, output, backend)
    out = torch.empty_like(torch.ops.fastscnn.network(*arguments))
    network = torch.ops.fastscnn.network
    for op, keywords in ((network.default, {}), (network.out, {"out": out})):
        results = torch.library.opcheck(op, arguments, keywords)
        assert set(results.values()) == {"SUCCESS"}


@torch.no_grad()
def test_free_widths(best_kernels: Kernels) -> None:
    """Every block has channels of its own, multiples of nothing, as pruning leaves them."""
    widths = free_widths(least=9, most=90)
    print(widths)
    model = lifelike(preset("paper", num_classes=7, **widths))
    net, x = Network.of(model, best_kernels.arithmetic), noise(4, 3, 97, 131)
    x = x.to(net.fast.dtype)
    check(net, x, net.reference(x), net.reference64(x))


def test_wrong_arguments() -> None:
    fast, x = network("paper").fast, torch.zeros(1, 3, 33, 49)
    layers = fast_scnn(PRESETS["paper"]).layers

    def run(x: Tensor = x, program: Any = fast.program, output: str = "logits") -> Tensor:
        return ops.network(x, fast.weights, program, output)

    with pytest.raises(ValueError, match=r"x must be \(N, 3, H, W\), got shape \(1, 4, 8, 8\)"):
        run(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="x must be at least 1x1, got 0x49"):
        run(x[:, :, :0])
    with pytest.raises(ValueError, match="output must be one of logits, .*, got 'scores'"):
        run(output="scores")
    for wrong in ((), layers[:8], layers[:-1]):
        with pytest.raises(ValueError, match="program must be a whole network"):
            run(program=ops.encode(wrong))
    with pytest.raises(ValueError, match=r"layer 0 \(dsconv\) must read 1 of the layers before it"):
        run(program=ops.encode(layers[1:]))
    with pytest.raises(ValueError, match="weights must be packed for these layers"):
        run(program=ops.encode(fast_scnn(PRESETS["tramac"]).layers))


LAYERS = fast_scnn(PRESETS["paper"]).layers


@pytest.mark.parametrize(
    ("layers", "wrong"),
    [
        ((*LAYERS[:4], LAYERS[6], *LAYERS[4:6], *LAYERS[7:]), 5),
        *(
            ((*LAYERS[:at], replace(LAYERS[at], **change), *LAYERS[at + 1 :]), at)
            for at, change in (
                (1, {"last_channels": LAYERS[2].in_channels}),
                (2, {"last_channels": LAYERS[3].in_channels}),
                (-4, {"mid_channels": 32}),
                (-3, {"last_channels": LAYERS[-2].in_channels}),
                (-3, {"stride": 2}),
                (-2, {"stride": 2}),
                (-2, {"last_channels": 0, "out_channels": LAYERS[-1].in_channels}),
            )
            for at in [at % len(LAYERS)]
        ),
    ],
)
def test_layers_that_make_no_network(layers: tuple[Layer, ...], wrong: int) -> None:
    """Each is sound by itself; either it does not take what it reads, or the chain is another."""
    layers = tuple(
        replace(layer, inputs=(2, index - 1) if layer.op == "feature_fusion" else (index - 1,))
        for index, layer in enumerate(layers)
    )
    chain = rf"program must be Fast-SCNN's chain \(.*\), layer {wrong} does not fit"
    edge = rf"layer {wrong} \(\w+\) must read \(.*\) channels, got"
    with pytest.raises(ValueError, match=f"^({chain}|{edge})"):
        weights = ops.pack(layers, [random_weights(layer) for layer in layers], "cpu")
        ops.network(torch.zeros(1, 3, 33, 49), weights, ops.encode(layers))


def test_another_chain_is_refused() -> None:
    """Of sound programs this engine runs one: here fusion reads the first block for its high branch."""
    at = next(i for i, layer in enumerate(LAYERS) if layer.op == "feature_fusion")
    layers = list(LAYERS)
    layers[at] = replace(layers[at], inputs=(3, at - 1))
    weights = ops.pack(layers, [random_weights(layer) for layer in layers], "cpu")
    with pytest.raises(ValueError, match=rf"must be Fast-SCNN's chain .*, layer {at} does not fit"):
        ops.network(torch.zeros(1, 3, 33, 49), weights, ops.encode(layers))
    plain = ops.pack(layers, [random_weights(layer) for layer in layers], "reference")
    y = ops.network(torch.zeros(1, 3, 33, 49), plain, ops.encode(layers), backend="reference")
    assert y.shape == (1, 19, 33, 49)


def test_smallest_pictures() -> None:
    """The first convolution decides: 1x1 with padding, 3x3 without."""
    assert network("paper").run(torch.zeros(1, 3, 1, 1)).shape == (1, 19, 1, 1)
    assert network("tramac").run(torch.zeros(1, 3, 3, 3)).shape == (1, 19, 3, 3)
    with pytest.raises(ValueError, match="x must be at least 3x3, got 2x3"):
        network("tramac").run(torch.zeros(1, 3, 2, 3))


def test_more_classes_than_labels_have_values() -> None:
    net = Network.of(lifelike(replace(PRESETS["paper"], num_classes=257)))
    assert net.run(noise(1, 3, 33, 49)).shape == (1, 257, 33, 49)
    with pytest.raises(ValueError, match="257"):
        net.fast.labels(noise(1, 3, 33, 49))
