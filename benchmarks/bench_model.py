"""The whole network against its peers: parity first, then everyone in turns within one process.

    python benchmarks/bench_model.py [--size 512x1024 1024x2048] [--threads 1 2] [--stages] [--out FOLDER]

How it is kept fair, and what the columns mean: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastscnn_fast import FastSCNN, FusedFastSCNN, bench, fuse, load_checkpoint, ops
from fastscnn_fast.arch.config import PRESETS
from fastscnn_fast.backends import registry
from fastscnn_fast.bench import Contestant, Plain, Probe, Result
from fastscnn_fast.cli.options import count, size
from fastscnn_fast.data.scenes import street
from fastscnn_fast.export import export_onnx
from fastscnn_fast.program.parity import Parity
from fastscnn_fast.program.program import layer_sizes

OURS, ORT, OPENVINO, OPENVINO_BF16 = "fastscnn_fast", "onnxruntime", "OpenVINO", "OpenVINO bfloat16"
ORT_INT8, OPENVINO_INT8 = "onnxruntime int8", "OpenVINO int8"
FRESH = ", fresh output"
COPY = "copy"
TASKS = ("logits", "labels")

#: Left out of untrained networks, where their labels would differ too often to be timed.
ROUGH = ("high", "int8")

_ROOF_SECONDS = 0.02
_COPIED = 1 << 25  # floats: 128 MiB, more than a core's caches hold


@dataclass(frozen=True)
class Input:
    """Drawn streets of one size, raw uint8 (N, C, H, W), and the truth about them."""

    model: FastSCNN
    pixels: Tensor
    folder: Path
    calibration_pictures: Sequence[Tensor] = ()  # for peers' int8; drawn streets by default
    _floats: dict[torch.dtype, Tensor] = field(default_factory=dict)

    @staticmethod
    def draw(model: FastSCNN, batch: int, size: tuple[int, int], folder: Path) -> Input:
        streets = [bench.picture_tensor(street(seed, *size)[0]) for seed in range(batch)]
        return Input(model, torch.cat(streets), folder)

    @property
    def where(self) -> dict[str, str]:
        n, _, h, w = self.pixels.shape
        batch = f"{n} of " if n > 1 else ""
        return {"size": f"{batch}{h}x{w}", "threads": str(torch.get_num_threads())}

    @cached_property
    def x(self) -> Tensor:
        """Normalised, contiguous float32: what all but ``uint8 pixels`` and channels-last torch take."""
        return bench.normalised(self.model, self.pixels).contiguous()

    def floats(self, dtype: torch.dtype) -> Tensor:
        """:attr:`x` in ``dtype``, the same memory each time."""
        return self._floats.setdefault(dtype, self.x.to(dtype))

    def show(self, pixels: Tensor) -> None:
        """Another picture of the same size, in the memory that contestants read."""
        self.pixels.copy_(pixels)
        self.x.copy_(bench.normalised(self.model, pixels))
        for one in self._floats.values():
            one.copy_(self.x)

    @cached_property
    def exact(self) -> Tensor:
        return bench.exact_logits(self.model, self.x)

    @cached_property
    def eager(self) -> dict[str, Parity]:
        """How far eager torch is from the truth in each arithmetic's dtype of floats."""
        return {
            name: Parity.of(
                Plain(self.model, "logits", one.floats)(self.x.to(one.floats)), self.exact
            )
            for name, one in registry.CPU_ARITHMETICS.items()
        }

    @cached_property
    def flops(self) -> dict[str, int]:
        """Floating-point operations of a picture, by the stages of ``ops.network_stages``."""
        stages: dict[str, int] = {}
        blocks = 0
        for step in layer_sizes(self.model.config, *self.pixels.shape[2:]):
            part = step.layer.name.split(".")[0]
            stage = {"stem": "downsample", "fusion": "classifier", "upsample": "classifier"}.get(
                part, part
            )
            if step.layer.op == "inverted_residual":
                stage, blocks = f"block{blocks}", blocks + 1
            stages[stage] = stages.get(stage, 0) + step.flops
        return stages

    def result(self, task: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory for a result, touched."""
        n, _, h, w = self.pixels.shape
        if task == "labels":
            return torch.zeros(n, h, w, dtype=torch.uint8)
        return torch.zeros(n, self.model.config.num_classes, h, w, dtype=dtype)

    def onnx(self, task: str) -> str:
        """A file of the plain network, for any size; labels are ArgMax and Cast to uint8 in its graph."""
        path = self.folder / f"{task}.onnx"
        if not path.exists():
            export_onnx(self.model, path, "labels" if task == "labels" else "logits")
        return str(path)

    def calibration(self) -> list[dict[str, Any]]:
        """Pictures to measure the ranges of int8 on, as the network's inputs in ONNX."""
        return [
            {"x": bench.normalised(self.model, pixels).contiguous().numpy()}
            for pixels in self.calibration_pictures or bench.calibration_pictures()
        ]


# ---------------------------------------------------------------- contestants


def ours(
    given: Input, task: str, nets: Mapping[str, FusedFastSCNN], fresh: bool
) -> Iterator[Contestant]:
    for arithmetic, fast in nets.items():
        name = f"{OURS} {arithmetic}"
        run = fast.labels if task == "labels" else fast
        floats = registry.CPU_ARITHMETICS[arithmetic].floats
        x, out = given.floats(floats), given.result(task, floats)
        yield Contestant(name, partial(run, x, out=out), arithmetic)
        if task == "labels":
            yield Contestant(
                f"{name}, uint8 pixels", partial(run, given.pixels, out=out), arithmetic
            )
        if fresh:
            yield Contestant(name + FRESH, partial(run, x), arithmetic)


def eager(given: Input, task: str, wanted: Collection[str], fresh: bool) -> Iterator[Contestant]:
    last = given.x.contiguous(memory_format=torch.channels_last)
    for name, arithmetic, x in (
        (bench.EAGER, "float32", given.x),
        (bench.EAGER_LAST, "float32", last),
        (f"{bench.EAGER_LAST}, bfloat16", "bfloat16", last.bfloat16()),
    ):
        if arithmetic in wanted:
            plain = Plain(given.model, task, x.dtype, channels_last=x is not given.x)
            yield Contestant(name, partial(plain, x), arithmetic)


def compiled(given: Input, task: str, wanted: Collection[str], fresh: bool) -> Iterator[Contestant]:
    x = given.x.contiguous(memory_format=torch.channels_last)
    call = bench.frozen(Plain(given.model, task, channels_last=True), x)
    if call is not None:
        yield Contestant(bench.COMPILED, call)


def onnxruntime(
    given: Input, task: str, wanted: Collection[str], fresh: bool
) -> Iterator[Contestant]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    n, _, h, w = given.x.shape
    for axis, length in {"n": n, "h": h, "w": w}.items():
        options.add_free_dimension_override_by_name(axis, length)

    def contestants(name: str, arithmetic: str, network: str) -> Iterator[Contestant]:
        session = ort.InferenceSession(network, options, ["CPUExecutionProvider"])
        out, binding = given.result(task), session.io_binding()
        for bind, value, array in (
            (binding.bind_input, "x", given.x.numpy()),
            (binding.bind_output, task, out.numpy()),
        ):
            bind(value, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

        def run() -> Tensor:
            session.run_with_iobinding(binding)
            return out

        yield Contestant(name, run, arithmetic)
        if fresh:
            pictures = {"x": given.x.numpy()}
            yield Contestant(
                name + FRESH,
                lambda: torch.from_numpy(session.run([task], pictures)[0]),
                arithmetic,
            )

    yield from contestants(ORT, "float32", given.onnx(task))
    if "int8" in wanted:
        yield from contestants(ORT_INT8, "int8", _onnxruntime_int8(given, task))


def _onnxruntime_int8(given: Input, task: str) -> str:
    """A file of the network quantised by onnxruntime, for any size: all operators that it can, per channel."""
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path, prepared = (str(given.folder / f"{task}_{kind}.onnx") for kind in ("int8", "prepared"))
    if not Path(path).exists():
        # Symbolic shapes, which it would leave in the current folder, fail on a network of free size.
        quant_pre_process(given.onnx(task), prepared, skip_symbolic_shape=True)
        pictures = iter(given.calibration())

        class Reader(q.CalibrationDataReader):  # type: ignore[misc]
            def get_next(self) -> dict[str, Any] | None:
                return next(pictures, None)

        q.quantize_static(
            prepared,
            path,
            Reader(),
            quant_format=q.QuantFormat.QDQ,
            per_channel=True,
            activation_type=q.QuantType.QUInt8,
            weight_type=q.QuantType.QInt8,
        )
    return path


def openvino(given: Input, task: str, wanted: Collection[str], fresh: bool) -> Iterator[Contestant]:
    import openvino as ov

    core = ov.Core()
    halves = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")

    def tensor(t: Tensor) -> Any:
        """The same memory."""
        if t.dtype == torch.bfloat16:
            return ov.Tensor(t.view(torch.int16).numpy(), ov.Shape(t.shape), ov.Type.bf16)
        return ov.Tensor(t.numpy(), shared_memory=True)

    def contestant(name: str, arithmetic: str, reuse: bool) -> Contestant:
        floats = registry.CPU_ARITHMETICS[arithmetic].floats
        x, out = given.floats(floats), given.result(task, floats)
        int8 = arithmetic == "int8"
        network = core.read_model(_openvino_int8(given, task) if int8 else given.onnx(task))
        network.reshape({"x": list(x.shape)})
        if arithmetic == "bfloat16":  # its input and logits too, as ours
            types = ov.preprocess.PrePostProcessor(network)
            types.input().tensor().set_element_type(ov.Type.bf16)
            if task == "logits":
                types.output().tensor().set_element_type(ov.Type.bf16)
            network = types.build()
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            # What int8 leaves in floats is fastest in bfloat16 too.
            "INFERENCE_PRECISION_HINT": "bf16" if halves and arithmetic != "float32" else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
        }
        request = core.compile_model(network, "CPU", settings).create_infer_request()
        request.set_input_tensor(tensor(x))

        def fill(out: Tensor, x: Tensor = x) -> Tensor:  # x: its memory must outlive the request
            request.set_output_tensor(tensor(out))
            request.start_async()  # infer() would copy the result
            request.wait()
            return out

        if reuse:
            return Contestant(name, partial(fill, out), arithmetic)
        return Contestant(name + FRESH, lambda: fill(torch.empty_like(out)), arithmetic)

    names = {OPENVINO: "float32"}
    if halves and "bfloat16" in wanted:
        names[OPENVINO_BF16] = "bfloat16"
    if "int8" in wanted:
        if find_spec("nncf") is None:
            print(f"{OPENVINO_INT8} is left out: nncf not installed (the extra bench has it)")
        else:
            names[OPENVINO_INT8] = "int8"
    for name, arithmetic in names.items():
        yield contestant(name, arithmetic, reuse=True)
        if fresh:
            yield contestant(name, arithmetic, reuse=False)


def _openvino_int8(given: Input, task: str) -> str:
    """A file of the network quantised by nncf, for any size."""
    import nncf
    import openvino as ov

    path = given.folder / f"{task}_int8.xml"
    if not path.exists():
        pictures = given.calibration()
        quantised = nncf.quantize(
            ov.Core().read_model(given.onnx(task)),
            nncf.Dataset(pictures),
            preset=nncf.QuantizationPreset.PERFORMANCE,
            subset_size=len(pictures),
        )
        ov.save_model(quantised, path, compress_to_fp16=False)
    return str(path)


PEERS: dict[str, Callable[[Input, str, Collection[str], bool], Iterator[Contestant]]] = {
    "eager": eager,
    "compile": compiled,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


def paired(contestants: Sequence[Contestant]) -> list[Contestant]:
    """Each with those that its time is divided by: README.md, ``ratio``."""
    peers = {c.name: c for c in contestants if not c.name.startswith(OURS)}
    wide = [name for name in (ORT, OPENVINO) if name in peers]
    wide = wide or [name for name, c in peers.items() if c.arithmetic == "float32"]

    def against(c: Contestant) -> tuple[str, ...]:
        names = {
            "bfloat16": [*wide, OPENVINO_BF16],
            "int8": [name for name in peers if not name.endswith(FRESH)],
        }.get(c.arithmetic, wide)
        return tuple(name + FRESH for name in names) if c.name.endswith(FRESH) else tuple(names)

    return [replace(c, against=against(c)) for c in contestants]


# ---------------------------------------------------------------- roofs


def multiply_adds(arithmetic: str) -> Probe:
    """GFLOP/s on registers alone."""
    cpu, isa, threads = registry.cpu_module(), registry.isa(), torch.get_num_threads()
    return lambda: [cpu.multiply_add_roof(isa, arithmetic, threads, _ROOF_SECONDS) / 1e9]


def copying() -> Probe:
    """GB/s, read and written, of a large copy by torch."""
    source, target = torch.ones(_COPIED), torch.ones(_COPIED)
    turn = bench.clock(lambda: target.copy_(source))
    return lambda: [2 * source.nbytes / ms / 1e6 for ms in turn()]


# ---------------------------------------------------------------- measuring


class Report:
    """What was measured, printed as it comes and written at the end."""

    def __init__(self) -> None:
        self.results: list[Result] = []
        self.records: list[dict[str, Any]] = []
        self.tables: list[str] = []

    def show(self, rows: Sequence[Mapping[str, str]]) -> None:
        self.tables.append(bench.markdown(rows))
        print(f"\n{self.tables[-1]}", flush=True)

    def race(
        self,
        given: Input,
        task: str,
        nets: Mapping[str, FusedFastSCNN],
        peers: Sequence[str],
        args: argparse.Namespace,
    ) -> None:
        contestants = list(ours(given, task, nets, args.fresh))
        wanted = {"float32", *nets} | ({"bfloat16"} if "int8" in nets else set())
        for name in peers:
            contestants += PEERS[name](given, task, wanted, args.fresh)
        results, samples = bench.race(
            given.where | {"task": task},
            paired(contestants),
            given.exact,
            given.eager,
            args.rounds,
            args.calls,
            {name: multiply_adds(name) for name in nets} | {COPY: copying()},
        )
        rates = {name: float(np.median(values)) for name, values in samples.items()}
        medians = {r.name: r.median for r in results if r.passed}
        rows = []
        for r in results:
            own = medians.get(r.name.replace(f"{OURS} int8", f"{OURS} bfloat16"))
            quantised = r.passed and r.name.startswith(f"{OURS} int8")
            by_own = r.median / own if quantised and own is not None else None
            rate = rates.get(r.arithmetic)
            roof = None if rate is None else sum(given.flops.values()) / rate / 1e6
            compared = {
                "ratio": _figure(r.ratio),
                **({"/ bfloat16": _figure(by_own)} if "int8" in nets else {}),
                "/ roof": _figure(None if roof is None else r.median / roof),
            }
            rows.append(bench.row(r, compared))
            rates_of_row = {"gflop_per_s": rate, "copy_gb_per_s": rates[COPY]}
            self.records.append(
                {**r.fields(), "by_own_bfloat16": by_own, "roof": roof, **rates_of_row}
            )
        self.results += results
        self.show(rows)
        self.show(
            [given.where | {"roof": name, "a second": _rate(name, rates[name])} for name in rates]
        )

    def stages(self, given: Input, nets: Mapping[str, FusedFastSCNN], rounds: int) -> None:
        """Where the time of one picture to logits goes, beside the roof measured in turns with it."""
        rows = []
        for arithmetic, fast in nets.items():
            x = given.x[:1].to(registry.CPU_ARITHMETICS[arithmetic].floats)
            run = partial(ops.network_stages, x, fast.weights, fast.program, dtype=fast.dtype)
            turns: list[dict[str, float]] = []

            def turn(
                run: Callable[[], list[tuple[str, float]]] = run,
                turns: list[dict[str, float]] = turns,
            ) -> list[float]:
                run()
                turns.append(dict(run()))
                return [sum(turns[-1].values())]

            samples = bench.interleaved({"all": turn, "roof": multiply_adds(arithmetic)}, rounds)
            rate = float(np.median(samples["roof"]))
            seconds = {name: [stages[name] for stages in turns] for name in turns[0]}
            seconds["all"] = samples["all"]
            work = given.flops | {"all": sum(given.flops.values())}
            for name, times in seconds.items():
                roof, reached = work[name] / rate / 1e6, float(np.median(times)) * 1e3
                rows.append(
                    given.where
                    | {
                        "arithmetic": arithmetic,
                        "stage": name,
                        "MFLOP": f"{work[name] / 1e6:.0f}",
                        "roof ms": f"{roof:.2f}",
                        "reached ms": f"{reached:.2f}",
                        "/ roof": f"{reached / roof:.2f}",
                    }
                )
        self.show(rows)

    def write(self, folder: Path, about: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        bench.write_csv(folder / "bench_model.csv", self.records, about)
        facts = "\n".join(f"- {key}: {value}" for key, value in about.items())
        text = "\n\n".join([*self.tables, LEGEND, facts]) + "\n"
        (folder / "bench_model.md").write_text(text, encoding="utf-8")
        try:
            title = bench.chart_title(about)
            bench.plot(folder / "bench_model.png", self.results, title, columns=2)
        except ImportError as error:
            print(f"no plot: {error}")
        print(f"wrote {folder}")


def _rate(name: str, rate: float) -> str:
    return f"{rate:.1f} GB" if name == COPY else f"{rate:.0f} GFLOP"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


LEGEND = (
    "ratio: the median by that of the fastest of onnxruntime and OpenVINO in float32 (where neither ran: of any peer in"
    " float32), for bfloat16 also of OpenVINO in bfloat16, for int8 of any peer in any arithmetic. / bfloat16: our int8's"
    " median by that of our bfloat16. / roof: the median by the time that the network's operations"
    " take on registers alone. Times are of one picture. error and other labels: against the plain network in float64,"
    " checked first."
)


def _nets(model: FastSCNN, arithmetics: Sequence[str]) -> dict[str, FusedFastSCNN]:
    """Ours, by arithmetic; one that cannot run here is left out with a word."""
    nets = {}
    for name in arithmetics:
        dtype, precision = registry.CPU_ARITHMETICS[name].asked
        try:
            nets[name] = fuse(model, "cpu", dtype, precision)
        except registry.CannotRun as error:
            print(f"{OURS} {name} is left out: {error}")
    return nets


def _installed(peers: Sequence[str]) -> list[str]:
    """Those that can be measured; of others it is said that they are left out."""
    needs = {"onnxruntime": ("onnxruntime", "onnxscript"), "openvino": ("openvino", "onnxscript")}
    found = []
    for name in peers:
        missing = [package for package in needs.get(name, ()) if find_spec(package) is None]
        if missing:
            print(f"{name} is left out: {' and '.join(missing)} not installed")
        else:
            found.append(name)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """1 where a contestant failed parity."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several = partial(parser.add_argument, nargs="+")
    several("--size", type=size, default=[(512, 1024), (1024, 2048)], metavar="HxW")
    several("--threads", type=count, default=[1, 2], metavar="N")
    several("--tasks", choices=TASKS, default=TASKS)
    several(
        "--arithmetics",
        choices=registry.CPU_ARITHMETICS,
        help="all; high and int8 only with --weights, as untrained networks amplify what they round off",
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--batch", type=count, default=1, metavar="N")
    parser.add_argument("--rounds", type=count, default=30, metavar="R", help="turns (%(default)s)")
    parser.add_argument(
        "--calls",
        type=count,
        default=3,
        metavar="C",
        help="timed calls in each turn, after one that does not count (%(default)s)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="also with a fresh output for each call"
    )
    parser.add_argument(
        "--stages", action="store_true", help="also the network's stages by their roofs"
    )
    network = parser.add_mutually_exclusive_group()
    network.add_argument(
        "--preset", choices=PRESETS, default="paper", help="untrained (%(default)s)"
    )
    network.add_argument("--weights", metavar="FILE", help="trained weights instead")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write CSV, Markdown and a plot")
    args = parser.parse_args(argv)

    trained = args.weights is not None
    model = load_checkpoint(args.weights) if trained else bench.untrained_model(args.preset)
    if args.arithmetics is None:
        args.arithmetics = [n for n in registry.CPU_ARITHMETICS if trained or n not in ROUGH]
        if not trained:
            rough = " and ".join(ROUGH)
            print(
                f"{rough} are left out: untrained networks amplify what they round off (--weights)"
            )
    if "int8" in args.arithmetics:
        bench.calibrated(model)
    nets, peers, report = _nets(model, args.arithmetics), _installed(args.peers), Report()
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        for one in args.size:
            given = Input.draw(model, args.batch, one, Path(folder))
            for threads in args.threads:
                torch.set_num_threads(threads)
                for task in args.tasks:
                    report.race(given, task, nets, peers, args)
                if args.stages:
                    report.stages(given, nets, args.rounds)
    about = bench.machine("python benchmarks/bench_model.py " + shlex.join(argv))
    about["threads"] = " and ".join(map(str, args.threads))
    print(f"\n{LEGEND}\n" + "\n".join(f"{key}: {value}" for key, value in about.items()))
    if args.out is not None:
        report.write(args.out, about)
    return 0 if all(r.passed for r in report.results) else 1


if __name__ == "__main__":
    sys.exit(main())
