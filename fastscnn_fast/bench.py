"""Plain torch, torch.compile and the fused kernels side by side: parity first, then interleaved timings."""

from __future__ import annotations

import copy
import csv
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import backends, data
from .fused import FusedFastSCNN
from .model import FastSCNN
from .plots import figure
from .reference import normalise

#: Parity with float64: logits may err this much (:func:`relative_error`) and this share of the labels may
#: differ, or twice as much as eager torch's own in float32, whichever is larger.
LARGEST_ERROR = 1e-5
LARGEST_DISAGREEMENT = 1e-4

EAGER, EAGER_LAST, COMPILED = "eager", "eager, channels-last", "torch.compile, freezing"
LOGITS, LABELS = "fastscnn_fast logits", "fastscnn_fast labels"


@dataclass(frozen=True)
class Result:
    """One contestant at one size: milliseconds a picture, and how far it is from float64.

    ``error`` is :func:`relative_error` of logits, ``disagreement`` the share of labels that differ from
    float64's; ``speedup`` is against eager channels-last torch, None where parity failed.
    """

    size: str
    name: str
    median: float
    low: float
    high: float
    speedup: float | None
    error: float | None
    disagreement: float
    passed: bool


def relative_error(y: Tensor, exact: Tensor) -> float:
    """``||y - exact|| / ||exact - its mean per channel||`` over (N, C, H, W): no offset can hide an error.

    A NaN or infinity anywhere in ``y`` gives infinity.
    """
    if not y.isfinite().all():
        return float("inf")
    spread = (exact - exact.mean((0, 2, 3), keepdim=True)).norm()
    return float((y.double() - exact).norm() / spread)


@torch.no_grad()
def untrained_model(preset: str = "paper", num_classes: int = 19) -> FastSCNN:
    """Random weights, the same ones every time, for speed and parity: what the labels show means nothing.

    Every batch norm has the statistics of a drawn street, and the last convolution is scaled so that each
    class has logits of mean 0 and variance 1 there: otherwise one class would win everywhere.
    """
    x = picture_tensor(data.street(0, 192, 256)[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FastSCNN(num_classes, preset)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        model.train().reference(x)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    logits = model.eval().reference(x).transpose(0, 1).flatten(1)
    last = model.classifier.conv
    assert last.bias is not None
    scale = 1 / logits.std(1)
    last.weight *= scale[:, None, None, None]
    last.bias.copy_((last.bias - logits.mean(1)) * scale)
    return model


def picture_tensor(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """uint8 (H, W, C) -> uint8 (1, C, H, W), channels-last, without a copy."""
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def normalised(model: FastSCNN, x: Tensor) -> Tensor:
    """uint8 (N, C, H, W) -> float32, as ``model`` normalises it."""
    return normalise(x, model.config, torch.float32)


def compare(
    model: FastSCNN,
    fast: FusedFastSCNN,
    x: Tensor,
    rounds: int,
    compiled: bool = True,
) -> list[Result]:
    """Measure every contestant on ``x`` (normalised float32), in turns: A B C D E, A B C D E, ...

    ``model`` is the source of ``fast``; without ``compiled``, or where it fails, torch.compile is left out.
    """
    model = copy.deepcopy(model).eval()
    with torch.inference_mode():
        exact = copy.deepcopy(model).double().reference(x.double())
        last = copy.deepcopy(model)
        last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        rows, columns = x.contiguous(), x.contiguous(memory_format=torch.channels_last)
        contestants: dict[str, Callable[[], Tensor]] = {
            EAGER: partial(model.reference, rows),
            EAGER_LAST: partial(last.reference, columns),
        }
        if compiled:
            build = _compiled(last, columns)
            if build is not None:
                contestants[COMPILED] = build
        contestants[LOGITS] = partial(fast, columns)
        contestants[LABELS] = partial(fast.labels, columns)
        outputs = {name: call() for name, call in contestants.items()}
        parity = {name: _parity(y, exact) for name, y in outputs.items()}
        del outputs
        times = _interleaved(contestants, rounds)
    eager_error, eager_disagreement = parity[EAGER]
    assert eager_error is not None
    largest_error = max(LARGEST_ERROR, 2 * eager_error)
    largest_disagreement = max(LARGEST_DISAGREEMENT, 2 * eager_disagreement)
    baseline = float(np.median(times[EAGER_LAST]))
    results = []
    for name, samples in times.items():
        low, median, high = np.quantile(samples, (0.2, 0.5, 0.8)).tolist()
        error, disagreement = parity[name]
        passed = disagreement <= largest_disagreement and (error or 0) <= largest_error < np.inf
        speedup = baseline / median if passed else None
        size = f"{x.shape[2]}x{x.shape[3]}"
        results.append(Result(size, name, median, low, high, speedup, error, disagreement, passed))
    return results


def _parity(y: Tensor, exact: Tensor) -> tuple[float | None, float]:
    labels = y if y.dtype == torch.uint8 else y.argmax(1)
    error = None if y.dtype == torch.uint8 else relative_error(y, exact)
    return error, float((labels != exact.argmax(1)).double().mean())


def _compiled(model: FastSCNN, x: Tensor) -> Callable[[], Tensor] | None:
    """``model.reference(x)`` compiled with its weights frozen in; None, with a word, where that fails."""
    import torch._inductor.config as inductor

    torch.compiler.reset()
    call = partial(torch.compile(model.reference, dynamic=False), x)
    print("torch.compile is building its kernels, which takes a minute ...")
    try:
        with inductor.patch(freezing=True):
            call()
    except Exception as error:  # no C++ compiler, or whatever else inductor meets
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        print(f"torch.compile is left out: {reason}")
        return None
    return call


def _interleaved(
    contestants: dict[str, Callable[[], Tensor]], rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of ``rounds`` calls each, after one more round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            if turn:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def bench(
    model: FastSCNN,
    fast: FusedFastSCNN,
    sizes: Sequence[tuple[int, int]],
    rounds: int,
    compiled: bool = True,
) -> list[Result]:
    """:func:`compare` on a drawn street at each (height, width)."""
    results = []
    for height, width in sizes:
        x = normalised(model, picture_tensor(data.street(0, height, width)[0]))
        results += compare(model, fast, x, rounds, compiled)
    return results


def machine(command: str) -> dict[str, str]:
    """What a measurement depends on, besides the networks."""
    return {
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "instruction set": backends.isa() if backends.isas() else "none",
        "command": command,
        "date": date.today().isoformat(),
    }


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(results: Sequence[Result]) -> str:
    """The results as a table in Markdown."""
    head = (
        "size",
        "network",
        "median ms",
        "20-80 % ms",
        "pictures/s",
        "speed-up",
        "error",
        "other labels",
    )
    body = [
        (
            r.size,
            r.name,
            f"{r.median:.1f}",
            f"{r.low:.1f}-{r.high:.1f}",
            f"{1000 / r.median:.1f}",
            "parity failed" if r.speedup is None else f"{r.speedup:.2f}x",
            "" if r.error is None else f"{r.error:.1e}",
            f"{100 * r.disagreement:.4f} %",
        )
        for r in results
    ]
    widths = [max(map(len, column)) for column in zip(head, *body)]
    rows = (head, tuple("-" * width for width in widths), *body)
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
        for row in rows
    )


LEGEND = (
    "speed-up: against eager channels-last torch. Against the plain network in float64 on the same input:\n"
    "error: ||y - y64|| / ||y64 - mean per class|| of the logits; other labels: share of pixels.\n"
    f"Parity allows {LARGEST_ERROR:g} and {100 * LARGEST_DISAGREEMENT:g} %, or twice what eager float32 errs."
)


def write_csv(path: str | Path, results: Sequence[Result], about: dict[str, str]) -> None:
    """One row per result, with the machine in every row."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*asdict(results[0]), *about])
        writer.writerows([*asdict(result).values(), *about.values()] for result in results)


def plot(path: str | Path, results: Sequence[Result], about: dict[str, str]) -> None:
    """Bars of the medians with 20-80 % whiskers, one panel per size, as PNG.

    Raises:
        ImportError: matplotlib is missing (the extra ``plot``).
    """
    sizes = list(dict.fromkeys(result.size for result in results))
    names = list(dict.fromkeys(result.name for result in results))
    colours = {EAGER: "#b8bcc4", EAGER_LAST: "#8d939e", COMPILED: "#5c6370"}
    chart = figure((9, 1.2 + len(sizes) * (0.55 + 0.42 * len(names))))
    for axes, size in zip(np.atleast_1d(chart.subplots(len(sizes), 1)), sizes):
        own = [result for result in results if result.size == size]
        for place, r in enumerate(own):
            whiskers = [[r.median - r.low], [r.high - r.median]]
            axes.barh(
                place,
                r.median,
                xerr=whiskers,
                color=colours.get(r.name, "#1f7a5c"),
                ecolor="#222222",
            )
            ratio = "parity failed" if r.speedup is None else f"{r.speedup:.2f}x"
            axes.annotate(
                f"{r.median:.1f} ms  ({ratio})",
                (r.high, place),
                (5, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_yticks(range(len(own)), [r.name for r in own])
        axes.invert_yaxis()
        axes.set_xlim(0, max(r.high for r in own) * 1.3)
        axes.set_title(size, loc="left", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("milliseconds a picture, median and 20-80 %; less is better")
    chart.suptitle(
        f"Fast-SCNN on {about['processor']}, {about['threads']} threads, torch {about['torch']},"
        f" backend {about['backend']} ({about['instruction set']}), {about['date']}",
        fontsize=9,
    )
    chart.savefig(path, dpi=130, format="png")
