"""What CUDA's kernels pay for channels that they know only at run time: counted on PTX, nothing runs on a GPU."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cuda_host
import pytest
import torch

from fastscnn_fast import load_checkpoint
from fastscnn_fast.backends import registry
from fastscnn_fast.backends.gpu import dump, nvcc
from fastscnn_fast.backends.gpu.cuda import CudaStep, Described, described
from fastscnn_fast.program.layers import Layer
from fastscnn_fast.program.program import layer_sizes

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
import ptx_counts  # noqa: E402

sys.path.remove(BENCHMARKS)

pytestmark = [
    pytest.mark.machine_code,
    pytest.mark.skipif(
        bool(cuda_host.why_not() or nvcc.why_not()), reason=cuda_host.why_not() or nvcc.why_not()
    ),
]

ARCHITECTURE = 90
SIZE = (512, 1024)
#: Times the instructions of a kernel that is compiled for the layer's channels.
MOST = 1.3


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_cuda_module", cuda_host.shared())


def with_known_channels(general: str, layer: Layer) -> str:
    """The template-id of the kernel whose channels are the layer's."""
    known = {
        "dsconv": (layer.in_channels, layer.out_channels),
        "inverted_residual": (layer.in_channels, layer.mid_channels, layer.out_channels),
        "pyramid_pooling": (layer.in_channels, layer.out_channels),
        "feature_fusion": (layer.in_channels, layer.mid_channels, layer.out_channels),
    }[layer.op]
    name, _, arguments = general.partition("<")
    type_, *numbers = arguments.removesuffix(">").split(", ")
    assert numbers[0] == "0", general
    return f"{name}<{', '.join([type_, *map(str, known), *numbers[len(known) :]])}>"


def ptx_of(op: str, kernels: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Entry and PTX of these instantiations alone, by name: of the source without what launches all of them."""
    text = (nvcc.SOURCES / f"{op}.cu").read_text()
    end = text.rindex("template <", 0, text.index("\nvoid run("))
    addresses = ", ".join(f"reinterpret_cast<const void*>(&{kernel})" for kernel in kernels)
    text = f"{text[:end]}}}\nextern const void* const kernels[] = {{{addresses}}};\n}}\n"
    with tempfile.TemporaryDirectory() as folder:
        source, ptx = Path(folder, f"{op}.cu"), Path(folder, f"{op}.ptx")
        source.write_text(text)
        options = [f"-arch=compute_{ARCHITECTURE}", "-I", str(nvcc.SOURCES)]
        nvcc._nvcc([*options, "-ptx", str(source), "-o", str(ptx)])
        entries = nvcc._entries(ptx.read_text())
    return {nvcc.kernel_of(nvcc.demangled(entry)): (entry, code) for entry, code in entries.items()}


def instructions(code: tuple[str, str], launch: Described) -> float:
    entry, ptx = code
    parameters: list[dict[str, Any]] = [
        {"name": name, "kind": "pointer"}
        if type_ == "pointer"
        else {"name": name, "kind": "scalar", "dtype": type_, "value": value}
        for name, type_, value in launch.parameters
    ]
    about = {
        "entry": entry,
        "grid": launch.grid,
        "block": [launch.threads, 1, 1],
        "parameters": parameters,
    }
    return ptx_counts.instructions(ptx, about)


@pytest.mark.parametrize("op", ["dsconv", "inverted_residual", "pyramid_pooling", "feature_fusion"])
def test_free_widths_are_no_cliff(op: str) -> None:
    """The slim network's layers execute at most 1.3 times what kernels compiled for their channels would."""
    found = {}
    for step in layer_sizes(load_checkpoint("camvid11-slim").config, *SIZE):
        if step.layer.op == op:
            plan = dump.launches(step, torch.float16, ARCHITECTURE, "labels", backend="cuda")
            (made,) = plan.steps
            assert isinstance(made, CudaStep)
            launch = described(made)[-1]  # of the pyramid the one with the most products
            found[step.layer.name] = launch, with_known_channels(launch.kernel, step.layer)
    kernels = sorted({name for launch, known in found.values() for name in (launch.kernel, known)})
    codes = ptx_of(op, kernels)
    counts = {
        name: (instructions(codes[launch.kernel], launch), instructions(codes[known], launch))
        for name, (launch, known) in found.items()
    }
    assert all(ours <= MOST * known for ours, known in counts.values()), counts
