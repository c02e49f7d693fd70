"""Files of weights, read without trusting them and written with all that the network needs.

No file can make this module execute code or allocate more memory than the file's own size.
"""

from __future__ import annotations

import errno
import json
import os
import pickletools
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from ..arch.config import Config
from ..arch.network import Ranges
from ..arch.structure import Unfusable, unwrapped
from ..backends import registry
from ..lower.quantise import STALE, check_ranges
from ..program.program import fast_scnn
from ..runtime.forked import serial
from ..runtime.model import FastSCNN
from ..writing import check_path, write_whole
from .layouts import tensors_of
from .recognise import (
    DTYPES,
    config_followed,
    config_of,
    recognise,
    recognise_own,
    tensors_in,
)
from .wrappers import CheckpointError, Place, places

MAX_BYTES = 1 << 30
"""Files larger than this are refused unread; a Fast-SCNN takes 5 MB, with its optimizer 10 to 20."""

MAX_PICKLE = 1 << 22
"""The same for the pickle in a file of torch.save: all but the tensors' numbers, 40 kB for a state_dict."""

_SHIPPED = Path(__file__).parents[1] / "weights"
#: The files of trained weights that come with the package, by name.
SHIPPED = {file.stem: file for file in sorted(_SHIPPED.glob("*.safetensors"))}
#: What is loaded where nothing is said: ``paper`` preset, CamVid's 11 classes of street scenes.
CAMVID11 = _SHIPPED / "camvid11.safetensors"

_METADATA = "fastscnn_fast.config"
_DETAILS = "fastscnn_fast.details"
_DTYPE = "fastscnn_fast.dtype"
_RANGES = "fastscnn_fast.ranges"

#: Fields of a config that change nothing of what a network computes in eval mode.
_HARMLESS_FIELDS = {"size", "dropout", "dropout_whole_channels"}

# What tensors, and the plain values around them, are made of. torch.load(weights_only=True) allows more,
# among it bytearray(n), which fills n bytes however small the file is.
_HARMLESS = re.compile(
    r"torch\.(storage\.)?(?!Untyped|Typed)\w*Storage|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)"
    r"|torch\.(Size|device|u?int\d+|b?float\d+|complex\d+|bool|double|half|long|short)"
    r"|torch\.nn\.parameter\.Parameter|collections\.(OrderedDict|Counter)|(builtins|__builtin__)\.(set|complex)|_codecs\.encode"
)

_TOO_MUCH = f"more than {MAX_PICKLE} bytes that are not tensors"


def located(path: str | os.PathLike[str]) -> Path:
    """The file that is meant: ``path``, or by its name one of :data:`SHIPPED` where there is no such file."""
    named = SHIPPED.get(os.fspath(path))
    return Path(path) if named is None or os.path.exists(path) else named


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
    class count, input channels, widths and auxiliary heads are recognised. Containers (``state_dict``, ``ema``,
    ...), prefixes (``module.``, ``model.``, ...) and missing ``num_batches_tracked`` do not matter; tensors that
    are not the network's (``n_averaged``, a criterion's) are ignored, which is logged. Of several networks an
    average of weights is taken, else that under the most usual name. Files of :func:`save_checkpoint` come
    back as they were saved, with their ranges for int8; where an override makes another network of one, without.

    ``load_checkpoint(path, num_classes=5)`` is a start for fine-tuning: where the file has other classes, the
    last convolutions, the auxiliary heads' too, are new, with random weights. ``in_channels=1`` (to 4) adapts the
    first convolution: its sum over the channels for one, else the file's channels in turn, scaled by the ratio
    of the numbers; ``mean`` and ``std`` are theirs, unless given. Both are logged as warnings.

    Args:
        path: of a file, or the name of weights that come with the package (:class:`fastscnn_fast.Weights`), where no
            file is called so; "camvid11" by default.
        mean: with ``std`` the normalisation that the weights were trained with, one value per input channel;
            by default ImageNet's (or what :func:`save_checkpoint` wrote). No other layout records them.
        std: see ``mean``.
        preset: for what shapes do not tell; by default the layout's own.
        overrides: any other field of :class:`Config` that differs from the preset.

    Raises:
        CheckpointError: a truncated, empty, huge, foreign or malicious file, one whose weights hold NaN,
            infinity or a negative variance, whose ranges are none, or one of several networks that nothing tells apart. Nothing in
            it is executed. Or an override that is no field of :class:`Config`.
        TypeError: ``path`` is none.
        OSError: the file cannot be opened.
    """
    if isinstance(path, Mapping):
        raise TypeError(
            "path must be a str or os.PathLike, got a dict: from_state_dict takes those"
        )
    check_path(path)
    source, path = str(path), located(path)
    for name, values in (("mean", mean), ("std", std)):
        if values is not None:  # of what holds no values, Config says so
            overrides[name] = tuple(values) if isinstance(values, Iterable) else values
    likely, config, dtype, ranges = _opened(path)
    if config is None:
        found = recognise(likely, preset, source, **overrides)
    elif preset is not None:
        raise CheckpointError(f"{source}: carries its own config: preset must be left out")
    else:
        found = recognise_own(likely[0], config, source, **overrides)
    found.place.values = _converted(found.place.values, dtype)
    model = found.model()
    if config is None or model.config.num_classes != config.num_classes:
        return model
    changed = {
        f.name for f in fields(config) if getattr(config, f.name) != getattr(model.config, f.name)
    }
    if not changed - _HARMLESS_FIELDS:
        model.ranges = ranges
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
    """Writes weights, config (mean, std and size too), ranges and names of classes to a ``.safetensors`` file, whole or not at all.

    Of a model whose last or first convolution was replaced by one of other classes or channels, or any
    by narrower ones, the config that is written has the numbers that it has now, and its ranges are left out. Of
    other input channels, ``mean`` and ``std`` follow as :func:`load_checkpoint` has it, with a warning; set
    ``model.config`` to save others.

    Args:
        model: may be wrapped, by torch.compile or DataParallel.
        details: values for JSON that :func:`read_details` gives back: scores and so on. With them are the
            model's ``classes`` and ``palette`` where they are known; "classes" and "palette" here replace them.
        stored_as: dtype of the weights in the file, torch.float16 for a small one; they come back in the
            model's own dtype.

    Raises:
        ValueError: another ending, by which :func:`load_checkpoint` would not know the file; weights that
            are too large for ``stored_as``; a model of which a submodule was replaced by what a config does not
            describe, which would come back as another; ranges that are not the network's.
        TypeError: ``path`` is none, or ``stored_as`` no torch.dtype.
        OSError: the file cannot be written; what was there before still is.
    """
    from safetensors.torch import save

    check_path(path)
    if stored_as is not None and not isinstance(stored_as, torch.dtype):
        raise TypeError(
            f"stored_as must be a torch.dtype, such as torch.float16, got {stored_as!r}"
        )
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {str(path)!r}")
    model = cast(FastSCNN, unwrapped(model))
    config = config_followed(model)
    tensors = {name: tensor.contiguous() for name, tensor in tensors_of(model).items()}
    metadata = {_METADATA: json.dumps(config.to_dict())}
    if stored_as is not None:
        metadata[_DTYPE] = str(model.classifier.conv.weight.dtype).removeprefix("torch.")
        tensors = {name: _stored(name, t, stored_as) for name, t in tensors.items()}
    if model.has_stale_ranges():
        registry.log_once(f"{path}: saved without ranges: {STALE}")
    elif model.ranges and config == model.config:
        ranges = check_ranges(fast_scnn(config), model.ranges)
        metadata[_RANGES] = json.dumps({name: list(map(float, r)) for name, r in ranges.items()})
    if model.named and "classes" not in (details or {}) and _fits(model, config):
        details = {"classes": model.classes, "palette": model.palette, **(details or {})}
    if details is not None:
        metadata[_DETAILS] = json.dumps(details)
    write_whole(path, save(tensors, metadata))


def _fits(model: FastSCNN, config: Config) -> bool:
    """Whether the model's names are of as many classes as it has now."""
    if len(model.classes) != config.num_classes:
        registry.logger.warning(
            "model.classes names %d classes and is not saved: the model has %d now",
            *(len(model.classes), config.num_classes),
        )
    return len(model.classes) == config.num_classes


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
    with _whole(path) as file:
        details = json.loads((file.metadata() or {}).get(_DETAILS, "{}")) if file else {}
    if not isinstance(details, dict):
        raise CheckpointError(
            f"{path}: is damaged: its details must be a JSON object, got a {type(details).__name__}"
        )
    return details


def stored_dtype(path: str | os.PathLike[str]) -> torch.dtype | None:
    """The ``stored_as`` with which :func:`save_checkpoint` wrote a file; None without, or for another file.

    Raises:
        CheckpointError: the file is damaged.
        OSError: it cannot be opened.
    """
    with _whole(path) as file:
        if not file or _DTYPE not in (file.metadata() or {}):
            return None
        tensors = (file.get_tensor(key) for key in file.keys())  # noqa: SIM118
        return next((t.dtype for t in tensors if t.is_floating_point()), None)


@contextmanager
def _whole(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A ``.safetensors`` file to read from, None for another ending."""
    from safetensors import safe_open

    path = located(path)
    if path.suffix.lower() != ".safetensors":
        yield None
        return
    _check_size(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except Exception as error:  # a broken file can make the parsers raise anything
        raise CheckpointError(
            f"{path}: is damaged: {str(error) or type(error).__name__}"
        ) from error


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Config | None]:
    """The tensors of the network in a checkpoint file by their layout's names, without containers and prefixes,
    and the config if :func:`save_checkpoint` wrote it.

    Raises:
        CheckpointError: not a file of tensors that can be read without executing anything.
        OSError: the file cannot be opened.
    """
    likely, config, dtype, _ = _opened(located(path))
    return _converted(tensors_in(likely, str(path)), dtype), config


def _opened(
    path: Path,
) -> tuple[list[Place], Config | None, torch.dtype | None, Ranges | None]:
    """Where a network may be in a file, the config if it is ours, which has one such place, the dtype
    that its floats are to have, and its ranges; raises as :func:`read`."""
    size = _check_size(path)
    try:
        state, config, dtype, ranges = (
            _safetensors(path) if path.suffix.lower() == ".safetensors" else _torch(path, size)
        )
    except CheckpointError:
        raise
    except Exception as error:  # a broken file can make the parsers raise anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: is damaged or no checkpoint: {reason}") from error
    return places(state, str(path), size), config, dtype, ranges


def _check_size(path: Path) -> int:
    """The bytes of a file that can be opened and may be a checkpoint."""
    if path.name == str(path) and not path.suffix and not path.exists():
        known = f"{os.strerror(errno.ENOENT)}, nor are weights of that name in the package ({', '.join(SHIPPED)})"
        raise FileNotFoundError(errno.ENOENT, known, str(path))
    size = path.stat().st_size
    if not path.is_file():
        raise CheckpointError(f"{path}: is not a regular file")
    if size == 0:
        raise CheckpointError(f"{path}: is empty")
    if size > MAX_BYTES:
        raise CheckpointError(f"{path}: has {size} bytes, more than a checkpoint may ({MAX_BYTES})")
    path.open("rb").close()
    return size


def _converted(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """``tensors``, their floats of ``dtype`` if given."""
    if dtype is None:
        return tensors
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}


def _safetensors(
    path: Path,
) -> tuple[Any, Config | None, torch.dtype | None, Ranges | None]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if _METADATA not in metadata:
        return state, None, None, None
    values = json.loads(metadata[_METADATA])
    if not isinstance(values, dict):
        raise ValueError(f"its config must be a JSON object, got a {type(values).__name__}")
    config = config_of(f"{path}: in its config", Config.from_dict, values)
    ranges = _ranges_in(path, config, metadata[_RANGES]) if _RANGES in metadata else None
    if _DTYPE not in metadata:
        return state, config, None, ranges
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    if metadata[_DTYPE] not in dtypes:
        rule = f"its dtype must be one of {', '.join(dtypes)}"
        raise CheckpointError(f"{path}: {rule}, got {metadata[_DTYPE]!r}")
    return state, config, dtypes[metadata[_DTYPE]], ranges


def _ranges_in(path: Path, config: Config, text: str) -> Ranges | None:
    values = json.loads(text)
    if values in (None, {}):  # a network without, as other writers may say it
        return None
    try:
        ranges = check_ranges(fast_scnn(config), values)
    except Unfusable as error:
        raise CheckpointError(f"{path}: in its ranges: {error}") from None
    return {name: (float(low), float(high)) for name, (low, high) in ranges.items()}


def _torch(path: Path, size: int) -> tuple[Any, None, None, None]:
    with path.open("rb") as file:
        used = _zip_globals(file, size) if _is_zip(file) else _pickle_globals(file)
    if foreign := sorted(name for name in used if not _HARMLESS.fullmatch(name)):
        raise CheckpointError(
            f"{path}: holds Python objects that are not tensors ({', '.join(foreign[:3])}); they were "
            "not loaded. Save a state_dict of tensors instead: torch.save(model.state_dict(), path)"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True), None, None, None
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
        if (program := _program([entry.filename for entry in entries])) is not None:
            raise ValueError(program)
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > size:
            raise ValueError("a compressed or self-overlapping archive")
        pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
        if any(entry.file_size > MAX_PICKLE for entry in pickles):
            raise ValueError(_TOO_MUCH)
        return {name for entry in pickles for name in _globals(archive.read(entry))}


def _program(names: Sequence[str]) -> str | None:
    """What an archive of these entries is called that holds code beside tensors, and how to get at these."""
    if any(name.endswith("constants.pkl") for name in names):
        return (
            "a TorchScript program, not a state_dict; save that with"
            " torch.save(torch.jit.load(path).state_dict(), new)"
        )
    if any(
        name.endswith(("models/model.json", "serialized_exported_program.json")) for name in names
    ):
        return (
            "a program of torch.export, not a state_dict; save that with"
            " torch.save(torch.export.load(path).state_dict, new)"
        )
    return None


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
