"""The training forward of FastSCNN on faster kernels: same modules, same parameters, same results.

:func:`low_logits` walks the modules of a :class:`FastSCNN` in training mode as its ``reference`` does, but
batch norm, residual and activation are one op, depthwise convolutions have a gradient of their own,
dropout draws its mask sixteen bits a value, and the logits stay small: the loss resizes them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..arch.config import Config
from ..arch.network import (
    AuxiliaryHead,
    ConvBNAct,
    DSConv,
    FeatureFusion,
    InvertedResidual,
    PyramidPooling,
    batch_norm,
    resize,
)
from ..backends import registry
from ..runtime.model import FastSCNN

_ACTIVATIONS: dict[type[nn.Module], int] = {nn.Identity: 0, nn.ReLU: 1, nn.ReLU6: 2}


def _native(x: Tensor, channels: int) -> bool:
    """Whether the kernels take this activation."""
    return (
        x.dtype in (torch.float32, torch.bfloat16)
        and channels % 16 == 0
        and registry.training_module(x.device) is not None
    )


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _call(name: str, x: Tensor, *args: Any) -> None:
    kernel = getattr(registry.cpu_module(), name)
    kernel(registry.isa(), torch.get_num_threads(), x.dtype == torch.bfloat16, *args)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class _BatchNormAct(torch.autograd.Function):
    """act(batch norm(x) [+ residual]) by the batch's statistics; the running ones are updated."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        residual: Tensor | None,
        bn: nn.BatchNorm2d,
        activation: int,
    ) -> Tensor:
        x = _dense(x)
        if residual is not None:
            residual = _dense(residual)
        y = torch.empty_like(x)
        mean, inverse_std = torch.empty(2, x.shape[1], dtype=torch.float32)
        pixels = x.numel() // x.shape[1]
        _call(
            "batch_norm_forward",
            x,
            activation,
            pixels,
            x.shape[1],
            x.data_ptr(),
            _address(residual),
            gamma.data_ptr(),
            beta.data_ptr(),
            mean.data_ptr(),
            inverse_std.data_ptr(),
            bn.eps,
            bn.momentum,
            _address(bn.running_mean),
            _address(bn.running_var),
            y.data_ptr(),
        )
        kept = y if residual is not None and activation else None
        ctx.save_for_backward(x, gamma, beta, mean, inverse_std, kept)
        ctx.activation, ctx.has_residual = activation, residual is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, mean, inverse_std, kept = ctx.saved_tensors
        g = _dense(upstream[0])
        x_gradient = torch.empty_like(x)
        residual_gradient = torch.empty_like(x) if kept is not None else None
        of_gamma, of_beta = torch.empty(2, x.shape[1], dtype=torch.float32)
        _call(
            "batch_norm_backward",
            x,
            ctx.activation,
            x.numel() // x.shape[1],
            x.shape[1],
            x.data_ptr(),
            _address(kept),
            gamma.data_ptr(),
            beta.data_ptr(),
            mean.data_ptr(),
            inverse_std.data_ptr(),
            g.data_ptr(),
            x_gradient.data_ptr(),
            _address(residual_gradient),
            of_gamma.data_ptr(),
            of_beta.data_ptr(),
        )
        if ctx.has_residual and residual_gradient is None:
            residual_gradient = g
        return x_gradient, of_gamma, of_beta, residual_gradient, None, None


class _Depthwise(torch.autograd.Function):
    """A depthwise 3x3 without bias; the forward is torch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
        x = _dense(x)
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.dilation = stride, dilation
        w = weight.to(x.dtype)
        return F.conv2d(x, w, None, stride, dilation, dilation, groups=x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        g = _dense(upstream[0])
        x_gradient = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        taps = weight.to(x.dtype).float().reshape(-1, 9).t().contiguous()  # as forward used it
        of_weight = torch.empty_like(taps)
        n, c, h, w = x.shape
        _call(
            "depthwise_backward",
            x,
            (n, c, h, w),
            ctx.stride,
            ctx.dilation,
            x.data_ptr(),
            g.data_ptr(),
            taps.data_ptr(),
            _address(x_gradient),
            of_weight.data_ptr(),
        )
        return x_gradient, of_weight.t().reshape(weight.shape), None, None


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout whose mask costs a quarter of a 64-bit random number a value; p is met to 1/65536."""
    if p == 0:
        return x
    x = _dense(x)
    threshold = round(p * 65536)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    bits.random_(torch.iinfo(torch.int64).min, None)
    kept = bits.view(torch.int16)[: x.numel()] >= threshold - 32768
    mask = kept.to(x.dtype).mul_(65536 / (65536 - threshold))
    return x * torch.as_strided(mask, x.shape, x.stride())


def batch_norm_act(
    x: Tensor, bn: nn.Module, act: nn.Module, residual: Tensor | None = None
) -> Tensor:
    """act(bn(x) [+ residual]), for x (N, C, H, W) in float32 or bfloat16; the plain modules for all else."""
    if not _fusible(x, bn, act, residual):
        x = batch_norm(bn, x)
        return cast(Tensor, act(x if residual is None else x + residual))
    bn, activation = cast(nn.BatchNorm2d, bn), _ACTIVATIONS[type(act)]
    y = _BatchNormAct.apply(x, bn.weight, bn.bias, residual, bn, activation)  # type: ignore[no-untyped-call]
    assert bn.num_batches_tracked is not None
    bn.num_batches_tracked.add_(1)
    return cast(Tensor, y)


def _fusible(x: Tensor, bn: nn.Module, act: nn.Module, residual: Tensor | None) -> bool:
    if type(bn) is not nn.BatchNorm2d or not bn.training or bn.momentum is None:
        return False
    state = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    return (
        type(act) in _ACTIVATIONS
        and _native(x, x.shape[1])
        and x.numel() > x.shape[1]
        and all(
            t is not None
            and t.dtype == torch.float32
            and t.device == x.device
            and t.is_contiguous()
            for t in state
        )
        and (residual is None or (residual.dtype, residual.shape) == (x.dtype, x.shape))
    )


def convolution(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """conv(x), with the gradients of a depthwise 3x3 by our kernels."""
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    depthwise = conv.groups == conv.in_channels > 1 and conv.kernel_size == (3, 3)
    if depthwise and conv.bias is None and _native(x, x.shape[1]):
        y = _Depthwise.apply(x, conv.weight, conv.stride[0], conv.dilation[0])  # type: ignore[no-untyped-call]
        return cast(Tensor, y)
    return cast(Tensor, conv(x))


# The blocks of model.py by their forwards, (N, C, H, W) -> (N, O, H', W') in the autocast dtype.


def conv_bn_act(block: ConvBNAct, x: Tensor) -> Tensor:
    return batch_norm_act(convolution(x, block.conv), block.bn, block.act)


def dsconv(block: DSConv, x: Tensor) -> Tensor:
    return conv_bn_act(block.pointwise, conv_bn_act(block.depthwise, x))


def inverted_residual(block: InvertedResidual, x: Tensor) -> Tensor:
    y = conv_bn_act(block.depthwise, conv_bn_act(block.expand, x))
    project = block.project
    residual = x if block.residual else None
    return batch_norm_act(convolution(y, project.conv), project.bn, project.act, residual)


def pyramid_pooling(block: PyramidPooling, x: Tensor) -> Tensor:
    size = x.shape[2:]
    pooled = [
        resize(branch(block.pool(x, bins)), size, block.align_corners)
        for bins, branch in zip(block.bins, block.branches)
    ]
    parts = [x, *pooled] if block.input_first else [*pooled, x]
    return conv_bn_act(block.out, torch.cat(parts, 1))


def feature_fusion(block: FeatureFusion, high: Tensor, low: Tensor) -> Tensor:
    low = resize(low, high.shape[2:], block.align_corners)
    low = conv_bn_act(block.low, conv_bn_act(block.refine, low))
    return batch_norm_act(convolution(high, block.high.conv), block.high.bn, block.act, low)


def auxiliary_head(block: AuxiliaryHead, x: Tensor) -> Tensor:
    return cast(Tensor, block.conv(dropped(block.dropout, conv_bn_act(block.hidden, x))))


def dropped(module: nn.Module, x: Tensor) -> Tensor:
    """``module``, a dropout, of x."""
    if type(module) is nn.Dropout and module.training:
        return dropout(x, module.p)
    return cast(Tensor, module(x))


def low_logits(model: FastSCNN, x: Tensor) -> list[Tensor]:
    """The logits before the resize to full size: the network's own, then the auxiliary heads'."""
    down, features = model.learning_to_downsample, model.global_features
    x = conv_bn_act(down.stem, x)
    high = dsconv(down.dsconv2, dsconv(down.dsconv1, x))
    low = high
    for stage in (features.bottleneck1, features.bottleneck2, features.bottleneck3):
        for block in stage:
            low = inverted_residual(cast(InvertedResidual, block), low)
    low = pyramid_pooling(features.pyramid, low)
    taps = {"downsample": high, "global": low}
    head = model.classifier
    x = dsconv(head.dsconv2, dsconv(head.dsconv1, feature_fusion(model.feature_fusion, high, low)))
    logits = [head.conv(dropped(head.dropout, x))]
    for tap, auxiliary in model.auxiliary.items():
        logits.append(auxiliary_head(cast(AuxiliaryHead, auxiliary), taps[tap]))
    return logits


def normalised(pictures: Tensor, config: Config) -> Tensor:
    """uint8 (N, C, H, W) -> (pixels / 255 - mean) / std in float32, channels-last."""
    mean, std = (
        torch.tensor(v, dtype=torch.float32, device=pictures.device)[:, None, None]
        for v in (config.mean, config.std)
    )
    return torch.addcmul(-mean / std, pictures.float(), 1 / (255 * std))
