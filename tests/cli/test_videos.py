"""``segment`` of videos and cameras: what it writes, shows and says, and how it ends."""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import clips
import numpy as np
import pytest
from PIL import Image

from fastscnn_fast import bench, checkpoints, cli, cluster, extras, fuse, segment
from fastscnn_fast.cli import clips as clips_of_commands, options
from fastscnn_fast.data import videos

UNTRAINED_MODEL = functools.cache(bench.untrained_model)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "untrained.safetensors"
    checkpoints.save_checkpoint(UNTRAINED_MODEL(num_classes=11), path)
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, weights: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(options, "CAMVID11", weights)
    monkeypatch.chdir(tmp_path)


def make(name: str, count: int = 6, *size: int, **options: Any) -> Path:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    defaults = {"codec": "libx264", "pixel_format": "yuv420p"}
    return clips.write(Path(name), clips.drawn(count, *size), **(defaults | options))


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def test_a_video_keeps_its_size_times_and_sound(capsys: pytest.CaptureFixture[str]) -> None:
    times = [0, 40, 90, 100, 400, 440]
    clip = make("clip.mp4", times=times, sound="aac")
    assert cli.main(["segment", "clip.mp4", "-o", "new/out.mp4"]) == 0
    printed = capsys.readouterr()
    said = r"clip.mp4: 6 frames in \d+\.\d s, \d+\.\d frames a second; result: new/out.mp4\n"
    assert re.fullmatch(said + "1 segmented, 0 skipped\n", printed.out)
    frames, found = clips.read(Path("new/out.mp4"))
    assert {frame.shape for frame in frames} == {(48, 64, 3)} and found == times
    assert clips.packets(Path("new/out.mp4")) == clips.packets(clip) != []
    assert files() == ["clip.mp4", "new/out.mp4"]


def test_the_overlay_shows_the_classes_of_each_frame() -> None:
    make("clip.mkv", 4, 96, 128, codec="ffv1", pixel_format="bgr0")
    assert cli.main(["segment", "clip.mkv", "-o", "out.mkv"]) == 0
    fast = fuse(UNTRAINED_MODEL(num_classes=11))
    for own, frame in zip(clips.drawn(4, 96, 128), clips.read(Path("out.mkv"))[0], strict=True):
        colours = np.array(fast.palette)[segment(fast, own)]
        expected = 0.45 * own + 0.55 * colours
        upper = np.abs(frame.astype(int) - expected)[:40]
        assert upper.mean() < 12  # colours of half the size, H.264


@pytest.mark.parametrize("ending", ["mkv", "mp4", "mov"])
def test_labels_only_are_the_labels(ending: str) -> None:
    make(
        "clip.mkv",
        5,
        47,
        63,
        codec="ffv1",
        pixel_format="bgr0",
        sound="aac",
        times=[0, 10, 40, 50, 99],
    )
    out = Path(f"out.{ending}")
    assert cli.main(["segment", "clip.mkv", "-o", str(out), "--labels-only", "--every", "2"]) == 0
    frames, times = clips.read(out, "gray")
    fast = fuse(UNTRAINED_MODEL(num_classes=11))
    for own, found in zip(clips.drawn(5, 47, 63)[::2], frames, strict=True):
        assert np.array_equal(found, segment(fast, own))
    assert times == [0, 40, 99] and clips.packets(out) == []


@pytest.mark.parametrize(
    ("name", "out", "options", "sound"),
    [
        ("a.mkv", "out.webm", {"sound": "libopus"}, "opus"),
        ("a.mkv", "out.webm", {"sound": "aac"}, "opus"),
        ("a.mov", "out.mp4", {"sound": "aac", "codec": "mjpeg", "pixel_format": "yuvj420p"}, "aac"),
        ("a.mkv", "out.mp4", {"sound": "pcm_s16le"}, None),
        ("a.mkv", "out.mov", {"sound": "pcm_s16le", "start": 1400}, "pcm_s16le"),
        ("a.ts", "out.mp4", {"sound": "aac"}, "aac"),
    ],
)
def test_sound_is_kept_in_every_container(
    name: str, out: str, options: dict[str, Any], sound: str | None
) -> None:
    import av

    make(name, 12, **options)
    assert cli.main(["segment", name, "-o", out]) == 0
    frames, times = clips.read(Path(out))
    assert len(frames) == 12 and 0 <= times[0] <= 25  # by as much as sound begins before it
    assert [one - times[0] for one in times] == [40 * k for k in range(12)]
    with av.open(out) as file:
        (stream,) = file.streams.audio
        if sound is not None:
            assert stream.codec_context.codec.canonical_name == sound
        heard = list(file.decode(audio=0))
        assert heard[0].time == pytest.approx(0, abs=0.03)
        assert sum(frame.samples for frame in heard) / 48000 == pytest.approx(0.48, abs=0.07)
        waves = np.concatenate([frame.to_ndarray().reshape(-1)[: frame.samples] for frame in heard])
    assert np.abs(waves[4800:9600]).max() > 0.3 * (1 if waves.dtype.kind == "f" else 32768)


def test_odd_sizes_rotations_and_wide_pixels(capsys: pytest.CaptureFixture[str]) -> None:
    import av

    make("odd.mkv", 3, 47, 63, codec="ffv1", pixel_format="bgr0")
    make("turned.mp4", 3, 48, 80, rotation=90)
    assert cli.main(["segment", "odd.mkv", "turned.mp4", "-o", "out"]) == 0
    assert {frame.shape for frame in clips.read(Path("out/odd_overlay.mp4"))[0]} == {(47, 63, 3)}
    assert {frame.shape for frame in clips.read(Path("out/turned_overlay.mp4"))[0]} == {(80, 48, 3)}
    with av.open("out/turned_overlay.mp4") as file:
        assert next(file.decode(video=0)).rotation == 0
    assert capsys.readouterr().out.endswith("2 segmented, 0 skipped; results: out/*_overlay.mp4\n")


def test_folders_of_pictures_and_videos(capsys: pytest.CaptureFixture[str]) -> None:
    make("in/a.mp4")
    make("in/sub/b.mkv", codec="ffv1", pixel_format="bgr0")
    Image.fromarray(clips.drawn(1)[0]).save("in/a.png")
    Path("in/broken.mp4").write_bytes(b"no video")
    Path("in/empty.mp4").write_bytes(b"")
    os.rename(make("clip.mp4"), "named_like_nothing")
    words = ["in", "named_like_nothing", "-o", "out"]
    for _ in range(2):  # results are not taken for videos
        assert cli.main(["segment", *words]) == 1
        printed = capsys.readouterr()
        assert printed.err.splitlines() == [
            "skipped in/broken.mp4: cannot be read: Invalid data found when processing input",
            "skipped in/empty.mp4: is empty",
        ]
        last = "4 segmented, 2 skipped; results: out/*_labels.png, *_overlay.png, *_overlay.mp4"
        assert printed.out.splitlines()[-1] == last
        names = [name for name in files() if name.startswith("out")]
        assert (
            names
            == [
                "out/a_labels.png",
                "out/a_overlay.png",
                "out/a_mp4_overlay.mp4",
                "out/named_like_nothing_overlay.mp4",
                "out/sub/b_overlay.mp4",
            ]
            or sorted(names) == names
        )
        assert len(names) == 5
        words = ["in", "named_like_nothing", "out/sub", "-o", "out"]
        with pytest.raises(SystemExit):
            cli.main(["segment", *words, "--every", "0"])
        capsys.readouterr()
        words = words[:2] + words[-2:]


def test_a_video_that_is_cut_off_ends_with_what_could_be_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = make("whole.mkv", 40, codec="mjpeg", pixel_format="yuvj420p").read_bytes()
    Path("short.mkv").write_bytes(content[: len(content) // 2])
    assert cli.main(["segment", "short.mkv", "-o", "out.mp4"]) == 1
    printed = capsys.readouterr()
    count = len(clips.read(Path("out.mp4"))[0])
    assert 5 < count < 30 and f"short.mkv: {count} frames in " in printed.out
    assert printed.out.endswith("1 segmented, 0 skipped, 1 damaged\n")
    said = rf"damaged short.mkv: it is cut off after 0\.\d\d of 1\.60 s; {count} frames could be read\n"
    assert re.fullmatch(said, printed.err)


def test_options_that_go_with_nothing_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    make("a.mp4")
    make("b.mp4")
    make("a_overlay.mp4")
    for name in ("a.png", "a_labels.png"):
        Image.fromarray(clips.drawn(1)[0]).save(name)
    os.mkfifo("pipe.mp4")
    for words, said in (
        (["a.png", "--show"], "--show must go with videos and cameras alone, got a.png"),
        (["a.png", "-o", "out", "--every", "2"], "--every must go with a video or camera, got 2"),
        (["a.mp4", "-o", "out", "--confidence"], "--confidence must go with pictures, got a.mp4"),
        (["a.mp4", "b.mp4", "-o", "out.mp4"], "--out must be a folder, unless there is one video"),
        (["a.png", "-o", "out.mkv"], "--out must be a folder, unless there is one video"),
        (
            ["a.mp4", "-o", "o.webm", "--labels-only"],
            "--out must end in .m4v, .mkv, .mov, .mp4, which",
        ),
        (["a.mp4", "-o", "a.mp4"], "--out must keep what is segmented, got a.mp4: a.mp4 would be"),
        (["a.png", "a_labels.png", "-o", "."], "--out must keep what is segmented, got .: a_l"),
        (["a.png", "a_labels.png", "-o", ".", "--ray", "local"], "--out must keep what is"),
        (["a.mp4", "a_overlay.mp4", "-o", "."], "--out must keep what is segmented, got .: a_o"),
        (["a.mp4", "-o", "o.avi"], "--out must be a folder, or, of one video or camera, end in"),
        (["a.png", "-o", "o.png"], "--out must be a folder, or, of one video or camera, end in"),
        (
            ["a.mp4", "-o", "pipe.mp4"],
            "--out must be a regular file, got pipe.mp4, which is a pipe",
        ),
        (["a.png", "-o", "out", "--overlap", "64"], "--overlap must go with --tile, got 64"),
    ):
        assert cli.main(["segment", *words]) == 2
        assert f"fastscnn_fast: error: {said}" in capsys.readouterr().err
    for words in (["a.mp4"], ["a.mp4", "--show", "--ray", "local"]):
        with pytest.raises(SystemExit):
            cli.main(["segment", *words])
        assert "required: -o/--out, unless --show is given" in capsys.readouterr().err
    assert files() == ["a.mp4", "a.png", "a_labels.png", "a_overlay.mp4", "b.mp4"]
    found = cluster.found(["a.png", "a.mp4"])
    assert [str(job.path) for job in found.jobs] == ["a.png"]
    assert found.problems[0].startswith("a.mp4: is a video, and only pictures are read here")


@pytest.mark.parametrize("tile", [[], ["--tile", "64", "--overlap", "8"]])
def test_one_result_that_cannot_be_written_leaves_the_others(
    capsys: pytest.CaptureFixture[str], tile: list[str]
) -> None:
    kind, result = ("png", "a_labels.png") if tile else ("mp4", "a_overlay.mp4")
    for name in "ab":
        if tile:
            Image.fromarray(clips.drawn(1)[0]).save(f"{name}.png")
        else:
            make(f"{name}.mp4", 2)
    Path("out", result).mkdir(parents=True)
    assert cli.main(["segment", f"a.{kind}", f"b.{kind}", "-o", "out", *tile]) == 1
    said = f"skipped a.{kind}: out/{result} cannot be written: Is a directory\n"
    printed = capsys.readouterr()
    assert said in printed.err and printed.out.splitlines()[-1].startswith("1 segmented, 1 skipped")
    assert not list(Path("out").glob(".*")) and len(files()) == (5 if tile else 3)


def test_a_link_that_a_video_is_written_to_stays_one() -> None:
    make("a.mp4", 2)
    os.symlink("far.mp4", "near.mp4")
    assert cli.main(["segment", "a.mp4", "-o", "near.mp4"]) == 0
    assert os.readlink("near.mp4") == "far.mp4" and len(clips.read(Path("far.mp4"))[0]) == 2


def test_without_pyav_videos_are_skipped_and_the_extra_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make("in/a.mp4")
    Image.fromarray(clips.drawn(1)[0]).save("in/a.png")
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    assert cli.main(["segment", "in", "-o", "out"]) == 1
    printed = capsys.readouterr()
    assert printed.err == "skipped in/a.mp4: a video needs av: pip install 'fastscnn_fast[video]'\n"
    assert printed.out.startswith("1 segmented, 1 skipped")


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "_camera", lambda number: ("testsrc=size=64x48:rate=100", "lavfi"))


class Screen:
    """What tkinter is asked for; the window is closed after so many frames."""

    def __init__(self, frames: int) -> None:
        self.frames, self.shown, self.titles = frames, [], []
        self.close: Any = None
        self.destroyed = False

    def module(self) -> Any:
        screen = self

        class Tk:
            def title(self, text: str) -> None:
                screen.titles.append(text)

            def protocol(self, name: str, call: Any) -> None:
                screen.close = call

            def update(self) -> None:
                if len(screen.shown) >= screen.frames:
                    screen.close()

            def destroy(self) -> None:
                screen.destroyed = True

            resizable = bind = lambda self, *_: None

        class Label:
            def __init__(self, *_: Any, **__: Any) -> None: ...

            def configure(self, image: bytes) -> None:
                screen.shown.append(image)

            pack = lambda self: None  # noqa: E731

        def photo(data: bytes, format: str) -> bytes:
            assert format == "PPM"
            return data

        return types.SimpleNamespace(Tk=Tk, Label=Label, PhotoImage=photo, TclError=RuntimeError)


@pytest.mark.usefixtures("camera")
@pytest.mark.parametrize("out", [None, "out.mp4"])
def test_a_camera_is_shown_until_the_window_is_closed(
    out: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Screen(5)
    monkeypatch.setitem(sys.modules, "tkinter", screen.module())
    assert cli.main(["segment", "0", "--show", *(["-o", out] if out else [])]) == 0
    assert len(screen.shown) == 5 and screen.destroyed
    assert all(one.startswith(b"P6 64 48 255 ") and len(one) == 9229 for one in screen.shown)
    assert re.fullmatch(r"camera 0: \d+\.\d frames a second", screen.titles[-1])
    assert re.match(r"camera 0: 5 frames in .* frames a second", capsys.readouterr().out)
    assert files() == ([out] if out else [])
    if out:
        assert len(clips.read(Path(out))[0]) == 5


def test_a_video_is_shown_at_its_own_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(99)
    monkeypatch.setitem(sys.modules, "tkinter", screen.module())
    make("clip.mp4", times=[0, 10, 20, 30, 40, 400])
    begun = time.perf_counter()
    assert cli.main(["segment", "clip.mp4", "--show"]) == 0
    assert len(screen.shown) == 6 and time.perf_counter() - begun > 0.4


def test_without_a_display_or_a_camera_that_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make("clip.mp4")
    monkeypatch.delenv("DISPLAY", raising=False)
    assert cli.main(["segment", "clip.mp4", "--show"]) == 2
    assert re.search(r"error: --show needs (a display|tkinter)", capsys.readouterr().err)
    monkeypatch.setitem(sys.modules, "tkinter", None)
    assert cli.main(["segment", "clip.mp4", "--show"]) == 2
    assert "error: --show needs tkinter, a part of Python" in capsys.readouterr().err
    assert cli.main(["segment", "97", "-o", "out"]) == 1
    assert "skipped camera 97: cannot be opened" in capsys.readouterr().err
    Path("98").mkdir()  # a folder, no camera
    assert cli.main(["segment", "98", "-o", "out"]) == 1
    assert "skipped 98: no pictures in this folder" in capsys.readouterr().err


@pytest.mark.usefixtures("camera")
@pytest.mark.parametrize("source", ["0", "clip.mkv"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_a_camera_and_takes_a_videos_part_away(
    source: str,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make("clip.mkv", 20)
    before = signal.getsignal(number)
    write, count = clips_of_commands.Writer.write, iter(range(99))

    def interrupted(self: Any, *frames: Any) -> None:
        write(self, *frames)
        if next(count) == 7:
            assert len(list(Path().glob(".fastscnn-*.part"))) == 1
            signal.raise_signal(number)

    monkeypatch.setattr(clips_of_commands.Writer, "write", interrupted)
    assert cli.main(["segment", source, "-o", "out.mkv"]) == (0 if source == "0" else 130)
    if source == "0":
        assert "frames a second; result: out.mkv" in capsys.readouterr().out
        assert len(clips.read(Path("out.mkv"))[0]) == 8
    assert files() == (["clip.mkv", "out.mkv"] if source == "0" else ["clip.mkv"])
    assert signal.getsignal(number) is before


def test_what_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import av

    make("clip.mkv")

    def full(self: Any, *frames: Any) -> None:
        raise av.error.OSError(28, "No space left on device", "a.part")

    monkeypatch.setattr(clips_of_commands.Writer, "write", full)
    assert cli.main(["segment", "clip.mkv", "-o", "out/b.mp4"]) == 2
    said = "fastscnn_fast: error: out/b.mp4: No space left on device\n"
    assert capsys.readouterr().err.endswith(said)
    assert files() == ["clip.mkv"]
