"""How fast ``segment`` is with a video, or with a folder of pictures, beside each of its stages alone.

    python benchmarks/bench_video.py [--folder PICTURES]

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

from fastscnn_fast import FusedFastSCNN, fuse, load_checkpoint
from fastscnn_fast.cli import clips, options, results
from fastscnn_fast.data.jobs import Job, find
from fastscnn_fast.data.pictures import size_of
from fastscnn_fast.data.scenes import street
from fastscnn_fast.data.videos import Overlay, Video, Writer, frame_pixels
from fastscnn_fast.runtime.flow import flow
from fastscnn_fast.runtime.network import as_input
from fastscnn_fast.runtime.segment import Prepared, classify, prepare, run_size

HEIGHT, WIDTH = 720, 1280
Stages = dict[str, Callable[[], object]]


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
    parser.add_argument(
        "--folder", type=options.path, help="pictures to segment with --labels-only instead"
    )
    parser.add_argument("--repeats", type=options.count, default=5)
    args = parser.parse_args()
    model = load_checkpoint()
    fast = fuse(model, dtype=options.DTYPES[args.dtype])
    with tempfile.TemporaryDirectory() as folder:
        stages, count = (
            _video(fast, Path(folder), args.frames)
            if args.folder is None
            else _pictures(fast, args.folder, Path(folder))
        )
        times = {name: measured(stage, count, args.repeats) for name, stage in stages.items()}
    for name, (wall, cpu) in times.items():
        rate = f"{wall:7.2f} ms each, {1e3 / wall:7.1f} a second"
        print(f"{name:8} {rate}, {cpu:7.2f} ms of processors")
    whole, _ = times.pop("all")
    slowest = max(wall for wall, _ in times.values())
    cores = len(os.sched_getaffinity(0))
    busy = sum(cpu for _, cpu in times.values()) / cores
    print(f"all, of the slowest stage alone: {slowest / whole:.2f}")
    print(f"all, of {cores} cores always busy:      {busy / whole:.2f}")


def _video(fast: FusedFastSCNN, folder: Path, count: int) -> tuple[Stages, int]:
    path, out = folder / "clip.mp4", folder / "out.mp4"
    film(path, count)

    def pixels(frame: Any) -> Any:
        return frame_pixels(frame, fast.config.in_channels)

    def decode() -> list[torch.Tensor]:
        with Video(path) as video:
            read = map(pixels, video.read())
            return [as_input(one, run_size(one, fast.config)) for one in read]

    def network() -> None:
        for x in inputs:
            classify(fast, [x])

    def encode() -> None:
        with Video(path) as video, Writer(out, "mp4", video) as writer:
            for frame, one in zip(frames, classified):
                labels, _ = one.at((HEIGHT, WIDTH))
                writer.write(overlay(frame, labels, (HEIGHT, WIDTH)), frame)

    def everything() -> None:
        with redirect_stdout(StringIO()):
            clips.segment(fast, clips.Clip(path, out, None, 1, labels_only=False, show=False))

    overlay = Overlay(fast.classes, fast.palette)
    inputs = decode()
    with Video(path) as video:
        frames: list[Any] = list(video.read())
    classified = [classify(fast, [x])[0] for x in inputs]
    return {"decode": decode, "network": network, "encode": encode, "all": everything}, count


def _pictures(fast: FusedFastSCNN, source: Path, folder: Path) -> tuple[Stages, int]:
    jobs = find([str(source)]).jobs

    def read() -> list[Prepared]:
        return [prepare(job.path, fast.config) for job in jobs]

    def network() -> None:
        for one in pictures:
            classify(fast, [one.x])

    def write() -> None:
        for job, one in zip(jobs, pictures):
            results.write(folder / job.name, one.pixels, labels[job], fast, None)

    def everything() -> None:
        def write_one(job: Job, pixels: Any, labels: Any, _: object) -> None:
            results.write(folder / job.name, pixels, labels, fast, None)

        def read_one(job: Job) -> Prepared:
            return prepare(job.path, fast.config)

        for _, outcome in flow(fast, jobs, read_one, write_one, lambda job: size_of(job.path)):
            outcome.result()

    pictures = read()
    labels = {
        job: classify(fast, [one.x])[0].at(one.pixels.shape)[0] for job, one in zip(jobs, pictures)
    }
    return {"read": read, "network": network, "write": write, "all": everything}, len(jobs)


if __name__ == "__main__":
    main()
