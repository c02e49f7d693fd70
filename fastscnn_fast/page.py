"""A page to try weights in a browser, by gradio (the extra [app]): a picture in, its overlay, shares and milliseconds out."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from .arch.config import Size
from .backends import registry
from .checkpoints import load_checkpoint
from .data.classes import label_names
from .data.pictures import Picture, overlay
from .data.scenes import street
from .extras import need
from .program.arithmetic import ARITHMETICS
from .runtime.fused import FusedFastSCNN, fuse
from .runtime.segment import classify, prepare

#: Networks that are kept fused, 5 to 20 MB each.
_KEPT = 8
_FORGET = 600  # seconds after which pictures on the disk are removed
_HEIGHT = 420  # of pictures on the page
_STREET = (12, 360, 720)  # seed, height, width of the picture that is there at first
#: Sizes to run at, by what the page calls them.
SIZES: dict[str, Size | None] = {
    "as trained": None,
    "256x512": (256, 512),
    "512x1024": (512, 1024),
    "1024x2048": (1024, 2048),
}


class Shown(NamedTuple):
    """What the page shows of a picture.

    Attributes:
        overlay: the picture tinted by class, above a legend.
        shares: of the pixels, by the classes that occur, from 0 to 1, the largest first.
        told: how long it took, and in what.
    """

    overlay: Image.Image
    shares: dict[str, float]
    told: str


def arithmetics() -> list[str]:
    """The names of those that there are kernels for on this machine."""
    backends = set(registry.GPU_BACKENDS) if torch.cuda.is_available() else {"cpu"}
    return [name for name, one in ARITHMETICS.items() if not backends.isdisjoint(one.needs)]


class Page:
    """Labels pictures by several weights, each fused when it is first chosen.

    Args:
        weights: files of weights, by what the page calls them.
    """

    def __init__(self, weights: Mapping[str, str | os.PathLike[str]]) -> None:
        self.weights = weights
        self._networks: OrderedDict[tuple[str, str], FusedFastSCNN] = OrderedDict()
        self._lock = threading.Lock()

    def label(self, picture: Picture, weights: str, arithmetic: str, size: str) -> Shown:
        """What is shown of a picture.

        Raises:
            ValueError: it cannot be read, or the weights cannot run so.
        """
        with self._lock:  # the network takes all processors
            fast = self._network(weights, arithmetic)
            begin = time.perf_counter()
            pixels, x = prepare(picture, fast.config, SIZES[size])
            before = time.perf_counter()
            classify(fast, [x])  # at a new size memory is laid out
            between = time.perf_counter()
            (found,) = classify(fast, [x])
            after = time.perf_counter()
        labels, _ = found.at(pixels.shape)
        shown = overlay(pixels, labels, fast.classes, fast.palette)
        ids, counts = np.unique(labels, return_counts=True)
        names, order = label_names(fast.classes), np.argsort(-counts)
        shares = {names[ids[k]]: float(counts[k] / labels.size) for k in order}
        rest = time.perf_counter() - begin - (after - before)
        height, width = x.shape[2:]
        return Shown(
            shown,
            shares,
            f"**{1000 * (after - between):.1f} ms** for {height}x{width} pixels in {arithmetic}, on the backend"
            f" {fast.backend}, {torch.get_num_threads()} threads; reading and drawing {1000 * rest:.0f} ms",
        )

    def _network(self, weights: str, arithmetic: str) -> FusedFastSCNN:
        key = (weights, arithmetic)
        if key not in self._networks:
            model, asked = load_checkpoint(self.weights[weights]), ARITHMETICS[arithmetic]
            model.to("cuda" if torch.cuda.is_available() else "cpu")
            self._networks[key] = fuse(model, dtype=asked.dtype, precision=asked.precision)
        self._networks.move_to_end(key)
        while len(self._networks) > _KEPT:
            self._networks.popitem(last=False)
        return self._networks[key]

    def blocks(self) -> Any:
        """The page, to be launched.

        Raises:
            ImportError: gradio is missing.
        """
        need("the page", "app", "gradio")
        import gradio as gr

        def label(picture: str | None, *chosen: str) -> tuple[Any, ...]:
            if picture is None:
                return None, None, ""
            try:
                return tuple(self.label(picture, *chosen))
            except (ValueError, RuntimeError) as error:
                return None, None, f"**{error}**"

        with gr.Blocks(
            title="fastscnn_fast", analytics_enabled=False, delete_cache=(_FORGET, _FORGET)
        ) as blocks:
            gr.Markdown("# Fast-SCNN\nDrop a picture, paste one, or take one with the camera.")
            with gr.Row():
                weights = gr.Dropdown(list(self.weights), label="Weights")
                arithmetic = gr.Dropdown(arithmetics(), label="Arithmetic")
                size = gr.Dropdown(list(SIZES), label="Size that the network runs at")
            with gr.Row():
                picture = gr.Image(
                    type="filepath",
                    sources=["upload", "webcam", "clipboard"],
                    label="Picture",
                    image_mode=None,  # the file as it is: 16 bits, EXIF
                    height=_HEIGHT,
                    scale=3,
                )
                shown = gr.Image(
                    label="Classes",
                    interactive=False,
                    format="png",
                    height=_HEIGHT,
                    buttons=["download", "fullscreen"],
                    scale=3,
                )
                shares = gr.Label(label="Share of the pixels", show_heading=False, scale=2)
            told = gr.Markdown()
            inputs = [picture, weights, arithmetic, size]
            gr.on(
                [each.change for each in inputs],
                label,
                inputs,
                [shown, shares, told],
                trigger_mode="always_last",
                show_progress="hidden",
                api_name="label",
            )
            blocks.load(lambda: Image.fromarray(street(*_STREET)[0]), None, picture)
        return blocks
