"""The command line: segment, demo, bench, export, dump, tune, train, evaluate, info."""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from .. import __version__, bench
from ..arch.config import PRESETS, Config, preset
from ..backends import registry
from ..checkpoints import CAMVID11, load_checkpoint, read_details
from ..data import classes as data
from ..export import export_onnx
from ..lower.fold import fold
from ..program.layers import OPS
from ..runtime.fused import FusedFastSCNN, fuse
from ..runtime.model import FastSCNN
from ..runtime.segment import (
    PICTURE_SUFFIXES,
    label_image,
    overlay,
    read_picture,
    resized,
    run_size,
    segment,
)
from ..train import evaluate, trainer as train
from . import options

_SHORT_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
_LABELS, _OVERLAY = "_labels.png", "_overlay.png"
_DEMO_STREET = (12, 512, 1024)  # seed, height, width
_DEMO_ROUNDS = 10
_DEMO_PIXELS = 1024 * 2048  # speed is measured on at most so many: a large photo would take minutes


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 where all went well, 1 where some of the work failed, 2 where none could be done."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv)
    args.command_line = "python -m fastscnn_fast " + shlex.join(argv)
    try:
        status: int = args.run(args)
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        return 1
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"fastscnn_fast: error: {reason}", file=sys.stderr)
        return 2
    except (ValueError, RuntimeError, ImportError) as error:
        print(f"fastscnn_fast: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastscnn_fast: interrupted", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastscnn_fast", description="Fast-SCNN with fused inference kernels."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "segment",
        help="label every pixel of pictures",
        description="Write, for each picture NAME.*, its class ids as a palette PNG of the picture's own"
        f" size (NAME{_LABELS}) and the picture tinted by class with a legend (NAME{_OVERLAY}). Pictures that"
        " cannot be read are reported and skipped; the exit code is then 1.",
        epilog="Folders are searched with their subfolders, which reappear in OUT. Earlier results"
        f" (*{_LABELS}, *{_OVERLAY}) in them are no pictures. Where two pictures have one name, the second"
        " gets its ending added: NAME_png.",
    )
    command.add_argument(
        "pictures", nargs="+", type=Path, metavar="PICTURE_OR_FOLDER", help="what to segment"
    )
    command.add_argument("-o", "--out", type=Path, required=True, help="folder for the results")
    _add_network_options(command)
    command.add_argument(
        "--dtype",
        choices=options.DTYPES,
        default="float32",
        help="dtype to compute in (%(default)s)",
    )
    options.add_precision(command)
    command.add_argument(
        "--size",
        type=options.size,
        metavar="HxW",
        help="size the network runs at (as many pixels as the weights were trained at, else the picture's"
        " own size); the labels keep the picture's own size",
    )
    command.set_defaults(run=_segment)

    command = commands.add_parser(
        "demo",
        help="segment one picture, with speed and parity beside it",
        description="Segment a picture with the fused kernels, then compare speed and results with plain"
        " torch. Without IMAGE the package draws a street itself.",
    )
    command.add_argument("image", nargs="?", type=Path, metavar="IMAGE", help="a picture of yours")
    command.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("demo_out"),
        help="folder for the results (%(default)s)",
    )
    _add_network_options(command)
    command.set_defaults(run=_demo)

    command = commands.add_parser(
        "bench",
        help="time plain torch, torch.compile and the fused kernels side by side",
        description="Compare eager torch, eager channels-last torch, torch.compile with frozen weights and"
        " the fused kernels (logits and labels), in turns within one run, on a drawn street. Parity with"
        " float64 comes first: a contestant that fails it gets no speed-up, and the exit code is then 1.",
    )
    command.add_argument(
        "--size",
        type=options.size,
        nargs="+",
        metavar="HxW",
        default=[(512, 1024)],
        help="picture sizes (512x1024)",
    )
    command.add_argument(
        "--threads", type=options.count, metavar="N", help="CPU threads (torch's default)"
    )
    command.add_argument(
        "--preset", choices=PRESETS, default="paper", help="architecture (%(default)s)"
    )
    command.add_argument(
        "--rounds",
        type=options.count,
        metavar="R",
        default=30,
        help="timings of each (%(default)s)",
    )
    command.add_argument(
        "--no-compile",
        action="store_true",
        help="leave out torch.compile, which takes a minute a size",
    )
    command.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        default=Path("bench.png"),
        help="the bars as PNG (%(default)s); needs the extra [plot]",
    )
    command.add_argument("--csv", type=Path, metavar="FILE", help="write the table as CSV")
    command.set_defaults(run=_bench)

    command = commands.add_parser(
        "export",
        help="write the network as ONNX",
        description="Write the plain network as ONNX with free batch, height and width and exact pooling at"
        " every size. The input is float32 (n, C, h, w), normalised. Needs the extra [export].",
    )
    command.add_argument(
        "--onnx", type=Path, required=True, metavar="OUT", help="the file to write"
    )
    command.add_argument(
        "--weights",
        type=Path,
        metavar="F",
        default=CAMVID11,
        help="checkpoint, .safetensors or .pth (the package's own, CamVid's 11 classes)",
    )
    command.add_argument(
        "--size",
        type=options.size,
        metavar="HxW",
        default=(512, 1024),
        help="size to trace at, without influence on the result (512x1024)",
    )
    command.add_argument(
        "--output",
        choices=("logits", "labels"),
        default="logits",
        help="float32 (n, K, h, w) or uint8 (n, h, w) (%(default)s)",
    )
    command.set_defaults(run=_export)

    command = commands.add_parser(
        "dump",
        help="write the machine code of a fused op, and what a launcher needs to run it",
        description="Compile an op as one layer of the network runs it, and write each of its launches as"
        " OP_N.ptx, OP_N.cubin and OP_N.json: entry, grid, threads, shared memory, and the kernel's parameters"
        " in order with their shapes, strides and values. Needs no GPU, but Triton; for --backend cuda nvcc,"
        " the repository's sources and the built CUDA extension.",
    )
    command.add_argument(
        "--backend",
        choices=("triton", "cuda"),
        default="triton",
        help="whose kernels (%(default)s)",
    )
    command.add_argument("--op", choices=OPS, required=True, help="the fused op")
    command.add_argument(
        "--layer",
        metavar="L",
        help="which layer of the network, by name or number (the op's first)",
    )
    command.add_argument(
        "--arch", type=options.count, required=True, metavar="N", help="80 for sm_80 and so on"
    )
    command.add_argument(
        "--dtype",
        choices=(*options.DTYPES, *_SHORT_DTYPES),
        default="float16",
        help="dtype to compute in (%(default)s)",
    )
    command.add_argument(
        "--preset", choices=PRESETS, default="paper", help="architecture (%(default)s)"
    )
    command.add_argument(
        "--size",
        type=options.size,
        metavar="HxW",
        default=(1024, 2048),
        help="of the network's picture (1024x2048)",
    )
    command.add_argument(
        "--shape",
        type=options.count,
        nargs=2,
        metavar=("H", "W"),
        help="of the op's own input instead (feature_fusion: of high, low has a quarter of each side;"
        " upsample_classify: the result is 8 times as large)",
    )
    command.add_argument(
        "--output",
        choices=("logits", "probabilities", "labels"),
        default="logits",
        help="of upsample_classify (%(default)s)",
    )
    command.add_argument(
        "--raw", action="store_true", help="stem_conv takes uint8 pixels instead of floats"
    )
    command.add_argument("-o", "--out", type=Path, required=True, help="folder for the files")
    command.set_defaults(run=_dump)

    command = commands.add_parser(
        "tune",
        help="measure on your GPU how each layer runs fastest, and keep it",
        description="Time each layer's Triton kernel in several tiles, its CUDA kernel, and plain torch with batch"
        " norm folded, on the GPU in use, after parity. What is fastest is kept in"
        " ~/.cache/fastscnn_fast/tune.json, or where FASTSCNN_TUNE_CACHE says, by GPU, versions of torch and"
        " triton and what the CUDA extension was built for; both GPU backends follow it at these sizes from"
        " then on. Not measured on a GPU yet.",
    )
    network = command.add_mutually_exclusive_group()
    network.add_argument(
        "--preset", choices=PRESETS, default="paper", help="architecture (%(default)s)"
    )
    network.add_argument("--weights", type=Path, metavar="F", help="that of a checkpoint instead")
    command.add_argument(
        "--size",
        type=options.size,
        nargs="+",
        metavar="HxW",
        default=[(512, 1024)],
        help="picture sizes (512x1024)",
    )
    command.add_argument(
        "--batch", type=options.count, metavar="N", default=1, help="pictures a call (%(default)s)"
    )
    command.add_argument(
        "--dtype",
        choices=options.DTYPES,
        default="float16",
        help="dtype to compute in (%(default)s)",
    )
    options.add_precision(command)
    command.set_defaults(run=_tune)

    train.add_arguments(
        commands.add_parser(
            "train",
            help="learn from labelled pictures",
            description="Train a network by the paper's recipe, or what the options make of it. Data errors are"
            " found first and named by file. Ctrl-C and SIGTERM save before they stop. Under torchrun the"
            " batch is shared by all processes.",
        )
    )
    evaluate.add_arguments(
        commands.add_parser(
            "evaluate",
            help="score weights on labelled pictures",
            description="Print IoU per class, mIoU and pixel accuracy of plain torch on full-size labels, and how"
            " the fused network in each dtype differs from it.",
        )
    )
    command = commands.add_parser(
        "info",
        help="versions, compiler, instruction sets, backends",
        description="Print what this installation is made of, and why each backend can or cannot run.",
    )
    command.set_defaults(run=_info)
    return parser


def _add_network_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--weights",
        type=Path,
        metavar="F",
        default=CAMVID11,
        help="checkpoint, .safetensors or .pth (the package's own, CamVid's 11 classes)",
    )
    command.add_argument(
        "--backend",
        choices=("auto", *registry.BACKENDS),
        default="auto",
        help="kernels to run on (%(default)s: the best that can)",
    )


class Legend(NamedTuple):
    """Names and colours of a network's classes."""

    classes: Sequence[str]
    palette: Sequence[data.Colour]


def _legend(weights: Path, model: FastSCNN) -> Legend:
    """What the weights were saved with, else what is usual for so many classes."""
    classes, palette = data.class_names(model.config.num_classes)
    names = read_details(weights).get("classes")
    return Legend(names if names and len(names) == len(classes) else classes, palette)


# segment


def _segment(args: argparse.Namespace) -> int:
    model = load_checkpoint(args.weights)
    legend = _legend(args.weights, model)
    fast = fuse(model, args.backend, options.DTYPES[args.dtype], args.precision)
    args.out.mkdir(parents=True, exist_ok=True)
    jobs, problems = _jobs(args.pictures)
    for problem in problems:
        print(f"skipped {problem}", file=sys.stderr)
    skipped = len(problems)
    for path, name in tqdm(jobs, unit="picture", disable=True if len(jobs) == 1 else None):
        try:
            pixels = read_picture(path, fast.config.in_channels)
            labels = segment(fast, pixels, args.size)
        except ValueError as error:
            tqdm.write(f"skipped {error}", file=sys.stderr)
            skipped += 1
        else:
            _write(args.out / name, pixels, labels, legend)
    done = len(jobs) + len(problems) - skipped
    print(f"{done} segmented, {skipped} skipped; results: {args.out}/*{_LABELS}, *{_OVERLAY}")
    return 1 if skipped or not done else 0


def _jobs(arguments: Sequence[Path]) -> tuple[list[tuple[Path, Path]], list[str]]:
    """The pictures, each once, with distinct names for their results; and what is wrong with the rest."""
    jobs: dict[Path, tuple[Path, Path]] = {}
    problems, taken = [], set()
    for argument in arguments:
        if argument.is_dir():
            pictures = list(_pictures_in(argument))
            if not pictures:
                problems.append(f"{argument}: no pictures in this folder")
        else:
            pictures = [(argument, Path(argument.name))]
        for path, relative in pictures:
            if path.resolve() in jobs:
                continue
            name = next(name for name in _names(relative) if str(name).casefold() not in taken)
            taken.add(str(name).casefold())
            jobs[path.resolve()] = path, name
    return list(jobs.values()), problems


def _pictures_in(folder: Path) -> Iterator[tuple[Path, Path]]:
    for path in sorted(folder.rglob("*")):
        known = path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")
        if known and not path.name.endswith((_LABELS, _OVERLAY)) and path.is_file():
            yield path, path.relative_to(folder)


def _names(picture: Path) -> Iterator[Path]:
    """Names for the results of ``picture``, the plainest first."""
    plain = picture.with_suffix("")
    yield plain
    full = plain.with_name(f"{plain.name}_{picture.suffix[1:]}")
    yield full
    number = 2
    while True:
        yield full.with_name(f"{full.name}_{number}")
        number += 1


def _write(
    name: Path, pixels: NDArray[np.uint8], labels: NDArray[np.uint8], legend: Legend
) -> list[Path]:
    """Both results of one picture."""
    files = [name.with_name(name.name + ending) for ending in (_LABELS, _OVERLAY)]
    name.parent.mkdir(parents=True, exist_ok=True)
    label_image(labels, legend.palette).save(files[0])
    overlay(pixels, labels, *legend).save(files[1], compress_level=3)
    return files


# demo


def _demo(args: argparse.Namespace) -> int:
    model = load_checkpoint(args.weights)
    legend = _legend(args.weights, model)
    fast = fuse(model, args.backend)
    args.out.mkdir(parents=True, exist_ok=True)
    files, truth = [], None
    if args.image is None:
        name = "street"
        picture, truth = data.street(*_DEMO_STREET)
        files = [args.out / "street.png", args.out / "street_truth.png"]
        Image.fromarray(picture).save(files[0])
        overlay(picture, truth, data.CAMVID_CLASSES, data.CAMVID_PALETTE).save(files[1])
        pixels = read_picture(picture, model.config.in_channels)
    else:
        name = args.image.stem
        pixels = read_picture(args.image, model.config.in_channels)
    labels = segment(fast, pixels)
    files += _write(args.out / name, pixels, labels, legend)
    print("wrote " + ", ".join(map(str, files)))
    if truth is not None and tuple(legend.classes) == data.CAMVID_CLASSES:
        scores = evaluate.Confusion(len(legend.classes))
        scores.add(truth, labels)
        print(f"labels of the street: {scores.accuracy:.1%} right, mIoU {scores.miou:.3f}")

    height, width = run_size(pixels, model.config)
    shrink = min(1.0, (_DEMO_PIXELS / (height * width)) ** 0.5)
    pixels = resized(pixels, (max(32, round(height * shrink)), max(32, round(width * shrink))))
    x = bench.normalised(model, bench.picture_tensor(pixels))
    results = bench.compare(model, fast, x, _DEMO_ROUNDS, compiled=False)
    _report(results, _about(fast, args))
    return 0 if all(result.passed for result in results) else 1


def _about(fast: FusedFastSCNN, args: argparse.Namespace) -> dict[str, str]:
    return {"backend": fast.backend, **bench.machine(args.command_line)}


def _report(results: Sequence[bench.Result], about: dict[str, str]) -> None:
    print()
    print(bench.table(results))
    print()
    print(bench.LEGEND)
    print("\n".join(f"{key}: {value}" for key, value in about.items()))


# bench, export, dump, tune, info


def _bench(args: argparse.Namespace) -> int:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model = bench.untrained_model(args.preset)
    fast = fuse(model)
    results = bench.bench(model, fast, args.size, args.rounds, not args.no_compile)
    about = _about(fast, args)
    _report(results, about)
    if args.csv is not None:
        bench.write_csv(args.csv, [result.fields() for result in results], about)
        print(f"wrote {args.csv}")
    try:
        bench.plot(args.plot, results, bench.chart_title(about))
    except ImportError as error:
        print(f"no plot: {error}")
    else:
        print(f"wrote {args.plot}")
    return 0 if all(result.passed for result in results) else 1


def _export(args: argparse.Namespace) -> int:
    model = load_checkpoint(args.weights)
    export_onnx(model, args.onnx, args.output, args.size)
    config = model.config
    print(
        f"wrote {args.onnx}: x float32 (n, {config.in_channels}, h, w) -> {args.output};"
        f" n free, h and w free from 32\n"
        f"x = (pixels / 255 - mean) / std with mean {config.mean}, std {config.std}"
    )
    return 0


def _dump(args: argparse.Namespace) -> int:
    from ..backends.gpu import dump

    if args.backend == "triton" and find_spec("triton") is None:
        raise registry.CannotRun("dump needs the package triton, which is not installed")
    if args.arch not in dump.ARCHITECTURES:
        known = ", ".join(map(str, dump.ARCHITECTURES))
        raise ValueError(f"arch must be one of {known}, got {args.arch}")
    dtype = options.DTYPES[_SHORT_DTYPES.get(args.dtype, args.dtype)]
    if args.arch < 80 and dtype == torch.bfloat16:
        raise ValueError(
            f"dtype must be float16 or float32 for sm_{args.arch}, which has no bfloat16"
        )
    shape = args.shape and (args.shape[0], args.shape[1])
    step = dump.step(preset(args.preset), args.op, args.layer, args.size, shape)
    plan = dump.launches(step, dtype, args.arch, args.output, args.raw, args.backend)
    for path in dump.write(args.out, step, plan, args.arch):
        print(f"wrote {path}")
    return 0


def _tune(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise registry.CannotRun("tune measures on a GPU, and torch finds none on this machine")
    device, dtype = torch.device("cuda", torch.cuda.current_device()), options.DTYPES[args.dtype]
    if args.weights is None:
        model = bench.untrained_model(args.preset)
    else:
        model = load_checkpoint(args.weights)
    from ..backends.gpu import choices, tune

    layers = []
    chosen: dict[str, choices.Choice] = {}
    for found in tune.tune(fold(model), args.size, args.batch, dtype, args.precision, device):
        print(found.summary, flush=True)
        layers.append(found)
        if found.best is not None:
            chosen[found.key] = found.best.choice
            file = choices.save(chosen, device)  # at once: an interruption loses one layer
    print("\n" + bench.markdown([found.row() for found in layers]))
    for found in layers:
        for trial in found.trials:
            if trial.problem:
                print(f"left out: {found.name}, {tune.named(trial.choice)}: {trial.problem}")
    if chosen:
        print(f"wrote {file}")
    return 0 if len(chosen) == len(layers) else 1


def _info(args: argparse.Namespace) -> int:
    print(f"fastscnn_fast {__version__}, Python {platform.python_version()}")
    print(f"processor: {bench.processor()}, {torch.get_num_threads()} threads")
    packages = "torch numpy pillow safetensors matplotlib onnx onnxscript onnxruntime triton"
    print("packages: " + ", ".join(f"{name} {_version(name)}" for name in packages.split()))
    if registry.isas():
        module = registry.cpu_module()
        compiler = module.compiler if module.compiler[0].isalpha() else f"GCC {module.compiler}"
        openmp = "with" if module.openmp else "WITHOUT"
        print(f"C++ kernels: built by {compiler}, {openmp} OpenMP")
        for arithmetic in registry.ARITHMETICS:
            sets = ", ".join(registry.isas(arithmetic)) or "none"
            print(f"instruction sets that run here, {arithmetic}: {sets}")
        print(f"instruction set in use: {_or_error(registry.isa)}")
    else:
        print("C++ kernels: not built")
    for name, reason in registry.report().items():
        print(f"backend {name}: {'can run' if reason is None else f'cannot run: {reason}'}")
    for dtype in registry.CPU_DTYPES:
        choose = partial(registry.choose, "auto", Config(), torch.device("cpu"), dtype)
        print(f"backend in use for {dtype} on the CPU: {_or_error(choose)}")
    return 0


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
