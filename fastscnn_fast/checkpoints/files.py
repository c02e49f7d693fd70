"""Files of weights, read without trusting them and written with all that the network needs.

No file can make this module execute code or allocate more memory than the file's own size.
"""

from __future__ import annotations

import json
import os
import pickletools
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..arch.config import Config
from ..backends import registry
from ..runtime.forked import serial
from ..runtime.model import FastSCNN
from ..writing import write_whole
from .layouts import tensors_of
from .recognise import DTYPES, CheckpointError, config_of, from_own, from_state_dict, tensors_in

MAX_BYTES = 1 << 30
"""Files larger than this are refused unread; a Fast-SCNN takes 5 MB, with its optimizer 10 to 20."""

MAX_PICKLE = 1 << 22
"""The same for the pickle in a file of torch.save: all but the tensors' numbers, 40 kB for a state_dict."""

#: Trained weights that come with the package: ``paper`` preset, CamVid's 11 classes of street scenes.
CAMVID11 = Path(__file__).parents[1] / "weights" / "camvid11.safetensors"

_METADATA = "fastscnn_fast.config"
_DETAILS = "fastscnn_fast.details"
_DTYPE = "fastscnn_fast.dtype"

# What tensors, and the plain values around them, are made of. torch.load(weights_only=True) allows more,
# among it bytearray(n), which fills n bytes however small the file is.
_HARMLESS = re.compile(
    r"torch\.(storage\.)?(?!Untyped|Typed)\w*Storage|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)"
    r"|torch\.(Size|device|u?int\d+|b?float\d+|complex\d+|bool|double|half|long|short)"
    r"|torch\.nn\.parameter\.Parameter|collections\.(OrderedDict|Counter)|(builtins|__builtin__)\.(set|complex)|_codecs\.encode"
)

_TOO_MUCH = f"more than {MAX_PICKLE} bytes that are not tensors"


@serial()
def load_checkpoint(
    path: str | os.PathLike[str] = CAMVID11,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    preset: str | None = None,
    **overrides: Any,
) -> FastSCNN:
    """A ready :class:`FastSCNN`, on the CPU and in eval mode, from a file of any known implementation.

    ``.safetensors`` files are read as such, anything else as a file of ``torch.save``. Layout, preset,
    class count, input channels, widths and auxiliary heads are recognised; wrappers (``module.``,
    ``state_dict``, ``model``, ...) and missing ``num_batches_tracked`` do not matter. Files of
    :func:`save_checkpoint` come back as they were saved.

    Args:
        path: by default the weights that come with the package.
        mean: with ``std`` the normalisation that the weights were trained with, one value per input channel;
            by default ImageNet's (or what :func:`save_checkpoint` wrote). No other layout records them.
        std: see ``mean``.
        preset: for what shapes do not tell; by default the layout's own.
        overrides: any other field of :class:`Config` that differs from the preset.

    Raises:
        CheckpointError: a truncated, empty, huge, foreign or malicious file, or one whose weights hold NaN,
            infinity or a negative variance. Nothing in it is executed.
        OSError: the file cannot be opened.
    """
    source = str(path)
    if mean is not None:
        overrides["mean"] = tuple(mean)
    if std is not None:
        overrides["std"] = tuple(std)
    state, config = read(path)
    if config is None:
        return from_state_dict(state, preset, source, **overrides)
    if preset is not None:
        raise CheckpointError(f"{source}: carries its own config: preset must be left out")
    model = from_own(state, config_of(source, replace, config, **overrides), source)
    details = read_details(path)
    try:
        for name in ("classes", "palette"):
            if name in details:
                setattr(model, name, details[name])
    except ValueError as error:  # anything may stand in there
        registry.log_once(f"{source}: {error}; the usual ones take their place")
    return model


def save_checkpoint(
    model: FastSCNN,
    path: str | os.PathLike[str],
    details: Mapping[str, Any] | None = None,
    stored_as: torch.dtype | None = None,
) -> None:
    """Writes weights, config (mean, std and size too) and names of classes to a ``.safetensors`` file, whole or not at all.

    Args:
        details: values for JSON that :func:`read_details` gives back: scores and so on. With them are the
            model's ``classes`` and ``palette`` where they are known; "classes" and "palette" here replace them.
        stored_as: dtype of the weights in the file, torch.float16 for a small one; they come back in the
            model's own dtype.

    Raises:
        ValueError: another ending, by which :func:`load_checkpoint` would not know the file; weights that
            are too large for ``stored_as``.
        OSError: the file cannot be written; what was there before still is.
    """
    from safetensors.torch import save

    if Path(path).suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {str(path)!r}")
    tensors = {name: tensor.contiguous() for name, tensor in tensors_of(model).items()}
    metadata = {_METADATA: json.dumps(model.config.to_dict())}
    if stored_as is not None:
        metadata[_DTYPE] = str(model.classifier.conv.weight.dtype).removeprefix("torch.")
        tensors = {name: _stored(name, t, stored_as) for name, t in tensors.items()}
    if model.named and "classes" not in (details or {}):
        details = {"classes": model.classes, "palette": model.palette, **(details or {})}
    if details is not None:
        metadata[_DETAILS] = json.dumps(details)
    write_whole(path, save(tensors, metadata))


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    stored = tensor.to(dtype)
    if not torch.equal(stored.isfinite(), tensor.isfinite()):
        largest = tensor.abs().max().item()
        raise ValueError(f"stored_as must hold {name}, up to {largest:.3g}, got {dtype}")
    return stored


def read_details(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The ``details`` that :func:`save_checkpoint` wrote; empty for a file without any.

    Raises:
        CheckpointError: the file is damaged.
        OSError: it cannot be opened.
    """
    from safetensors import safe_open

    if Path(path).suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            details = json.loads((file.metadata() or {}).get(_DETAILS, "{}"))
    except OSError:
        raise
    except Exception as error:  # a broken file can make the parsers raise anything
        raise CheckpointError(
            f"{path}: is damaged: {str(error) or type(error).__name__}"
        ) from error
    return details if isinstance(details, dict) else {}


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Config | None]:
    """The tensors of a checkpoint file, without wrappers, and the config if :func:`save_checkpoint` wrote it.

    Raises:
        CheckpointError: not a file of tensors that can be read without executing anything.
        OSError: the file cannot be opened.
    """
    path, source = Path(path), str(path)
    size = path.stat().st_size
    if not path.is_file():
        raise CheckpointError(f"{source}: is not a regular file")
    if size == 0:
        raise CheckpointError(f"{source}: is empty")
    if size > MAX_BYTES:
        raise CheckpointError(
            f"{source}: has {size} bytes, more than a checkpoint may ({MAX_BYTES})"
        )
    path.open("rb").close()
    try:
        reader = _safetensors if path.suffix == ".safetensors" else _torch
        state, config, dtype = reader(path, size)
    except CheckpointError:
        raise
    except Exception as error:  # a broken file can make the parsers raise anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{source}: is damaged or no checkpoint: {reason}") from error
    tensors = tensors_in(state, source)
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > size:
        raise CheckpointError(f"{source}: its tensors claim {claimed} bytes, the file has {size}")
    if dtype is not None:
        tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
    return tensors, config


def _safetensors(path: Path, size: int) -> tuple[Any, Config | None, torch.dtype | None]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if _METADATA not in metadata:
        return state, None, None
    config = config_of(f"{path}: in its config", Config.from_dict, json.loads(metadata[_METADATA]))
    if _DTYPE not in metadata:
        return state, config, None
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    if metadata[_DTYPE] not in dtypes:
        rule = f"its dtype must be one of {', '.join(dtypes)}"
        raise CheckpointError(f"{path}: {rule}, got {metadata[_DTYPE]!r}")
    return state, config, dtypes[metadata[_DTYPE]]


def _torch(path: Path, size: int) -> tuple[Any, None, None]:
    with path.open("rb") as file:
        used = _zip_globals(file, size) if _is_zip(file) else _pickle_globals(file)
    if foreign := sorted(name for name in used if not _HARMLESS.fullmatch(name)):
        raise CheckpointError(
            f"{path}: holds Python objects that are not tensors ({', '.join(foreign[:3])}); they were "
            "not loaded. Save a state_dict of tensors instead: torch.save(model.state_dict(), path)"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True), None, None
    except UnpicklingError:  # whose message advises to load it unsafely
        raise ValueError("a pickle that torch.load(weights_only=True) refuses") from None


def _is_zip(file: BinaryIO) -> bool:
    start = file.read(4)
    file.seek(0)
    return start == b"PK\x03\x04"


def _zip_globals(file: BinaryIO, size: int) -> set[str]:
    """Names that the pickles of a torch.save file look up; torch.save never compresses."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > size:
            raise ValueError("a compressed or self-overlapping archive")
        if any(entry.filename.endswith("constants.pkl") for entry in entries):
            raise ValueError("a TorchScript program, not a state_dict")
        pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
        if any(entry.file_size > MAX_PICKLE for entry in pickles):
            raise ValueError(_TOO_MUCH)
        return {name for entry in pickles for name in _globals(archive.read(entry))}


def _pickle_globals(file: BinaryIO) -> set[str]:
    """The same for files of torch before 1.6: magic number, version, system, data and storage names."""
    if file.read(1) != b"\x80":
        raise ValueError("neither an archive nor a pickle of torch.save")
    file.seek(0)
    if tarfile.is_tarfile(file):
        raise ValueError("a tar archive of torch before 0.2")
    file.seek(0)
    names = {name for _ in range(5) for name in _globals(file)}
    if file.tell() > MAX_PICKLE:
        raise ValueError(_TOO_MUCH)
    return names


def _globals(pickle: bytes | BinaryIO) -> Iterator[str]:
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name == "GLOBAL":
            yield str(argument).replace(" ", ".")
        elif opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"pickle instruction {opcode.name}, which torch.save does not write")
