"""Batch-norm folding: a FastSCNN in eval mode as the weights of its fused layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..arch.config import Config
from ..arch.network import (
    ConvBNAct,
    DSConv,
    FeatureFusion,
    InvertedResidual,
    PlainFastSCNN,
    PyramidPooling,
    Ranges,
)
from ..arch.structure import Unfusable, submodules, unsound
from ..program.layers import Layer
from ..program.memory import check_memory
from ..program.program import Program, fast_scnn


@dataclass(frozen=True)
class FoldedWeights:
    """The network without batch norm, in float64: ``tensors[i]`` holds ``layers[i].weights()`` by name.

    ``ranges`` are those of the model, if it has any.
    """

    config: Config
    program: Program
    tensors: tuple[dict[str, Tensor], ...]
    ranges: Ranges | None = None

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.program.layers

    def check_range(self, dtype: torch.dtype) -> None:
        """Weights that are finite need not be so once they are folded and of ``dtype``.

        Raises:
            Unfusable: one is not; the message names it.
        """
        if not dtype.is_floating_point:
            return
        most = torch.finfo(dtype).max
        for index, (layer, tensors) in enumerate(zip(self.layers, self.tensors)):
            for name, tensor in tensors.items():
                if tensor.numel() and not (largest := tensor.abs().max().item()) <= most:
                    raise Unfusable(
                        f"{name} of layer {index} ({layer.op}) is up to {largest:.3g} once batch norm is"
                        f" folded into it, more than {dtype} holds"
                    )


def fold_conv(block: ConvBNAct) -> tuple[Tensor, Tensor]:
    """Weight (O, I, kh, kw) and bias (O,) of a convolution and the batch norm behind it, in float64.

    BN(Wx + b) = s W x + s (b - mean) + beta with s = gamma / sqrt(var + eps).
    """
    weight = block.conv.weight.double()
    bias = weight.new_zeros(weight.shape[0])
    if block.conv.bias is not None:
        bias = block.conv.bias.double()
    if isinstance(block.bn, nn.modules.batchnorm._BatchNorm):
        bn = block.bn
        mean, variance = cast(Tensor, bn.running_mean), cast(Tensor, bn.running_var)
        scale = bn.weight.double() / torch.sqrt(variance.double() + bn.eps)
        weight = weight * scale[:, None, None, None]
        bias = (bias - mean.double()) * scale + bn.bias.double()
    return weight, bias


def _matrix(block: ConvBNAct) -> tuple[Tensor, Tensor]:
    weight, bias = fold_conv(block)
    return weight[:, :, 0, 0], bias


def _depthwise(block: ConvBNAct) -> tuple[Tensor, Tensor]:
    weight, bias = fold_conv(block)
    return weight[:, 0], bias


def _dsconv(block: DSConv, layer: Layer, last: nn.Conv2d | None) -> dict[str, Tensor]:
    depthwise, depthwise_bias = _depthwise(block.depthwise)
    pointwise, pointwise_bias = _matrix(block.pointwise)
    if layer.mid_activation == "none":  # nothing between the two: the bias moves on
        pointwise_bias = pointwise_bias + pointwise @ depthwise_bias
        depthwise_bias = torch.zeros_like(depthwise_bias)
    tensors = {
        "depthwise_weight": depthwise,
        "depthwise_bias": depthwise_bias,
        "pointwise_weight": pointwise,
        "pointwise_bias": pointwise_bias,
    }
    if last is not None:
        tensors["last_weight"] = last.weight.double()[:, :, 0, 0]
        tensors["last_bias"] = cast(Tensor, last.bias).double()
    return tensors


def _inverted_residual(block: InvertedResidual) -> dict[str, Tensor]:
    expand, expand_bias = _matrix(block.expand)
    depthwise, depthwise_bias = _depthwise(block.depthwise)
    project, project_bias = _matrix(block.project)
    return {
        "expand_weight": expand,
        "expand_bias": expand_bias,
        "depthwise_weight": depthwise,
        "depthwise_bias": depthwise_bias,
        "project_weight": project,
        "project_bias": project_bias,
    }


def _pyramid(block: PyramidPooling) -> dict[str, Tensor]:
    branches = [_matrix(cast("ConvBNAct", branch)) for branch in block.branches]
    out, out_bias = fold_conv(block.out)
    if not block.input_first:  # the kernels' order is [input, branches]
        split = sum(weight.shape[0] for weight, _ in branches)
        out = torch.cat([out[:, split:], out[:, :split]], 1)
    return {
        "branch_weight": torch.stack([weight for weight, _ in branches]),
        "branch_bias": torch.stack([bias for _, bias in branches]),
        "out_weight": out,
        "out_bias": out_bias,
    }


def _fusion(block: FeatureFusion, layer: Layer) -> dict[str, Tensor]:
    refine, refine_bias = (_matrix if layer.dense else _depthwise)(block.refine)
    low, low_bias = _matrix(block.low)
    high, high_bias = _matrix(block.high)
    return {
        "refine_weight": refine,
        "refine_bias": refine_bias,
        "low_weight": low,
        "high_weight": high,
        "bias": low_bias + high_bias,
    }


def _tensors(model: PlainFastSCNN) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers that run in eval mode, by name."""
    for owner, module in submodules(model):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and type(tensor) in (Tensor, nn.Parameter):
                yield f"{owner}.{name}", tensor


def check_memory_of(model: PlainFastSCNN) -> None:
    """No parameter or buffer that runs in eval mode may have lost its memory.

    Raises:
        RuntimeError: one has, and which.
    """
    for name, tensor in _tensors(model):
        check_memory(name, tensor)


def folded_tensors(model: PlainFastSCNN, program: Program) -> tuple[dict[str, Tensor], ...]:
    """Per layer of ``program``, the model's own, what ``layer.weights()`` names, in float64.

    Every batch norm is as in eval mode; gradients reach its scale and shift, and the convolution before it.
    """
    config = model.config
    downsample, features, classifier = (
        model.learning_to_downsample,
        model.global_features,
        model.classifier,
    )
    blocks = iter((*features.bottleneck1, *features.bottleneck2, *features.bottleneck3))
    dsconvs = iter(
        (
            (downsample.dsconv1, None),
            (downsample.dsconv2, None),
            (classifier.dsconv1, None),
            (classifier.dsconv2, classifier.conv),
        )
    )
    tensors: list[dict[str, Tensor]] = []
    for layer in program.layers:
        if layer.op == "stem_conv":
            weight, bias = fold_conv(downsample.stem)
            mean, std = (weight.new_tensor(v) for v in (config.mean, config.std))
            tensors.append({"weight": weight, "bias": bias, "mean": mean, "std": std})
        elif layer.op == "dsconv":
            block, last = next(dsconvs)
            tensors.append(_dsconv(block, layer, last))
        elif layer.op == "inverted_residual":
            tensors.append(_inverted_residual(cast("InvertedResidual", next(blocks))))
        elif layer.op == "pyramid_pooling":
            tensors.append(_pyramid(features.pyramid))
        elif layer.op == "feature_fusion":
            tensors.append(_fusion(model.feature_fusion, layer))
        else:
            tensors.append({})
    return tuple(tensors)


@torch.no_grad()
def fold(model: PlainFastSCNN) -> FoldedWeights:
    """Fold every batch norm of ``model`` (as in eval mode) into the convolution before it.

    Raises:
        RuntimeError: a parameter or buffer has lost its memory.
        Unfusable: one holds NaN, infinity or a negative variance; the message names it.
    """
    check_memory_of(model)
    for name, tensor in _tensors(model):
        if (what := unsound(name, tensor)) is not None:
            raise Unfusable(f"{name} holds {what}")
    program = fast_scnn(model.config)
    tensors = tuple(
        {name: tensor.detach() for name, tensor in named.items()}
        for named in folded_tensors(model, program)
    )
    return FoldedWeights(model.config, program, tensors, model.ranges)
