"""FastSCNN.forward fuses by itself exactly where that changes nothing but the time it takes.

Whatever is done to a model, its next result must be that of plain torch on the model as it is then.
"""

from __future__ import annotations

import copy
import functools
import gc
import io
import logging
import pickle
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import err, randomise, small_network
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

from fastscnn_fast import FastSCNN, fuse
from fastscnn_fast.arch import network as plain_network
from fastscnn_fast.arch.config import PRESETS
from fastscnn_fast.arch.structure import KINDS, METHODS, SETTINGS, Unfusable, submodules
from fastscnn_fast.backends import registry
from fastscnn_fast.runtime import model as runtime

pytestmark = pytest.mark.skipif(not registry.isas(), reason="the C++ extension is not built")


@pytest.fixture(scope="module")
def plain() -> FastSCNN:
    """Only to be copied."""
    return small_network()


@pytest.fixture
def model(plain: FastSCNN) -> FastSCNN:
    return copy.deepcopy(plain)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 64, 80)


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log, in which every reason appears anew."""
    registry.log_once.cache_clear()
    caplog.set_level(logging.WARNING, "fastscnn_fast")
    return caplog


def assert_right(model: FastSCNN, x: Tensor, fused: bool) -> None:
    """The model runs fused, or not, and is right; dropout draws the same numbers in both runs."""
    with torch.no_grad():
        assert (model.fused_for(x) is not None) == fused
        torch.manual_seed(0)
        y = model(x)
        torch.manual_seed(0)
        expected = model.reference(x)
    if fused:
        assert err(y, expected.double()) < 1e-4
    else:
        assert torch.equal(y, expected)


# ---------------------------------------------------------------- when it fuses


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
def test_fuses_in_eval_mode_without_gradients(preset, grad_mode, x):
    model = small_network(preset=preset)
    with grad_mode():
        assert model.fused_for(x) is not None
    assert_right(model, x, fused=True)
    assert_right(model, torch.randint(256, x.shape, dtype=torch.uint8), fused=True)
    assert_right(model.to(memory_format=torch.channels_last), x[:, :, 3:, 1:-1], fused=True)


def test_runs_plain_in_training_mode_and_where_a_gradient_is_wanted(model, x, log):
    assert model.fused_for(x) is None
    y = model(x)
    assert y.requires_grad and torch.equal(y, model.reference(x))
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    (message,) = log.messages
    assert "a parameter requires one" in message and "with torch.no_grad():" in message
    model.requires_grad_(False)
    wanted = x.clone().requires_grad_()
    model(wanted).sum().backward()
    assert wanted.grad is not None
    assert len(log.messages) == 2 and "the input requires one" in log.messages[1]
    model(wanted)
    assert len(log.messages) == 2
    with torch.no_grad():
        assert model.fused_for(wanted) is not None
        model.train()
        assert model.fused_for(x) is None


def test_fuses_with_gradients_enabled_where_none_is_wanted(model, x, log):
    model.requires_grad_(False)
    y = model(x)
    fused = model.fused_for(x)
    assert fused is not None and not y.requires_grad
    assert err(y, model.reference(x).double()) < 1e-4
    model.reference(x)
    assert model.fused_for(x) is fused
    bias = model.classifier.conv.bias.requires_grad_()
    assert model.fused_for(x) is None and model(x).requires_grad
    bias.requires_grad_(False)
    assert model.fused_for(x) is fused
    model.criterion = nn.Linear(2, 2)  # trained, and no part of the result
    assert model.fused_for(x) is not None
    weight_of(model).mul_(1.5)
    assert model.fused_for(x) is not fused
    assert err(model(x), model.reference(x).double()) < 1e-4
    assert [message for message in log.messages if "gradients" not in message] == []


def test_the_auxiliary_heads_and_other_modules_of_the_user_do_not_matter(x):
    model = small_network(aux=True)
    model.criterion = nn.CrossEntropyLoss()
    model.auxiliary["global"].register_forward_hook(lambda *_: None)
    model.auxiliary["downsample"].train()
    assert_right(model, x, fused=True)
    model.auxiliary = nn.ModuleDict()
    assert_right(model, x, fused=True)


def test_a_subclass_fuses_what_it_inherits(x):
    class Twice(FastSCNN):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = randomise(Twice(5)).eval()
    with torch.no_grad():
        assert model.fused_for(x) is not None
        assert err(model(x), model.reference(x).double() * 2) < 1e-4


def test_a_hook_on_the_model_itself_sees_the_fused_result(model, x, no_grad):
    seen = []
    model.register_forward_hook(lambda module, args, result: seen.append(result))
    y = model(x)
    assert model.fused_for(x) is not None and seen[0] is y


def test_a_submodule_used_twice(model, x):
    model.classifier.dsconv2 = model.classifier.dsconv1
    assert_right(model, x, fused=True)


def test_an_old_fused_copy_is_freed_at_once(model, x, no_grad):
    old = weakref.ref(model.fused_for(x))
    gc.disable()
    try:
        model.refuse()
        assert old() is None
    finally:
        gc.enable()


def test_fusing_draws_no_random_numbers(model, x, no_grad):
    before = torch.get_rng_state()
    model(x)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- changes that it must notice


def weight_of(model: FastSCNN) -> nn.Parameter:
    return model.global_features.bottleneck1[0].expand.conv.weight


def train_step(
    optimizer: Callable[..., torch.optim.Optimizer],
    run: Callable[[FastSCNN, Tensor], Tensor] = FastSCNN.forward,
    **options: Any,
) -> Callable[[FastSCNN], None]:
    """One step in eval mode, as with frozen batch norms: no statistics change, only parameters."""

    def step(model: FastSCNN) -> None:
        with torch.enable_grad():
            run(model, torch.randn(1, 3, 64, 64)).square().sum().backward()
        optimizer(model.parameters(), **options).step()
        model.zero_grad()

    return step


def compiled_forward(model: FastSCNN, x: Tensor) -> Tensor:
    torch.compiler.reset()
    return torch.compile(model, backend="eager")(x)


def monitored_step(model: FastSCNN) -> None:
    """An evaluation between the backward pass and a step that torch does not count."""
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    with torch.enable_grad():
        model(torch.randn(1, 3, 64, 64)).square().sum().backward()
    model(torch.randn(1, 3, 64, 64))
    optimizer.step()
    model.zero_grad()


def average(model: FastSCNN) -> None:
    """As most code for averaged weights is written."""
    for ours, theirs in zip(model.parameters(), small_network().parameters()):
        ours.data.mul_(0.5).add_(theirs.data, alpha=0.5)


def transpose_data(model: FastSCNN) -> None:
    """The same memory, read in another order."""
    conv = model.classifier.dsconv1.pointwise.conv
    conv.weight.data = conv.weight.data.transpose(0, 1)


def flip_lowest_bit(model: FastSCNN) -> None:
    model.classifier.conv.weight.data.view(torch.int32)[-1, -1] ^= 1


def train_statistics(model: FastSCNN) -> None:
    model.train()
    model(torch.randn(2, 3, 64, 64) * 3)
    model.eval()


def load(assign: bool) -> Callable[[FastSCNN], None]:
    return lambda model: model.load_state_dict(small_network().state_dict(), assign=assign)


def replace_parameter(model: FastSCNN) -> None:
    conv = model.global_features.bottleneck1[0].expand.conv
    conv.weight = nn.Parameter(conv.weight * 1.5)


def replace_buffer(model: FastSCNN) -> None:
    bn = model.classifier.dsconv1.pointwise.bn
    bn.running_var = bn.running_var * 2


def replace_convolution(model: FastSCNN) -> None:
    model.classifier.conv = nn.Conv2d(128, 5, 1).eval()


def replace_block(model: FastSCNN) -> None:
    model.global_features.bottleneck2[1] = copy.deepcopy(
        small_network()
    ).global_features.bottleneck2[1]


def change_eps(model: FastSCNN) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1


def change_normalisation(model: FastSCNN) -> None:
    model.config = replace(model.config, mean=(0.1, 0.2, 0.3))


def write_in_inference_mode(model: FastSCNN) -> None:
    with torch.inference_mode():
        weight_of(model).mul_(1.5)


def swap_dropout(model: FastSCNN) -> None:
    model.classifier.dropout = nn.Dropout2d(0.5).eval()


def swap_tensors(model: FastSCNN) -> None:
    torch.utils.swap_tensors(weight_of(model), nn.Parameter(weight_of(model) * 1.5))


CHANGES: dict[str, Callable[[FastSCNN], Any]] = {
    "write in place": lambda m: weight_of(m).mul_(1.5),
    "write in inference mode": write_in_inference_mode,
    "write through .data": lambda m: weight_of(m).data.mul_(1.5),
    "write through a detached view": lambda m: weight_of(m).detach().view(-1).data.mul_(1.5),
    "write through numpy": lambda m: np.multiply(w := weight_of(m).numpy(), 1.5, out=w),
    "write a buffer through .data": lambda m: (
        m.classifier.dsconv1.pointwise.bn.running_var.data.mul_(2)
    ),
    "average through .data": average,
    "copy through .data": lambda m: weight_of(m).data.copy_(weight_of(small_network())),
    "transpose .data": transpose_data,
    "flip the lowest bit": flip_lowest_bit,
    "refuse": lambda m: m.refuse(),
    "assign .data": lambda m: setattr(weight_of(m), "data", weight_of(m).data * 1.5),
    "assign to vector": lambda m: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(m.parameters()) * 1.1, m.parameters()
    ),
    "initialise": lambda m: m.apply(
        lambda c: c.reset_parameters() if isinstance(c, nn.Conv2d) else None
    ),
    "swap tensors": swap_tensors,
    "replace a parameter": replace_parameter,
    "replace a buffer": replace_buffer,
    "load": load(assign=False),
    "load and assign": load(assign=True),
    "SGD": train_step(torch.optim.SGD, lr=1e-9),
    "Adam, foreach": train_step(torch.optim.Adam, foreach=True),
    "Adam, one by one": train_step(torch.optim.Adam, foreach=False),
    "Adam, fused": train_step(torch.optim.Adam, fused=True),
    "Adam, fused, of the reference": train_step(
        torch.optim.Adam, run=FastSCNN.reference, fused=True
    ),
    "Adam, fused, of a compiled forward": train_step(
        torch.optim.Adam, run=compiled_forward, fused=True
    ),
    "Adam, fused, after an evaluation": monitored_step,
    "batch statistics": train_statistics,
    "batch statistics with gradients": torch.enable_grad()(train_statistics),
    "replace a convolution": replace_convolution,
    "replace a block": replace_block,
    "replace dropout": swap_dropout,
    "eps": change_eps,
    "mean": change_normalisation,
    "round to half and back": lambda m: m.half().float(),
    "channels last": lambda m: m.to(memory_format=torch.channels_last),
    "share memory": lambda m: m.share_memory(),
    "freeze": lambda m: m.requires_grad_(False),
    "synchronised batch norm": nn.SyncBatchNorm.convert_sync_batchnorm,
}

#: Those that leave the result as it was, or nearly.
SAME = (
    *("replace dropout", "channels last", "share memory", "freeze", "synchronised batch norm"),
    *("round to half and back", "refuse"),
)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed_and_fused_anew(change, model, x, no_grad):
    pictures = torch.randint(256, x.shape, dtype=torch.uint8)
    before, fused = model(pictures), model.fused_for(pictures)
    assert fused is model.fused_for(x) is not None
    CHANGES[change](model)
    assert_right(model, x, fused=True)
    assert_right(model, pictures, fused=True)
    if change == "flip the lowest bit":  # which may round away in the logits
        assert not torch.equal(model.fused_for(pictures).weights, fused.weights)
    elif change not in SAME:
        assert err(model(pictures), before.double()) > 1e-3


def test_data_assigned_at_the_address_of_the_old_is_noticed(model, x, no_grad):
    weight, kept = weight_of(model), []
    weight.data = weight.data.clone()
    model(x)
    address, weight.data = weight.data_ptr(), weight.data * 1.5
    for _ in range(100):  # the old storage's place is taken again, if it can be
        kept.append(weight.data * 1.5)
        if kept[-1].data_ptr() == address:
            weight.data = kept[-1]
    assert_right(model, x, fused=True)


def test_a_parameter_deleted_is_missed(model, x, no_grad):
    model(x)
    del model.classifier.conv.bias
    with pytest.raises(AttributeError, match="bias"):
        model(x)


@pytest.mark.slow
def test_compiled_training_is_noticed(model, x):
    with torch.no_grad():
        model(x)
    compiled = torch.compile(model.train(), backend="aot_eager")
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(2):
        compiled(x).square().sum().backward()
        torch.compile(optimizer.step, backend="aot_eager")()
    assert_right(model.eval(), x, fused=True)


# ---------------------------------------------------------------- changes that leave it to plain torch


class OwnConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class AlwaysDrop(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def quantise(conv: nn.Conv2d) -> nn.Module:
    """A module that holds its weight as bytes, as quantisation tools swap in."""

    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = conv.weight.abs().max() / 127
            self.register_buffer("weight", (conv.weight / self.scale).round().to(torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, self.weight * self.scale)

    return Quantised()


def configured(module: nn.Module, **values: Any) -> None:
    for name, value in values.items():
        assert hasattr(module, name)
        setattr(module, name, value)


def forward_of(module: nn.Module) -> None:
    original = module.forward
    module.forward = lambda x: original(x) * 2


REFUSED: dict[str, Callable[[FastSCNN], Any]] = {
    "forward hook": lambda m: m.classifier.register_forward_hook(lambda mod, args, y: y * 2),
    "hook of keywords": lambda m: m.classifier.dsconv1.register_forward_hook(
        lambda mod, args, kwargs, y: y * 2, with_kwargs=True
    ),
    "hook put in by hand": lambda m: m.classifier.conv._forward_hooks.update(
        {0: lambda mod, args, y: y * 2}
    ),
    "forward pre-hook": lambda m: m.classifier.register_forward_pre_hook(
        lambda mod, args: args[0] * 2
    ),
    "forward method": lambda m: forward_of(m.feature_fusion.act),
    "another activation": lambda m: setattr(m.feature_fusion, "act", nn.GELU()),
    "another convolution": lambda m: setattr(m.classifier, "conv", OwnConv(128, 5, 1)),
    "another class": lambda m: setattr(m.classifier.conv, "__class__", OwnConv),
    "another batch norm": lambda m: setattr(
        m.learning_to_downsample.stem, "bn", OwnNorm(32).eval()
    ),
    "group norm": lambda m: setattr(m.learning_to_downsample.stem, "bn", nn.GroupNorm(4, 32)),
    "no batch norm": lambda m: setattr(m.learning_to_downsample.stem, "bn", nn.Identity()),
    "no affine": lambda m: setattr(
        m.learning_to_downsample.stem, "bn", nn.BatchNorm2d(32, affine=False).eval()
    ),
    "no running statistics": lambda m: setattr(
        m.learning_to_downsample.stem, "bn", nn.BatchNorm2d(32, track_running_stats=False).eval()
    ),
    "statistics dropped": lambda m: configured(
        m.learning_to_downsample.stem.bn, running_mean=None, running_var=None
    ),
    "uncounted statistics": lambda m: configured(
        m.learning_to_downsample.stem.bn, num_batches_tracked=None
    ),
    "dropout that always drops": lambda m: setattr(m.classifier, "dropout", AlwaysDrop()),
    "dropout in training mode": lambda m: m.classifier.dropout.train(),
    "batch norm in training mode": lambda m: m.classifier.dsconv1.pointwise.bn.train(),
    "a whole part in training mode": lambda m: m.global_features.train(),
    "added bias": lambda m: setattr(
        m.classifier.dsconv1.pointwise.conv, "bias", nn.Parameter(torch.ones(128))
    ),
    "stride": lambda m: configured(m.learning_to_downsample.stem.conv, stride=(1, 1)),
    "padding": lambda m: configured(m.learning_to_downsample.stem.conv, padding=(0, 0)),
    "padding mode": lambda m: setattr(
        m.learning_to_downsample.stem,
        "conv",
        nn.Conv2d(3, 32, 3, 2, 1, bias=False, padding_mode="reflect"),
    ),
    "dilation": lambda m: configured(m.feature_fusion.refine.conv, dilation=(2, 2), padding=(2, 2)),
    "bins": lambda m: configured(m.global_features.pyramid, bins=(2, 2, 3, 6)),
    "align_corners": lambda m: configured(m.feature_fusion, align_corners=True),
    "no residual": lambda m: configured(m.global_features.bottleneck2[1], residual=False),
    "block appended": lambda m: m.global_features.bottleneck3.append(nn.ReLU().eval()),
    "block removed": lambda m: m.global_features.bottleneck2.pop(1),
    "spectral norm by hook": lambda m: nn.utils.spectral_norm(m.classifier.conv),
    "spectral norm": lambda m: parametrizations.spectral_norm(m.classifier.conv),
    "weight norm": lambda m: parametrizations.weight_norm(m.classifier.conv),
    "parametrised convolution": lambda m: parametrize.register_parametrization(
        m.classifier.conv, "weight", Double()
    ),
    "parametrised batch norm": lambda m: parametrize.register_parametrization(
        m.learning_to_downsample.stem.bn, "weight", Double()
    ),
    "pruned": lambda m: prune.l1_unstructured(m.classifier.conv, "weight", 0.5),
    "quantised": lambda m: setattr(
        m.classifier.dsconv1.pointwise, "conv", quantise(m.classifier.dsconv1.pointwise.conv)
    ),
    "wrapped": lambda m: setattr(m.classifier, "conv", nn.Sequential(m.classifier.conv)),
    "another network": lambda m: setattr(m, "classifier", nn.Conv2d(128, 5, 3)),
}


@pytest.mark.parametrize("change", REFUSED)
def test_other_networks_run_in_plain_torch_and_cannot_be_fused(change, model, x, no_grad, log):
    before = model(x)
    REFUSED[change](model)
    assert_right(model, x, fused=False)
    assert change == "uncounted statistics" or not torch.equal(model(x), before)
    assert_right(model, x, fused=False)
    (message,) = log.messages
    assert message.startswith("FastSCNN runs unfused: ")
    if "training mode" in change:
        assert message == "FastSCNN runs unfused: a submodule is in training mode"
        fuse(model)  # as it is in eval mode
    else:
        with pytest.raises(Unfusable, match="submodule"):
            fuse(model)
        assert_right(FastSCNN.from_config(model.config).eval(), x, fused=True)


def doubled(original: Any) -> Any:
    @functools.wraps(original)
    def method(*args: Any) -> Any:
        return original(*args) * 2

    return method


def only_floats(original: Any) -> Any:
    @functools.wraps(original)
    def call(module: nn.Module, *args: Any) -> Any:
        y = original(module, *args)
        return y * 2 if isinstance(module, nn.ReLU) else y

    return call


#: Methods patched on a class: the class, the method, what it becomes.
PATCHES: list[tuple[type, str, Callable[[Any], Any]]] = [
    (nn.Conv2d, "forward", doubled),
    (nn.Conv2d, "_conv_forward", doubled),
    (nn.BatchNorm2d, "forward", doubled),  # which it inherits
    (nn.modules.batchnorm._BatchNorm, "forward", doubled),
    (nn.ReLU, "forward", lambda _: nn.SiLU.forward),
    (nn.ReLU, "forward", lambda _: lambda self, x: nn.functional.leaky_relu(x)),
    (nn.ReLU, "__call__", doubled),
    (nn.Module, "__call__", only_floats),
    (nn.Module, "_call_impl", only_floats),
    (nn.Sequential, "forward", doubled),
    (nn.Dropout, "forward", lambda _: lambda self, x: nn.functional.dropout(x, 0.5)),
    (plain_network.PyramidPooling, "pool", doubled),
    (plain_network.InvertedResidual, "forward", doubled),
    (plain_network.PlainFastSCNN, "forward", doubled),
    (plain_network.PlainFastSCNN, "_full_size", doubled),
    (plain_network.PlainFastSCNN, "_normalised", doubled),
    (FastSCNN, "_normalised", doubled),
]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: f"{p[0].__name__}.{p[1]}")
@pytest.mark.parametrize("when", ["before", "after"])
def test_methods_patched_on_a_class(when, patch, model, x, no_grad, log, monkeypatch):
    owner, name, become = patch
    if when == "after":
        assert_right(model, x, fused=True)
    plain = model.reference(x)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, become(getattr(owner, name)))
        assert not torch.equal(model(x), plain)
        assert_right(model, x, fused=False)
        assert f"method {name}" in log.messages[0] or "_call_impl" in log.messages[0]
        with pytest.raises(Unfusable, match="was replaced"):
            fuse(model)
    assert_right(model, x, fused=True)


def test_methods_patched_on_an_object(model, x, no_grad):
    pyramid, conv = model.global_features.pyramid, model.classifier.conv
    for owner, name in ((pyramid, "pool"), (conv, "_conv_forward"), (model, "_full_size")):
        assert_right(model, x, fused=True)
        setattr(owner, name, doubled(getattr(owner, name)))
        assert_right(model, x, fused=False)
        delattr(owner, name)
    assert_right(model, x, fused=True)


def test_a_subclass_with_its_own_normalisation_is_left_to_plain_torch(x):
    class Own(FastSCNN):
        def _normalised(self, x: Tensor) -> Tensor:
            return super()._normalised(x) * 3

    model = randomise(Own(5)).eval()
    assert_right(model, x, fused=False)


def test_every_method_of_a_submodule_is_watched():
    own = {
        (kind, name)
        for kind in vars(plain_network).values()
        if isinstance(kind, type) and issubclass(kind, nn.Module) and kind in KINDS
        for name, value in vars(kind).items()
        if callable(value) and name != "__init__"
    }
    assert own <= set(METHODS)


def test_every_attribute_of_a_submodule_is_watched_or_known_not_to_matter():
    """What a submodule computes in eval mode follows from SETTINGS, its tensors, and these not at all."""
    idle = {
        *("training", "inplace", "momentum", "p", "affine", "track_running_stats", "num_features"),
        *("in_channels", "out_channels", "kernel_size", "transposed", "output_padding"),
    }
    for preset in PRESETS:
        for name, module in submodules(FastSCNN(5, preset)):
            public = {key for key in vars(module) if not key.startswith("_")}
            assert public <= idle | set(SETTINGS), name


def test_it_fuses_again_once_hooks_and_training_are_over(model, x):
    handle = model.classifier.register_forward_hook(lambda *_: None)
    assert_right(model, x, fused=False)
    handle.remove()
    assert_right(model, x, fused=True)
    model.classifier._forward_hooks = type(model.classifier._forward_hooks)()
    handle = model.classifier.register_forward_hook(lambda *_: None)
    assert_right(model, x, fused=False)
    handle.remove()
    model.classifier.dropout.train()
    assert_right(model, x, fused=False)
    model.eval()
    assert_right(model, x, fused=True)
    parametrizations.weight_norm(model.classifier.conv)
    assert_right(model, x, fused=False)
    parametrize.remove_parametrizations(model.classifier.conv, "weight")
    assert_right(model, x, fused=True)


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ],
)
def test_global_hooks_see_every_module(register, model, x, no_grad):
    seen = set()
    handle = register(lambda module, *_: seen.add(module))
    try:
        model(x)
        assert seen > {module for _, module in submodules(model)} - {
            model.global_features.pyramid.branches  # a list
        }
    finally:
        handle.remove()
    assert_right(model, x, fused=True)


# ---------------------------------------------------------------- inputs and surroundings


def test_refused_inputs_run_or_fail_as_in_plain_torch(model, x, no_grad, log):
    for wrong in (x.double(), x.half(), x.to("meta"), x.int(), x.to_sparse(), x.bool()):
        with pytest.raises((RuntimeError, TypeError, NotImplementedError, ValueError)):
            model(wrong)
    for shape in ((3, 64, 64), (1, 4, 64, 64), (1, 3, 0, 64), (1, 3, 64, 0)):
        with pytest.raises(ValueError, match="x must be"):
            model(torch.zeros(shape))
    assert model(x[:0]).shape == (0, 5, 64, 80)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.fused_for(x) is None
        assert torch.equal(model(x), model.reference(x)) and model(x).dtype == torch.bfloat16
    assert_right(model, x, fused=True)
    reasons = log.messages
    assert len(set(reasons)) == len(reasons)
    said = "autocast is enabled: fuse(model, dtype=torch.bfloat16) computes in that dtype, fused"
    assert f"FastSCNN runs unfused: {said}" in reasons


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_models_of_other_dtypes_run_in_plain_torch(dtype, model, x, no_grad, log):
    model.to(dtype)
    for _ in range(3):
        assert_right(model, x.to(dtype), fused=False)
        assert model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).dtype == dtype
    (message,) = log.messages
    assert message == (
        "running on the reference backend: cpu:"
        f" dtype must be torch.float32, torch.bfloat16 or torch.int8, got {dtype}"
    )
    assert_right(model.float(), x, fused=True)


def test_a_bfloat16_model_fuses(model, x, no_grad, log):
    errors = []
    for network in (model, *(small_network() for _ in range(7))):  # one may be lucky
        exact = copy.deepcopy(network.bfloat16()).double()
        pictures = torch.randint(256, x.shape, dtype=torch.uint8)
        for picture, same in ((x.bfloat16(), x.bfloat16().double()), (pictures, pictures)):
            assert network.fused_for(picture) is not None
            y, own, expected = network(picture), network.reference(picture), exact.reference(same)
            assert y.dtype == torch.bfloat16 and torch.equal(network(picture), y)
            errors.append((err(y, expected), err(own, expected)))
    ours, torchs = (sum(e * e for e in each) ** 0.5 for each in zip(*errors))
    assert ours <= 1.5 * torchs
    assert model.fused_for(x) is None and "got torch.float32" in log.messages[0]
    assert_right(model.float(), x, fused=True)


def test_a_model_of_two_dtypes_is_left_to_plain_torch(model, x, no_grad, log):
    model.learning_to_downsample.stem.bn.double()
    assert model.fused_for(x) is None
    assert "several devices or dtypes" in log.messages[0]


def test_a_model_on_the_meta_device(model, x, no_grad):
    model.to("meta")
    assert model(x.to("meta")).shape == (2, 5, 64, 80)
    for run in (lambda: model(x), lambda: fuse(model)):
        with pytest.raises(RuntimeError, match="meta"):
            run()


class Subclass(Tensor):
    seen: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Counter(TorchDispatchMode):
    """Counts convolutions."""

    convolutions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.convolutions += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def test_modes_and_subclasses_see_every_op(model, x, no_grad):
    model(x)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    with Counter() as counter:
        assert torch.equal(model(x), model.reference(x))
    assert counter.convolutions == 2 * convolutions
    assert isinstance(model(x.as_subclass(Subclass)), Subclass)
    assert Subclass.seen.count(nn.functional.conv2d) == convolutions
    assert model.fused_for(nn.Parameter(x)) is not None


def test_transforms_differentiate_and_batch_as_in_plain_torch(model, x):
    model.requires_grad_(False)
    with torch.no_grad():
        model(x)
        batched, expected = (torch.vmap(f)(x[None]) for f in (model, model.reference))
        assert torch.equal(batched, expected)
        ours, theirs = (torch.func.jvp(f, (x,), (x,))[1] for f in (model, model.reference))
        assert theirs.any() and torch.equal(ours, theirs)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, x)
            assert torch.equal(forward_ad.unpack_dual(model(dual)).tangent, theirs)
            assert model.fused_for(x) is not None
    ours, theirs = (
        torch.func.grad(lambda x, f=f: f(x).square().sum())(x) for f in (model, model.reference)
    )
    assert theirs.any() and torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traces_hold_plain_torch(model, x, no_grad):
    expected, other = model.reference(x), torch.randn(1, 3, 65, 97)
    model(x)
    traced = {
        "jit": torch.jit.trace(model, x, check_trace=False),
        "fx": symbolic_trace(model),
        "make_fx": make_fx(model)(x),
        "export": torch.export.export(model, (x,), strict=False).module(),
    }
    for name, trace in traced.items():
        ops = str(trace.inlined_graph if name == "jit" else trace.graph)
        assert "conv" in ops and "fastscnn::" not in ops and "ops.fastscnn" not in ops, name
        assert err(trace(x), expected.double()) < 1e-4, name
    assert torch.equal(traced["fx"](other), model.reference(other))
    assert_right(model, x, fused=True)


def test_compiled_models_hold_plain_torch(model, x):
    with torch.no_grad():
        model(x)
    targets = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), model.reference(x))
    assert targets and not any("fastscnn" in target for target in targets)
    assert_right(model, x, fused=True)


def test_fake_tensors(model, x, no_grad):
    from torch._subclasses.fake_tensor import FakeTensorMode

    model(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(x)).shape == (2, 5, 64, 80)


# ---------------------------------------------------------------- memory that is gone


@pytest.mark.parametrize("left", [0, 100])
def test_tensors_without_their_memory_raise(left, model, x, no_grad):
    fast = fuse(model)
    pictures = torch.randint(256, x.shape, dtype=torch.uint8)
    for batch in (x.clone(), pictures, x.clone()[:, :, 3:]):
        batch.untyped_storage().resize_(left)
        for run in (model, fast, fast.labels, fast.probabilities):
            with pytest.raises(RuntimeError, match="x must have memory of"):
                run(batch)
    out = torch.empty(2, 5, 64, 80)
    out.untyped_storage().resize_(left)
    with pytest.raises(RuntimeError, match="out must have memory of"):
        fast(x, out=out)
    fast.weights.untyped_storage().resize_(left)
    with pytest.raises(RuntimeError, match="weights must have memory of"):
        fast(x)


def test_parameters_without_their_memory_raise(model, x):
    for name in (
        *("classifier.conv.weight", "classifier.conv.bias"),
        *("classifier.dsconv1.depthwise.bn.weight", "classifier.dsconv1.depthwise.bn.running_mean"),
        *("learning_to_downsample.stem.conv.weight", "global_features.pyramid.out.bn.bias"),
    ):
        tensor = model.state_dict(keep_vars=True)[name]
        with torch.no_grad():
            model(x)
            kept = tensor.detach().clone()
            tensor.untyped_storage().resize_(0)
            for run in (lambda: model(x), lambda: fuse(model)):
                with pytest.raises(RuntimeError, match=f"{name} must have memory of"):
                    run()
            tensor.untyped_storage().resize_(kept.nbytes)
            tensor.copy_(kept)
        assert_right(model, x, fused=True)


# ---------------------------------------------------------------- where contents cannot be looked at


@pytest.fixture
def counting(monkeypatch):
    """As on a GPU: torch's counters alone."""
    monkeypatch.setattr(runtime, "_Contents", runtime._Counts)


@pytest.mark.parametrize(
    "change", [change for change in CHANGES if "through" not in change and "bit" not in change]
)
def test_counted_changes_are_noticed(change, counting, model, x, no_grad):
    test_changes_are_noticed_and_fused_anew(change, model, x, None)


def test_steps_of_other_models_do_not_matter(counting, model, x, no_grad):
    fused = model.fused_for(x)
    other = small_network()
    train_step(torch.optim.Adam, fused=True)(other)
    assert model.fused_for(x) is fused
    with torch.inference_mode():
        made_there = small_network()
    assert made_there.fused_for(x) is None


# ---------------------------------------------------------------- inference tensors


def test_a_model_made_in_inference_mode(x):
    """Torch counts no changes there."""
    with torch.inference_mode():
        model = small_network()
    for scope in (torch.no_grad, torch.inference_mode):
        with scope():
            assert_right(model, x, fused=True)
        with torch.inference_mode():
            weight_of(model).mul_(1.5)
    assert_right(model, x, fused=True)


def test_a_copy_fused_in_inference_mode_is_an_ordinary_one(model, x):
    with torch.inference_mode():
        y = model(x.clone())
        fast = model.fused_for(x)
        assert y.is_inference() and not fast.weights.is_inference()
    with torch.no_grad():
        assert model.fused_for(x) is fast and not model(x).is_inference()
        assert torch.equal(model(y.new_ones(x.shape)), fast(torch.ones_like(x)))
    fast.load_state_dict(fast.state_dict())


# ---------------------------------------------------------------- copies


def names(model: nn.Module) -> list[Any]:
    listings = (
        model.named_parameters(),
        model.named_buffers(),
        model.named_modules(),
        model.named_children(),
    )
    return [[name for name, _ in listing] for listing in listings] + [list(model.state_dict())]


def test_the_fused_copy_is_invisible(model, x, no_grad):
    def seen() -> list[Any]:
        return [*names(model), repr(model), len(pickle.dumps(model)), len(list(model.modules()))]

    before = seen()
    assert model.fused_for(x) is not None
    assert seen() == before


def through(save: Callable[[Any, Any], Any], read: Callable[[Any], Any]) -> Callable:
    def copied(model: FastSCNN) -> FastSCNN:
        file = io.BytesIO()
        save(model, file)
        file.seek(0)
        return read(file)

    return copied


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": through(pickle.dump, pickle.load),
    "torch.save": through(torch.save, lambda file: torch.load(file, weights_only=False)),
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_have_no_fused_copy_and_live_apart(way, model, x, no_grad):
    y = model(x)
    other = COPIES[way](model)
    assert other._fused is None and model._fused is not None
    assert torch.equal(other(x), y)
    weight_of(other).mul_(2)
    assert_right(other, x, fused=True)
    assert torch.equal(model(x), y)


def test_a_shallow_copy_shares_parameters(model, x, no_grad):
    model(x)
    other = copy.copy(model)
    other(x)
    weight_of(other).mul_(2)
    assert_right(model, x, fused=True)
    assert_right(other, x, fused=True)


def test_replicas_of_data_parallel_run_plain(model, x, no_grad):
    """As torch.nn.parallel.replicate makes them: parameters are attributes, and the cached copy is there."""
    y = model(x)
    replicas = {}
    for name, module in reversed(list(model.named_modules())):
        replica = replicas[name] = module._replicate_for_data_parallel()
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            setattr(replica, key, None if tensor is None else tensor.detach() * 2)
        for key in module._modules:
            setattr(replica, key, replicas[f"{name}.{key}".lstrip(".")])
    replica = replicas[""]
    assert replica.fused_for(x) is None
    assert torch.equal(replica(x), replica.reference(x)) and not torch.allclose(replica(x), y)
    assert torch.equal(nn.DataParallel(model)(x), y) or torch.cuda.is_available()


def test_functional_calls_use_the_parameters_given(model, x, no_grad):
    y = model(x)
    others = {name: p * 1.1 for name, p in model.named_parameters()}
    ours = torch.func.functional_call(model, others, x)
    expected = copy.deepcopy(model)
    expected.load_state_dict(others, strict=False)
    assert err(ours, expected.reference(x).double()) < 1e-4
    assert torch.equal(model(x), y)


# ---------------------------------------------------------------- environment and threads


def test_the_environment_is_read_at_every_call(model, x, no_grad, monkeypatch, log):
    assert_right(model, x, fused=True)
    monkeypatch.setenv("FASTSCNN_BACKEND", "reference")
    assert_right(model, x, fused=False)
    monkeypatch.setenv("FASTSCNN_BACKEND", "cpu")
    assert_right(model, x, fused=True)
    assert not log.messages
    monkeypatch.setenv("FASTSCNN_BACKEND", "cuda")
    assert_right(model, x, fused=False)
    (message,) = log.messages
    assert message.startswith("FastSCNN runs unfused: backend cuda cannot run: ")
    monkeypatch.setenv("FASTSCNN_BACKEND", "opencl")
    with pytest.raises(ValueError, match="backend must be auto or one of .*, got 'opencl'"):
        model(x)
    monkeypatch.setenv("FASTSCNN_BACKEND", "")
    assert_right(model, x, fused=True)


def test_more_bins_than_the_kernels_take(x, no_grad, log):
    model = small_network(
        bottleneck_channels=(16, 16, 36), pyramid_bins=(1, 2, 3, 4, 5, 6, 7, 8, 9)
    )
    assert_right(model, x, fused=False)
    assert "at most 8" in log.messages[0]


def test_many_threads_may_call_one_model(model):
    pictures = [torch.randn(1 + i % 3, 3, 32 + 7 * i, 96 - 5 * i) for i in range(8)]
    with torch.no_grad():
        expected = [model.reference(x) for x in pictures]

    def run(i: int) -> float:
        if i % 10 == 0:
            model.refuse()
        with torch.no_grad():
            return err(model(pictures[i % 8]), expected[i % 8].double())

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(run, range(80))) < 1e-4
