"""Small videos for the tests, made by PyAV."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

MILLISECOND = Fraction(1, 1000)


def drawn(count: int, height: int = 48, width: int = 64) -> list[NDArray[np.uint8]]:
    """Frames (H, W, 3) that differ: a street that moves to the left, red above and left."""
    from fastscnn_fast.data.scenes import street

    picture = street(4, height, width)[0]
    frames = [np.ascontiguousarray(np.roll(picture, -3 * k, 1)) for k in range(count)]
    for frame in frames:
        frame[: height // 4, : width // 4] = (255, 0, 0)
    return frames


def write(
    path: Path,
    frames: Sequence[NDArray[np.uint8]],
    codec: str = "ffv1",
    pixel_format: str = "bgr0",
    times: Sequence[int] | None = None,
    sound: str | None = None,
    rotation: int = 0,
    start: int = 0,
    **options: Any,
) -> Path:
    """A clip of ``frames`` at 25 a second or at ``times`` (ms), with a tone coded as ``sound``, 40 ms a frame.

    ``rotation``, in degrees to the left, is how an MP4 says that it is to be shown.
    """
    times = [40 * k for k in range(len(frames))] if times is None else times
    with av.open(str(path), "w", **options) as file:
        video = file.add_stream(codec, rate=25)
        video.height, video.width, video.pix_fmt = *frames[0].shape[:2], pixel_format
        video.codec_context.time_base = MILLISECOND
        tone = None if sound is None else file.add_stream(sound, rate=48000, layout="mono")
        for k, (pixels, time) in enumerate(zip(frames, times)):
            frame = av.VideoFrame.from_ndarray(
                pixels, "rgb24" if pixels.shape[2:] == (3,) else "rgba"
            )
            frame.pts, frame.time_base = time + start, MILLISECOND
            file.mux(video.encode(frame))
            if tone is not None:
                wave = np.sin(np.arange(1920 * k, 1920 * k + 1920) / 17, dtype=np.float32)
                heard = av.AudioFrame.from_ndarray(wave[None] / 2, "fltp", "mono")
                heard.sample_rate, heard.pts = 48000, 1920 * k + 48 * start
                heard.time_base = Fraction(1, 48000)
                file.mux(tone.encode(heard))
        for stream in (video, tone) if tone is not None else (video,):
            file.mux(stream.encode(None))
    if rotation:
        content = path.read_bytes()
        turn = {90: (0, -1, 1, 0), 180: (-1, 0, 0, -1), 270: (0, 1, -1, 0)}[rotation]
        a, b, c, d = (65536 * one for one in turn)
        place = content.index(b"tkhd") + 44  # of the picture's matrix, after times and volume
        matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
        path.write_bytes(content[:place] + matrix + content[place + 36 :])
    return path


def read(path: Path, pixel_format: str = "rgb24") -> tuple[list[NDArray[Any]], list[int]]:
    """The frames of a video, and their times in milliseconds."""
    with av.open(str(path)) as file:
        frames = list(file.decode(video=0))
    times = [round(1000 * frame.time) for frame in frames]
    return [frame.to_ndarray(format=pixel_format) for frame in frames], times


def packets(path: Path, kind: str = "audio") -> list[bytes]:
    """The packets of sound, as they are stored."""
    with av.open(str(path)) as file:
        streams = [stream for stream in file.streams if stream.type == kind]
        return [bytes(packet) for packet in file.demux(*streams) if packet.size] if streams else []
