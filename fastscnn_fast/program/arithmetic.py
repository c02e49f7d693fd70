"""How a network computes: one record an arithmetic, which every dtype, layout and bound elsewhere comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch

from .parity import Bounds


@dataclass(frozen=True)
class Arithmetic:
    """One way to compute a network, as ``fuse(dtype=, precision=)`` chooses it.

    Attributes:
        name: what it is called everywhere.
        number: what stands for it in encoded layers and in the tag of packed weights (csrc/cpu/layer.h).
        dtype: dtype that is asked for; of float input and results too, unless ``floats`` is another.
        precision: as in torch.set_float32_matmul_precision.
        weights: dtype of the weights of products; biases and sums are float32 but in float64 and int8, where they
            are int32.
        needs: the backends that have it, and the least that each needs for it: an instruction set on the cpu, ten
            times a compute capability on NVIDIA GPUs.
        layers: the ops that are computed in another arithmetic, by its name.
        layer_bounds: how far from float64 a layer's result may be on its own.
        network_bounds: how far from float64 logits and labels of a network may be.
        activations: dtype of what lies between layers; ``dtype`` where nothing else is said.
        floats: dtype of float input, logits and probabilities; ``dtype`` where nothing else is said.
        channels: what widths are best multiples of, since kernels compute whole blocks of as many: what a vector
            register or a tile's row holds of its weights. Its products are as many times faster than those of others.
    """

    name: str
    number: int
    dtype: torch.dtype
    weights: torch.dtype
    needs: Mapping[str, str | int]
    layer_bounds: Bounds
    network_bounds: Bounds
    precision: str = "highest"
    layers: Mapping[str, str] = field(default_factory=dict)
    activations: torch.dtype = None  # type: ignore[assignment]  # set below
    floats: torch.dtype = None  # type: ignore[assignment]
    channels: int = 16

    def __post_init__(self) -> None:
        for name in ("activations", "floats"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.dtype)

    @property
    def quantised(self) -> bool:
        """Whether it computes in integers, with the ranges of a network's values."""
        return not self.dtype.is_floating_point

    @property
    def asked(self) -> tuple[torch.dtype, str]:
        """The dtype and precision by which it is asked for."""
        return self.dtype, self.precision


_LAYER, _NETWORK = Bounds(1e-6, 1e-4, 2.0), Bounds(1e-5, 1e-4, 2.0)

#: By name, in the order of their numbers.
ARITHMETICS: dict[str, Arithmetic] = {
    one.name: one
    for one in (
        Arithmetic(
            "float32",
            0,
            torch.float32,
            torch.float32,
            {"cpu": "portable", "triton": 75, "cuda": 80, "reference": ""},
            _LAYER,
            _NETWORK,
        ),
        Arithmetic(
            "bfloat16",
            1,
            torch.bfloat16,
            torch.bfloat16,
            {"cpu": "portable", "triton": 80, "cuda": 80, "reference": ""},
            Bounds(0.0, 5e-3, 1.5),
            Bounds(0.0, 5e-3, 1.5),
            channels=32,
        ),
        # Products of about 17 bits: three of bfloat16 on the cpu, where the stem's are too short for taking them
        # apart to pay; TF32 on GPUs, whose factors have 11 bits.
        Arithmetic(
            "high",
            2,
            torch.float32,
            torch.float32,
            {"cpu": "amx", "triton": 80},
            Bounds(2.0**-10, 1e-4, 2.0),
            _NETWORK,
            precision="high",
            layers={"stem_conv": "float32"},
        ),
        # Integers, the same on every backend and instruction set: integers.py says which. The bounds are those of a
        # network whose ranges were measured.
        Arithmetic(
            "int8",
            3,
            torch.int8,
            torch.int8,
            {"cpu": "portable", "triton": 80, "cuda": 75, "reference": ""},
            Bounds(0.05, 0.01, 1.0),
            Bounds(0.25, 0.01, 1.0),
            layers={"upsample_classify": "float32"},
            activations=torch.uint8,
            floats=torch.float32,
            channels=64,
        ),
        Arithmetic(
            "float16",
            4,
            torch.float16,
            torch.float16,
            {"triton": 75, "cuda": 75, "reference": ""},
            Bounds(0.0, 1e-3, 1.5),
            Bounds(0.0, 1e-3, 1.5),
            channels=32,
        ),
        Arithmetic(
            "float64",
            5,
            torch.float64,
            torch.float64,
            {"reference": ""},
            Bounds(1e-14, 0.0, 1.0),
            Bounds(1e-13, 0.0, 1.0),
        ),
    )
}
PRECISIONS = tuple(dict.fromkeys(one.precision for one in ARITHMETICS.values()))


def of(backend: str) -> dict[str, Arithmetic]:
    """The arithmetics that ``backend`` has, by name."""
    return {name: one for name, one in ARITHMETICS.items() if backend in one.needs}


@cache  # every call of an op asks
def dtypes(backend: str) -> tuple[torch.dtype, ...]:
    """The dtypes that ``backend`` computes in."""
    return tuple(one.dtype for one in of(backend).values() if one.precision == "highest")


@cache
def activation_dtypes(backend: str) -> tuple[torch.dtype, ...]:
    """The dtypes of what lies between layers on ``backend``."""
    return tuple(one.activations for one in of(backend).values() if one.precision == "highest")


@cache
def floats_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype of float results where that is asked for, or where that lies between layers."""
    for one in ARITHMETICS.values():
        if dtype in (one.dtype, one.activations):
            return one.floats
    return dtype


@cache
def activations_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what lies between layers where ``dtype`` is asked for."""
    return next((one.activations for one in ARITHMETICS.values() if one.dtype == dtype), dtype)


@cache
def dtype_of(op: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which ``op`` is computed in a network where ``dtype`` is asked for."""
    for one in ARITHMETICS.values():
        if one.asked == (dtype, "highest") and op in one.layers:
            return ARITHMETICS[one.layers[op]].dtype
    return dtype


def dtype_rule(backend: str) -> str:
    """What a dtype must be for ``backend``, in words."""
    *others, last = map(str, dtypes(backend))
    return f"dtype must be {', '.join(others)} or {last}"


def choose(backend: str, dtype: torch.dtype, precision: str = "highest") -> Arithmetic:
    """The arithmetic of ``backend`` for that dtype and precision.

    Raises:
        ValueError: it has none; the message names the argument, the rule and the value.
    """
    known = of(backend).values()
    for one in known:
        if one.asked == (dtype, precision):
            return one
    if dtype not in dtypes(backend):
        raise ValueError(f"{dtype_rule(backend)} for backend {backend}, got {dtype}")
    allowed = " or ".join(repr(one.precision) for one in known if one.dtype == dtype)
    raise ValueError(
        f"precision must be {allowed} for backend {backend} and {dtype}, got {precision!r}"
    )
