"""``fastscnn_fast app``: a page to try weights in a browser."""

from __future__ import annotations

import argparse
from importlib import import_module

from ..checkpoints import SHIPPED
from ..page import Page
from . import options


def add_options(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Serve a page on which a picture, dropped or taken with the camera, is segmented by the weights and in the arithmetic"
        " that are chosen there: the picture tinted by class, the share of each class, and milliseconds. Ctrl-C ends it."
        " It needs the extra app."
    )
    command.add_argument(
        "--weights",
        nargs="+",
        type=options.weights,
        default=[],
        metavar="F",
        help="checkpoints to choose from, besides the package's own",
    )
    command.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at (%(default)s: this machine alone; 0.0.0.0: everybody who reaches it)",
    )
    command.add_argument("--port", type=_port, default=7860, help="port to listen at (%(default)s)")
    command.add_argument("--open", action="store_true", help="open it in a browser")


def _port(text: str) -> int:
    """An integer from 1 to 65535."""
    if not (text.isdecimal() and 1 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to 65535, got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    names = [path.name for path in args.weights]
    own = {str(path) if names.count(path.name) > 1 else path.name: path for path in args.weights}
    page = Page({**own, **SHIPPED})
    blocks = page.blocks()
    gradio = import_module("gradio")
    blocks.launch(
        server_name=args.host,
        server_port=args.port,
        inbrowser=args.open,
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        footer_links=[],
        quiet=True,
        show_error=True,
        prevent_thread_lock=True,
    )
    print(f"http://{args.host}:{args.port}", flush=True)
    blocks.block_thread()
    return 0
