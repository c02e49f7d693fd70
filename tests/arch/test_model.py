from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import drawn_once, err, randomise
from layouts import SMALL
from torch import Tensor, nn

from fastscnn_fast import FastSCNN
from fastscnn_fast.arch.config import PRESETS, preset
from fastscnn_fast.compat import tramac

PUBLISHED_PARAMETERS = {  # of the key lists, with all auxiliary heads; of the paper's Table 1
    "paper": 1_137_795,
    "tramac": 1_138_051 + 64 * 32 * 9 + 2 * 32 + 33 * 19,
    "mmseg": 1_456_617,
    "mmseg_legacy": 1_456_617 - 256 * 128 * 8 + 128 * 128 - 128 * 9,
    "segmentron": 1_209_961,
    "zacario": 1_157_174,
    "leftthomas": 1_137_539,
}


def small(name: str = "paper", classes: int = 5, **overrides: Any) -> FastSCNN:
    return FastSCNN(classes, name, **{**SMALL, **overrides})


def test_parameter_counts_are_the_published_ones() -> None:
    for name, count in PUBLISHED_PARAMETERS.items():
        model = FastSCNN(19, name, aux=name not in ("paper", "leftthomas"))
        assert sum(p.numel() for p in model.parameters()) == count, name


def test_keys_are_readable_from_the_tree() -> None:
    tops = {key.split(".")[0] for key in small(aux=True).state_dict()}
    assert tops == {
        *("learning_to_downsample", "global_features", "feature_fusion"),
        *("classifier", "auxiliary"),
    }
    assert "global_features.bottleneck2.1.expand.conv.weight" in small().state_dict()


@pytest.mark.parametrize("name", PRESETS)
def test_any_size_and_batch(name: str) -> None:
    model = randomise(small(name)).eval()
    for batch, height, width in (
        *((1, 32, 32), (1, 33, 49), (3, 64, 64), (1, 75, 242)),
        *((2, 97, 32), (1, 130, 63), (1, 256, 33), (0, 64, 64)),
    ):
        y = model.reference(torch.randn(batch, 3, height, width))
        assert y.shape == (batch, 5, height, width)
        assert y.isfinite().all()


@pytest.mark.parametrize("size", [(375, 1242), (1080, 1920)])
def test_odd_sizes_of_real_cameras(size: tuple[int, int]) -> None:
    for name in ("paper", "tramac"):
        y = small(name).eval().reference(torch.randn(1, 3, *size))
        assert y.shape == (1, 5, *size)


def test_a_batch_is_its_pictures_one_by_one() -> None:
    model = randomise(small()).double().eval()
    x = torch.randn(3, 3, 65, 97, dtype=torch.float64)
    y = torch.cat([model.reference(picture[None]) for picture in x])
    torch.testing.assert_close(model.reference(x), y)


@pytest.mark.parametrize("name", PRESETS)
def test_training_at_batch_one(name: str) -> None:
    model = small(name, aux=bool(PRESETS[name].aux_taps)).train()
    for size in ((32, 32), (33, 49), (64, 96)):
        model.zero_grad()
        result = model(torch.randn(1, 3, *size))
        outputs = [result[0], *result[1]] if model.auxiliary else [result]
        assert all(y.shape == (1, 5, *size) and y.isfinite().all() for y in outputs)
        sum(y.square().mean() for y in outputs).backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    assert all(buffer.isfinite().all() for buffer in model.buffers())


def test_one_value_per_channel_uses_the_running_statistics() -> None:
    model = randomise(small()).train()
    branch, other = model.global_features.pyramid.branches[:2]
    before, untouched = (copy.deepcopy(b.bn.state_dict()) for b in (other, branch))
    x = torch.randn(1, 48, 5, 5)
    model.global_features.pyramid(x)
    assert all(torch.equal(v, untouched[k]) for k, v in branch.bn.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k, v in other.bn.state_dict().items())
    pooled = x.mean((2, 3), keepdim=True)
    one_value = branch(pooled)
    assert torch.equal(one_value, branch.eval()(pooled))
    branch.train()
    assert not torch.equal(branch(torch.cat([pooled, 2 * pooled]))[:1], one_value)


def test_auxiliary_outputs_only_in_training() -> None:
    x = torch.randn(2, 3, 64, 96)
    for name in ("paper", "mmseg", "tramac"):
        model = small(name, aux=True)
        logits, auxiliary = model.train()(x)
        assert logits.shape == (2, 5, 64, 96)
        assert [tuple(y.shape) for y in auxiliary] == [(2, 5, 64, 96)] * len(model.config.aux_taps)
        assert isinstance(auxiliary, tuple)
        assert isinstance(model.eval()(x), Tensor)
        assert isinstance(small(name).train()(x), Tensor)


def test_auxiliary_heads_read_their_taps() -> None:
    for taps in (("downsample", "global"), ("global", "downsample"), ("global",)):
        model = small(aux=True, aux_taps=taps)
        _, auxiliary = model.train()(torch.randn(2, 3, 64, 64))
        for tap, output in zip(taps, auxiliary):
            model.zero_grad()
            output.sum().backward(retain_graph=True)
            with_gradient = [p for p in model.global_features.parameters() if p.grad is not None]
            assert bool(with_gradient) == (tap == "global")
            assert model.auxiliary[tap].conv.weight.grad is not None


def test_deepcopy_and_pickle() -> None:
    model = randomise(small(aux=True)).eval()
    x = torch.randn(1, 3, 64, 64)
    y = model.reference(x)
    with torch.no_grad():
        model(x)  # fused where it can be: the copies must not carry that
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.config == model.config
        assert torch.equal(twin.reference(x), y)
        with torch.no_grad():
            twin.classifier.conv.bias += 1
            assert torch.equal(model.reference(x), y)
            assert err(twin(x), (y + 1).double()) < 1e-4


def test_channels_last_gives_the_same() -> None:
    model = randomise(small()).double().eval()
    x = torch.randn(2, 3, 65, 97, dtype=torch.float64)
    y = model.reference(x)
    last = {"memory_format": torch.channels_last}
    torch.testing.assert_close(model.to(**last).reference(x.to(**last)), y)
    assert model.reference(x.to(**last)).is_contiguous(**last)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_input_channels_and_raw_pixels(channels: int) -> None:
    model = randomise(small(in_channels=channels)).eval()
    pixels = torch.randint(256, (2, channels, 40, 56), dtype=torch.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.config.mean, model.config.std))
    x = (pixels / 255 - mean) / std
    torch.testing.assert_close(model.reference(pixels), model.reference(x))
    with pytest.raises(
        ValueError, match=rf"x must be \(N, {channels}, H, W\), got shape \(1, 5, 40, 40\)"
    ):
        model.reference(torch.zeros(1, 5, 40, 40))
    with pytest.raises(ValueError, match=r"got shape \(3, 40, 40\)"):
        model.reference(torch.zeros(3, 40, 40))


@pytest.mark.parametrize(
    "widths",
    [
        {"downsample_channels": (8, 24, 40), "bottleneck_channels": (24, 40, 20)},
        {"bottleneck_repeats": (1, 1, 1), "expansion": 1},
        {"bottleneck_channels": (32, 32, 32), "bottleneck_repeats": (4, 1, 2)},
        {"pyramid_bins": (1,), "pyramid_channels": 7, "fusion_channels": 9},
        {"pyramid_bins": (2, 5, 4), "bottleneck_channels": (16, 16, 33)},
        {"num_classes": 1},
    ],
)
def test_free_widths(widths: dict[str, Any]) -> None:
    for name in ("paper", "mmseg", "segmentron", "leftthomas"):
        config = preset(name, **{"num_classes": 3, **SMALL, **widths})
        y = FastSCNN.from_config(config).eval().reference(torch.randn(1, 3, 49, 33))
        assert y.shape == (1, config.num_classes, 49, 33)


@pytest.mark.parametrize(
    ("name", "module", "attribute", "value"),
    [
        ("paper", "learning_to_downsample.stem.conv", "padding", (1, 1)),
        ("tramac", "learning_to_downsample.stem.conv", "padding", (0, 0)),
        ("paper", "feature_fusion.refine.conv", "dilation", (4, 4)),
        ("paper", "feature_fusion.refine.conv", "padding", (4, 4)),
        ("mmseg", "global_features.pyramid.out.conv", "kernel_size", (3, 3)),
        ("mmseg_legacy", "feature_fusion.refine.conv", "groups", 1),
        ("tramac", "feature_fusion.refine.conv", "groups", 32),
        ("mmseg", "classifier.dropout", "p", 0.1),
        ("zacario", "classifier.dropout", "p", 0.0),
    ],
)
def test_switches_reach_their_layer(name: str, module: str, attribute: str, value: Any) -> None:
    assert getattr(small(name).get_submodule(module), attribute) == value


def test_activations_and_dropout_are_of_the_right_kind() -> None:
    block = small("mmseg_legacy").global_features.bottleneck1[0]
    kinds = [type(part.act) for part in (block.expand, block.depthwise, block.project)]
    assert kinds == [nn.ReLU6, nn.ReLU6, nn.Identity]
    dsconv = small("paper").classifier.dsconv1
    assert [type(dsconv.depthwise.act), type(dsconv.pointwise.act)] == [nn.Identity, nn.ReLU]
    assert type(small("segmentron").classifier.dropout) is nn.Dropout2d
    assert type(small("tramac").classifier.dropout) is nn.Dropout
    assert isinstance(small("leftthomas").feature_fusion.low.bn, nn.Identity)


def test_equal_seeds_give_equal_networks() -> None:
    torch.manual_seed(3)
    first = small()
    torch.manual_seed(3)
    second = FastSCNN.from_config(first.config)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_impossible_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="aux must be False where aux_taps is empty"):
        FastSCNN(19, "leftthomas", aux=True)
    with pytest.raises(ValueError, match="preset must be one of"):
        FastSCNN(19, "unet")
    with pytest.raises(ValueError, match="num_classes must be an integer of at least 1, got 0"):
        FastSCNN(0)


def test_a_few_steps_of_training_learn_something() -> None:
    """Of one draw: at this rate a few others end in a bad step."""
    with drawn_once():
        model = small(classes=2).train()
        x = torch.randn(2, 3, 32, 64)
        target = torch.zeros(2, 32, 64, dtype=torch.long)
        target[:, :, 32:] = 1  # the right half
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


def features(traced: torch.fx.GraphModule, node: str) -> torch.fx.GraphModule:
    """What torchvision's create_feature_extractor makes of a traced network."""
    graph = copy.deepcopy(traced.graph)
    (old,) = (n for n in graph.nodes if n.op == "output")
    graph.erase_node(old)
    graph.output(next(n for n in graph.nodes if n.name == node))
    extract = torch.fx.GraphModule(traced, graph)
    graph.eliminate_dead_code()
    extract.recompile()
    extract.delete_all_unused_submodules()
    return extract


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_features_by_torch_fx(name: str, training: bool) -> None:
    model, x = randomise(small(name)).train(training), torch.randn(2, 3, 65, 90)
    for net in (copy.deepcopy(model), tramac.FastSCNN(5)) if name == "tramac" else (model,):
        net.train(training)
        traced = torch.fx.symbolic_trace(net)
        extract = features(traced, "global_features_pyramid_out_act")
        with torch.no_grad():
            wanted = net.global_features(net.learning_to_downsample(x))
            assert torch.equal(extract(x), wanted)
            if not training:  # or dropout would draw twice
                (y,) = traced(x) if isinstance(net, tramac.FastSCNN) else [traced(x)]
                assert torch.equal(y, net.reference(x))
        assert len(list(extract.parameters())) < len(list(net.parameters()))


def test_torch_fx_traces_auxiliary_heads_or_says_that_it_cannot() -> None:
    """What it writes is Python: an attribute that is a keyword ends in a syntax error of its own."""
    x = torch.randn(2, 3, 64, 64)
    with pytest.warns(UserWarning, match="the result is logits alone"):
        traced = torch.fx.symbolic_trace(small(aux=True).train())
    assert traced(x).shape == (2, 5, 64, 64)
    logits, auxiliary = torch.fx.symbolic_trace(small("tramac", aux=True).train())(x)
    assert logits.shape == auxiliary[0].shape == (2, 5, 64, 64)
