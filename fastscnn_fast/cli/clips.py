"""Videos and cameras of ``fastscnn_fast segment``."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..data.videos import (
    CONTAINERS,
    Overlay,
    Video,
    Writer,
    converted,
    errors,
    frame_pixels,
    label_frame,
)
from ..runtime.fused import FusedFastSCNN
from ..runtime.segment import Labels, nearest
from ..runtime.video import labelled
from ..writing import whole

if TYPE_CHECKING:
    import av


class Clip(NamedTuple):
    """A video or a camera to segment, and how.

    ``source`` is its path or number, ``out`` the file to write, if any.
    """

    source: Path | int
    out: Path | None
    size: tuple[int, int] | None
    every: int
    labels_only: bool
    show: bool


class _Made(NamedTuple):
    """What is made of a frame: one to write, and pixels (H, W, 3) to show."""

    written: av.VideoFrame | None
    shown: NDArray[np.uint8] | None


def segment(fast: FusedFastSCNN, clip: Clip) -> bool:
    """Writes and shows a clip, and says how fast that went; False where it is damaged, which is said too.

    Raises:
        ValueError: it cannot be read at all.
        RuntimeError: there is no display to show it.
        ImportError: PyAV is not installed.
        OSError: the result cannot be written.
    """
    overlay = Overlay(fast.classes, fast.palette)

    def finish(frame: Any, pixels: NDArray[np.uint8], labels: Labels) -> _Made:
        assert video.size is not None
        labels = nearest(labels, video.size)  # where a stream changes its size
        tinted = overlay(frame, labels, video.size) if clip.show or not clip.labels_only else None
        written = label_frame(labels) if clip.labels_only else tinted
        shown: Any = converted(tinted, "rgb24").to_ndarray() if clip.show and tinted else None
        return _Made(written if clip.out else None, shown)

    with ExitStack() as held:
        video = held.enter_context(Video(clip.source))
        window = held.enter_context(_Window(video.name)) if clip.show else None
        writer = held.enter_context(_writer(clip, video)) if clip.out else None
        total = None if video.count is None else -(-video.count // clip.every)
        bar = held.enter_context(tqdm(total=total, unit="frame", desc=video.name, disable=None))
        sound = writer is not None and not clip.labels_only
        steps: Any = labelled(
            fast,
            video.read(sound, clip.every),
            lambda frame: frame_pixels(frame, fast.config.in_channels),
            finish,
            clip.size,
            video.live,
        )
        begun, count = time.perf_counter(), 0
        with closing(steps), _until_interrupted(video.live):
            for frame, made in steps:
                if made is None:
                    if writer is not None:
                        writer.hear(frame)
                    continue
                if writer is not None:
                    writer.write(made.written, frame)
                count += 1
                bar.update()
                if window is not None:
                    passed = time.perf_counter() - begun
                    if writer is None and not video.live and frame.time is not None:
                        window.wait(frame.time - video.start - passed)
                    title = f"{video.name}: {count / passed:.1f} frames a second"
                    if not window.show(made.shown, title):
                        break
        seconds = time.perf_counter() - begun
        damage = video.damage
        if not count:
            raise ValueError(damage or f"{video.name}: no frame could be read")
    rate = f"{count} frames in {seconds:.1f} s, {count / seconds:.1f} frames a second"
    print(f"{video.name}: {rate}" + (f"; result: {clip.out}" if clip.out else ""))
    if damage is not None and not (window is not None and window.closed):
        print(f"damaged {damage}", file=sys.stderr)
        return False
    return True


@contextmanager
def _writer(clip: Clip, video: Video) -> Iterator[Writer]:
    """Of a file that is there in the end or not at all; errors of writing have its name."""
    assert clip.out is not None
    kind = CONTAINERS[clip.out.suffix.lower()]
    clip.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole(clip.out) as part, Writer(part, kind, video, clip.labels_only) as writer:
            yield writer
    except errors() as error:
        number, why = getattr(error, "errno", None), getattr(error, "strerror", str(error))
        raise OSError(number, why, str(clip.out)) from error


@contextmanager
def _until_interrupted(live: bool) -> Iterator[None]:
    """A camera has no end but this one."""
    try:
        yield
    except KeyboardInterrupt:
        if not live:
            raise


class _Window:
    """A window that shows frames, until it is closed, or Escape or q is pressed in it.

    Raises:
        RuntimeError: there is no display, or no tkinter.
    """

    def __init__(self, title: str) -> None:
        try:
            import tkinter
        except ImportError as error:
            rule = "--show needs tkinter, a part of Python that some systems have in a package of its own"
            raise RuntimeError(f"{rule} (python3-tk): {error}") from error
        try:
            self._root = tkinter.Tk()
        except tkinter.TclError as error:
            raise RuntimeError(f"--show needs a display, and there is none: {error}") from error
        self._tkinter = tkinter
        self._root.title(title)
        self._root.resizable(False, False)
        self._picture = tkinter.Label(self._root, borderwidth=0)
        self._picture.pack()
        self.closed = False
        self._root.protocol("WM_DELETE_WINDOW", self._close)
        for key in ("<Escape>", "q"):
            self._root.bind(key, self._close)

    def __enter__(self) -> _Window:
        return self

    def __exit__(self, *_: object) -> None:
        self._root.destroy()

    def _close(self, *_: object) -> None:
        self.closed = True

    def wait(self, seconds: float) -> None:
        """Until it is time for the next frame."""
        until = time.perf_counter() + seconds
        while not self.closed and (left := until - time.perf_counter()) > 0:
            self._root.update()
            time.sleep(min(left, 0.01))

    def show(self, pixels: NDArray[np.uint8], title: str) -> bool:
        """Shows a frame (H, W, 3); False where the window was closed."""
        header = f"P6 {pixels.shape[1]} {pixels.shape[0]} 255 ".encode()
        image = self._tkinter.PhotoImage(data=header + pixels.tobytes(), format="PPM")
        self._picture.configure(image=image)
        self._image = image  # which tkinter does not keep
        self._root.title(title)
        self._root.update()
        return not self.closed
