"""What logits say: probabilities and labels, of many classes or of one alone."""

from __future__ import annotations

from torch import Tensor


def probabilities_of(logits: Tensor) -> Tensor:
    """Of logits (N, K, H, W): the softmax over classes; of one class alone, the sigmoid."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def labels_of(logits: Tensor) -> Tensor:
    """The label of each pixel, int64 (N, H, W), of logits (N, K, H, W).

    It is the class of the largest logit, the first of equal ones, where NaN is the largest of all. One class
    alone has label 1 where its logit is above 0, which is where its probability is above a half; all else is
    background, label 0, so is NaN.
    """
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)
