"""What logits say, by hand: of many classes, and of one alone, which is the sigmoid's."""

from __future__ import annotations

import math

import pytest
import torch

from fastscnn_fast.program.labels import labels_of, probabilities_of
from fastscnn_fast.program.parity import Parity

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_class(dtype: torch.dtype) -> None:
    logits = torch.tensor([[2.0, -2.0, 0.0, -0.0], [1e-30, NAN, INF, -INF]]).to(dtype)[
        :, None, None
    ]
    labels = labels_of(logits)
    assert labels.tolist() == [[[1, 0, 0, 0]], [[1, 0, 1, 0]]]
    assert (labels.dtype, labels.shape) == (torch.int64, (2, 1, 4))
    probabilities = probabilities_of(logits)
    assert (probabilities.dtype, probabilities.shape) == (dtype, logits.shape)
    p = 1 / (1 + math.exp(-2))
    expected = torch.tensor([[p, 1 - p, 0.5, 0.5], [0.5, NAN, 1, 0]], dtype=torch.float64)
    torch.testing.assert_close(
        probabilities[:, 0, 0].double(),
        expected,
        rtol=torch.finfo(dtype).eps,
        atol=1e-7,
        equal_nan=True,
    )


def test_many_classes() -> None:
    logits = torch.tensor([[0.0, 1.0, NAN], [0.0, 2.0, 1.0]])[None, :, None]
    assert labels_of(logits).tolist() == [[[0, 1, 0]]]
    p = 1 / (1 + math.exp(-1))
    expected = torch.tensor([[0.5, 1 - p, NAN], [0.5, p, NAN]])
    torch.testing.assert_close(probabilities_of(logits)[0, :, 0], expected, equal_nan=True)


def test_parity_of_one_class_counts_labels() -> None:
    """One pixel in four is on the other side of 0."""
    exact = torch.tensor([1.0, -1.0, 3.0, 0.1]).double().view(1, 1, 2, 2)
    y = torch.tensor([1.0, -1.0, 3.0, -0.1]).view(1, 1, 2, 2)
    assert Parity.of(y, exact).disagreement == 0.25
    assert Parity.of((y[:, 0] > 0).to(torch.uint8), exact).disagreement == 0.25
