"""The training kernels, and the training forward made of them, against torch in float64."""

from __future__ import annotations

import copy
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from helpers import assert_parity, drawn_once, randomise, threads
from torch import Tensor, nn
from torch.nn import functional as F

from fastscnn_fast import FastSCNN
from fastscnn_fast.arch.config import PRESETS, Config
from fastscnn_fast.arch.network import normalise
from fastscnn_fast.train import ops as train_ops

# (N, C, H, W): the network's widths, odd sizes, few pixels, more than one task of pixels and channels.
SHAPES = ((2, 32, 33, 49), (3, 64, 6, 5), (1, 128, 44, 60), (2, 144, 7, 3), (5, 16, 3, 1))
DTYPES = (torch.float32, torch.bfloat16)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    bn = randomise(nn.Sequential(nn.BatchNorm2d(channels)))
    assert isinstance(bn, nn.Sequential) and isinstance(bn[0], nn.BatchNorm2d)
    return bn[0].train()


def close(ours: Tensor | None, torchs: Tensor | None, ref64: Tensor | None) -> None:
    """At most twice the error of torch's float32 result, rounded like ours (helpers.assert_parity)."""
    assert ours is not None and torchs is not None and ref64 is not None
    torchs = torchs.to(ours.dtype)
    if ref64.dim() != 4:
        ours, torchs, ref64 = (x.reshape(1, 1, -1, 1) for x in (ours, torchs, ref64))
    assert_parity(ours, torchs, ref64, floor=5e-6)


Results = tuple[Tensor | None, ...]
Run = Callable[[str], Results]  # of "ours", "torch" (float32) or "float64"


def with_references(run: Run) -> tuple[Run, Results, Results]:
    with threads(1):
        return run, run("torch"), run("float64")


@lru_cache(maxsize=1)  # the instruction sets share it
def batch_norm_case(
    shape: tuple[int, ...], with_residual: bool, activation: type[nn.Module], dtype: torch.dtype
) -> tuple[Run, Results, Results]:
    # Drawn once: where a mean happens to be many times the deviation, float32's running variance errs by more than the floor.
    with drawn_once():
        x = (torch.randn(shape) * 2 + 5 * torch.randn(shape[1])[:, None, None]).to(dtype)
        inputs = [x, torch.randn(shape).to(dtype)] if with_residual else [x]
        bn = batch_norm(shape[1])
        upstream = torch.randn(shape)
    y = copy.deepcopy(bn).double()(inputs[0].double()) + (inputs[1] if with_residual else 0)
    kink = torch.minimum(y.abs(), (y - 6).abs()) < (0.1 if dtype == torch.bfloat16 else 1e-4)
    upstream[kink] = 0  # there rounding decides whether the gradient passes

    def run(kind: str) -> Results:
        norm, act = copy.deepcopy(bn), activation()
        to = {"ours": dtype, "torch": torch.float32, "float64": torch.float64}[kind]
        if kind == "float64":
            norm = norm.double()
        leaves = [t.to(to).contiguous(memory_format=torch.channels_last) for t in inputs]
        leaves = [t.detach().requires_grad_() for t in leaves]
        if kind == "ours":
            y = train_ops.batch_norm_act(leaves[0], norm, act, *leaves[1:])
        else:
            y = norm(leaves[0])
            y = act(y + leaves[1] if with_residual else y)
        y.backward(upstream.to(dtype).to(to))
        assert norm.num_batches_tracked == 1
        return (
            y.detach(),
            *(leaf.grad for leaf in leaves),
            norm.weight.grad,
            norm.bias.grad,
            norm.running_mean,
            norm.running_var,
        )

    return with_references(run)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [nn.Identity, nn.ReLU, nn.ReLU6])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm_act(
    shape: tuple[int, ...],
    with_residual: bool,
    activation: type[nn.Module],
    dtype: torch.dtype,
    isa: str,
) -> None:
    run, torchs, exact = batch_norm_case(shape, with_residual, activation, dtype)
    for results in zip(run("ours"), torchs, exact):
        close(*results)


@lru_cache(maxsize=1)  # the instruction sets share it
def depthwise_case(
    shape: tuple[int, ...], stride: int, dilation: int, dtype: torch.dtype
) -> tuple[Run, Results, Results]:
    channels = shape[1]
    conv = nn.Conv2d(channels, channels, 3, stride, dilation, dilation, channels, bias=False)
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    upstream = torch.randn(conv(x.float()).shape).to(dtype)

    def run(kind: str) -> Results:
        layer = copy.deepcopy(conv)
        to = {"ours": dtype, "torch": torch.float32, "float64": torch.float64}[kind]
        if kind != "ours":
            layer = layer.to(dtype).to(to)
        leaf = x.to(to).detach().requires_grad_()
        if kind == "ours":
            y = train_ops.convolution(leaf, layer)
        else:
            y = F.conv2d(leaf, layer.weight, None, stride, dilation, dilation, channels)
        y.backward(upstream.to(to))
        return y.detach(), leaf.grad, layer.weight.grad

    return with_references(run)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 4), (2, 3)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_depthwise(
    shape: tuple[int, ...], stride: int, dilation: int, dtype: torch.dtype, isa: str
) -> None:
    run, torchs, exact = depthwise_case(shape, stride, dilation, dtype)
    for results in zip(run("ours"), torchs, exact):
        close(*results)


def test_depthwise_whose_input_needs_no_gradient(isa: str) -> None:
    conv = nn.Conv2d(32, 32, 3, 2, 1, groups=32, bias=False)
    x = torch.randn(2, 32, 9, 8)
    train_ops.convolution(x, conv).sum().backward()
    ours, conv.weight.grad = conv.weight.grad, None
    conv(x).sum().backward()
    assert ours is not None and conv.weight.grad is not None
    assert (ours - conv.weight.grad).abs().max() < 1e-4


def test_threads_do_not_change_a_bit() -> None:
    results = []
    for count in (1, 2, 3):
        torch.manual_seed(5)
        bn = batch_norm(48)
        conv = nn.Conv2d(48, 48, 3, 1, 1, groups=48, bias=False)
        x = torch.randn(3, 48, 30, 40, requires_grad=True)
        with threads(count):
            y = train_ops.batch_norm_act(
                train_ops._Depthwise.apply(x, conv.weight, 1, 1), bn, nn.ReLU()
            )
            y.square().sum().backward()
        results.append((x.grad, conv.weight.grad, bn.weight.grad, bn.running_var))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert a is not None and b is not None and torch.equal(a, b)


def test_dropout() -> None:
    x = torch.ones(3, 20, 50, 41).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = train_ops.dropout(x, 0.3)
    kept = y != 0
    assert y[kept].unique().numel() == 1 and y[kept][0].item() == pytest.approx(1 / 0.7, rel=1e-4)
    assert abs(kept.float().mean().item() - 0.7) < 5 * (0.21 / x.numel()) ** 0.5
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, y.detach())
    assert not torch.equal(train_ops.dropout(x, 0.3), y)
    assert train_ops.dropout(x, 0.0) is x
    odd = torch.ones(1, 7, 1, 1, dtype=torch.bfloat16)
    assert train_ops.dropout(odd, 0.5).shape == odd.shape
    part = torch.ones(2, 16, 30, 30)[..., ::2]
    assert 0.3 < (train_ops.dropout(part, 0.5) != 0).float().mean() < 0.7


def trained(
    model: FastSCNN, x: Tensor, upstream: list[Tensor], ours: bool
) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Small logits, gradients and buffers."""
    if ours:
        logits = train_ops.low_logits(model, x)
    else:
        model._full_size = lambda small, size: small  # type: ignore[method-assign]
        out = model.reference(x)
        logits = [out[0], *out[1]] if model.auxiliary else [out]
    torch.autograd.backward(logits, [g.to(x.dtype) for g in upstream[: len(logits)]])
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return [z.detach() for z in logits], gradients, dict(model.named_buffers())


@pytest.mark.parametrize(
    ("preset", "backend"), [("paper", "reference"), *((name, "cpu") for name in PRESETS)]
)
def test_forward_equals_the_model(
    preset: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits, every gradient and every running statistic, of each published network."""
    monkeypatch.setenv("FASTSCNN_BACKEND", backend)
    aux = bool(PRESETS[preset].aux_taps)
    model = FastSCNN(7, preset, aux=aux, bottleneck_repeats=(2, 1, 2)).train()
    randomise(model)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    x = torch.randn(4, 3, 49, 66)
    small = [z.shape for z in train_ops.low_logits(copy.deepcopy(model), x)]
    upstream = [torch.randn(shape) for shape in small]
    ours = trained(copy.deepcopy(model), x, upstream, True)
    plain = trained(copy.deepcopy(model), x, upstream, False)
    exact = trained(copy.deepcopy(model).double(), x.double(), upstream, False)
    for y, own, ref64 in zip(ours[0], plain[0], exact[0]):
        assert_parity(y, own, ref64, 3, 1e-4)
    assert ours[1].keys() == plain[1].keys() == exact[1].keys()

    def error(gradients: dict[str, Tensor]) -> float:
        flat = torch.cat([g.double().flatten() for g in gradients.values()])
        ref = torch.cat([g.flatten() for g in exact[1].values()])
        return float((flat - ref).norm() / ref.norm())

    # ReLU's kinks make gradients jump where float32 falls on the other side of them.
    assert error(ours[1]) <= max(3 * error(plain[1]), 5e-2)
    for name, buffer in ours[2].items():
        assert torch.allclose(buffer.double(), exact[2][name].double(), rtol=1e-4, atol=1e-5), name


def test_frozen_batch_norm_is_left_alone() -> None:
    model = randomise(FastSCNN(5, aux=True))
    assert isinstance(model, FastSCNN)
    model.eval()
    before = copy.deepcopy(dict(model.named_buffers()))
    x = torch.randn(1, 3, 64, 64)
    ours = train_ops.low_logits(model, x)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    model._full_size = lambda small, size: small  # type: ignore[method-assign]
    assert (ours[0] - model.reference(x)).abs().max() < 1e-5 * ours[0].abs().max()


@pytest.mark.parametrize("size", [(64, 96), (32, 32)])
def test_batch_of_one_small_picture(size: tuple[int, int]) -> None:
    """The 1x1 pooling bin has one value per channel there, or all features at 1/32."""
    model = FastSCNN(5).train()
    logits = train_ops.low_logits(model, torch.randn(1, 3, *size))
    assert logits[0].isfinite().all()


def test_what_the_kernels_do_not_take_is_plain_torch() -> None:
    """They read float32 parameters and statistics, and one dtype of activations."""
    x = torch.randn(2, 32, 5, 6)
    for bn in (
        nn.BatchNorm2d(32, track_running_stats=False),
        nn.BatchNorm2d(32, affine=False),
        nn.BatchNorm2d(32, momentum=None),
    ):
        expected = copy.deepcopy(bn)(x).relu()
        assert torch.equal(train_ops.batch_norm_act(x, bn, nn.ReLU()), expected)
    half = nn.BatchNorm2d(32).bfloat16()
    expected = copy.deepcopy(half)(x.bfloat16())
    assert torch.equal(train_ops.batch_norm_act(x.bfloat16(), half, nn.Identity()), expected)
    mixed = train_ops.batch_norm_act(x.bfloat16(), nn.BatchNorm2d(32), nn.ReLU(), x)
    assert mixed.isfinite().all()
    leaky = train_ops.batch_norm_act(x, nn.BatchNorm2d(32), nn.LeakyReLU())
    assert (leaky < 0).any()
    logits = train_ops.low_logits(
        FastSCNN(5).train().bfloat16(), torch.randn(2, 3, 64, 64).bfloat16()
    )
    assert logits[0].dtype == torch.bfloat16 and logits[0].isfinite().all()


def test_under_autocast() -> None:
    """bfloat16 activations and gradients, float32 parameters: near what torch's own modules give."""
    squares = {True: 0.0, False: 0.0}
    for _ in range(4):  # one network may be lucky in what it rounds
        model = randomise(FastSCNN(7, aux=True)).train()
        assert isinstance(model, FastSCNN)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        x = torch.randn(3, 3, 64, 96)
        upstream = [torch.randn(z.shape) for z in train_ops.low_logits(copy.deepcopy(model), x)]
        exact = trained(copy.deepcopy(model).double(), x.double(), upstream, False)
        for ours in squares:
            with torch.autocast("cpu", torch.bfloat16):
                logits, gradients, _ = trained(copy.deepcopy(model), x, upstream, ours)
            assert all(g.dtype == torch.float32 for g in gradients.values())
            assert gradients.keys() == exact[1].keys()
            for z, ref in zip(logits, exact[0]):
                squares[ours] += float((z - ref).norm() / ref.norm()) ** 2
    assert squares[True] <= 1.5**2 * squares[False]
    conv = nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False)
    leaf = torch.randn(1, 32, 9, 9, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = train_ops.convolution(leaf, conv)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and leaf.grad is not None and leaf.grad.isfinite().all()


def test_gradients_of_gradients_are_refused() -> None:
    x = torch.randn(2, 32, 6, 6, requires_grad=True)
    conv = nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False)
    for y in (
        train_ops.batch_norm_act(x, nn.BatchNorm2d(32), nn.ReLU()),
        train_ops.convolution(x, conv),
    ):
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.square().sum().backward()


def test_default_dtype_does_not_matter() -> None:
    x = torch.randn(2, 32, 6, 6, requires_grad=True)
    bn = batch_norm(32)
    results = []
    for default in (torch.float32, torch.float64):
        norm = copy.deepcopy(bn)
        torch.set_default_dtype(default)
        try:
            y = train_ops.batch_norm_act(x, norm, nn.ReLU())
            results.append(torch.autograd.grad(y.square().sum(), [x, norm.weight]))
            pictures = torch.ones(1, 3, 2, 2, dtype=torch.uint8)
            assert train_ops.normalised(pictures, Config()).dtype == torch.float32
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, *results))


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_in_a_forked_child() -> None:
    """The parent's pool of threads does not survive a fork; waiting for it would never end."""
    x, bn = torch.randn(4, 32, 60, 60), batch_norm(32)
    y = train_ops.batch_norm_act(x, copy.deepcopy(bn), nn.ReLU())
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # torch's own parallel loops hang in a forked child
        torch.get_num_threads = lambda: 2  # what the kernels are asked for
        os._exit(0 if torch.equal(train_ops.batch_norm_act(x, bn, nn.ReLU()), y) else 1)
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    if ended[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert ended[1] == 0


def test_normalised() -> None:
    pictures = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    expected = normalise(pictures, Config(), torch.float64)
    assert (train_ops.normalised(pictures, Config()) - expected).abs().max() < 1e-6
