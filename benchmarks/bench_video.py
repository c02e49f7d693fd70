"""How fast ``segment`` is with a video, beside each of its stages alone: ``python benchmarks/bench_video.py``.

Decoding, the network and encoding share the processor's cores. So besides the slowest stage alone, a second bound is
printed: all cores busy all the time with what the stages take of them together.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from fastscnn_fast import fuse, load_checkpoint
from fastscnn_fast.cli import clips, options
from fastscnn_fast.data.scenes import street
from fastscnn_fast.data.videos import Overlay, Video, Writer, frame_pixels
from fastscnn_fast.runtime.network import as_input
from fastscnn_fast.runtime.segment import classify, run_size

HEIGHT, WIDTH = 720, 1280


def film(path: Path, count: int) -> None:
    """A street that moves to the left, as H.264."""
    picture = street(1, HEIGHT, WIDTH)[0]
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for k in range(count):
            pixels = np.ascontiguousarray(np.roll(picture, -4 * k, 1))
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        file.mux(stream.encode(None))


def measured(stage: Callable[[], object], count: int, repeats: int) -> tuple[float, float]:
    """Milliseconds a frame, of the clock and of the processor, of the fastest of some runs."""
    runs = []
    for _ in range(repeats):
        clock, busy = time.perf_counter(), time.process_time()
        stage()
        runs.append((time.perf_counter() - clock, time.process_time() - busy))
    wall, cpu = min(runs)
    return 1e3 * wall / count, 1e3 * cpu / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    options.add_dtype(parser, "float32")
    parser.add_argument("--frames", type=options.count, default=120)
    parser.add_argument("--repeats", type=options.count, default=5)
    args = parser.parse_args()
    model = load_checkpoint()
    fast = fuse(model, dtype=options.DTYPES[args.dtype])
    folder = tempfile.TemporaryDirectory()
    path, out = Path(folder.name, "clip.mp4"), Path(folder.name, "out.mp4")
    film(path, args.frames)

    def pixels(frame: Any) -> Any:
        return frame_pixels(frame, model.config.in_channels)

    def decode() -> list[torch.Tensor]:
        with Video(path) as video:
            read = map(pixels, video.read())
            return [as_input(one, run_size(one, model.config)) for one in read]

    def network() -> None:
        for x in inputs:
            classify(fast, [x])

    def encode() -> None:
        with Video(path) as video, Writer(out, "mp4", video) as writer:
            for frame in frames:
                writer.write(overlay(frame, labels, (HEIGHT, WIDTH)), frame)

    def everything() -> None:
        with redirect_stdout(StringIO()):
            clips.segment(fast, clips.Clip(path, out, None, 1, labels_only=False, show=False))

    overlay = Overlay(fast.classes, fast.palette)
    inputs = decode()
    with Video(path) as video:
        frames: list[Any] = list(video.read())
    labels, _ = classify(fast, inputs[:1])[0].at((HEIGHT, WIDTH))
    stages = {"decode": decode, "network": network, "encode": encode, "all": everything}
    times = {name: measured(stage, args.frames, args.repeats) for name, stage in stages.items()}
    folder.cleanup()
    for name, (wall, cpu) in times.items():
        print(
            f"{name:8} {wall:7.2f} ms a frame, {1e3 / wall:7.1f} frames a second, {cpu:7.2f} ms of processors"
        )
    whole, _ = times.pop("all")
    slowest = max(wall for wall, _ in times.values())
    cores = len(os.sched_getaffinity(0))
    busy = sum(cpu for _, cpu in times.values()) / cores
    print(f"all, of the slowest stage alone: {slowest / whole:.2f}")
    print(f"all, of {cores} cores always busy:      {busy / whole:.2f}")


if __name__ == "__main__":
    main()
