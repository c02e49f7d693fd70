"""For ``torch.hub.load("fastscnn-fast/fastscnn_fast", "fast_scnn", weights="camvid11")``, from a checkout too.

A checkout without compiled kernels runs on plain torch; ``pip install`` builds them.
"""

import os
from typing import Any

from fastscnn_fast import FastSCNN

dependencies = ["torch", "numpy", "PIL", "safetensors"]


def fast_scnn(weights: str | os.PathLike[str] | None = None, **options: Any) -> FastSCNN:
    """A Fast-SCNN, in eval mode where it has weights.

    Args:
        weights: what ``FastSCNN.from_pretrained`` takes: "camvid11" and other names of weights that come with the
            package (``fastscnn_fast.Weights``), a file, a folder, a repository of the Hugging Face Hub. None: random ones.
        options: those of ``FastSCNN.from_pretrained`` or, without weights, of ``FastSCNN``: ``num_classes=5``, ...
    """
    if weights is None:
        return FastSCNN(**options)
    return FastSCNN.from_pretrained(weights, **options)
