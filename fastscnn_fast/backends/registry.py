"""Which backend can run what, and why not: one predicate selects a backend and explains its refusal."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from ..arch.config import Config
from ..program import arithmetic
from ..program.program import fast_scnn
from . import gpus

#: The cpu backend's arithmetics by name.
CPU_ARITHMETICS = arithmetic.of("cpu")

#: Which share plans and packed weights.
GPU_BACKENDS = ("cuda", "triton")

NO_GPU = "there is no GPU, torch finds none"

logger = logging.getLogger("fastscnn_fast")


def _extension(name: str) -> tuple[ModuleType | None, str]:
    """The extension module of that name, or why there is none."""
    try:
        return import_module(f"fastscnn_fast.{name}"), ""
    except ImportError as error:
        return None, f"the extension fastscnn_fast.{name} is not built ({error})"


_cpu_module, _cpu_missing = _extension("_cpu")
_cuda_module, _cuda_missing = _extension("_cuda")


class CannotRun(RuntimeError):
    """A backend cannot run what it was asked to; the message says why."""


@dataclass(frozen=True)
class Backend:
    """``why_not(config, device, dtype)`` is None where the backend can run, else the reason."""

    name: str
    why_not: Callable[[Config, torch.device, torch.dtype], str | None]


def _cpu_why_not(config: Config, device: torch.device, dtype: torch.dtype) -> str | None:
    if _cpu_module is None:
        return _cpu_missing
    if device.type != "cpu":
        return not_on("cpu", device)
    if (unknown := _unknown("cpu", dtype)) is not None:
        return unknown
    try:
        chosen = arithmetic.choose("cpu", dtype)
        program = fast_scnn(config).computed_in(chosen)
        _cpu_module.packed_bytes(program.integers, chosen.name)
    except ValueError as error:
        return str(error)
    return None


def _reference_why_not(config: Config, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "meta":
        return "the meta device holds no weights"
    return _unknown("reference", dtype)


def _unknown(backend: str, dtype: torch.dtype) -> str | None:
    """Why ``backend`` has no arithmetic of that dtype, None where it has."""
    known = dtype in arithmetic.dtypes(backend)
    return None if known else f"{arithmetic.dtype_rule(backend)}, got {dtype}"


def _triton_why_not(config: Config, device: torch.device, dtype: torch.dtype) -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if find_spec("fastscnn_fast.kernels") is None:
        return "fastscnn_fast.kernels is missing, as where an archive lost its links: pip install makes it whole"
    if (unknown := _unknown("triton", dtype)) is not None:
        return unknown
    if device.type == "cpu":
        return None if _interpreted() else not_on("cuda", device)
    if device.type != "cuda":
        return not_on("cuda", device)
    found, chosen = architecture(device), arithmetic.choose("triton", dtype)
    if isinstance(found, int):
        if found < int(chosen.needs["triton"]):
            return f"{dtype} needs a newer GPU than one of compute capability {found / 10}"
    elif chosen.quantised:
        return f"{dtype} needs a GPU of NVIDIA's, got {found}"
    return None


def not_on(wanted: str, device: torch.device) -> str:
    """Why what needs a device of type ``wanted`` cannot run on ``device``."""
    if wanted == "cuda" and not torch.cuda.is_available():
        return NO_GPU
    return f"device must be {wanted}, got {device}"


def _interpreted() -> bool:
    """Whether Triton runs kernels on the cpu: it looks at the environment when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def architecture(device: torch.device) -> gpus.Architecture:
    """10 times the compute capability of an NVIDIA GPU, AMD's name of one, "interpreter" for the cpu."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _architecture(device)


@cache
def _architecture(device: torch.device) -> gpus.Architecture:
    if device.type == "cpu":
        return gpus.INTERPRETER
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _cuda_why_not(config: Config, device: torch.device, dtype: torch.dtype) -> str | None:
    if _cuda_module is None:
        return _cuda_missing
    if (unknown := _unknown("cuda", dtype)) is not None:
        return unknown
    wanted = "cpu" if _cuda_module.on_host else "cuda"  # tests run the kernels on the host
    if device.type != wanted:
        return not_on(wanted, device)
    if len(config.pyramid_bins) > 8 or max(config.pyramid_bins, default=0) > 255:
        return f"pyramid_bins must be at most 8, of at most 255 each, got {config.pyramid_bins}"
    found = architecture(device)
    if not isinstance(found, int):
        return None if _cuda_module.on_host else f"the GPU must be NVIDIA's, got {found}"
    code = _code_for(found, _cuda_module)
    if code == 0:
        built = ", ".join(f"sm_{a}" for a in _cuda_module.architectures)
        return f"fastscnn_fast._cuda must be built for sm_{found}, it is for {built}"
    if code < int(arithmetic.choose("cuda", dtype).needs["cuda"]):
        # On 7.5 there is no bfloat16, and 64 KiB of shared memory, which float32's tiles exceed.
        return f"{dtype} needs code for a GPU of compute capability 8.0 or newer, got sm_{code}"
    return None


def _code_for(found: int, module: ModuleType) -> int:
    """The architecture whose code in ``module`` runs on that one, 0 for none.

    Machine code runs on its own and on later minor versions, PTX on all later ones.
    """
    machine = [a for a in module.architectures if a // 10 == found // 10 and a <= found]
    return max(machine, default=module.ptx if module.ptx <= found else 0)


def cuda_code() -> str:
    """What the extension ``_cuda`` has code for, "none" where it is not built."""
    if _cuda_module is None:
        return "none"
    code = [f"sm_{a}" for a in _cuda_module.architectures]
    return " ".join(code + [f"compute_{_cuda_module.ptx}"] * (_cuda_module.ptx > 0)) or "host"


#: In the order of preference: of two on GPUs first the one whose kernels are compiled beforehand and whose launches overlap;
#: which is faster was not measured.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("cuda", _cuda_why_not),
        Backend("cpu", _cpu_why_not),
        Backend("triton", _triton_why_not),
        Backend("reference", _reference_why_not),
    )
}


def able(
    config: Config, device: torch.device, dtype: torch.dtype, precision: str = "highest"
) -> list[str]:
    """The backends that can run, the preferred first: on a GPU, with precision "high", those that have that."""
    names = [name for name, b in BACKENDS.items() if b.why_not(config, device, dtype) is None]
    if precision == "high" and device.type == "cuda":
        names.sort(key=lambda name: _why_not_high(name, device, dtype) is not None)
    return names


def why_not(names: Iterable[str], config: Config, device: torch.device, dtype: torch.dtype) -> str:
    """Why these backends cannot run."""
    return "; ".join(f"{n}: {BACKENDS[n].why_not(config, device, dtype)}" for n in names)


def forced() -> str:
    """What FASTSCNN_BACKEND asks for, "auto" where it is unset or empty."""
    return os.environ.get("FASTSCNN_BACKEND") or "auto"


def choose(
    name: str,
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    precision: str = "highest",
) -> str:
    """The backend to use for ``name``; "auto" is FASTSCNN_BACKEND where set, else the first of :func:`able`.

    Raises:
        ValueError: unknown name.
        CannotRun: the backend that was asked for cannot run; the message says why.
    """
    if name == "auto":
        name = forced()
    if name == "auto":
        names = able(config, device, dtype, precision)
        if not names:
            raise CannotRun(f"no backend can run: {why_not(BACKENDS, config, device, dtype)}")
        if names[0] == "reference":
            better = ("cpu",) if device.type == "cpu" else GPU_BACKENDS
            why = why_not(better, config, device, dtype)
            log_once(f"running on the reference backend: {why}")
        return names[0]
    if name not in BACKENDS:
        raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}, got {name!r}")
    reason = BACKENDS[name].why_not(config, device, dtype)
    if reason is not None:
        raise CannotRun(f"backend {name} cannot run: {reason}")
    return name


def choose_precision(
    precision: str, name: str, backend: str, device: torch.device, dtype: torch.dtype
) -> str:
    """The precision to use on ``backend``, which :func:`choose` chose for ``name``.

    "high" becomes "highest", with a logged reason, where there is no faster arithmetic of that precision.

    Raises:
        ValueError: unknown precision.
        CannotRun: a backend with kernels was asked for by name, and cannot; the message says why.
    """
    if precision not in arithmetic.PRECISIONS:
        known = ", ".join(arithmetic.PRECISIONS)
        raise ValueError(f"precision must be one of {known}, got {precision!r}")
    if precision == "highest":
        return precision
    reason = _why_not_high(backend, device, dtype)
    if reason is None:
        return precision
    if backend != "reference" and backend in (name, forced()):
        raise CannotRun(f"backend {backend} cannot run in precision high: {reason}")
    log_once(f"running in precision highest: {reason}")
    return "highest"


#: Backends with arithmetic of precision "high".
_HIGH = tuple(arithmetic.ARITHMETICS["high"].needs)


def _why_not_high(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if backend not in _HIGH:
        return f"backend must be {' or '.join(_HIGH)}, got {backend}"
    if dtype != torch.float32:
        return f"dtype must be torch.float32, got {dtype}"
    if backend == "triton":
        found = architecture(device)
        has_tf32 = (
            found >= int(arithmetic.ARITHMETICS["high"].needs["triton"])
            if isinstance(found, int)
            else found == gpus.INTERPRETER or (found in gpus.GPUS and gpus.GPUS[found].tf32)
        )
        return None if has_tf32 else f"it needs TF32, the GPU is of architecture {found}"
    if isa() not in isas("high"):
        return f"it needs AMX, the instruction set in use is {isa()}"
    return None


def report() -> dict[str, str | None]:
    """Per backend: None where it runs float32 on this machine's cpu or GPU, else the reason."""

    def reason(backend: Backend) -> str | None:
        why_not = backend.why_not(Config(), torch.device("cpu"), torch.float32)
        there = backend.name in GPU_BACKENDS and torch.cuda.is_available()
        if why_not is None or not there:
            return why_not
        return backend.why_not(Config(), torch.device("cuda"), torch.float32)

    return {name: reason(backend) for name, backend in BACKENDS.items()}


def cpu_module() -> ModuleType:
    """The extension ``_cpu``.

    Raises:
        CannotRun: it is not built.
    """
    if _cpu_module is None:
        raise CannotRun(f"backend cpu cannot run: {_cpu_missing}")
    return _cpu_module


def cuda_module() -> ModuleType:
    """The extension ``_cuda``.

    Raises:
        CannotRun: it is not built.
    """
    if _cuda_module is None:
        raise CannotRun(f"backend cuda cannot run: {_cuda_missing}")
    return _cuda_module


def training_module(device: torch.device) -> ModuleType | None:
    """The extension, for its training kernels; None where plain torch must do (or is asked for)."""
    asked = forced() in ("auto", "cpu")
    return _cpu_module if asked and device.type == "cpu" else None


def isas(name: str = "float32") -> list[str]:
    """Instruction sets with kernels of their own for that arithmetic that this processor runs, the best last."""
    if _cpu_module is None or name not in CPU_ARITHMETICS:
        return []
    return list(_cpu_module.instruction_sets(name))


def isa() -> str:
    """The instruction set in use: the best, or what FASTSCNN_ISA forces.

    An arithmetic that has no kernels for it runs those of the best set below.

    Raises:
        ValueError: FASTSCNN_ISA names one that cannot run here.
    """
    return _isa(os.environ.get("FASTSCNN_ISA") or None)


def isa_of(name: str) -> str:
    """The instruction set whose kernels that arithmetic runs: the best up to :func:`isa` that has some, else "none".

    Raises:
        ValueError: as :func:`isa`.
    """
    known: list[str] = list(cpu_module().instruction_sets())
    upto = known[: known.index(isa()) + 1]
    return next((own for own in reversed(isas(name)) if own in upto), "none")


@cache
def _isa(forced: str | None) -> str:
    names: list[str] = list(cpu_module().instruction_sets())
    if forced is None:
        return names[-1]
    if forced not in names:
        raise ValueError(f"FASTSCNN_ISA must be one of {', '.join(names)}, got {forced!r}")
    return forced


@cache
def log_once(message: str) -> None:
    """Warn of a fallback, once per reason."""
    logger.warning(message)
