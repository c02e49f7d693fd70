"""Programs: layers and the edges between them, Fast-SCNN's among them, and the text by which they travel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from ..arch.config import Config
from .arithmetic import Arithmetic
from .layers import PICTURE, Layer, Shape, SizedLayer


@dataclass(frozen=True)
class Program:
    """Layers in an order in which they can run; each names by index the layers that it reads.

    The last layer's result is the network's. A layer alone, as the single ops take it, names none.

    Raises:
        ValueError: a layer reads itself or a later one, or one of other channels than it takes.
    """

    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        for index, layer in enumerate(self.layers):
            if not layer.inputs and len(self.layers) == 1:
                return
            want = layer.input_channels
            sound = len(layer.inputs) == len(want)
            sound = sound and all(PICTURE <= at < index for at in layer.inputs)
            if not sound:
                rule = f"must read {len(want)} of the layers before it"
                raise ValueError(f"layer {index} ({layer.op}) {rule}, got {layer.inputs}")
            got = tuple(
                channels if at == PICTURE else self.layers[at].result_channels
                for at, channels in zip(layer.inputs, want)
            )
            if got != want:
                raise ValueError(f"layer {index} ({layer.op}) must read {want} channels, got {got}")

    @staticmethod
    def of(layers: Sequence[Layer]) -> Program:
        """These layers' program; a layer by itself is taken out of its network."""
        return Program(tuple(layers) if len(layers) != 1 else (layers[0].alone,))

    @cached_property
    def integers(self) -> tuple[int, ...]:
        """The layers' encodings one after the other."""
        return tuple(value for layer in self.layers for value in layer.encode())

    @cached_property
    def text(self) -> str:
        """The integers as text: the dispatcher would copy a list of them value by value."""
        return " ".join(map(str, self.integers))

    @cached_property
    def hash(self) -> int:
        """FNV-1a over the integers, 64 bits."""
        value = 0xCBF29CE484222325
        for v in self.integers:
            value = (value ^ v) * 0x100000001B3 % 2**64
        return value

    @property
    def is_network(self) -> bool:
        """Whether it makes full-size results of pictures."""
        reads = [layer.op == "stem_conv" for layer in self.layers if PICTURE in layer.inputs]
        return bool(reads) and all(reads) and self.layers[-1].op == "upsample_classify"

    def value_read(self, layer: Layer) -> str:
        """The value that is the layer's input, feature_fusion's low one; empty for the picture."""
        at = layer.inputs[-1]
        return "" if at == PICTURE else f"{self.layers[at].name}.{self.layers[at].values[-1]}"

    def computed_in(self, arithmetic: Arithmetic) -> Program:
        """This program with the layers marked that ``arithmetic`` computes in another."""
        return Program(
            tuple(
                replace(layer, arithmetic=arithmetic.layers.get(layer.op, ""))
                for layer in self.layers
            )
        )

    def sized(self, height: int, width: int) -> tuple[SizedLayer, ...]:
        """Every layer with its shapes for pictures of height x width.

        Raises:
            ValueError: the picture is too small for the first convolution.
        """
        smallest = 3 - 2 * self.layers[0].padding
        if height < smallest or width < smallest:
            raise ValueError(f"height and width must be at least {smallest}, got {height}x{width}")
        picture = (self.layers[0].in_channels, height, width)
        made: list[SizedLayer] = []
        for layer in self.layers:
            inputs = tuple(picture if at == PICTURE else made[at].output for at in layer.inputs)
            size = layer.result_size([shape[1:] for shape in inputs], (height, width))
            output: Shape = (layer.result_channels, *size)
            made.append(SizedLayer(layer, inputs, output))
        return tuple(made)


@lru_cache(maxsize=256)
def parsed(text: str) -> Program:
    """What :attr:`Program.text` holds.

    Raises:
        ValueError: it is no program's text.
    """
    try:
        integers = tuple(map(int, text.split()))
    except ValueError:
        raise ValueError(f"program must be as Program.text has it, got {text!r}") from None
    return Program(tuple(Layer.decode(integers)))


def fast_scnn(config: Config) -> Program:
    """Fast-SCNN's layers in the order of execution (Poudel et al., Table 1)."""
    c1, c2, c3 = config.downsample_channels
    mid, align = config.dsconv_mid_activation, config.align_corners
    layers: list[Layer] = []

    def add(layer: Layer, *inputs: int) -> int:
        """Its index; it reads the layer before it where nothing else is said."""
        layers.append(replace(layer, inputs=inputs or (len(layers) - 1,)))
        return len(layers) - 1

    add(
        Layer("stem_conv", "stem", config.in_channels, c1, stride=2, padding=config.stem_padding),
        PICTURE,
    )
    add(Layer("dsconv", "downsample.dsconv1", c1, c2, stride=2, mid_activation=mid))
    high = add(Layer("dsconv", "downsample.dsconv2", c2, c3, stride=2, mid_activation=mid))
    channels = c3
    for stage, blocks in enumerate(config.bottlenecks, start=1):
        for block, (expanded, out, stride) in enumerate(blocks):
            add(
                Layer(
                    "inverted_residual",
                    f"bottleneck{stage}.{block}",
                    channels,
                    out,
                    mid_channels=expanded,
                    stride=stride,
                    activation=config.bottleneck_activation,
                    residual=stride == 1 and channels == out,
                )
            )
            channels = out
    low, fused = config.pyramid_channels, config.fusion_channels
    pyramid = add(
        Layer(
            "pyramid_pooling",
            "pyramid",
            channels,
            low,
            mid_channels=config.pyramid_branch_channels,
            kernel=config.pyramid_kernel,
            align_corners=align,
            bins=config.pyramid_bins,
        )
    )
    add(
        Layer(
            "feature_fusion",
            "fusion",
            low,
            fused,
            mid_channels=c3,
            dilation=config.fusion_dilation,
            dense=config.fusion_refine == "dense",
            align_corners=align,
        ),
        high,
        pyramid,
    )
    add(Layer("dsconv", "classifier.dsconv1", fused, fused, mid_activation=mid))
    add(
        Layer(
            "dsconv",
            "classifier.dsconv2",
            fused,
            fused,
            last_channels=config.num_classes,
            mid_activation=mid,
        )
    )
    add(
        Layer(
            "upsample_classify",
            "upsample",
            config.num_classes,
            config.num_classes,
            activation="none",
            align_corners=align,
        )
    )
    return Program(tuple(layers))


def encode(layers: Sequence[Layer]) -> str:
    """The text of these layers' program."""
    return Program.of(layers).text


def layer_sizes(config: Config, height: int, width: int) -> tuple[SizedLayer, ...]:
    """Fast-SCNN's layers with their shapes for pictures of height x width.

    Raises:
        ValueError: the picture is too small for the first convolution.
    """
    return fast_scnn(config).sized(height, width)


def operations(config: Config, height: int, width: int) -> int:
    """Floating-point operations of the plain network's convolutions for a picture of height x width.

    As torch.utils.flop_counter counts them, two for a multiplication with its sum.
    """
    return sum(layer.plain_flops for layer in layer_sizes(config, height, width))
