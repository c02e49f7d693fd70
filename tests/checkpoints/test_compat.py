from __future__ import annotations

import copy
import inspect
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import third_party
import torch
from helpers import assert_labels, randomise
from layouts import key_lists
from torch import Tensor, nn

from fastscnn_fast import FastSCNN, FusedFastSCNN, accelerate, load_checkpoint
from fastscnn_fast.backends import registry
from fastscnn_fast.checkpoints import CheckpointError, from_state_dict, save_checkpoint
from fastscnn_fast.compat import tramac

THEIRS: dict[str, Any] = {
    "tramac": third_party.Tramac,
    "mmseg": third_party.MMSeg,
    "mmseg_legacy": lambda **k: third_party.MMSeg(legacy=True, **k),
    "segmentron": third_party.SegmenTron,
    "zacario": third_party.Zacario,
    "leftthomas": third_party.LeftThomas,
    "paper": lambda **k: third_party.MMSeg(paper=True, **k),
}


def lively(module: nn.Module) -> nn.Module:
    """Weights that keep every layer's signal alive, so that any change of any layer shows in the logits."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
    return randomise(module)


def first(y: Any) -> Tensor:
    return y[0] if isinstance(y, (tuple, list)) else y


# --- the presets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", THEIRS)
def test_presets_compute_what_the_published_code_does(name: str) -> None:
    theirs = lively(THEIRS[name]()).double().eval()
    ours = from_state_dict(theirs.state_dict(), preset=name)
    for size in ((64, 96), (128, 32)):
        x = 3 * torch.randn(1, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            y = first(theirs(x))
            if y.shape[2:] != x.shape[2:]:
                y = third_party.up(y, size, corners=False)
            torch.testing.assert_close(ours.reference(x), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["tramac", "zacario", "segmentron"])
def test_auxiliary_heads_compute_what_the_published_code_does(name: str) -> None:
    theirs = lively(THEIRS[name](aux=True)).double().eval()
    ours = from_state_dict(theirs.state_dict())
    ours.training = True  # the root alone: batch norm and dropout stay in eval mode
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        logits, auxiliary = ours(x)
        for y, want in zip((logits, *auxiliary), theirs(x), strict=True):
            torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)


# --- accelerate ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(THEIRS) - {"paper"}))
def test_accelerate(name: str) -> None:
    theirs = lively(THEIRS[name](classes=7)).train()
    theirs.classifier.eval() if hasattr(theirs, "classifier") else theirs.backbone.eval()
    flags = [module.training for module in theirs.modules()]
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    random_state_before = torch.get_rng_state()
    fast = accelerate(theirs)
    assert torch.equal(torch.get_rng_state(), random_state_before)
    assert [module.training for module in theirs.modules()] == flags
    assert all(torch.equal(value, state[key]) for key, value in theirs.state_dict().items())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        y = first(theirs.eval()(x))
        if y.shape[2:] != x.shape[2:]:
            y = third_party.up(y, x.shape[2:], corners=False)
    torch.testing.assert_close(first(fast(x)), y, rtol=1e-3, atol=1e-3 * y.std().item())
    assert fast.config.num_classes == 7


@pytest.mark.parametrize("name", ["tramac", "segmentron"])
def test_accelerate_takes_one_class(name: str) -> None:
    theirs = lively(THEIRS[name](classes=1)).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        logits = first(theirs(x))
        *_, bias = theirs.classifier.parameters()
        bias -= logits.median()
        logits -= logits.median()
    fast, close = accelerate(theirs), 1e-3 * logits.std().item()
    torch.testing.assert_close(fast.probabilities(x), logits.sigmoid(), rtol=1e-3, atol=close)
    assert_labels(fast.labels(x), logits.double(), close)
    assert 0.3 < fast.labels(x).double().mean() < 0.7


class Pair(NamedTuple):
    main: Any
    rest: Any


CONTAINERS: dict[str, Callable[[tuple[Tensor, ...]], Any]] = {
    "tuple": lambda y: y,
    "list": list,
    "dictionary": lambda y: {"out": y[0], "aux": y[1]},
    "ordered dictionary, logits last": lambda y: OrderedDict(aux=y[1], out=y[0]),
    "named tuple": lambda y: Pair(y[0], y[1]),
    "nested": lambda y: {"out": [y[0]], "rest": (y[1], None, 7)},
    "tensor": lambda y: y[0],
    "tuple of one": lambda y: (y[0],),
}


def same(got: Any, want: Any) -> None:
    """Of the same types all the way down, with equal tensors in the same places."""
    assert type(got) is type(want)
    if isinstance(want, Tensor):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.std().item())
    elif isinstance(want, dict):
        assert list(got) == list(want)
        same(list(got.values()), list(want.values()))
    elif isinstance(want, (tuple, list)):
        assert len(got) == len(want)
        for ours, theirs in zip(got, want):
            same(ours, theirs)
    else:
        assert got == want


@pytest.mark.parametrize("name", CONTAINERS)
def test_accelerate_keeps_the_container(name: str) -> None:
    class Theirs(third_party.Tramac):
        def forward(self, x: Tensor) -> Any:
            return CONTAINERS[name](super().forward(x))

    theirs = lively(Theirs(aux=True)).eval()
    fast = accelerate(theirs)
    assert isinstance(fast, FusedFastSCNN)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        want = theirs(x)
    for network in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        same(network(x), want)
    logits = CONTAINERS["tuple"](third_party.Tramac.forward(theirs, x))[0]
    assert (fast.labels(x) == logits.argmax(1)).float().mean() > 0.999
    assert fast.probabilities(x).shape == logits.shape
    out = torch.empty_like(logits)
    same(fast(x, out=out), want)
    torch.testing.assert_close(out, logits.detach(), rtol=1e-3, atol=1e-3 * logits.std().item())


@pytest.mark.parametrize("name", ["tramac", "zacario", "segmentron"])
@pytest.mark.parametrize("aux", [False, True])
def test_accelerate_keeps_auxiliary_results_in_their_places(name: str, aux: bool) -> None:
    theirs = lively(THEIRS[name](aux=aux)).eval()
    fast = accelerate(theirs)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        same(fast(x), theirs(x))
    assert [p for p in fast.parameters() if p.requires_grad] == []


def test_accelerate_keeps_what_the_drop_in_returns() -> None:
    model = lively(tramac.FastSCNN(5, aux=True, mean=(0.1, 0.2, 0.3))).train()
    fast = accelerate(model)
    x = torch.randint(256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        same(fast(x), copy.deepcopy(model).eval()(x))
    assert model.training and fast.config == model.config


def test_accelerate_says_what_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    class Features(third_party.Tramac):
        def forward(self, x: Tensor) -> Any:
            return {"features": x.mean((2, 3)), "out": super().forward(x)[0]}

    registry.log_once.cache_clear()
    result = accelerate(Features())(torch.randn(1, 3, 64, 96))
    assert list(result) == ["features", "out"] and result["features"] is None
    assert "None stands for what Features returns" in caplog.text


class Wrapper(nn.Module):
    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)


def test_accelerate_sees_through_wrappers() -> None:
    theirs = third_party.Tramac()
    compiled = Wrapper("_orig_mod", theirs)  # as torch.compile names it
    for wrapped in (nn.DataParallel(theirs), Wrapper("module", compiled)):
        assert accelerate(wrapped).config.num_classes == 19


def test_accelerate_takes_overrides_and_own_models() -> None:
    fast = accelerate(third_party.Tramac(), backend="reference", mean=(0, 0, 0), std=(1, 1, 1))
    assert fast.backend == "reference"
    assert fast.config.mean == (0, 0, 0)
    model = FastSCNN(3, pyramid_bins=(1, 4))
    assert accelerate(nn.DataParallel(model)).config == model.config
    assert accelerate(tramac.FastSCNN(3, aux=True)).config.num_classes == 3


def test_accelerate_calls_the_plain_forward_of_old_mmsegmentation() -> None:
    class OldMMSeg(third_party.MMSeg):
        def forward(self, img: Tensor, img_metas: Any) -> Tensor:
            raise AssertionError("needs meta data")

        def forward_dummy(self, img: Tensor) -> Tensor:
            return third_party.up(super().forward(img), img.shape[2:], corners=False)

    assert accelerate(OldMMSeg()).config.num_classes == 19


class Relu6Late(third_party.Tramac):
    """ReLU6 in one bottleneck's expansion only."""

    def __init__(self) -> None:
        super().__init__()
        stage = self.global_feature_extractor["bottleneck1"]
        stage[0].block[0].conv[2] = nn.ReLU6()


def broken_bins() -> nn.Module:
    net = third_party.LeftThomas()
    net.global_feature_extractor["ppm"]["stages"][3][0] = nn.AdaptiveAvgPool2d(5)
    return net


def broken_eps() -> nn.Module:
    net = third_party.MMSeg()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    return net


def broken_dilation() -> nn.Module:
    net = third_party.LeftThomas()
    convolution = net.feature_fusion["dwconv"].conv
    convolution.dilation = convolution.padding = (1, 1)
    return net


WRONG = {
    "relu6 everywhere": lambda: third_party.Tramac(act=nn.ReLU6),
    "relu6 in one place": Relu6Late,
    "stem padding": lambda: third_party.Tramac(stem_padding=1),
    "pooling bins": broken_bins,
    "eps": broken_eps,
    "dilation": broken_dilation,
}


@pytest.mark.parametrize("what", WRONG)
def test_accelerate_notices_what_a_state_dict_does_not_show(what: str) -> None:
    with pytest.raises(ValueError, match=r"logits differ by \d\.\de[+-]\d\d\."):
        accelerate(lively(WRONG[what]()))


@pytest.mark.parametrize("what", ["relu6 in one place", "pooling bins", "eps"])
def test_even_before_training(what: str) -> None:
    """Fresh weights let next to nothing of the deep layers through to the logits."""
    with pytest.raises(ValueError, match=r"logits differ by \d\.\de[+-]\d\d\."):
        accelerate(WRONG[what]())


def test_equal_constant_logits_do_not_differ() -> None:
    theirs = third_party.LeftThomas()
    nn.init.zeros_(theirs.classifier["conv"].weight)
    assert accelerate(theirs).config.num_classes == 19


def test_accelerate_takes_the_difference_if_it_is_named() -> None:
    theirs = lively(third_party.Tramac(stem_padding=1))
    assert accelerate(theirs, stem_padding=1).config.stem_padding == 1
    theirs = lively(third_party.MMSeg(paper=True))
    assert accelerate(theirs, preset="paper").config.fusion_dilation == 4


def test_accelerate_refuses_other_modules() -> None:
    with pytest.raises(
        CheckpointError, match="MMSeg: no known Fast-SCNN; closest is layout 'mmseg"
    ):
        accelerate(third_party.MMSeg(paper=True))
    with pytest.raises(CheckpointError, match="Linear: no known Fast-SCNN; closest is layout"):
        accelerate(nn.Linear(3, 3))

    class Labels(third_party.Tramac):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x)[0].argmax(1)

    with pytest.raises(ValueError, match=r"Labels must return logits \(1, 19, 'H', 'W'\), got"):
        accelerate(Labels())
    theirs = third_party.Tramac()
    nn.init.constant_(theirs.classifier["conv"][1].bias, float("nan"))
    with pytest.raises(CheckpointError, match=r"Tramac: classifier\.conv\.1\.bias holds NaN"):
        accelerate(theirs)


# --- compat.tramac ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("aux", [False, True])
def test_tramac_keys_and_results(aux: bool) -> None:
    theirs = lively(third_party.Tramac(aux=aux)).double()
    ours = tramac.FastSCNN(19, aux).double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.load_state_dict(theirs.state_dict()) == nn.Module().load_state_dict({})
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
    x = torch.randn(2, 3, 64, 32, dtype=torch.float64)
    for net in (ours, theirs):
        net.eval()
    results, wanted = ours(x), theirs(x)
    assert type(results) is tuple and len(results) == 1 + aux
    for y, want in zip(results, wanted, strict=True):
        torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
    results = ours.train()(x)
    assert [tuple(y.shape) for y in results] == [(2, 19, 64, 32)] * (1 + aux)
    sum(y.mean() for y in results).backward()
    theirs.load_state_dict(ours.state_dict())


def test_tramac_runs_fused() -> None:
    model = lively(tramac.FastSCNN(5, aux=True)).eval()
    x = torch.randn(1, 3, 75, 97)
    with torch.no_grad():
        logits, auxiliary = model(x)
        if registry.report()["cpu"] is None:
            assert model.fused_for(x) is not None
        want = copy.deepcopy(model).double().reference(x.double())
    torch.testing.assert_close(logits.double(), want, rtol=1e-3, atol=1e-3 * want.std().item())
    assert auxiliary.shape == logits.shape == (1, 5, 75, 97)


def test_tramac_in_other_modules() -> None:
    """DataParallel, submodules, copies and pickles: as in Tramac's train.py and around it."""
    model = tramac.FastSCNN(4, aux=True)
    keys = list(model.state_dict())
    parallel = nn.DataParallel(model)
    assert list(parallel.state_dict()) == [f"module.{key}" for key in keys]
    both = nn.ModuleDict({"a": model, "b": tramac.FastSCNN(4, aux=True)})
    assert list(both.state_dict()) == [f"{name}.{key}" for name in "ab" for key in keys]
    state = {key: torch.randn_like(value.float()) for key, value in both.state_dict().items()}
    both.load_state_dict(state)
    for twin in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        for key, value in twin.state_dict().items():
            assert torch.equal(value, state[key].to(value.dtype)), key
    parallel.load_state_dict({f"module.{k}": v for k, v in both["b"].state_dict().items()})
    assert torch.equal(model.classifier.conv.bias, both["b"].classifier.conv.bias)
    kept = both.state_dict(keep_vars=True)
    assert kept["a.classifier.conv.1.bias"] is model.classifier.conv.bias


def test_tramac_reports_wrong_keys_as_torch_does() -> None:
    model, bare = tramac.FastSCNN(4, aux=True), tramac.FastSCNN(4)
    state = bare.state_dict()
    state["classifier.conv.1.bias"] = torch.zeros(5)
    state["feature_fusion.surprise.weight"] = torch.zeros(5)
    with pytest.raises(RuntimeError) as caught:
        nn.DataParallel(model).load_state_dict({f"module.{k}": v for k, v in state.items()})
    for part in (
        'Missing key(s) in state_dict: "module.auxlayer.0.weight", "module.auxlayer.1.weight"',
        'Unexpected key(s) in state_dict: "module.feature_fusion.surprise.weight"',
        "size mismatch for module.classifier.conv.1.bias: copying a param with shape "
        "torch.Size([5]) from checkpoint, the shape in current model is torch.Size([4])",
    ):
        assert part in str(caught.value)
    assert "stem" not in str(caught.value)
    del state["classifier.conv.1.bias"]
    result = model.load_state_dict(state, strict=False)
    assert "auxlayer.0.weight" in result.missing_keys
    assert "classifier.conv.1.bias" in result.missing_keys
    assert result.unexpected_keys == ["feature_fusion.surprise.weight"]
    with pytest.raises(RuntimeError, match=r"Unexpected .*auxlayer"):
        bare.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="Missing"):
        bare.load_state_dict(FastSCNN(4, "tramac").state_dict())
    old = {k: v for k, v in bare.state_dict().items() if "num_batches_tracked" not in k}
    bare.load_state_dict(old)
    bare.load_state_dict(old, assign=True)


def test_tramac_signatures() -> None:
    def parameters(function: Any) -> dict[str, Any]:
        found = inspect.signature(function).parameters
        return {name: p.default for name, p in found.items() if p.kind is p.POSITIONAL_OR_KEYWORD}

    nothing = inspect.Parameter.empty
    assert parameters(tramac.FastSCNN) == {"num_classes": nothing, "aux": False}
    assert parameters(tramac.get_fast_scnn) == {
        "dataset": "citys",
        "pretrained": False,
        "root": "./weights",
        "map_cpu": False,
    }
    assert tramac.FastSCNN(3, mean=(0, 0, 0)).config.mean == (0, 0, 0)
    with pytest.raises(ValueError, match="layout 'tramac' cannot hold this network: there stem_p"):
        tramac.FastSCNN(3, stem_padding=1)


@pytest.mark.parametrize(
    ("dataset", "acronym", "classes"),
    [("citys", "citys", 19), ("pascal_aug", "voc", 21), ("ade20k", "ade", 150)],
)
def test_get_fast_scnn(dataset: str, acronym: str, classes: int, tmp_path: Path) -> None:
    model = tramac.get_fast_scnn(dataset, aux=True)
    assert model.config.num_classes == classes
    assert model.training
    torch.save(model.state_dict(), tmp_path / f"fast_scnn_{acronym}.pth")
    got = tramac.get_fast_scnn(dataset, pretrained=True, root=tmp_path, map_cpu=True, aux=True)
    for key, value in model.state_dict().items():
        assert torch.equal(got.state_dict()[key], value)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*auxlayer"):
        tramac.get_fast_scnn(dataset, pretrained=True, root=str(tmp_path))


def test_get_fast_scnn_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset must be one of pascal_voc, .*, got 'kitti'"):
        tramac.get_fast_scnn("kitti")
    with pytest.raises(FileNotFoundError, match=r"fast_scnn_citys\.pth"):
        tramac.get_fast_scnn(pretrained=True, root=tmp_path)
    (tmp_path / "fast_scnn_citys.pth").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        tramac.get_fast_scnn(pretrained=True, root=tmp_path)


def test_tramac_weights_with_a_wide_auxiliary_head() -> None:
    theirs = third_party.Tramac(aux=True, aux_channels=64)
    assert from_state_dict(theirs.state_dict()).config.aux_channels == 64
    tramac.FastSCNN(19, aux=True, aux_channels=64).load_state_dict(theirs.state_dict())


def test_stand_ins_have_the_published_keys() -> None:
    for name, make in THEIRS.items():
        if name != "paper":
            key = "tramac_aux" if name == "tramac" else name
            module = make(aux=True) if name in ("tramac", "zacario") else make()
            shapes = {k: tuple(v.shape) for k, v in module.state_dict().items()}
            assert shapes == key_lists()[key], name


def test_saved_compat_model_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    model = tramac.FastSCNN(4, mean=(0.1, 0.2, 0.3))
    save_checkpoint(model, tmp_path / "own.safetensors")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "theirs.pth")
    own, theirs = (load_checkpoint(tmp_path / f) for f in ("own.safetensors", "theirs.pth"))
    assert own.config == model.config
    assert theirs.config.mean != own.config.mean
    for a, b in zip(own.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
