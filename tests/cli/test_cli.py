"""The command line as a new user meets it."""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastscnn_fast import __version__, bench, calibrate, checkpoints, cli, fuse, segment
from fastscnn_fast.backends import registry
from fastscnn_fast.cli import demo, options
from fastscnn_fast.data.classes import CAMVID_PALETTE, colours_of, numbered
from fastscnn_fast.data.scenes import street
from fastscnn_fast.program.parity import relative_error

UNTRAINED_MODEL = functools.cache(bench.untrained_model)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "untrained.safetensors"
    model = UNTRAINED_MODEL(num_classes=11)
    checkpoints.save_checkpoint(model, path, {"classes": [f"kind {k}" for k in range(11)]})
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch, weights):
    """Small pictures, weights that take them as they are, and one thread: threads of busy machines wait for
    each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(bench, "untrained_model", UNTRAINED_MODEL)
    monkeypatch.setattr(bench, "_PAUSE", 0.0)
    monkeypatch.setattr(options, "CAMVID11", weights)
    monkeypatch.setattr(demo, "_STREET", (12, 64, 96))
    monkeypatch.setattr(demo, "_ROUNDS", 1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    image = Image.fromarray(street(2, 48, 64)[0])
    for name in ("a.png", "a.jpg", "b.png", "sub/a.png"):
        image.save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_segment_writes_labels_and_overlay_for_each_picture(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["segment", str(pictures), "-o", str(out)]) == 0
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*.png"))
    stems = ("a", "a_png", "b", "sub/a")
    assert names == sorted(f"{s}_{kind}.png" for s in stems for kind in ("labels", "overlay"))
    with Image.open(out / "b_labels.png") as labels:
        assert (labels.mode, labels.size) == ("P", (64, 48)) and np.asarray(labels).max() < 11
    assert capsys.readouterr().out.startswith("4 segmented, 0 skipped")


def test_classes_are_called_and_shown_as_the_weights_say(pictures, tmp_path):
    """By name and in the saved colours; a foreign file of 11 classes has neither, least of all CamVid's."""
    model = UNTRAINED_MODEL(num_classes=11)
    torch.save(model.state_dict(), tmp_path / "foreign.pth")
    model = copy.deepcopy(model)
    model.classes = [f"kind {k}" for k in range(11)]
    model.palette = [(k, 255 - k, 7) for k in range(11)]
    checkpoints.save_checkpoint(model, tmp_path / "named.safetensors")
    for name, palette in (
        ("named.safetensors", model.palette),
        ("foreign.pth", colours_of(numbered(11))),
    ):
        command = ["segment", str(pictures / "b.png"), "--weights", str(tmp_path / name)]
        assert cli.main([*command, "-o", str(tmp_path / "out")]) == 0
        with Image.open(tmp_path / "out" / "b_labels.png") as labels:
            shown = np.array(labels.getpalette()[:33]).reshape(11, 3)
            ids = np.asarray(labels)
        assert shown.tolist() == [list(colour) for colour in palette]
        with Image.open(tmp_path / "out" / "b_overlay.png") as image:
            legend = {tuple(colour) for colour in np.asarray(image)[48:].reshape(-1, 3).tolist()}
        assert {palette[k] for k in np.unique(ids)} <= legend
        assert not legend & set(CAMVID_PALETTE[1:])  # the first is a grey, as edges of letters are


def test_results_are_no_pictures_the_next_time(pictures, capsys):
    for _ in range(2):
        assert cli.main(["segment", str(pictures), "-o", str(pictures)]) == 0
        assert capsys.readouterr().out.startswith("4 segmented")


def test_a_picture_given_twice_is_segmented_once(pictures, tmp_path, capsys):
    arguments = [str(pictures / "b.png"), str(pictures / "sub" / ".." / "b.png"), str(pictures)]
    assert cli.main(["segment", *arguments, "-o", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("4 segmented")


def test_unreadable_pictures_are_reported_and_skipped(pictures, tmp_path, capsys):
    (pictures / "broken.jpg").write_bytes((pictures / "a.jpg").read_bytes()[:200])
    (tmp_path / "empty").mkdir()
    arguments = [str(pictures), str(tmp_path / "nowhere.png"), str(tmp_path / "empty")]
    assert cli.main(["segment", *arguments, "-o", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("4 segmented, 3 skipped")
    for what in ("broken.jpg: cannot be read", "nowhere.png: does not exist", "empty: no pictures"):
        assert what in printed.err
    assert not list((tmp_path / "out").glob("broken*"))


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"backend": "reference"},
        {"precision": "high"},
        {"dtype": "bfloat16", "backend": "auto"},
    ],
    ids=str,
)
def test_segment_runs_what_its_options_say(chosen, pictures, tmp_path):
    model = UNTRAINED_MODEL("tramac", num_classes=7)
    picture, weights, out = pictures / "b.png", tmp_path / "net.safetensors", tmp_path / "out"
    checkpoints.save_checkpoint(model, weights)
    command = ["segment", str(picture), "--weights", str(weights), "--size", "64x96"]
    told = [word for name, value in chosen.items() for word in (f"--{name}", value)]
    assert cli.main([*command, *told, "-o", str(out)]) == 0
    dtype = getattr(torch, chosen.pop("dtype", "float32"))
    expected = segment(fuse(model, dtype=dtype, **chosen), picture, (64, 96))
    with Image.open(out / "b_labels.png") as labels:
        assert np.array_equal(np.asarray(labels), expected)


def test_bits_reach_the_network(tmp_path, capsys, caplog):
    """A dark picture of 16 bits is not brightened where it is said that it has 16."""
    dark = (street(4, 48, 64)[0][..., 0] // 5).astype(np.uint16) * 300
    Image.fromarray(dark).save(tmp_path / "dark.png")
    results = {}
    for name, words in (("guessed", []), ("14", ["--bits", "14"]), ("16", ["--bits", "16"])):
        out = tmp_path / name
        assert cli.main(["segment", str(tmp_path / "dark.png"), "-o", str(out), *words]) == 0
        with Image.open(out / "dark_overlay.png") as overlay:
            results[name] = np.asarray(overlay).copy()
    assert np.array_equal(results["guessed"], results["14"])
    assert not np.array_equal(results["16"], results["14"])
    assert caplog.text.count("taken for one of 14 bits") == 1
    with pytest.raises(SystemExit):
        cli.main(["segment", "x.png", "-o", "out", "--bits", "7"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "nowhere.pth"], "nowhere.pth: No such file"),
        (["--backend", "triton"], "backend triton cannot run: "),
        (
            ["--backend", "cpu", "--dtype", "float16"],
            "dtype must be torch.float32, torch.bfloat16 or torch.int8, got torch.float16",
        ),
        (
            ["--backend", "cpu", "--dtype", "bfloat16", "--precision", "high"],
            "dtype must be torch.float32, got torch.bfloat16",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_2(
    arguments, message, pictures, tmp_path, capsys
):
    command = ["segment", str(pictures), "-o", str(tmp_path / "out"), *arguments]
    assert cli.main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fastscnn_fast: error: ") and message in error


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["segment", "x.png"],
        ["segment", "x.png", "-o", "out", "--size", "31x64"],
        ["segment", "x.png", "-o", "out", "--size", "wide"],
        ["segment", "x.png", "-o", "out", "--precision", "medium"],
        ["bench", "--threads", "0"],
        ["bench", "--preset", "nothing"],
        ["export"],
    ],
)
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: fastscnn_fast" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["segmnt", "x.png", "-o", "out"], "segment"),
        (["eval", "data"], "evaluate"),
        (["export", "--onx", "net.onnx"], "--onnx"),  # before it is missed
        (["segment", "--wieghts", "net.pth", "x.png", "-o", "out"], "--weights"),
        (["segment", "x.png", "-o", "out", "--WIEGHTS=net.pth"], "--weights"),
        (["segment", "x.png", "-out", "out"], "--out"),  # which is -o ut
        (["segment", "x.png", "-weights", "net.pth", "-o", "out"], "--weights"),
        (["train", "data", "-o", "run", "--epcohs", "3"], "--epochs"),
        (["segment", "x.png", "-o", "out", "--backend", "tritn"], "triton"),
        (["segment", "x.png", "-o", "out", "--dtype", "flaot16"], "float16"),
        (["bench", "--preset", "tramack"], "tramac"),
        (["dump", "--op", "dsconf", "--arch", "80", "-o", "out"], "dsconv"),
        (["--verison"], "--version"),
    ],
)
def test_a_slip_is_told_what_it_may_mean(arguments, meant, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    usage, error = capsys.readouterr().err.rsplit("\n", 2)[:2]
    assert error.endswith(f", did you mean {meant}?") and usage.startswith("usage: fastscnn_fast")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["segment", "x.png", "-o", "out", "--zoom", "3"],
            "segment: error: unrecognized option --zoom",
        ),
        (["segment", "x.png", "-o", "out", "--backend", "gpu"], "invalid choice: 'gpu'"),  # no cpu
        (["segment", "x.png", "-o", "out", "--bits", "1"], "invalid choice: 1"),
        (["segment", "x.png", "-o", "out", "--size", "64", "96"], "unrecognized arguments: 96"),
        (["info", "it"], "info: error: unrecognized arguments: it"),
    ],
)
def test_what_is_like_nothing_has_no_suggestion(arguments, said, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    error = capsys.readouterr().err
    assert said in error and "did you mean" not in error


def test_values_that_look_like_options_are_values(pictures, tmp_path):
    """Numbers, what has a space, what follows ``--``; and beginnings of options are options."""
    args = cli._parser(["train", "data"]).parse_args(["train", "data", "-o", "x", "--ignore", "-1"])
    assert args.ignore == -1
    (pictures / "--b b.png").write_bytes((pictures / "b.png").read_bytes())
    command = ["segment", "-o", str(tmp_path / "out"), "--siz", "64", "--"]
    assert cli.main([*command, str(pictures / "--b b.png"), str(pictures / "b.png")]) == 0


def test_a_size_is_two_sides_or_one_of_a_square():
    assert options.size("512x1024") == (512, 1024) and options.size("33X512") == (33, 512)
    assert options.size("512") == (512, 512)
    for wrong in ("31", "", "x", "64x", "64x64x64", "-64", "64.5", "1024,512"):
        with pytest.raises(
            argparse.ArgumentTypeError, match="HEIGHTxWIDTH or the side of a square"
        ):
            options.size(wrong)
    for wrong in ("1000000x1000000", "32769"):
        with pytest.raises(argparse.ArgumentTypeError, match="^must be at most 1073741824 pixels"):
            options.size(wrong)


@pytest.mark.parametrize("name", ["float16", "fp16", "FP16", "torch.float16"])
def test_a_dtype_has_short_names_wherever_one_is_named(name):
    for command, chosen in (
        ("segment x -o out --dtype", "float16"),
        ("evaluate data --dtype", ["float32", "float16"]),
        ("tune --dtype", "float16"),
        ("dump --op dsconv --arch 80 -o out --dtype", "float16"),
    ):
        words = command.split() + (["fp32"] if isinstance(chosen, list) else []) + [name]
        assert cli._parser(words).parse_args(words).dtype == chosen
    words = ["train", "data", "-o", "run", "--dtype", name.replace("16", "32")]
    assert cli._parser(words).parse_args(words).dtype == "float32"
    words[-1] = "bf16"
    assert cli._parser(words).parse_args(words).dtype == "bfloat16"


def test_help_has_what_users_and_what_developers_run_apart(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    users, developers = printed.split("\ncommands:")[1].split("commands for work on the kernels:")
    assert re.findall(r"^  (\w+)  ", users, re.MULTILINE) == [
        *("segment", "demo", "train", "prune", "quantize", "evaluate", "app", "export", "info")
    ]
    assert re.findall(r"^  (\w+)  ", developers, re.MULTILINE) == ["bench", "tune", "dump"]


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"fastscnn_fast {__version__}\n"


def test_no_gpu_is_said_to_be_none(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(registry, "_cuda_module", SimpleNamespace(on_host=False))
    monkeypatch.setattr(registry, "find_spec", lambda name: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "GPU: there is no GPU, torch finds none\n" in printed
    for backend in registry.GPU_BACKENDS:
        assert f"backend {backend}: cannot run: there is no GPU, torch finds none\n" in printed
    assert "must be cuda" not in printed
    for backend in registry.GPU_BACKENDS:
        assert cli.main(["segment", "a.png", "-o", str(tmp_path), "--backend", backend]) == 2
        said = f"backend {backend} cannot run: there is no GPU, torch finds none"
        assert capsys.readouterr().err == f"fastscnn_fast: error: {said}\n"
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    assert registry.report()["triton"] == "the package triton is not installed"
    for command in (["tune"], ["evaluate", "streets:1", "--device", "cuda"]):
        assert cli.main(command) == 2
        assert capsys.readouterr().err.strip().endswith(": there is no GPU, torch finds none")


def test_demo_draws_segments_and_measures(tmp_path, capsys):
    assert cli.main(["demo", "-o", str(tmp_path)]) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["street.png", "street_labels.png", "street_overlay.png", "street_truth.png"]
    printed = capsys.readouterr().out
    for what in (bench.EAGER_LAST, bench.LOGITS, bench.LABELS, "backend: ", "64x96"):
        assert what in printed
    assert "parity failed" not in printed


@pytest.mark.parametrize(("size", "measured"), [((20, 50), "32x50"), ((96, 192), "64x128")])
def test_demo_takes_a_picture_of_any_size(size, measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "_PIXELS", 64 * 128)
    Image.fromarray(street(3, *size)[0]).save(tmp_path / "mine.png")
    out = tmp_path / "out"
    assert cli.main(["demo", str(tmp_path / "mine.png"), "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"| {measured} " in printed
    if registry.isas():  # that of the kernels which were measured
        assert f"instruction set: {registry.isa_of('float32')}\n" in printed
    assert sorted(path.name for path in out.iterdir()) == ["mine_labels.png", "mine_overlay.png"]
    with Image.open(out / "mine_labels.png") as labels:
        assert labels.size == size[::-1]


def test_bench_prints_a_table_and_writes_csv_and_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = [tmp_path / "bench.csv", tmp_path / "bench.png"]
    arguments = ["--size", "32x64", "33x49", "--rounds", "2", "--threads", "2"]
    outputs = ["--no-compile", "--csv", str(files[0]), "--plot", str(files[1])]
    assert cli.main(["bench", *arguments, "--preset", "tramac", *outputs]) == 0
    printed = capsys.readouterr().out
    assert "| 33x49 | fastscnn_fast labels" in printed and "threads: 2" in printed
    with open(files[0], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == 2 * [
        bench.EAGER,
        bench.EAGER_LAST,
        bench.LOGITS,
        bench.LABELS,
    ]
    assert all(row["passed"] == "True" and row["threads"] == "2" for row in rows)
    with Image.open(files[1]) as plot:
        assert plot.format == "PNG" and plot.width > 600


def test_benchs_files_are_whole_and_their_folders_found_in_time(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(bench, "bench", lambda *_: pytest.fail("it measured"))
    of_a_file = tmp_path / "file" / "x"
    for command in (["bench", "--csv"], ["bench", "--plot"], ["export", "--onnx"]):
        assert cli.main([*command, str(of_a_file)]) == cli.main([*command, str(tmp_path)]) == 2
        error = capsys.readouterr().err.splitlines()
        rule = f"fastscnn_fast: error: {command[1]} must be a file that can be written, got"
        assert error[0] == f"{rule} {of_a_file} ({tmp_path}/file: Not a directory)"
        assert error[1] == f"{rule} {tmp_path} (Is a directory)"

    written = {}
    monkeypatch.setattr(bench, "write_whole", lambda path, content: written.update({path: content}))
    result = bench.Result({"size": "8x8"}, "a", "float32", 1.0, 1.0, 1.0, None, 0.0, 0.0, True)
    monkeypatch.setattr(bench, "bench", lambda *_: [result])
    files = [tmp_path / "new" / "folder" / name for name in ("x.csv", "x.png")]
    assert cli.main(["bench", "--csv", str(files[0]), "--plot", str(files[1])]) == 0
    assert written[files[0]].startswith(b"size,name,") and written[files[1]].startswith(b"\x89PNG")
    assert not (tmp_path / "new").exists()  # nothing was written, and no folder is left


def test_bench_goes_on_where_torch_compile_fails(monkeypatch, tmp_path, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("no C++ compiler here\nwith a long story")

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: fail)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--size", "32x32", "--rounds", "1"]) == 0
    assert (tmp_path / "bench.png").exists()
    assert "torch.compile is left out: no C++ compiler here\n" in capsys.readouterr().out


@pytest.mark.slow
def test_bench_measures_torch_compile(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--size", "64x96", "--rounds", "2"]) == 0
    assert f"| {bench.COMPILED}" in capsys.readouterr().out


def test_a_plot_without_matplotlib_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command = ["bench", "--size", "32x32", "--rounds", "1", "--no-compile"]
    assert cli.main([*command, "--plot", str(tmp_path / "x.png")]) == 0
    printed = capsys.readouterr().out
    assert "| 32x32 |" in printed and "fastscnn_fast[plot]" in printed


def test_a_contestant_that_fails_parity_gets_no_speed_up():
    model = bench.untrained_model(num_classes=3)
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.classifier.conv.weight.mul_(1.01)
    x = bench.normalised(model, bench.picture_tensor(street(0, 64, 64)[0]))
    results = {r.name: r for r in bench.compare(model, fuse(wrong), x, 1, compiled=False)}
    assert results[bench.EAGER].passed and results[bench.EAGER_LAST].speedup == 1
    assert not results[bench.LOGITS].passed and results[bench.LOGITS].speedup is None
    assert "parity failed" in bench.table(list(results.values()))


def test_relative_error_sees_nan_and_is_blind_to_no_offset():
    exact = torch.randn(2, 3, 8, 8, dtype=torch.float64) + 1000
    assert relative_error(exact.float() + 1, exact) > 0.5
    assert relative_error(torch.full_like(exact, float("nan")), exact) == float("inf")
    assert relative_error(exact, exact) == 0


def test_the_untrained_model_is_always_the_same_and_predicts_every_class():
    first, second = (UNTRAINED_MODEL.__wrapped__(num_classes=5) for _ in range(2))
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert not first.training
    with torch.no_grad():
        labels = first.reference(bench.picture_tensor(street(1)[0])).argmax(1)
    assert len(labels.unique()) == 5


def test_info_tells_instruction_sets_by_arithmetic(monkeypatch, capsys):
    monkeypatch.delenv("FASTSCNN_ISA", raising=False)
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    if not registry.isas():
        assert "C++ kernels: not built" in printed
        return
    for arithmetic in registry.CPU_ARITHMETICS:
        sets = ", ".join(registry.isas(arithmetic)) or "none"
        assert f"instruction sets that run here, {arithmetic}: {sets}\n" in printed
        best = sets.split(", ")[-1]
        assert f"instruction set in use, {arithmetic}: {best}\n" in printed
    assert "backend in use for torch.bfloat16 on the CPU: cpu\n" in printed


def test_info_and_help_run_as_a_module():
    for arguments, expected in ((["info"], "backend reference: can run"), (["--help"], "segment")):
        run = subprocess.run(
            [sys.executable, "-m", "fastscnn_fast", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == 0 and expected in run.stdout, run.stderr


def camvid_like(root, count=3):
    """Labelled streets as files."""
    for split, seeds in (("train", range(count)), ("val", range(50, 52))):
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True)
        for seed in seeds:
            picture, labels = street(seed, 64, 96)
            Image.fromarray(picture).save(root / split / "images" / f"{seed}.png")
            Image.fromarray(labels).save(root / split / "labels" / f"{seed}.png")
    return [str(root), "--classes", "11", "--ignore", "11"]


def test_quantize_measures_scores_and_writes(weights, tmp_path, capsys):
    """And what it wrote runs in int8 by every command that takes it."""
    data = camvid_like(tmp_path / "data")
    out = tmp_path / "new" / "int8.safetensors"
    command = ["quantize", *data, "--weights", str(weights), "-o", str(out)]
    assert cli.main([*command, "--pictures", "2", "--method", "min-max"]) == 0
    printed = capsys.readouterr().out
    assert "ranges of 2 pictures of train, by min-max\n2 pictures of val\n" in printed
    rows = re.findall(r"^fused, \w+, (\w+) .* ([\d.]+) % +[\d.]+$", printed, re.MULTILINE)
    assert [name for name, _ in rows] == ["float32", "int8"]
    assert float(rows[0][1]) == 100 and 50 < float(rows[1][1]) < 100
    before, after = (checkpoints.load_checkpoint(path) for path in (weights, out))
    assert before.ranges is None and after.classes == before.classes
    assert all(map(torch.equal, before.state_dict().values(), after.state_dict().values()))
    with (
        Image.open(tmp_path / "data/train/images/0.png") as first,
        Image.open(tmp_path / "data/train/images/2.png") as last,
    ):
        assert after.ranges == calibrate(before, [first, last], "min-max")

    picture = str(tmp_path / "data/val/images/50.png")
    chosen = ["--weights", str(out), "--dtype", "int8"]
    assert cli.main(["segment", picture, "-o", str(tmp_path / "out"), *chosen]) == 0
    with Image.open(tmp_path / "out" / "50_labels.png") as labels:
        expected = segment(fuse(after, dtype=torch.int8), picture)
        assert np.array_equal(np.asarray(labels), expected)
    assert cli.main(["evaluate", *data, *chosen]) == 0
    assert re.search(r"^fused, \w+, int8 .* [\d.]+ %", capsys.readouterr().out, re.MULTILINE)
    assert cli.main(["demo", picture, "-o", str(tmp_path / "out"), *chosen]) in (0, 1)
    printed = capsys.readouterr().out
    assert "arithmetic: int8" in printed and "Parity allows 0.25 and 1 %" in printed


def test_quantize_keeps_what_is_in_the_file(tmp_path, capsys):
    """Half the bytes stay half the bytes, details stay."""
    model = UNTRAINED_MODEL(num_classes=11)
    path, out = tmp_path / "half.safetensors", tmp_path / "int8.safetensors"
    checkpoints.save_checkpoint(model, path, {"miou": 0.25}, torch.float16)
    data = camvid_like(tmp_path / "data", 1)
    assert cli.main(["quantize", *data, "--weights", str(path), "-o", str(out)]) == 0
    assert "ranges of 1 picture of train, by least-squares" in capsys.readouterr().out
    assert checkpoints.read_details(out) == {"miou": 0.25}
    assert checkpoints.stored_dtype(out) == torch.float16
    assert 0 < out.stat().st_size - path.stat().st_size < 10_000
    assert checkpoints.load_checkpoint(out).ranges is not None


def test_quantize_refuses(weights, tmp_path, capsys):
    data = camvid_like(tmp_path / "data", 1)
    good = str(tmp_path / "o.safetensors")
    for words, message in (
        ([*data, "-o", str(tmp_path / "o.pth")], "--out must end in .safetensors, got "),
        ([*data, "-o", good, "--splits", "test", "val"], "test/images: no such folder"),
        ([str(tmp_path), "-o", good], "classes.txt: missing"),
        (["streets:1", "-o", good], "has classes kind 0, kind 1"),
    ):
        assert cli.main(["quantize", *words, "--weights", str(weights)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "o.safetensors").exists()
    command = ["segment", str(tmp_path / "data/val/images/50.png"), "-o", str(tmp_path / "out")]
    assert cli.main([*command, "--weights", str(weights), "--dtype", "int8"]) == 2
    assert "int8 needs the ranges of the network's values" in capsys.readouterr().err


def test_bench_in_other_dtypes(tmp_path, capsys):
    """Ours alone is computed in them; int8 needs weights that mean something."""
    capsys.readouterr()
    assert cli.main(["bench", "--dtype", "int8", "--preset", "mmseg"]) == 2
    assert "--weights must be given for int8, since rounding" in capsys.readouterr().err
    files = ["--plot", str(tmp_path / "bench.png"), "--csv", str(tmp_path / "bench.csv")]
    for name in ("bfloat16", "int8"):  # rounding tells in the labels of tiny pictures
        command = ["bench", "--size", "256x384", "--rounds", "1", "--no-compile", *files]
        assert cli.main([*command, "--dtype", name]) == 0
        printed = capsys.readouterr().out
        assert f"arithmetic: {name}" in printed and "parity failed" not in printed
        with open(tmp_path / "bench.csv", newline="") as file:
            found = [row["arithmetic"] for row in csv.DictReader(file)]
        assert found == ["float32", "float32", name, name]
