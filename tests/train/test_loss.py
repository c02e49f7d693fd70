"""The loss against torch's cross-entropy of the resized logits, in float64, on every instruction set."""

from __future__ import annotations

import random

import pytest
import torch
from helpers import drawn_once, threads
from torch import Tensor
from torch.nn import functional as F

from fastscnn_fast.backends import registry
from fastscnn_fast.train.loss import Targets, hard_examples, surprise, upsampled_cross_entropy

# (N, K, h, w, H, W): one class vector, two, many; no resize, odd ratios, shrinking, one pixel; the last
# has the network's own shapes.
SHAPES = (
    (3, 11, 6, 7, 45, 61),
    (1, 19, 5, 4, 40, 32),
    (2, 37, 5, 9, 33, 31),
    (2, 2, 1, 1, 3, 3),
    (1, 16, 9, 8, 9, 8),
    (2, 17, 9, 8, 4, 5),
    (2, 11, 12, 15, 96, 120),
)
OPTIONS = (
    {},
    {"weighted": True},
    {"smoothing": 0.1},
    {"smoothing": 0.2, "weighted": True, "align_corners": True},
)


@pytest.fixture(params=["kernels", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By the C++ kernels and by plain torch."""
    name: str = request.param
    if name == "plain":
        monkeypatch.setenv("FASTSCNN_BACKEND", "reference")
    elif not registry.isas():
        pytest.skip("the extension is not built")
    return name


def case(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, ignored: int = 255
) -> tuple[Tensor, Tensor]:
    """Logits in channels-last memory and labels, a third of them ignored."""
    n, k, h, w, height, width = shape
    logits = (4 * torch.randn(n, k, h, w)).to(dtype)
    labels = torch.randint(0, k, (n, height, width), dtype=torch.uint8)
    labels[torch.rand(labels.shape) < 0.3] = ignored
    return logits.contiguous(memory_format=torch.channels_last), labels


def truth(
    logits: Tensor,
    labels: Tensor,
    align_corners: bool = False,
    weights: list[float] | None = None,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, float]:
    """torch's loss and gradient in float64, and the size of what the gradient is the difference of.

    Of a probability and of what is true, that is, each of which is rounded: in few logits they may cancel to next to nothing.
    """
    z = logits.detach().double().requires_grad_()
    full = F.interpolate(z, labels.shape[1:], mode="bilinear", align_corners=align_corners)
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    true = F.nll_loss(full.contiguous(), labels.long(), weight, ignore_index=255)
    (pull,) = torch.autograd.grad(true, z, retain_graph=True)
    loss = F.cross_entropy(full, labels.long(), weight, ignore_index=255, label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(loss, z)
    size = torch.hypot(pull.norm(), (gradient - pull).norm())
    return loss.detach(), gradient, size.item()


def check(logits: Tensor, labels: Tensor, options: dict[str, object]) -> None:
    k, align_corners = logits.shape[1], bool(options.get("align_corners", False))
    smoothing = float(options.get("smoothing", 0.0))  # type: ignore[arg-type]
    weights = [random.uniform(0.2, 3) for _ in range(k)] if "weighted" in options else None
    loss64, gradient64, size = truth(logits, labels, align_corners, weights, smoothing)
    targets = Targets(k, 255, weights, smoothing)
    z = logits.clone().requires_grad_()
    total = upsampled_cross_entropy(z, labels, targets, align_corners)
    (3 * total / targets.denominator(labels)).backward()
    # A pixel's loss is the difference of two numbers of the logits' size, or less than one of them by their rounding.
    rounding = torch.finfo(torch.float32).eps * logits.abs().max().item()
    assert total.item() / targets.denominator(labels).item() == pytest.approx(
        loss64.item(), rel=1e-6, abs=rounding
    )
    assert z.grad is not None and z.grad.dtype == logits.dtype
    error = (z.grad.double() / 3 - gradient64).norm() / size
    assert error < (1e-6 if logits.dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch(shape: tuple[int, ...], options: dict[str, object], isa: str) -> None:
    check(*case(shape), options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_plain_torch_equals_torch(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTSCNN_BACKEND", "reference")
    monkeypatch.setattr("fastscnn_fast.train.loss._CHUNK", 100_000)  # two pictures at a time
    check(*case((5, 11, 6, 7, 45, 61)), options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(3, 1, 6, 7, 45, 61), (2, 1, 1, 1, 3, 3)], ids=str)
def test_one_class_is_learnt_by_binary_cross_entropy(
    shape: tuple[int, ...], options: dict[str, object], way: str
) -> None:
    with drawn_once():  # few draws have logits that saturate float32
        logits, labels = case(shape)
        labels[labels != 255] = torch.randint(0, 2, labels.shape, dtype=torch.uint8)[labels != 255]
    align_corners = bool(options.get("align_corners", False))
    smoothing = float(options.get("smoothing", 0.0))  # type: ignore[arg-type]
    weights = [0.3, 2.0] if "weighted" in options else [1.0, 1.0]
    z = logits.double().requires_grad_()
    full = F.interpolate(z, labels.shape[1:], mode="bilinear", align_corners=align_corners)
    counted, target = (labels != 255).double(), (labels == 1).double()
    weight = counted * torch.where(target == 1, weights[1], weights[0])
    soft = [w * smoothing / 2 for w in weights]  # of each label's own loss, whatever is true
    losses = [
        F.binary_cross_entropy_with_logits(full[:, 0], torch.full_like(target, k), reduction="none")
        for k in (0, 1)
    ]
    true = torch.where(target == 1, losses[1], losses[0])
    sum64 = ((1 - smoothing) * weight * true).sum()
    sum64 = sum64 + (counted * (soft[0] * losses[0] + soft[1] * losses[1])).sum()
    sum64.backward()

    targets = Targets(1, 255, weights if "weighted" in options else None, smoothing)
    own = logits.clone().requires_grad_()
    total = upsampled_cross_entropy(own, labels, targets, align_corners)
    (3 * total).backward()
    assert targets.denominator(labels).item() == pytest.approx(weight.sum().item())
    assert total.item() == pytest.approx(sum64.item(), rel=1e-6)
    assert own.grad is not None and z.grad is not None and own.grad.shape == logits.shape
    assert (own.grad.double() / 3 - z.grad).norm() < 1e-6 * z.grad.norm()
    expected = torch.where(labels != 255, true.detach(), 0)
    assert (surprise(logits, labels, targets, align_corners) - expected).abs().max() < 3e-5
    hard = hard_examples(logits, labels, targets, align_corners, 0.7, 0.0)
    assert (hard[expected > 0.36] == labels[expected > 0.36]).all()
    assert (hard[(expected < 0.35) & (expected < expected.max())] == 255).all()


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_bfloat16(shape: tuple[int, ...], isa: str) -> None:
    check(*case(shape, torch.bfloat16), {"weighted": True})


def test_other_layouts_and_dtypes() -> None:
    logits, labels = case(SHAPES[0])
    for other in (logits.contiguous(), logits.double(), logits[..., ::2]):
        check(other, labels, {})
    wide = torch.cat([labels, labels], 2)
    check(logits, wide[:, ::2, ::3], {})


def test_threads_do_not_change_a_bit(isa: str) -> None:
    logits, labels = case(SHAPES[-1])
    targets, results = Targets(11), []
    for count in (1, 2, 3):
        z = logits.clone().requires_grad_()
        with threads(count):
            total = upsampled_cross_entropy(z, labels, targets)
            total.backward()
        results.append((total.detach(), z.grad))
    for total, gradient in results[1:]:
        assert torch.equal(total, results[0][0])
        assert gradient is not None and torch.equal(gradient, results[0][1])


def test_huge_logits_and_nan(way: str) -> None:
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    targets = Targets(3)
    z = torch.tensor([-3e4, 3e4, 0.0]).view(1, 3, 1, 1).requires_grad_()
    total = upsampled_cross_entropy(z, labels, targets)
    total.backward()
    assert total.item() == pytest.approx(64 * 6e4)
    assert z.grad is not None
    assert z.grad.flatten().tolist() == pytest.approx([-64, 64, 0], abs=1e-4)
    poisoned = torch.full((1, 3, 2, 2), float("nan"))
    assert upsampled_cross_entropy(poisoned, labels, targets).isnan()
    ignored = torch.full_like(labels, 255)
    z = torch.randn(1, 3, 2, 2, requires_grad=True)
    total = upsampled_cross_entropy(z, ignored, targets)
    total.backward()
    assert z.grad is not None
    assert total.item() == 0 and targets.denominator(ignored) == 0 and not z.grad.any()


def test_surprise_and_hard_examples(way: str) -> None:
    logits, labels = case(SHAPES[0])
    targets = Targets(11)
    full = F.interpolate(logits.double(), labels.shape[1:], mode="bilinear")
    expected = F.cross_entropy(full, labels.long(), ignore_index=255, reduction="none")
    assert (surprise(logits, labels, targets, False) - expected).abs().max() < 3e-5

    counted, gap = labels != 255, 3e-5
    for least, share in ((0.7, 0.0), (1e-9, 0.25), (0.01, 0.1)):
        hard = hard_examples(logits, labels, targets, False, least, share)
        assert torch.equal(hard[hard != 255], labels[hard != 255])
        keep = max(1, round(share * int(counted.sum())))
        hardest = expected[counted].topk(keep).values[-1].item()
        threshold = min(hardest, -torch.tensor(least).log().item())
        assert (hard[counted & (expected > threshold + gap)] != 255).all()
        assert (hard[expected < threshold - gap] == 255).all()
    poisoned = torch.full_like(logits, float("nan"))
    assert torch.equal(hard_examples(poisoned, labels, targets, False, 0.7, 0.2), labels)


def test_twice_is_refused_and_the_default_dtype_does_not_matter(way: str) -> None:
    logits, labels = case(SHAPES[0])
    totals = []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            targets = Targets(11, 255, [1.0] * 11)
            z = logits.clone().requires_grad_()
            totals.append(upsampled_cross_entropy(z, labels, targets))
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*totals) and totals[1].dtype == torch.float32
    (gradient,) = torch.autograd.grad(totals[1].square(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_targets_refuse() -> None:
    for arguments, message in (
        ((0,), "num_classes"),
        ((257,), "num_classes"),
        ((3, 256), "ignore"),
        ((3, 255, [1.0, 2.0]), "class_weights"),
        ((1, 255, [1.0]), r"one per label \(2\), got 1"),
        ((3, 255, None, 1.0), "smoothing"),
    ):
        with pytest.raises(ValueError, match=message):
            Targets(*arguments)
    logits, labels = case(SHAPES[0])
    for wrong, message in (
        (labels.long(), "labels must be uint8"),
        (labels[:2], "labels must be uint8"),
        (labels[0], "labels must be uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            upsampled_cross_entropy(logits, wrong, Targets(11))
    with pytest.raises(ValueError, match="must have pixels"):
        upsampled_cross_entropy(logits[:0], labels[:0], Targets(11))
    with pytest.raises(ValueError, match="labels and targets must be on cpu, got meta and cpu"):
        upsampled_cross_entropy(logits, labels.to("meta"), Targets(11))
    with pytest.raises(ValueError, match="7 classes, got 11"):
        upsampled_cross_entropy(logits, labels, Targets(7))
