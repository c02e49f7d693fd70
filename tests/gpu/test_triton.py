"""The Triton backend without a kernel running: who can run it, what it packs, what it plans.

Its numerics are test_parity.py and test_tiles.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from threading import Barrier, Thread
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import random_weights, small_network
from hypothesis import given, strategies as st
from layouts import SMALL

from fastscnn_fast import FusedFastSCNN, cli, fuse, ops
from fastscnn_fast.arch.config import Config, preset
from fastscnn_fast.backends import registry
from fastscnn_fast.lower.fold import fold
from fastscnn_fast.lower.pack import TAG
from fastscnn_fast.program import arithmetic
from fastscnn_fast.program.layers import Layer
from fastscnn_fast.program.program import fast_scnn

if TYPE_CHECKING or find_spec("triton") is not None:
    from targets import PoisonedBound

    from fastscnn_fast.backends.gpu import arena, choices, runner, tune
    from fastscnn_fast.backends.gpu.plan import (
        EXTERNAL,
        Plan,
        network_plan as plan_of_network,
    )
    from fastscnn_fast.kernels import launch
    from fastscnn_fast.program import memory
    from fastscnn_fast.program.memory import COUNTERS, PARTIALS

installed = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
built = pytest.mark.skipif(not registry.isas(), reason="the C++ extension is not built")
HALF = (torch.float16, torch.bfloat16)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
LAYER = Layer("dsconv", "", 16, 32)


# ---------------------------------------------------------------- who can run it


def why_not(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> str | None:
    return registry.BACKENDS["triton"].why_not(Config(), device, dtype)


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("FASTSCNN_BACKEND", raising=False)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    assert why_not() == why_not(GPU) == "the package triton is not installed"
    with pytest.raises(registry.CannotRun, match="triton cannot run: the package triton is not"):
        fuse(small_network(), "triton")


@installed
def test_devices_and_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "architecture", lambda device: 75)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_not() == why_not(torch.device("meta")) == "there is no GPU, torch finds none"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert why_not() == "device must be cuda, got cpu"
    assert why_not(torch.device("meta")) == "device must be cuda, got meta"
    assert why_not(GPU) is None and why_not(GPU, torch.float16) is None
    dtypes = "torch.float32, torch.bfloat16, torch.int8 or torch.float16"
    assert why_not(GPU, torch.float64) == f"dtype must be {dtypes}, got torch.float64"
    newer = "torch.bfloat16 needs a newer GPU than one of compute capability 7.5"
    assert why_not(GPU, torch.bfloat16) == newer
    assert why_not(GPU, torch.int8) == newer.replace("bfloat16", "int8")
    monkeypatch.setattr(registry, "architecture", lambda device: 70)
    newer = "torch.float32 needs a newer GPU than one of compute capability 7.0"
    assert why_not(GPU) == newer
    monkeypatch.setattr(registry, "architecture", lambda device: "gfx942")
    assert why_not(GPU, torch.bfloat16) is None
    assert why_not(GPU, torch.int8) == "torch.int8 needs a GPU of NVIDIA's, got gfx942"
    monkeypatch.setattr(registry, "architecture", lambda device: 80)
    assert why_not(GPU, torch.int8) is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not() is None


@installed
@pytest.mark.parametrize("forced", ["argument", "environment"])
def test_forced_it_says_why_not(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if forced == "environment":
        monkeypatch.setenv("FASTSCNN_BACKEND", "triton")
    with pytest.raises(
        registry.CannotRun, match="triton cannot run: (there is no GPU|device must)"
    ):
        fuse(small_network(), "auto" if forced == "environment" else "triton")


@installed
@built
def test_it_is_chosen_by_itself_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "architecture", lambda device: 80)
    monkeypatch.setattr(registry, "_cuda_module", None)  # which would be preferred
    for dtype in (torch.float32, torch.int8, *HALF):
        assert registry.choose("auto", Config(), GPU, dtype) == "triton"
    assert registry.choose("auto", Config(), GPU, torch.float64) == "reference"
    assert fuse(small_network()).backend == "cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert fuse(small_network()).backend == "cpu"


@installed
def test_info(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Which Triton, and why the backend is off; on a machine with a GPU it is on."""
    lines = []
    monkeypatch.setattr(registry, "_cuda_module", None)  # which would be preferred
    for available in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        monkeypatch.setattr(registry, "architecture", lambda device: 90)
        assert cli.main(["info"]) == 0
        lines.append(capsys.readouterr().out.splitlines())
    assert any(f"triton {version('triton')}" in line for line in lines[0])
    assert "backend triton: cannot run: there is no GPU, torch finds none" in lines[0]
    assert "backend triton: can run" in lines[1]
    half = "backend in use for torch.float16 on the GPU: triton (by counts, not times)"
    assert half in lines[1] and not any("on the GPU:" in line for line in lines[0])


@pytest.mark.parametrize(
    ("found", "dtype", "reason"),
    [
        (80, torch.float32, ""),
        ("gfx942", torch.float32, ""),
        ("interpreter", torch.float32, ""),
        (75, torch.float32, "it needs TF32, the GPU is of architecture 75"),
        ("gfx90a", torch.float32, "it needs TF32, the GPU is of architecture gfx90a"),
        (80, torch.float16, "dtype must be torch.float32, got torch.float16"),
    ],
)
def test_high_precision(
    found: Any, dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TF32 where the GPU has it; else the highest, or an error where the backend was asked for by name."""
    monkeypatch.setattr(registry, "architecture", lambda device: found)

    def choose(name: str) -> str:
        return registry.choose_precision("high", name, "triton", GPU, dtype)

    assert choose("auto") == ("highest" if reason else "high")
    if not reason:
        assert choose("triton") == "high"
        return
    with pytest.raises(registry.CannotRun, match=f"triton cannot run in precision high: {reason}"):
        choose("triton")
    monkeypatch.setenv("FASTSCNN_BACKEND", "triton")
    with pytest.raises(registry.CannotRun, match=reason):
        choose("auto")


@installed
def test_high_precision_has_a_layout_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = small_network()
    high, highest = (fuse(model, "triton", precision=p) for p in ("high", "highest"))
    assert (high.precision, highest.precision) == ("high", "highest")
    assert not torch.equal(high.weights[: TAG.size], highest.weights[: TAG.size])
    assert torch.equal(high.weights[TAG.size :], highest.weights[TAG.size :])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_says_why_it_cannot_run_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--size", "64x96"]) == 2
    assert "tune measures on a GPU: there is no GPU, torch finds none" in capsys.readouterr().err


# ---------------------------------------------------------------- packed weights


@installed
def test_weights_of_another_dtype_or_layer_or_backend() -> None:
    plain = [random_weights(LAYER)]
    packed = ops.pack([LAYER], plain, "triton", torch.float16)
    x = torch.zeros(1, 16, 5, 6)
    half = x.half()

    def run(weights: Any = packed, x: Any = half, layer: Any = LAYER) -> None:
        ops.dsconv(x, weights, layer, "triton")

    with pytest.raises(ValueError, match="weights must be packed for torch.float32, got .*16"):
        run(x=x)
    with pytest.raises(ValueError, match="weights must be packed for these layers"):
        run(layer=Layer("dsconv", "", 16, 48))
    with pytest.raises(ValueError, match="weights must be packed for these layers"):
        run(packed[:-1])
    for size in (0, 8, 64):
        with pytest.raises(ValueError, match="weights must be packed for the triton backend"):
            run(torch.zeros(size, dtype=torch.uint8))
    with pytest.raises(TypeError, match="x must be of dtype torch.float32, .*got torch.float64"):
        run(x=x.double())
    for backend in ("reference", *["cpu"] * bool(registry.isas())):
        others = ops.pack([LAYER], plain, backend)
        with pytest.raises(ValueError, match="weights must be packed for the triton backend"):
            run(others, x)
        with pytest.raises(ValueError, match=f"weights must .* the {backend} backend"):
            ops.dsconv(x, ops.pack([LAYER], plain, "triton"), LAYER, backend)


@installed
def test_what_cannot_be_packed() -> None:
    plain = [random_weights(LAYER)]
    with pytest.raises(ValueError, match="dtype must be .* for backend triton, got torch.float64"):
        ops.pack([LAYER], plain, "triton", torch.float64)
    with pytest.raises(ValueError, match="precision must be 'highest' for backend triton and .*16"):
        ops.pack([LAYER], plain, "triton", torch.float16, "high")
    with pytest.raises(ValueError, match="weights of layer 0 .*: pointwise_bias must be"):
        ops.pack([LAYER], [{**plain[0], "pointwise_bias": torch.zeros(31)}], "triton")


@installed
@pytest.mark.parametrize("output", ops.OUTPUTS)
def test_shapes_are_known_without_a_launch(output: str) -> None:
    """torch.compile and export see fake results; a launch on the cpu would be an error."""
    with torch.device("cpu"):
        fast = FusedFastSCNN(fold(small_network()), "triton", torch.float16)
    fast = fast.to("meta")
    for x in (torch.empty(2, 3, 49, 65, device="meta", dtype=t) for t in (fast.dtype, torch.uint8)):
        y = fast._run(x, output, None)
        assert y.shape == ((2, 49, 65) if output == "labels" else (2, 5, 49, 65))
        assert y.dtype == (torch.uint8 if output == "labels" else torch.float16)


@installed
def test_export() -> None:
    """A graph of one op, for a device that need not be there."""
    fast = FusedFastSCNN(fold(small_network()), "triton", torch.float32)
    exported = torch.export.export(fast, (torch.zeros(1, 3, 40, 52),))
    called = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.fastscnn.network.default]


# ---------------------------------------------------------------- plans


def network_plan(
    config: Config, shape: tuple[int, ...], dtype: torch.dtype, precision: str = "highest"
) -> Plan:
    from fastscnn_fast.lower import gpu as layout

    program = fast_scnn(config).computed_in(arithmetic.choose("triton", dtype, precision))
    pieces, _ = layout.layout(program.layers, dtype, 64)
    picture = memory.Buffer.dense("x", dtype, shape)
    out = memory.Buffer.dense("out", dtype, (shape[0], config.num_classes, *shape[2:]))
    how = runner.products(precision, 80)
    return plan_of_network(program, picture, out, pieces, dtype, 80, "logits", how)


@installed
def test_a_network_looks_up_what_tuning_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """In precision "high" too, some of whose layers are computed in float32."""
    monkeypatch.setattr(registry, "architecture", lambda device: 80)
    monkeypatch.setattr(registry, "able", lambda *_: ["triton"])
    monkeypatch.setattr(registry, "choose_precision", lambda *_: "high")
    folded, size, dtype = fold(small_network()), (32, 48), torch.float32
    how = (1, dtype, "high", CPU, lambda runs: [1.0], lambda *_: [])  # no tile: plain torch alone
    found = list(tune.tune(folded, [size], *how))
    assert not any(trial.problem for layer in found for trial in layer.trials)

    keys: list[str] = []
    monkeypatch.setattr(choices.Choices, "get", lambda self, key: keys.append(key))
    network_plan(folded.config, (1, 3, *size), dtype, "high")
    assert set(keys) <= {layer.key for layer in found}
    assert {key.rpartition(" ")[2] for key in keys} == {"ieee", "tf32"}


def lives(plan: Plan) -> Iterator[tuple[str, int, int, int, int]]:
    """Name, first and last launch, first byte and end of each scratch memory."""
    names = {b.memory for launch in plan.launches for b in launch.buffers.values()}
    for name in names - set(EXTERNAL):
        at = [
            (index, buffer)
            for index, launch in enumerate(plan.launches)
            for buffer in launch.buffers.values()
            if buffer.memory == name
        ]
        begin = plan.offsets[name]
        end = begin + max(buffer.bytes for _, buffer in at)
        first, last = (0, len(plan.launches)) if name == COUNTERS else (at[0][0], at[-1][0])
        yield name, first, last, begin, end


def assert_disjoint(plan: Plan) -> None:
    memories = list(lives(plan))
    for one in memories:
        _, first, last, begin, end = one
        assert 0 <= begin < end <= plan.bytes and begin % 512 == 0
        for other in memories:
            if one != other and first <= other[2] and other[1] <= last:
                assert end <= other[3] or other[4] <= begin, (one, other)


@installed
@given(
    launches=st.lists(
        st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5000)), min_size=1, max_size=4),
        max_size=12,
    )
)
def test_memories_in_use_at_once_do_not_overlap(launches: list[list[tuple[int, int]]]) -> None:
    """Launches of any scratch memories, each of any sizes; counters are in use always."""
    plan = Plan.of(
        [
            launch.Launch(
                None,
                (1,),
                {
                    f"{position}": memory.Buffer.dense(
                        f"memory{name}" if name else COUNTERS, torch.uint8, (size,)
                    )
                    for position, (name, size) in enumerate(buffers)
                },
                4,
                2,
            )
            for buffers in launches
        ]
    )
    assert_disjoint(plan)


@installed
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 3, 512, 1024), (3, 3, 33, 49)])
def test_a_network_reuses_its_memories(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    plan = network_plan(Config(), shape, dtype)
    assert_disjoint(plan)
    sizes = {name: end - begin for name, _, _, begin, end in lives(plan)}
    own = sizes.pop(PARTIALS, 0)  # one memory for all bottlenecks from the start
    assert plan.bytes - own < 0.7 * sum(sizes.values())


@installed
def test_64_bit_offsets_are_used_where_32_may_not_do() -> None:
    def of(*shape: int) -> memory.Buffer:
        return memory.Buffer.dense("x", torch.float16, shape)

    assert not memory.wide(of(1, 2**31 - 1))
    assert memory.wide(of(1, 2**31)) and memory.wide(of(1, 2, 2), of(1, 2**15, 2**16))
    assert not memory.wide(of(2**20, 2**15, 2**15))  # images are told apart in 64 bits
    negative = memory.Buffer("x", torch.uint8, (1, 2, 3), (6, -(2**31), 1))
    assert memory.wide(negative)


@installed
def test_offsets_of_64_bits_reach_the_kernels() -> None:
    """The stem's input is then the first that needs them."""
    huge = network_plan(preset("paper", **SMALL), (1, 3, 2**15, 2**15 - 1), torch.float16)
    assert huge.launches[0].arguments["WIDE"] is True
    plan = network_plan(preset("paper", **SMALL), (4096, 3, 512, 1024), torch.float16)
    assert not any(launch.arguments.get("WIDE", False) for launch in plan.launches)


@installed
def test_an_empty_batch_launches_nothing() -> None:
    plan = network_plan(preset("paper", **SMALL), (0, 3, 33, 49), torch.float32)
    assert plan.bytes == 0
    for one in plan.launches:
        assert 0 in one.grid
        one.run({})  # without any tensor


# ---------------------------------------------------------------- arenas


class Kernel:
    """What a launch calls, with what it must see of its arena while it runs."""

    def __init__(self, during: Any = lambda scratch: None) -> None:
        self.during = during

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda scratch, **_: self.during(scratch)


def plan_of(kernel: Kernel, size: int = 100) -> Plan:
    scratch = memory.Buffer.dense("scratch", torch.uint8, (size,))
    return Plan.of([launch.Launch(kernel, (1,), {"scratch": scratch}, 4, 2)])


def free(pool: arena.Pool) -> int:
    return sum(map(len, pool._free.values()))


def counting_plan(kernel: Any) -> Plan:
    """A step that counts, and one before and one after it that do not, of which one memory fits where another was."""
    one, other, partials = (
        memory.Buffer.dense(name, torch.uint8, (4096,)) for name in ("one", "other", "partials")
    )
    counters = memory.Buffer.dense(COUNTERS, torch.int32, (3,))
    steps = ({"x": one}, {"x": one, "y": partials, "counters": counters}, {"x": other})
    return Plan.of([launch.Launch(kernel, (1,), arguments, 4, 2) for arguments in steps])


class Counting:
    """A kernel that fills its scratch, and finds its counters at zero, counts, and leaves them as ``left``."""

    def __init__(self, left: int = 0) -> None:
        self.left, self.found = left, list[list[int]]()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.run

    def run(self, counters: torch.Tensor | None = None, **scratch: Any) -> None:
        for name in scratch.keys() & {"x", "y"}:
            scratch[name].fill_(255)
        if counters is not None:
            self.found.append(counters.tolist())
            counters.fill_(self.left)


@installed
def test_counters_are_zero_at_every_call() -> None:
    kernel, weights = Counting(), torch.zeros(0)
    plan = counting_plan(kernel)
    assert plan.counters == 512 and plan.bytes == 512 + 2 * 4096
    bound = arena.Bound(plan, CPU)
    for _ in range(3):
        bound.run({"weights": weights})
    assert kernel.found == [[0, 0, 0]] * 3
    assert not bound._counters.any() and bound._counters.numel() == plan.counters


@installed
def test_a_counter_that_is_left_is_seen() -> None:
    """By what the parity of every op runs in."""
    bound = PoisonedBound(counting_plan(Counting(left=1)), CPU)
    with pytest.raises(AssertionError, match="a kernel left a counter"):
        bound.run({"weights": torch.zeros(0)})


@installed
def test_a_captured_call_has_counters_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[arena.Bound] = []

    def bound(plan: Plan, device: torch.device, real: Any = arena.Bound) -> arena.Bound:
        made.append(real(plan, CPU))
        return made[-1]

    stream = SimpleNamespace(cuda_stream=7)
    capturing = iter((False, True, False))
    monkeypatch.setattr(arena, "Bound", bound)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: next(capturing))
    pool, kernel = arena.Pool(), Counting()
    plan, weights = counting_plan(kernel), torch.zeros(0)
    for _ in range(3):
        pool.run("key", plan, torch.device("cuda", 0), {"weights": weights})
    assert len({one._counters.data_ptr() for one in made}) == len(made) >= 2
    assert kernel.found == [[0, 0, 0]] * 3


@installed
def test_a_pool_is_bounded_and_keeps_the_most_recent() -> None:
    seen: list[int] = []
    plan = plan_of(Kernel(lambda scratch: seen.append(scratch.data_ptr())))
    pool = arena.Pool(most=3)
    for key in (0, 1, 2, 0, 3, 4):
        pool.run(key, plan, CPU, {"weights": torch.zeros(0)})
        assert free(pool) <= 3
    assert [key for key, *_ in pool._free] == [0, 3, 4]
    assert seen[0] == seen[3] and len(set(seen)) >= 3


@installed
def test_concurrent_calls_have_arenas_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls that wait for each other within their kernels; one arena each, and no more later."""
    both, seen, errors = Barrier(2, timeout=30), set(), []
    monkeypatch.setattr(arena, "_INTERPRETER", nullcontext())  # no interpreter runs here

    def during(scratch: torch.Tensor) -> None:
        seen.add(scratch.data_ptr())
        both.wait()

    pool, plan = arena.Pool(), plan_of(Kernel(during))

    def call() -> None:
        try:
            for _ in range(3):
                pool.run("key", plan, CPU, {"weights": torch.zeros(0)})
        except Exception as error:
            errors.append(error)

    threads = [Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(seen) == free(pool) == 2


@installed
def test_a_failed_call_leaves_the_pool_in_order() -> None:
    def fail(scratch: torch.Tensor) -> None:
        raise RuntimeError("a launch failed")

    pool = arena.Pool()
    with pytest.raises(RuntimeError, match="a launch failed"):
        pool.run("key", plan_of(Kernel(fail)), CPU, {"weights": torch.zeros(0)})
    pool.run("key", plan_of(Kernel()), CPU, {"weights": torch.zeros(0)})
    assert free(pool) == 1


@installed
def test_logits_of_one_pixel_are_planes_too() -> None:
    """Strides alone do not tell planes of 1x1 from pixels, and a pixel's padding would be the next image's."""
    plan = network_plan(preset("paper", **SMALL), (3, 3, 8, 8), torch.float16)
    last = [launch.arguments["LAST"] for launch in plan.launches if "LAST" in launch.arguments]
    assert last[-1] == preset("paper", **SMALL).num_classes
