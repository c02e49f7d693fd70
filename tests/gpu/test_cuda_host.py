"""The CUDA kernels, compiled for the host and run there, a fiber a CUDA thread (csrc/cuda/host)."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cuda_host
import gpu_integers
import pytest
import torch
from cases import Case
from gpu_integers import pixels
from helpers import ROOT
from targets import ONE_OF_EACH, GpuCase, Target, check_odd, check_upsampling, slow_unless

from fastscnn_fast.arch.config import PRESETS
from fastscnn_fast.backends.gpu import runner
from fastscnn_fast.program.layers import OPS, Layer
from fastscnn_fast.program.program import layer_sizes

pytestmark = pytest.mark.skipif(bool(cuda_host.why_not()), reason=cuda_host.why_not())

ARITHMETICS = ("float32", "float16", "bfloat16", "int8")


# ---------------------------------------------------------------- the network's own instantiations
# Pictures of 96 x 160 and more make two tiles and a ragged one of most planes.


def real_layers() -> Iterator[Any]:
    """Every layer of every preset, with all its channels."""
    seen = set()
    for name, config in PRESETS.items():
        for step in layer_sizes(config, 104, 168):
            sizes = tuple(shape[1:] for shape in step.inputs)
            if step.layer.op == "upsample_classify":
                sizes += (step.output[1:],)
            case = Case(replace(step.layer, name=""), sizes).enlarged(1024)
            if case in seen:
                continue
            seen.add(case)
            for arithmetic in ARITHMETICS:
                if arithmetic == "int8" and step.layer.op == "upsample_classify":
                    continue  # that of float32
                quick = arithmetic == "float16" and name in ("tramac", "paper")
                quick |= arithmetic == "int8" and name == "paper"
                id = f"{step.layer.op}-{name}-{step.layer.name}-{arithmetic}"
                yield slow_unless(quick, replace(case, arithmetic=arithmetic), id=id)


def check_case(case: GpuCase) -> None:
    if case.arithmetic == "int8":
        sizes = zip(case.layer.input_channels, case.sizes)
        gpu_integers.check(case.layer, tuple(pixels(1, c, s) for c, s in sizes), case.target)
    elif case.layer.op == "upsample_classify":
        check_upsampling(case)
    else:
        check_odd(case)


@pytest.mark.parametrize("case", list(real_layers()))
def test_real_layers(case: Case, emulation: Target) -> None:
    for order in (0, 1, 2, 3):
        cuda_host.shared().set_warp_order(order)
        check_case(emulation.case(case))


#: Channels that no instantiation has: of each number of columns that a block may compute, more output channels than
#: it has, with all that follows them; more input channels than lie in shared memory at once; in int8 a result (24 -> 72)
#: that is larger than the weights it is laid over; and the network's widths in float32.
WIDE = [
    Layer("dsconv", "", 20, 136, last_channels=40),
    Layer("dsconv", "", 96, 40),
    Layer("dsconv", "", 24, 72),
    Layer("dsconv", "", 40, 200, stride=2),
    Layer("dsconv", "", 72, 96, last_channels=11),
    Layer("inverted_residual", "", 72, 136, mid_channels=80),
    Layer("inverted_residual", "", 24, 72, mid_channels=40, stride=2),
    Layer("inverted_residual", "", 24, 72, mid_channels=40),
    Layer("inverted_residual", "", 144, 144, mid_channels=40, residual=True),
    Layer("inverted_residual", "", 152, 48, mid_channels=72, stride=2),
    Layer("inverted_residual", "", 64, 64, mid_channels=128, residual=True),
    Layer("inverted_residual", "", 128, 128, mid_channels=64, residual=True),
    Layer("inverted_residual", "", 416, 416, mid_channels=24, residual=True),
    Layer("feature_fusion", "", 72, 200, mid_channels=24),
    Layer("feature_fusion", "", 24, 40, mid_channels=72, dilation=4),
    Layer("feature_fusion", "", 72, 24, mid_channels=40, dense=True),
]


@pytest.mark.parametrize("arithmetic", ["float32", "float16", "int8"])
@pytest.mark.parametrize("layer", WIDE, ids=lambda layer: str(Case(layer, ())))
def test_wide_layers(layer: Layer, arithmetic: str, emulation: Target) -> None:
    sizes = ((9, 18), (3, 5)) if layer.op == "feature_fusion" else ((9, 18),)
    for order in (0, 1):
        cuda_host.shared().set_warp_order(order)
        check_case(emulation.case(Case(layer, sizes), arithmetic))


SLICED = Layer("inverted_residual", "", 64, 64, mid_channels=384, residual=True)


@pytest.mark.parametrize("arithmetic", ["float32", "float16"])
def test_slices_meet_in_their_order(arithmetic: str, emulation: Target) -> None:
    """Whichever block is the last: the bits are the same, call after call on one arena."""
    case = emulation.case(Case(SLICED, ((9, 18),), batch=2), arithmetic)
    inputs, weights = case.inputs(), case.weights()
    results = []
    for order in (0, 1, 2, 3, 4, 7):
        cuda_host.shared().set_warp_order(order)
        results.append(case.run(inputs, weights))
    assert all(torch.equal(results[0], y) for y in results)
    ((bound,),) = runner._pool._free.values()
    (call,) = bound._calls
    assert call._step.sizes["slices"] > 1


def fenced(packed: torch.Tensor) -> torch.Tensor:
    """The same at the very end of memory whose next page may not be read."""
    page, size = mmap.PAGESIZE, packed.numel()
    whole = -(-size // page) * page
    memory = mmap.mmap(-1, whole + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + whole), ctypes.c_size_t(page), 0) == 0
    inside = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=whole - size)
    return inside.copy_(packed)


class FencedCase(GpuCase):
    """Its weights are :func:`fenced`."""

    def packed(self, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return fenced(super().packed(weights))


@pytest.mark.parametrize("out_channels", [16, 48])
def test_nothing_is_read_past_the_weights(out_channels: int, emulation: Target) -> None:
    """In a process that a read past them ends."""
    cases = [
        FencedCase(
            **{**vars(case), "layer": replace(case.layer, out_channels=out_channels)},
            target=emulation,
        )
        for case in ONE_OF_EACH
        if case.layer.op != "upsample_classify" and not case.layer.residual
    ]
    child = os.fork()
    if child == 0:
        code = 1
        signal.alarm(120)
        try:
            torch.set_num_threads(1)  # a pool of threads does not survive a fork
            for case in cases:
                case.run(case.inputs(), case.weights())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


# ---------------------------------------------------------------- mutants: kernels that are wrong on purpose


#: Headers whose code is mutated too, and the op that shows it.
HEADERS = {
    "convolution": "pyramid_pooling",
    "cut": "inverted_residual",
    "depthwise": "inverted_residual",
    "product": "dsconv",
    "slices": "inverted_residual",
    "convolution_int8": "pyramid_pooling_int8",
    "depthwise_int8": "dsconv_int8",
    "integers": "feature_fusion_int8",
    "resize_int8": "feature_fusion_int8",
}
#: Those of bytes.
INT8 = tuple(f"{op}_int8" for op in OPS if op != "upsample_classify")


def source_of(name: str) -> str:
    """An op's source, or one of HEADERS."""
    return (cuda_host.CUDA / f"{name}{'.cuh' if name in HEADERS else '.cu'}").read_text()


def inlined(text: str, changed: dict[str, str], seen: set[str]) -> str:
    """``text`` with the kernels' headers in place of what includes them, each once."""

    def header(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return ""
        seen.add(name)
        return inlined(changed.get(name) or source_of_header(name), changed, seen)

    return re.sub(r'#include "(\w+)\.cuh"\n', header, text)


def source_of_header(name: str) -> str:
    return (cuda_host.CUDA / f"{name}.cuh").read_text().replace("#pragma once", "")


#: What a failing check says: numbers that are wrong (or were never written, and stayed NaN), labels that are, memory
#: that was not the kernel's to write, and rules of a block that the emulation watches.
NUMBERS = r"AssertionError: (error (everywhere|on the border) \S+, bound|\(Layer)"
LABELS = r"AssertionError: (\d+ of \d+ labels are wrong|label \d+ is none|\w+ left part of its result unwritten)"
WRITTEN = (
    r"AssertionError: \w+ (wrote outside of its result|left something in the padding channels)"
)
WRITTEN += r"|AssertionError: a kernel wrote outside of its scratch memory"
BARRIERS = r"ValueError: \w+: (a barrier|threads of one block wait at different barriers)"
COUNTERS = r"AssertionError: a kernel left a counter"
OTHERS = r"ValueError: \w+: (a thread must publish|all threads of a block must have published)"
FINITE = r"AssertionError: Tensor-likes are not close"
COPIES = r"ValueError: \w+: a thread must wait for its asynchronous copies before it ends"
LAUNCHES = r"ValueError: \w+: (a thread must wait for the|what) launches before"


@dataclass(frozen=True)
class Mutant:
    """The ``n``-th match of ``pattern`` in an op's source becomes ``replacement``; one of ``checks`` must then fail."""

    source: str  # without its ending
    what: str
    pattern: str
    replacement: str
    checks: tuple[str, ...]
    n: int = 0

    def __str__(self) -> str:
        return f"{self.source} {self.what} {self.n}"

    @property
    def op(self) -> str:
        return HEADERS.get(self.source, self.source)

    def text(self) -> str:
        text = source_of(self.source)
        found = list(re.finditer(self.pattern, text))[self.n]
        changed = text[: found.start()] + found.expand(self.replacement) + text[found.end() :]
        if self.source == self.op:
            return changed
        changed = changed.replace("#pragma once", "")
        return inlined(source_of(self.op), {self.source: changed}, set())


BARRIER, LAST_WAIT = r"__syncthreads\(\);", r"async_wait<0>\(\);"
LATER_WAIT = r"async_wait<([12]|kStages - 2)>\(\);"
WAIT = r"wait_for_launches_before\(\);"
REST = r"(?:(?!wait_for_launches_before)[\s\S])*?"  # of the same kernel
KINDS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("without a barrier", BARRIER, ";", (NUMBERS, LABELS, WRITTEN, FINITE, BARRIERS, OTHERS)),
    ("barrier for some", BARRIER, "if (threadIdx.x < 32) __syncthreads();", (BARRIERS,)),
    ("copies not waited for", LAST_WAIT, ";", (NUMBERS, COPIES)),
    ("copies waited for too late", LATER_WAIT, r"async_wait<\1 + 1>();", (NUMBERS, COPIES)),
    ("waits for no launch", WAIT, ";", (LAUNCHES,)),
    ("some wait for launches", WAIT, r"if (threadIdx.x < 32) \g<0>", (LAUNCHES, BARRIERS)),
    (  # at the second barrier, if there is one: some touch nothing but weights before the first
        "waits for launches too late",
        WAIT + rf"((?:{REST}__syncthreads)?{REST})(?=__syncthreads)",
        r"\1wait_for_launches_before(); ",
        (NUMBERS, LABELS, LAUNCHES),
    ),
    (
        "writes before the launches before end",
        r"queue_right\(0\);",
        r"*reinterpret_cast<char*>(out) = 0; \g<0>",
        (LAUNCHES,),
    ),
    ("an index shifted", r"Product::column\(\) \+ c(olumn)?\b", r"\g<0> + 2", (NUMBERS, WRITTEN)),
    (
        "reads past the edge",
        r"(?<=z >= 0 && z) < width|(?<=column >= 0 && column) < width",
        " <= width",
        (NUMBERS, LABELS),
    ),
    (
        "writes past the edge",
        r"z >= (out_)?width\b|column >= width\b",
        r"(\g<0>) && false",
        (NUMBERS, LABELS, WRITTEN),
    ),
    ("writes past the edge", r" && column \+ along < columns", "", (NUMBERS, WRITTEN)),
    ("a counter that is not reset", r"counters\[tile\] = 0", "(void)tile", (COUNTERS,)),
    ("nobody published", r"publish\(\);", ";", (OTHERS,)),
    ("summed up too early", r"slices - 1\)", "slices - 2)", (NUMBERS, COUNTERS)),
    ("a slice left out", r"from = 0; from", "from = 1; from", (NUMBERS,)),
    (
        "one infinity makes all NaN",
        r"if \(any_of_warp.*\) one_by_one",
        "if (false) one_by_one",
        (FINITE,),
    ),
    ("a write past the end", r"p >= pixels\b", "p > pixels", (NUMBERS, LABELS, WRITTEN)),
    ("labels past the edge", r"if \(column < width\) to", "to", (LABELS, WRITTEN)),
    ("a local that is not written", r"(terms\[.*\])\{\}", r"\1", (NUMBERS,)),
    ("bytes that are no factors", r"\b(?:\w+_)?to_factors\((?!Byte).*?\);", ";", (NUMBERS,)),
    ("a half left out", r"(kHalf|kHalves) = .*;", r"\1 = 0;", (NUMBERS,)),
)


def mutants() -> Iterator[Any]:
    """CI has one of each kind, in the op that compiles the fastest, and one of each op."""
    seen: set[object] = set()
    for source in (*reversed(OPS), *HEADERS, *INT8):
        for kind in KINDS:
            for n in range(len(re.findall(kind[1], source_of(source)))):
                mutant = Mutant(source, *kind, n=n)
                marks = [pytest.mark.mutants]
                if {kind, mutant.op} <= seen:
                    marks.append(pytest.mark.exhaustive)
                seen |= {kind, mutant.op}
                yield pytest.param(mutant, id=str(mutant), marks=marks)


def run_emulated(module: Path, selected: str, timeout: int, **environment: str) -> Any:
    """The first selection of the emulation's tests on ``module``, in a process of their own, to the first failure."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    names = ("test_parity.py", "test_cuda_host.py", "test_integers.py")
    tests = [str(Path(__file__).with_name(name)) for name in names]
    return subprocess.run(
        [*command, "-m", "emulated and not slow", "-k", selected, *tests],
        env={**os.environ, cuda_host.VARIABLE: str(module), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.parametrize("mutant", list(mutants()))
def test_mutants_are_found(mutant: Mutant) -> None:
    """By a check that is there to find them; a crash, or another error, is no such thing."""
    built = cuda_host.build(changed={f"{mutant.op}.cu": mutant.text()})
    cases = "real_layers or small_size or upsampling or wide_layers or infinity"
    own = "(int8 or test_integers)" if mutant.op in INT8 else "not int8 and not test_integers"
    selected = f"{mutant.op.removesuffix('_int8')} and {own} and ({cases})"
    done = run_emulated(built, selected, 300)
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout + done.stderr
    (said,) = re.findall(r"^E +(\w*(?:Error|Exception): .*)", done.stdout, re.MULTILINE)
    assert any(re.match(check, said) for check in mutant.checks), said


# ---------------------------------------------------------------- sanitizers


@pytest.mark.sanitizers
def test_sanitizers_find_nothing() -> None:
    """AddressSanitizer and UBSan over every op in a process of its own; Python itself leaks and is not asked."""
    built = cuda_host.build(cuda_host.SANITIZED)
    command = [cuda_host.COMPILER, "-print-file-name=libasan.so"]
    asan = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    selected = "test_real_layers or a_small_size"
    done = run_emulated(built, selected, 1800, LD_PRELOAD=asan, ASAN_OPTIONS="detect_leaks=0")
    assert done.returncode == 0, done.stdout + done.stderr
