"""Fast-SCNN in plain torch: trainable, and the source of the folded and fused network."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from hashlib import blake2b
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import Activation, Config, preset as config_preset

if TYPE_CHECKING:
    from typing_extensions import Self  # of the type checker

_ACTIVATIONS: dict[Activation, Any] = {"none": nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6}


def normalise(x: Tensor, config: Config, dtype: torch.dtype) -> Tensor:
    """Raw pixels (N, C, H, W), RGB, as floats of ``dtype``: (x / 255 - config.mean) / config.std."""
    mean, std = (
        torch.tensor(v, dtype=dtype, device=x.device)[:, None, None]
        for v in (config.mean, config.std)
    )
    return (x.to(dtype) / 255 - mean) / std


def resize(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Bilinear resize of (N, C, h, w) to (N, C, *size)."""
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def batch_norm(bn: nn.Module, x: Tensor) -> Tensor:
    """bn(x) for x (N, C, H, W).

    In training at batch 1 the norm may see one value per channel (the 1x1 pooling bin; every layer at 1/32
    of a 32x32 picture). Batch statistics of one value are undefined: the running statistics stand in, but in
    what torch.fx traces, which knows no sizes.
    """
    known = not isinstance(x, torch.fx.Proxy)
    if known and bn.training and x.numel() == x.shape[1] and isinstance(bn, nn.BatchNorm2d):
        return F.batch_norm(
            x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps
        )
    y: Tensor = bn(x)
    return y


class ConvBNAct(nn.Module):
    """Convolution, batch norm, activation: (N, C, H, W) -> (N, O, H', W')."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm: bool = True,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        if padding is None:
            padding = kernel // 2 * dilation
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, padding, dilation, groups, bias
        )
        self.bn: nn.Module = nn.BatchNorm2d(out_channels) if norm else nn.Identity()
        self.act: nn.Module = _ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(batch_norm(self.bn, self.conv(x)))
        return y


class DSConv(nn.Module):
    """Depthwise 3x3 + BN [+ activation], pointwise 1x1 + BN + ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, mid_activation: Activation
    ) -> None:
        super().__init__()
        self.depthwise = ConvBNAct(
            in_channels, in_channels, 3, stride, groups=in_channels, activation=mid_activation
        )
        self.pointwise = ConvBNAct(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class LearningToDownsample(nn.Module):
    """(N, C, H, W) -> (N, 64, ~H/8, ~W/8): Conv2D, DSConv, DSConv, each of stride 2."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c1, c2, c3 = config.downsample_channels
        mid = config.dsconv_mid_activation
        self.stem = ConvBNAct(config.in_channels, c1, 3, 2, config.stem_padding)
        self.dsconv1 = DSConv(c1, c2, 2, mid)
        self.dsconv2 = DSConv(c2, c3, 2, mid)

    def forward(self, x: Tensor) -> Tensor:
        return self.dsconv2(self.dsconv1(self.stem(x)))


class InvertedResidual(nn.Module):
    """1x1 expand + act, depthwise 3x3 + act, 1x1 linear; the input is added where shapes allow."""

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        stride: int,
        activation: Activation,
    ) -> None:
        super().__init__()
        self.residual = stride == 1 and in_channels == out_channels
        self.expand = ConvBNAct(in_channels, mid_channels, activation=activation)
        self.depthwise = ConvBNAct(
            mid_channels, mid_channels, 3, stride, groups=mid_channels, activation=activation
        )
        self.project = ConvBNAct(mid_channels, out_channels, activation="none")

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class PyramidPooling(nn.Module):
    """Adaptive average pools, 1x1s, resize, concat with the input, out-convolution."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        channels, branch = config.stage_channels[2], config.pyramid_branch_channels
        self.bins = config.pyramid_bins
        self.input_first = config.pyramid_input_first
        self.align_corners = config.align_corners
        self.branches = nn.ModuleList(ConvBNAct(channels, branch) for _ in self.bins)
        self.out = ConvBNAct(
            channels + branch * len(self.bins), config.pyramid_channels, config.pyramid_kernel
        )

    def pool(self, x: Tensor, bins: int) -> Tensor:
        return F.adaptive_avg_pool2d(x, bins)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        pooled = [
            resize(branch(self.pool(x, bins)), size, self.align_corners)
            for bins, branch in zip(self.bins, self.branches)
        ]
        parts = [x, *pooled] if self.input_first else [*pooled, x]
        return self.out(torch.cat(parts, 1))


class GlobalFeatures(nn.Module):
    """(N, 64, h, w) -> (N, 128, ~h/4, ~w/4): three bottleneck stages and the pyramid pooling."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        channels = config.downsample_channels[2]
        stages = []
        for blocks in config.bottlenecks:
            stage = nn.Sequential()
            for mid, out, stride in blocks:
                stage.append(
                    InvertedResidual(channels, mid, out, stride, config.bottleneck_activation)
                )
                channels = out
            stages.append(stage)
        self.bottleneck1, self.bottleneck2, self.bottleneck3 = stages
        self.pyramid = PyramidPooling(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.pyramid(self.bottleneck3(self.bottleneck2(self.bottleneck1(x))))


class FeatureFusion(nn.Module):
    """high (N, 64, h, w), low (N, 128, h/4, w/4) -> (N, 128, h, w).

    The low branch is resized to the high branch's size (never by a fixed factor), refined by a dilated
    depthwise 3x3 or a dense 1x1, projected and added to the projected high branch.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        low, out = config.pyramid_channels, config.fusion_channels
        kernel, groups = (3, low) if config.fusion_refine == "depthwise" else (1, 1)
        self.align_corners = config.align_corners
        self.refine = ConvBNAct(low, low, kernel, dilation=config.fusion_dilation, groups=groups)
        self.low = ConvBNAct(
            low, out, bias=config.fusion_bias, norm=config.fusion_norm, activation="none"
        )
        self.high = ConvBNAct(
            config.downsample_channels[2],
            out,
            bias=config.fusion_bias,
            norm=config.fusion_norm,
            activation="none",
        )
        self.act = nn.ReLU()

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        low = resize(low, high.shape[2:], self.align_corners)
        return self.act(self.low(self.refine(low)) + self.high(high))


def _dropout(config: Config) -> nn.Module:
    return (
        nn.Dropout2d(config.dropout)
        if config.dropout_whole_channels
        else nn.Dropout(config.dropout)
    )


class Classifier(nn.Module):
    """(N, 128, h, w) -> logits (N, K, h, w): DSConv, DSConv, dropout, 1x1 with bias."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        channels, mid = config.fusion_channels, config.dsconv_mid_activation
        self.dsconv1 = DSConv(channels, channels, 1, mid)
        self.dsconv2 = DSConv(channels, channels, 1, mid)
        self.dropout = _dropout(config)
        self.conv = nn.Conv2d(channels, config.num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.dropout(self.dsconv2(self.dsconv1(x))))


class AuxiliaryHead(nn.Module):
    """(N, C, h, w) -> logits (N, K, h, w): 3x3 + BN + ReLU, dropout, 1x1 with bias."""

    def __init__(self, in_channels: int, config: Config) -> None:
        super().__init__()
        self.hidden = ConvBNAct(in_channels, config.aux_channels, 3)
        self.dropout = nn.Dropout(0.1)
        self.conv = nn.Conv2d(config.aux_channels, config.num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.dropout(self.hidden(x)))


#: (lowest, highest) of each value of 8 bits, by the names of :func:`fastscnn_fast.lower.quantise.value_names`.
Ranges = Mapping[str, tuple[float, float]]


def _fingerprint(model: nn.Module) -> bytes:
    """Of all that runs in eval mode: parameters and statistics; of tensors without memory nothing."""
    digest = blake2b(digest_size=16)
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        left_out = name.startswith("auxiliary.") or name.endswith("num_batches_tracked")
        if left_out or tensor.is_meta or not tensor.untyped_storage().nbytes():
            continue
        bytes_ = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(bytes_.numpy().data)
    return digest.digest()


class PlainFastSCNN(nn.Module):
    """Fast-SCNN in plain torch: (N, C, H, W) normalised floats -> logits (N, num_classes, H, W).

    Any batch and any size from 32x32 up, odd sizes included. In training with ``aux=True`` the result
    is ``(logits, auxiliary)`` with one full-size tensor per entry of ``config.aux_taps``. uint8 input is raw
    pixels 0..255, RGB, and is normalised by ``config.mean`` and ``config.std`` first. What torch.fx makes of it, such
    as torchvision's feature extractors, takes normalised floats and has no auxiliary heads where one is "global".

    Args:
        num_classes: number of classes K.
        preset: which published implementation to be, a key of :data:`fastscnn_fast.arch.config.PRESETS`.
        aux: build the auxiliary heads.
        overrides: any other field of :class:`fastscnn_fast.arch.config.Config`.

    Attributes:
        config: the architecture.
        ranges: what int8 must know of the network's values, by name (lowest, highest); None before they were
            measured (:func:`fastscnn_fast.calibrate`). They hold for the weights that they were measured with:
            a forward in training mode and ``load_state_dict`` drop them, and after any other change of weights
            (:meth:`has_stale_ranges`) they are neither used nor saved.

    Raises:
        ValueError: an impossible combination, or input of a wrong shape.
    """

    _ranges: Ranges | None = None
    _ranged = b""  # the fingerprint of the weights that they are of

    @property
    def ranges(self) -> Ranges | None:
        return self._ranges

    @ranges.setter
    def ranges(self, ranges: Ranges | None) -> None:
        self._ranges = copy(ranges)  # nobody else's to change
        self._ranged = b"" if ranges is None else _fingerprint(self)

    def has_stale_ranges(self) -> bool:
        """Whether a parameter or buffer has changed since :attr:`ranges` were set, in any way but its dtype and device."""
        return self._ranges is not None and self._ranged != _fingerprint(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What ``to``, ``half`` and their like come to."""
        stale = self.has_stale_ranges()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._ranges is not None and not stale:
            self._ranged = _fingerprint(self)
        return self

    def __init__(
        self, num_classes: int = 19, preset: str = "paper", aux: bool = False, **overrides: Any
    ) -> None:
        super().__init__()
        config = config_preset(preset, num_classes=num_classes, aux=aux, **overrides)
        self._build(config)

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """The network that ``config`` describes, with fresh random weights."""
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._build(config)
        return model

    def _build(self, config: Config) -> None:
        self.config = config
        self.learning_to_downsample = LearningToDownsample(config)
        self.global_features = GlobalFeatures(config)
        self.feature_fusion = FeatureFusion(config)
        self.classifier = Classifier(config)
        taps = {"downsample": config.downsample_channels[2], "global": config.pyramid_channels}
        heads: dict[str, nn.Module] = {
            tap: AuxiliaryHead(taps[tap], config) for tap in config.aux_taps if config.aux
        }
        self.auxiliary = nn.ModuleDict(heads)

    def forward(self, x: Tensor) -> Any:
        """Logits (N, K, H, W); in training with auxiliary heads ``(logits, (aux, ...))``."""
        if self.training and self._ranges is not None:
            self._ranges = None  # of weights and statistics that are about to change
        x = self._normalised(x)
        size = x.shape[2:]
        features = {"downsample": self.learning_to_downsample(x)}
        features["global"] = self.global_features(features["downsample"])
        fused = self.feature_fusion(features["downsample"], features["global"])
        logits = self._full_size(self.classifier(fused), size)
        if not (self.training and self.auxiliary):
            return logits
        if isinstance(x, torch.fx.Proxy) and "global" in self.auxiliary:
            # It writes Python, where that is a keyword.
            what = "torch.fx cannot trace the auxiliary heads: the result is logits alone"
            warnings.warn(what, stacklevel=2)
            return logits
        return logits, self._heads(features, size)

    def _load_from_state_dict(self, *args: Any) -> None:
        """A state_dict has no ranges: those before it were of other weights."""
        self.ranges = None
        super()._load_from_state_dict(*args)

    def auxiliary_logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the auxiliary heads say, one (N, K, H, W) per entry of ``config.aux_taps``, always in plain torch."""
        x = self._normalised(x)
        features = {"downsample": self.learning_to_downsample(x)}
        if "global" in self.auxiliary:
            features["global"] = self.global_features(features["downsample"])
        return self._heads(features, x.shape[2:])

    def _heads(self, features: Mapping[str, Tensor], size: Sequence[int]) -> tuple[Tensor, ...]:
        heads = self.auxiliary.items()
        return tuple(self._full_size(head(features[tap]), size) for tap, head in heads)

    def _full_size(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        return resize(logits, size, self.config.align_corners)

    def _normalised(self, x: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy):  # symbolic tracing knows neither shape nor dtype
            return x
        if x.dim() != 4 or x.shape[1] != self.config.in_channels:
            raise ValueError(
                f"x must be (N, {self.config.in_channels}, H, W), got shape {tuple(x.shape)}"
            )
        if x.dtype != torch.uint8:
            if not x.is_floating_point():
                raise TypeError(f"x must be normalised floats or raw torch.uint8, got {x.dtype}")
            return x
        return normalise(x, self.config, self.learning_to_downsample.stem.conv.weight.dtype)
