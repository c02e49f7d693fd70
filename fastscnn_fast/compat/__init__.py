"""Drop-ins for other code bases: modules with their interface, and a fast copy of their modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..checkpoints import from_state_dict
from ..fused import FusedFastSCNN, fuse
from ..model import FastSCNN, InvertedResidual, resize

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def accelerate(
    module: nn.Module, backend: str = "auto", dtype: torch.dtype | None = None, **overrides: Any
) -> FusedFastSCNN:
    """A fused copy of another implementation's Fast-SCNN, checked against it.

    The layout is recognised from ``module.state_dict()`` as by :func:`load_checkpoint`; wrappers such as
    ``DataParallel`` do not matter. Then both networks run on random pictures, one of them so bright that
    ReLU and ReLU6 differ. ``module`` runs in eval mode and is left as it was, and so are torch's random
    numbers. Its auxiliary results are ignored; logits of another size (mmsegmentation's are 1/8 of the
    picture's) are resized before the comparison, as those of the fused copy always are.

    Args:
        module: an instance of a known implementation, or a :class:`FastSCNN`.
        backend, dtype: as in :func:`fuse`.
        overrides: fields of :class:`Config` in which ``module`` differs from the published
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
    fast = fuse(model, backend, dtype)
    picture = _random_picture(model)
    with torch.no_grad(), _evaluating(module):
        for x in (picture, picture * _brightening(model, picture)):
            difference = _difference(model.reference(x), _logits(module, x, model))
            if not difference <= (allowed := _TOLERANCE[x.dtype]):
                raise ValueError(
                    f"{name} is not the network that its state_dict looks like: logits differ by"
                    f" {difference:.1e}, allowed {allowed:.0e}. Activations, padding, pooling bins and"
                    " align_corners are not in a state_dict: name those that are not as published, as in"
                    " accelerate(module, bottleneck_activation='relu6')"
                )
        logits = fast(picture.to(fast.dtype))
        difference = _difference(logits, _logits(module, picture, model))
        if not difference <= (allowed := max(_TOLERANCE[d] for d in (picture.dtype, fast.dtype))):
            raise ValueError(
                f"the fused copy of {name} ({fast.backend}, {fast.dtype}) differs from it by"
                f" {difference:.1e}, allowed {allowed:.0e}"
            )
    return fast


def _wrapped(module: nn.Module) -> Any:
    """What DataParallel, DistributedDataParallel or torch.compile wrap; None for other modules."""
    return getattr(module, "module", getattr(module, "_orig_mod", None))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, flag in training:
            part.training = flag


def _random_picture(model: FastSCNN) -> Tensor:
    shape = (2, model.config.in_channels, 128, 192)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(model.classifier.conv.weight)


def _brightening(model: FastSCNN, x: Tensor) -> Tensor:
    """The factor for x that brings the first bottleneck's expanded values, and all before, far above 6."""
    expand = cast(InvertedResidual, model.global_features.bottleneck1[0]).expand
    values: Tensor = expand.bn(expand.conv(model.learning_to_downsample(x)))
    return (100 / values.abs().amax()).clamp(min=1)


def _logits(module: nn.Module, x: Tensor, model: FastSCNN) -> Tensor:
    """The module's logits (N, K, H, W) at x's size."""
    y = getattr(module, "forward_dummy", module)(
        x
    )  # mmsegmentation 0.x has its plain forward there
    while isinstance(y, (tuple, list)) and y:
        y = y[0]
    shape = (x.shape[0], model.config.num_classes)
    if not isinstance(y, Tensor) or y.dim() != 4 or y.shape[:2] != shape:
        what = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"{type(module).__name__} must return logits {(*shape, 'H', 'W')}, got {what}"
        )
    return resize(y, x.shape[2:], model.config.align_corners)


def _difference(y: Tensor, theirs: Tensor) -> float:
    """``||y - theirs|| / ||theirs - its mean per channel||``."""
    y, theirs = y.double(), theirs.double()
    spread = (theirs - theirs.mean((0, 2, 3), keepdim=True)).norm()
    return ((y - theirs).norm() / spread).item()
