"""The weights that come with the package, by name: what they know, how they like their pictures, how good they are."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

from ..arch.config import SMALLEST_SIDE, Size
from ..program.program import operations
from ..runtime.segment import Transform
from .files import SHIPPED, load_checkpoint, read_details

#: The (height, width) that operations are counted at.
COUNTED_AT = (512, 1024)


class Weights(Enum):
    """The weights that come with the package, each a path that :func:`load_checkpoint` takes.

    As torchvision's enums of weights: ``Weights("camvid11")`` or ``Weights.CAMVID11`` is a member, ``list(Weights)``
    are all, ``Weights.DEFAULT`` is what ``load_checkpoint()`` loads. All that they say is read from the file itself.
    """

    CAMVID11 = "camvid11"
    CAMVID11_SLIM = "camvid11-slim"
    DEFAULT = CAMVID11

    @classmethod
    def _missing_(cls, value: object) -> None:
        known = ", ".join(each.value for each in cls)
        raise ValueError(f"Weights must be one of {known}, got {value!r}")

    @property
    def path(self) -> Path:
        """Where the file lies."""
        return SHIPPED[self.value]

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.value)

    @property
    def meta(self) -> dict[str, Any]:
        """What is known of them.

        ``categories`` and ``palette``, a name and an (R, G, B) for each class; ``num_params``; ``min_size``, the least
        (height, width) of a picture; ``size``, that of training; ``metrics``, ``miou`` and the ``iou`` of each class, from
        0 to 1; ``operations``, of the plain network's convolutions for a picture of 512x1024, two per multiply-add;
        ``bytes`` of the file; ``command`` and ``recipe``, by which they were trained.
        """
        model, details = load_checkpoint(self), read_details(self)
        return {
            "categories": model.classes,
            "palette": model.palette,
            "num_params": sum(parameter.numel() for parameter in model.parameters()),
            "min_size": (SMALLEST_SIDE, SMALLEST_SIDE),
            "size": model.config.size,
            "metrics": {name: details[name] for name in ("miou", "iou") if name in details},
            "operations": operations(model.config, *COUNTED_AT),
            "bytes": self.path.stat().st_size,
            "command": details.get("command"),
            "recipe": details.get("recipe"),
        }

    def transforms(self, size: Size | None = None) -> Transform:
        """What brings a picture to the network at the size of training, or at ``size`` (height, width)."""
        return Transform(load_checkpoint(self).config, size)
