"""What ``segment`` takes from the command line, what it calls the results, and how it ends."""

from __future__ import annotations

import functools
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastscnn_fast import bench, checkpoints, cli, fuse, segment
from fastscnn_fast.cli import options, results
from fastscnn_fast.data import pictures
from fastscnn_fast.data.jobs import find
from fastscnn_fast.data.scenes import street

UNTRAINED_MODEL = functools.cache(bench.untrained_model)
PICTURE = street(2, 48, 64)[0]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "untrained.safetensors"
    checkpoints.save_checkpoint(UNTRAINED_MODEL(num_classes=11), path)
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, weights: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(options, "CAMVID11", weights)
    monkeypatch.chdir(tmp_path)


def draw(*names: str, picture: np.ndarray = PICTURE) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(name)


def names(*arguments: str) -> list[str]:
    """What the results of these are called."""
    return [str(job.name) for job in find(arguments).jobs]


def files(out: str = "out") -> list[str]:
    return sorted(str(path.relative_to(out)) for path in Path(out).rglob("*") if path.is_file())


def test_equal_names_from_two_folders_keep_their_folders() -> None:
    draw("run1/a.png", "run1/b.png", "run1/sub/a.png", "run2/a.png", "run2/a.jpg", "run2/sub/a.png")
    draw("x/1/c.png", "y/1/c.png", "y/2/d.png")
    assert names("run1/a.png", "run2/a.png") == ["run1/a", "run2/a"]
    assert names("run1", "run2") == [
        *("run1/a", "b", "run1/sub/a"),
        *("run2/a", "run2/a_png", "run2/sub/a"),
    ]
    assert names("x/1/c.png", "y/1/c.png", "y/2/d.png") == ["x/1/c", "y/1/c", "d"]
    assert names("run2/a.jpg", "run2/a.png") == ["a", "a_png"]
    assert names("run1/sub", "run1/a.png") == ["sub/a", "run1/a"]


def test_names_that_only_case_tells_apart_do_not_meet() -> None:
    draw("A/x.png", "a/x.png", "a/X.png")
    found = names("A/x.png", "a/x.png", "a/X.png")
    assert len({name.casefold() for name in found}) == 3


def test_the_results_of_equal_names_are_each_theirs(capsys: pytest.CaptureFixture[str]) -> None:
    draw("one/a.png")
    draw("two/a.png", picture=PICTURE[:32])
    assert cli.main(["segment", "one/a.png", "two/a.png", "-o", "out"]) == 0
    for folder, height in (("one", 48), ("two", 32)):
        with Image.open(f"out/{folder}/a_labels.png") as labels:
            assert labels.size == (64, height)
    assert capsys.readouterr().out.startswith("2 segmented, 0 skipped; results: out/*_labels.png")


def test_links_to_pictures_that_are_there_are_counted_and_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    draw("in/b.png", "in/sub/c.png", "in/sub/d.png", "elsewhere/e.png")
    for link, target in (
        ("in/a.png", "b.png"),  # sorted before what it leads to
        ("in/again", "sub"),
        ("in/elsewhere", "../elsewhere"),
        ("in/out.png", "../elsewhere/e.png"),
    ):
        os.symlink(target, link)
    assert cli.main(["segment", "in", "in/sub/../b.png", "-o", "out"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(
        "4 segmented, 0 skipped, 5 left out (links to others, or given twice); "
    )
    assert printed.err.splitlines() == [
        "left out in/a.png: is a link to in/b.png, which is there already",
        f"left out in/again: is a link to {Path('in/sub').resolve()}, which is searched already",
        "left out in/out.png: is a link to in/elsewhere/e.png, which is there already",
        "left out in/sub/../b.png: is the same as in/b.png, which is there already",
    ]
    stems = ("b", "elsewhere/e", "sub/c", "sub/d")
    assert files() == [f"{s}_{kind}.png" for s in stems for kind in ("labels", "overlay")]


def test_what_is_no_file_is_named_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """As an argument and in a folder alike; what is no picture by its name is no matter."""
    draw("in/a.png", "in/deep/b.png")
    for link, target in (
        ("in/loop", "loop"),
        ("in/x.png", "y.png"),
        ("in/y.png", "x.png"),
        ("in/deep/up", ".."),
        ("in/gone.jpg", "nowhere.jpg"),
        ("in/gone.txt", "nowhere.txt"),
        ("in/zero.png", "/dev/zero"),
    ):
        os.symlink(target, link)
    os.mkfifo("in/camera")
    os.mkfifo("in/.hidden.png")
    Path("in/clip.mp4").write_bytes(b"")
    Path("in/notes.txt").write_text("no picture")
    arguments = ["in/loop", "in/camera", "/dev/null", "https://example.org/a.png", "in/clip.mp4"]
    assert cli.main(["segment", "in", *arguments, "-o", "out"]) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        "skipped in/camera: is a pipe",
        f"skipped in/deep/up: is a link in a circle, to {Path('in').resolve()}",
        "skipped in/gone.jpg: is a link to nowhere.jpg, which does not exist",
        "skipped in/loop: is a link in a circle",
        "skipped in/x.png: is a link in a circle",
        "skipped in/y.png: is a link in a circle",
        "skipped in/zero.png: is a device",
        "skipped in/loop: is a link in a circle",
        "skipped in/camera: is a pipe",
        "skipped /dev/null: is a device",
        "skipped https://example.org/a.png: is a URL, and only files are read: download it first",
        "left out in/clip.mp4: is the same as in/clip.mp4, which is there already",
        "skipped in/clip.mp4: is empty",
    ]
    assert printed.out.startswith(
        "2 segmented, 12 skipped, 1 left out (links to others, or given twice); "
    )


def test_folders_that_cannot_be_searched_or_hold_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw("in/a.png", "in/locked/b.png")
    Path("empty/sub").mkdir(parents=True)
    real = os.scandir

    def scandir(path: Path) -> object:
        if path.name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert find(["empty", "in"]).problems == [
        "empty: no pictures in this folder",
        "in/locked: cannot be searched: Permission denied",
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["segment", "", "-o", "out"],
        ["segment", "in", "-o", ""],
        ["segment", "in", "-o", "out", "--weights", ""],
        ["demo", ""],
        ["demo", "-o", ""],
        ["bench", "--csv", ""],
        ["bench", "--plot", ""],
        ["export", "--onnx", ""],
        ["dump", "--op", "dsconv", "--arch", "80", "--out", ""],
        ["tune", "--weights", ""],
        ["train", "", "-o", "out"],
        ["train", "in", "-o", ""],
        ["evaluate", ""],
        ["evaluate", "in", "-o", ""],
    ],
    ids=" ".join,
)
def test_an_empty_argument_is_not_the_current_folder(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    draw("a.png", "in/a.png")
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2 and "must not be empty, got ''" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["a.png", "in"]


def test_where_nothing_was_segmented_no_results_are_told_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("broken.png").write_bytes(b"no picture")
    for words in (["absent.mp4"], ["broken.png"], ["absent.mp4", "broken.png"]):
        assert cli.main(["segment", *words, "-o", "out"]) == 1
        assert capsys.readouterr().out == f"0 segmented, {len(words)} skipped\n"
        assert not Path("out").exists()


@pytest.mark.parametrize("command", ["segment", "demo"])
def test_a_folder_for_results_that_cannot_be_is_named_by_its_option(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    draw("p/a.png")
    rule = "fastscnn_fast: error: --out must be a folder that can be made and written to"
    for out, said in (
        ("p/a.png", "Not a directory"),
        ("p/a.png/x", "p/a.png: Not a directory"),
        ("n" * 300, "File name too long"),
    ):
        assert cli.main([command, "p/a.png", "-o", out]) == 2
        assert capsys.readouterr().err == f"{rule}, got {out} ({said})\n"


def test_overlays_as_jpeg_or_not_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    draw("in/a.png")
    for words, endings in (
        ([], ["_labels.png", "_overlay.png"]),
        (["--overlay-format", "jpg"], ["_labels.png", "_overlay.jpg"]),
        (["--no-overlay"], ["_labels.png"]),
        (["--labels-only"], ["_labels.png"]),
        (["--no-overlay", "--confidence"], ["_labels.png", "_confidence.png"]),
    ):
        out = "_".join(["out", *words])
        assert cli.main(["segment", "in", "-o", out, *words]) == 0
        assert files(out) == sorted(f"a{ending}" for ending in endings)
        results = ", *".join(endings)
        assert capsys.readouterr().out == f"1 segmented, 0 skipped; results: {out}/*{results}\n"
    labels = {Path(out, "a_labels.png").read_bytes() for out in os.listdir() if out != "in"}
    assert len(labels) == 1
    with (
        Image.open("out/a_overlay.png") as png,
        Image.open("out_--overlay-format_jpg/a_overlay.jpg") as jpg,
    ):
        assert jpg.format == "JPEG" and jpg.size == png.size
        difference = np.asarray(png).astype(int) - np.asarray(jpg.convert("RGB"))
        assert np.abs(difference).mean() < 6
    with pytest.raises(SystemExit):
        cli.main(["segment", "in", "-o", "out", "--no-overlay", "--overlay-format", "jpg"])


def test_results_of_every_kind_are_no_pictures_the_next_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    draw("in/a.png")
    for _ in range(2):
        for kind in ("jpg", "png"):
            words = ["--confidence", "--overlay-format", kind]
            assert cli.main(["segment", "in", "-o", "in", *words]) == 0
            assert capsys.readouterr().out.startswith("1 segmented, 0 skipped")
    assert len(files("in")) == 5


def test_confidence_is_255_where_the_network_is_certain() -> None:
    draw("a.png")
    assert cli.main(["segment", "a.png", "-o", "out", "--confidence", "--size", "64x96"]) == 0
    fast = fuse(UNTRAINED_MODEL(num_classes=11))
    labels, confidence = segment(fast, "a.png", (64, 96), confidence=True)
    with Image.open("out/a_confidence.png") as image:
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), np.rint(255 * confidence).astype(np.uint8))
    with Image.open("out/a_labels.png") as image:
        assert np.array_equal(np.asarray(image), labels)


def test_a_picture_too_large_for_jpeg_is_skipped_whole(capsys: pytest.CaptureFixture[str]) -> None:
    draw("in/b.png")
    draw("in/a.png", picture=np.zeros((65501, 2, 3), np.uint8))
    words = ["--overlay-format", "jpg", "--size", "32x64"]
    assert cli.main(["segment", "in", "-o", "out", *words]) == 1
    printed = capsys.readouterr()
    assert "skipped in/a.png: a JPEG must have at most 65500 pixels a side, got " in printed.err
    assert printed.out.startswith("1 segmented, 1 skipped") and files() == [
        "b_labels.png",
        "b_overlay.jpg",
    ]


def test_messages_keep_the_pictures_order_and_one_bad_picture_does_not_stop_the_rest(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Threads finish in any order; guesses of bits are told in the pictures' order too."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    dark = np.full((40, 48), 1000, np.uint16)
    for k in range(12):
        draw(f"in{k}/p{k:02}.png")
        if k % 3 == 1:
            content = Path(f"in{k}/p{k:02}.png").read_bytes()
            Path(f"in{k}/p{k:02}.png").write_bytes(content[: len(content) // 2])
        if k % 3 == 2:
            Image.fromarray(dark).save(f"in{k}/p{k:02}.png")
    Path(f"in6/{'n' * 248}.png").write_bytes(Path("in0/p00.png").read_bytes())
    arguments = [f"in{k}" for k in range(12)]
    real = pictures.load_whole

    def slow(image: Image.Image) -> object:
        time.sleep(0.02 * (int(os.fspath(image.fp.name)[-6:-4]) % 2))
        return real(image)

    Path("in6", "n" * 248 + ".png").rename("in6/" + "n" * 246 + "99.png")
    monkeypatch.setattr(pictures, "load_whole", slow)
    said = []
    for _ in range(2):
        pictures._TOLD.clear()
        caplog.clear()
        assert cli.main(["segment", *arguments, "-o", "out"]) == 1
        printed = capsys.readouterr()
        assert printed.out.startswith("8 segmented, 5 skipped")
        skipped = [line.split(":")[0] for line in printed.err.splitlines() if "skipped" in line]
        long = f"skipped in6/{'n' * 246}99.png"
        bad = [f"skipped in{k}/p{k:02}.png" for k in (1, 4, 7, 10)]
        assert skipped == [*bad[:2], long, *bad[2:]]
        assert "File name too long" in printed.err
        told = [record.getMessage().split(":")[0] for record in caplog.records]
        assert told == [f"in{k}/p{k:02}.png" for k in (2, 5, 8, 11)]
        said.append((printed.out, skipped, told))
    assert said[0] == said[1] and len(files()) == 16


def test_threads_are_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        draw("in/a.png", "in/b.png", "in/c.png")
        assert cli.main(["segment", "in", "-o", "out"]) == 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_results_do_not_depend_on_threads() -> None:
    before = torch.get_num_threads()
    draw(*(f"in/{k}.png" for k in range(6)), picture=street(3, 90, 130)[0])
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            words = ["--confidence", "--size", "96x160"]
            assert cli.main(["segment", "in", "-o", f"out{count}", *words]) == 0
    finally:
        torch.set_num_threads(before)
    assert files("out1") == files("out4") and len(files("out1")) == 18
    for name in files("out1"):
        assert Path("out1", name).read_bytes() == Path("out4", name).read_bytes(), name


def test_an_interruption_leaves_whole_files_alone(weights: Path) -> None:
    """After Ctrl-C every file is whole, there is no other, and the process ends soon."""
    draw("in/000.png", picture=street(3, 100, 150)[0])
    for k in range(1, 2000):  # ten seconds and more
        os.link("in/000.png", f"in/{k:03}.png")
    command = [sys.executable, "-m", "fastscnn_fast", "segment", "in", "-o", "out"]
    run = subprocess.Popen([*command, "--weights", str(weights)], stderr=subprocess.PIPE, text=True)
    begun = time.monotonic()
    while len(list(Path().glob("out/*_overlay.png"))) < 3 and time.monotonic() < begun + 60:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 130 and error.endswith("fastscnn_fast: interrupted\n")
    written = files()
    assert 6 <= len(written) < 3900 and len(written) % 2 == 0
    assert all(name.endswith(pictures.ENDINGS) for name in written)
    for name in written:
        with Image.open(Path("out", name)) as image:
            image.load()


def test_a_full_disk_ends_it_with_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(*(f"in/{k}.png" for k in range(30)))
    real, written = results.write_whole, []

    def full(path: Path, content: bytes, durable: bool) -> None:
        if path.name == "3_labels.png":
            raise OSError(28, "No space left on device", str(path))
        real(path, content, durable)
        written.append(path)

    monkeypatch.setattr(results, "write_whole", full)
    assert cli.main(["segment", "in", "-o", "out"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "fastscnn_fast: error: out/3_labels.png: No space left on device"
    assert len(written) < 60


def test_a_folder_that_nothing_came_into_is_not_left() -> None:
    assert cli.main(["segment", "nowhere.png", "-o", "out/deep"]) == 1
    assert not Path("out").exists()


def test_how_many_pixels_a_file_says_it_has() -> None:
    draw("a.png")
    Path("b.png").write_bytes(b"no picture")
    assert pictures.size_of("a.png") == 48 * 64
    assert pictures.size_of("b.png") == pictures.size_of("nowhere.png") == 0


def test_jpeg_is_encoded_as_asked() -> None:
    image = Image.fromarray(PICTURE)
    with Image.open(io.BytesIO(pictures.encoded(image, "jpg"))) as jpg:
        assert jpg.format == "JPEG"
    with Image.open(io.BytesIO(pictures.encoded(image))) as png:
        assert np.array_equal(np.asarray(png), PICTURE)


def test_tiles_are_those_of_python_and_written_by_rows(capsys: pytest.CaptureFixture[str]) -> None:
    picture = street(5, 150, 333)[0]
    draw("in/a.tif", "in/b.png", picture=picture)
    draw("in/narrow.png", picture=picture[:, :40])
    Path("in/broken.tif").write_bytes(b"II*\0")
    words = ["--tile", "96x128", "--overlap", "32", "--confidence"]
    assert cli.main(["segment", "in", "-o", "out", *words]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("skipped in/broken.tif: ")
    assert printed.out.startswith("3 segmented, 1 skipped; results: out/*_labels.png, ")
    fast = fuse(UNTRAINED_MODEL(num_classes=11))
    for name, own in (("a", picture), ("b", picture), ("narrow", picture[:, :40])):
        labels, confidence = segment(fast, own, tile=(96, 128), overlap=32, confidence=True)
        with Image.open(f"out/{name}_labels.png") as image:
            assert image.mode == "P" and np.array_equal(np.asarray(image), labels)
            assert image.getpalette()[:33] == [c for colour in fast.palette for c in colour]
        with Image.open(f"out/{name}_confidence.png") as image:
            assert np.array_equal(np.asarray(image), np.rint(255 * confidence).astype(np.uint8))
        shown = np.asarray(pictures.overlay(own, labels, fast.classes, fast.palette))
        with Image.open(f"out/{name}_overlay.png") as image:
            found = np.asarray(image)
            assert np.array_equal(found[:150, : own.shape[1]], shown[:150, : own.shape[1]])
            assert found.shape[0] > 150 and (name == "narrow" or np.array_equal(found, shown))
    words = ["--tile", "96x128", "--overlap", "32", "--labels-only"]
    assert cli.main(["segment", "in/a.tif", "-o", "alone", *words]) == 0
    assert files("alone") == ["a_labels.png"]


def test_options_that_do_not_go_with_tiles(capsys: pytest.CaptureFixture[str]) -> None:
    draw("a.png")
    Path("a.mp4").write_bytes(b"")
    for words, said in (
        (["--size", "64"], "--size must not go with --tile, got 64x64"),
        (["--overlay-format", "jpg"], "--overlay-format must be png with --tile"),
        (["--overlap", "200"], "overlap must be from 0 to 64, "),
        (["a.mp4"], "--tile must go with pictures alone, got a.mp4"),
    ):
        assert cli.main(["segment", "a.png", *words, "--tile", "128", "-o", "out"]) == 2
        assert f"error: {said}" in capsys.readouterr().err
