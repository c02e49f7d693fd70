"""``fastscnn_fast info``: what this installation is made of, and what weights come along."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import __version__, bench
from ..arch.config import Config
from ..backends import registry
from ..checkpoints import Weights
from ..checkpoints.named import COUNTED_AT
from ..data.classes import counted
from ..program.arithmetic import dtypes

_PACKAGES = (
    "torch numpy pillow safetensors matplotlib onnx onnxscript onnxruntime triton torch-pruning"
    " huggingface_hub ray gradio av tifffile"
)


def add_options(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Print what this installation is made of, why each backend can or cannot run, and which trained weights come"
        " along."
    )


def run(args: argparse.Namespace) -> int:
    print(f"fastscnn_fast {__version__}, Python {platform.python_version()}")
    print(f"processor: {bench.processor()}, {torch.get_num_threads()} threads")
    print("packages: " + ", ".join(f"{name} {_version(name)}" for name in _PACKAGES.split()))
    if registry.isas():
        module = registry.cpu_module()
        compiler = module.compiler if module.compiler[0].isalpha() else f"GCC {module.compiler}"
        openmp = "with" if module.openmp else "WITHOUT"
        print(f"C++ kernels: built by {compiler}, {openmp} OpenMP")
        for arithmetic in registry.CPU_ARITHMETICS:
            sets = ", ".join(registry.isas(arithmetic)) or "none"
            print(f"instruction sets that run here, {arithmetic}: {sets}")
            in_use = _or_error(partial(registry.isa_of, arithmetic))
            print(f"instruction set in use, {arithmetic}: {in_use}")
        if _or_error(partial(registry.isa_of, "int8")) == "portable":
            print("int8 is slower than float32 here: it pays from AVX2 on")
    else:
        print("C++ kernels: not built")
    print(f"GPU: {_gpus()}")
    for name, reason in registry.report().items():
        print(f"backend {name}: {'can run' if reason is None else f'cannot run: {reason}'}")
    for name in registry.GPU_BACKENDS:
        print(f"dtypes of backend {name}: {', '.join(str(one)[6:] for one in dtypes(name))}")
    for dtype in dtypes("cpu"):
        choose = partial(registry.choose, "auto", Config(), torch.device("cpu"), dtype)
        print(f"backend in use for {dtype} on the CPU: {_or_error(choose)}")
    for dtype in dtypes("triton") if torch.cuda.is_available() else ():
        choose = partial(registry.choose, "auto", Config(), torch.device("cuda"), dtype)
        print(f"backend in use for {dtype} on the GPU: {_or_error(choose)} (by counts, not times)")
    height, width = COUNTED_AT
    print(f"weights that come along, with the operations of a picture of {height}x{width}:")
    for weights in Weights:
        meta = weights.meta
        classes = meta["categories"]
        print(
            f"  {weights}: {counted(len(classes))}, mIoU {meta['metrics']['miou']:.3f},"
            f" {meta['operations'] / 1e9:.2f} GFLOP, {meta['bytes'] / 1e6:.1f} MB ({', '.join(classes)})"
        )
    return 0


def _gpus() -> str:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names) or registry.NO_GPU


def _or_error(name: Callable[[], str]) -> str:
    try:
        return name()
    except (ValueError, RuntimeError) as error:
        return f"none: {error}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
