"""Drop-ins for other code bases: modules with their interface, and a fast copy of their modules."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..arch.network import InvertedResidual, resize
from ..checkpoints import from_state_dict
from ..runtime.fused import FusedFastSCNN, fuse
from ..runtime.model import FastSCNN

_SIZE = (128, 224)
"""Every stage halves it without remainder, as some implementations need; at 1/32, 4x7, any two numbers of
pooling bins give different results (on 2x3 they need not)."""


def accelerate(
    module: nn.Module, backend: str = "auto", dtype: torch.dtype | None = None, **overrides: Any
) -> FusedFastSCNN:
    """A fused copy of another implementation's Fast-SCNN, checked against it.

    The layout is recognised from ``module.state_dict()`` as by :func:`load_checkpoint`; wrappers such as
    ``DataParallel`` do not matter. A float64 copy of ``module`` in eval mode is then compared with our
    network on two random pictures, one of them so bright that ReLU and ReLU6 differ; ``module`` and
    torch's random numbers are left alone. Auxiliary results are ignored, and logits of another size
    (mmsegmentation's are 1/8 of the picture's) resized; the fused copy's are always full size.

    Args:
        module: an instance of a known implementation, or a :class:`FastSCNN`.
        backend: as in :func:`fuse`.
        dtype: as in :func:`fuse`.
        overrides: fields of :class:`fastscnn_fast.arch.config.Config` in which ``module`` differs from the published
            implementation, and ``mean`` and ``std`` for uint8 input.

    Raises:
        CheckpointError: the state_dict is of no known layout.
        ValueError: the networks differ, and by how much.
    """
    while isinstance(wrapped := _wrapped(module), nn.Module):
        module = wrapped
    if isinstance(module, FastSCNN) and not overrides:
        return fuse(module, backend, dtype)
    name = type(module).__name__
    model = from_state_dict(module.state_dict(), source=name, **overrides)
    theirs = copy.deepcopy(module).to("cpu", torch.float64).eval()
    ours = copy.deepcopy(model).to("cpu", torch.float64)
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(1, ours.config.in_channels, *_SIZE, generator=generator).double()
    with torch.no_grad():
        small = picture[..., :64, :96]
        for x in (picture, small * _brightening(ours, small)):
            difference = _difference(ours.reference(x), _logits(theirs, x, ours))
            if not difference <= 1e-9:
                raise ValueError(
                    f"{name} is not the network that its state_dict looks like: logits differ by"
                    f" {difference:.1e}. Activations, padding, dilation, pooling bins and align_corners are"
                    " not in a state_dict: name those that are not as published, as in"
                    " accelerate(module, bottleneck_activation='relu6')"
                )
        fast = fuse(model, backend, dtype)
        x, truth = picture.to(fast.weights.device, fast.dtype), ours.reference(picture)
        plain = _difference(model.to(fast.dtype).reference(x), truth)
        difference = _difference(fast(x), truth)
        if not difference <= max(4 * plain, 1e-4):
            raise ValueError(
                f"the fused copy of {name} (backend {fast.backend}, {fast.dtype}) is off by"
                f" {difference:.1e}, plain torch by {plain:.1e}"
            )
    return fast


def _wrapped(module: nn.Module) -> Any:
    """What DataParallel, DistributedDataParallel or torch.compile wrap; None for other modules."""
    return getattr(module, "module", getattr(module, "_orig_mod", None))


def _brightening(model: FastSCNN, x: Tensor) -> Tensor:
    """The factor for x that brings the first bottleneck's expanded values, and all before, far above 6."""
    expand = cast(InvertedResidual, model.global_features.bottleneck1[0]).expand
    values: Tensor = expand.bn(expand.conv(model.learning_to_downsample(x)))
    return 1e4 / values.abs().amax().clamp(min=1e-9)


def _logits(module: nn.Module, x: Tensor, model: FastSCNN) -> Tensor:
    """The module's logits (N, K, H, W) at x's size."""
    forward = getattr(module, "forward_dummy", module)  # the plain forward of mmsegmentation 0.x
    y = forward(x)
    while isinstance(y, (tuple, list)) and y:
        y = y[0]
    shape = (x.shape[0], model.config.num_classes)
    if not isinstance(y, Tensor) or y.dim() != 4 or y.shape[:2] != shape:
        what = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"{type(module).__name__} must return logits {(*shape, 'H', 'W')}, got {what}"
        )
    return resize(y, x.shape[2:], model.config.align_corners)


def _difference(y: Tensor, truth: Tensor) -> float:
    """``||y - truth|| / ||truth - its mean per channel||``; the mean stays in where nothing else is there."""
    difference, size = (y.to(truth) - truth).norm().item(), truth.norm().item()
    spread = (truth - truth.mean((0, 2, 3), keepdim=True)).norm().item()
    if spread <= 1e-9 * size:
        spread = size
    return difference / spread if spread > 0 else difference
