"""Drop-ins for other code bases: modules with their interface, and a fast copy of their modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..arch.network import InvertedResidual, resize
from ..arch.structure import unwrapped
from ..backends import registry
from ..checkpoints import from_state_dict
from ..program.arithmetic import floats_of
from ..runtime.fused import FusedFastSCNN, fuse, fuse_as
from ..runtime.model import FastSCNN

_SIZE = (128, 224)
"""Every stage halves it without remainder, as some implementations need; at 1/32, 4x7, any two numbers of
pooling bins give different results (on 2x3 they need not)."""


@dataclass(frozen=True)
class _Ours:
    """One of (logits, *auxiliary logits)."""

    index: int


class Accelerated(FusedFastSCNN):
    """The fused copy of a network whose results come in a container: made by :func:`accelerate`.

    A call returns the container that the original's does, with the logits where they are there. Auxiliary
    results are in their places too; they are computed in plain torch, which takes longer than all the rest:
    ``labels`` and ``probabilities``, and an original built without them, do without.
    """

    _container: Any
    _plain: FastSCNN | None

    def _returns(self, container: Any, plain: FastSCNN | None) -> None:
        """``container`` holds an :class:`_Ours` where a call's results go."""
        self._container = container
        self._plain = plain

    def forward(self, x: Tensor, out: Tensor | None = None) -> Any:
        """As the original's, of :attr:`dtype` and full size; raises as :class:`FusedFastSCNN`'s."""
        results: tuple[Tensor, ...] = (super().forward(x, out),)
        if self._plain is not None:
            floats = x if x.dtype == torch.uint8 else x.to(floats_of(self.dtype))
            results += self._plain.auxiliary_logits(floats)
        return _map(lambda ours: results[ours.index], self._container, _Ours)


def accelerate(
    module: nn.Module, backend: str = "auto", dtype: torch.dtype | None = None, **overrides: Any
) -> FusedFastSCNN:
    """A fused copy of another implementation's Fast-SCNN, checked against it.

    The layout is recognised from ``module.state_dict()`` as by :func:`load_checkpoint`; wrappers such as
    ``DataParallel`` do not matter. A float64 copy of ``module`` in eval mode is then compared with our
    network on two random pictures, one of them so bright that ReLU and ReLU6 differ; ``module`` and
    torch's random numbers are left alone. In torch.int8 the fused copy must equal the reference backend's; it needs
    the ranges of a :class:`FastSCNN`.

    A module that returns a tuple, list or dictionary gets an :class:`Accelerated`, which returns the same, with
    auxiliary logits in their places. Tensors that are neither come back as None, with a logged warning. Logits of
    another size (mmsegmentation's are 1/8 of the picture's) are compared resized; the fused copy's are always
    full size.

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
    module = unwrapped(module)
    name = type(module).__name__
    if isinstance(module, FastSCNN) and not overrides:
        if type(module).forward is FastSCNN.forward:
            return fuse(module, backend, dtype)
        model = copy.deepcopy(module).eval()
    else:
        model = from_state_dict(module.state_dict(), source=name, **overrides)
    theirs = copy.deepcopy(module).to("cpu", torch.float64).eval()
    ours = copy.deepcopy(model).to("cpu", torch.float64)
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(1, ours.config.in_channels, *_SIZE, generator=generator).double()
    with torch.no_grad():
        small = picture[..., :64, :96]
        bright = small * _brightening(ours, small)
        result = _result(theirs, picture)
        container = _compared(result, ours, picture, name)
        if _compared(_result(theirs, bright), ours, bright, name) != container:
            raise ValueError(f"{name} must return the same for each picture, got another container")
        used = _leaves(container)
        if any(isinstance(y, Tensor) and to is None for y, to in zip(_leaves(result), used)):
            registry.log_once(f"None stands for what {name} returns besides logits of Fast-SCNN")
        kind = FusedFastSCNN if container == _Ours(0) else Accelerated
        fast = fuse_as(kind, model, backend, dtype)
        floats = floats_of(fast.dtype)
        x = picture.to(fast.weights.device, floats)
        if floats == fast.dtype:
            truth, least = ours.reference(picture), 1e-4
            plain = _difference(model.to(floats).reference(x), truth)
        else:  # integers are the same everywhere; how far they are from floats is up to the ranges
            truth, least, plain = fuse(model, "reference", dtype)(x), 1e-5, 0.0
            model.to(floats)
        difference = _difference(FusedFastSCNN.forward(fast, x), truth)
        if not difference <= max(4 * plain, least):
            raise ValueError(
                f"the fused copy of {name} (backend {fast.backend}, {fast.dtype}) is off by"
                f" {difference:.1e}, plain torch by {plain:.1e}"
            )
    if isinstance(fast, Accelerated):
        auxiliary = any(isinstance(to, _Ours) and to.index > 0 for to in used)
        fast._returns(container, model.requires_grad_(False) if auxiliary else None)
    return fast


def _brightening(model: FastSCNN, x: Tensor) -> Tensor:
    """The factor for x that brings the first bottleneck's expanded values, and all before, far above 6."""
    expand = cast(InvertedResidual, model.global_features.bottleneck1[0]).expand
    values: Tensor = expand.bn(expand.conv(model.learning_to_downsample(x)))
    return 1e4 / values.abs().amax().clamp(min=1e-9)


def _result(module: nn.Module, x: Tensor) -> Any:
    forward = getattr(module, "forward_dummy", module)  # the plain forward of mmsegmentation 0.x
    return forward(x)


def _compared(result: Any, model: FastSCNN, x: Tensor, name: str) -> Any:
    """``result``, of the module ``name`` on x, with each tensor replaced by the :class:`_Ours` that it is, or None.

    Raises:
        ValueError: the logits are not there, or differ from ours.
    """
    ours = [model.reference(x), *model.auxiliary_logits(x)]
    differences = []

    def which(y: Tensor) -> _Ours | None:
        if y.dim() != 4 or y.shape[:2] != ours[0].shape[:2]:
            return None
        full = resize(y, x.shape[2:], model.config.align_corners)
        errors = [_difference(own, full) for own in ours]
        differences.append(errors[0])
        return next((_Ours(i) for i, error in enumerate(errors) if error <= 1e-9), None)

    container = _map(which, result, Tensor)
    if not differences:
        first = next((y for y in _leaves(result) if isinstance(y, Tensor)), result)
        what = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise ValueError(f"{name} must return logits {(*ours[0].shape[:2], 'H', 'W')}, got {what}")
    if _Ours(0) not in _leaves(container):
        raise ValueError(
            f"{name} is not the network that its state_dict looks like: logits differ by"
            f" {differences[0]:.1e}. Activations, padding, dilation, pooling bins and align_corners are"
            " not in a state_dict: name those that are not as published, as in"
            " accelerate(module, bottleneck_activation='relu6')"
        )
    return container


def _map(function: Callable[[Any], Any], result: Any, kind: type) -> Any:
    """``result``, a tree of tuples, lists and dictionaries, with ``function`` of each of ``kind`` in it."""
    if isinstance(result, kind):
        return function(result)
    if isinstance(result, dict):
        return type(result)({key: _map(function, part, kind) for key, part in result.items()})
    if isinstance(result, (tuple, list)):
        parts = [_map(function, part, kind) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)
    return result


def _leaves(result: Any) -> list[Any]:
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, (tuple, list)):
        return [leaf for part in result for leaf in _leaves(part)]
    return [result]


def _difference(y: Tensor, truth: Tensor) -> float:
    """``||y - truth|| / ||truth - its mean per channel||``; the mean stays in where nothing else is there."""
    difference, size = (y.to(truth) - truth).norm().item(), truth.norm().item()
    spread = (truth - truth.mean((0, 2, 3), keepdim=True)).norm().item()
    if spread <= 1e-9 * size:
        spread = size
    return difference / spread if spread > 0 else difference
