"""Choosing a backend and an instruction set, by name, by environment and by what is there."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import BOUNDS, ROOT, assert_parity, err, small_network

from fastscnn_fast import fuse
from fastscnn_fast.arch.config import PRESETS, Config, preset
from fastscnn_fast.backends import cpu as cpu_backend, registry
from fastscnn_fast.program import arithmetic

CPU = torch.device("cpu")
built = pytest.mark.skipif(not registry.isas(), reason="the C++ extension is not built")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log, in which every reason appears anew."""
    registry.log_once.cache_clear()
    caplog.set_level(logging.WARNING, "fastscnn_fast")
    return caplog


def choose(name: str = "auto", dtype: torch.dtype = torch.float32) -> str:
    return registry.choose(name, Config(), CPU, dtype)


@built
def test_the_best_that_can_run_is_chosen(monkeypatch, log):
    monkeypatch.delenv("FASTSCNN_BACKEND", raising=False)
    assert choose() == "cpu" and not log.messages
    assert [choose(name) for name in ("cpu", "reference")] == ["cpu", "reference"]
    assert choose(dtype=torch.bfloat16) == "cpu" and not log.messages
    for _ in range(2):
        assert choose(dtype=torch.float16) == "reference"
    assert log.messages == [
        "running on the reference backend: cpu:"
        " dtype must be torch.float32, torch.bfloat16 or torch.int8, got torch.float16"
    ]


@built
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_the_environment_forces_a_backend(name, monkeypatch, log):
    x, model = torch.randn(1, 3, 64, 64), small_network()
    monkeypatch.setenv("FASTSCNN_BACKEND", name)
    fast = fuse(model)
    assert fast.backend == choose() == name and not log.messages
    with torch.no_grad():
        assert err(fast(x), model.reference(x).double()) < 1e-5
    assert fuse(model, "reference").backend == "reference"  # the argument is nearer


@pytest.mark.parametrize("forced", ["argument", "environment"])
def test_a_forced_backend_that_cannot_run_says_why(forced, monkeypatch):
    def force(name: str, dtype: torch.dtype = torch.float32) -> None:
        monkeypatch.setenv("FASTSCNN_BACKEND", name if forced == "environment" else "reference")
        choose("auto" if forced == "environment" else name, dtype)

    with pytest.raises(
        RuntimeError, match="cuda cannot run: (there is no GPU|device must be cuda|the extension)"
    ):
        force("cuda")
    with pytest.raises(
        RuntimeError, match="triton cannot run: (there is no GPU|device must be cuda|the package)"
    ):
        force("triton")
    with pytest.raises(
        RuntimeError, match=r"reference cannot run: dtype must be .*, got torch.int16"
    ):
        force("reference", torch.int16)
    with pytest.raises(ValueError, match="backend must be auto or one of .*, got 'opencl'"):
        force("opencl")


@built
def test_the_cpu_backend_says_what_it_cannot_run():
    for device, dtype, reason in (
        (torch.device("cuda", 0), torch.float32, "device must be cpu, got cuda:0"),
        (
            CPU,
            torch.float16,
            "dtype must be torch.float32, torch.bfloat16 or torch.int8, got torch.float16",
        ),
    ):
        assert registry.BACKENDS["cpu"].why_not(Config(), device, dtype) == reason
    nine = preset("paper", bottleneck_channels=(16, 16, 36), pyramid_bins=tuple(range(1, 10)))
    assert "pyramid_bins must be at most 8" in str(
        registry.BACKENDS["cpu"].why_not(nine, CPU, torch.float32)
    )
    for config in PRESETS.values():
        for dtype in (torch.float32, torch.bfloat16):
            assert registry.BACKENDS["cpu"].why_not(config, CPU, dtype) is None


@built
def test_empty_variables_count_as_unset(monkeypatch):
    monkeypatch.setenv("FASTSCNN_BACKEND", "")
    monkeypatch.setenv("FASTSCNN_ISA", "")
    assert choose() == "cpu" and registry.isa() == registry.cpu_module().instruction_sets()[-1]


@built
def test_the_report_has_a_line_for_every_backend():
    report = registry.report()
    assert list(report) == ["cuda", "cpu", "triton", "reference"]
    assert (report["cpu"], report["reference"]) == (None, None)
    assert report["cuda"] and report["triton"]


@built
def test_every_instruction_set_computes_the_same(kernels):
    x, model = torch.randn(1, 3, 70, 90).to(kernels.dtype), small_network()
    fast = fuse(model, "cpu", kernels.dtype, kernels.precision)
    assert (fast.dtype, fast.precision) == (kernels.dtype, kernels.precision)
    own, model64 = copy.deepcopy(model).to(kernels.dtype), copy.deepcopy(model).double()
    with torch.no_grad():
        y, owns, ref64 = fast(x), own.reference(x), model64.reference(x.double())
    assert_parity(y, owns, ref64, *BOUNDS[kernels.arithmetic].network)


@built
def test_any_instruction_set_may_be_forced_for_any_dtype(monkeypatch):
    """Where it has no kernels of its own, those of a lesser one run."""
    x, model = torch.randn(1, 3, 70, 90), small_network()
    fast = fuse(model)
    for isa in registry.cpu_module().instruction_sets():
        monkeypatch.setenv("FASTSCNN_ISA", isa)
        assert registry.isa() == isa
        y = fast(x)
        least = [name for name in registry.isas() if name == isa] or registry.isas()[-1:]
        monkeypatch.setenv("FASTSCNN_ISA", least[0])
        assert torch.equal(fast(x), y)


@built
def test_each_arithmetic_runs_the_best_kernels_of_its_own_up_to_the_set_in_use(monkeypatch):
    known = ["portable", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx"]
    own = {
        "float32": ["portable", "avx2", "avx512"],
        "int8": ["portable", "avx2", "avx_vnni", "avx512", "avx512_vnni"],
        "high": ["amx"],
    }
    monkeypatch.setattr(
        registry,
        "_cpu_module",
        SimpleNamespace(instruction_sets=lambda name=None: known if name is None else own[name]),
    )
    for forced, float32, int8, high in (
        ("amx", "avx512", "avx512_vnni", "amx"),
        ("avx512_bf16", "avx512", "avx512_vnni", "none"),
        ("avx_vnni", "avx2", "avx_vnni", "none"),
        ("portable", "portable", "portable", "none"),
    ):
        monkeypatch.setattr(registry, "isa", lambda forced=forced: forced)
        found = tuple(map(registry.isa_of, ("float32", "int8", "high")))
        assert found == (float32, int8, high)


# ---------------------------------------------------------------- precision

with_amx = pytest.mark.skipif(not registry.isas("high"), reason="the processor has no AMX")


def test_high_precision_without_amx_stays_on_the_cpu(monkeypatch):
    """Also where the interpreter could run it."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert registry.able(Config(), CPU, torch.float32, "high")[0] == "cpu"


@with_amx
def test_high_precision_runs_where_there_is_amx(monkeypatch, log):
    x, model = torch.randn(1, 3, 70, 90), small_network()
    monkeypatch.delenv("FASTSCNN_BACKEND", raising=False)
    monkeypatch.delenv("FASTSCNN_ISA", raising=False)
    high, highest = fuse(model, precision="high"), fuse(model)
    assert (high.precision, highest.precision) == ("high", "highest") and not log.messages
    assert high(x).dtype == torch.float32 and not torch.equal(high(x), highest(x))
    assert fuse(model, "cpu", precision="high").precision == "high"
    monkeypatch.setenv("FASTSCNN_ISA", "portable")
    with pytest.raises(ValueError, match="portable"):
        high(x)


@pytest.mark.parametrize(
    ("backend", "dtype", "forced_isa", "reason"),
    [
        ("cpu", torch.float32, "portable", "it needs AMX, the instruction set in use is portable"),
        ("cpu", torch.bfloat16, "", "dtype must be torch.float32, got torch.bfloat16"),
        ("reference", torch.float32, "", "backend must be cpu or triton, got reference"),
    ],
)
@built
def test_high_precision_where_there_is_none(backend, dtype, forced_isa, reason, monkeypatch, log):
    """The highest, with one logged reason; an error where the cpu backend was asked for by name."""
    model = small_network()
    monkeypatch.setenv("FASTSCNN_ISA", forced_isa)
    monkeypatch.setenv("FASTSCNN_BACKEND", "" if backend == "cpu" else backend)
    for _ in range(2):
        fast = fuse(model, dtype=dtype, precision="high")
        assert (fast.backend, fast.precision) == (backend, "highest")
    assert log.messages == [f"running in precision highest: {reason}"]
    if backend != "cpu":
        assert fuse(model, backend, dtype, "high").precision == "highest"
        return
    for name, forced in (("cpu", ""), ("auto", "cpu")):
        monkeypatch.setenv("FASTSCNN_BACKEND", forced)
        with pytest.raises(RuntimeError, match=f"cpu cannot run in precision high: {reason}"):
            fuse(model, name, dtype, "high")


def test_an_arithmetic_for_each_dtype_and_precision():
    for name, one in registry.CPU_ARITHMETICS.items():
        assert arithmetic.choose("cpu", *one.asked) is one and one.name == name
    with pytest.raises(
        ValueError, match="precision must be 'highest' for backend cpu and torch.bf.*, got 'high'"
    ):
        arithmetic.choose("cpu", torch.bfloat16, "high")


@built
def test_an_unknown_instruction_set_is_an_error(monkeypatch):
    fast, x = fuse(small_network()), torch.randn(1, 3, 64, 64)
    monkeypatch.setenv("FASTSCNN_ISA", "sse9")
    for run in (registry.isa, lambda: fast(x), lambda: fast.labels(x)):
        with pytest.raises(ValueError, match=r"FASTSCNN_ISA must be one of portable.*, got 'sse9'"):
            run()
    monkeypatch.setenv("FASTSCNN_ISA", "portable")
    assert fast(x).isfinite().all()
    cpu = registry.cpu_module()
    with pytest.raises(ValueError, match="isa must be one that this processor runs, got 'sse9'"):
        _, *call = cpu_backend._call(fast.program, fast.weights, fast.dtype)
        cpu.network(("sse9", *call), cpu_backend._picture(x), "logits", 0)


def test_without_the_extension_everything_runs_in_plain_torch():
    """One logged reason, no warning; a forced cpu backend says what is missing."""
    script = """
import copy
import logging, sys, torch
sys.modules["fastscnn_fast._cpu"] = None
messages = []
class Handler(logging.Handler):
    def emit(self, record):
        messages.append(record.getMessage())
logging.getLogger("fastscnn_fast").addHandler(Handler())
from fastscnn_fast import FastSCNN, fuse, ops
from fastscnn_fast.backends import registry
model, x = FastSCNN(5).eval(), torch.randn(1, 3, 64, 64)
assert not messages and registry.isas() == []
with torch.no_grad():
    for _ in range(2):
        assert torch.equal(model(x), model.reference(x))
        fast = fuse(model)
        assert torch.allclose(fast(x), model.reference(x), atol=1e-5)
assert fast.backend == "reference" and fast.labels(x).dtype == torch.uint8
(message,) = messages
assert "the extension fastscnn_fast._cpu is not built" in message, message
assert registry.report()["cpu"].startswith("the extension fastscnn_fast._cpu is not built")
for run in (lambda: fuse(model, "cpu"), registry.isa, lambda: ops.network(x, fast.weights, fast.program)):
    try:
        run()
    except RuntimeError as error:
        assert "backend cpu cannot run: the extension fastscnn_fast._cpu is not built" in str(error)
    else:
        raise AssertionError("no error")
"""
    command = [sys.executable, "-W", "error", "-c", script]
    subprocess.run(command, check=True, cwd=ROOT, timeout=120)


def test_import_and_use_warn_of_nothing():
    script = """
import torch
from fastscnn_fast import FastSCNN, FusedFastSCNN, accelerate, fuse, load_checkpoint, segment
from fastscnn_fast.compat import tramac
model, x = FastSCNN(5, aux=True), torch.randn(2, 3, 64, 64)
model(x)[0].sum().backward()
model.eval()
with torch.no_grad():
    model(x), model(x.to(torch.uint8)), fuse(model).probabilities(x), fuse(model).labels(x)
assert not torch.cuda.is_initialized()
"""
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(
        command, check=True, cwd=ROOT, timeout=120, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("", "") or not registry.isas()


@built
def test_a_forced_backend_leaves_what_it_cannot_run_to_plain_torch(monkeypatch, log):
    monkeypatch.setenv("FASTSCNN_BACKEND", "cpu")
    model, x = small_network().half(), torch.randn(1, 3, 64, 64).half()
    with torch.no_grad():
        assert torch.equal(model(x), model.reference(x))
    assert log.messages == [
        "FastSCNN runs unfused: backend cpu cannot run:"
        " dtype must be torch.float32, torch.bfloat16 or torch.int8, got torch.float16"
    ]
