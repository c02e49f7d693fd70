"""The weights that come along, full and slim: mIoU against the time that labels take, with the peers beside them.

    python benchmarks/bench_slim.py CAMVID [--threads 2] [--rounds 7] [--out FOLDER]

CAMVID has CamVid's train and val (docs/training.md). Everyone labels the same pictures at the same size, from raw pixels (ours) or
normalised floats (peers), and is timed in turns within one run, after its labels were compared with float64's; peers run the full
network, in int8 with ranges of the same training pictures as ours. --out receives bench_slim.csv, bench_slim.md and the picture.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_model import OURS, PEERS, Input, _installed, _nets, ours
from torch import Tensor

from fastscnn_fast import Weights, bench, load_checkpoint
from fastscnn_fast.bench import NETWORK_BOUNDS, Contestant
from fastscnn_fast.cli.options import count, size
from fastscnn_fast.data.classes import CAMVID_CLASSES, CAMVID_IGNORE
from fastscnn_fast.data.datasets import Examples
from fastscnn_fast.data.sources import open_source
from fastscnn_fast.plots import figure, png
from fastscnn_fast.program.parity import Parity
from fastscnn_fast.program.program import operations
from fastscnn_fast.runtime.segment import labelled
from fastscnn_fast.train.evaluate import score
from fastscnn_fast.writing import write_whole

FULL = "camvid11"
ARITHMETICS = ("float32", "bfloat16", "int8")
_CALIBRATED_BY = 16  # training pictures


def contestants(
    given: Mapping[str, Input], peers: Sequence[str]
) -> dict[tuple[str, str], Contestant]:
    """By weights and name: ours from raw pixels, the peers with the full network."""
    found = {}
    for weights, one in given.items():
        for c in ours(one, "labels", _nets(one.model, ARITHMETICS), fresh=False):
            if c.name.endswith("pixels"):
                found[weights, f"{OURS} {c.arithmetic}"] = c
    for peer in peers:
        for c in PEERS[peer](given[FULL], "labels", ARITHMETICS, False):
            found[FULL, c.name] = c
    return found


def passes(given: Input, c: Contestant) -> bool:
    """Parity, before it is timed."""
    return NETWORK_BOUNDS[c.arithmetic].hold(
        Parity.of(c.call(), given.exact), given.eager[c.arithmetic]
    )


def shown(given: Input, call: Callable[[], Tensor], pixels: Tensor) -> Tensor:
    """The labels of another picture."""
    given.show(pixels)
    return call()


def rows_of(
    given: Mapping[str, Input],
    found: Mapping[tuple[str, str], Contestant],
    val: Examples,
    at: tuple[int, int],
    rounds: int,
) -> list[dict[str, Any]]:
    """Time, score and ratios of each whose labels are right; of the others the name alone."""
    right = {key: c for key, c in found.items() if passes(given[key[0]], c)}
    turns = {" ".join(key): bench.clock(c.call, calls=3) for key, c in right.items()}
    samples = bench.interleaved(turns, rounds)
    medians = {key: float(np.median(samples[" ".join(key)])) for key in right}
    rivals = [ms for (_, name), ms in medians.items() if not name.startswith(OURS)]
    rows = []
    for (weights, name), c in found.items():
        row: dict[str, Any] = {
            "weights": weights,
            "network": name,
            "arithmetic": c.arithmetic,
            "operations": operations(given[weights].model.config, *at),
        }
        if (weights, name) in right:
            low, high = np.quantile(samples[f"{weights} {name}"], (0.2, 0.8))
            ms, own = medians[weights, name], medians.get((FULL, name))
            run = partial(shown, given[weights], c.call)
            labels = partial(labelled, run, given[weights].model.config, size=at)
            row |= {
                "miou": score(labels, val).miou,
                "ms": ms,
                "low": float(low),
                "high": float(high),
                "by_full": ms / own if own else None,
                "by_fastest_peer": ms / min(rivals) if rivals else None,
            }
        rows.append(row)
    return rows


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown."""

    def cell(row: Mapping[str, Any], name: str, form: str) -> str:
        value = row.get(name)
        return "" if value is None else format(value, form)

    return bench.markdown(
        [
            {
                "weights": row["weights"],
                "network": row["network"],
                "GFLOP": f"{row['operations'] / 1e9:.2f}",
                "mIoU": cell(row, "miou", ".4f"),
                "labels ms": cell(row, "ms", ".2f") or "parity failed",
                "20-80 % ms": f"{cell(row, 'low', '.2f')}-{cell(row, 'high', '.2f')}",
                "/ full": cell(row, "by_full", ".2f"),
                "/ fastest peer": cell(row, "by_fastest_peer", ".2f"),
            }
            for row in rows
        ]
    )


def picture(rows: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """mIoU against milliseconds, as PNG: ours joined by weights, each peer's arithmetics too."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if "ms" in row:
            name = row["network"].removesuffix(" " + row["arithmetic"])
            lines.setdefault(f"{name}, {row['weights']}" if name == OURS else name, []).append(row)
    chart = figure((9, 5))
    axes = chart.add_subplot()
    for name, points in lines.items():
        colour = next(
            (c for start, c in bench.COLOURS.items() if name.startswith(start)), bench.OURS
        )
        filled = "none" if name == f"{OURS}, {FULL}" else colour
        x, y = ([point[key] for point in points] for key in ("ms", "miou"))
        axes.plot(x, y, "o-", color=colour, markerfacecolor=filled, label=name, linewidth=1)
        for point in points:
            axes.annotate(
                point["arithmetic"],
                (point["ms"], point["miou"]),
                (4, 6),
                textcoords="offset points",
                fontsize=7,
            )
    axes.set_xscale("log")
    ticks = [1, 2, 3, 5, 10, 20, 30, 50, 100]
    axes.set_xticks(ticks, map(str, ticks))
    axes.set_xticks([], minor=True)
    every = [point["ms"] for points in lines.values() for point in points]
    axes.set_xlim(0.8 * min(every), 1.3 * max(every))
    axes.set_xlabel("milliseconds for the labels of a picture, median; less is better")
    axes.set_ylabel("mIoU on CamVid's validation pictures")
    axes.grid(alpha=0.3, which="both")
    axes.margins(0.12)
    axes.legend(fontsize=8)
    chart.suptitle(title, fontsize=8)
    return png(chart, dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
    """1 where a contestant failed parity."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="CAMVID")
    parser.add_argument(
        "--size", type=size, metavar="HxW", help="of the network's input (that of training)"
    )
    parser.add_argument("--threads", type=count, default=2, metavar="N")
    parser.add_argument("--rounds", type=count, default=7, metavar="R")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=("onnxruntime", "openvino"),
        default=["onnxruntime", "openvino"],
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    train, val = (
        open_source(args.data, split, len(CAMVID_CLASSES), CAMVID_IGNORE)
        for split in ("train", "val")
    )
    models = {str(weights): load_checkpoint(weights) for weights in Weights}
    at = args.size or models[FULL].config.size or (512, 1024)
    chosen = np.linspace(0, len(train) - 1, min(_CALIBRATED_BY, len(train))).round().astype(int)
    calibration: list[Tensor] = []
    for index in chosen:  # at the size of the network's input
        config = models[FULL].config
        labelled(_kept(calibration), config, train.read(int(index)).picture, at)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        given = {}
        for name, model in models.items():
            (Path(folder) / name).mkdir()
            drawn = Input.draw(model, 1, at, Path(folder) / name)
            given[name] = Input(model, drawn.pixels, drawn.folder, calibration)
        found = contestants(given, _installed(args.peers))
        rows = rows_of(given, found, Examples(val), at, args.rounds)
    about = bench.machine("python benchmarks/bench_slim.py " + shlex.join(argv))
    about["size"] = f"{at[0]}x{at[1]}"
    text = as_table(rows)
    print("\n".join([text, "", LEGEND, *(f"{key}: {value}" for key, value in about.items())]))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        bench.write_csv(args.out / "bench_slim.csv", rows, about)
        facts = "\n".join(f"- {key}: {value}" for key, value in about.items())
        (args.out / "bench_slim.md").write_text("\n\n".join([text, LEGEND, facts]) + "\n", "utf-8")
        title = f"{bench.chart_title(about)}, {about['size']}"
        write_whole(args.out / "bench_slim.png", picture(rows, title))
        print(f"wrote {args.out}")
    return 0 if all("ms" in row for row in rows) else 1


def _kept(pictures: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """Keeps what a network would be given."""

    def keep(x: Tensor) -> Tensor:
        pictures.append(x.contiguous())
        return x[:, 0]

    return keep


LEGEND = (
    "Labels at the size of the network's input; mIoU on labels of full size. / full: the median by that of the full network in"
    " the same arithmetic; / fastest peer: by that of the fastest peer with the full network in any arithmetic."
)


if __name__ == "__main__":
    sys.exit(main())
