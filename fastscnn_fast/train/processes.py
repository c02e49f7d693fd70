"""One run shared by the processes that torchrun starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started; alone without torchrun."""

    rank: int = 0
    world: int = 1

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.world > 1:
            distributed.all_reduce(x)
        return x


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """Joins the other processes of torchrun: NCCL on GPUs, gloo on CPUs."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
