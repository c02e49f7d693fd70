"""From a video, a camera or any frames to the class of each of their pixels."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arch.config import Size, picture_size
from ..backends.registry import logger
from ..data.pictures import Picture, pixels_of
from ..data.videos import Video, VideoSource, frame_pixels
from .beside import beside, each
from .fused import FusedFastSCNN
from .model import FastSCNN
from .network import as_input, check_model
from .segment import Labels, check_out, classify, filled, run_size

if TYPE_CHECKING:
    import av

Item = TypeVar("Item")
Made = TypeVar("Made")

#: Frames that are worked on at a time, each on its share of the threads.
_MOST_WORKERS = 8
#: Frames that are decoded ahead.
_AHEAD = 4


@overload
def segment_video(
    fast: FusedFastSCNN | FastSCNN,
    video: VideoSource | Iterable[Picture],
    size: Size | None = None,
    every: int = 1,
    out: Labels | None = None,
    frames: Literal[False] = False,
) -> Generator[Labels, None, None]: ...


@overload
def segment_video(
    fast: FusedFastSCNN | FastSCNN,
    video: VideoSource | Iterable[Picture],
    size: Size | None = None,
    every: int = 1,
    out: Labels | None = None,
    *,
    frames: Literal[True],
) -> Generator[tuple[Frame, Labels], None, None]: ...


def segment_video(
    fast: FusedFastSCNN | FastSCNN,
    video: VideoSource | Iterable[Picture],
    size: Size | None = None,
    every: int = 1,
    out: Labels | None = None,
    frames: bool = False,
) -> Generator[Any, None, None]:
    """The class of every pixel of each frame, one uint8 (H, W) after the other, at the frames' own size, upright.

    Decoding and the network run in threads beside whoever takes the labels, a few frames ahead of them. Close the
    generator, or take all, to close the file. A video that is damaged or cut off ends with what could be read and a
    warning.

    Args:
        fast: the network, as :func:`~fastscnn_fast.segment` takes it.
        video: the path of a video, its bytes, a binary file, the number of a camera (of whose frames those are
            dropped for which there is no time), all of which need the extra ``video``; or an iterable of frames,
            each a picture as :func:`~fastscnn_fast.segment` takes it: RGB, which OpenCV's are as ``frame[:, :, ::-1]``.
        size: (height, width) to run the network at, or the side of a square, by default
            :func:`~fastscnn_fast.runtime.segment.run_size`. Frames are brought to it by torch, within one level of
            what :func:`~fastscnn_fast.segment` makes of pictures.
        every: take every so many-th frame only, the first of all among them.
        out: uint8 (H, W), filled and yielded again for each frame, instead of new arrays.
        frames: also yield each frame: pairs of :class:`Frame` and labels.

    Raises:
        TypeError: ``fast`` is no such network, ``video`` nothing of these, ``size`` or ``every`` no integers, ``out``
            no array.
        ValueError: the video cannot be opened, has no pictures or none that can be decoded, a picture cannot be read,
            ``size`` is below 32 a side, ``every`` below 1, ``out`` is not as the labels are, the model is in
            training mode or has more than 256 classes.
        ImportError: the extra ``video`` is not installed.
    """
    fast = check_model(fast)
    run_at = None if size is None else picture_size(size)
    check_every(every)
    if out is not None:
        check_out(out)
    channels = fast.config.in_channels

    def pair(seconds: float | None, pixels: NDArray[np.uint8], labels: Labels) -> Any:
        return Frame(pixels, seconds), labels

    if isinstance(video, (np.ndarray, Tensor)) and video.ndim != 4:
        raise ValueError(
            f"video must have four dimensions where it is an array or tensor of frames, got {_kind(video)}"
        )
    if _is_iterable(video):
        numbered = enumerate(cast(Iterable[Picture], video))
        steps: Generator[Any, None, None] = labelled(
            fast,
            islice(numbered, 0, None, every),
            lambda one: pixels_of(one[1], channels, None, f"video[{one[0]}]"),
            lambda one, pixels, labels: pair(None, pixels, labels),
            run_at,
        )
        return _begun(_filled(steps, None, out, frames))
    opened = Video(cast(VideoSource, video))
    steps = labelled(
        fast,
        opened.read(every=every),
        lambda frame: frame_pixels(cast("av.VideoFrame", frame), channels),
        lambda frame, pixels, labels: pair(frame.time, pixels, labels),
        run_at,
        opened.live,
    )
    return _begun(_filled(steps, opened, out, frames))


class Frame(NamedTuple):
    """A frame of a video.

    Attributes:
        pixels: uint8 (H, W, C), upright, RGB where the network has three channels.
        seconds: its time in the video; None where it says none.
    """

    pixels: NDArray[np.uint8]
    seconds: float | None


def check_every(every: int) -> None:
    """Refuses what is no integer of at least 1."""
    if isinstance(every, bool) or not isinstance(every, (int, np.integer)):
        raise TypeError(f"every must be an integer of at least 1, got {every!r}")
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")


def _kind(value: object) -> str:
    if isinstance(value, (np.ndarray, Tensor)):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


def _is_iterable(video: object) -> bool:
    """Whether it is many frames and not one thing to open."""
    if isinstance(video, (str, bytes, bytearray, memoryview)) or hasattr(video, "read"):
        return False
    return isinstance(video, Iterable) and not isinstance(video, Mapping)


def _begun(generator: Generator[Any, None, None]) -> Generator[Any, None, None]:
    """Stands at its first yield, so that closing it closes what it holds, taken from or not."""
    next(generator)
    return generator


def _filled(
    steps: Generator[tuple[Any, Any], None, None],
    video: Video | None,
    out: Labels | None,
    frames: bool,
) -> Generator[Any, None, None]:
    count = 0
    with video or nullcontext(), closing(steps):
        yield None  # to _begun
        for _, (frame, labels) in steps:
            if out is not None:
                labels = filled(out, labels)
            count += 1
            yield (frame, labels) if frames else labels
    if video is not None and (damage := video.damage) is not None:
        if not count:
            raise ValueError(damage)
        logger.warning("%s", damage)


_running, _threads, _lock = 0, 0, threading.Lock()


@contextmanager
def _shared_out() -> Iterator[int]:
    """The number of torch's threads, for a run whose workers set others.

    Threads that are yet to come take the last number that any thread set, a run's that begins meanwhile too. So of runs
    that overlap the first says the number for all, and the last one to end sets it again.
    """
    global _running, _threads
    with _lock:
        if _running == 0:
            _threads = torch.get_num_threads()
        _running += 1
    try:
        yield _threads
    finally:
        with _lock:
            _running -= 1
            if _running == 0:
                torch.set_num_threads(_threads)


def labelled(
    fast: FusedFastSCNN | FastSCNN,
    items: Iterable[Item],
    pixels_of: Callable[[Item], NDArray[np.uint8] | None],
    finish: Callable[[Item, NDArray[np.uint8], Labels], Made],
    size: tuple[int, int] | None,
    live: bool = False,
) -> Generator[tuple[Item, Made | None], None, None]:
    """Each item, in order, with ``finish(item, pixels, labels)``; what has no pixels goes along with None.

    Items are made in one thread, all else in as many as torch has, each frame by itself: a frame alone leaves threads
    of the network waiting for each other, most of all beside a decoder and an encoder. On a GPU the network takes
    one frame at a time. ``live`` drops the oldest items for which there is no time.
    """
    one_by_one: AbstractContextManager[Any] = nullcontext()
    if next(fast.buffers()).device.type != "cpu":
        one_by_one = threading.Lock()

    def work(item: Item) -> tuple[Item, Made | None]:
        pixels = pixels_of(item)
        if pixels is None:
            return item, None
        x = as_input(pixels, size or run_size(pixels, fast.config))
        with one_by_one:
            (classified,) = classify(fast, [x])
        labels, _ = classified.at(pixels.shape)
        return item, finish(item, pixels, labels)

    with _shared_out() as threads:
        workers = min(threads, _MOST_WORKERS)

        def begin() -> None:
            torch.set_num_threads(max(1, threads // workers))

        yield from each(beside(items, _AHEAD, live), work, workers, begin)
