"""Times on a GPU, without what Python and launching take. Not measured on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

_WARM_UPS = 3  # as torch documents: libraries choose algorithms and take workspaces
_MOST_COPIES = 512


def copies(bytes_: int, device: torch.device) -> int:
    """How many copies of ``bytes_`` to take in turns, so that none is in a GPU's L2 cache when it is its turn."""
    if device.type != "cuda":
        return 2
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(2 * cache // bytes_ + 1, 2), _MOST_COPIES)


def milliseconds(runs: Sequence[Callable[[], object]], rounds: int = 21) -> list[float]:
    """Of one run on the current device, ``rounds`` times, by CUDA events around a graph of all of them.

    So neither Python nor launching counts.
    """
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for run in runs[:_WARM_UPS]:
            run()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for run in runs:
            run()
    graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / len(runs) for start, end in events]
