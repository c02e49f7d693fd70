"""Where each known implementation keeps the tensors of the network: tables of names."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arch.config import PRESETS, Config, Stages, bottlenecks
from ..arch.network import PlainFastSCNN

#: The shapes of tensors by name.
Shapes = dict[str, tuple[int, ...]]

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


OURS = Layout(
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
    "fastscnn_fast": OURS,
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
"""What the code of a layout decides by itself, besides strides; widths, how many bottlenecks and class counts
it could be told."""


def layout_names(config: Config, layout: str) -> dict[str, str]:
    """Our name -> the layout's name for every tensor of the network that ``config`` describes.

    Raises:
        ValueError: an unknown layout, or one whose code would compute something else.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if layout != "fastscnn_fast":
        _check_belongs(config, layout)
    return names_in(config, LAYOUTS[layout])


def to_layout(model: PlainFastSCNN, layout: str) -> dict[str, Tensor]:
    """The tensors of ``model`` under another code base's names, ready for its ``load_state_dict``.

    Like a state_dict they share memory with the model. Mean and std are not part of any such layout.

    Raises:
        ValueError: an unknown layout, or one whose code would compute something else.
    """
    names = layout_names(model.config, layout)
    return {names[name]: tensor for name, tensor in tensors_of(model).items()}


def _check_belongs(config: Config, layout: str) -> None:
    theirs = PRESETS[layout]
    published = bottlenecks(1, (1, 1, 1), tuple(map(len, config.bottlenecks)), 1)
    if (got := _strides(config.bottlenecks)) != (strides := _strides(published)):
        raise ValueError(
            f"layout {layout!r} cannot hold this network: there the strides of its bottlenecks are {strides},"
            f" got {got}"
        )
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


def _strides(stages: Stages) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(stride for _, _, stride in stage) for stage in stages)


def names_in(config: Config, layout: Layout) -> dict[str, str]:
    """Our name -> the name in ``layout``, whether its code could compute the network or not.

    Raises:
        RuntimeError: a network of more elements than torch can count.
    """
    modules = dict(zip(OURS.modules(config), layout.modules(config)))
    names = {}
    for key in shapes_of(config):
        module, tensor = key.rsplit(".", 1)
        names[key] = f"{modules[module]}.{tensor}"
    return names


@functools.lru_cache(maxsize=32)
def shapes_of(config: Config) -> Shapes:
    """The shape of every tensor of the network, by our names; RuntimeError as :func:`names_in`."""
    with torch.device("meta"):
        tensors = tensors_of(PlainFastSCNN.from_config(config))
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def tensors_of(model: PlainFastSCNN) -> dict[str, Tensor]:
    """Parameters and buffers under our own names, in state_dict's order, whatever state_dict is called."""
    return {
        f"{prefix}.{name}": tensor.detach()
        for prefix, module in model.named_modules()
        for named in (module.named_parameters, module.named_buffers)
        for name, tensor in named(recurse=False)
    }
