"""The Dice loss on full-size labels without full-size logits."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

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
    return cast(Tensor, _UpsampledDice.apply(logits, labels, targets.ignore, align_corners))  # type: ignore[no-untyped-call]


class _UpsampledDice(torch.autograd.Function):
    """Once through all pixels for the sums, and once more for the gradient, which follows from them."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, ignore: int, align_corners: bool
    ) -> Tensor:
        k = logits.shape[1]
        parts = in_chunks(logits, labels)

        def probabilities(here: slice) -> tuple[Tensor, Tensor, Tensor]:
            """Of the chunk's pixels; each one's class, any for those that have none; 1 for those that have one."""
            z = F.interpolate(
                logits[here].float(), labels.shape[1:], mode="bilinear", align_corners=align_corners
            )
            index = labels[here].long()[:, None]
            known = (index < k) & (index != ignore)
            return z.softmax(1), index.clamp(max=k - 1), known.float()

        sums = torch.zeros(3, k, dtype=torch.float64, device=logits.device)
        for here in parts:
            p, index, known = probabilities(here)
            hit = (p.gather(1, index) * known).double().flatten()
            sums[0].index_add_(0, index.flatten(), hit)
            sums[1] += (p * known).sum((2, 3)).double().sum(0)
            sums[2].index_add_(0, index.flatten(), known.double().flatten())
        both, found, there = sums[0], sums[1], sums[2]
        total, occurs = found + there, there > 0
        share = occurs / occurs.sum().clamp(min=1)
        loss = (share * (1 - 2 * both / total.clamp(min=1e-12))).sum()

        gradient = None
        if ctx.needs_input_grad[0]:
            of_hit = (-2 * share / total.clamp(min=1e-12)).float()
            of_p = (2 * share * both / total.clamp(min=1e-12).square()).float()
            gradient = torch.empty_like(
                logits, dtype=torch.float32, memory_format=torch.channels_last
            )
            for here in parts:
                p, index, known = probabilities(here)
                g = of_p[:, None, None].expand_as(p).clone()
                g.scatter_add_(1, index, of_hit[index])
                g = p * known * (g - (p * g).sum(1, keepdim=True))
                gradient[here] = torch.ops.aten.upsample_bilinear2d_backward(
                    g, labels.shape[1:], logits[here].shape, align_corners
                )
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return loss.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0]).to(ctx.dtype), None, None, None
