"""The machine code of every Triton kernel, for architectures that are not at hand: compiled, never run.

What holds for all: shared memory fits a block; on sm_80, 89, 90, 100 and AMD's nothing spills to memory, in any
dtype (AMD's scalar registers spill into vector registers: up to 45 of them, in inverted_residual); every product
is one of tensor cores, or of AMD's matrix instructions; on NVIDIA's at least 8 warps are resident, and matrices of
half precision are loaded by 16 bytes a thread. What does not hold:

- sm_75: Triton has no products for Turing's tensor cores, and some kernels spill. Float32 products are
  multiply-adds on all of NVIDIA's ("highest" precision).
- sm_86 and 120 are held to shared memory, products and loads alone, of which sm_89 has the least: they and gfx90a are not
  in CI.
- AMD: inverted_residual takes so many registers that 4 waves are resident.
- 16 bytes: where a tile has too few channels for its threads (``_by_8_bytes``).

int8 is for NVIDIA's from sm_80 on: there it has products of integers wherever it multiplies, and rounds nothing twice at once.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from fastscnn_fast.arch.config import PRESETS, preset

pytest.importorskip("triton", reason="the package triton is not installed")

from triton.backends.compiler import BaseBackend

from fastscnn_fast.backends.gpu import aot
from fastscnn_fast.backends.gpus import Architecture
from fastscnn_fast.kernels.launch import Launch
from fastscnn_fast.program.memory import Buffer

SIZE = (1024, 2048)
SIZES = (SIZE, (512, 1024), (256, 512))
NVIDIA = (75, 80, 86, 89, 90, 100, 120)
AMD = ("gfx90a", "gfx942")
NOT_IN_CI = (86, 120, "gfx90a")
NO_SPILLS = (80, 89, 90, 100)
KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
LDS = 64 * 1024  # of AMD's compute units
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NO_PRODUCT = ("upsample_classify_kernel", "resize_int8_kernel")
NARROW = (
    "stem_conv_kernel",
    "stem_conv_int8_kernel",
    "upsample_classify_kernel",
)  # three channels; a plane a class

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


def _all() -> Iterator[Any]:
    for architecture, dtype in itertools.product((*NVIDIA, *AMD), (*DTYPES, torch.int8)):
        if architecture == 75 and dtype in (torch.bfloat16, torch.int8):
            continue
        if architecture in AMD and dtype == torch.int8:
            continue
        marks = [pytest.mark.exhaustive] if architecture in NOT_IN_CI else []
        for case in _cases(architecture, dtype, ("tramac", "paper")):
            yield pytest.param(case, marks=marks)


def _few() -> Iterator[Any]:
    """Every kernel of the paper's network for three architectures, of which the first is quick."""
    cases: dict[tuple[Architecture, str], Case] = {}
    few: tuple[tuple[Architecture, torch.dtype], ...] = (
        (80, torch.float16),
        (90, torch.bfloat16),
        (90, torch.int8),
        ("gfx942", torch.float32),
    )
    for architecture, dtype in few:
        for case in _cases(architecture, dtype, ("paper",)):
            cases[architecture, case[2].kernel.__name__] = case
    for case in cases.values():
        marks = [] if case[0] == few[0][0] else [pytest.mark.machine_code]
        yield pytest.param(case, marks=marks)


def _has_tensor_cores(architecture: Architecture, dtype: torch.dtype) -> bool:
    """For this dtype, in Triton."""
    if isinstance(architecture, int):
        return architecture != 75 and dtype != torch.float32
    return True


def _by_8_bytes(architecture: Architecture, launch: Launch) -> bool:
    """Whether some tile has fewer than 8 channels of half precision a thread.

    dsconv of 48 channels, which come by 16: two warps of 32 pixels or four of 64 would load 16 bytes, but spill on
    sm_80, 86 and 89. The last dsconv on sm_80, 16 channels at a time: 32 spill. An inverted residual's pixels of one
    column, 16 of 32 channels for four warps.
    """
    a, kernel = launch.arguments, launch.kernel.__name__
    if kernel == "dsconv_kernel":
        return a["IN"] == 48 or (a["LAST"] > 0 and architecture == 80)
    if kernel != "inverted_residual_kernel":
        return False
    return a["LANES"] * min(a["PIECES"]) * min(a["BLOCKS_IN"]) < 8 * 32 * launch.warps


def _channels_a_thread(code: aot.Code) -> set[int]:
    """Of each load of a matrix of half precision."""
    text = code.compiled.asm["ttgir"]
    layout = r"(#\w+) = #ttg\.blocked<\{sizePerThread = \[(\d+), (\d+)\]"
    layouts = {name: max(int(i), int(j)) for name, i, j in re.findall(layout, text)}
    load = r"(?:tt\.load|ttg\.async_copy_global_to_local) .*? : tensor<\d+x\d+x!tt\.ptr<b?f16>, (#\w+)>"
    return {layouts[name] for name in re.findall(load, text)}


def _check(case: Case) -> None:
    architecture, dtype, launch = case
    code = aot.compiled(launch, architecture)
    kernel = launch.kernel.__name__
    if isinstance(architecture, int):
        assert code.shared <= KIB[architecture] * 1024
        assert code.resident_warps >= 8
        assert kernel in NARROW or code.wide_loads > 0
        if kernel not in NARROW and architecture != 75 and dtype in (torch.float16, torch.bfloat16):
            by_8 = _by_8_bytes(architecture, launch)
            assert min(_channels_a_thread(code)) >= (4 if by_8 else 8)
    else:
        assert code.shared <= LDS
    if architecture in (*NO_SPILLS, *AMD):
        assert (code.spills, code.stack) == (0, 0)
    if "int8" in kernel:
        assert "fma" not in code.ptx and not re.search(r"(add|sub|mul)\.f32", code.ptx)
    if kernel in NO_PRODUCT:
        return
    assert (code.products > 0) == _has_tensor_cores(architecture, dtype)
    if code.products:
        # A product that is not one of tensor cores has the layout of ordinary arithmetic.
        assert not re.search(r"tt\.dot .*-> tensor<.*#blocked", code.compiled.asm["ttgir"])


@pytest.mark.parametrize("case", list(_few()), ids=_name)
def test_machine_code(case: Case) -> None:
    _check(case)


@pytest.mark.machine_code
@pytest.mark.parametrize("case", list(_all()), ids=_name)
def test_machine_code_of_every_specialisation(case: Case) -> None:
    _check(case)


@pytest.mark.parametrize("output", ["labels", "probabilities"])
def test_machine_code_of_one_class(output: str) -> None:
    *_, last = aot.network(preset("paper", num_classes=1), SIZE, DTYPES[0], 80, output).launches
    assert last.arguments["CLASSES"] == 1
    _check((80, DTYPES[0], last))


# Aligned corners on planes of a pixel or two, where sizes are 1 and compiled in; sides that leave
# tiles ragged; offsets and positions of 64 bits.
ODD_SIZES = ((16, 16), (3, 3), (8, 64), (49, 65), (48, 120000))


def _odd() -> Iterator[Any]:
    few = ("tramac", torch.float16, ODD_SIZES[0])
    for odd in itertools.product(
        ("tramac", "segmentron"), (torch.float16, torch.float32), ODD_SIZES
    ):
        yield pytest.param(*odd, marks=[] if odd == few else [pytest.mark.machine_code])


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
