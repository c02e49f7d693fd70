"""Videos and cameras in, videos out, by PyAV: frames as they are shown, sound as it is, damage told of."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..extras import need
from .classes import Colour, label_colours, label_count
from .pictures import BinaryFile, legend, no_file, pixels_of, rewind

if TYPE_CHECKING:
    import av
    from av.video.stream import VideoStream

#: What is read as a video: a path, its bytes, a binary file, or a camera's number.
VideoSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryFile | int"
)

#: Endings of the videos that are written, and how FFmpeg calls these containers.
CONTAINERS = {".m4v": "mp4", ".mkv": "matroska", ".mov": "mov", ".mp4": "mp4", ".webm": "webm"}
#: How labels are kept without loss in those that can.
LOSSLESS = {"matroska": "ffv1", "mov": "png", "mp4": "ffv1"}
_MPEG, _FULL = 1, 2  # FFmpeg's numbers for the ranges 16 to 235 and 0 to 255
_BT709, _UNSPECIFIED = 1, 2  # its numbers for matrices, primaries and transfer functions
_GAMUT = ("color_primaries", "color_trc")  # which frames of PyAV 16 do not have
#: By how much containers err about how long they are: a share of that or a frame and a half, but no more than seconds.
_SHORT_SHARE, _SHORT_FRAMES, _SHORT_MOST = 0.02, 1.5, 0.5
_converters = threading.local()


def _av() -> Any:
    need("a video", "video", "av")
    import av

    return av


def errors() -> tuple[type[Exception], ...]:
    """What reading and writing videos raises: FFmpeg's errors have the numbers of the system's, or their own."""
    return OSError, _av().error.FFmpegError


def converted(frame: av.VideoFrame, pixel_format: str, **options: Any) -> av.VideoFrame:
    """``frame.reformat``, without the milliseconds that a new converter takes for each frame."""
    if not hasattr(_converters, "of_thread"):
        _av()
        from av.video.reformatter import VideoReformatter

        _converters.of_thread = VideoReformatter()
    result: av.VideoFrame = _converters.of_thread.reformat(frame, format=pixel_format, **options)
    return result


def upright(frame: av.VideoFrame, plane: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A plane or pixels of ``frame`` (H, W, ...), turned as its metadata say that it is shown."""
    return np.ascontiguousarray(np.rot90(plane, round(frame.rotation / 90)))


def frame_pixels(frame: av.VideoFrame | av.Packet[Any], channels: int) -> NDArray[np.uint8] | None:
    """The upright pixels of a frame of any format, uint8 (H, W, channels); None of a packet."""
    from av import VideoFrame

    if not isinstance(frame, VideoFrame):
        return None
    own: Any = converted(frame, "rgb24" if channels % 2 else "rgba").to_ndarray()
    return pixels_of(upright(frame, own), channels, None)


class Video:
    """A video file or a camera, opened; close it, or use it in ``with``.

    Attributes:
        name: what errors call it.
        live: whether it is a camera, whose frames do not wait.
        stream: PyAV's stream of the pictures, ``sound`` those of sound.
        seconds: how long it says that it is; None where it does not.
        size: (height, width) of its first frame, upright, once that is read.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: it cannot be read, or has no pictures; the message names it.
    """

    def __init__(self, source: VideoSource, name: str = "video") -> None:
        av = _av()
        self.name, self.live, file, kind = _opened(source, name)
        try:
            self.container = av.open(file, format=kind)
        except errors() as error:
            why = getattr(error, "strerror", error)
            if self.live:
                said = f"cannot be opened ({why}: {file})"
            else:
                said = "is empty" if _empty(file) else f"cannot be read: {why}"
            raise ValueError(f"{self.name}: {said}") from error
        cover = av.stream.Disposition.attached_pic
        shown = [one for one in self.container.streams.video if not one.disposition & cover]
        if not shown:
            kinds = _kinds(self.container)
            self.container.close()
            raise ValueError(f"{self.name}: has no pictures, only {kinds}")
        self.stream: VideoStream = shown[0]
        self.stream.thread_type = "AUTO"
        self.sound = list(self.container.streams.audio)
        long = None if self.live else self.container.duration
        self.seconds = long / 1e6 if long else None
        if self.container.format.name == "avi" and self.stream.average_rate:
            # Of one that is cut off FFmpeg takes what is there for all of it.
            frames = self.stream.frames or 0
            self.seconds = max(self.seconds or 0, float(frames / self.stream.average_rate)) or None
        self.start = max(0, self.container.start_time or 0) / 1e6  # sound may begin just before 0
        self.size: tuple[int, int] | None = None
        self._undecoded = 0
        self._read = 0
        self._until = 0.0
        self._stopped: str | None = None
        self._torn = False

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    @property
    def rate(self) -> Fraction:
        """Frames a second, on average."""
        return self.stream.average_rate or self.stream.guessed_rate or Fraction(25)

    @property
    def count(self) -> int | None:
        """About how many frames there are, as far as it says so."""
        return self.stream.frames or (round(self.seconds * self.rate) if self.seconds else None)

    def read(
        self, sound: bool = False, every: int = 1
    ) -> Generator[av.VideoFrame | av.Packet[Any], None, None]:
        """Every so many-th frame, in the order in which they are shown, and, with ``sound``, the packets between them.

        What cannot be decoded is left out, and a file ends where it cannot be read on: :attr:`damage` tells.
        """
        error = _av().error.FFmpegError
        packets = self.container.demux()  # of all streams: the longest says where the file ends
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except error as stop:
                self._stopped = stop.strerror
                return
            if packet.pts is not None and packet.time_base is not None:
                end = packet.pts + (packet.duration or 0)
                self._until = max(self._until, float(end * packet.time_base))
            if packet.stream is not self.stream and packet.stream not in self.sound:
                continue
            # It ends where the file does, or does not join the one before.
            self._torn |= packet.is_corrupt
            if packet.stream is not self.stream:
                if sound and packet.size:
                    yield packet
                continue
            try:
                frames = packet.decode()
            except error:
                self._undecoded += 1
                continue
            for frame in frames:
                if self.size is None:
                    turned = round(frame.rotation / 90) % 2
                    sides = (frame.height, frame.width)
                    self.size = sides[::-1] if turned else sides
                self._undecoded += frame.is_corrupt
                if self._read % every == 0:
                    yield frame
                self._read += 1

    @property
    def _short(self) -> float:
        share = _SHORT_SHARE * (self.seconds or 0)
        return min(_SHORT_MOST, max(share, _SHORT_FRAMES * self._until / max(1, self._read)))

    @property
    def damage(self) -> str | None:
        """What was wrong with a file that was read to its end, in a sentence; None where all was there."""
        said = []
        if self._undecoded:
            said.append(f"{self._undecoded} of its frames are damaged")
        if self._stopped is not None:
            said.append(f"it cannot be read beyond {self._until:.1f} s ({self._stopped})")
        elif self.seconds is not None and self._until < self.seconds - self._short:
            said.append(f"it is cut off after {self._until:.2f} of {self.seconds:.2f} s")
        elif self._torn:
            said.append("parts of it are missing, as where a file is cut off")
        elif not self._read and not said:
            said.append("no frame in it can be decoded")
        if not said:
            return None
        return f"{self.name}: {' and '.join(said)}; {self._read} frames could be read"


def _opened(source: VideoSource, name: str) -> tuple[str, bool, Any, str | None]:
    """The name, whether it is a camera, and what FFmpeg opens, and as what."""
    if isinstance(source, (int, np.integer)) and not isinstance(source, bool):
        if source < 0:
            raise ValueError(f"{name} must be a camera's number from 0 up, got {source}")
        return (f"camera {source}", True, *_camera(int(source)))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return name, False, io.BytesIO(bytes(source)), None
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        if not isinstance(path, str) or path == "":
            raise ValueError(f"{name} must be a path, got {path!r}")
        if (why_not := no_file(path)) is not None:
            raise ValueError(f"{path}: {why_not}")
        return path, False, path, None
    if isinstance(source, io.TextIOBase):
        raise TypeError(f'{name} must be a file opened in binary mode ("rb"), got one of text')
    if callable(getattr(source, "read", None)):
        rewind(source)
        found = getattr(source, "name", None)
        return found if isinstance(found, str) and found else name, False, source, None
    raise TypeError(
        f"{name} must be a path, the bytes of a video, a binary file, a camera's number or an iterable of"
        f" pictures, got {type(source).__name__}"
    )


def _camera(number: int) -> tuple[str, str]:
    """What FFmpeg opens for a camera, and as what."""
    if sys.platform == "darwin":
        return str(number), "avfoundation"
    if sys.platform == "win32":
        return str(number), "vfwcap"
    return f"/dev/video{number}", "v4l2"


def _empty(file: str | IO[bytes]) -> bool:
    if isinstance(file, str):
        return os.path.getsize(file) == 0
    return isinstance(file, io.BytesIO) and not file.getbuffer()


def _kinds(container: Any) -> str:
    return " and ".join(sorted({one.type for one in container.streams})) or "nothing"


class Overlay:
    """Tints frames by class, with the legend of all classes in the lowest rows, where it fits.

    It works on luminance and colour differences as they are stored, so that what is not tinted stays as it was.
    """

    def __init__(
        self, classes: Sequence[str], palette: Sequence[Colour], strength: float = 0.55
    ) -> None:
        first = label_count(len(classes)) - len(classes)  # label of the first class
        self._entries = list(zip(classes, palette))
        self._colours = np.zeros((256, 3), np.uint8)
        colours = label_colours(palette)
        self._colours[: len(colours)] = colours
        self._tinted = range(first, first + len(classes))
        self._strength = round(256 * strength)
        self._made: dict[tuple[int, tuple[int, int], str], _Tint] = {}

    def __call__(
        self, frame: av.VideoFrame, labels: NDArray[np.uint8], size: tuple[int, int]
    ) -> av.VideoFrame:
        """The tinted frame, upright and of ``size`` (height, width), that of ``labels``, in 8 bits."""
        height, width = size if round(frame.rotation / 90) % 2 == 0 else size[::-1]
        pixel_format = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        options: dict[str, Any] = {"width": width, "height": height, "dst_color_range": _MPEG}
        if frame.format.is_rgb:
            options["dst_colorspace"] = _BT709
        plain = frame
        if (frame.format.name, frame.height, frame.width) != (pixel_format, height, width) or (
            frame.color_range == _FULL
        ):
            plain = converted(frame, pixel_format, **options)
        of = (plain.colorspace, size, pixel_format)
        if of not in self._made:
            self._made[of] = self._tint(*of)
        tint = self._made[of]
        made: av.VideoFrame = _av().VideoFrame(size[1], size[0], pixel_format)
        seen = labels
        for own, plane, table, strip in zip(
            _planes(plain), _planes(made), tint.tables, tint.strips
        ):
            if plane.shape != seen.shape:  # of colour differences, both of one shape
                seen = labels[::2, ::2].copy()
            self._blend(upright(frame, own), seen, table, plane)
            if strip is not None:
                plane[-strip.shape[0] :, : strip.shape[1]] = strip
        made.colorspace, made.color_range = plain.colorspace, _MPEG
        for name in _GAMUT if not frame.format.is_rgb else ():
            if hasattr(plain, name):
                setattr(made, name, getattr(plain, name))
        return made

    def _blend(
        self,
        plane: NDArray[np.uint8],
        labels: NDArray[np.uint8],
        table: bytes,
        out: NDArray[np.uint8],
    ) -> None:
        """Brings ``plane`` (h, w) towards what ``table``, times the strength already, has for ``labels`` (h, w)."""
        kept = plane * np.uint16(256 - self._strength)
        kept += 128
        kept >>= 8
        tints = np.frombuffer(labels.tobytes().translate(table), np.uint8).reshape(labels.shape)
        np.add(kept, tints, out=out, casting="unsafe")
        if labels.min() < self._tinted.start or labels.max() >= self._tinted.stop:
            untinted = (labels < self._tinted.start) | (labels >= self._tinted.stop)
            np.copyto(out, plane, where=untinted)

    def _tint(self, colorspace: int, size: tuple[int, int], pixel_format: str) -> _Tint:
        options = {"dst_color_range": _MPEG}
        if colorspace != _UNSPECIFIED:
            options["dst_colorspace"] = colorspace
        colours = converted(_frame(self._colours[None].repeat(2, 0)), "yuv444p", **options)
        strips: list[NDArray[np.uint8] | None] = [None] * 3
        entries = legend(self._entries, 0, max(11, size[1] // 80), size[1])
        height, width = -(-entries.height // 2) * 2, entries.width // 2 * 2
        if 4 * height <= size[0] and 2 <= width <= size[1]:
            padded = Image.new("RGB", (width, height), (255, 255, 255))
            padded.paste(entries)
            stored = converted(_frame(np.asarray(padded)), pixel_format, **options)
            strips = [plane.copy() for plane in _planes(stored)]
        shares = [(plane[0] * np.uint32(self._strength) + 128) >> 8 for plane in _planes(colours)]
        return _Tint([share.astype(np.uint8).tobytes() for share in shares], strips)


class _Tint(NamedTuple):
    """What each of the 256 labels adds to each plane, and the legend in each plane, where it fits."""

    tables: list[bytes]
    strips: list[NDArray[np.uint8] | None]


def label_frame(labels: NDArray[np.uint8]) -> av.VideoFrame:
    """Labels (H, W) as a grey frame."""
    made: av.VideoFrame = _av().VideoFrame.from_ndarray(np.ascontiguousarray(labels), "gray")
    made.color_range = _FULL
    return made


def _frame(pixels: NDArray[np.uint8]) -> av.VideoFrame:
    made: av.VideoFrame = _av().VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
    return made


def _planes(frame: av.VideoFrame) -> list[NDArray[np.uint8]]:
    """Luminance and colour differences (h, w) of a frame in yuv420p or yuv444p: its own memory."""
    planes = []
    for plane in frame.planes:
        rows = np.frombuffer(cast(Any, plane), np.uint8).reshape(-1, plane.line_size)
        planes.append(rows[: plane.height, : plane.width])
    return planes


class Writer:
    """A video file of frames, as H.264 or, in WebM, as VP9, or of labels, as :data:`LOSSLESS` says.

    Frames keep their times. The sound of ``video`` goes along with frames: as it is, or encoded anew where the
    container does not take it so.

    Args:
        path: where to write; its ending does not matter.
        container: its format, one of the values of :data:`CONTAINERS`.
        video: where the frames come from.
        labels: the frames are labels, grey, to be kept as they are.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, container: str, video: Video, labels: bool = False) -> None:
        shown = "libvpx-vp9" if container == "webm" else "libx264"
        self._codec = LOSSLESS[container] if labels else shown
        self._file = _av().open(str(path), "w", format=container)
        self._video = video
        self._heard = [] if labels else video.sound
        self._stream: Any = None
        self._waiting: list[av.Packet[Any]] = []
        self._sound: dict[int, tuple[Any, bool]] = {}
        self._last: dict[Any, int] = {}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._stream is not None:
                for stream in (self._stream, *(s for s, anew in self._sound.values() if anew)):
                    self._file.mux(stream.encode(None))
        finally:
            self._file.close()

    def write(self, frame: av.VideoFrame, source: av.VideoFrame) -> None:
        """Adds a frame at the time of ``source``; later times than the last one's, where they are not."""
        if self._stream is None:
            self._begin(frame, source)
        if source.pts is None:
            time = self._last.get(None, -1) + max(1, round(1 / self._video.rate / self._time_base))
        else:
            time = source.pts - round(self._video.start / self._time_base)
        frame.pts = self._last[None] = max(time, self._last.get(None, time - 1) + 1)
        frame.time_base, frame.duration = self._time_base, source.duration
        self._file.mux(self._stream.encode(frame))

    def hear(self, packet: av.Packet[Any]) -> None:
        """Adds a packet of sound."""
        if self._stream is None:
            self._waiting.append(packet)
            return
        if (index := packet.stream.index) not in self._sound:
            return
        stream, anew = self._sound[index]
        if anew:
            with suppress(_av().error.InvalidDataError):  # a damaged packet is silence
                for heard in cast(Any, packet.decode()):
                    if heard.pts is not None:
                        heard.pts -= round(self._video.start / heard.time_base)
                    self._file.mux(stream.encode(heard))
        elif packet.dts is not None and packet.dts > self._last.get(index, packet.dts - 1):
            self._last[index] = packet.dts
            start = round(self._video.start / packet.time_base)
            packet.dts, packet.pts = packet.dts - start, (packet.pts or packet.dts) - start
            packet.stream = stream
            self._file.mux(packet)

    def _begin(self, frame: av.VideoFrame, source: av.VideoFrame) -> None:
        quick = {"deadline": "realtime", "cpu-used": "8", "row-mt": "1", "crf": "32", "b": "0"}
        options = {"libvpx-vp9": quick, "libx264": {"preset": "ultrafast", "crf": "21"}}
        rate = self._video.rate
        made = self._file.add_stream(self._codec, rate=rate, options=options.get(self._codec, {}))
        made.width, made.height, made.pix_fmt = frame.width, frame.height, frame.format.name
        self._time_base = source.time_base or 1 / rate
        context = made.codec_context
        context.time_base = self._time_base
        aspect = self._video.stream.sample_aspect_ratio
        if aspect:
            turned = round(source.rotation / 90) % 2
            context.sample_aspect_ratio = 1 / aspect if turned else aspect
        for name in ("color_range", "colorspace", *_GAMUT):
            if hasattr(frame, name):
                setattr(context, name, getattr(frame, name))
        self._stream = made
        for heard in self._heard:
            anew = heard.codec_context.name not in self._file.supported_codecs
            if anew:
                codec = self._file.default_audio_codec
                opus = {"codec_name": "libopus", "rate": 48000}
                how = opus if codec == "opus" else {"codec_name": codec, "rate": heard.rate}
                stream = self._file.add_stream(**how, layout=heard.layout)
            else:
                stream = self._file.add_stream_from_template(heard)
            self._sound[heard.index] = stream, anew
        for packet in self._waiting:
            self.hear(packet)
        self._waiting.clear()
