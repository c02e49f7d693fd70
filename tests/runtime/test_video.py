"""Frames of videos, cameras and programs to labels: every format, in order, beside each other, and where they end."""

from __future__ import annotations

import io
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import clips
import numpy as np
import pytest
import torch
from PIL import Image

from fastscnn_fast import FusedFastSCNN, bench, extras, fuse, segment, segment_video
from fastscnn_fast.data import videos
from fastscnn_fast.data.videos import Overlay, Video, label_frame
from fastscnn_fast.runtime.beside import beside, each

WAIT = 20.0


@pytest.fixture(scope="module")
def fast() -> FusedFastSCNN:
    return fuse(bench.untrained_model(num_classes=11))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten frames without loss."""
    path = tmp_path_factory.mktemp("clips") / "clip.mkv"
    return clips.write(path, clips.drawn(10), sound="aac")


def test_labels_of_each_frame_are_those_of_the_picture(fast: FusedFastSCNN, clip: Path) -> None:
    frames = clips.drawn(10)
    expected = [segment(fast, frame) for frame in frames]
    assert any(not np.array_equal(one, expected[0]) for one in expected[1:])
    found = list(segment_video(fast, clip))
    assert len(found) == 10 and all(map(np.array_equal, found, expected))
    assert len({id(one) for one in found}) == 10
    for (frame, labels), pixels, own in zip(
        segment_video(fast, clip, every=3, frames=True), frames[::3], expected[::3], strict=True
    ):
        assert np.array_equal(frame.pixels, pixels) and np.array_equal(labels, own)
    seconds = [frame.seconds for frame, _ in segment_video(fast, clip, every=3, frames=True)]
    assert seconds == pytest.approx([0, 0.12, 0.24, 0.36])


def test_out_is_filled_and_yielded_each_time(fast: FusedFastSCNN, clip: Path) -> None:
    expected = list(segment_video(fast, clip))
    out = np.full((48, 64), 99, np.uint8)
    found = []
    for labels in segment_video(fast, clip, out=out):
        assert labels is out
        found.append(labels.copy())
    assert all(map(np.array_equal, found, expected)) and len(found) == 10
    with pytest.raises(
        ValueError, match=r"out must be \(48, 64\) like the picture, got \(64, 48\)"
    ):
        next(segment_video(fast, clip, out=np.zeros((64, 48), np.uint8)))
    for wrong, said in (
        (np.zeros((48, 64)), r"float64 of shape \(48, 64\)"),
        (np.zeros((48, 64, 1), np.uint8), r"uint8 of shape \(48, 64, 1\)"),
        ([[0]], "list"),
    ):
        with pytest.raises(TypeError, match=rf"out must be a uint8 array \(H, W\), got {said}"):
            segment_video(fast, clip, out=wrong)  # type: ignore[arg-type]


def test_size_is_the_networks_and_the_labels_stay_the_frames(
    fast: FusedFastSCNN, clip: Path
) -> None:
    """Frames are resized by torch, within a level of what Pillow makes of pictures."""
    found = list(segment_video(fast, clip, (96, 160)))
    assert {labels.shape for labels in found} == {(48, 64)}
    expected = [segment(fast, frame, (96, 160)) for frame in clips.drawn(10)]
    assert np.mean([one != other for one, other in zip(found, expected)]) < 0.05


def test_any_feed_is_the_same_video(fast: FusedFastSCNN, clip: Path) -> None:
    frames = clips.drawn(10)
    expected = list(segment_video(fast, clip))
    content = clip.read_bytes()
    with clip.open("rb") as file:
        feeds: list[Any] = [str(clip), content, bytearray(content), io.BytesIO(content), file]
        feeds += [frames, tuple(frames), iter(frames), np.stack(frames)]
        feeds += [[Image.fromarray(frame) for frame in frames]]
        feeds += [torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)]
        for feed in feeds:
            found = list(segment_video(fast, feed))
            assert len(found) == 10 and all(map(np.array_equal, found, expected))
    assert list(segment_video(fast, [])) == []


def test_what_is_no_video_is_named(fast: FusedFastSCNN, tmp_path: Path) -> None:
    frame = clips.drawn(1)[0]
    wrong: Any
    for wrong in (None, 1.5, True, object(), Image.fromarray(frame), {}, {1: frame}):
        with pytest.raises(TypeError, match="video must be a path, .*, got "):
            segment_video(fast, wrong)
    for wrong, said in (
        (frame, r"four dimensions .*, got uint8 of shape \(48, 64, 3\)"),
        (-1, "a camera's number from 0 up, got -1"),
        ("", "a path, got ''"),
    ):
        with pytest.raises(ValueError, match=f"video must (be|have) {said}"):
            segment_video(fast, wrong)
    for wrong, said in (("nowhere.mp4", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(ValueError, match=f"{wrong}: {said}"):
            segment_video(fast, wrong)
    with pytest.raises(ValueError, match=r"video: is empty"):
        segment_video(fast, b"")
    with pytest.raises(ValueError, match=r"video: cannot be read: Invalid data"):
        segment_video(fast, b"no video" * 99)
    with pytest.raises(TypeError, match=r"video\[1\] must be a path.*got NoneType"):
        list(segment_video(fast, [frame, None]))
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        segment_video(fast, [frame], every=0)
    with pytest.raises(TypeError, match="every must be an integer of at least 1, got 1.5"):
        segment_video(fast, [frame], every=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size must be at least 32x32, got 8x8"):
        segment_video(fast, [frame], 8)
    with pytest.raises(TypeError, match="fast, the first argument, must be a model"):
        segment_video(None, [frame])  # type: ignore[arg-type]


def test_a_file_of_text_is_no_video(fast: FusedFastSCNN) -> None:
    with pytest.raises(TypeError, match="video must be a file opened in binary mode"):
        segment_video(fast, io.StringIO("a"))  # type: ignore[call-overload]


def test_without_pyav_the_extra_is_named(
    fast: FusedFastSCNN, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"a video needs av: pip install 'fastscnn_fast\[video\]'"
    ):
        segment_video(fast, clip)
    assert len(list(segment_video(fast, clips.drawn(2)))) == 2  # needs none


@pytest.mark.parametrize(
    ("codec", "pixel_format", "error"),
    [
        ("libx264", "yuv420p", 40),
        ("libx264", "yuv420p10le", 40),
        ("libx264", "yuv444p", 40),
        ("ffv1", "yuv422p16le", 40),
        ("ffv1", "bgra", 0),
        ("ffv1", "gbrp16le", 1),
        ("png", "rgba", 0),
        ("ffv1", "gray", 0),
        ("ffv1", "gray16le", 1),
        ("mjpeg", "yuvj420p", 40),
    ],
)
@pytest.mark.parametrize("size", [(48, 64), (47, 63)])
def test_frames_of_every_format(
    fast: FusedFastSCNN,
    tmp_path: Path,
    codec: str,
    pixel_format: str,
    error: int,
    size: tuple[int, int],
) -> None:
    if pixel_format.endswith(("420p", "420p10le")) and size[0] % 2:
        size = (46, 62)
    frames = clips.drawn(3, *size)
    alpha = pixel_format.endswith("a")
    given = [np.dstack([one, np.full(size, 77, np.uint8)]) for one in frames] if alpha else frames
    ending = "mov" if codec == "png" else "mkv"
    path = clips.write(tmp_path / f"clip.{ending}", given, codec, pixel_format)
    found = [frame.pixels for frame, _ in segment_video(fast, path, frames=True)]
    assert [one.shape for one in found] == [(*size, 3)] * 3
    for one, own in zip(found, frames):
        if pixel_format.startswith("gray"):
            own = np.asarray(Image.fromarray(own).convert("L"))[..., None].repeat(3, 2)
            error = 4  # FFmpeg's grey is not Pillow's to the last digit
        assert np.abs(one.astype(int) - own).mean() <= error / 4
    if alpha:
        with Video(path) as video:
            rgba = videos.frame_pixels(next(video.read()), 4)
            assert rgba is not None and (rgba[..., 3] == 77).all()


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_frames_are_upright(fast: FusedFastSCNN, tmp_path: Path, rotation: int) -> None:
    """The film of a telephone held upright: it says by how much it is to be turned, to the left."""
    upright = clips.drawn(2)
    stored = [np.ascontiguousarray(np.rot90(one, -rotation // 90)) for one in upright]
    path = clips.write(tmp_path / "clip.mp4", stored, "libx264rgb", "rgb24", rotation=rotation)
    for (frame, labels), own in zip(segment_video(fast, path, frames=True), upright, strict=True):
        assert frame.pixels.shape == (48, 64, 3) and labels.shape == (48, 64)
        assert np.abs(frame.pixels.astype(int) - own).mean() < 20


def cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    short = path.with_name(f"short{path.suffix}")
    short.write_bytes(content[: round(len(content) * share)])
    return short


@pytest.mark.parametrize("count", [20, 40])
@pytest.mark.parametrize("ending", ["mkv", "avi", "mp4"])
def test_a_file_that_is_cut_off_ends_with_what_could_be_read_and_a_word(
    fast: FusedFastSCNN, tmp_path: Path, ending: str, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"options": {"movflags": "faststart"}} if ending == "mp4" else {}
    coded = ending == "mp4" and count == 40
    codec, pixel_format = ("libx264", "yuv420p") if coded else ("mjpeg", "yuvj420p")
    path = clips.write(
        tmp_path / f"clip.{ending}", clips.drawn(count), codec, pixel_format, **options
    )
    assert len(list(segment_video(fast, path))) == count and not caplog.records
    short = cut(path, 0.6)
    found = list(segment_video(fast, short))
    assert count // 8 < len(found) < count
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{short}: ") and said.endswith(f"; {len(found)} frames could be read")
    assert "cut off" in said or "damaged" in said or "beyond" in said


def test_damaged_frames_are_left_out_and_told_of(
    fast: FusedFastSCNN, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = clips.write(tmp_path / "clip.mov", clips.drawn(10), "png", "rgb24")
    content = bytearray(path.read_bytes())
    place = content.index(b"IDAT", len(content) // 2)
    content[place + 20 : place + 400] = bytes(380)
    found = list(segment_video(fast, bytes(content)))
    assert 8 <= len(found) <= 10
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("video: 1 of its frames are damaged")


def test_files_without_pictures_say_what_they_hold(fast: FusedFastSCNN, tmp_path: Path) -> None:
    path = clips.write(tmp_path / "clip.mkv", clips.drawn(3), sound="aac")
    import av

    with av.open(str(path)) as file, av.open(str(tmp_path / "a.mka"), "w", format="matroska") as to:
        stream = to.add_stream_from_template(file.streams.audio[0])
        for packet in file.demux(audio=0):
            if packet.size:
                packet.stream = stream
                to.mux(packet)
    with pytest.raises(ValueError, match="a.mka: has no pictures, only audio"):
        segment_video(fast, tmp_path / "a.mka")


def test_stopping_ends_threads_and_gives_threads_back(fast: FusedFastSCNN, clip: Path) -> None:
    before, torchs = threading.active_count(), torch.get_num_threads()
    steps = segment_video(fast, clip)
    next(steps)
    steps.close()
    assert threading.active_count() == before and torch.get_num_threads() == torchs
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [torchs]

    def failing() -> Any:
        yield clips.drawn(1)[0]
        raise OSError("the camera fell down")

    with pytest.raises(OSError, match="fell down"):
        list(segment_video(fast, failing()))
    assert threading.active_count() == before


def test_a_run_not_begun_closes_its_file(fast: FusedFastSCNN, clip: Path) -> None:
    with open(clip, "rb") as file:
        held = sys.getrefcount(file)
        steps = segment_video(fast, file)
        assert sys.getrefcount(file) > held
        steps.close()
        assert sys.getrefcount(file) == held


def test_runs_that_overlap_give_threads_back(fast: FusedFastSCNN) -> None:
    """The one that ends last began in a thread whose number the other's workers had set."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = segment_video(fast, clips.drawn(6))
        next(first)
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(segment_video, fast, clips.drawn(6)).result()
            pool.submit(next, second).result()
            first.close()
            pool.submit(second.close).result()
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


def test_a_camera_is_read_as_it_comes(fast: FusedFastSCNN, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "_camera", lambda number: ("testsrc=size=64x48:rate=200", "lavfi"))
    with Video(0) as video:
        assert (video.name, video.live) == ("camera 0", True)
    steps = segment_video(fast, 0, frames=True)
    seconds = [next(steps)[0].seconds for _ in range(5)]
    steps.close()
    assert seconds == sorted(seconds)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="camera 97: cannot be opened"):
        segment_video(fast, 97)


# ---------------------------------------------------------------- overlays


def test_untinted_frames_stay_as_they_are_and_tints_are_the_classes_colours() -> None:
    """In the lowest rows is the legend."""
    import av

    pixels = np.full((200, 400, 3), 128, np.uint8)
    frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
    stored = frame.reformat(format="yuv420p")
    labels = np.full((200, 400), 2, np.uint8)  # which has no name
    labels[:100, :200] = 1
    for given, one in ((frame, "rgb24"), (stored, "yuv420p")):
        tinted = Overlay(["road", "car"], [(0, 0, 0), (250, 10, 90)])(given, labels, (200, 400))
        assert (tinted.height, tinted.width, tinted.format.name) == (200, 400, "yuv420p"), one
        found = tinted.to_ndarray(format="rgb24").astype(int)
        assert np.abs(found[110:150, 210:] - 128).max() <= 1
        expected = 0.45 * 128 + 0.55 * np.array([250, 10, 90])
        assert np.abs(found[:90, :190] - expected).max() <= 3
        assert (found[-4:, :20] > 240).all() and found[-4:, :20].max() <= 255
    own = Overlay(["road"], [(0, 255, 0)])(stored, np.zeros((200, 400), np.uint8), (200, 400))
    rows = np.asarray(own.planes[0]).reshape(200, -1)[:150]
    assert np.array_equal(rows, np.asarray(stored.planes[0]).reshape(200, -1)[:150])  # background


def test_labels_as_frames_keep_their_values() -> None:
    labels = np.arange(256, dtype=np.uint8).repeat(4).reshape(32, 32)
    assert np.array_equal(label_frame(labels).to_ndarray(), labels)


# ---------------------------------------------------------------- beside


def test_items_are_made_ahead_and_no_further() -> None:
    made: list[int] = []
    enough = threading.Event()

    def items() -> Any:
        for k in range(20):
            made.append(k)
            if k == 4:
                enough.set()
            yield k

    steps = beside(items(), 4)
    assert next(steps) == 0 and enough.wait(WAIT)
    time.sleep(0.02)
    assert len(made) <= 6
    assert list(steps) == [*range(1, 20)]


def test_the_newest_are_kept_where_the_taker_is_late() -> None:
    over = threading.Event()

    def items() -> Any:
        yield from range(100)
        over.set()

    steps = beside(items(), 2, newest=True)
    first = next(steps)
    assert over.wait(WAIT)
    assert list(steps) == [k for k in (98, 99) if k > first]


def test_work_keeps_the_order_and_what_it_raises_is_raised() -> None:
    def work(item: int) -> int:
        time.sleep(0.001 * (item % 3))
        if item == 9:
            raise ValueError("nine")
        return 10 * item

    begun: list[int] = []
    assert list(each(range(9), work, 3, lambda: begun.append(1))) == [10 * k for k in range(9)]
    assert 1 <= len(begun) <= 3
    with pytest.raises(ValueError, match="nine"):
        list(each(range(20), work, 3, lambda: None))
