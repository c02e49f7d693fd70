"""Checkpoints as training code leaves them: containers, prefixes, averages, strays; other heads and stems."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomise
from layouts import SMALL, key_lists, random_state
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fastscnn_fast import FastSCNN, load_checkpoint
from fastscnn_fast.backends import registry
from fastscnn_fast.checkpoints import (
    CheckpointError,
    from_state_dict,
    read,
    read_details,
    save_checkpoint,
    to_layout,
)
from fastscnn_fast.compat import tramac
from fastscnn_fast.data.classes import numbered

State = dict[str, Any]


@pytest.fixture(autouse=True)
def heard() -> None:
    """What is said once is said in each test."""
    registry.log_once.cache_clear()


def network(layout: str = "tramac", **more: Any) -> tuple[FastSCNN, State]:
    model = randomise(
        FastSCNN(5, layout if layout != "fastscnn_fast" else "paper", **SMALL, **more)
    )
    assert isinstance(model, FastSCNN)
    return model, to_layout(model, layout)


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def same(model: FastSCNN, expected: FastSCNN) -> bool:
    a, b = model.state_dict(), expected.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


CRITERION = {"criterion.weight": torch.ones(5), "criterion.index": torch.arange(5)}

# How a state_dict stands in a file, and what is said of it.
WILD: dict[str, tuple[Callable[[State], Any], str]] = {
    "AveragedModel": (
        lambda s: {"n_averaged": torch.tensor(7), **under("module.", s)},
        "ignored, as not of the network: n_averaged$",
    ),
    "Lightning, with a criterion": (
        lambda s: {
            "epoch": 3,
            "global_step": 100,
            "state_dict": under("model.", s) | CRITERION,
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        },
        "network: criterion.weight, criterion.index$",
    ),
    "Lightning, another attribute": (
        lambda s: {"state_dict": under("segmenter.", s) | {"val_iou.confmat": torch.zeros(5, 5)}},
        "network: val_iou.confmat$",
    ),
    "Lightning's WeightAveraging": (
        lambda s: {
            "state_dict": under("net.", s),
            "current_model_state": under("net.", perturbed(s)),
            "averaging_state": {"n_averaged": torch.tensor(2)},
        },
        "networks in state_dict.net, current_model_state.net: state_dict.net is taken",
    ),
    "a criterion within the decode head": (
        lambda s: s | {"classifier.loss_decode.class_weight": torch.ones(5)},
        "network: classifier.loss_decode.class_weight$",
    ),
    "criterion at the top, in ddp and compiled": (
        lambda s: under("module._orig_mod.", under("model.", s) | CRITERION),
        "network: module._orig_mod.criterion.weight, ",
    ),
    "timm": (
        lambda s: {"arch": "x", "state_dict": perturbed(s), "state_dict_ema": under("module.", s)},
        "in state_dict_ema, state_dict: state_dict_ema, an average of weights, is taken",
    ),
    "model and ema": (
        lambda s: {"model": perturbed(s), "ema": s, "updates": 3},
        "in ema, model: ema, an average of weights, is taken",
    ),
    "model_ema of torchvision's references": (
        lambda s: {
            "model": perturbed(s),
            "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(2)}}},
            "model_ema": {"n_averaged": torch.tensor(3), **under("module.", s)},
        },
        "in model_ema, model: model_ema, an average",
    ),
    "ema of an ema": (
        lambda s: {"ema": {"decay": 0.9, "updates": 5, "module": s}, "model": perturbed(s)},
        "in ema.module, model: ema.module, an average",
    ),
    "mmengine's swapped ema": (
        lambda s: {
            "meta": {},
            "state_dict": s,
            "ema_state_dict": {"steps": torch.tensor(9), **under("module.", perturbed(s))},
        },
        "in state_dict, ema_state_dict: state_dict is taken",
    ),
    "ema_state_dict": (
        lambda s: {"model_state_dict": perturbed(s), "ema_state_dict": s},
        "ema_state_dict, an average of weights, is taken",
    ),
    "mmcv's ema buffers": (
        lambda s: {"state_dict": s | {f"ema_{k.replace('.', '_')}": v for k, v in s.items()}},
        "network: ema_learning_to_downsample_.* and [0-9]+ more$",
    ),
    "ema of parameters alone": (
        lambda s: {
            "model": s,
            "ema": {k: v for k, v in perturbed(s).items() if "running" not in k and v.dim()},
        },
        "ema is no whole network, and ignored: [0-9]+ missing",
    ),
    "mean teacher": (
        lambda s: under("ema_model.", s) | under("model.", perturbed(s)),
        "in ema_model, model: ema_model, an average of weights, is taken",
    ),
    "weights": (lambda s: {"weights": s, "epoch": 3}, ""),
    "params": (lambda s: {"params": s}, ""),
    "a name that nobody knows": (lambda s: {"generator": {"best": s}, "args": {"lr": 0.1}}, ""),
    "beside its optimizer": (
        lambda s: s | {"optimizer": {"param_groups": []}, "epoch": 3},
        "network: optimizer, epoch$",
    ),
    "parts in wrappers": (
        lambda s: {
            k.replace("classifier.", "classifier.module.").replace("conv.0", "conv.0._orig_mod"): v
            for k, v in s.items()
        },
        "",
    ),
    "one network under two names": (lambda s: {"a": s, "b": {"c": s}}, ""),
    "a list of scores beside": (lambda s: {"net": s, "scores": [0.1, 0.2]}, ""),
    "other networks beside": (
        lambda s: under("student.", s) | {"teacher.layer1.0.conv1.weight": torch.zeros(3, 3, 3, 3)},
        "network: teacher.layer1.0.conv1.weight$",
    ),
}


def perturbed(state: State) -> State:
    return {k: v + 1 if v.is_floating_point() else v.clone() for k, v in state.items()}


@pytest.mark.parametrize("kind", WILD)
@pytest.mark.parametrize("layout", ["tramac", "fastscnn_fast"])
def test_checkpoints_in_the_wild(
    kind: str, layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, said = WILD[kind]
    model, state = network(layout, **({"aux": True} if layout == "tramac" else {}))
    torch.save(make(state), tmp_path / "wild.pth")
    got = load_checkpoint(tmp_path / "wild.pth")
    assert got.config == model.config and same(got, model)
    lines = [record.getMessage() for record in caplog.records]
    if said:
        assert any(re.search(said, line) for line in lines), lines
        assert all(line.startswith(f"{tmp_path}/wild.pth: ") for line in lines)
    else:
        assert not lines
    if make(state).keys() == state.keys() | CRITERION.keys():
        assert read(tmp_path / "wild.pth")[0].keys() == state.keys()


def test_mmseg_with_what_its_training_keeps(caplog: pytest.LogCaptureFixture) -> None:
    state = random_state(key_lists()["mmseg"])
    more = {
        "decode_head.loss_decode.0.class_weight": torch.ones(19),
        "data_preprocessor.mean": torch.zeros(3),
    }
    got = from_state_dict({"meta": {"epoch": 1}, "state_dict": state | more})
    back = to_layout(got, "mmseg")
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)
    assert "decode_head.loss_decode.0.class_weight, data_preprocessor.mean" in caplog.text


def test_what_is_in_the_network_is_not_ignored() -> None:
    """It would compute something else."""
    _, state = network()
    for key in (
        "classifier.dsconv1.se.fc.weight",
        "global_feature_extractor.attention.weight",
        "feature_fusion.bias",
        "learning_to_downsample.conv.extra.weight",
    ):
        with pytest.raises(CheckpointError, match=rf"1 unexpected \(first: {key}\)"):
            from_state_dict(state | {key: torch.zeros(3)})
        with pytest.raises(CheckpointError, match=rf"2 unexpected \(first: {key}\)"):
            from_state_dict(under("model.", state | {key: torch.zeros(3)}) | {"n": torch.zeros(1)})


def test_networks_that_nothing_tells_apart_are_refused(tmp_path: Path) -> None:
    _, state = network()
    path = tmp_path / "two.pth"
    for content, names in (
        (under("student.", state) | under("teacher.", perturbed(state)), "student and in teacher"),
        ({"ema": state, "swa": perturbed(state)}, "ema and in swa"),
        ({"a": {"x": state}, "b": {"y": perturbed(state)}}, "a.x and in b.y"),
    ):
        torch.save(content, path)
        with pytest.raises(
            CheckpointError, match=f"two.pth: holds more than one network, in {names}"
        ):
            load_checkpoint(path)
        with pytest.raises(CheckpointError, match="holds more than one network"):
            read(path)
    assert from_state_dict(content["a"]).config.num_classes == 5


def test_averaged_model_itself() -> None:
    """As torch writes it, with and without averaged buffers."""
    model, _ = network("fastscnn_fast")
    averaged = AveragedModel(model, use_buffers=True)
    averaged.update_parameters(model)
    assert same(from_state_dict(averaged.state_dict()), model)
    assert same(from_state_dict(nn.DataParallel(averaged).state_dict()), model)


def test_the_drop_in_takes_them_too(tmp_path: Path) -> None:
    _, state = network()
    theirs = tramac.FastSCNN(19)
    full = theirs.state_dict()
    torch.save(
        {"n_averaged": torch.tensor(1), **under("module.", full)}, tmp_path / "fast_scnn_citys.pth"
    )
    got = tramac.get_fast_scnn("citys", pretrained=True, root=tmp_path)
    assert all(torch.equal(v, full[k]) for k, v in got.state_dict().items())
    torch.save({"state_dict": state}, tmp_path / "fast_scnn_citys.pth")
    with pytest.raises(RuntimeError, match="size mismatch"):
        tramac.get_fast_scnn("citys", pretrained=True, root=tmp_path)


def test_a_maze_of_dictionaries_costs_little() -> None:
    """Each level names the next one a thousand times; and one that contains itself holds a network all the same."""
    deep: dict[str, Any] = {"a.weight": torch.zeros(1)}
    for _ in range(12):
        deep = {str(k): deep for k in range(1000)}
    with pytest.raises(CheckpointError, match="nested more than 8 dictionaries deep"):
        from_state_dict(deep)
    model, state = network()
    around: dict[str, Any] = {"net": state}
    around["self"] = around
    assert same(from_state_dict(around), model)
    names = {".".join("a" * 3000) + f"{k}": torch.zeros(1) for k in range(200)}
    with pytest.raises(CheckpointError, match="no known Fast-SCNN"):
        from_state_dict(names)


# --- other classes and channels --------------------------------------------------------------------------


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("own", [True, False])
def test_a_new_head(own: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, state = network("tramac", aux=True)
    model.classes = ("a", "b", "c", "d", "e")
    path = tmp_path / ("net.safetensors" if own else "net.pth")
    if own:
        save_checkpoint(model, path)
    else:
        torch.save(state, path)
    torch.manual_seed(1)
    got = load_checkpoint(path, num_classes=3)
    assert said(caplog) == [
        f"{path}: has 5 classes: classifier.conv, auxiliary.downsample.conv of 3 starts at random, to be trained"
    ]
    assert got.config.num_classes == 3 and got.classes == numbered(3) and not got.training
    before, after = model.state_dict(), got.state_dict()
    for name, tensor in after.items():
        if name.startswith(("classifier.conv.", "auxiliary.downsample.conv.")):
            assert tensor.shape == (3, *before[name].shape[1:]) and tensor.std() > 0
        else:
            assert torch.equal(tensor, before[name])
    torch.manual_seed(1)
    assert same(load_checkpoint(path, num_classes=3), got)
    assert got.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 3, 64, 64)
    caplog.clear()
    same_number = load_checkpoint(path, num_classes=5)
    assert same(same_number, model) and not said(caplog)
    assert same_number.classes == (model.classes if own else numbered(5))
    with pytest.raises(
        CheckpointError, match="num_classes must be an integer of at least 1, got 0"
    ):
        load_checkpoint(path, num_classes=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_stem(dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One channel: the sum; more: the channels in turn, scaled by 3 / channels. As timm does."""
    _, state = network()
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    path = tmp_path / "net.pth"
    torch.save(state, path)
    weight = state["learning_to_downsample.conv.conv.0.weight"].float()
    expected = {
        1: weight.sum(1, keepdim=True),
        2: weight[:, :2] * 3 / 2,
        4: weight[:, [0, 1, 2, 0]] * 3 / 4,
    }
    means = {1: (0.449,), 2: (0.485, 0.456), 4: (0.485, 0.456, 0.406, 0.485)}
    for channels, want in expected.items():
        caplog.clear()
        got = load_checkpoint(path, in_channels=channels)
        stem = got.learning_to_downsample.stem.conv.weight
        assert torch.equal(stem, want.to(dtype)) and stem.dtype == dtype
        assert got.config.mean == pytest.approx(means[channels])
        assert len(got.config.std) == channels
        assert [line.partition(", with")[0] for line in said(caplog)] == [
            f"{path}: has 3 input channels: its first convolution is adapted to {channels}"
        ]
        rest = {k: v for k, v in got.state_dict().items() if "stem.conv" not in k}
        whole = load_checkpoint(path).state_dict()
        assert all(torch.equal(v, whole[k]) for k, v in rest.items())
    given = load_checkpoint(path, in_channels=1, num_classes=2, mean=(0.1,), std=(0.2,))
    assert (given.config.mean, given.config.std, given.config.num_classes) == ((0.1,), (0.2,), 2)
    for channels in (0, 5):
        with pytest.raises(CheckpointError, match="in_channels must be"):
            load_checkpoint(path, in_channels=channels)
    with pytest.raises(CheckpointError, match="mean must hold one finite number"):
        load_checkpoint(path, in_channels=1, mean=(0.1, 0.2))


def test_a_grey_network_takes_colours(tmp_path: Path) -> None:
    """It then sees the mean of the channels."""
    model, state = network(in_channels=1)
    got = from_state_dict(state, in_channels=3)
    assert got.config.mean == (0.5,) * 3
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(
        got.reference(x), model.eval().reference(x.mean(1, keepdim=True)), atol=1e-4
    )


# --- what is saved is what is loaded ---------------------------------------------------------------------


def test_a_replaced_head_is_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "net.safetensors"
    model, _ = network("fastscnn_fast")
    model.classes = ("a", "b", "c", "d", "e")
    model.classifier.conv = nn.Conv2d(48, 2, 1)
    save_checkpoint(model, path, {"miou": 0.5})
    assert said(caplog) == ["model.classes names 5 classes and is not saved: the model has 2 now"]
    got = load_checkpoint(path)
    assert got.config.num_classes == 2 and same(got, model) and got.classes == numbered(2)
    assert read_details(path) == {"miou": 0.5}
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(got.reference(x), model.eval().reference(x))


def test_replaced_channels_and_widths_are_followed(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    model, _ = network("fastscnn_fast", aux=True)
    block = model.global_features.bottleneck2[0]
    assert isinstance(block, nn.Module)
    block.expand = type(block.expand)(16, 7)
    block.depthwise = type(block.depthwise)(7, 7, 3, 2, groups=7)
    block.project = type(block.project)(7, 32, activation="none")
    model.auxiliary = nn.ModuleDict()
    save_checkpoint(model, path)
    got = load_checkpoint(path)
    assert got.config.bottlenecks[1][0] == (7, 32, 2) and not got.config.aux and same(got, model)


def test_wrapped_models_are_saved(tmp_path: Path) -> None:
    model, _ = network("fastscnn_fast")
    for index, wrapped in enumerate(
        (torch.compile(model), nn.DataParallel(model), AveragedModel(model, use_buffers=True))
    ):
        path = tmp_path / f"{index}.safetensors"
        save_checkpoint(wrapped, path)  # type: ignore[arg-type]
        assert same(load_checkpoint(path), model)


def _replace(model: FastSCNN, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("classifier.conv", nn.Conv2d(48, 5, 3, padding=1), "1 of another shape .*classifier.conv"),
        (
            "classifier.conv",
            nn.Conv2d(48, 5, 1, bias=False),
            r"1 missing \(first: classifier.conv.b",
        ),
        ("classifier.conv", nn.Sequential(nn.Conv2d(48, 5, 1)), r"2 missing .*2 unexpected"),
        ("classifier.conv", nn.Identity(), "missing"),
        ("classifier.act", nn.ReLU(), "submodule classifier.act was replaced or changed"),
        (
            "classifier.dsconv1.pointwise.act",
            nn.SiLU(),
            "submodule classifier.dsconv1.pointwise.act",
        ),
        ("extra", nn.Linear(2, 2), r"2 unexpected \(first: extra.weight\)"),
        (
            "learning_to_downsample.stem.conv",
            nn.Conv2d(3, 16, 3, 1, 1, bias=False),
            "stem.conv was",
        ),
        (
            "learning_to_downsample.stem.bn",
            nn.BatchNorm2d(16, eps=1e-3),
            "stem.bn must have eps 1e-05",
        ),
        ("auxiliary.global.conv", nn.Conv2d(32, 4, 1), "of another shape .*auxiliary.global.conv"),
    ],
)
def test_what_no_file_describes_is_refused_when_saving(
    name: str, module: nn.Module, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "net.safetensors"
    model, _ = network("fastscnn_fast", aux=True)
    save_checkpoint(model, path)
    before = path.read_bytes()
    _replace(model, name, copy.deepcopy(module))
    with pytest.raises(
        ValueError, match=f"model must be a network that a file can describe.*{message}"
    ):
        save_checkpoint(model, path)
    assert path.read_bytes() == before


# --- files that are something else -----------------------------------------------------------------------


def test_programs_are_called_what_they_are(tmp_path: Path) -> None:
    model, _ = network("fastscnn_fast")
    path = tmp_path / "program.pt"
    torch.jit.save(torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU())), path)
    with zipfile.ZipFile(path) as archive:  # as real ones are: compressed code beside the tensors
        assert any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    with pytest.raises(CheckpointError, match=r"a TorchScript program, .*torch\.jit\.load"):
        load_checkpoint(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model.eval(), torch.zeros(1, 3, 64, 64), check_trace=False)
    torch.jit.save(traced, path)
    with pytest.raises(CheckpointError, match=r"a TorchScript program, .*torch\.jit\.load"):
        load_checkpoint(path)
    torch.save(torch.jit.load(path).state_dict(), tmp_path / "state.pt")  # as the message says
    assert same(load_checkpoint(tmp_path / "state.pt"), model)
    program = torch.export.export(nn.Sequential(nn.Conv2d(3, 3, 3)), (torch.zeros(1, 3, 8, 8),))
    torch.export.save(program, path)
    with pytest.raises(CheckpointError, match=r"a program of torch\.export, .*torch\.export\.load"):
        load_checkpoint(path)


def _metadata(**values: str) -> dict[str, str]:
    return {f"fastscnn_fast.{name}": value for name, value in values.items()}


@pytest.mark.parametrize("key", ["config", "details"])
@pytest.mark.parametrize(
    "text",
    ["", "no JSON", "[" * 100_000, '{"a":' * 100_000, '{"a": 1', "[]", "3", "null", "9" * 5000],
    ids=lambda text: text[:8],
)
def test_damaged_metadata(key: str, text: str, tmp_path: Path) -> None:
    model, _ = network("fastscnn_fast")
    path = tmp_path / "net.safetensors"
    whole = _metadata(config=json.dumps(model.config.to_dict()))
    save_file(dict(model.state_dict()), path, whole | _metadata(**{key: text}))
    with pytest.raises(CheckpointError, match=r"net\.safetensors: is damaged"):
        load_checkpoint(path)
    if key == "details":
        with pytest.raises(CheckpointError, match=r"net\.safetensors: is damaged"):
            read_details(path)


def test_details_of_what_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    for make, message in (
        (lambda: path.mkdir(), "not a regular file"),
        (lambda: path.touch(), "is empty"),
    ):
        make()
        with pytest.raises(CheckpointError, match=message):
            read_details(path)
        path.rmdir() if path.is_dir() else path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_details(path)
    with pytest.raises(FileNotFoundError):
        read_details(tmp_path / "none.safetensors")


def test_tensors_are_copies(tmp_path: Path) -> None:
    model, state = network()
    got: dict[str, Tensor] = from_state_dict({"ema": state}).state_dict()
    assert all(got[k].data_ptr() != v.data_ptr() for k, v in model.state_dict().items())
