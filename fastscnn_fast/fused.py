"""FusedFastSCNN: the folded network behind one op."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import backends, ops, structure
from .fold import FoldedWeights, fold
from .reference import normalise

if TYPE_CHECKING:
    from .model import FastSCNN


def has_tangent(x: Tensor) -> bool:
    """Whether x is a dual tensor of forward-mode differentiation, which torch.no_grad() leaves on."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


class FusedFastSCNN(nn.Module):
    """Fast-SCNN for inference: folded, packed and run by one fused op. Made by :func:`fuse`.

    Input is (N, C, H, W) with any strides: normalised floats of :attr:`dtype`, or raw uint8 pixels, which
    are normalised by ``config.mean`` and ``config.std`` inside the first kernel. It has no parameters and no
    gradients. Works under ``torch.compile(fullgraph=True)`` and ``torch.export``.

    Attributes:
        config: the architecture, :class:`fastscnn_fast.config.Config`.
        backend: "cpu" or "reference".
        dtype: dtype of float input and of the results.
    """

    weights: Tensor

    def __init__(self, folded: FoldedWeights, backend: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = folded.config
        self.backend = backend
        self.dtype = dtype
        self.program = ops.encode(folded.layers)
        self.register_buffer("weights", ops.pack(folded.layers, folded.tensors, backend, dtype))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K, H, W) of :attr:`dtype`.

        Raises:
            ValueError: wrong shape or device, or a picture too small for the first convolution.
            TypeError: wrong dtype.
            RuntimeError: x requires grad while gradients are enabled, or has a tangent.
        """
        return self._run(x, "logits")

    def probabilities(self, x: Tensor) -> Tensor:
        """Softmax over classes (N, K, H, W); raises as :meth:`forward`."""
        return self._run(x, "probabilities")

    def labels(self, x: Tensor) -> Tensor:
        """The largest logit's class, uint8 (N, H, W), without full-size logits.

        Raises:
            ValueError: more than 256 classes, and as :meth:`forward`.
        """
        return self._run(x, "labels")

    def _run(self, x: Tensor, output: str) -> Tensor:
        if (torch.is_grad_enabled() and x.requires_grad) or has_tangent(x):
            raise RuntimeError(
                "x must not require grad or have a tangent: the fused network has no gradient (use"
                " torch.no_grad(), or FastSCNN.reference(x) to differentiate)"
            )
        if x.dtype not in (self.dtype, torch.uint8):
            raise TypeError(f"x must be of dtype {self.dtype} or torch.uint8, got {x.dtype}")
        if x.dtype == torch.uint8 and self.dtype != torch.float32:  # the ops' floats for raw pixels
            x = normalise(x, self.config, self.dtype)
        return ops.network(x, self.weights, self.program, output, self.backend)

    def extra_repr(self) -> str:
        return f"num_classes={self.config.num_classes}, backend={self.backend}, dtype={self.dtype}"


def fuse(model: FastSCNN, backend: str = "auto", dtype: torch.dtype | None = None) -> FusedFastSCNN:
    """The fused copy of ``model`` as it is in eval mode, on the model's device.

    Args:
        backend: "auto" (FASTSCNN_BACKEND, else the best that can run), or one of
            :data:`fastscnn_fast.backends.BACKENDS`.
        dtype: dtype to compute in; the model's own by default.

    Raises:
        TypeError: not a FastSCNN.
        ValueError: unknown backend, or a submodule was replaced or hooked (:class:`structure.Unfusable`).
        CannotRun: a RuntimeError: the backend cannot run, and why.
    """
    from .model import FastSCNN

    if not isinstance(model, FastSCNN):
        raise TypeError(
            f"model must be a fastscnn_fast.FastSCNN, got {type(model).__name__}"
            " (fastscnn_fast.accelerate takes other implementations)"
        )
    structure.check(model)
    weight = model.classifier.conv.weight
    dtype = weight.dtype if dtype is None else dtype
    chosen = backends.choose(backend, model.config, weight.device, dtype)
    with torch.inference_mode(False):  # the copy outlives the caller's mode
        return FusedFastSCNN(fold(model), chosen, dtype).to(weight.device)
