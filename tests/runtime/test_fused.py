"""FusedFastSCNN as a module: what it takes, what it refuses, what it keeps, and what it allocates."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    LAYOUTS,
    Kernels,
    assert_labels,
    err,
    in_layout,
    lifelike,
    noise,
    small_network,
    threads,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastscnn_fast import FastSCNN, FusedFastSCNN, fuse, ops
from fastscnn_fast.arch.config import PRESETS, Config
from fastscnn_fast.backends import registry
from fastscnn_fast.lower.fold import fold
from fastscnn_fast.ops import flops

FLOPS = FlopCounterMode.__module__
pytestmark = pytest.mark.skipif(not registry.isas(), reason="the C++ extension is not built")

OUTPUTS = ("forward", "probabilities", "labels")


@pytest.fixture(scope="module")
def model() -> FastSCNN:
    return small_network()


@pytest.fixture(scope="module")
def fast(model: FastSCNN) -> FusedFastSCNN:
    return fuse(model)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 64, 80)


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def assert_all_equal(fast: FusedFastSCNN, other: FusedFastSCNN, x: Tensor) -> None:
    for output in OUTPUTS:
        assert torch.equal(getattr(fast, output)(x), getattr(other, output)(x))


# ---------------------------------------------------------------- what it computes


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_three_results(backend, model, x):
    fast = fuse(model, backend)
    with torch.no_grad():
        expected = copy.deepcopy(model).double().reference(x.double())
    logits, probabilities, labels = (getattr(fast, output)(x) for output in OUTPUTS)
    assert (logits.dtype, logits.shape, logits.is_contiguous()) == (
        torch.float32,
        expected.shape,
        True,
    )
    assert err(logits, expected) < 1e-5
    # A probability follows by at most half of what two logits move apart.
    moved = (logits - expected).abs().max().item()
    assert (probabilities - expected.softmax(1)).abs().max() <= moved + 1e-6
    assert torch.allclose(probabilities.sum(1), torch.ones(2, 64, 80))
    assert labels.shape == (2, 64, 80)
    assert_labels(labels, expected, 1e-5 * expected.abs().max().item())
    assert not logits.requires_grad and fast.backend == backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_one_class_is_the_sigmoids(backend, dtype, no_grad):
    model = lifelike(Config(num_classes=1)).to(dtype)
    fast, x = fuse(model, backend), noise(2, 3, 65, 81).to(dtype)
    logits, probabilities, labels = (getattr(fast, output)(x) for output in OUTPUTS)
    assert logits.shape == probabilities.shape == (2, 1, 65, 81)
    close = torch.finfo(dtype).eps * max(4, logits.abs().max().item())
    torch.testing.assert_close(probabilities, logits.sigmoid(), atol=close, rtol=close)
    assert (labels.shape, labels.dtype) == ((2, 65, 81), torch.uint8)
    assert_labels(labels, logits.double(), close)
    assert 0.02 < labels.double().mean() < 0.98
    for output, eager in zip(OUTPUTS, (logits, probabilities, labels)):
        run = torch.compile(getattr(fast, output), fullgraph=True, backend="aot_eager")
        assert torch.equal(run(x), eager)
        out = torch.empty_like(eager)
        assert getattr(fast, output)(x, out=out) is out and torch.equal(out, eager)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("raw", [False, True])
def test_any_strides_are_the_same_picture(layout, raw, fast, x):
    x = torch.randint(256, x.shape, dtype=torch.uint8) if raw else x
    view = in_layout(x, layout)
    assert_all_equal(fast, fast, view)
    for output in OUTPUTS:
        run = getattr(fast, output)
        assert torch.equal(run(view), run(view.contiguous()))


@pytest.mark.parametrize("preset", PRESETS)
def test_raw_pixels_are_normalised_floats(preset):
    model = small_network(preset=preset, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    fast = fuse(model)
    raw = torch.randint(256, (1, 3, 70, 45), dtype=torch.uint8)
    mean, std = (
        torch.tensor(v).double()[:, None, None] for v in (model.config.mean, model.config.std)
    )
    x = (raw.double() / 255 - mean) / std
    with torch.no_grad():
        expected = copy.deepcopy(model).double().reference(x)
    assert err(fast(raw), expected) < 1e-5
    assert err(fast(x.float()), expected) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        (torch.float64, "reference"),
        (torch.bfloat16, "cpu"),
        (torch.bfloat16, "reference"),
        (torch.float16, "reference"),
    ],
)
def test_other_dtypes(dtype, backend, x, no_grad):
    raw = torch.randint(256, x.shape, dtype=torch.uint8)
    errors = []
    for _ in range(8):  # one small network may be lucky in what it rounds
        other = small_network().to(dtype)
        fast = fuse(other, backend)
        assert (fast.backend, fast.dtype) == (backend, dtype)
        exact = copy.deepcopy(other).double()
        for picture, picture64 in ((x.to(dtype), x.to(dtype).double()), (raw, raw)):
            y, own, expected = fast(picture), other.reference(picture), exact.reference(picture64)
            assert y.dtype == fast.probabilities(picture).dtype == dtype
            errors.append((err(y, expected), err(own, expected)))
    ours, torchs = (sum(e * e for e in each) ** 0.5 for each in zip(*errors))
    assert ours <= max(1.5 * torchs, 1e-12)
    assert fast.labels(raw).dtype == torch.uint8
    down = fuse(other, dtype=torch.float32)
    assert (down.backend, down.dtype) == ("cpu", torch.float32)
    assert err(down(x), copy.deepcopy(other).double().reference(x.double())) < 1e-5


def test_empty_batches(fast, x):
    assert [getattr(fast, output)(x[:0]).shape for output in OUTPUTS] == [
        (0, 5, 64, 80),
        (0, 5, 64, 80),
        (0, 64, 80),
    ]


def test_lazily_negated_conjugated_and_zero_tensors(fast, x):
    z = torch.complex(x, x)
    assert torch.equal(fast(torch._neg_view(-x)), fast(x))
    assert torch.equal(fast(z.conj().imag), fast(-x))
    zeros = torch._efficientzerotensor(x.shape)
    assert torch.equal(fast(zeros), fast(torch.zeros_like(x)))


# ---------------------------------------------------------------- into the caller's memory


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_out_is_filled_and_returned(backend, dtype, output, raw, model, x):
    run = getattr(fuse(model, backend, dtype), output)
    x = torch.randint(256, x.shape, dtype=torch.uint8) if raw else x.to(dtype)
    expected = run(x)
    memory = torch.full((4, *expected.shape[1:]), 255, dtype=torch.uint8).to(expected.dtype)
    out = memory[1:3]
    version = out._version
    assert run(x, out=out) is out
    assert torch.equal(out, expected) and out._version > version
    assert (memory[::3] == 255).all()
    with torch.inference_mode():
        assert torch.equal(run(x, torch.empty_like(expected)), expected)
    assert run(x[:0], out=out[:0]).shape == (0, *expected.shape[1:])


UNFIT: dict[str, tuple[type[Exception], str, Callable[[Tensor], Tensor]]] = {
    "dtype": (TypeError, "out must be of dtype torch.*, got torch.int32", Tensor.int),
    "batch": (ValueError, r"out must be of shape \(2, .*, got \(1, ", lambda y: y[:1]),
    "dimensions": (ValueError, r"out must be of shape \(2, .*, got \(1, 2, ", lambda y: y[None]),
    "size": (ValueError, r"out must be of shape .* 80\), got .* 79\)", lambda y: y[..., 1:]),
    "device": (ValueError, "out must be on cpu, got meta", lambda y: y.to("meta")),
    "strides": (
        ValueError,
        r"out must be contiguous, got strides \(",
        lambda y: y.new_ones((*y.shape, 2))[..., 0],
    ),
    "transposed": (
        ValueError,
        r"out must be contiguous, got strides \(",
        lambda y: y.mT.contiguous().mT,
    ),
    "sparse": (ValueError, "out must be contiguous, got torch.sparse", Tensor.to_sparse),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("unfit", UNFIT)
def test_out_that_does_not_fit_is_a_clear_error(unfit, output, backend, model, x):
    error, message, spoil = UNFIT[unfit]
    run = getattr(fuse(model, backend), output)
    out = spoil(torch.ones_like(run(x)))
    with pytest.raises(error, match=message):
        run(x, out=out)
    assert out.is_meta or (out.to_dense() == 1).all()


def test_wrong_input_is_an_error_with_out_too(fast, x):
    out = fast(x)
    for name, (error, message, spoil) in REFUSED.items():
        with pytest.raises(error, match=f"{message}|out must be of shape"):
            pytest.fail(f"{name}: {fast(spoil(x.detach().clone()), out=out)}")


def test_out_has_no_gradient_either(fast, x):
    out, leaf = fast(x), x.clone().requires_grad_()
    arguments = (fast.weights, fast.program, "logits", "cpu", torch.float32)
    for picture, into in ((leaf, out), (x, out.clone().requires_grad_())):
        with pytest.raises(RuntimeError, match="no gradient"):
            ops.network(picture, *arguments, into)
        with torch.no_grad():
            assert torch.equal(ops.network(picture, *arguments, into), fast(x))
    saved = (torch.ones_like(out, requires_grad=True) * out).sum()
    fast(x, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_out_compiles_whole(backend, output, model, x):
    run = getattr(fuse(model, backend), output)

    def doubled(x: Tensor, out: Tensor) -> Tensor:
        return run(x, out=out) * 2

    torch.compiler.reset()  # there is a limit to what one function may be compiled for
    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    for shape in ((2, 3, 64, 80), (1, 3, 65, 97)):
        x = torch.randn(shape)
        expected = run(x)
        out = torch.zeros_like(expected)
        assert torch.equal(compiled(x, out), expected * 2) and torch.equal(out, expected)
    with pytest.raises(Exception, match="out must be"):
        compiled(x, out[..., 1:])


# ---------------------------------------------------------------- by the dispatcher or straight


class Seen(TorchDispatchMode):
    """Notes the ops, and runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    """Notes what is called, and calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_must_see_every_op_sees_it(fast, x):
    """A plain call goes past the dispatcher: it takes a tenth of the time of a small picture."""
    expected = fast(x)
    for mode in (Seen(), SeenFunctions()):
        with mode as seen:
            assert torch.equal(fast(x), expected)
            assert torch.equal(fast(x, out=torch.empty_like(expected)), expected)
        assert [op for op in seen.ops if "fastscnn" in op] == [
            "fastscnn.network.default",
            "fastscnn.network.out",
        ]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fast(x)
    assert "fastscnn::network" in {event.name for event in profile.events()}
    assert "fastscnn::network" in str(torch.jit.trace(fast, x, check_trace=False).inlined_graph)
    assert "fastscnn.network" in str(make_fx(fast)(x).graph)
    assert type(fast(x.as_subclass(Subclass))) is Subclass


class Subclass(Tensor):
    pass


def test_out_without_memory_of_its_own_values_is_an_error(fast, x):
    y = fast(x)
    for out in (torch._neg_view(y), torch._efficientzerotensor(y.shape)):
        with pytest.raises(RuntimeError):
            fast(x, out=out)


# ---------------------------------------------------------------- extreme numbers


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_pixels_spoil_what_they_spoil_in_plain_torch(preset, value, best_isa, no_grad):
    """Means over the whole picture spread one such pixel over its image, but not over its neighbours."""
    model = small_network(preset=preset)
    fast = fuse(model)
    for height, width, row, column in (
        (49, 66, 0, 0),
        (48, 64, -1, -1),
        (48, 64, 20, 30),
        (51, 40, 0, 17),
    ):
        x = torch.randn(3, 3, height, width)
        clean = fast(x)
        x[1, 2, row, column] = value
        y, expected = fast(x), model.reference(x)
        assert torch.equal(y.isfinite(), expected.isfinite())
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y[::2], clean[::2])
        if (
            expected[1].isfinite().all()
        ):  # stem_padding 0 never looks at the last row of an even size
            assert (model.config.stem_padding, row) == (0, -1) and torch.equal(y, clean)
        else:
            assert not expected[1].isfinite().any()
            assert fast.probabilities(x)[1].isnan().all()
        assert torch.equal(fast.labels(x), y.argmax(1).to(torch.uint8))
        assert torch.equal(fast(x[::2]), clean[::2])  # nothing lingers in scratch memory


@pytest.mark.parametrize("magnitude", [1e-42, 1e-30, 1e10, 1e30, 3e38])
def test_extreme_magnitudes(magnitude, model, fast, x, best_isa, no_grad):
    """Where plain torch overflows so do we, though not at the very same pixels."""
    x = x.clamp(-1, 1) * magnitude
    y, own = fast(x), model.reference(x)
    expected = copy.deepcopy(model).double().reference(x.double())
    if own.isfinite().all():
        assert err(y, expected) <= max(2 * err(own, expected), 1e-5)
        assert_labels(fast.labels(x), expected, 1e-5 * expected.abs().max().item())
    else:
        assert expected.abs().max() > 1e36
        right = (y - expected).abs() <= 1e-4 * expected.abs().max()
        assert (right | ~y.isfinite()).all()


def test_denormal_arithmetic_is_left_as_it_was(fast, x):
    """Kernels flush denormals on each of their threads, and restore what was set."""
    tiny = torch.full((200_000,), 1e-40)
    for count in (1, 2):
        with threads(count):
            for run in (fast, fast.labels):
                run(x)
                run(x[:1])
                assert (tiny * 0.5).gt(0).all() and tiny[0].item() * 0.5 > 0
    assert (tiny.numpy() * tiny.numpy().dtype.type(0.5) > 0).all()
    torch.set_flush_denormal(True)
    try:
        fast(x)
        assert (tiny[:10] * 0.5).eq(0).all()
    finally:
        torch.set_flush_denormal(False)


# ---------------------------------------------------------------- what it refuses


REFUSED: dict[str, tuple[type[Exception], str, Callable[[Tensor], Tensor]]] = {
    "three dimensions": (
        ValueError,
        r"x must be \(N, 3, H, W\), got shape \(3, 64, 80\)",
        lambda x: x[0],
    ),
    "five dimensions": (ValueError, r"x must be \(N, 3, H, W\)", lambda x: x[None]),
    "four channels": (
        ValueError,
        r"got shape \(2, 4, 64, 80\)",
        lambda x: torch.cat([x, x], 1)[:, :4],
    ),
    "channels last": (ValueError, r"got shape \(2, 64, 80, 3\)", lambda x: x.permute(0, 2, 3, 1)),
    "no rows": (ValueError, "at least 1x1, got 0x80", lambda x: x[:, :, :0]),
    "no columns": (ValueError, "at least 1x1, got 64x0", lambda x: x[..., :0]),
    "double": (TypeError, "torch.float32 or torch.uint8, got torch.float64", Tensor.double),
    "half": (TypeError, "got torch.float16", Tensor.half),
    "bfloat16": (TypeError, "got torch.bfloat16", Tensor.bfloat16),
    "int": (TypeError, "got torch.int32", Tensor.int),
    "bool": (TypeError, "got torch.bool", Tensor.bool),
    "complex": (TypeError, "got torch.complex64", lambda x: x.to(torch.complex64)),
    "sparse": (ValueError, "dense tensor, got torch.sparse_coo", Tensor.to_sparse),
    "mkldnn": (ValueError, "dense tensor, got torch._mkldnn", Tensor.to_mkldnn),
    "meta": (ValueError, "x must be on cpu, got meta", lambda x: x.to("meta")),
    "grad": (RuntimeError, "x must not require grad", lambda x: x.requires_grad_()),
    "graph": (RuntimeError, "x must not require grad", lambda x: x.requires_grad_() * 2),
}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("wrong", REFUSED)
def test_wrong_input_is_a_clear_error(wrong, output, fast, x):
    error, message, spoil = REFUSED[wrong]
    with pytest.raises(error, match=message):
        getattr(fast, output)(spoil(x))


def test_the_reference_backend_refuses_the_same(model, x):
    fast = fuse(model, "reference")
    for name, (error, message, spoil) in REFUSED.items():
        if name in ("no rows", "no columns"):  # torch's own words
            error, message = RuntimeError, "actual input size"
        with pytest.raises(error, match=message):
            fast(spoil(x.detach().clone()))


def test_smallest_pictures(x):
    fast = fuse(small_network(stem_padding=0))
    assert fast(x[..., :3, :3]).isfinite().all()
    with pytest.raises(ValueError, match="at least 3x3, got 3x2"):
        fast(x[..., :3, :2])


def test_gradients_are_refused_or_absent_but_never_zero(fast, model, x):
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(fast(leaf), fast(x))
    with pytest.raises(RuntimeError, match="no gradient"):
        ops.network(leaf, fast.weights, fast.program).sum().backward()
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            with pytest.raises(RuntimeError, match="tangent"):
                torch.func.jvp(fast, (x,), (x,))
            with forward_ad.dual_level():
                assert torch.equal(fast(x), fast(x))
                with pytest.raises(RuntimeError, match="tangent"):
                    fast.labels(forward_ad.make_dual(x, x))
    with pytest.raises(RuntimeError, match="x must not require grad"):
        torch.func.grad(lambda x: fast(x).sum())(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_runs_one_by_one(fast, x):
    assert torch.equal(torch.vmap(fast.labels)(x[:, None])[:, 0], fast.labels(x))


def test_more_classes_than_a_byte_holds(x):
    fast = fuse(small_network(257))
    assert fast(x).shape == fast.probabilities(x).shape == (2, 257, 64, 80)
    with pytest.raises(ValueError, match="at most 256 classes"):
        fast.labels(x)
    fast = fuse(small_network(256))
    assert torch.equal(fast.labels(x), fast(x).argmax(1).to(torch.uint8))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_and_inference_mode_change_nothing(backend, model, x):
    fast = fuse(model, backend)
    expected = fast(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), expected) and fast(x).dtype == torch.float32
    with torch.inference_mode():
        assert torch.equal(fast(x.clone()), expected)
        picture = x.clone()
    assert torch.equal(fast(picture), expected)


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16])
def test_under_autocast_a_result_has_the_networks_dtype(wanted, model, x):
    """Whatever autocast made of x, as every op under it takes what the one before gave."""
    pixels = torch.randint(256, x.shape, dtype=torch.uint8)
    for dtype in (torch.float32, torch.bfloat16):
        fast = fuse(model, dtype=dtype)
        expected, of_pixels = fast(x.to(wanted).to(dtype)), fast(pixels)
        with torch.autocast("cpu", wanted):
            y = fast(x.to(wanted))
            assert y.dtype == fast.probabilities(x).dtype == dtype
            assert torch.equal(y, expected) and torch.equal(fast(pixels), of_pixels)
            for other in (x.double(), x.int()):
                with pytest.raises(TypeError, match="x must be of dtype"):
                    fast(other)
    with pytest.raises(TypeError, match="x must be of dtype"):
        fuse(model)(x.to(wanted))


def test_to_fx_it_is_one_node(fast, x):
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fast = fast

        def forward(self, x: Tensor) -> Tensor:
            return self.fast.labels(x) + 1

    traced = symbolic_trace(fast)
    assert [node.name for node in traced.graph.nodes] == [
        "x",
        "out",
        "weights",
        "network",
        "output",
    ]
    out = torch.empty_like(fast(x))
    assert torch.equal(traced(x), fast(x)) and traced(x, out) is out
    assert torch.equal(copy.deepcopy(symbolic_trace(Around()))(x), fast.labels(x) + 1)


# ---------------------------------------------------------------- operations


def counted(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("preset", PRESETS)
def test_torchs_flop_counter_counts_what_it_counts_of_the_plain_network(preset):
    model = FastSCNN(7, preset).eval()
    x = torch.randn(2, 3, 97, 131)
    plain = counted(lambda: model.reference(x))
    assert plain == counted(lambda: model(x)) > 0
    for backend in ("cpu", "reference"):
        fast = fuse(model, backend)
        assert counted(lambda: fast(x)) == counted(lambda: fast.labels(x)) == plain  # noqa: B023
        out = torch.empty(2, 7, 97, 131)
        assert counted(lambda: fast(x, out)) == plain  # noqa: B023


def test_it_counts_each_op(model):
    """A single op as the layer in the network, of which all together are the whole."""
    folded, total = fold(model), 0
    for step, tensors in zip(folded.program.sized(64, 80), folded.tensors, strict=True):
        layer = step.layer
        packed = ops.pack([layer], [tensors], "cpu")
        planes = [torch.randn(1, *shape) for shape in step.inputs]
        size = [step.output[1:]] if layer.op == "upsample_classify" else []
        op = getattr(ops, layer.op)
        flops = counted(lambda: op(*planes, packed, layer.alone, *size))  # noqa: B023
        assert flops == step.plain_flops, layer.op
        total += flops
    fast = fuse(model)
    assert total == counted(lambda: fast(torch.randn(1, 3, 64, 80)))


def test_the_counter_may_be_imported_later():
    spec = flops._WhenImported(["network"]).find_spec(FLOPS, torch.utils.__path__)
    counter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(counter)
    assert torch.ops.fastscnn.network in counter.flop_registry
    assert (
        flops._WhenImported(["network"]).find_spec("torch.utils.data", torch.utils.__path__) is None
    )


# ---------------------------------------------------------------- fuse()


def test_fuse_leaves_the_model_alone(x):
    model = small_network(aux=True).train()
    before = copy.deepcopy(model.state_dict())
    fast = fuse(model)
    assert model.training and not fast.training
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    with torch.no_grad():
        assert err(fast(x), model.eval().reference(x).double()) < 1e-5


def test_fuse_takes_a_snapshot(x):
    model = small_network()
    fast = fuse(model)
    expected = fast(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert torch.equal(fast(x), expected)


def test_fuse_under_other_defaults(model, fast, x):
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        other = fuse(model)
        y = other(x)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(y, fast(x)) and torch.equal(other.weights, fast.weights)


def test_what_cannot_be_fused(model, fast):
    for other in (nn.Conv2d(3, 3, 3), fast, None):
        with pytest.raises(TypeError, match="model must be a fastscnn_fast.FastSCNN"):
            fuse(other)
    for other in ("int8", np.float32, float):
        message = f"dtype must be a torch.dtype, such as torch.float16, got {other!r}"
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            fuse(model, dtype=other)
    with pytest.raises(ValueError, match="backend must be auto or one of cuda, .*, got 'gpu'"):
        fuse(model, "gpu")
    with pytest.raises(
        RuntimeError, match="backend cuda cannot run: (there is no GPU|device must be|the ext)"
    ):
        fuse(model, "cuda")
    with pytest.raises(
        RuntimeError, match="backend triton cannot run: (there is no GPU|device must be|the pack)"
    ):
        fuse(model, "triton")
    with pytest.raises(RuntimeError, match="dtype must be .*, got torch.float16"):
        fuse(model, "cpu", torch.float16)
    with pytest.raises(ValueError, match="precision must be one of highest, high, got 'medium'"):
        fuse(model, precision="medium")
    for dtype in (torch.int16, torch.float8_e4m3fn, torch.complex64):
        with pytest.raises(RuntimeError, match="reference: dtype must be torch.float32"):
            fuse(model, dtype=dtype)


# ---------------------------------------------------------------- as a module


def test_it_holds_one_buffer_and_nothing_to_train(fast):
    assert list(fast.state_dict()) == ["weights"] and not list(fast.parameters())
    assert [name for name, _ in fast.named_modules()] == [""] and not fast.training
    assert (
        repr(fast)
        == "FusedFastSCNN(num_classes=5, backend=cpu, dtype=torch.float32, precision=highest)"
    )


def saved(fast: FusedFastSCNN) -> FusedFastSCNN:
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[FusedFastSCNN], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda fast: pickle.loads(pickle.dumps(fast)),
    "torch.save": saved,
    "cpu": nn.Module.cpu,
    "to device": lambda fast: fast.to("cpu"),
    "to its dtype": lambda fast: fast.to("cpu", fast.dtype),
    "channels last": lambda fast: fast.to(memory_format=torch.channels_last),
    "share memory": nn.Module.share_memory,
    "train": nn.Module.train,
    "freeze": lambda fast: fast.requires_grad_(False),
    "in a sequence": lambda fast: nn.Sequential(fast)[0],
}


ARITHMETICS = list(dict.fromkeys(kernels.arithmetic for kernels in Kernels.of_floats()))


@pytest.fixture(scope="module")
def fused(model: FastSCNN) -> dict[str, FusedFastSCNN]:
    """On the cpu backend, by arithmetic."""
    pairs = {name: registry.CPU_ARITHMETICS[name] for name in ARITHMETICS}
    return {name: fuse(model, "cpu", *one.asked) for name, one in pairs.items()}


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("way", COPIES)
def test_copies_and_conversions_do_not_corrupt_it(way, arithmetic, fused, x):
    fast = fused[arithmetic]
    other = COPIES[way](copy.deepcopy(fast))
    assert other.weights.dtype == torch.uint8
    assert_all_equal(other, fast, x.to(fast.dtype))
    for name in ("config", "backend", "dtype", "precision", "program"):
        assert getattr(other, name) == getattr(fast, name)


CONVERSIONS: dict[str, Callable[[nn.Module], Any]] = {
    **{name: getattr(nn.Module, name) for name in ("half", "double", "bfloat16", "float")},
    "to": lambda module: module.to(torch.float16),
    "to device and dtype": lambda module: module.to("cpu", torch.float64),
    "to like": lambda module: module.to(torch.zeros(1, dtype=torch.float16)),
    "type": lambda module: module.type(torch.float16),
}


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("way", CONVERSIONS)
def test_conversions_to_another_dtype_raise(way, arithmetic, fused, x):
    fast = copy.deepcopy(fused[arithmetic])
    if {"float": torch.float32, "bfloat16": torch.bfloat16}.get(way) == fast.dtype:
        assert_all_equal(CONVERSIONS[way](fast), fused[arithmetic], x.to(fast.dtype))
        return
    for module in (fast, nn.Sequential(fast), nn.ModuleDict({"a": nn.Identity(), "b": fast})):
        with pytest.raises(TypeError, match=r"cannot become .*: call fuse\(model, dtype=torch\."):
            CONVERSIONS[way](module)
    assert_all_equal(fast, fused[arithmetic], x.to(fast.dtype))


PICTURES: dict[str, Callable[[Tensor], Tensor]] = {
    "planes": lambda x: x,
    "pixels": lambda x: x.to(memory_format=torch.channels_last),
    "slice": lambda x: x[:, :, 1:, 3:],
    "every second": lambda x: x[..., ::2],
    "narrow": lambda x: x[..., :33],
}


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("chosen", Kernels.of_floats(), ids=str)
def test_networks_of_16_bits_take_float32_pictures(picture, chosen, model, monkeypatch):
    """Rounded to nearest even in the first kernel: bit for bit what a cast before it gives."""
    monkeypatch.setenv("FASTSCNN_ISA", chosen.isa)
    fast = fuse(model, "cpu", chosen.dtype, chosen.precision)
    x = PICTURES[picture](torch.randn(2, 3, 75, 97) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None])
    if chosen.dtype == torch.float32:
        with pytest.raises(TypeError, match="x must be of dtype torch.float32 or torch.uint8, got"):
            fast(x.bfloat16())
        return
    y = fast(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, fast(x.bfloat16()))
    assert torch.equal(fast.labels(x), fast.labels(x.bfloat16()))


def test_compiled_networks_of_16_bits_take_float32_pictures(model, x):
    fast = fuse(model, dtype=torch.bfloat16)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), fast(x))
    torch.compiler.reset()


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_float32_pictures_of_other_channels(channels):
    fast = fuse(
        small_network(in_channels=channels, mean=(0,) * channels, std=(1,) * channels),
        "cpu",
        torch.bfloat16,
    )
    x = torch.randn(1, channels, 65, 97)
    assert torch.equal(fast(x), fast(x.bfloat16()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_reference_takes_float32_pictures(dtype, model, x):
    fast = fuse(model, "reference", dtype)
    assert torch.equal(fast(x), fast(x.to(dtype))) and fast(x).dtype == dtype
    with pytest.raises(
        TypeError, match=f"x must be of dtype {dtype} or torch.float32 or torch.uint8"
    ):
        fast(x.double())


UNSOUND = {
    "NaN": ("classifier.conv.bias", float("nan"), "NaN or infinity in 1 of 5 values"),
    "infinity": (
        "learning_to_downsample.stem.conv.weight",
        float("inf"),
        "NaN or infinity in 1 of",
    ),
    "infinite variance": (
        "classifier.dsconv1.depthwise.bn.running_var",
        float("inf"),
        "NaN or inf",
    ),
    "negative variance": (
        "global_features.pyramid.out.bn.running_var",
        -1e-3,
        "a negative variance, -0.001",
    ),
}


@pytest.mark.parametrize("what", UNSOUND)
def test_weights_of_a_broken_training_are_refused_by_name(what, x, caplog):
    name, value, message = UNSOUND[what]
    model = small_network()
    model.state_dict()[name].view(-1)[-1] = value
    with pytest.raises(ValueError, match=f"{name} holds {message}"):
        fuse(model)
    registry.log_once.cache_clear()
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.reference(x), rtol=0, atol=0, equal_nan=True)
    assert f"FastSCNN runs unfused: {name} holds {message}" in caplog.text


def test_weights_too_large_once_folded_are_refused():
    model = small_network()
    bn = model.classifier.dsconv1.pointwise.bn
    with torch.no_grad():
        bn.weight.fill_(3e4)
        bn.running_var.fill_(1e-4)
    with pytest.raises(ValueError, match=r"pointwise_weight of layer \d+ \(dsconv\) is up to"):
        fuse(model, "reference", torch.float16)
    fuse(model)


def test_state_dicts_fit_the_same_network_only(fast, x):
    other = fuse(small_network())
    assert not torch.equal(other(x), fast(x))
    other.load_state_dict(fast.state_dict())
    assert torch.equal(other(x), fast(x))
    with pytest.raises(RuntimeError, match="size mismatch for weights"):
        fuse(small_network(6, expansion=4)).load_state_dict(fast.state_dict())
    same_size = fuse(small_network(6))  # both pad to 16 classes
    same_size.load_state_dict(fast.state_dict())
    with pytest.raises(ValueError, match="weights must be packed for these layers"):
        same_size(x)


def flipped(weights: Tensor, byte: int) -> Tensor:
    weights = weights.clone()
    weights[byte] ^= 1
    return weights


def misaligned(weights: Tensor) -> Tensor:
    memory = torch.empty(weights.numel() + 1, dtype=torch.uint8)
    memory[1:] = weights
    return memory[1:]


TAMPERED: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "empty": ("untagged tensor of 0 bytes", lambda w: w[:0]),
    "one byte": ("untagged tensor of 1 bytes", lambda w: w[:1]),
    "a tag alone": ("of other layers", lambda w: w[:64]),
    "short": ("of other layers", lambda w: w[:-4]),
    "long": ("of other layers", lambda w: torch.cat([w, w[:4]])),
    "without its tag": ("untagged", lambda w: w[64:]),
    "random": ("untagged", lambda w: torch.zeros_like(w)),
    "magic": ("untagged", lambda w: flipped(w, 0)),
    "version": ("version", lambda w: flipped(w, 4)),
    "layout": ("got layout 0", lambda w: flipped(w, 8)),
    "layers": ("of other layers", lambda w: flipped(w, 16)),
    "size": ("of other layers", lambda w: flipped(w, 24)),
    "misaligned": ("aligned", misaligned),
    "strided": ("contiguous", lambda w: torch.stack([w, w], 1)[:, 1]),
    "a matrix": ("of one dimension", lambda w: w.view(2, -1)),
    "signed": (r"packed by pack\(\), got torch.int8", lambda w: w.view(torch.int8)),
    "cast": (r"packed by pack\(\), got torch.float32", Tensor.float),
    "meta": ("x must be on meta, got cpu", lambda w: w.to("meta")),
    "the other backend's": (
        "got layout 0",
        lambda w: fuse(small_network(), "reference").weights,
    ),
}


@pytest.mark.parametrize("way", TAMPERED)
def test_weights_that_are_not_its_own_raise(way, fast, x):
    message, tamper = TAMPERED[way]
    other = copy.deepcopy(fast)
    other.weights = tamper(fast.weights)
    for output in OUTPUTS:
        with pytest.raises((ValueError, TypeError), match=message):
            getattr(other, output)(x)


@pytest.mark.parametrize(
    "spoil", [lambda w: w[:-4], lambda w: flipped(w, 16), lambda w: flipped(w, 8)]
)
def test_the_reference_backend_checks_its_weights_too(spoil, model, x):
    fast = fuse(model, "reference")
    fast.weights = spoil(fast.weights)
    with pytest.raises(ValueError, match="weights must be packed for"):
        fast(x)


def test_on_the_meta_device_it_tells_shapes(fast, x):
    other = copy.deepcopy(fast).to("meta")
    shapes = [(getattr(other, output)(x.to("meta")).shape) for output in OUTPUTS]
    assert shapes == [(2, 5, 64, 80), (2, 5, 64, 80), (2, 64, 80)]


@pytest.mark.parametrize("output", OUTPUTS)
def test_compiles_whole_for_any_size(output, fast):
    run = getattr(fast, output)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for shape in ((2, 3, 64, 80), (1, 3, 65, 97), (3, 3, 71, 33)):
        x = torch.randn(shape)
        assert torch.equal(compiled(x), run(x))
        with torch.no_grad():
            assert torch.equal(compiled(x), run(x))
    with pytest.raises(Exception, match="x must be"):
        compiled(torch.randn(1, 4, 64, 64))


@pytest.mark.slow
def test_compiles_with_the_default_backend_among_other_modules(fast, x):
    net = nn.Sequential(nn.Upsample(scale_factor=2), fast, nn.Softmax(1))
    assert torch.allclose(torch.compile(net, fullgraph=True)(x), net(x), atol=1e-6)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_call_allocates_its_result_and_nothing_else(
    output, layout, arithmetic, given, raw, fused, x
):
    fast = fused[arithmetic]
    view = in_layout(x.to(torch.uint8 if raw else fast.dtype), layout)
    run = getattr(fast, output)
    y = run(view)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run(view, out=y if given else None)
    events = profile.events()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in events)
    assert allocated == (0 if given else y.nbytes)
    names = {event.name for event in events if event.name.startswith("aten::")}
    assert names == (set() if given else {"aten::new_empty", "aten::empty"})


def test_scratch_memory_stops_growing_once_warm(fast, x):
    cpu = registry.cpu_module()
    sizes = [(1, 3, 96, 128), (3, 3, 64, 64), (2, 3, 33, 49)]
    for count in (1, 2):
        with threads(count):
            for size in sizes:
                for output in OUTPUTS:
                    getattr(fast, output)(torch.randn(size))
    warm = cpu.scratch_bytes()
    for _ in range(20):
        for size in sizes:
            for output in OUTPUTS:
                getattr(fast, output)(torch.randn(size))
    assert 0 < cpu.scratch_bytes() == warm


def test_out_is_memory_of_its_own_and_aligned() -> None:
    """A batch's later pictures are read after the first results are written."""
    fast = fuse(small_network(3, in_channels=3))
    memory = torch.zeros(2 * 3 * 32 * 48 + 1)
    x = memory[:-1].view(2, 3, 32, 48)
    for shared in (x, memory[1:].view(2, 3, 32, 48)):
        with pytest.raises(ValueError, match="out must not share memory with x"):
            fast(x, out=shared)
    buffer = bytearray(4 * x.numel() + 4)
    odd = torch.frombuffer(buffer, dtype=torch.float32, offset=1, count=x.numel())
    if odd.data_ptr() % 4:
        with pytest.raises(ValueError, match="out must be aligned"):
            fast(x, out=odd.view(x.shape))
