"""Reading and writing weights: our own files and those of every known implementation.

A *layout* is how one code base names the tensors of the network. Which layout a file has is seen from its
keys, which preset and which widths from its shapes. No file can make this module execute code or
allocate more memory than the file's own size.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import pickletools
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..arch.config import MOST_BLOCKS, PRESETS, Block, Config, preset as config_preset
from ..runtime.model import FastSCNN

MAX_BYTES = 1 << 30
"""Files larger than this are refused unread; a Fast-SCNN takes 5 MB, with its optimizer 10 to 20."""

MAX_PICKLE = 1 << 22
"""The same for the pickle in a file of torch.save: all but the tensors' numbers, 40 kB for a state_dict."""

Shapes = dict[str, tuple[int, ...]]


class CheckpointError(ValueError):
    """A file or state_dict that is no checkpoint of a known Fast-SCNN; the message says why."""


# --- layouts ---------------------------------------------------------------------------------------------

_BLOCKS = {
    "stem": "conv",
    "downsample": "dsconv",
    "bottleneck1": "bottleneck",
    "bottleneck2": "bottleneck",
    "bottleneck3": "bottleneck",
    "pyramid_branch": "conv",
    "pyramid_out": "conv",
    "fusion_refine": "conv",
    "fusion_low": "projection",
    "fusion_high": "projection",
    "classifier": "dsconv",
    "logits": "logits",
    "aux_downsample": "auxiliary",
    "aux_global": "auxiliary",
}
"""The network's blocks and the kind of each; a kind's parts are convolutions and their batch norms."""


@dataclass(frozen=True)
class Layout:
    """Where one code base keeps each block (below, ``{0}`` counts from zero and ``{1}`` from one) and,
    per kind of block, each part. A part called "" is the block itself; a head without a name is absent.
    """

    blocks: dict[str, str]
    parts: dict[str, tuple[str, ...]]

    def module(self, block: str, part: int = 0, index: int = 0) -> str:
        names = (self.blocks[block].format(index, index + 1), self.parts[_BLOCKS[block]][part])
        return ".".join(filter(None, names))

    def modules(self, config: Config) -> Iterator[str]:
        """Every module that holds tensors: the same order in each layout."""
        counts = {"downsample": 2, "classifier": 2, "pyramid_branch": len(config.pyramid_bins)}
        counts |= {f"bottleneck{i + 1}": n for i, n in enumerate(map(len, config.bottlenecks))}
        taps = {f"aux_{tap}" for tap in config.aux_taps if config.aux}
        for block, kind in _BLOCKS.items():
            if block.startswith("aux_") and block not in taps:
                continue
            for index in range(counts.get(block, 1)):
                for part in range(len(self.parts[kind])):
                    yield self.module(block, part, index)


_CANONICAL = Layout(
    blocks={
        "stem": "learning_to_downsample.stem",
        "downsample": "learning_to_downsample.dsconv{1}",
        "bottleneck1": "global_features.bottleneck1.{0}",
        "bottleneck2": "global_features.bottleneck2.{0}",
        "bottleneck3": "global_features.bottleneck3.{0}",
        "pyramid_branch": "global_features.pyramid.branches.{0}",
        "pyramid_out": "global_features.pyramid.out",
        "fusion_refine": "feature_fusion.refine",
        "fusion_low": "feature_fusion.low",
        "fusion_high": "feature_fusion.high",
        "classifier": "classifier.dsconv{1}",
        "logits": "classifier.conv",
        "aux_downsample": "auxiliary.downsample",
        "aux_global": "auxiliary.global",
    },
    parts={
        "conv": ("conv", "bn"),
        "projection": ("conv", "bn"),
        "dsconv": ("depthwise.conv", "depthwise.bn", "pointwise.conv", "pointwise.bn"),
        "bottleneck": (
            *("expand.conv", "expand.bn", "depthwise.conv", "depthwise.bn"),
            *("project.conv", "project.bn"),
        ),
        "logits": ("",),
        "auxiliary": ("hidden.conv", "hidden.bn", "conv"),
    },
)
_TRAMAC = Layout(
    blocks={
        "stem": "learning_to_downsample.conv",
        "downsample": "learning_to_downsample.dsconv{1}",
        "bottleneck1": "global_feature_extractor.bottleneck1.{0}",
        "bottleneck2": "global_feature_extractor.bottleneck2.{0}",
        "bottleneck3": "global_feature_extractor.bottleneck3.{0}",
        "pyramid_branch": "global_feature_extractor.ppm.conv{1}",
        "pyramid_out": "global_feature_extractor.ppm.out",
        "fusion_refine": "feature_fusion.dwconv",
        "fusion_low": "feature_fusion.conv_lower_res",
        "fusion_high": "feature_fusion.conv_higher_res",
        "classifier": "classifier.dsconv{1}",
        "logits": "classifier.conv.1",
        "aux_downsample": "auxlayer",
    },
    parts={
        "conv": ("conv.0", "conv.1"),
        "projection": ("0", "1"),
        "dsconv": ("conv.0", "conv.1", "conv.3", "conv.4"),
        "bottleneck": (
            *("block.0.conv.0", "block.0.conv.1", "block.1.conv.0", "block.1.conv.1"),
            *("block.2", "block.3"),
        ),
        "logits": ("",),
        "auxiliary": ("0", "1", "4"),
    },
)
_SEGMENTRON = Layout(
    blocks=_TRAMAC.blocks
    | {
        "pyramid_branch": "global_feature_extractor.ppm.convs.{0}",
        "pyramid_out": "global_feature_extractor.out",
        "aux_downsample": "auxlayer1",
        "aux_global": "auxlayer2",
    },
    parts=_TRAMAC.parts
    | {
        "conv": ("conv", "bn"),
        "dsconv": ("block.depthwise", "block.bn_depth", "block.pointwise", "block.bn_point"),
        "bottleneck": ("conv.0.conv", "conv.0.bn", "conv.1.conv", "conv.1.bn", "conv.2", "conv.3"),
    },
)
_MMSEG = Layout(
    blocks={
        "stem": "backbone.learning_to_downsample.conv",
        "downsample": "backbone.learning_to_downsample.dsconv{1}",
        "bottleneck1": "backbone.global_feature_extractor.bottleneck1.{0}",
        "bottleneck2": "backbone.global_feature_extractor.bottleneck2.{0}",
        "bottleneck3": "backbone.global_feature_extractor.bottleneck3.{0}",
        "pyramid_branch": "backbone.global_feature_extractor.ppm.{0}.1",
        "pyramid_out": "backbone.global_feature_extractor.out",
        "fusion_refine": "backbone.feature_fusion.dwconv",
        "fusion_low": "backbone.feature_fusion.conv_lower_res",
        "fusion_high": "backbone.feature_fusion.conv_higher_res",
        "classifier": "decode_head.convs.{0}",
        "logits": "decode_head.conv_seg",
        "aux_downsample": "auxiliary_head.1",
        "aux_global": "auxiliary_head.0",
    },
    parts={
        "conv": ("conv", "bn"),
        "projection": ("conv", "bn"),
        "dsconv": (
            *("depthwise_conv.conv", "depthwise_conv.bn"),
            *("pointwise_conv.conv", "pointwise_conv.bn"),
        ),
        "bottleneck": (
            *("conv.0.conv", "conv.0.bn", "conv.1.conv", "conv.1.bn", "conv.2.conv", "conv.2.bn"),
        ),
        "logits": ("",),
        "auxiliary": ("convs.0.conv", "convs.0.bn", "conv_seg"),
    },
)
_ZACARIO = Layout(
    blocks={
        "stem": "learningToDownSample.conv",
        "downsample": "learningToDownSample.dsc{1}",
        "bottleneck1": "globalFeatureExtractor.bt1.{0}",
        "bottleneck2": "globalFeatureExtractor.bt2.{0}",
        "bottleneck3": "globalFeatureExtractor.bt3.{0}",
        "pyramid_branch": "globalFeatureExtractor.ppm.p{1}",
        "pyramid_out": "globalFeatureExtractor.ppm.cat",
        "fusion_refine": "featureFusion.dwconv",
        "fusion_low": "featureFusion.upBranch",
        "fusion_high": "featureFusion.downBranch",
        "classifier": "classifier.dsconv{1}",
        "logits": "classifier.conv",
        "aux_downsample": "auxlayer",
    },
    parts=_TRAMAC.parts,
)
_LEFTTHOMAS = Layout(
    blocks={
        "stem": "learning_to_down_sample.conv",
        "downsample": "learning_to_down_sample.dsconv{1}",
        "bottleneck1": "global_feature_extractor.first_block.{0}",
        "bottleneck2": "global_feature_extractor.second_block.{0}",
        "bottleneck3": "global_feature_extractor.third_block.{0}",
        "pyramid_branch": "global_feature_extractor.ppm.stages.{0}.1",
        "pyramid_out": "global_feature_extractor.ppm.conv",
        "fusion_refine": "feature_fusion.dwconv",
        "fusion_low": "feature_fusion.conv_low_res",
        "fusion_high": "feature_fusion.conv_high_res",
        "classifier": "classifier.dsconv{1}",
        "logits": "classifier.conv",
    },
    parts={
        "conv": ("conv", "bn"),
        "projection": ("", "bn"),
        "dsconv": ("0", "1", "2", "3"),
        "bottleneck": ("conv.0", "conv.1", "conv.3", "conv.4", "conv.6", "conv.7"),
        "logits": ("",),
    },
)

#: Layouts by name. All but our own, which takes any network, are named like the preset they belong to.
LAYOUTS: dict[str, Layout] = {
    "fastscnn_fast": _CANONICAL,
    "tramac": _TRAMAC,
    "mmseg": _MMSEG,
    "mmseg_legacy": _MMSEG,
    "segmentron": _SEGMENTRON,
    "zacario": _ZACARIO,
    "leftthomas": _LEFTTHOMAS,
}

_FIXED = (
    "stem_padding",
    "dsconv_mid_activation",
    "bottleneck_activation",
    "pyramid_input_first",
    "pyramid_kernel",
    "pyramid_bins",
    "fusion_refine",
    "fusion_dilation",
    "fusion_bias",
    "fusion_norm",
    "align_corners",
)
"""What the code of a layout decides by itself; widths, repeats and class counts it could be told."""


def layout_names(config: Config, layout: str) -> dict[str, str]:
    """Our name -> the layout's name for every tensor of the network that ``config`` describes.

    Raises:
        ValueError: an unknown layout, or one whose code would compute something else.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if layout != "fastscnn_fast":
        _check_belongs(config, layout)
    return _names(config, LAYOUTS[layout])


def to_layout(model: FastSCNN, layout: str) -> dict[str, Tensor]:
    """The tensors of ``model`` under another code base's names, ready for its ``load_state_dict``.

    Like a state_dict they share memory with the model. Mean and std are not part of any such layout.

    Raises:
        ValueError: an unknown layout, or one whose code would compute something else.
    """
    names = layout_names(model.config, layout)
    return {names[name]: tensor for name, tensor in _tensors_of(model).items()}


def _check_belongs(config: Config, layout: str) -> None:
    theirs = PRESETS[layout]
    wanted = {name: getattr(theirs, name) for name in _FIXED}
    if config.aux and not set(config.aux_taps) <= set(theirs.aux_taps):
        wanted |= {"aux_taps": theirs.aux_taps} if theirs.aux_taps else {"aux": False}
    if layout == "zacario":  # its code builds the head whatever aux says
        wanted["aux"] = True
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"layout {layout!r} cannot hold this network: there {name} is {value!r}, "
                f"got {getattr(config, name)!r}"
            )


def _names(config: Config, layout: Layout) -> dict[str, str]:
    modules = dict(zip(_CANONICAL.modules(config), layout.modules(config)))
    names = {}
    for key in _shapes(config):
        module, tensor = key.rsplit(".", 1)
        names[key] = f"{modules[module]}.{tensor}"
    return names


@functools.lru_cache(maxsize=32)
def _shapes(config: Config) -> Shapes:
    with torch.device("meta"):
        tensors = _tensors_of(FastSCNN.from_config(config))
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _tensors_of(model: FastSCNN) -> dict[str, Tensor]:
    """Parameters and buffers under our own names, in state_dict's order, whatever state_dict is called."""
    return {
        f"{prefix}.{name}": tensor.detach()
        for prefix, module in model.named_modules()
        for named in (module.named_parameters, module.named_buffers)
        for name, tensor in named(recurse=False)
    }


# --- from tensors to a model -----------------------------------------------------------------------------

_CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "network", "net")
_PREFIXES = ("module.", "model.", "network.", "net.", "_orig_mod.")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_DEEPEST = 8


def from_state_dict(
    state: Any, preset: str | None = None, source: str = "state_dict", **overrides: Any
) -> FastSCNN:
    """A FastSCNN in eval mode with a copy of the weights in ``state``, whatever its layout and wrapping.

    Args:
        state: a state_dict of any known layout, or a checkpoint that contains one.
        preset: for what shapes do not tell; by default the layout's own, and for our own layout the
            one published implementation that has these shapes.
        source: how errors name ``state``.
        overrides: fields of :class:`Config` that differ from the preset (``mean``, ``std``, ...).

    Raises:
        CheckpointError: no known network; names the closest layout and what differs.
        ValueError: an unknown preset or field.
    """
    tensors = _tensors_in(state, source)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    closest = max(LAYOUTS, key=lambda name: _resemblance(shapes, LAYOUTS[name]))
    layout = LAYOUTS[closest]
    if preset is not None:
        candidates = [preset]
    elif layout is _CANONICAL:
        candidates = list(PRESETS)
    else:
        candidates = [name for name in PRESETS if LAYOUTS.get(name) is layout]

    fits = []
    for name in candidates:
        base = config_preset(name)
        values = _derive(shapes, layout, base) | overrides
        if "pyramid_bins" not in overrides and values["pyramid_bins"] is None:
            raise CheckpointError(
                f"{source}: pyramid_bins must be given, since the {_count(shapes, layout, 'pyramid_branch')} "
                f"branches are not the preset's {base.pyramid_bins}"
            )
        config = _config(source, config_preset, name, **values)
        absent = [t for t in config.aux_taps if config.aux and f"aux_{t}" not in layout.blocks]
        if absent:
            raise CheckpointError(
                f"{source}: layout {closest!r} has no {absent[0]!r} auxiliary head"
            )
        fits.append((_Fit(source, config, layout, shapes), name))
    fit, name = min(fits, key=lambda pair: pair[0].problems)
    if fit.problems:
        which = f"layout {closest!r}" if name == closest else f"layout {closest!r}, preset {name!r}"
        raise CheckpointError(f"{source}: no known Fast-SCNN; closest is {which}: {fit}")
    return _build(
        fit.config, {ours: tensors[key] for ours, key in fit.names.items() if key in tensors}
    )


def _from_own(state: Any, config: Config, source: str) -> FastSCNN:
    tensors = _tensors_in(state, source)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for field, value in _derive(shapes, _CANONICAL, config).items():
        stated = getattr(config, field)
        if value != stated:
            raise CheckpointError(
                f"{source}: {field} is {stated!r} by its config, {value!r} by its tensors"
            )
    fit = _Fit(source, config, _CANONICAL, shapes)
    if fit.problems:
        raise CheckpointError(f"{source}: its tensors do not belong to its config: {fit}")
    return _build(config, tensors)


def _config(source: str, make: Any, *args: Any, **values: Any) -> Config:
    try:
        config: Config = make(*args, **values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from None
    return config


class _Fit:
    """How far the keys and shapes of a file are from those of one network in one layout."""

    def __init__(self, source: str, config: Config, layout: Layout, shapes: Shapes) -> None:
        self.config = config
        try:
            self.names = _names(config, layout)
        except RuntimeError as error:  # more elements than torch can count
            raise CheckpointError(f"{source}: {error}") from None
        wanted = {self.names[name]: shape for name, shape in _shapes(config).items()}
        self.missing = [k for k in wanted if k not in shapes and not _optional(k)]
        self.unexpected = [k for k in shapes if k not in wanted]
        self.misshaped = [
            f"{k} is {shapes[k]}, should be {shape}"
            for k, shape in wanted.items()
            if shapes.get(k, shape) != shape
        ]
        self.problems = len(self.missing) + len(self.unexpected) + len(self.misshaped)

    def __str__(self) -> str:
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": self.misshaped,
        }
        return "; ".join(
            f"{len(found)} {kind} (first: {found[0]})" for kind, found in kinds.items() if found
        )


def _optional(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _resemblance(shapes: Shapes, layout: Layout) -> int:
    return sum(f"{module}.weight" in shapes for module in layout.modules(Config()))


def _has(shapes: Shapes, layout: Layout, block: str, index: int = 0) -> bool:
    return block in layout.blocks and f"{layout.module(block, index=index)}.weight" in shapes


def _count(shapes: Shapes, layout: Layout, block: str) -> int:
    return next(n for n in itertools.count() if not _has(shapes, layout, block, n))


def _derive(shapes: Shapes, layout: Layout, base: Config) -> dict[str, Any]:
    """The free fields as the shapes tell them; the base's where a tensor is absent.

    ``pyramid_bins`` cannot be seen: the base's where there are as many branches, else None.
    """

    def size(default: int, dimension: int, block: str, part: int = 0, index: int = 0) -> int:
        shape = shapes.get(f"{layout.module(block, part, index)}.weight", ())
        return shape[dimension] if len(shape) == 4 else default

    def stage(index: int, blocks: Sequence[Block]) -> tuple[Block, ...]:
        """Widths by the tensors; strides, which they do not show, by the base."""
        name = f"bottleneck{index}"
        count = min(_count(shapes, layout, name), MOST_BLOCKS) or len(blocks)
        known = [*blocks, *[(0, 0, 1)] * (count - len(blocks))][:count]
        return tuple(
            (size(mid, 0, name, 0, i), size(out, 0, name, 4, i), stride)
            for i, (mid, out, stride) in enumerate(known)
        )

    down = base.downsample_channels
    taps = tuple(tap for tap in base.aux_taps if _has(shapes, layout, f"aux_{tap}"))
    as_many = _count(shapes, layout, "pyramid_branch") in (0, len(base.pyramid_bins))
    return {
        "num_classes": size(base.num_classes, 0, "logits"),
        "in_channels": size(base.in_channels, 1, "stem"),
        "downsample_channels": (
            size(down[0], 0, "stem"),
            *(size(down[i + 1], 0, "downsample", 2, i) for i in (0, 1)),
        ),
        "bottlenecks": tuple(
            stage(i, blocks) for i, blocks in enumerate(base.bottlenecks, start=1)
        ),
        "pyramid_bins": base.pyramid_bins if as_many else None,
        "pyramid_channels": size(base.pyramid_channels, 0, "pyramid_out"),
        "fusion_channels": size(base.fusion_channels, 0, "fusion_low"),
        "aux": bool(taps),
        "aux_taps": taps or base.aux_taps,
        "aux_channels": size(base.aux_channels, 0, f"aux_{taps[0]}") if taps else base.aux_channels,
    }


def _tensors_in(state: Any, source: str) -> dict[str, Tensor]:
    """The state_dict inside a checkpoint, its keys without the wrappers' prefixes; no data is touched."""
    for _ in range(_DEEPEST):
        if not isinstance(state, Mapping):
            raise CheckpointError(
                f"{source}: holds a {type(state).__name__}, not a dictionary of tensors"
            )
        inner = [state[k] for k in _CONTAINERS if isinstance(state.get(k), Mapping)]
        if not inner:
            break
        state = inner[0]
    else:
        raise CheckpointError(f"{source}: nested more than {_DEEPEST} dictionaries deep")
    if not state:
        raise CheckpointError(f"{source}: holds no tensors")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            what = f"{key!r} is a {type(value).__name__}"
            raise CheckpointError(f"{source}: holds more than named tensors: {what}")
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise CheckpointError(f"{source}: {key} is not an ordinary dense tensor")
        if value.dtype not in _DTYPES and not _optional(key):
            raise CheckpointError(f"{source}: {key} is of {value.dtype}, not of a floating type")
    tensors: dict[str, Tensor] = dict(state)
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in tensors)), ""):
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


def _build(config: Config, tensors: Mapping[str, Tensor]) -> FastSCNN:
    """The network with copies of tensors that fit it; all in one type, the widest among them."""
    floats = [tensor for name, tensor in tensors.items() if not _optional(name)]
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in floats))
    device = floats[0].device
    with torch.device("meta"):
        model = FastSCNN.from_config(config)
    state = {}
    for name, shape in _shapes(config).items():
        wanted = torch.int64 if _optional(name) else dtype
        state[name] = torch.zeros(shape, dtype=wanted, device=device)
        if name in tensors:
            state[name].copy_(tensors[name].detach())
    model.load_state_dict(state, assign=True)
    return model.eval()


# --- files -----------------------------------------------------------------------------------------------

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
        mean, std: the normalisation that the weights were trained with, one value per input channel;
            by default ImageNet's (or what :func:`save_checkpoint` wrote). No other layout records them.
        preset: for what shapes do not tell; by default the layout's own.
        overrides: any other field of :class:`Config` that differs from the preset.

    Raises:
        CheckpointError: a truncated, empty, huge, foreign or malicious file. Nothing in it is executed.
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
    return _from_own(state, _config(source, replace, config, **overrides), source)


def save_checkpoint(
    model: FastSCNN,
    path: str | os.PathLike[str],
    details: Mapping[str, Any] | None = None,
    stored_as: torch.dtype | None = None,
) -> None:
    """Writes the weights and the whole config (mean, std and size too) to a ``.safetensors`` file.

    Args:
        details: values for JSON that :func:`read_details` gives back: class names, scores, and so on.
        stored_as: dtype of the weights in the file, torch.float16 for a small one; they come back in the
            model's own dtype.

    Raises:
        ValueError: another ending, by which :func:`load_checkpoint` would not know the file; weights that
            are too large for ``stored_as``.
    """
    from safetensors.torch import save_file

    if Path(path).suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {str(path)!r}")
    tensors = {name: tensor.contiguous() for name, tensor in _tensors_of(model).items()}
    metadata = {_METADATA: json.dumps(model.config.to_dict())}
    if stored_as is not None:
        metadata[_DTYPE] = str(model.classifier.conv.weight.dtype).removeprefix("torch.")
        tensors = {name: _stored(name, t, stored_as) for name, t in tensors.items()}
    if details is not None:
        metadata[_DETAILS] = json.dumps(details)
    save_file(tensors, path, metadata)


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    stored = tensor.to(dtype)
    if not torch.equal(stored.isfinite(), tensor.isfinite()):
        largest = tensor.abs().max().item()
        raise ValueError(f"stored_as must hold {name}, up to {largest:.3g}, got {dtype}")
    return stored


def read_details(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The ``details`` that :func:`save_checkpoint` wrote; empty for a file without any."""
    from safetensors import safe_open

    if Path(path).suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        details = json.loads((file.metadata() or {}).get(_DETAILS, "{}"))
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
    tensors = _tensors_in(state, source)
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
    config = _config(f"{path}: in its config", Config.from_dict, json.loads(metadata[_METADATA]))
    if _DTYPE not in metadata:
        return state, config, None
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES}
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
