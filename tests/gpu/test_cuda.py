"""The CUDA backend without a kernel running: who can run it, what is built, what it plans, and that it says why not.

Its numerics are test_parity.py and test_cuda_host.py, its machine code test_cuda_code.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import cuda_host
import pytest
import torch
from helpers import ROOT, randomise, small_network

from fastscnn_fast import FastSCNN, fuse, ops
from fastscnn_fast.arch.config import PRESETS, Config
from fastscnn_fast.backends import registry
from fastscnn_fast.backends.gpu import choices, cuda, dump, nvcc, runner, tune
from fastscnn_fast.backends.gpu.cuda import CudaStep
from fastscnn_fast.backends.gpu.torch_step import TorchStep
from fastscnn_fast.backends.gpus import MULTIPROCESSORS
from fastscnn_fast.bench import exact_logits
from fastscnn_fast.lower.fold import fold
from fastscnn_fast.program.layers import ACTIVATIONS, OPS, OUTPUTS, Layer
from fastscnn_fast.program.memory import Buffer
from fastscnn_fast.program.parity import relative_error
from fastscnn_fast.program.program import fast_scnn, layer_sizes

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
built = pytest.mark.skipif(
    registry._cuda_module is None, reason=f"fastscnn_fast._cuda: {registry._cuda_missing}"
)


def emulated(test: Any) -> Any:
    """Needs the extension that is compiled for the host."""
    why_not = cuda_host.why_not()
    return pytest.mark.emulated(pytest.mark.skipif(bool(why_not), reason=why_not)(test))


# ---------------------------------------------------------------- who can run it


def why_not(device: torch.device = GPU, dtype: torch.dtype = torch.float32) -> str | None:
    return registry.BACKENDS["cuda"].why_not(Config(), device, dtype)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An extension of machine code for 8.0 and 9.0, on an A10."""
    module = SimpleNamespace(on_host=False, architectures=[80, 90], ptx=0)
    monkeypatch.setattr(registry, "_cuda_module", module)
    monkeypatch.setattr(registry, "architecture", lambda device: 86)
    return module


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_cuda_module", None)
    monkeypatch.setattr(registry, "_cuda_missing", "the extension is not built (why)")
    assert why_not() == why_not(CPU) == "the extension is not built (why)"
    with pytest.raises(registry.CannotRun, match="cuda cannot run: the extension is not built"):
        fuse(small_network(), "cuda")
    with pytest.raises(registry.CannotRun, match=r"not built \(why\)"):
        registry.cuda_module()


def test_devices_dtypes_and_architectures(
    pretended: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert why_not() is None and why_not(dtype=torch.bfloat16) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert why_not(CPU) == "device must be cuda, got cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_not(CPU) == "there is no GPU, torch finds none"
    dtypes = "torch.float32, torch.bfloat16, torch.int8 or torch.float16"
    assert why_not(dtype=torch.float64) == f"dtype must be {dtypes}, got torch.float64"
    monkeypatch.setattr(registry, "architecture", lambda device: 120)
    needs = "fastscnn_fast._cuda must be built for sm_120, it is for sm_80, sm_90"
    assert why_not() == needs
    pretended.ptx = 90  # runs on whatever is newer
    assert why_not() is None
    monkeypatch.setattr(registry, "architecture", lambda device: 75)
    assert why_not() == "fastscnn_fast._cuda must be built for sm_75, it is for sm_80, sm_90"
    monkeypatch.setattr(registry, "architecture", lambda device: "gfx942")
    assert why_not() == "the GPU must be NVIDIA's, got gfx942"


@pytest.mark.parametrize("found", [75, 86])
def test_code_for_7_5_is_of_float16_and_int8(
    found: int, pretended: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a newer GPU too, where it would be compiled from PTX."""
    pretended.architectures, pretended.ptx = [75], 75
    monkeypatch.setattr(registry, "architecture", lambda device: found)
    assert why_not(dtype=torch.float16) is None and why_not(dtype=torch.int8) is None
    for dtype in (torch.float32, torch.bfloat16):
        needs = f"{dtype} needs code for a GPU of compute capability 8.0 or newer, got sm_75"
        assert why_not(dtype=dtype) == needs


@pytest.mark.parametrize("bins", [(1,) * 16, (1, 256)])
def test_bins_that_the_kernels_cannot_count(bins: Any, pretended: SimpleNamespace) -> None:
    reason = registry.BACKENDS["cuda"].why_not(Config(pyramid_bins=bins), GPU, torch.float32)
    assert reason == f"pyramid_bins must be at most 8, of at most 255 each, got {bins}"


def test_high_precision_is_tritons(
    pretended: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken where both can run, and the cuda backend says that it has none where that was asked for."""

    def choose(name: str, precision: str) -> str:
        return registry.choose(name, Config(), GPU, torch.float32, precision)

    if find_spec("triton") is not None:
        assert choose("auto", "highest") == "cuda" and choose("auto", "high") == "triton"
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    assert choose("auto", "high") == "cuda"
    precision = partial(registry.choose_precision, "high", device=GPU, dtype=torch.float32)
    assert precision("auto", "cuda") == "highest"
    says = "cuda cannot run in precision high: backend must be cpu or triton, got cuda"
    with pytest.raises(registry.CannotRun, match=says):
        precision("cuda", "cuda")
    with pytest.raises(ValueError, match="precision must be 'highest' for backend cuda"):
        layers = fast_scnn(Config()).layers
        ops.pack(layers, [{}] * len(layers), "cuda", torch.float32, "high")


# ---------------------------------------------------------------- the built extension


@built
def test_the_extension_knows_what_it_is_for() -> None:
    module = registry.cuda_module()
    assert not module.on_host
    assert module.architectures == sorted(set(module.architectures))
    assert all(75 <= architecture <= 129 for architecture in module.architectures)


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("follows", [False, True])
def test_a_launch_without_a_driver_says_what_cuda_says(follows: bool) -> None:
    """The extension loads, and the launch itself is refused, with CUDA's own text."""
    module = registry.cuda_module()
    arguments = module.arguments["upsample_classify"]()
    for name, value in {
        "classes": 2,
        "images": 1,
        "low_height": 1,
        "low_width": 1,
        "height": 8,
        "width": 8,
        "x": 16,
        "out": 16,
    }.items():
        setattr(arguments, name, value)
    with pytest.raises(
        RuntimeError, match=r"upsample_classify: .*(driver|device).*\(CUDA error \d+\)"
    ):
        module.upsample_classify(arguments, 0, follows)


def test_architectures_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """TORCH_CUDA_ARCH_LIST as torch reads it, names apart; what cannot be read names itself."""
    monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
    monkeypatch.chdir(ROOT)
    setup = runpy.run_path("setup.py", run_name="setup")
    assert not any("," in flag for flag in setup["definitions"]([75, 80], 80))
    assert setup["NVCC_FLAGS"] == nvcc.FLAGS
    listed = [entry.partition("+")[0].split(".") for entry in setup["ARCHITECTURES"].split()]
    assert {10 * int(major) + int(minor) for major, minor in listed} <= set(MULTIPROCESSORS)
    read = setup["architectures"]
    told = SimpleNamespace(stdout="compute_75\ncompute_80\ncompute_86\ncompute_90\n")
    nothing = SimpleNamespace(stdout="", stderr="broken")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: nothing)
    with pytest.raises(
        Exception, match="nvcc --list-gpu-arch must list architectures, got .*broken"
    ):
        read("nvcc")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: told)
    for asked, expected in {
        "8.0": ([80], 0),
        "9.0+PTX;8.0": ([80, 90], 90),
        "8.0, 8.6 8.0": ([80, 86], 0),
        None: ([75, 80, 86, 90], 90),
    }.items():
        if asked is None:
            monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        else:
            monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
        assert read("nvcc") == expected
    for wrong in ("Ampere", "7.0", "12.0", "8.0;", "80", "9.0a"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wrong)
        with pytest.raises(Exception, match=r"TORCH_CUDA_ARCH_LIST must .*, got '"):
            read("nvcc")


# ---------------------------------------------------------------- structs


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(registry, "_cuda_module", cuda_host.shared())
    yield registry.cuda_module()
    runner._network_plan.cache_clear()


def plan_of(name: str, chosen: choices.Choices = choices.NONE, backend: str = "cuda") -> Any:
    layers = fast_scnn(PRESETS[name]).layers
    picture = (torch.uint8, (2, 3, 96, 160), (3 * 96 * 160, 1, 480, 3))
    out = (torch.uint8, (2, 96, 160), (96 * 160, 160, 1))
    arguments = (ops.encode(layers), picture, out, torch.float16, "labels", 86, "highest")
    return runner._network_plan(*arguments, chosen, backend)


@emulated
@pytest.mark.parametrize("name", PRESETS)
def test_a_plan_is_a_step_a_layer_and_at_most_twenty_launches(name: str, host: Any) -> None:
    steps = plan_of(name).steps
    assert [step.op for step in steps] == [layer.op for layer in fast_scnn(PRESETS[name]).layers]
    launches = [one for step in steps for one in cuda.described(step)]
    assert len(launches) <= 20
    assert all(one.threads % 32 == 0 and one.grid[2] == 1 for one in launches)


@emulated
@pytest.mark.parametrize("name", ["tramac", "segmentron"])
def test_what_follows_what(name: str, host: Any) -> None:
    """All CUDA steps but a plan's first, and one after another backend's; all launches of a call but its first."""
    steps = plan_of(name).steps
    assert [step.follows for step in steps] == [False] + [True] * (len(steps) - 1)

    class Mixed(choices.Choices):
        def get(self, key: str) -> choices.Choice:
            return choices.TORCH if key.startswith("feature_fusion") else choices.CUDA

    at = [step.op for step in steps].index("feature_fusion")
    mixed = plan_of(name, Mixed({})).steps
    assert isinstance(mixed[at], TorchStep) and not mixed[at + 1].follows
    assert all(step.follows for step in (*mixed[1:at], *mixed[at + 2 :]))
    several = {step.op: host.describe(valid(step)) for step in steps}
    for launches in several.values():
        assert [one.follows for one in launches] == [False] + [True] * (len(launches) - 1)
    assert len(several["pyramid_pooling"]) == 3
    assert len(several["feature_fusion"]) == (2 if name == "segmentron" else 1)


@emulated
@pytest.mark.parametrize("name", PRESETS)
def test_scratch_is_as_large_as_the_header_says(name: str, host: Any) -> None:
    (step,) = (step for step in plan_of(name).steps if step.op == "pyramid_pooling")
    scratch = [step.arguments[field].bytes for field in ("sums", "shares")]
    assert tuple(scratch) == host.pyramid_pooling_scratch(step.struct())


@emulated
@pytest.mark.parametrize("name", PRESETS)
def test_bottlenecks_share_their_scratch_in_turn(name: str, host: Any) -> None:
    """Partial sums and counters of as many bytes as the C interface says, of those alone that are cut."""
    plan = plan_of(name)
    steps = [step for step in plan.steps if step.op == "inverted_residual"]
    assert all(step.sizes["slices"] > 1 for step in steps)  # few tiles at 96 x 160
    for step in steps:
        scratch = [step.arguments[field].bytes for field in ("partials", "counters")]
        assert tuple(scratch) == host.inverted_residual_scratch(step.struct())
    whole = dataclasses.replace(steps[0], sizes={**steps[0].sizes, "slices": 1})
    assert host.inverted_residual_scratch(whole.struct()) == (0, 0)
    assert plan.counters >= max(step.arguments["counters"].bytes for step in steps)


@emulated
def test_work_is_cut_to_fill_the_multiprocessors(host: Any) -> None:
    """By the fewest instructions of the busiest: most of an H100's 132 have a block, none has two."""
    layers = layer_sizes(PRESETS["paper"], 512, 1024)
    for one in (one for one in layers if one.layer.op == "inverted_residual"):
        (made,) = dump.launches(one, torch.float16, 90, backend="cuda").steps
        (launch,) = cuda.described(made)
        assert 96 <= launch.grid[0] * launch.grid[1] <= 132
        arguments = made.struct()
        assert host.inverted_residual_slices(arguments, 132) == launch.grid[1]
        # An Orin has work enough, and so has a batch; no image is no work.
        assert host.inverted_residual_slices(arguments, 16) <= 2
        for images in (0, 64):
            arguments.images = images
            assert host.inverted_residual_slices(arguments, 132) == 1
        arguments.stride = 3  # which the op refuses, and says so
        assert host.inverted_residual_slices(arguments, 132) == 0
        assert host.inverted_residual_scratch(arguments) == (0, 0)


@emulated
def test_both_backends_follow_what_tuning_chose(host: Any) -> None:
    layers = fast_scnn(PRESETS["paper"]).layers
    every = {step.op: step for step in plan_of("paper").steps}
    assert set(every) == set(OPS)
    fastest = choices.Choices(dict.fromkeys(keys_of("paper"), choices.TORCH))
    assert all(isinstance(step, TorchStep) for step in plan_of("paper", fastest).steps)
    ours = choices.Choices(dict.fromkeys(keys_of("paper"), choices.CUDA))
    for backend in ("cuda", "triton"):
        steps = plan_of("paper", ours, backend).steps
        assert len(steps) == len(layers)
        assert all(isinstance(step, CudaStep) for step in steps)


def keys_of(name: str) -> list[str]:
    """Of every layer, by which choices are known."""
    seen: list[str] = []

    class Spy(choices.Choices):
        def get(self, key: str) -> None:
            seen.append(key)

    plan_of(name, Spy({}))
    return seen


@emulated
def test_weights_of_both_backends_are_the_same_bytes(host: Any) -> None:
    folded = fold(small_network())
    packed = [ops.pack(folded.layers, folded.tensors, name) for name in ("cuda", "triton")]
    assert torch.equal(*packed)


@emulated
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_no_triton_is_needed() -> None:
    """With the package triton out of reach the kernels of this backend are planned and run."""
    code = (
        "import sys; sys.modules['triton'] = None; sys.path.insert(0, 'tests/support');"
        "import torch, cuda_host; from fastscnn_fast import fuse; from fastscnn_fast.backends import registry;"
        "from helpers import small_network;"
        "registry._cuda_module = cuda_host.shared(); x = torch.randn(1, 3, 32, 32);"
        "y = fuse(small_network(), 'cuda', cuda_graph='off')(x); assert y.isfinite().all()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@emulated
def test_bad_arguments_are_named(host: Any) -> None:
    arguments = host.arguments["dsconv"]()
    with pytest.raises(ValueError, match="dsconv: in_channels must be at least 1, got 0"):
        host.dsconv(arguments, 0)
    with pytest.raises(ValueError, match="bins must be at most 8, got 9"):
        host.arguments["pyramid_pooling"]().bins = list(range(9))


def steps_of_all_kinds() -> dict[str, CudaStep]:
    """Of two pictures: each op, dsconv with the last 1x1, and the dense fusion."""
    found: dict[str, CudaStep] = {}
    for name in ("paper", "segmentron"):
        for step in plan_of(name).steps:
            kind = " last" * bool(step.sizes.get("last_channels"))
            kind += " dense" * bool(step.sizes.get("dense"))
            found.setdefault(step.op + kind, step)
    return found


def valid(step: CudaStep) -> Any:
    arguments = step.struct()
    for name in step.arguments:
        setattr(arguments, name, 16)
    return arguments


PLANE = [("pixel", 8, "at least"), ("pixel", 1001, "a multiple of 8"), ("pixel", 2**31, "at most")]
SIDES = [("height", 0, "at least 1"), ("out_width", 7, " for these sizes")]
CHANNELS = [("channels", 0, "at least 1"), ("channels", 2**20 + 1, "at most 1048576")]
#: By kind of step: its planes, its channels, and fields that then break a rule, and what is said.
RULES: dict[str, tuple[list[str], list[str], list[tuple[str, Any, str]]]] = {
    "stem_conv": (
        ["out"],
        ["", "out_"],
        [*SIDES, ("padding", -1, "at least 0"), ("stride", 0, "at least 1"), ("x_type", 0, "type or uint8"), ("channels", 5, "at most 4")],
    ),
    "dsconv": (
        ["x", "out"],
        ["in_", "out_"],
        [*SIDES, ("dilation", 0, "at least 1"), ("stride", 0, "at least 1"), ("mid_activation", 3, "none, relu"), ("out_type", 0, "type, or float32")],
    ),
    "dsconv last": (
        ["x"],
        ["in_", "out_"],
        [*SIDES, ("last_channels", -1, "at least 1"), ("out_pixel", 0, "at least 1"), ("out_channel", 2, "at least 12 x 20 x 1"), ("out_image", 4, "at least 19 x 1 x"), ("out_type", 1, "type, or float32")],
    ),
    "inverted_residual": (
        ["x", "out"],
        ["in_", "mid_", "out_"],
        [*SIDES, ("stride", 3, "1 or 2"), ("residual", 1, "1 with residual"), ("slices", 0, "at least 1")],
    ),
    "pyramid_pooling": (
        ["x", "out"],
        ["in_", "mid_", "out_"],
        [("kernel", 2, "1 or 3"), ("width", 2**21 + 1, "2^21"), ("height", 0, "2^21"), ("bins", [256], "255"), ("branches", 9, "at most 8")],
    ),
    "feature_fusion": (
        ["high", "low", "out"],
        ["high_", "low_", "out_"],
        [("low_height", 0, "at least 1"), ("width", 0, "at least 1"), ("dilation", 0, "at least 1")],
    ),
    "feature_fusion dense": (["low"], [], []),
    "upsample_classify": (
        [],
        [],
        [("classes", 257, "at most 256"), ("classes", 0, "at least 1"), ("low_width", 0, "at least 1"), ("height", 0, "at least 1"), ("output", 3, "logits, probabilities or labels")],
    ),
}  # fmt: skip


def test_numbers_are_those_of_the_header() -> None:
    header = (ROOT / "csrc" / "cuda" / "fastscnn_cuda.h").read_text()
    enums = [
        [name.lower() for name in re.findall(r"FASTSCNN_(\w+)", body)]
        for body in re.findall(r"enum \{(.*?)\}", header, re.DOTALL)
    ]
    types = [str(dtype).removeprefix("torch.") for dtype in cuda._TYPES]
    assert [types, list(ACTIVATIONS), list(OUTPUTS)] == enums[:3]


@emulated
@pytest.mark.parametrize("kind", RULES)
def test_steps_fill_every_field_that_the_header_has(kind: str, host: Any) -> None:
    """By name, and nothing else but what a layer has and the op does not need."""
    header = (ROOT / "csrc" / "cuda" / "fastscnn_cuda.h").read_text()
    step = steps_of_all_kinds()[kind]
    (listed,) = re.findall(rf"FASTSCNN_FIELDS_{step.op}\(F\)((?:.*\\\n)+.*)\n", header)
    fields = {name: type_ for type_, name in re.findall(r"F\((\w+), (\w+)\)", listed)}
    struct = step.struct()
    assert set(fields) | {"sizes"} == {name for name in dir(struct) if not name.startswith("_")}
    sizes = {name for name, type_ in fields.items() if "put" not in type_}
    assert tuple(name for name in fields if name in sizes) == struct.sizes
    assert sizes <= set(step.sizes) and set(step.arguments) <= set(fields) - sizes
    assert set(step.sizes) - sizes <= {field.name for field in dataclasses.fields(Layer)}
    unset = dataclasses.replace(step, sizes={})
    with pytest.raises(KeyError, match="type"):
        unset.struct()


def rules() -> Iterator[Any]:
    for kind, (planes, channels, own) in RULES.items():
        broken = [("type", 3, "float32, bfloat16 or float16"), ("images", -1, "at least 0"), *own]
        broken.append(("images", 2**40, "2^31 - 1 blocks"))
        broken += [(f"{name}_{part}", *rule) for name in planes for part, *rule in PLANE]
        broken += [(f"{name}_image", 1001, "a multiple of 8") for name in planes]
        broken += [(f"{name}{part}", *rule) for name in channels for part, *rule in CHANNELS]
        broken += [("out_image", 0, "at least ")] * ("out" in planes)
        broken += [("activation", 3, "none, relu")] * (kind != "upsample_classify")
        for field, value, says in broken:
            yield pytest.param(kind, field, value, says, id=f"{kind}-{field}-{value}")


@emulated
@pytest.mark.parametrize(("kind", "field", "value", "says"), list(rules()))
def test_arguments_that_break_a_rule_are_refused(
    kind: str, field: str, value: Any, says: str, host: Any
) -> None:
    """By whoever calls the C interface; the value is named."""
    arguments = valid(steps_of_all_kinds()[kind])
    assert host.describe(arguments)
    setattr(arguments, field, value)
    with pytest.raises(ValueError) as caught:
        host.describe(arguments)
    assert says in str(caught.value), caught.value
    got = value[0] if isinstance(value, list) else value
    if value != 2**40 and field != "residual":  # those are told of what follows from them
        assert str(caught.value).endswith(f"got {got}"), caught.value


#: Bytes to which an address must be aligned, where those are not 16.
ALIGNMENTS = {
    "stem_conv": {"x": 1, "scale": 4, "shift": 4},
    "dsconv last": {"out": 4},
    "upsample_classify": {"x": 4, "out": 1},
}


@emulated
@pytest.mark.parametrize("kind", RULES)
def test_addresses_are_checked(kind: str, host: Any) -> None:
    step = steps_of_all_kinds()[kind]
    for name in step.arguments:
        alignment = ALIGNMENTS.get(kind, {}).get(name, 16)
        wrong = {0: f"{name} must be an address, got 0"}
        if alignment > 1:
            wrong[16 + alignment // 2] = f"{name} must be aligned to {alignment} bytes, got"
        for address, says in wrong.items():
            arguments = valid(step)
            setattr(arguments, name, address)
            with pytest.raises(ValueError, match=says):
                host.describe(arguments)
    nothing = step.struct()  # addresses are null
    nothing.images = 0
    getattr(host, step.op)(nothing, 0)


@emulated
@pytest.mark.parametrize("size", [(2, 2), (1, 5), (2, 7)])
def test_a_picture_smaller_than_its_unpadded_convolution_is_refused(size: Any, host: Any) -> None:
    arguments = valid(steps_of_all_kinds()["stem_conv"])
    arguments.padding = arguments.out_height = arguments.out_width = 0
    arguments.height, arguments.width = size
    with pytest.raises(ValueError, match=f"height must be at least 3, got {size[0]}"):
        host.describe(arguments)


def test_a_buffer_moves_once() -> None:
    buffer = Buffer.dense("x", torch.float16, (1, 4, 4, 16))
    step = CudaStep("dsconv", {}, {"x": buffer, "out": buffer})
    assert step.bytes == 512


def unsliced(layer: tune.Found) -> list[choices.Choice]:
    choice = [trial.choice for trial in layer.trials]
    return [one for one in choice if not isinstance(one, choices.Sliced)]


@emulated
def test_tuning_tries_the_kernels_and_checks_them(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Triton: every layer's candidate passes parity, and wins where it is the fastest."""
    monkeypatch.setattr(tune, "_SLICES", (2,))

    def no_tiles(*_: Any) -> NoReturn:
        raise AssertionError("Triton cannot run")

    def clock(runs: Any) -> list[float]:
        for run in runs:
            run()
        return [next(times)]

    times = itertools.count()  # the first is the fastest
    sizes = [(32, 48)]
    found = list(
        tune.tune(fold(small_network()), sizes, 1, torch.float16, "highest", CPU, clock, no_tiles)
    )
    assert len(found) >= len(OPS)
    for layer in found:
        assert unsliced(layer) == [choices.CUDA, choices.TORCH]
        assert not any(trial.problem for trial in layer.trials), layer.name
        assert layer.best is not None and layer.best.choice == choices.CUDA


@emulated
def test_tuning_chooses_other_slices(
    host: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each cut of the expanded channels is tried once, in scratch of its own size; what was fastest is kept and followed."""
    monkeypatch.setenv(choices.VARIABLE, str(tmp_path / "tune.json"))

    def clock(runs: Any) -> list[float]:
        """Two slices are the fastest, and the more the slower."""
        (step,) = runs[0].args[1].steps
        if step.buffers.get("partials") is None:
            return [20.0]
        scratch = [step.arguments[name].bytes for name in ("partials", "counters")]
        assert tuple(scratch) == host.inverted_residual_scratch(step.struct())
        return [float(step.sizes["slices"])]

    model = randomise(FastSCNN()).eval()
    layers = tune.tune(fold(model), [(32, 48)], 1, torch.float32, "highest", CPU, clock)
    found = next(layer for layer in layers if layer.name == "bottleneck1.0")
    sliced = [choices.Sliced(n) for n in (1, 2, 3, 4, 6)]  # untuned it has 12
    tried = [choices.CUDA, *sliced, choices.TORCH]
    assert [trial.choice for trial in found.trials] == tried
    assert not any(trial.problem for trial in found.trials)
    assert found.best is not None and found.best.choice == choices.Sliced(2)
    choices.save({found.key: found.best.choice}, CPU)
    assert choices.load(CPU).by_layer == {found.key: choices.Sliced(2)}

    plans: list[Any] = []
    made = runner.network_plan
    monkeypatch.setattr(runner, "network_plan", lambda *a: plans.append(made(*a)) or plans[-1])
    x = torch.randn(1, 3, 32, 48)
    with torch.inference_mode():
        y = fuse(model, "cuda", cuda_graph="off")(x)
        assert relative_error(y, exact_logits(model, x)) < 1e-5
    (plan,) = plans
    slices = [step.sizes["slices"] for step in plan.steps if step.op == "inverted_residual"]
    assert slices[:2] == [2, 12]


@emulated
def test_tuning_in_high_precision_runs_what_a_call_would(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Triton there is no TF32, and "highest" with a logged reason."""
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    arguments = (fold(small_network()), [(32, 48)], 1, torch.float32, "high", CPU)
    found = list(tune.tune(*arguments, lambda runs: [1.0 for run in runs]))
    for layer in found:
        assert unsliced(layer) == [choices.CUDA, choices.TORCH]
        assert not any(trial.problem for trial in layer.trials), layer.trials


def test_tuning_needs_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_cuda_module", None)
    says = "no GPU backend can run: cuda: .*; triton: "
    with pytest.raises(registry.CannotRun, match=says):
        list(tune.tune(fold(small_network()), [(32, 48)], 1, torch.float64, "highest", CPU))


def test_choices_are_of_the_extension_as_built(
    pretended: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where another one is there, or none, "cuda" is not chosen for a layer any more, and nothing fails."""
    monkeypatch.setenv(choices.VARIABLE, str(tmp_path / "tune.json"))
    monkeypatch.setattr(choices, "architecture", lambda device: 86)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A10")
    choices.save({"layer": choices.CUDA}, GPU)
    assert choices.load(GPU).get("layer") == choices.CUDA
    for module in (SimpleNamespace(architectures=[90], ptx=90), None):
        monkeypatch.setattr(registry, "_cuda_module", module)
        choices._load.cache_clear()
        assert choices.load(GPU).get("layer") is None
    assert choices.environment(GPU).endswith("| cuda none")
