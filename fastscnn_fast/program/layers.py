"""Layers: what each fused op reads, weighs, makes and costs; the one source of these facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch

from ..arch.config import Activation
from .arithmetic import ARITHMETICS

OPS = (
    "stem_conv",
    "dsconv",
    "inverted_residual",
    "pyramid_pooling",
    "feature_fusion",
    "upsample_classify",
)
ACTIVATIONS: tuple[Activation, ...] = ("none", "relu", "relu6")
#: What the last layer makes of the logits.
OUTPUTS = ("logits", "probabilities", "labels")

Shape = tuple[int, ...]

#: In place of a layer's index: the picture that the network is given.
PICTURE = -1

_MOVED = 0.8  # operations of products that take as long as to move an element, for each of an arithmetic's `channels`
_FIELDS = 16  # of an encoded layer, before its inputs and bins
_ARITHMETICS = ("", *ARITHMETICS)


@dataclass(frozen=True)
class Layer:
    """One fused op with everything but its input size.

    Attributes:
        in_channels: channels of x (feature_fusion: of the low branch).
        out_channels: channels of the result (dsconv with ``last_channels``: of its pointwise).
        mid_channels: inverted_residual: expanded; pyramid_pooling: one branch; feature_fusion: high branch.
        last_channels: dsconv: outputs of a following 1x1 with bias (the classifier's), 0 for none.
        stride: of the 3x3; the depthwise's padding equals its dilation.
        padding: stem_conv: of the 3x3.
        kernel: pyramid_pooling: of the out-convolution, 1 or 3.
        activation: of the result (inverted_residual: after expand and depthwise, the result is linear).
        mid_activation: dsconv: between depthwise and pointwise.
        dense: feature_fusion: the resized branch is refined by a 1x1, not a depthwise 3x3.
        arithmetic: name of the one that it computes in; "": the network's.
        inputs: in a program: indices of the layers that it reads, feature_fusion (high, low), or PICTURE.
    """

    op: str
    name: str = field(
        compare=False
    )  # of the place in a network: nothing that is computed depends on it
    in_channels: int
    out_channels: int
    mid_channels: int = 0
    last_channels: int = 0
    stride: int = 1
    dilation: int = 1
    padding: int = 1
    kernel: int = 1
    activation: Activation = "relu"
    mid_activation: Activation = "none"
    residual: bool = False
    dense: bool = False
    align_corners: bool = False
    bins: tuple[int, ...] = ()
    arithmetic: str = ""
    inputs: tuple[int, ...] = ()

    @property
    def alone(self) -> Layer:
        """The layer outside of any network, as the single ops take it."""
        return replace(self, name="", inputs=())

    @property
    def result_channels(self) -> int:
        """Channels of what it makes, after the following 1x1 where there is one."""
        return self.last_channels or self.out_channels

    @property
    def input_channels(self) -> tuple[int, ...]:
        """Channels of each of its inputs."""
        if self.op == "feature_fusion":
            return (self.mid_channels, self.in_channels)
        return (self.in_channels,)

    def encode(self) -> tuple[int, ...]:
        """The layer as integers, as ``csrc/cpu/layer.h`` reads them: a length and that many values."""
        values = (
            OPS.index(self.op),
            self.in_channels,
            self.out_channels,
            self.mid_channels,
            self.last_channels,
            self.stride,
            self.dilation,
            self.padding,
            self.kernel,
            ACTIVATIONS.index(self.activation),
            ACTIVATIONS.index(self.mid_activation),
            int(self.residual),
            int(self.dense),
            int(self.align_corners),
            _ARITHMETICS.index(self.arithmetic),
            len(self.inputs),
            *(index - PICTURE for index in self.inputs),
            *self.bins,
        )
        return (len(values), *values)

    @staticmethod
    def decode(values: tuple[int, ...] | list[int]) -> list[Layer]:
        """The layers of concatenated encodings, in order; names are lost.

        Raises:
            ValueError: not the integers of whole layers.
        """
        layers, at = [], 0
        while at < len(values):
            v = values[at + 1 : at + 1 + values[at]]
            whole = values[at] >= _FIELDS and len(v) == values[at] and min(v) >= 0
            known = whole and v[0] < len(OPS) and max(v[9:11]) < len(ACTIVATIONS)
            if not known or v[14] >= len(_ARITHMETICS) or v[15] > len(v) - _FIELDS:
                raise ValueError(f"layers must be as encode() writes them, got {tuple(v)}")
            layers.append(
                Layer(
                    op=OPS[v[0]],
                    name="",
                    in_channels=v[1],
                    out_channels=v[2],
                    mid_channels=v[3],
                    last_channels=v[4],
                    stride=v[5],
                    dilation=v[6],
                    padding=v[7],
                    kernel=v[8],
                    activation=ACTIVATIONS[v[9]],
                    mid_activation=ACTIVATIONS[v[10]],
                    residual=bool(v[11]),
                    dense=bool(v[12]),
                    align_corners=bool(v[13]),
                    arithmetic=_ARITHMETICS[v[14]],
                    inputs=tuple(index + PICTURE for index in v[_FIELDS : _FIELDS + v[15]]),
                    bins=tuple(v[_FIELDS + v[15] :]),
                )
            )
            at += 1 + values[at]
        return layers

    def weights(self) -> dict[str, Shape]:
        """Names and shapes of the folded weights, in the order in which every backend stores them."""
        c, o, m, last = self.in_channels, self.out_channels, self.mid_channels, self.last_channels
        if self.op == "stem_conv":
            return {"weight": (o, c, 3, 3), "bias": (o,), "mean": (c,), "std": (c,)}
        if self.op == "dsconv":
            shapes: dict[str, Shape] = {
                "depthwise_weight": (c, 3, 3),
                "depthwise_bias": (c,),
                "pointwise_weight": (o, c),
                "pointwise_bias": (o,),
            }
            if last:
                shapes |= {"last_weight": (last, o), "last_bias": (last,)}
            return shapes
        if self.op == "inverted_residual":
            return {
                "expand_weight": (m, c),
                "expand_bias": (m,),
                "depthwise_weight": (m, 3, 3),
                "depthwise_bias": (m,),
                "project_weight": (o, m),
                "project_bias": (o,),
            }
        if self.op == "pyramid_pooling":
            b, k = len(self.bins), self.kernel
            return {
                "branch_weight": (b, m, c),
                "branch_bias": (b, m),
                "out_weight": (o, c + b * m, k, k),
                "out_bias": (o,),
            }
        if self.op == "feature_fusion":
            return {
                "refine_weight": (c, c) if self.dense else (c, 3, 3),
                "refine_bias": (c,),
                "low_weight": (o, c),
                "high_weight": (o, m),
                "bias": (o,),
            }
        return {}

    @property
    def values(self) -> tuple[str, ...]:
        """Names of the values of 8 bits that the layer makes in int8, in order; a result that has 8 bits is the last."""
        return {
            "stem_conv": ("conv",),
            "dsconv": ("depthwise", "pointwise"),
            "inverted_residual": ("expand", "depthwise", "project"),
            "pyramid_pooling": (*(f"branch{bins}" for bins in range(len(self.bins))), "out"),
            "feature_fusion": ("refine", "sum"),
        }.get(self.op, ())

    def quantised_weights(self) -> dict[str, tuple[Shape, torch.dtype]]:
        """As :meth:`weights` in int8: names, shapes and dtypes, what they mean is said in ``integers.py``.

        Beside the weights of a product stand its biases, the multipliers of its sums, and the zero point of what
        becomes of them.
        """
        named: dict[str, tuple[Shape, torch.dtype]] = {}
        for name, shape in self.weights().items():
            if name.endswith("weight"):
                named[name] = (shape, torch.int8)
            elif name.endswith("bias"):
                named[name] = (shape, torch.int32)
                named[name.replace("bias", "multiplier")] = (shape, torch.float32)
                if name != "last_bias":
                    named[name.replace("bias", "zero")] = (shape[:-1] or (1,), torch.int32)
        if self.op == "stem_conv":
            one = (self.in_channels,)
            named |= {"pad": (one, torch.int32)}
            named |= {"scale": (one, torch.float32), "shift": (one, torch.float32)}
        if self.op in ("inverted_residual", "pyramid_pooling"):
            named["input_zero"] = ((1,), torch.int32)
        if self.op == "inverted_residual":
            named["residual_multiplier"] = ((1,), torch.float32)
        return named

    def result_size(self, inputs: Sequence[Shape], picture: Shape) -> tuple[int, int]:
        """Size of the result for inputs and a picture of these sizes (height, width)."""
        if self.op == "upsample_classify":
            return (picture[0], picture[1])
        if self.op in ("feature_fusion", "pyramid_pooling"):
            return (inputs[0][0], inputs[0][1])
        return self.output_size(*inputs[0])

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Size of a 3x3 convolution's result for an input of that size."""
        padding = self.padding if self.op == "stem_conv" else 1
        return (
            (height + 2 * padding - 3) // self.stride + 1,
            (width + 2 * padding - 3) // self.stride + 1,
        )


@dataclass(frozen=True)
class SizedLayer:
    """A layer at a size: ``inputs`` and ``output`` are (C, H, W) shapes, feature_fusion's are (high, low)."""

    layer: Layer
    inputs: tuple[Shape, ...]
    output: Shape

    @property
    def flops(self) -> int:
        """Floating-point operations of the fused algorithm, two per multiply-add."""
        layer = self.layer
        pixels = prod(self.output[1:])
        c, o, m = layer.in_channels, layer.out_channels, layer.mid_channels
        if layer.op == "stem_conv":
            macs = pixels * 9 * c * o
        elif layer.op == "dsconv":
            macs = pixels * (9 * c + c * o + o * layer.last_channels)
        elif layer.op == "inverted_residual":
            macs = prod(self.inputs[0][1:]) * c * m + pixels * (9 * m + m * o)
        elif layer.op == "pyramid_pooling":
            cells, branches = sum(b * b for b in layer.bins), len(layer.bins)
            macs = (pixels * branches + cells * m) * c  # pooling, and the branches' 1x1s
            if layer.kernel == 1:
                macs += cells * m * o + pixels * (3 * branches + c) * o
            else:
                macs += pixels * (3 * branches * m + 9 * (c + branches * m) * o)
        elif layer.op == "feature_fusion":
            refine = prod(self.inputs[1]) * c if layer.dense else pixels * 9 * c
            macs = refine + pixels * (3 * c + (c + m) * o)
        else:
            macs = prod(self.output) * 3
        return 2 * macs

    @property
    def plain_flops(self) -> int:
        """Of the plain network's convolutions, which is what torch.utils.flop_counter counts of it."""
        layer = self.layer
        pixels = prod(self.output[1:])
        c, o, m = layer.in_channels, layer.out_channels, layer.mid_channels
        if layer.op == "pyramid_pooling":
            cells, branches = sum(b * b for b in layer.bins), len(layer.bins)
            return 2 * (cells * m * c + pixels * layer.kernel**2 * (c + branches * m) * o)
        if layer.op == "feature_fusion":
            return 2 * pixels * ((c if layer.dense else 9) * c + (c + m) * o)
        return 0 if layer.op == "upsample_classify" else self.flops

    @property
    def elements(self) -> int:
        """Elements that must move: each input, each weight and each output once."""
        weights = sum(prod(shape) for shape in self.layer.weights().values())
        return sum(map(prod, self.inputs)) + prod(self.output) + weights

    def work(self, channels: int) -> float:
        """What decides how long it takes in an arithmetic whose kernels compute blocks of so many channels.

        In operations, at the rate of that arithmetic's products: the layer's own, and as many as it could do while it moves
        what it reads and writes. An element takes as long in every arithmetic, so it counts for more operations the faster
        their products are. Of the measured stages of float32, bfloat16 and int8 on a CPU (benchmarks/results/zen5) this says the
        time to within a fifth, but for the pyramid's.
        """
        return self.flops + _MOVED * channels * self.elements
