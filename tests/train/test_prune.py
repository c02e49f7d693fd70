"""Pruning: what is cut hangs together, is what is worth least for its time, and leaves an ordinary network; its runs."""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BOUNDS, assert_parity, drawn_once, lifelike, noise, randomise
from torch import Tensor, nn

from fastscnn_fast import FastSCNN, calibrate, fuse, load_checkpoint, prune
from fastscnn_fast.arch.config import PRESETS, Config, preset
from fastscnn_fast.arch.network import normalise
from fastscnn_fast.arch.structure import check
from fastscnn_fast.checkpoints import read_details, save_checkpoint
from fastscnn_fast.cli import main, prune as command_line
from fastscnn_fast.data.classes import CAMVID_CLASSES, numbered
from fastscnn_fast.data.datasets import Examples
from fastscnn_fast.data.scenes import street
from fastscnn_fast.data.sources import Streets
from fastscnn_fast.program.arithmetic import ARITHMETICS
from fastscnn_fast.program.program import fast_scnn, layer_sizes, operations
from fastscnn_fast.train import trainer
from fastscnn_fast.train.distil import Folded, Teacher
from fastscnn_fast.train.loss import Targets
from fastscnn_fast.train.ops import low_logits, normalised
from fastscnn_fast.train.prune import Pruning
from fastscnn_fast.train.pruner import Pruner
from fastscnn_fast.train.recipe import PruneRecipe, Recipe
from fastscnn_fast.train.trainer import Trainer

pytest.importorskip("torch_pruning")

#: Wide enough to be cut in blocks of 16, narrow enough to be quick.
WIDTHS: dict[str, Any] = {
    "downsample_channels": (32, 48, 64),
    "bottlenecks": (
        ((96, 64, 2), (64, 64, 1)),
        ((64, 48, 2), (48, 48, 1), (80, 48, 1)),
        ((64, 64, 1),),
    ),
    "pyramid_channels": 64,
    "fusion_channels": 48,
}
SIZE = (64, 96)
F32 = ARITHMETICS["float32"]


@pytest.fixture(scope="module")
def streets() -> Examples:
    return Examples(Streets(8, 0, (72, 96)))


def narrow_network(name: str = "paper", **overrides: Any) -> FastSCNN:
    return lifelike(preset(name, **{"num_classes": 11, **WIDTHS, **overrides}))


def places(config: Config) -> dict[str, int]:
    """Each width of a config by a name."""
    found = {f"downsample{k}": w for k, w in enumerate(config.downsample_channels)}
    for s, stage in enumerate(config.bottlenecks):
        for b, (mid, out, _) in enumerate(stage):
            found |= {f"mid{s}.{b}": mid, f"out{s}.{b}": out}
    return found | {"pyramid": config.pyramid_channels, "fusion": config.fusion_channels}


# --- what is cut -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_channels_that_say_nothing_can_go(name: str) -> None:
    """Of every width some channels are silent, here and there: without them the network is the same."""
    model = narrow_network(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    pruning = Pruning(model, F32, SIZE)
    config = model.config
    for width in pruning.widths:
        fewer = width.of(config) // 2 // 4 * 4
        config = width.put(config, fewer)
        for conv, share in width.sources:
            silent = torch.randperm(conv.out_channels)[: (width.of(model.config) - fewer) // share]
            worth = torch.ones(conv.out_channels)
            worth[silent] = 0
            pruning.scores[conv] = worth
            silence(pruning, conv, silent)
    x = noise(2, 3, *SIZE)
    whole = pruning.model.reference(x)
    narrow = pruning.cut(config)
    assert not narrow.training and narrow.config == config
    assert all(b < a for a, b in zip(places(model.config).values(), places(config).values()))
    check(narrow)
    assert {m.eps for m in narrow.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    assert torch.allclose(narrow.reference(x), whole, rtol=1e-4, atol=1e-4)
    assert (model.reference(x) - whole).abs().max() > 0.1  # the model itself was left alone


def silence(pruning: Pruning, conv: nn.Conv2d, channels: Tensor) -> None:
    """Every convolution and batch norm that makes these channels with ``conv`` makes zeros of them."""
    for dependency, indices in pruning._group(conv, channels.tolist()):
        module = dependency.target.module
        makes = dependency.handler == pruning._library.prune_conv_out_channels
        if isinstance(module, nn.BatchNorm2d) or makes:
            for parameter in (module.weight, module.bias):
                if parameter is not None:
                    parameter[indices] = 0


def test_what_hangs_together() -> None:
    """A stage whose blocks add their inputs has one width, the skip connection that of its branch, the pyramid's
    branches theirs of the last stage's."""
    widths = Pruning(narrow_network(), F32, SIZE).widths
    tied = {width.places: [share for _, share in width.sources] for width in widths}
    stage = tuple(("bottlenecks", (1, b, 1)) for b in range(3))
    assert tied[stage] == [1]
    assert tied[(("bottlenecks", (2, 0, 1)),)] == [1, 4, 4, 4, 4]
    assert tied[(("fusion_channels", ()),)] == [1, 1, 1]
    assert sum(map(len, tied)) == len(places(narrow_network().config))
    adds = narrow_network(bottlenecks=(((96, 64, 1),), *WIDTHS["bottlenecks"][1:]))
    joined = {width.places for width in Pruning(adds, F32, SIZE).widths}
    assert (("bottlenecks", (0, 0, 1)), ("downsample_channels", (2,))) in joined


def scored(pruning: Pruning, **worth: float) -> Pruning:
    """A first block of channels of each width is worth 1, but those of the widths named, by their first place's name."""
    for width in pruning.widths:
        (field, indices), *_ = width.places
        value = worth.pop("_".join(map(str, (field, *indices))), 1.0)
        channels = sum(pruning.arithmetic.channels / share for _, share in width.sources)
        for conv, _ in width.sources:
            pruning.scores[conv] = torch.full((conv.out_channels,), value / channels)
    assert not worth
    return pruning


def time_of(config: Config) -> float:
    return sum(layer.work(F32.channels) for layer in layer_sizes(config, 512, 1024))


def test_the_cheapest_for_the_time_that_it_saves_goes_first() -> None:
    """At the same worth, that is the one that saves the most; and one that is worth nothing."""
    model = FastSCNN(11)
    whole = operations(model.config, 512, 1024)
    pruning = scored(Pruning(model, F32, (512, 1024)))
    chosen = pruning.choose(0.999 * whole)
    assert len(changed(model.config, chosen)) == 1
    others = [
        width.put(model.config, width.of(model.config) - 16)
        for width in pruning.widths
        if width.of(model.config) % 16 == 0
    ]
    assert time_of(chosen) == min(map(time_of, others))
    cheap = scored(Pruning(model, F32, (512, 1024)), bottlenecks_2_1_0=0.0)
    assert set(changed(model.config, cheap.choose(0.96 * whole))) == {"mid2.1"}


@torch.no_grad()
def test_a_cut_costs_what_the_loss_becomes_greater_by() -> None:
    """Whatever the channels' own worth is; what is tried out leaves no trace."""
    model = narrow_network()
    pruning = scored(Pruning(model, F32, SIZE))
    before = {name: value.clone() for name, value in pruning.model.state_dict().items()}
    inner = pruning.model.global_features.bottleneck1[1].depthwise
    seen = []

    def loss() -> float:
        """Of all that there is only one block's expanded channels do not matter."""
        state = pruning.model.state_dict()
        assert pruning.model.training and not pruning.model.classifier.dropout.training
        pruning.model.reference(noise(1, 3, *SIZE))
        silent = {name for name, value in state.items() if not value.equal(before[name])}
        silent = {name for name in silent if not name.endswith("num_batches_tracked")}
        seen.append(silent)
        assert all(torch.equal(b, before[n]) for n, b in state.items() if "running" in n)
        zeros = sum(int((value == 0).sum()) for name, value in state.items() if name in silent)
        return float(zeros and not any("bottleneck1.1.depthwise" in name for name in silent))

    config = pruning.choose(0.995 * operations(model.config, *SIZE), loss)
    assert set(changed(model.config, config)) == {"mid0.1"}
    assert not seen[0] and len(seen) > len(pruning.widths)
    after = pruning.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not pruning.model.training and inner.bn.momentum == 0.1


def changed(before: Config, after: Config) -> dict[str, tuple[int, int]]:
    a, b = places(before), places(after)
    return {name: (a[name], b[name]) for name in a if a[name] != b[name]}


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16", "int8"])
def test_widths_are_what_kernels_like(arithmetic: str) -> None:
    block = ARITHMETICS[arithmetic].channels
    assert block == {"float32": 16, "bfloat16": 32, "int8": 64}[arithmetic]
    model = randomise(FastSCNN(11))
    narrow = prune(model, 0.5, arithmetic=arithmetic)
    assert operations(narrow.config, 512, 1024) <= 0.5 * operations(model.config, 512, 1024)
    assert all(after % block == 0 for _, after in changed(model.config, narrow.config).values())
    assert narrow.config.pyramid_branch_channels * 4 == narrow.config.stage_channels[2]
    check(narrow)


def test_no_residual_connection_comes_or_goes() -> None:
    """A block of stride 1 whose channels would become as many as its input's would begin to add that."""
    model = narrow_network(
        bottlenecks=(*WIDTHS["bottlenecks"][:2], ((64, 64, 1), (64, 64, 1))), num_classes=5
    )
    pruning = scored(Pruning(model, F32, SIZE), bottlenecks_2_0_1=0.0)
    config = pruning.choose(0.995 * operations(model.config, *SIZE))
    assert config.stage_channels[1:] == (48, 32)  # 48 would do
    assert [layer.residual for layer in fast_scnn(config).layers] == [
        layer.residual for layer in fast_scnn(model.config).layers
    ]


def test_taylor_finds_what_the_loss_can_do_without() -> None:
    """Channels whose batch norms are zero are worth nothing, and go first: the logits stay."""
    model = narrow_network()
    dead = model.global_features.bottleneck1[0].depthwise.bn
    with torch.no_grad():
        dead.weight[::3], dead.bias[::3] = 0, 0
    pruning = Pruning(model, F32, SIZE)
    x, labels = noise(2, 3, *SIZE), torch.randint(0, 11, (2, *SIZE))
    for one, truth in zip(x.split(1), labels.split(1)):
        torch.nn.functional.cross_entropy(pruning.model.reference(one), truth).backward()
        pruning.observe()
    assert all(p.grad is None for p in pruning.model.parameters())
    worth = pruning.scores[pruning.model.global_features.bottleneck1[0].expand.conv]
    assert torch.equal(worth == 0, torch.arange(96) % 3 == 0)
    config = pruning.choose(0.99 * operations(model.config, *SIZE))
    assert list(changed(model.config, config)) == ["mid0.0"]
    narrow = pruning.cut(config)
    with torch.no_grad():
        assert torch.allclose(narrow.reference(x), model.reference(x), rtol=1e-4, atol=1e-4)


def test_prune_tries_cuts_out_on_batches() -> None:
    """Whatever the loss says, which is the default cross-entropy here: one cut is that whose loss is the least for its time."""
    model = narrow_network()
    x, labels = noise(2, 3, *SIZE), torch.randint(0, 11, (2, *SIZE), dtype=torch.uint8)
    seen = []

    def loss(logits: Tensor, truth: Tensor) -> Tensor:
        assert torch.equal(truth, labels)
        seen.append(logits.requires_grad)
        return logits.square().mean()

    narrow = prune(model, 0.999, [(x, labels)], loss, "float32", SIZE)
    assert len(changed(model.config, narrow.config)) == 1
    widths = len(Pruning(model, F32, SIZE).widths)
    assert seen[0] and not any(seen[1:]) and len(seen) >= 2 + widths // 2
    with torch.no_grad(), torch.inference_mode():  # wherever it is called
        again = prune(model, 0.999, [(x, labels)], None, "float32", SIZE)
    assert operations(again.config, *SIZE) <= 0.999 * operations(model.config, *SIZE)
    assert all(p.grad is None for p in model.parameters())


def test_prune_tells_one_class_from_its_background() -> None:
    """By the binary cross-entropy, which is that of two classes of which the background's logit is 0."""
    model = narrow_network(num_classes=1)
    x, labels = noise(2, 3, *SIZE), torch.randint(0, 2, (2, *SIZE), dtype=torch.uint8)
    labels[:, :5] = 255

    def of_two(z: Tensor, truth: Tensor) -> Tensor:
        both = torch.cat([torch.zeros_like(z), z], 1)
        found = nn.functional.cross_entropy(both, truth.long(), ignore_index=255)
        binary = nn.functional.binary_cross_entropy_with_logits(z[:, 0, 5:], truth[:, 5:].float())
        assert found.item() == pytest.approx(binary.item(), rel=1e-4)
        return found

    ours, theirs = (
        prune(model, 0.9, [(x, labels)], loss, "float32", SIZE) for loss in (None, of_two)
    )
    assert ours.config == theirs.config
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_prune_takes_any_dtype_and_keeps_it(dtype: torch.dtype) -> None:
    model = narrow_network().to(dtype)
    x, labels = noise(1, 3, *SIZE).to(dtype), torch.randint(0, 11, (1, *SIZE))
    narrow = prune(model, 0.99, [(x, labels)], None, "float32", SIZE)
    assert {p.dtype for p in narrow.parameters()} == {model.classifier.conv.weight.dtype} == {dtype}
    same = prune(model.float(), 0.99, [(x.float(), labels)], None, "float32", SIZE)
    assert narrow.config == same.config and torch.equal(
        narrow.classifier.conv.weight, same.classifier.conv.weight.to(dtype)
    )


def test_the_result_is_an_ordinary_network(tmp_path: Path) -> None:
    """In every way that the package has; parity of widths that nobody chose is tested where the backends are."""
    with drawn_once():  # one small picture may be unlucky in what bfloat16 rounds
        model = narrow_network("tramac", aux=True, size=SIZE)
    model.classes = tuple(f"class {k}" for k in range(11))
    narrow = prune(model, 0.6, arithmetic="float32")
    assert type(narrow) is FastSCNN and not narrow.config.aux and narrow.config.size == SIZE
    assert narrow.classes == model.classes and next(narrow.parameters()).requires_grad
    x = torch.from_numpy(street(0, *SIZE)[0]).permute(2, 0, 1)[None]
    calibrate(narrow, x)
    save_checkpoint(narrow, tmp_path / "narrow.safetensors")
    again = load_checkpoint(tmp_path / "narrow.safetensors")
    assert again.config == narrow.config
    with torch.no_grad():
        ours = narrow.reference(x)
        assert torch.equal(again.reference(x), ours)
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            wanted = fuse(again, "reference", dtype)(x).float()
            off = 1e-5 * ours.norm() + (1.5 * (wanted - ours).norm() if dtype.itemsize == 2 else 0)
            truth = ours if dtype.is_floating_point else wanted
            assert (fuse(again, dtype=dtype)(x).float() - truth).norm() < off
    streets = Examples(Streets(4, 0, (72, 96)))
    recipe = Recipe(
        preset="tramac",
        weights=str(tmp_path / "narrow.safetensors"),
        epochs=1,
        batch=4,
        crop=(64, 64),
    )
    run = Trainer(recipe, streets, None, tmp_path / "run")
    assert run.run() == 0 and run.model.config.bottlenecks == narrow.config.bottlenecks


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"flops": 0}, "flops must be above 0 and below 1, got 0"),
        ({"flops": 1.5}, "flops must be above 0 and below 1, got 1.5"),
        ({"flops": float("nan")}, "flops must be above 0 and below 1, got nan"),
        (
            {"flops": 0.01},
            r"flops must be at least 0\.\d+ .* multiples of 16.* float32 .*, got 0.010",
        ),
        ({"arithmetic": "fp32"}, "arithmetic must be one of float32, .*, got 'fp32'"),
        ({"batches": []}, r"batches must hold at least one \(x, labels\), got none"),
        ({"size": 16}, "size must be at least 32x32, got 16x16"),
        ({"loss": lambda *_: torch.tensor(float("inf"))}, "loss must be finite, got inf"),
    ],
)
def test_prune_refuses(wrong: dict[str, Any], message: str) -> None:
    model = narrow_network()
    batch = noise(1, 3, *SIZE), torch.zeros(1, *SIZE, dtype=torch.uint8)
    given = {"flops": 0.5, "arithmetic": "float32", "size": SIZE, "batches": [batch]} | wrong
    with pytest.raises(ValueError, match=message):
        prune(model, **given)


def test_the_library_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install 'fastscnn_fast\[prune\]'"):
        prune(FastSCNN(3), 0.5)


def test_what_its_config_does_not_describe_is_refused() -> None:
    model = narrow_network()
    model.classifier.conv = nn.Conv2d(48, 7, 1)
    with pytest.raises(ValueError, match=r"submodule classifier\.conv was replaced"):
        prune(model, 0.9, arithmetic="float32")


# --- learning from a teacher ------------------------------------------------------------------------------


def test_folded_is_the_network_in_eval_mode() -> None:
    model = narrow_network("segmentron")
    x = (255 * torch.rand(2, 3, *SIZE)).to(torch.uint8)
    small = Folded(model)(x)
    (unfolded,) = low_logits(model, normalised(x, model.config))
    exact_input = normalise(x, model.config, torch.float64)
    (exact,) = low_logits(copy.deepcopy(model).double(), exact_input)
    parts = (one.detach() for one in (small, unfolded, exact))
    assert_parity(*parts, *BOUNDS["float32"].network)
    small.sum().backward()
    assert model.learning_to_downsample.stem.conv.weight.grad is not None


def test_the_loss_of_a_teacher() -> None:
    """Weight, squared temperature, and the divergence from what the teacher says."""
    model = narrow_network(num_classes=3)
    x = (255 * torch.rand(2, 3, *SIZE)).to(torch.uint8)
    teacher = Teacher(model, Targets(3), 0.5, 2.0)
    theirs = Folded(model)(x).detach()
    assert float(teacher.loss(theirs, theirs)) == pytest.approx(0, abs=1e-6)
    own = torch.randn_like(theirs).requires_grad_()
    p, q = ((z.double() / 2).softmax(1) for z in (theirs, own))
    wanted = 0.5 * 4 * (p * (p / q).log()).sum(1).mean()
    found = teacher.loss(own, theirs)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)
    found.backward()
    assert own.grad is not None and own.grad.abs().max() > 0


def test_one_class_has_a_background_to_learn() -> None:
    model = narrow_network(num_classes=1)
    x = (255 * torch.rand(1, 3, *SIZE)).to(torch.uint8)
    own, theirs = torch.randn(1, 1, 8, 12), Folded(model)(x).detach()
    wanted = torch.zeros((), dtype=torch.float64)
    for sign in (1, -1):  # the class, and its background
        p, q = (torch.nn.functional.logsigmoid(sign * z.double()) for z in (theirs, own))
        wanted += (p.exp() * (p - q)).mean()
    found = Teacher(model, Targets(1), 1.0, 1.0).loss(own, theirs)
    assert float(found) == pytest.approx(float(wanted), rel=1e-4)


def test_any_network_learns_from_a_teacher(streets: Examples, tmp_path: Path) -> None:
    """Beside the labels; none of other classes or channels, and none that counts nothing."""
    save_checkpoint(narrow_network(), tmp_path / "teacher.safetensors")
    recipe = Recipe(
        teacher=str(tmp_path / "teacher.safetensors"),
        distil=2.0,
        epochs=0.5,
        batch=4,
        crop=(64, 64),
        aux_weight=0,
        dtype="float32",
    )
    run = Trainer(recipe, streets, None, tmp_path / "run")
    assert run.run() == 0 and run.teacher is not None
    pictures, labels = next(run.batches.steps(0, 1))
    run.model.eval()
    with torch.no_grad():
        both, logits = run.plain(pictures, labels, run.targets.denominator(labels))
        wanted = run.teacher.loss(logits, run.teacher.network(pictures))
        run.plain.teacher = None
        alone, _ = run.plain(pictures, labels, run.targets.denominator(labels))
    assert wanted > 0.01 and (both - alone).item() == pytest.approx(wanted.item(), rel=1e-3)
    assert Trainer(replace(recipe, distil=0), streets, None, tmp_path / "none").teacher is None
    for changes, message in (
        ({"num_classes": 5}, "teacher must have as many classes as the pictures have, 11, got 5"),
        ({"in_channels": 1}, "teacher must have as many channels as the pictures have, 3, got 1"),
    ):
        save_checkpoint(narrow_network(**changes), tmp_path / "teacher.safetensors")
        with pytest.raises(ValueError, match=message):
            Trainer(recipe, streets, None, tmp_path / "other")


def test_a_teacher_of_other_classes_by_name_is_refused(
    streets: Examples, tmp_path: Path, given: PruneRecipe
) -> None:
    """Also where only the weights to prune say what the classes are called."""
    teacher = narrow_network()
    teacher.classes = CAMVID_CLASSES[::-1]
    save_checkpoint(teacher, tmp_path / "teacher.safetensors")
    named = {"teacher": str(tmp_path / "teacher.safetensors"), "crop": (64, 64), "batch": 4}
    message = "teacher must have the classes of the pictures, Sky, .*, got Bicyclist, "
    with pytest.raises(ValueError, match=message):
        Trainer(Recipe(**named), streets, None, tmp_path)
    weights = narrow_network()
    weights.classes = CAMVID_CLASSES
    save_checkpoint(weights, tmp_path / "weights.safetensors")
    recipe = replace(given, weights=str(tmp_path / "weights.safetensors"), teacher=named["teacher"])
    unnamed = Examples(Streets(8, 0, (72, 96)))
    unnamed.classes = numbered(11)
    with pytest.raises(ValueError, match=message):
        Pruner(recipe, unnamed, None, tmp_path)


def test_a_teacher_whose_stem_has_other_padding(streets: Examples, tmp_path: Path) -> None:
    """Its logits of an odd crop are fewer, and are resized; of others they are taken as they are."""
    save_checkpoint(narrow_network("tramac"), tmp_path / "teacher.safetensors")
    recipe = Recipe(
        teacher=str(tmp_path / "teacher.safetensors"), epochs=0.5, batch=4, crop=(41, 64)
    )
    run = Trainer(recipe, streets, None, tmp_path)
    assert run.run() == 0 and run.teacher is not None
    pictures = torch.zeros(1, 3, 41, 64, dtype=torch.uint8)
    theirs = run.teacher.network(pictures)
    assert theirs.shape[2:] == (5, 8)
    resized = torch.nn.functional.interpolate(theirs, (6, 8), mode="bilinear", align_corners=True)
    own = torch.randn(1, 11, 6, 8)
    assert torch.equal(run.teacher.loss(own, theirs), run.teacher.loss(own, resized))


# --- runs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> PruneRecipe:
    """A short run of a network that has learnt nothing."""
    path = tmp_path_factory.mktemp("given") / "whole.safetensors"
    save_checkpoint(narrow_network("tramac", aux=True), path)
    return PruneRecipe(
        weights=str(path),
        flops=0.85,
        cuts=2,
        spacing=1,
        epochs=2.5,
        batch=4,
        crop=(64, 64),
        dtype="float32",
        arithmetic="float32",
        ema=0.9,
    )


def share_of(run: Pruner) -> float:
    """Operations by those of the network that the run began with."""
    return operations(run.model.config, 512, 1024) / operations(run.unpruned.config, 512, 1024)


def test_a_run(given: PruneRecipe, streets: Examples, tmp_path: Path) -> None:
    val = Examples(Streets(2, 90, (72, 96)))
    run = Pruner(given, streets, val, tmp_path, validations=5, command="the command")
    assert share_of(run) == 1 and run.run() == 0 and run.step == 5
    assert share_of(run) <= 0.85
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    shares = [float(row["flops"]) for row in rows]
    assert [int(row["step"]) for row in rows] == [2, 4, 5]
    assert shares[0] <= 0.85**0.5 and shares[0] >= shares[1] == shares[2] == share_of(run)
    best = load_checkpoint(tmp_path / "best.safetensors")
    assert best.config.bottlenecks == run.model.config.bottlenecks
    assert not best.config.aux and best.config.dsconv_mid_activation == "relu"  # tramac's
    details = read_details(tmp_path / "best.safetensors")
    assert details["flops"] == shares[-1] and details["recipe"]["flops"] == 0.85
    assert details["command"] == "the command" and details["miou"] == run.best


def test_a_step_follows_the_last_cut(given: PruneRecipe, streets: Examples, tmp_path: Path) -> None:
    """Where the epochs after it are no whole step, too."""
    recipe = replace(given, batch=16, cuts=3, spacing=0.8, epochs=2)
    run = Pruner(recipe, streets, None, tmp_path)
    assert run.run() == 0 and run.step == 2 and share_of(run) <= 0.85


def test_the_best_is_of_those_since_the_last_cut(
    given: PruneRecipe, streets: Examples, tmp_path: Path
) -> None:
    """However well the wider networks did."""
    run = Pruner(replace(given, epochs=1.5), streets, None, tmp_path)
    run.best = 0.99
    assert run.run() == 0 and run.best == -1.0
    best = load_checkpoint(tmp_path / "best.safetensors")
    assert best.config.bottlenecks == run.model.config.bottlenecks


def test_classes_keep_their_names(
    given: PruneRecipe, streets: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the weights, where the pictures' are numbers."""
    model = load_checkpoint(given.weights or "")
    model.classes, model.palette = CAMVID_CLASSES, [(k, k, k) for k in range(11)]
    save_checkpoint(model, tmp_path / "named.safetensors")
    monkeypatch.setattr(streets, "classes", numbered(11))
    recipe = replace(given, weights=str(tmp_path / "named.safetensors"), epochs=1.25)
    assert Pruner(recipe, streets, None, tmp_path).run() == 0
    best = load_checkpoint(tmp_path / "best.safetensors")
    assert best.classes == CAMVID_CLASSES and best.palette == tuple(model.palette)


def state_of(run: Trainer) -> dict[str, Tensor]:
    assert run.average is not None
    state = {f"model.{k}": v for k, v in run.model.state_dict().items()}
    state |= {f"average.{k}": v for k, v in run.average.state_dict().items()}
    for index, values in run.optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{k}": v for k, v in values.items() if v is not None}
    return state


@pytest.mark.parametrize("importance", ["taylor", "norm"])
def test_interrupted_anywhere_and_resumed_is_uninterrupted(
    importance: str,
    given: PruneRecipe,
    streets: Examples,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit: stopped by a signal and killed, before, at and after a cut."""
    recipe = replace(given, importance=importance)
    whole = Pruner(recipe, streets, None, tmp_path / "whole")
    assert whole.run() == 0

    class Killed(BaseException):
        """What ends a process at once, as far as its files can tell."""

    def killed(self: Pruner) -> None:
        if self.step == at:
            raise Killed
        signalled(self)

    def signalled(self: Pruner) -> None:
        before_step(self)
        if self.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    before_step = Pruner._before_step
    monkeypatch.setattr(Pruner, "_before_step", killed)
    monkeypatch.setattr(trainer, "_SAVE_SECONDS", -1.0)  # after each step
    for ends in ((1, 9), (2, 9), (9, 2), (9, 3)):
        at, stop = ends
        part = Pruner(recipe, streets, None, tmp_path / "parts")
        if ends != (1, 9):
            part.resume()
        if at < 9:
            with pytest.raises(Killed):
                part.run()
        else:
            assert part.run() == 128 + signal.SIGTERM
    at = stop = 9
    rest = Pruner(recipe, streets, None, tmp_path / "parts")
    rest.resume()
    assert rest.step == 4 and share_of(rest) <= 0.85 and rest.run() == 0
    ours, theirs = state_of(whole), state_of(rest)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    files = [load_checkpoint(tmp_path / d / "best.safetensors") for d in ("whole", "parts")]
    assert all(map(torch.equal, *(f.state_dict().values() for f in files)))


def test_more_epochs_come_after_the_last_cut(
    given: PruneRecipe, streets: Examples, tmp_path: Path
) -> None:
    run = Pruner(given, streets, None, tmp_path)
    assert run.run() == 0
    longer = Pruner(replace(given, epochs=4), streets, None, tmp_path)
    longer.resume()
    assert longer.run() == 0 and longer.model.config == run.model.config
    assert longer.step == 8


def test_other_weights_under_the_same_name_are_refused(
    given: PruneRecipe, streets: Examples, tmp_path: Path
) -> None:
    assert given.weights is not None
    path = tmp_path / "weights.safetensors"
    path.write_bytes(Path(given.weights).read_bytes())
    recipe = replace(given, weights=str(path), epochs=1.25)
    assert Pruner(recipe, streets, None, tmp_path / "run").run() == 0
    save_checkpoint(narrow_network("tramac"), path)
    with pytest.raises(ValueError, match="content of teacher must be .* to go on with"):
        Pruner(recipe, streets, None, tmp_path / "run").resume()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weights": None}, "weights must be given to prune, got None"),
        ({"flops": 1.0}, "flops must be above 0 and below 1, got 1.0"),
        ({"cuts": 0}, "cuts must be at least 1, got 0"),
        ({"spacing": 0.0}, "spacing must be positive, got 0.0"),
        ({"epochs": 7.0}, "epochs must be above the 7 until the last cut, got 7.0"),
        ({"distil": -1.0}, "distil must be at least 0, got -1.0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"importance": "size"}, "importance must be one of taylor, norm, got 'size'"),
        ({"arithmetic": "fp8"}, "arithmetic must be one of float32, .*, got 'fp8'"),
        ({"aux_weight": 0.4}, "aux_weight must be 0.0 to prune: .*, got 0.4"),
        ({"quantize": True}, "quantize must be False to prune: .*, got True"),
        ({"preset": "tramac"}, "preset must be paper to prune: .*, got tramac"),
    ],
)
def test_recipe_refuses(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruneRecipe(**({"weights": "camvid11"} | wrong))


def test_data_that_do_not_fit_are_refused(
    given: PruneRecipe, streets: Examples, tmp_path: Path
) -> None:
    save_checkpoint(narrow_network(num_classes=5), tmp_path / "five.safetensors")
    five = replace(given, weights=str(tmp_path / "five.safetensors"))
    with pytest.raises(ValueError, match="weights must have as many classes as .*, 11, got 5"):
        Pruner(five, streets, None, tmp_path / "run")
    other = narrow_network()
    other.classes = tuple("abcdefghijk")
    save_checkpoint(other, tmp_path / "other.safetensors")
    named = replace(given, weights=str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match=r"classes of the pictures, Sky, .*, got a, b, c"):
        Pruner(named, streets, None, tmp_path / "run")
    with pytest.raises(ValueError, match=r"flops must be at least 0\.\d+ of what they are"):
        Pruner(replace(given, flops=0.01), streets, None, tmp_path / "run")


def test_the_command(
    given: PruneRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    command_line.add_options(parser)
    options = {option for action in parser._actions for option in action.option_strings}
    settled = {f.name for f in dataclasses.fields(PruneRecipe) if "settled" in f.metadata}
    assert settled == {"preset", "aux_weight", "quantize"}
    for field in dataclasses.fields(PruneRecipe):
        assert ("--" + field.name.replace("_", "-") in options) == (field.name not in settled)
    words = "--flops 0.85 --cuts 2 --spacing 1 --epochs 2 --batch 4 --crop 64x64 --dtype float32"
    command = ["prune", "streets:8", "--splits", "train", "val", "-o", str(tmp_path / "run")]
    assert main(command) == 2
    assert "weights must be given to prune" in capsys.readouterr().err
    words += f" --arithmetic float32 --size 64x96 --weights {given.weights}"
    assert main([*command, *words.split()]) == 0
    shown = capsys.readouterr().out
    assert "of the operations on val" in shown and "best.safetensors" in shown
    details = read_details(tmp_path / "run" / "best.safetensors")
    assert details["command"].startswith("python -m fastscnn_fast prune streets:8")
    assert details["flops"] <= 0.85
    assert main([*command, *words.split()]) == 2
    assert "holds a run already; add --resume" in capsys.readouterr().err
    assert main([*command, "--resume", "--epochs", "3"]) == 0
    assert main([*command, "--resume", "--flops", "0.8", "--epochs", "4"]) == 2
    assert "flops must be 0.85 to go on with" in capsys.readouterr().err
