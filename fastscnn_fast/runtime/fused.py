"""FusedFastSCNN: the folded network behind one op."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from .. import ops
from ..arch import structure
from ..arch.network import PlainFastSCNN
from ..backends import registry
from ..data.classes import Named
from ..lower.fold import FoldedWeights, fold
from ..lower.quantise import check_fresh, quantise
from ..program.arithmetic import choose, floats_of
from .forked import serial
from .graphs import Graphs

if TYPE_CHECKING:
    from typing_extensions import Self  # of the type checker


_AUTOCAST = (torch.bfloat16, torch.float16)


class FusedFastSCNN(Named, nn.Module):
    """Fast-SCNN for inference: folded, packed and run by one fused op. Made by :func:`fuse`.

    Input is (N, C, H, W) with any strides: normalised floats of :attr:`dtype` or, where that has 16 bits, of
    torch.float32, which the first kernel rounds, or raw uint8 pixels in RGB, which are normalised by ``config.mean``
    and ``config.std`` inside the first kernel. In torch.int8 floats are torch.float32, which the first kernel turns
    back into pixels (raw pixels are faster), and so are logits and probabilities. It has no parameters and no gradients. Its dtype is that of its packed
    weights: ``half()``, ``to(torch.bfloat16)`` and their like raise, :func:`fuse` takes a dtype, and under
    ``torch.autocast`` it computes in and returns its own all the same; 16-bit floats of an x that autocast made are
    cast to it. Works under ``torch.compile(fullgraph=True)`` and ``torch.export``; to torch.fx it is one node, so
    that features inside it can be had from the model alone.

    Each method takes ``out``, a contiguous tensor of the result's shape and dtype, to be filled and returned
    instead of a new one.

    Attributes:
        config: the architecture, :class:`fastscnn_fast.arch.config.Config`.
        backend: "cpu", "cuda", "triton" or "reference".
        dtype: dtype that is computed in; of float input and of the results too, which are torch.float32 where it is
            torch.int8.
        precision: "highest", or "high": float32 whose products keep about 17 bits on the cpu backend, and
            are TF32, 10 bits, on the triton backend.
    """

    weights: Tensor

    def __init__(
        self,
        folded: FoldedWeights,
        backend: str,
        dtype: torch.dtype,
        precision: str = "highest",
        cuda_graph: str = "auto",
    ) -> None:
        super().__init__()
        self._graphs = Graphs(cuda_graph)
        self.config = folded.config
        self.backend = backend
        self.dtype = dtype
        self.precision = precision
        self._pictures = ops.picture_dtypes(dtype)
        arithmetic = choose(backend, dtype, precision)
        program = folded.program.computed_in(arithmetic)
        self.program = program.text
        tensors = quantise(folded) if arithmetic.quantised else folded.tensors
        packed = ops.pack(program.layers, tensors, backend, dtype, precision)
        self.register_buffer("weights", packed)
        self.eval()

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits (N, K, H, W) of :attr:`dtype`, of torch.float32 in torch.int8.

        Raises:
            ValueError: x of a wrong shape or device, or a picture too small for the first convolution; out
                of a wrong shape or device, or not contiguous.
            TypeError: wrong dtype.
            RuntimeError: x requires grad while gradients are enabled, or has a tangent.
        """
        return self._run(x, "logits", out)

    def probabilities(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Softmax over classes (N, K, H, W), of the dtype of :meth:`forward`; raises as that.

        Of one class alone it is the sigmoid, (N, 1, H, W).
        """
        return self._run(x, "probabilities", out)

    def labels(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The largest logit's class, uint8 (N, H, W), without full-size logits.

        Of equal logits it is the first, NaN is the largest of all. One class alone has label 1 where its logit
        is above 0; all else is background, label 0, so is NaN.

        Raises:
            ValueError: more than 256 classes, and as :meth:`forward`.
        """
        return self._run(x, "labels", out)

    def _run(self, x: Tensor, output: str, out: Tensor | None) -> Tensor:
        weights = self._buffers["weights"]  # as self.weights, which takes its time
        assert weights is not None
        if isinstance(x, torch.fx.Proxy):
            arguments = (x, weights, self.program, output, self.backend, self.dtype, out)
            node: Tensor = x.tracer.create_proxy("call_function", ops.network, arguments, {})
            return node
        if ops.is_differentiated(x):
            raise RuntimeError(
                "x must not require grad or have a tangent: the fused network has no gradient (use"
                " torch.no_grad(), or FastSCNN.reference(x) to differentiate)"
            )
        if x.dtype not in self._pictures:
            if x.dtype not in _AUTOCAST or not torch.is_autocast_enabled(x.device.type):
                allowed = " or ".join(map(str, self._pictures))
                raise TypeError(f"x must be of dtype {allowed}, got {x.dtype}")
            x = x.to(self._pictures[0])
        return self._graphs.network(x, weights, self.program, output, self.backend, self.dtype, out)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What ``to``, ``half`` and their like come to, of a module that holds this one too.

        Raises:
            TypeError: another dtype is asked for.
        """
        floats = floats_of(self.dtype)
        asked = fn(torch.empty(0, dtype=floats, device=self.weights.device)).dtype
        if asked != floats:
            raise TypeError(
                f"a fused network of {self.dtype} cannot become one of {asked}, its weights are packed:"
                f" call fuse(model, dtype={asked})"
            )
        applied: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return applied

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.config.num_classes}, backend={self.backend}, dtype={self.dtype},"
            f" precision={self.precision}"
        )


def fuse(
    model: PlainFastSCNN,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    precision: str = "highest",
    cuda_graph: str = "auto",
) -> FusedFastSCNN:
    """The fused copy of ``model`` as it is in eval mode, on the model's device.

    Args:
        backend: "auto" (FASTSCNN_BACKEND, else the best that can run), or one of
            :data:`fastscnn_fast.backends.registry.BACKENDS`.
        dtype: dtype to compute in; the model's own by default. torch.int8 needs ``model.ranges``
            (:func:`fastscnn_fast.calibrate`), which the weights that come along have.
        precision: "highest", or "high", as in torch.set_float32_matmul_precision: float32 networks
            compute each product as three of bfloat16 on the cpu backend, where the processor has AMX (an
            infinite activation becomes NaN there), and in TF32 on the triton backend, where the GPU has it.
            All else runs in "highest", with a logged reason.
        cuda_graph: on GPUs, "auto" captures a call as a CUDA graph when an input's shape, strides and dtype
            are seen a second time, "on" the first time, "off" never. A graph keeps an input, a result and
            the scratch memory; the 8 shapes used last are kept. Not measured on a GPU.

    Raises:
        TypeError: not a FastSCNN, or ``dtype`` is no torch.dtype.
        ValueError: unknown backend, precision or cuda_graph, or a submodule was replaced or hooked, or a parameter
            or buffer holds NaN, infinity or a negative variance, or is too large for ``dtype`` once it is folded,
            or ``dtype`` is torch.int8 and there are no ranges, or wrong ones (:class:`structure.Unfusable`).
        RuntimeError: a parameter or buffer has lost its memory.
        CannotRun: a RuntimeError: the backend that was asked for cannot run, or not in that precision, and why;
            or cuda_graph is "on" and the model is on no CUDA device.
    """
    return fuse_as(FusedFastSCNN, model, backend, dtype, precision, cuda_graph)


_Kind = TypeVar("_Kind", bound=FusedFastSCNN)


@serial()
def fuse_as(
    kind: type[_Kind],
    model: PlainFastSCNN,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    precision: str = "highest",
    cuda_graph: str = "auto",
) -> _Kind:
    """As :func:`fuse`, an instance of ``kind``."""
    if not isinstance(model, PlainFastSCNN):
        raise TypeError(
            f"model must be a fastscnn_fast.FastSCNN, got {type(model).__name__}"
            " (fastscnn_fast.accelerate takes other implementations)"
        )
    structure.check(model)
    weight = model.classifier.conv.weight
    dtype = weight.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, such as torch.float16, got {dtype!r}")
    chosen = registry.choose(backend, model.config, weight.device, dtype, precision)
    precision = registry.choose_precision(precision, backend, chosen, weight.device, dtype)
    Graphs(cuda_graph).check(weight.device)
    with torch.inference_mode(False):  # the copy outlives the caller's mode
        folded = fold(model)
        folded.check_range(dtype)
        if choose(chosen, dtype, precision).quantised:
            check_fresh(model)
        fused = kind(folded, chosen, dtype, precision, cuda_graph).to(weight.device)
    if isinstance(model, Named):
        fused.call_as(model)
    return fused
