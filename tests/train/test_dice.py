"""The Dice loss and its gradient against the same in plain torch, in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import threads
from torch import Tensor
from torch.nn import functional as F

from fastscnn_fast.train.dice import upsampled_dice
from fastscnn_fast.train.loss import Targets

SHAPES = (
    (3, 11, 6, 7, 45, 61),
    (2, 2, 1, 1, 3, 3),
    (2, 17, 9, 8, 4, 5),
    (1, 3, 9, 8, 9, 8),
    (2, 37, 5, 9, 33, 31),
)


def truth(logits: Tensor, labels: Tensor, align_corners: bool) -> tuple[Tensor, Tensor]:
    z = logits.detach().double().requires_grad_()
    full = F.interpolate(z, labels.shape[1:], mode="bilinear", align_corners=align_corners)
    known = labels != 255
    p = full.softmax(1).permute(0, 2, 3, 1)[known]
    y = F.one_hot(labels[known].long(), logits.shape[1]).double()
    score = 2 * (p * y).sum(0) / (p.sum(0) + y.sum(0))
    loss = 1 - score[y.any(0)].mean()
    loss.backward()
    assert z.grad is not None
    return loss.detach(), z.grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torch(
    shape: tuple[int, ...], align_corners: bool, dtype: torch.dtype, isa: str
) -> None:
    check(shape, align_corners, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_plain_torch_equals_torch(
    chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture at a time, and all at once."""
    monkeypatch.setenv("FASTSCNN_BACKEND", "reference")
    monkeypatch.setattr("fastscnn_fast.train.loss._CHUNK", chunk)
    check(SHAPES[0], False, dtype)


def check(shape: tuple[int, ...], align_corners: bool, dtype: torch.dtype) -> None:
    n, k, h, w, height, width = shape
    # Drawn once: where a gradient of one logit is next to nothing, as few draws have it, 2e-6 of it is below float32.
    drawn = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(n, k, h, w, generator=drawn)).to(dtype)
    labels = torch.randint(0, max(1, k - 1), (n, height, width), dtype=torch.uint8, generator=drawn)
    labels[torch.rand(labels.shape, generator=drawn) < 0.3] = 255
    labels[0, 0, 0] = 0
    loss64, gradient64 = truth(logits, labels, align_corners)
    z = logits.clone().requires_grad_()
    loss = upsampled_dice(z, labels, Targets(k), align_corners)
    (3 * loss).backward()
    assert loss.item() == pytest.approx(loss64.item(), rel=1e-6)
    assert z.grad is not None and z.grad.dtype == dtype
    error = (z.grad.double() / 3 - gradient64).norm() / gradient64.norm()
    assert error < (4e-3 if dtype == torch.bfloat16 else 2e-6)


def test_threads_do_not_change_a_bit(isa: str) -> None:
    logits, labels = torch.randn(3, 11, 6, 7), torch.randint(0, 11, (3, 45, 61), dtype=torch.uint8)
    results = []
    for count in (1, 2, 3):
        z = logits.clone().requires_grad_()
        with threads(count):
            loss = upsampled_dice(z, labels, Targets(11))
            loss.backward()
        results.append((loss.detach(), z.grad))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert gradient is not None and torch.equal(gradient, results[0][1])


def test_right_wrong_and_nothing() -> None:
    labels = torch.tensor([[[0, 1], [2, 255]]], dtype=torch.uint8)
    sure = 100 * torch.eye(4)[labels.clamp(max=3).long()].permute(0, 3, 1, 2)
    targets = Targets(4)
    assert upsampled_dice(sure, labels, targets).item() == pytest.approx(0, abs=1e-6)
    assert upsampled_dice(-sure, labels, targets).item() > 0.5
    z = sure.clone().requires_grad_()
    loss = upsampled_dice(z, torch.full_like(labels, 255), targets)
    loss.backward()
    assert loss.item() == 0 and z.grad is not None and not z.grad.any()
    # An id that is ignored though it is below the number of classes.
    other = upsampled_dice(sure, torch.where(labels == 255, 3, labels), Targets(4, ignore=3))
    assert other.item() == pytest.approx(0, abs=1e-6)


def test_one_class_is_the_sigmoids() -> None:
    logits = torch.randn(2, 1, 5, 6)
    labels = torch.randint(0, 2, (2, 5, 6), dtype=torch.uint8)
    p, y = logits[:, 0].double().sigmoid(), labels.double()
    scores = [2 * (q * t).sum() / (q.sum() + t.sum()) for q, t in ((p, y), (1 - p, 1 - y))]
    loss = upsampled_dice(logits, labels, Targets(1))
    assert loss.item() == pytest.approx(1 - sum(scores).item() / 2, rel=1e-5)  # type: ignore[union-attr]
