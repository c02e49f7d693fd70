"""The plain network as ONNX: any batch, height and width, exact pooling at every size."""

from __future__ import annotations

import contextlib
import copy
import errno
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import qdq
from .arch.config import Size, picture_size
from .arch.network import PyramidPooling, normalise
from .extras import need
from .lower.quantise import check_fresh, check_ranges
from .program.labels import labels_of
from .program.program import fast_scnn
from .runtime.fused import FusedFastSCNN
from .runtime.model import FastSCNN
from .writing import check_path, folder_of, write_whole

_LEAST_OPSET = 11  # before it a resize has its corners elsewhere
_EXPORTER = 18  # the least opset that torch's exporter writes
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


def exact_pool(x: Tensor, bins: int) -> Tensor:
    """Adaptive average pooling as two matrix products; ONNX has no adaptive pooling of a free size."""
    rows, columns = (averaging_matrix(size, bins, x) for size in x.shape[2:])
    return rows @ x @ columns.T


class _ExactPooling(PyramidPooling):
    def pool(self, x: Tensor, bins: int) -> Tensor:
        return exact_pool(x, bins)


class _Exportable(nn.Module):
    """``model`` from ``x``, normalised or as pixels, to ``output``."""

    def __init__(self, model: FastSCNN, output: str, pixels: bool, quantised: bool) -> None:
        super().__init__()
        plain = copy.deepcopy(model).cpu().float().eval()
        plain.global_features.pyramid.__class__ = _ExactPooling
        plain.classifier.dropout = nn.Identity()  # a node of its own in some files
        self.network = qdq.Quantised(model, exact_pool) if quantised else plain
        self.run = self.network.forward if quantised else plain.reference
        self.config, self.quantised = model.config, quantised
        self.labels = output == "labels"
        self.pixels = pixels

    def forward(self, x: Tensor) -> Tensor:
        if self.pixels:
            x = normalise(x, self.config, torch.float32)
        logits: Tensor = self.run(x)
        return labels_of(logits).to(torch.uint8) if self.labels else logits


def export_onnx(
    model: FastSCNN,
    path: str | os.PathLike[str],
    output: Literal["logits", "labels"] = "logits",
    size: Size = (512, 1024),
    opset: int = 18,
    fixed_size: bool = False,
    pixels: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write ``model`` in eval mode as an ONNX file; the folder is made where there is none.

    Its input ``x`` is (n, C, h, w), where n, h and w are free, h and w from 32: float32, normalised by the mean
    and std that the file's metadata names, or RGB pixels. Its output is ``logits`` float32 (n, K, h, w) or
    ``labels`` uint8 (n, h, w), which are as those of :meth:`FusedFastSCNN.labels`. The metadata are
    "fastscnn_fast", the config, "classes" and "palette", names and colours, in JSON, and "input", which is
    "normalised" or "pixels".

    Args:
        size: (height, width) to trace at, or the side of a square. The file does not depend on it, unless ``fixed_size``.
        opset: from 11 on, the first whose resize is torch's. Those below 18 are written by torch's older exporter.
        fixed_size: x is (1, C, *size) and nothing else, for runtimes that plan ahead; no node computes a shape.
        pixels: x is raw pixels 0 to 255 of this dtype, torch.uint8 or torch.float32, normalised in the graph.

        dtype: torch.float32, or torch.int8: weights and values of 8 bits by ``model.ranges``, written as QuantizeLinear
            and DequantizeLinear (QDQ), which runtimes fuse to products of integers. ``x`` and logits stay float32.

    Raises:
        ImportError: onnx or onnxscript is missing (the extra ``export``).
        RuntimeError: torch is older than 2.6, whose exporter cannot do this, or cannot write this opset.
        ValueError: unknown output, opset, dtype or dtype of pixels, a size below 32, labels of more than 256 classes, or
            torch.int8 for a model without ranges or an opset below 18.
        TypeError: ``model`` is no FastSCNN, or ``path`` no path.
        OSError: the file cannot be written, or is a folder; what was there before still is.
    """
    _check(model, path, output, opset, pixels, dtype)
    height, width = picture_size(size)
    with folder_of(Path(path)):
        network = _Exportable(model, output, pixels is not None, dtype == torch.int8)
        shape = (1 if fixed_size else 2, model.config.in_channels, height, width)
        x = torch.zeros(shape, dtype=pixels or torch.float32)
        export = _export if opset >= _EXPORTER else _export_older
        with _quiet():
            file = export(network, x, output, opset, fixed_size)
        (made,) = [one.version for one in file.opset_import if not one.domain]
        if made != opset:
            raise RuntimeError(f"torch {torch.__version__} cannot write opset {opset}, got {made}")
        metadata = {name: json.dumps(getattr(model, name)) for name in ("classes", "palette")}
        metadata["fastscnn_fast"] = json.dumps(model.config.to_dict())
        metadata["input"] = "normalised" if pixels is None else "pixels"
        for name, value in metadata.items():
            file.metadata_props.add(key=name, value=value)
        write_whole(path, file.SerializeToString())


def _export(network: _Exportable, x: Tensor, output: str, opset: int, fixed_size: bool) -> Any:
    """The file's content, a ModelProto."""
    from torch.export import Dim

    sides = {axis: Dim(name, min=32, max=_LARGEST_SIDE) for axis, name in ((2, "h"), (3, "w"))}
    free = {"x": {0: Dim("n", min=1, max=1 << 16), **sides}}
    program = torch.onnx.export(
        network,
        (x,),
        dynamo=True,
        dynamic_shapes=None if fixed_size else free,
        input_names=["x"],
        output_names=[output],
        opset_version=opset,
        custom_translation_table=qdq.translations() if network.quantised else None,
        verbose=False,
    )
    assert program is not None
    return program.model_proto


def _export_older(
    network: _Exportable, x: Tensor, output: str, opset: int, fixed_size: bool
) -> Any:
    """The same by tracing, which writes opsets that the newer exporter cannot, and more nodes than are needed."""
    import onnx
    from onnxscript import optimizer

    planes = {0: "n", 2: "h", 3: "w"}
    free = {"x": planes, output: {0: "n", 1: "h", 2: "w"} if network.labels else planes}
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "network.onnx"
        torch.onnx.export(
            network,
            (x,),
            written,
            dynamo=False,
            dynamic_axes=None if fixed_size else free,
            input_names=["x"],
            output_names=[output],
            opset_version=opset,
            verbose=False,
        )
        file = optimizer.optimize(onnx.load(written))
    if not network.labels:
        shape = file.graph.output[0].type.tensor_type.shape
        shape.dim[1].dim_value = network.config.num_classes
    return file


def _check(
    model: FastSCNN,
    path: str | os.PathLike[str],
    output: str,
    opset: int,
    pixels: torch.dtype | None,
    dtype: torch.dtype,
) -> None:
    if not isinstance(model, FastSCNN):
        fused = ", not its fused copy" if isinstance(model, FusedFastSCNN) else ""
        raise TypeError(
            f"model must be a fastscnn_fast.FastSCNN{fused}, got {type(model).__name__}"
        )
    check_path(path)
    if Path(path).is_dir():
        raise IsADirectoryError(
            errno.EISDIR, "path must name the file to write, got a folder", os.fspath(path)
        )
    need("export to ONNX", "export", "onnx", "onnxscript")
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < (2, 6):
        raise RuntimeError(f"export to ONNX needs torch 2.6 or newer, got {torch.__version__}")
    if output not in ("logits", "labels"):
        raise ValueError(f"output must be logits or labels, got {output!r}")
    if output == "labels" and model.config.num_classes > 256:
        raise ValueError(
            f"output labels takes at most 256 classes, the model has {model.config.num_classes}"
        )
    if pixels not in (None, torch.uint8, torch.float32):
        raise ValueError(f"pixels must be torch.uint8 or torch.float32, got {pixels!r}")
    if dtype not in (torch.float32, torch.int8):
        raise ValueError(f"dtype must be torch.float32 or torch.int8, got {dtype!r}")
    if dtype == torch.int8:
        check_fresh(model)
        check_ranges(fast_scnn(model.config), model.ranges)
        if opset < _EXPORTER:
            raise ValueError(f"opset must be at least {_EXPORTER} in torch.int8, got {opset}")
    from onnx.defs import onnx_opset_version

    if not _LEAST_OPSET <= opset <= onnx_opset_version():
        rule = f"opset must be {_LEAST_OPSET} to {onnx_opset_version()}"
        raise ValueError(f"{rule}, which the package onnx knows, got {opset}")


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
