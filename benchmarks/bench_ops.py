"""Every fused op at every layer shape of the network: plain torch, torch.compile and ours, beside their roof.

A time is reported only where the result passed the parity bound in the same run. See README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import nan
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from helpers import BOUNDS, assert_labels, assert_parity, random_weights
from integers import random_integers
from torch import Tensor, nn

from fastscnn_fast import ops
from fastscnn_fast.arch.config import Config, preset
from fastscnn_fast.backends import registry
from fastscnn_fast.program import integers, reference
from fastscnn_fast.program.arithmetic import Arithmetic
from fastscnn_fast.program.layers import Shape, SizedLayer
from fastscnn_fast.program.program import layer_sizes

Run = Callable[[], Tensor]

#: What an op can take or return; a forward pass to logits runs the first.
VARIANTS = {"stem_conv": ("", "uint8"), "upsample_classify": ops.OUTPUTS}
OURS = "ours"
_ROOF_SECONDS = 0.02


@dataclass(frozen=True)
class Case:
    """A step of the plan, in one variant; ``calls`` is how often a forward pass to logits runs it."""

    step: SizedLayer
    calls: int
    variant: str
    arithmetic: str

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.step.layer.name, self.variant, self.arithmetic)))

    @property
    def one(self) -> Arithmetic:
        """What it is computed in: in int8 the last resize is that of float32."""
        whole = registry.CPU_ARITHMETICS[self.arithmetic]
        own = whole.layers.get(self.step.layer.op, whole.name) if whole.quantised else whole.name
        return registry.CPU_ARITHMETICS[own]

    @property
    def dtype(self) -> torch.dtype:
        """Of the results of floats; and of the inputs, but where these are integers."""
        return self.one.floats

    @property
    def shape(self) -> str:
        """Inputs and output as C x H x W."""
        inputs = "+".join(map(_text, self.step.inputs))
        return f"{inputs}>{_text(self.step.output)}"


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))


def cases(config: Config, height: int, width: int, arithmetic: str = "float32") -> list[Case]:
    """The distinct steps of ``layer_sizes(config, height, width)``, in the order of execution."""
    steps = layer_sizes(config, height, width)
    unnamed = [replace(step, layer=replace(step.layer, name="")) for step in steps]
    return [
        Case(step, 0 if number else unnamed.count(unnamed[index]), variant, arithmetic)
        for index, step in enumerate(steps)
        if unnamed.index(unnamed[index]) == index
        for number, variant in enumerate(VARIANTS.get(step.layer.op, ("",)))
    ]


class Plain(nn.Module):
    """The op of :mod:`fastscnn_fast.program.reference`, its weights as buffers that torch.compile can freeze."""

    def __init__(self, case: Case, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.layer, self.size, self.output = case.step.layer, case.step.output[1:], case.variant
        self.ops: Mapping[str, Callable[..., Tensor]] = reference.OPS
        if case.one.quantised:
            self.ops = integers.OPS
        self.names = tuple(weights)
        for name, tensor in weights.items():
            self.register_buffer(name, tensor)

    def forward(self, *inputs: Tensor) -> Tensor:
        weights = {name: self.get_buffer(name) for name in self.names}
        return reference.run(self.layer, inputs, weights, self.size, self.output, self.ops)


@dataclass(frozen=True)
class Work:
    """A case with random channels-last inputs, weights, torch's own result and the true one.

    All but the last, which is float64, are of the case's dtype. Of labels, the true one is the logits. In int8
    inputs and weights are integers, and both results what program/integers.py says.
    """

    case: Case
    inputs: tuple[Tensor, ...]
    weights: dict[str, Tensor]
    own: Tensor
    ref64: Tensor

    def check(self, y: Tensor) -> None:
        """Raises AssertionError where ``y`` is not equal, as the parity tests define it."""
        if self.case.one.quantised:
            assert torch.equal(y, self.own), "integers must be those of program/integers.py"
        elif self.case.variant == "labels":
            wide = self.case.dtype == torch.float32
            assert_labels(y, self.ref64, 1e-4 if wide else 2**-7 * self.ref64.abs().max().item())
        else:
            assert_parity(y, self.own, self.ref64, *BOUNDS[self.case.one.name].op)

    @property
    def bytes(self) -> int:
        """SizedLayer.elements x 4, x 2 in bfloat16, about x 1 in int8; less for pictures and labels of bytes."""
        return sum(t.nbytes for t in (*self.inputs, *self.weights.values(), self.own))


def _reference(work: Work) -> Run:
    plain = Plain(work.case, work.weights)
    return lambda: plain(*work.inputs)


def _compile(work: Work) -> Run:
    if work.case.one.quantised:
        pytest.skip("torch.compile cannot freeze the weights of products of integers")
    torch.compiler.reset()
    compiled = torch.compile(Plain(work.case, work.weights), dynamic=False)
    with torch.no_grad(), inductor.patch(freezing=True):
        compiled(*work.inputs)
    return lambda: compiled(*work.inputs)


def _ours(work: Work) -> Run:
    reason = registry.report()["cpu"]
    if reason is not None:
        pytest.skip(reason)
    case, layer = work.case, work.case.step.layer
    packed = ops.pack([layer], [work.weights], "cpu", *case.one.asked)
    op = getattr(ops, layer.op)
    if layer.op == "upsample_classify":
        return lambda: op(*work.inputs, packed, layer, case.step.output[1:], case.variant)
    if layer.op == "stem_conv":
        return lambda: op(*work.inputs, packed, layer, dtype=case.one.dtype)
    return lambda: op(*work.inputs, packed, layer)


CONTENDERS: dict[str, Callable[[Work], Run]] = {
    "reference": _reference,
    "compile": _compile,
    OURS: _ours,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config
    config, (height, width) = _config(options), options.getoption("size")
    arithmetics = options.getoption("arithmetics")
    every = [case for name in arithmetics for case in cases(config, height, width, name)]
    names = [case.name.replace(" ", "-") for case in every]
    metafunc.parametrize("work", every, ids=names, indirect=True, scope="module")
    isas = options.getoption("isas")
    ours = [(OURS, isa) for isa in isas] if isas else [(OURS, "")]
    contenders = [("reference", ""), ("compile", ""), *ours]
    ids = ["-".join(filter(None, contender)) for contender in contenders]
    metafunc.parametrize(("contender", "isa"), contenders, ids=ids)


def _config(options: pytest.Config) -> Config:
    return preset(options.getoption("preset"))


@pytest.fixture(scope="module")
def work(request: pytest.FixtureRequest, seed: int) -> Work:
    case: Case = request.param
    torch.manual_seed(seed)
    inputs = tuple(_random(shape, case) for shape in case.step.inputs)
    if case.one.quantised:
        weights = random_integers(case.step.layer)
        with torch.no_grad():
            own = Plain(case, weights)(*inputs)
        return Work(case, inputs, weights, own, own.double())
    weights = {n: t.to(case.dtype) for n, t in random_weights(case.step.layer).items()}
    exact = {name: tensor.double() for name, tensor in weights.items()}
    wide = (x if x.dtype == torch.uint8 else x.double() for x in inputs)
    checked = replace(case, variant="logits") if case.variant == "labels" else case
    with torch.no_grad():
        own = Plain(case, weights)(*inputs)
        return Work(case, inputs, weights, own, Plain(checked, exact)(*wide))


def _random(shape: Shape, case: Case) -> Tensor:
    between = case.one.quantised and case.step.layer.op != "stem_conv"
    if case.variant == "uint8" or between:
        x = torch.randint(256, (1, *shape), dtype=torch.uint8)
    else:
        x = torch.randn(1, *shape, dtype=case.dtype)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.benchmark(max_time=0.3, warmup=True, warmup_iterations=5, disable_gc=True)
def test_op(
    work: Work,
    contender: str,
    isa: str,
    machine: dict[str, str],
    benchmark: Any,
    results: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = work.case
    if isa:
        if isa not in registry.isas(case.one.name):
            pytest.skip(
                f"{isa} has no kernels of its own for {case.arithmetic}, or does not run here"
            )
        monkeypatch.setenv("FASTSCNN_ISA", isa)
    run = CONTENDERS[contender](work)
    benchmark.group = f"{case.name} {case.shape}"
    with torch.no_grad():
        work.check(run())
        benchmark(run)
    if not benchmark.enabled:
        return
    seconds, rate = benchmark.stats.stats.median, case.step.flops / benchmark.stats.stats.median
    benchmark.extra_info |= {
        "layer": case.name,
        "shape": case.shape,
        "calls": case.calls,
        "contender": contender,
        "arithmetic": case.arithmetic,
        "isa": isa or machine["isa"],
        "ms": seconds * 1e3,
        "bytes": work.bytes,
        "flops": case.step.flops,
        "gb_per_s": work.bytes / seconds / 1e9,
        "gflop_per_s": rate / 1e9,
        "of_roof": rate / _roof(case.one.name),
        "threads": int(machine["threads"]),
    }
    results.append(benchmark.extra_info)


def _roof(arithmetic: str) -> float:
    """Operations a second on registers alone, as fast as the machine is right now; NaN without the extension."""
    if not registry.isas():
        return nan
    threads = torch.get_num_threads()
    return registry.cpu_module().multiply_add_roof(
        registry.isa(), arithmetic, threads, _ROOF_SECONDS
    )
