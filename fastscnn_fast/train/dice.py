"""The Dice loss on full-size labels without full-size logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..backends import registry
from .loss import Targets, in_chunks, of_labels


def upsampled_dice(
    logits: Tensor, labels: Tensor, targets: Targets, align_corners: bool = False
) -> Tensor:
    """1 - the mean over classes of 2 sum(p y) / (sum(p) + sum(y)), a scalar (Milletari et al., 2016).

    p is the softmax of ``logits`` resized to the labels' size and y 1 where a pixel is of the class, else 0; sums
    go over all labelled pixels of the batch, the mean over the classes that occur in it. Without any the
    loss is 0. Weights of classes and label smoothing do not matter here. Computed in float32, summed in float64.

    Args:
        logits: (N, K, h, w), any floating dtype.
        labels: uint8 (N, H, W).
    """
    logits = of_labels(logits, targets)
    confusion: Tensor = _SoftConfusion.apply(logits, labels, targets, align_corners)  # type: ignore[no-untyped-call]
    both, found, there = confusion.diagonal(), confusion.sum(0), confusion.sum(1)
    occurs = there > 0
    scores = 2 * both / (found + there).clamp(min=1e-12)
    return ((1 - scores) * occurs).sum().float() / occurs.sum().clamp(min=1)


class _SoftConfusion(torch.autograd.Function):
    """Sums of probabilities (K, K) by true and predicted class; its gradient goes through all pixels once more."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, targets: Targets, align_corners: bool
    ) -> Tensor:
        n, k = logits.shape[:2]
        ctx.save_for_backward(logits, labels)
        ctx.counted, ctx.align_corners = _counted(k, targets), align_corners
        confusion = torch.zeros(n, k, k, dtype=torch.float64, device=logits.device)
        _evaluate(logits, labels, ctx.counted, align_corners, targets.table, None, confusion)
        return confusion.sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels = ctx.saved_tensors
        k = logits.shape[1]
        table = torch.zeros(256, -(-k // 16) * 16, dtype=torch.float32, device=logits.device)
        table[:k, :k] = upstream[0]
        gradient = torch.empty_like(logits, dtype=torch.float32, memory_format=torch.channels_last)
        _evaluate(logits, labels, ctx.counted, ctx.align_corners, table, gradient, None)
        return gradient.to(logits.dtype), None, None, None


def _counted(k: int, targets: Targets) -> Tensor:
    """Per label 1 where it is one of k classes, else 0: float32 (256,)."""
    counted = torch.zeros_like(targets.sums)
    counted[:k] = 1
    counted[targets.ignore] = 0
    return counted


def _evaluate(
    logits: Tensor,
    labels: Tensor,
    counted: Tensor,
    align_corners: bool,
    table: Tensor,
    gradient: Tensor | None,
    confusion: Tensor | None,
) -> None:
    """Fills ``confusion`` (N, K, K), probabilities summed by label, and ``gradient``, that of the sum over pixels
    of their probabilities' products with the ``table``'s (256, K padded to 16) row of their label."""
    kernels = registry.training_module(logits.device)
    if kernels is None or logits.dtype not in (torch.float32, torch.bfloat16):
        _plain(logits, labels, counted, align_corners, table, gradient, confusion)
        return
    logits = logits.contiguous(memory_format=torch.channels_last)
    labels = labels.contiguous()
    kernels.soft_confusion(
        registry.isa(),
        torch.get_num_threads(),
        logits.dtype == torch.bfloat16,
        logits.data_ptr(),
        tuple(logits.shape),
        labels.data_ptr(),
        tuple(labels.shape[1:]),
        align_corners,
        table.data_ptr(),
        counted.data_ptr(),
        0 if gradient is None else gradient.data_ptr(),
        0 if confusion is None else confusion.data_ptr(),
    )


def _plain(
    logits: Tensor,
    labels: Tensor,
    counted: Tensor,
    align_corners: bool,
    table: Tensor,
    gradient: Tensor | None,
    confusion: Tensor | None,
) -> None:
    """Plain torch, a few pictures at a time."""
    k, size = logits.shape[1], labels.shape[1:]
    for here in in_chunks(logits, labels):
        index, small = labels[here].int(), logits[here].float()
        z = F.interpolate(small, size, mode="bilinear", align_corners=align_corners)
        p = z.softmax(1) * counted[index][:, None]
        if confusion is not None:
            rows = p.permute(0, 2, 3, 1).flatten(1, 2).double()
            sums = confusion.new_zeros(len(small), 256, k)
            sums.scatter_add_(1, index.long().flatten(1)[..., None].expand_as(rows), rows)
            confusion[here] = sums[:, :k]
        if gradient is not None:
            t = table[index][..., :k].permute(0, 3, 1, 2)
            g = p * (t - (p * t).sum(1, keepdim=True))
            gradient[here] = torch.ops.aten.upsample_bilinear2d_backward(
                g, size, small.shape, align_corners
            )
