"""What a run learns by: every choice that decides its result, and what each means."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from ..arch.config import PRESETS, picture_size
from ..program.arithmetic import ARITHMETICS

_BATCH_OF_LR, _POWER = 12, 0.9
#: What a field of a type may be, and what that is called.
_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "True or False"),
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
}


def _choice(default: Any, meaning: str, among: Collection[str] = ()) -> Any:
    """A field, its meaning in words and, where they are few, the values it may have."""
    return field(default=default, metadata={"meaning": meaning, "among": tuple(among)})


def _settled(value: Any, why: str) -> Any:
    """A field that may have no other value, and why, after "must be ..."."""
    return field(default=value, metadata={"settled": why, "among": ()})


@dataclass(frozen=True)
class Recipe:
    """All that decides what a run learns; the defaults are the paper's.

    Each field's metadata say its ``meaning`` and, where there are few, the values it may be ``among``; or, of a field
    that is ``settled``, why.

    Raises:
        ValueError: a field breaks a rule; the message names the field, the rule and the value.
    """

    preset: str = _choice("paper", "architecture", PRESETS)
    weights: str | None = _choice(
        None,
        "checkpoint of the preset, of any widths, to start from (random weights); where its classes are others"
        " in number, the last convolution starts at random",
    )
    epochs: float = _choice(1000.0, "passes over the training examples")
    batch: int = _choice(12, "examples per step over all processes")
    accumulate: int = _choice(
        1, "parts a process computes its share of the batch in, to save memory"
    )
    lr: float = _choice(0.045, "learning rate at batch 12; it is scaled with the batch")
    weight_decay: float = _choice(
        4e-5, "L2 on weights of convolutions, but for depthwise ones, batch norms and biases"
    )
    aux_weight: float = _choice(0.4, "weight of each auxiliary loss; 0: no auxiliary heads")
    dropout: float | None = _choice(
        None, "dropout before the last convolution of each head (the preset's own)"
    )
    size: tuple[int, int] | None = _choice(
        None,
        "size of a whole picture as the network's input (its own); labels are not resized along",
    )
    crop: tuple[int, int] | None = _choice(
        None,
        "size of a crop as the network's input (--size, or the first picture's, in whole multiples of 32)",
    )
    scale: tuple[float, float] = _choice((0.5, 2.0), "bounds of the random resize")
    flip: bool = _choice(True, "mirror half of the examples")
    colour: float = _choice(0.2, "strength of changes in brightness, contrast, saturation, hue")
    photo: float = _choice(0.0, "strength of changes in gamma and colour cast, blur, noise")
    paste: float = _choice(
        0.0, "pieces of rare classes, cut from all examples, pasted into one, on average"
    )
    mix: float = _choice(
        0.0, "probability that half of the classes of another example are laid over one"
    )
    style: float = _choice(
        0.0, "probability that an example is given the colours of another, or of a street scene"
    )
    weather: float = _choice(0.0, "0 to 1, how often there are shadows, haze, rain, no colours")
    streets: float = _choice(
        0.0,
        "share of procedural street scenes in the batches, which have CamVid's classes, as DATA must by name",
    )
    class_weights: float | tuple[float, ...] = _choice(
        0.0,
        "one number C > 1: a class of frequency f weighs 1 / log(C + f); 0: all classes alike; or a weight for each"
        " class, in their order",
    )
    dice: float = _choice(
        0.0,
        "weight, beside the cross-entropy, of 1 - the mean of the Dice scores of the classes in what is computed at"
        " a time; 0: none",
    )
    teacher: str | None = _choice(
        None,
        "checkpoint of a network of the same classes to learn from beside the labels: from the probabilities that it gives each"
        " pixel; none",
    )
    distil: float = _choice(
        1.0,
        "weight of the divergence from the teacher's probabilities, beside the loss of the labels",
    )
    temperature: float = _choice(1.0, "by which the logits of both are divided for that")
    ohem: float = _choice(
        0.0, "online hard example mining: the hardest share of pixels to keep in any case; 0: off"
    )
    smoothing: float = _choice(0.0, "label smoothing")
    ema: float = _choice(
        0.0, "decay per step of a moving average of the weights, which is then what is kept; 0: off"
    )
    freeze_bn: bool = _choice(False, "keep the statistics of batch norm as they are")
    quantize: bool = _choice(
        False,
        "fine-tune --weights in the arithmetic of int8, with ranges measured anew at each validation; batch norms are"
        " folded, with their statistics as they are",
    )
    dtype: str = _choice(
        "auto",
        "autocast to bfloat16, or none; auto: bfloat16 where the processor has it, but float32 to"
        " --quantize",
        ("auto", "bfloat16", "float32"),
    )
    seed: int = _choice(0, "of initial weights, order, augmentation and dropout")

    def __post_init__(self) -> None:
        self._take_alike()
        types = get_type_hints(type(self))
        weights = self.class_weights
        if isinstance(weights, tuple) and len(weights) == 1:
            object.__setattr__(self, "class_weights", weights[0])
        for option in fields(self):
            value = getattr(self, option.name)
            kinds, called = _KINDS.get(types[option.name], ((object,), ""))
            if not isinstance(value, kinds) or (isinstance(value, bool) and int in kinds):
                raise ValueError(f"{option.name} must be {called}, got {value!r}")
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(math.isfinite(n) for n in numbers if isinstance(n, float)):
                raise ValueError(f"{option.name} must be finite, got {value}")
            if (among := option.metadata["among"]) and value not in among:
                rule = f"must be one of {', '.join(among)}"
                raise ValueError(f"{option.name} {rule}, got {value!r}")
        rules = {
            "epochs": (self.epochs > 0, "must be positive"),
            "batch": (self.batch >= 1, "must be at least 1"),
            "accumulate": (self.accumulate >= 1, "must be at least 1"),
            "lr": (self.lr > 0, "must be positive"),
            "weight_decay": (self.weight_decay >= 0, "must be at least 0"),
            "aux_weight": (self.aux_weight >= 0, "must be at least 0"),
            "dropout": (self.dropout is None or 0 <= self.dropout <= 0.99, "must be 0 to 0.99"),
            "seed": (0 <= self.seed < 2**63, "must be at least 0 and below 2**63"),
            "scale": (_in_order(self.scale), "must be two numbers above 0 in order"),
            "colour": (0 <= self.colour < 1, "must be at least 0 and below 1"),
            "photo": (0 <= self.photo <= 2, "must be 0 to 2"),
            "paste": (0 <= self.paste <= 100, "must be 0 to 100"),
            "mix": (0 <= self.mix <= 1, "must be 0 to 1"),
            "style": (0 <= self.style <= 1, "must be 0 to 1"),
            "weather": (0 <= self.weather <= 1, "must be 0 to 1"),
            "streets": (0 <= self.streets <= 1, "must be 0 to 1"),
            "class_weights": _rule_of_weights(self.class_weights),
            "dice": (self.dice >= 0, "must be at least 0"),
            "distil": (self.distil >= 0, "must be at least 0"),
            "temperature": (self.temperature > 0, "must be positive"),
            "ohem": (0 <= self.ohem <= 1, "must be 0 to 1"),
            "smoothing": (0 <= self.smoothing < 1, "must be at least 0 and below 1"),
            "ema": (0 <= self.ema < 1, "must be at least 0 and below 1"),
            "weights": (
                self.weights is not None or not self.quantize,
                "must be given to start from with quantize",
            ),
            "dtype": (
                self.dtype != "bfloat16" or not self.quantize,
                "must be float32 with quantize (8 bits times a scale are more than bfloat16 holds)",
            ),
        }
        _check(self, rules)

    def _take_alike(self) -> None:
        """Lists as tuples, sizes as :func:`picture_size` has them, paths as text."""
        for name in ("scale", "class_weights"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        for name in ("size", "crop"):
            if (value := getattr(self, name)) is not None:
                try:
                    object.__setattr__(self, name, picture_size(value, name))
                except TypeError as error:
                    raise ValueError(str(error)) from None
        for name in ("weights", "teacher"):
            if isinstance(value := getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(value))


def _check(recipe: Recipe, rules: Mapping[str, tuple[bool, str]]) -> None:
    """ValueError for the first field of which a rule does not hold."""
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ValueError(f"{name} {rule}, got {getattr(recipe, name)}")


def _in_order(scale: Any) -> bool:
    """Whether it is (low, high), both above 0."""
    return isinstance(scale, tuple) and len(scale) == 2 and 0 < scale[0] <= scale[1]


def _rule_of_weights(weights: float | tuple[float, ...]) -> tuple[bool, str]:
    """Whether they keep it, and the rule."""
    if isinstance(weights, tuple):
        good = min(weights, default=-1) >= 0 and max(weights) > 0
        return good, "must be one number, or at least 0 for each class and above 0 for one"
    return weights == 0 or weights > 1, "must be 0 or above 1, or a weight for each class"


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """lr * batch / 12 * (1 - step / steps) ** 0.9"""
    return recipe.lr * recipe.batch / _BATCH_OF_LR * (1 - step / steps) ** _POWER


@dataclass(frozen=True)
class PruneRecipe(Recipe):
    """All that decides what comes of pruning ``weights``, beside what :class:`Recipe` says of the learning meanwhile.

    The architecture is that of the weights, without auxiliary heads.

    Raises:
        ValueError: as :class:`Recipe`.
    """

    weights: str | None = _choice(
        None,
        "checkpoint of the network to prune, of any preset and widths, or a name as `info` lists them",
    )
    flops: float = _choice(
        0.5, "operations of the narrower network, as a share of those of the one that it is made of"
    )
    cuts: int = _choice(8, "steps in which the network becomes narrower")
    spacing: float = _choice(
        1.0, "epochs between two cuts; the rest of the epochs come after the last"
    )
    importance: str = _choice(
        "taylor",
        "what channels are worth: by how much the loss would change to first order without them, or the norm of their"
        " weights",
        ("taylor", "norm"),
    )
    arithmetic: str = _choice(
        "bfloat16",
        "arithmetic whose time is to be saved; widths become multiples of the channels that its kernels compute at a"
        " time: " + ", ".join(f"{one.channels} in {name}" for name, one in ARITHMETICS.items()),
        ARITHMETICS,
    )
    teacher: str | None = _choice(
        None, "checkpoint of a network to learn from beside the labels (the unpruned network)"
    )
    epochs: float = _choice(30.0, "passes over the training examples")
    lr: float = _choice(0.02, "learning rate at batch 12; it is scaled with the batch")
    preset: str = _settled("paper", "to prune: the architecture is that of the weights")
    aux_weight: float = _settled(
        0.0, "to prune: the unpruned network takes the place of auxiliary heads"
    )
    quantize: bool = _settled(False, "to prune: train with it afterwards")
    ema: float = _choice(
        0.99,
        "decay per step of a moving average of the weights, which is then what is cut and kept; 0: off",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        rules = {
            "weights": (self.weights is not None, "must be given to prune"),
            "flops": (0 < self.flops < 1, "must be above 0 and below 1"),
            "cuts": (self.cuts >= 1, "must be at least 1"),
            "spacing": (self.spacing > 0, "must be positive"),
            "epochs": (
                self.epochs > (self.cuts - 1) * self.spacing,
                f"must be above the {(self.cuts - 1) * self.spacing:g} until the last cut",
            ),
        }
        for one in fields(self):
            if (why := one.metadata.get("settled")) is not None:
                value = one.default
                rules[one.name] = (getattr(self, one.name) == value, f"must be {value} {why}")
        _check(self, rules)
