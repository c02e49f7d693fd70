"""A model card: what somebody needs to know who meets a model's files without its maker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..data.classes import counted
from ..runtime.model import FastSCNN

_USE = """\
```python
from fastscnn_fast import FastSCNN, fuse, segment

fast = fuse(FastSCNN.from_pretrained("{name}"))
labels = segment(fast, "street.jpg")  # uint8 (H, W): class ids, at the picture's own size
```

`pip install 'fastscnn_fast[hub]'`; `fastscnn_fast.load_checkpoint` reads `model.safetensors` by itself."""


def card(model: FastSCNN, details: Mapping[str, Any] | None = None, name: str | None = None) -> str:
    """Markdown about a model: what it is, how to use it, how good it is, how it was trained, what it cannot do.

    Args:
        model: what is told of.
        details: what :func:`~fastscnn_fast.checkpoints.read_details` gives of the file that it comes from: scores, command,
            recipe. Without them the card says that nothing is known.
        name: by which :meth:`FastSCNN.from_pretrained` finds it.
    """
    details = details or {}
    config, parameters = model.config, sum(each.numel() for each in model.parameters())
    size = "any size from 32x32 up"
    if config.size is not None:
        size += (
            f"; trained on {config.size[0]}x{config.size[1]}, which `segment` brings pictures to"
        )
    pixels = {1: "grey", 2: "grey + alpha", 3: "RGB", 4: "RGBA"}[config.in_channels]
    ranges = "yes: `fuse(model, dtype=torch.int8)`" if model.ranges else "not measured"
    parts = [
        "# Fast-SCNN\n",
        "[Fast-SCNN](https://arxiv.org/abs/1902.04502) (Poudel, Liwicki, Cipolla, BMVC 2019), semantic segmentation in"
        " real time, for [fastscnn_fast](https://github.com/fastscnn-fast/fastscnn_fast), which runs it in a few fused"
        " kernels.\n",
        "| | |\n|---|---|",
        f"| parameters | {parameters:,} |",
        f"| input | {pixels}, {size} |",
        f"| mean, std | {config.mean}, {config.std} |",
        f"| ranges for int8 | {ranges} |",
        f"\n## Use\n\n{_USE.format(name=name or 'OWNER/NAME')}",
        f"\n## {counted(config.num_classes).capitalize()}\n",
        _scores(model, details),
        "\n## Training\n",
        *_training(details),
        "\n## Limits\n",
        "Scores are those of pictures like the training's. Other cameras, places, weather and light give worse labels, rare and thin"
        " things are missed first, and confidence is not calibrated: decisions about safety need tests of their own.\n",
    ]
    return "\n".join(parts)


def _scores(model: FastSCNN, details: Mapping[str, Any]) -> str:
    """The classes, with the IoU of each where it is known."""
    iou = details.get("iou")
    iou = iou if isinstance(iou, Mapping) else {}
    rows = ["| id | class | colour | IoU |", "|---|---|---|---|"]
    for number, (name, colour) in enumerate(zip(model.classes, model.palette)):
        score = f"{iou[name]:.3f}" if isinstance(iou.get(name), float) else "-"
        rows.append(f"| {number} | {name} | #{bytes(colour).hex()} | {score} |")
    known = isinstance(details.get("miou"), float)
    mean = f"mIoU {details['miou']:.4f} on the validation pictures." if known else "No score known."
    return "\n".join([*rows, "", mean])


def _training(details: Mapping[str, Any]) -> list[str]:
    """By which command and recipe."""
    recipe = details.get("recipe")
    told = [f"    {details['command']}\n"] if "command" in details else []
    if isinstance(recipe, Mapping):
        told.append(", ".join(f"{name} {value}" for name, value in recipe.items()) + ".")
    return told or ["Nothing known."]
