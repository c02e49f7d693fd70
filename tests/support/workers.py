"""What worker processes of the tests import: spawned ones must find it by name."""

from __future__ import annotations

import os
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fastscnn_fast import FastSCNN, FusedFastSCNN

Array = NDArray[Any]


class Labels(Dataset[tuple[Array, Array, int]]):
    """Labels of pictures by a fused network and by a lazily fused model, and how many threads that started."""

    def __init__(self, fast: FusedFastSCNN, model: FastSCNN, pictures: list[Tensor]) -> None:
        self.fast, self.model, self.pictures = fast, model, pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Array, Array, int]:
        x, before = self.pictures[index], running_threads()
        with torch.no_grad():
            assert self.model.fused_for(x) is not None
            logits = self.model(x)
        labels = self.fast.labels(x)
        started = running_threads() - before
        return labels.numpy(), logits.numpy(), started  # to send tensors would start a thread


def running_threads() -> int:
    """Threads of this process."""
    return len(os.listdir("/proc/self/task"))


def openmp_libraries() -> set[str]:
    """Paths of the GNU OpenMP libraries in this process: more than one would mean two pools of threads."""
    if not os.path.exists("/proc/self/maps"):
        return set()
    with open("/proc/self/maps") as maps:
        return {line.split()[-1] for line in maps if "libgomp" in line}
