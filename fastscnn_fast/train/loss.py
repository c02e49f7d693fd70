"""Cross-entropy on full-size labels without full-size logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..backends import registry
from ..data.classes import counted, label_count

# Full-size logits that plain torch holds at a time: what caches hold on a CPU, 1 GiB of float32 on a GPU.
_CHUNK, _GPU_CHUNK = 1 << 22, 1 << 28
_LABELS = 256


class Targets:
    """What each of the 256 labels asks of the network, as ``torch.nn.functional.cross_entropy`` has it.

    A label's row in :attr:`table` (256, K padded to 16) is its target distribution times its weight;
    ``ignore`` and everything else that is no class have zeros. :attr:`weight` (256,) is what each pixel
    adds to the mean's denominator.

    One class alone is learnt by binary cross-entropy, as ``binary_cross_entropy_with_logits`` has it: its labels
    are 0, the background, and 1, the class. That is the cross-entropy of two classes of which the background's
    logit is 0, and so it is computed.

    Args:
        num_classes: K, at most 256.
        class_weights: one per label, K or, of one class, 2; 1 by default.
        smoothing: label smoothing in [0, 1).

    Raises:
        ValueError: a rule is broken.
    """

    def __init__(
        self,
        num_classes: int,
        ignore: int = 255,
        class_weights: Sequence[float] | None = None,
        smoothing: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 1 <= num_classes <= _LABELS:
            raise ValueError(f"num_classes must be 1 to {_LABELS}, got {num_classes}")
        if not 0 <= ignore < _LABELS:
            raise ValueError(f"ignore must be 0 to {_LABELS - 1}, got {ignore}")
        self.num_classes, self.ignore, self.labels = num_classes, ignore, label_count(num_classes)
        if class_weights is not None and len(class_weights) != self.labels:
            raise ValueError(
                f"class_weights must be one per label ({self.labels}), got {len(class_weights)}"
            )
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be at least 0 and below 1, got {smoothing}")
        weights = torch.tensor(class_weights or [1.0] * self.labels, dtype=torch.float32)
        self.weight = torch.zeros(_LABELS, dtype=torch.float32)
        self.weight[: self.labels] = weights
        self.table = torch.zeros(_LABELS, -(-self.labels // 16) * 16, dtype=torch.float32)
        self.table[: self.labels, : self.labels] = (1 - smoothing) * torch.diag(weights)
        self.table[: self.labels, : self.labels] += smoothing / self.labels * weights
        self.weight[ignore], self.table[ignore] = 0, 0
        self.sums = self.table.sum(1)
        self.weight, self.table, self.sums = (
            t.to(device) for t in (self.weight, self.table, self.sums)
        )

    def denominator(self, labels: Tensor) -> Tensor:
        """The sum of the labels' weights, a float64 scalar."""
        counts = torch.bincount(labels.reshape(-1), minlength=_LABELS)
        return counts.double() @ self.weight.double()


def upsampled_cross_entropy(
    logits: Tensor, labels: Tensor, targets: Targets, align_corners: bool = False
) -> Tensor:
    """The *sum* over pixels of the cross-entropy of ``logits`` resized to the labels' size; a scalar.

    Divided by ``targets.denominator(labels)`` it equals ``cross_entropy(interpolate(logits), labels)``
    with the class weights, label smoothing and ignored label of ``targets``, computed in float32; of one class,
    the binary cross-entropy (:class:`Targets`).

    Args:
        logits: (N, K, h, w), any floating dtype.
        labels: uint8 (N, H, W).
    """
    logits = of_labels(logits, targets)
    return cast(Tensor, _UpsampledCrossEntropy.apply(logits, labels, targets, align_corners))  # type: ignore[no-untyped-call]


def surprise(logits: Tensor, labels: Tensor, targets: Targets, align_corners: bool) -> Tensor:
    """-log of the probability of each pixel's label (N, H, W), 0 where it is ignored. No gradient."""
    out = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    logits = of_labels(logits.detach(), targets)
    _evaluate(logits, labels, targets, align_corners, None, out)
    return out


def of_labels(logits: Tensor, targets: Targets) -> Tensor:
    """Logits (N, K, h, w) of classes as logits of labels (:func:`with_background`).

    Raises:
        ValueError: other classes than those of ``targets``.
    """
    if logits.shape[1] != targets.num_classes:
        raise ValueError(f"logits must have {counted(targets.num_classes)}, got {logits.shape[1]}")
    return with_background(logits)


def with_background(logits: Tensor) -> Tensor:
    """Logits (N, K, h, w), of one class alone with those of its background before them, which are 0."""
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


def hard_examples(
    logits: Tensor,
    labels: Tensor,
    targets: Targets,
    align_corners: bool,
    least: float,
    share: float,
) -> Tensor:
    """``labels`` with the easy pixels ignored (online hard example mining).

    A pixel is easy where its label has at least the probability ``least``; the hardest ``share`` of all
    labelled pixels stays in any case.
    """
    loss = surprise(logits, labels, targets, align_corners)
    counted = targets.sums[labels.int()] != 0
    keep = max(1, round(share * int(counted.sum())))
    hardest = torch.where(counted, loss, -1).flatten().kthvalue(loss.numel() - keep + 1).values
    threshold = torch.minimum(hardest, loss.new_tensor(least).log().neg())
    easy = loss < threshold  # a loss that is not a number stays, to be seen
    return torch.where(easy, targets.ignore, labels)


class _UpsampledCrossEntropy(torch.autograd.Function):
    """The gradient is computed along with the loss: at the logits' own size, it is small."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, targets: Targets, align_corners: bool
    ) -> Tensor:
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = torch.empty_like(
                logits, dtype=torch.float32, memory_format=torch.channels_last
            )
        total = _evaluate(logits, labels, targets, align_corners, gradient, None)
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0]).to(ctx.dtype), None, None, None


def _evaluate(
    logits: Tensor,
    labels: Tensor,
    targets: Targets,
    align_corners: bool,
    gradient: Tensor | None,
    surprises: Tensor | None,
) -> Tensor:
    n, k, h, w = logits.shape
    if labels.dtype != torch.uint8 or labels.dim() != 3 or labels.shape[0] != n:
        raise ValueError(
            f"labels must be uint8 ({n}, H, W), got {labels.dtype} {tuple(labels.shape)}"
        )
    if labels.device != logits.device or targets.table.device != logits.device:
        devices = f"{labels.device} and {targets.table.device}"
        raise ValueError(f"labels and targets must be on {logits.device}, got {devices}")
    if 0 in (n, h, w, *labels.shape):
        raise ValueError(
            f"logits and labels must have pixels, got {tuple(logits.shape)}, {tuple(labels.shape)}"
        )
    kernels = registry.training_module(logits.device)
    if kernels is None or logits.dtype not in (torch.float32, torch.bfloat16):
        return _plain(logits, labels, targets, align_corners, gradient, surprises)
    logits = logits.contiguous(memory_format=torch.channels_last)
    labels = labels.contiguous()
    total = kernels.upsampled_loss(
        registry.isa(),
        torch.get_num_threads(),
        logits.dtype == torch.bfloat16,
        logits.data_ptr(),
        (n, k, h, w),
        labels.data_ptr(),
        tuple(labels.shape[1:]),
        align_corners,
        targets.table.data_ptr(),
        targets.sums.data_ptr(),
        0 if gradient is None else gradient.data_ptr(),
        0 if surprises is None else surprises.data_ptr(),
    )
    return torch.tensor(total, dtype=torch.float32)


def in_chunks(logits: Tensor, labels: Tensor) -> list[slice]:
    """The pictures of a batch, as many at a time as full-size logits may be held of."""
    most = _CHUNK if logits.device.type == "cpu" else _GPU_CHUNK
    size = max(1, most // (logits.shape[1] * labels.shape[1] * labels.shape[2]))
    return [slice(first, first + size) for first in range(0, len(labels), size)]


def _plain(
    logits: Tensor,
    labels: Tensor,
    targets: Targets,
    align_corners: bool,
    gradient: Tensor | None,
    surprises: Tensor | None,
) -> Tensor:
    """Plain torch, a few pictures at a time."""
    size, k = labels.shape[1:], logits.shape[1]
    table, parts = targets.table[:, :k], []
    for here in in_chunks(logits, labels):
        small, index = logits[here].float(), labels[here].int()
        z = F.interpolate(small, size, mode="bilinear", align_corners=align_corners)
        lse = z.logsumexp(1)
        target, sums = table[index].permute(0, 3, 1, 2), targets.sums[index]
        parts.append((sums * lse).double().sum() - (target * z).double().sum())
        if surprises is not None:
            picked = z.gather(1, index.long().clamp(max=k - 1)[:, None])[:, 0]
            surprises[here] = torch.where(sums != 0, lse - picked, 0)
        if gradient is not None:
            g = sums[:, None] * (z - lse[:, None]).exp() - target
            gradient[here] = torch.ops.aten.upsample_bilinear2d_backward(
                g, size, small.shape, align_corners
            )
    return torch.stack(parts).sum().float()
