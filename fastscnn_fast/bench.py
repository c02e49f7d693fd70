"""Plain torch, torch.compile and the fused kernels side by side: parity first, then interleaved timings."""

from __future__ import annotations

import copy
import csv
import io
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .arch.network import normalise
from .backends import registry
from .data.scenes import street
from .plots import figure, png
from .program.arithmetic import ARITHMETICS, Arithmetic, choose
from .program.labels import labels_of
from .program.parity import Bounds, Parity
from .runtime.calibrate import calibrate
from .runtime.fused import FusedFastSCNN
from .runtime.model import FastSCNN
from .writing import write_whole

EAGER, EAGER_LAST, COMPILED = "eager", "eager, channels-last", "torch.compile, freezing"
LOGITS, LABELS = "fastscnn_fast logits", "fastscnn_fast labels"

_PAUSE = 0.05  # seconds

Call = Callable[[], Tensor]
#: Samples of one turn.
Probe = Callable[[], Sequence[float]]
#: Makes the probe of a call of so many pictures, with so many timed calls in a turn: as :func:`clock`.
Timer = Callable[[Call, int, int], Probe]


#: What parity allows a network, by arithmetic.
NETWORK_BOUNDS = {name: one.network_bounds for name, one in ARITHMETICS.items()}


@dataclass(frozen=True)
class Contestant:
    """What is timed: ``call`` gives logits or uint8 labels; its time is divided by the best of ``against``."""

    name: str
    call: Call
    arithmetic: str = "float32"
    against: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """One contestant's milliseconds a picture, and how far it is from float64 (:class:`Parity`).

    ``where`` is what its rivals have in common with it: size and so on. ``ratio`` is the median divided by
    that of the fastest it is compared with, None where there is none. Where parity failed nothing was timed.
    """

    where: dict[str, str]
    name: str
    arithmetic: str
    median: float
    low: float
    high: float
    ratio: float | None
    error: float | None
    disagreement: float
    passed: bool

    @property
    def speedup(self) -> float | None:
        return None if self.ratio is None else 1 / self.ratio

    def fields(self) -> dict[str, Any]:
        values = asdict(self)
        return values.pop("where") | values


@torch.no_grad()
def untrained_model(preset: str = "paper", num_classes: int = 19) -> FastSCNN:
    """Random weights, the same ones every time, for speed and parity: what the labels show means nothing.

    Every batch norm has the statistics of a drawn street, and the last convolution is scaled so that each
    class has logits of mean 0 and variance 1 there: otherwise one class would win everywhere.
    """
    x = picture_tensor(street(0, 192, 256)[0])
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


def calibration_pictures() -> list[Tensor]:
    """Drawn streets, raw uint8 (1, 3, 256, 512), to measure the ranges of int8 on: everyone's."""
    return [picture_tensor(street(seed, 256, 512)[0]) for seed in range(8)]


def calibrated(model: FastSCNN) -> FastSCNN:
    """``model`` with its own ranges, or those of :func:`calibration_pictures` where it has none."""
    if model.ranges is None:
        calibrate(model, calibration_pictures())
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
    plain, last = Plain(model, "logits"), Plain(model, "logits", channels_last=True)
    ours = arithmetic_of(fast).name
    columns = x.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        calls: dict[str, Call | None] = {
            EAGER: partial(plain, x.contiguous()),
            EAGER_LAST: partial(last, columns),
            COMPILED: frozen(last, columns) if compiled else None,
            LOGITS: partial(fast, columns),
            LABELS: partial(fast.labels, columns),
        }
        contestants = [
            Contestant(name, call, ours if name in (LOGITS, LABELS) else "float32", (EAGER_LAST,))
            for name, call in calls.items()
            if call
        ]
        where = {"size": f"{x.shape[2]}x{x.shape[3]}"}
        exact = exact_logits(model, x)
        eager = {}
        for name in {"float32", ours}:
            dtype = _eager(name).dtype
            eager[name] = Parity.of(Plain(model, "logits", dtype)(x.to(dtype)), exact)
        return race(where, contestants, exact, eager, rounds)[0]


def arithmetic_of(fast: FusedFastSCNN) -> Arithmetic:
    """What a fused network computes in."""
    return choose(fast.backend, fast.dtype, fast.precision)


def _eager(arithmetic: str) -> Arithmetic:
    """What eager torch computes in where we compute in ``arithmetic``: it has no integers."""
    own = ARITHMETICS[arithmetic]
    return ARITHMETICS["float32"] if own.quantised else own


class Plain(nn.Module):
    """A copy of the network in plain torch, to logits or uint8 labels, in a dtype and memory format."""

    def __init__(
        self,
        model: FastSCNN,
        task: str,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.network = copy.deepcopy(model).to(dtype).eval()
        if channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.labels = task == "labels"

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network.reference(x)
        return labels_of(logits).to(torch.uint8) if self.labels else logits


def exact_logits(model: FastSCNN, x: Tensor) -> Tensor:
    """The plain network's in float64: the truth."""
    return Plain(model, "logits", torch.float64)(x.double())


def frozen(plain: Plain, x: Tensor) -> Call | None:
    """``plain(x)`` compiled with its weights frozen in; None, with a word, where that fails."""
    import torch._inductor.config as inductor

    torch.compiler.reset()
    call = partial(torch.compile(plain, dynamic=False), x)
    print("torch.compile is building its kernels, which takes a minute ...")
    try:
        with inductor.patch(freezing=True):
            call()
    except Exception as error:  # no C++ compiler, or whatever else inductor meets
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        print(f"torch.compile is left out: {reason}")
        return None
    return call


def race(
    where: dict[str, str],
    contestants: Sequence[Contestant],
    exact: Tensor,
    eager: Mapping[str, Parity],
    rounds: int,
    calls: int = 1,
    probes: Mapping[str, Probe] | None = None,
    bounds: Mapping[str, Bounds] = NETWORK_BOUNDS,
    timer: Timer | None = None,
) -> tuple[list[Result], dict[str, list[float]]]:
    """Parity first, then ``rounds`` turns of all contestants, of ``calls`` timed calls each.

    Args:
        exact: float64 logits (N, K, H, W).
        eager: eager torch's own parity, by arithmetic.
        probes: what else is measured in each turn, such as roofs.
        bounds: of parity, by arithmetic.
        timer: :func:`clock` by default.

    Returns:
        The results, and the samples of the probes.
    """
    parity = {c.name: Parity.of(c.call(), exact) for c in contestants}
    passed = {
        c.name: bounds[c.arithmetic].hold(parity[c.name], eager[c.arithmetic]) for c in contestants
    }
    timer = clock if timer is None else timer
    turns = {c.name: timer(c.call, len(exact), calls) for c in contestants if passed[c.name]}
    samples = interleaved({**turns, **(probes or {})}, rounds)
    quantiles = {name: np.quantile(samples.pop(name), (0.2, 0.5, 0.8)).tolist() for name in turns}
    results = []
    for c in contestants:
        low, median, high = quantiles.get(c.name, (np.nan, np.nan, np.nan))
        rivals = [quantiles[name][1] for name in c.against if name in quantiles]
        ratio = median / min(rivals) if rivals and passed[c.name] else None
        own = parity[c.name]
        results.append(
            Result(
                where,
                c.name,
                c.arithmetic,
                median,
                low,
                high,
                ratio,
                own.error,
                own.disagreement,
                passed[c.name],
            )
        )
    return results, samples


def clock(call: Callable[[], object], pictures: int = 1, calls: int = 1) -> Probe:
    """Milliseconds a picture of each of ``calls`` calls, after one that does not count: it warms the caches."""

    def turn() -> list[float]:
        call()
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3 / pictures)
        return times

    return turn


def interleaved(probes: Mapping[str, Probe], rounds: int) -> dict[str, list[float]]:
    """The samples of ``rounds`` turns: A B C, A B C, ...

    Before each is a pause: the idle threads of others spin for a while (onnxruntime's burn 23 ms).
    """
    samples: dict[str, list[float]] = {name: [] for name in probes}
    for _ in range(rounds):
        for name, probe in probes.items():
            time.sleep(_PAUSE)
            samples[name] += probe()
    return samples


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
        x = normalised(model, picture_tensor(street(0, height, width)[0]))
        results += compare(model, fast, x, rounds, compiled)
    return results


def machine(command: str) -> dict[str, str]:
    """What a measurement depends on, besides the networks."""
    return {
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "instruction set": registry.isa() if registry.isas() else "none",
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


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table in Markdown; every row has the same keys, which head the columns."""
    lines = [tuple(rows[0]), *(tuple(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in lines
    )


def _ms(value: float) -> str:
    return f"{value:.1f}" if value >= 3 else f"{value:.3f}"


def row(r: Result, compared: Mapping[str, str]) -> dict[str, str]:
    """A result as cells of :func:`markdown`, among them ``compared`` where parity allows to tell a speed."""
    speed = {
        "median ms": _ms(r.median),
        "20-80 % ms": f"{_ms(r.low)}-{_ms(r.high)}",
        "pictures/s": f"{1000 / r.median:.1f}",
        **compared,
    }
    if not r.passed:
        speed = {**dict.fromkeys(speed, ""), "median ms": "parity failed"}
    return {
        **r.where,
        "network": r.name,
        **speed,
        "error": "" if r.error is None else f"{r.error:.1e}",
        "other labels": f"{100 * r.disagreement:.4f} %",
    }


def table(results: Sequence[Result]) -> str:
    """The results as a table in Markdown."""
    return markdown(
        [row(r, {"speed-up": f"{r.speedup:.2f}x" if r.speedup else ""}) for r in results]
    )


def legend(arithmetic: str) -> str:
    """What the columns of :func:`table` mean, and what parity allows ``arithmetic``."""
    bounds = NETWORK_BOUNDS[arithmetic]
    return (
        "speed-up: against eager channels-last torch. Against the plain network in float64 on the same input:\n"
        "error: ||y - y64|| / ||y64 - mean per class|| of the logits; other labels: share of pixels.\n"
        f"Parity allows {bounds.error:g} and {100 * bounds.disagreement:g} %, or {bounds.factor:g} times what"
        f" eager torch errs in {_eager(arithmetic).name}."
    )


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]], about: dict[str, str]) -> None:
    """One line per row, with the machine in every line, unless the row says more exactly."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(dict.fromkeys([*rows[0], *about])))
    writer.writeheader()
    writer.writerows({**about, **row} for row in rows)
    write_whole(path, table.getvalue().encode())


#: Of bars, by how the name starts.
COLOURS = {
    EAGER: "#8d939e",
    "torch.compile": "#5c6370",
    "TensorRT": "#3b6ea8",
    "onnxruntime": "#3b6ea8",
    "OpenVINO": "#7b5aa6",
}
OURS = "#1f7a5c"


def plot(path: str | Path, results: Sequence[Result], title: str, columns: int = 1) -> None:
    """Bars of the medians with 20-80 % whiskers, a panel for each ``Result.where``, as PNG.

    Raises:
        ImportError: matplotlib is missing (the extra ``plot``).
    """
    panels: dict[str, list[Result]] = {}
    for r in results:
        panels.setdefault(", ".join(f"{key} {value}" for key, value in r.where.items()), []).append(
            r
        )
    lines = -(-len(panels) // columns)
    bars = max(map(len, panels.values()))
    chart = figure((9 * columns, 1.2 + lines * (0.55 + 0.42 * bars)))
    places = np.atleast_1d(chart.subplots(lines, columns)).flat
    for (name, own), axes in zip(panels.items(), places):
        for place, r in enumerate(own):
            colour = next((c for start, c in COLOURS.items() if r.name.startswith(start)), OURS)
            text = "parity failed"
            if r.passed:
                whiskers = [[r.median - r.low], [r.high - r.median]]
                axes.barh(place, r.median, xerr=whiskers, color=colour, ecolor="#222222")
                text = f"{_ms(r.median)} ms" + (f"  ({r.speedup:.2f}x)" if r.speedup else "")
            end = r.high if r.passed else 0
            axes.annotate(text, (end, place), (5, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(own)), [r.name for r in own])
        axes.invert_yaxis()
        axes.set_xlim(0, max((r.high for r in own if r.passed), default=1) * 1.3)
        axes.set_title(name, loc="left", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("milliseconds a picture, median and 20-80 %; less is better")
    for axes in places:  # what is left of the last line
        axes.remove()
    chart.suptitle(title, fontsize=9)
    write_whole(path, png(chart, dpi=130))


def chart_title(about: Mapping[str, str]) -> str:
    return (
        f"Fast-SCNN on {about['processor']}, {about['threads']} threads, torch {about['torch']},"
        f" {about['instruction set']}, {about['date']}"
    )
