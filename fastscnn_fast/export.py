"""The plain network as ONNX: any batch, height and width, exact pooling at every size."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn

from .arch.network import PyramidPooling
from .program.labels import labels_of
from .runtime.model import FastSCNN
from .writing import write_whole

_OPSET = 18
_LARGEST_SIDE = 1 << 14


def averaging_matrix(size: int, bins: int, like: Tensor) -> Tensor:
    """(bins, size): row i averages the positions from floor(i * size / bins) to ceil((i + 1) * size / bins).

    In integers, with ``size`` free: p >= floor(a / b) is (p + 1) * b > a, and p < ceil(a / b) is p * b < a.
    """
    i = torch.arange(bins, device=like.device)[:, None]
    p = torch.arange(size, device=like.device)
    inside = ((p + 1) * bins > i * size) & (p * bins < (i + 1) * size)
    weights = inside.to(like.dtype)
    return weights / weights.sum(1, keepdim=True)


class _ExactPooling(PyramidPooling):
    """Adaptive average pooling as two matrix products; ONNX has no adaptive pooling of a free size."""

    def pool(self, x: Tensor, bins: int) -> Tensor:
        rows, columns = (averaging_matrix(size, bins, x) for size in x.shape[2:])
        return rows @ x @ columns.T


class _Exportable(nn.Module):
    def __init__(self, model: FastSCNN, output: str) -> None:
        super().__init__()
        self.network = copy.deepcopy(model).cpu().float().eval()
        self.network.global_features.pyramid.__class__ = _ExactPooling
        self.labels = output == "labels"

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network.reference(x)
        return labels_of(logits).to(torch.uint8) if self.labels else logits


def export_onnx(
    model: FastSCNN,
    path: str | os.PathLike[str],
    output: Literal["logits", "labels"] = "logits",
    size: tuple[int, int] = (512, 1024),
) -> None:
    """Write ``model`` in eval mode as an ONNX file of opset 18.

    Its input ``x`` is float32 (n, C, h, w), normalised by the mean and std that the file's metadata names
    ("fastscnn_fast": the config, "classes" and "palette": names and colours, in JSON);
    n, h and w are free, h and w from 32. Its output is ``logits`` float32 (n, K, h, w) or ``labels`` uint8
    (n, h, w), which are as those of :meth:`FusedFastSCNN.labels`.

    Args:
        size: (height, width) to trace at. The file does not depend on it.

    Raises:
        ImportError: onnx or onnxscript is missing (the extra ``export``).
        RuntimeError: torch is older than 2.6, whose exporter cannot do this.
        ValueError: unknown output, a size below 32, or labels of more than 256 classes.
        OSError: the file cannot be written; what was there before still is.
    """
    _check(model, output, size)
    from torch.export import Dim

    network = _Exportable(model, output)
    x = torch.zeros(2, model.config.in_channels, *size)
    sides = {axis: Dim(name, min=32, max=_LARGEST_SIDE) for axis, name in ((2, "h"), (3, "w"))}
    with _quiet():
        program = torch.onnx.export(
            network,
            (x,),
            dynamo=True,
            dynamic_shapes={"x": {0: Dim("n", min=1, max=1 << 16), **sides}},
            input_names=["x"],
            output_names=[output],
            opset_version=_OPSET,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props["fastscnn_fast"] = json.dumps(model.config.to_dict())
    for name in ("classes", "palette"):
        program.model.metadata_props[name] = json.dumps(getattr(model, name))
    write_whole(path, program.model_proto.SerializeToString())


def _check(model: FastSCNN, output: str, size: tuple[int, int]) -> None:
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"export to ONNX needs {' and '.join(missing)}: pip install 'fastscnn_fast[export]'"
        )
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < (2, 6):
        raise RuntimeError(f"export to ONNX needs torch 2.6 or newer, got {torch.__version__}")
    if output not in ("logits", "labels"):
        raise ValueError(f"output must be logits or labels, got {output!r}")
    if output == "labels" and model.config.num_classes > 256:
        raise ValueError(
            f"output labels takes at most 256 classes, the model has {model.config.num_classes}"
        )
    if min(size) < 32:
        raise ValueError(f"size must be at least 32x32, got {size[0]}x{size[1]}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the exporter says about itself; errors still arrive as exceptions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
