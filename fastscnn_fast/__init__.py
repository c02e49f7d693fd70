"""Fast-SCNN (Poudel, Liwicki, Cipolla, BMVC 2019) with fused inference kernels.

from fastscnn_fast import FastSCNN, fuse
model = FastSCNN(num_classes=19)     # plain torch, trainable
fast = fuse(model)                   # logits: fast(x); uint8 labels: fast.labels(x)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints import Weights, load_checkpoint
    from .compat import accelerate
    from .runtime.calibrate import calibrate
    from .runtime.fused import FusedFastSCNN, fuse
    from .runtime.model import FastSCNN
    from .runtime.segment import Transform, segment
    from .runtime.video import segment_video
    from .train.prune import prune

__version__ = "0.1.0"

__all__ = [
    "FastSCNN",
    "FusedFastSCNN",
    "Transform",
    "Weights",
    "accelerate",
    "calibrate",
    "fuse",
    "load_checkpoint",
    "prune",
    "segment",
    "segment_video",
]

#: Where each public name lives; it is imported at its first use.
_HOMES = {
    "FastSCNN": "runtime.model",
    "FusedFastSCNN": "runtime.fused",
    "Transform": "runtime.segment",
    "Weights": "checkpoints",
    "accelerate": "compat",
    "calibrate": "runtime.calibrate",
    "fuse": "runtime.fused",
    "load_checkpoint": "checkpoints",
    "prune": "train.prune",
    "segment": "runtime.segment",
    "segment_video": "runtime.video",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
