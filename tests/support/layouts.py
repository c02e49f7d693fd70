"""The published implementations' keys and shapes, and a small network's widths, and widths that nobody chose."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
LISTS = Path(__file__).parent / "layout_keys.txt"
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
SMALL = {
    "downsample_channels": (16, 16, 32),
    "bottleneck_channels": (16, 32, 48),
    "bottleneck_repeats": (1, 2, 1),
    "expansion": 2,
    "pyramid_channels": 32,
    "fusion_channels": 48,
}


def free_widths(
    strides: tuple[int, int, int] = (2, 2, 1), least: int = 1, most: int = 40
) -> dict[str, Any]:
    """Any widths, free for each block, as pruning leaves them; the first block of each stage has its stride."""
    bottlenecks = [
        [
            (random.randint(least, most), random.randint(least, most), stride if index == 0 else 1)
            for index in range(random.randint(1, 5))
        ]
        for stride in strides
    ]
    mid, out, stride = bottlenecks[2][-1]
    bottlenecks[2][-1] = mid, 4 * out, stride  # four pooling branches share them
    return {
        "downsample_channels": tuple(random.randint(least, most) for _ in range(3)),
        "bottlenecks": tuple(map(tuple, bottlenecks)),
        "pyramid_channels": random.randint(least, most),
        "fusion_channels": random.randint(least, most),
    }


def key_lists() -> dict[str, Shapes]:
    """Name -> key -> shape of every published implementation, from ``data/layout_keys.txt``."""
    lists: dict[str, Shapes] = {}
    for line in LISTS.read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("["):
            shapes = lists.setdefault(line.strip("[]"), {})
        elif line:
            module, what, *rest = line.split()
            if what == "bn":
                shapes |= {f"{module}.{name}": (int(rest[0]),) for name in BATCH_NORM}
                shapes[f"{module}.num_batches_tracked"] = ()
            else:
                shape = tuple(map(int, what.split("x")))
                shapes[f"{module}.weight"] = shape
                if rest == ["bias"]:
                    shapes[f"{module}.bias"] = shape[:1]
    lists["tramac_aux"] = lists["tramac"]
    lists["tramac"] = {k: s for k, s in lists["tramac"].items() if not k.startswith("auxlayer")}
    lists["mmseg_legacy"] = lists["mmseg"] | {
        "backbone.global_feature_extractor.out.conv.weight": (128, 256, 1, 1),
        "backbone.feature_fusion.dwconv.conv.weight": (128, 128, 1, 1),
    }
    return lists


def random_state(shapes: Shapes) -> dict[str, Tensor]:
    state = {}
    for key, shape in shapes.items():
        state[key] = torch.tensor(7) if key.endswith("num_batches_tracked") else torch.randn(shape)
        if key.endswith("running_var"):
            state[key].abs_()
    return state
