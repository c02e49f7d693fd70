"""The machine code of every Triton kernel, for architectures that are not at hand: compiled, never run."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from fastscnn_fast.config import PRESETS, preset

pytest.importorskip("triton", reason="the package triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted (TRITON_INTERPRET=1)", allow_module_level=True)

from triton.backends.compiler import BaseBackend

from fastscnn_fast.kernels import aot
from fastscnn_fast.kernels.launch import Buffer, Launch
from fastscnn_fast.kernels.tiles import Architecture

SIZE = (1024, 2048)
SIZES = (SIZE, (512, 1024), (256, 512))
NVIDIA = (75, 80, 86, 89, 90, 100, 120)
AMD = ("gfx90a", "gfx942")
NO_SPILLS = (80, 89, 90, 100)
KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
LDS = 64 * 1024  # of AMD's compute units
NO_PRODUCT = ("upsample_classify_kernel",)
NARROW = ("stem_conv_kernel", "upsample_classify_kernel")  # three channels; a plane a class

Case = tuple[Architecture, torch.dtype, Launch]


def _name(case: Case) -> str:
    architecture, dtype, launch = case
    a = launch.arguments
    what = "-".join(f"{key}{a[key]}" for key in ("IN", "MID", "OUT", "STRIDE", "LAST") if key in a)
    name = launch.kernel.__name__.removesuffix("_kernel")
    return f"{architecture}-{str(dtype)[6:]}-{name}-{what or a.get('OUTPUT', '')}"


@cache
def _cases(architecture: Architecture, dtype: torch.dtype, presets: tuple[str, ...]) -> list[Case]:
    """Every compiled specialisation once."""
    found: dict[str, Case] = {}
    for name, raw in itertools.product(presets, (False, True)):
        for output in ("logits", "labels", "probabilities"):
            plan = aot.network(preset(name), SIZE, dtype, architecture, output, raw)
            for launch in plan.launches:
                how = aot.specialised(launch, architecture)
                key = f"{launch.kernel.__name__} {how} {launch.warps} {launch.stages}"
                found.setdefault(key, (architecture, dtype, launch))
    return list(found.values())


def _all() -> Iterator[Case]:
    for architecture in (*NVIDIA, *AMD):
        for dtype in (torch.float16, torch.bfloat16):
            if architecture != 75 or dtype == torch.float16:
                yield from _cases(architecture, dtype, ("tramac", "paper"))


def _few() -> list[Case]:
    """Every kernel of the paper's network for two architectures."""
    cases = {}
    for architecture, dtype in ((80, torch.float16), (90, torch.bfloat16)):
        for case in _cases(architecture, dtype, ("paper",)):
            cases[architecture, case[2].kernel.__name__] = case
    return list(cases.values())


def _check(case: Case) -> None:
    architecture, _, launch = case
    code = aot.compiled(launch, architecture)
    kernel = launch.kernel.__name__
    if isinstance(architecture, int):
        assert code.shared <= KIB[architecture] * 1024
        assert code.resident_warps >= 8
        assert kernel in NARROW or code.wide_loads > 0
    else:
        assert code.shared <= LDS
    if architecture in NO_SPILLS:
        assert (code.spills, code.stack) == (0, 0)
    if kernel in NO_PRODUCT:
        return
    if architecture == 75:  # this version of Triton has no products for Turing's tensor cores
        assert code.products == 0
    else:
        assert code.products > 0


@pytest.mark.parametrize("case", _few(), ids=_name)
def test_machine_code(case: Case) -> None:
    _check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(_all()), ids=_name)
def test_machine_code_of_every_specialisation(case: Case) -> None:
    _check(case)


# Aligned corners on planes of a pixel or two, where sizes are 1 and compiled in; sides that leave
# tiles ragged; offsets and positions of 64 bits.
ODD_SIZES = ((16, 16), (3, 3), (8, 64), (49, 65), (48, 120000))


def _odd() -> Iterator[Any]:
    few = ("tramac", torch.float16, ODD_SIZES[0])
    for odd in itertools.product(
        ("tramac", "segmentron"), (torch.float16, torch.float32), ODD_SIZES
    ):
        yield pytest.param(*odd, marks=[] if odd == few else [pytest.mark.slow])


@pytest.mark.parametrize(("name", "dtype", "size"), list(_odd()), ids=str)
def test_odd_sizes_compile(name: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    config = replace(preset(name), num_classes=150)
    for output in ("logits", "labels"):
        for launch in aot.network(config, size, dtype, 80, output).launches:
            assert aot.compiled(launch, 80).shared <= KIB[80] * 1024, launch.kernel.__name__


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("output", ["logits", "labels"])
@pytest.mark.parametrize("name", ["tramac", "paper"])
def test_memory_moves_about_as_the_six_ops_must(
    name: str, output: str, size: tuple[int, int]
) -> None:
    config = preset(name)
    must = aot.necessary_bytes(config, size, torch.float16, output)
    launches = aot.network(config, size, torch.float16, 80, output).launches
    assert sum(launch.bytes for launch in launches) <= 1.15 * must


@pytest.mark.parametrize("name", PRESETS)
def test_launches_of_a_forward(name: str) -> None:
    for output in ("logits", "labels", "probabilities"):
        launches = aot.network(preset(name), SIZE, torch.float16, 80, output).launches
        assert len(launches) <= 20


def test_arguments_are_specialised_as_the_jit_does() -> None:
    jit = pytest.importorskip("triton.runtime.jit")
    if not hasattr(jit, "native_specialize_impl"):
        pytest.skip("this version of Triton specialises elsewhere")
    for launch in aot.network(preset("paper"), SIZE, torch.float16, 80).launches:
        how = aot.specialised(launch, 80)
        for index, parameter in enumerate(launch.kernel.params):
            value = launch.arguments[parameter.name]
            if parameter.is_constexpr:
                assert how.constants[parameter.name] == value
                continue
            if isinstance(value, Buffer):
                value = torch.empty(16, dtype=value.dtype)
            type_, key = jit.native_specialize_impl(BaseBackend, value, False, True, True)
            assert how.signature[parameter.name] == type_
            divisible = [["tt.divisibility", 16]]
            assert how.attributes.get((index,), []) == (divisible if key == "D" else [])
