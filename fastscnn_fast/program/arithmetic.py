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
        dtype: dtype that is asked for, and of float input and results.
        precision: as in torch.set_float32_matmul_precision.
        weights: dtype of the weights of products; biases and sums are float32 but in float64.
        needs: the backends that have it, and the least that each needs for it: an instruction set on the cpu, ten
            times a compute capability on NVIDIA GPUs.
        layers: the ops that are computed in another arithmetic, by its name.
        layer_bounds: how far from float64 a layer's result may be on its own.
        network_bounds: how far from float64 logits and labels of a network may be.
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
        Arithmetic(
            "float16",
            3,
            torch.float16,
            torch.float16,
            {"triton": 75, "cuda": 75, "reference": ""},
            Bounds(0.0, 1e-3, 1.5),
            Bounds(0.0, 1e-3, 1.5),
        ),
        Arithmetic(
            "float64",
            4,
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
