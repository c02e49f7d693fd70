"""The examples do what they say."""

from __future__ import annotations

import io
import runpy
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from fastscnn_fast import bench, fuse, segment
from fastscnn_fast.checkpoints import load_checkpoint, save_checkpoint
from fastscnn_fast.data.scenes import street


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_checkpoint(bench.untrained_model(num_classes=11), path)
    return path


@pytest.fixture(scope="module")
def address(weights: Path) -> Iterator[str]:
    """Where the example of serving listens, in a thread of this process."""
    pytest.importorskip("fastapi")
    uvicorn = pytest.importorskip("uvicorn")
    app = runpy.run_path(str(ROOT / "examples" / "serve.py"))["make_app"](str(weights))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/segment"
    finally:
        server.should_exit = True
        thread.join()


def png(seed: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(street(seed, 48 + seed, 64)[0]).save(content, "PNG")
    return content.getvalue()


def post(address: str, content: bytes) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(address, content, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_serving_many_at_a_time(address: str, weights: Path) -> None:
    """Each gets the labels of its own picture, and what is none stops nobody."""
    contents = [png(seed) for seed in range(8)] * 4
    contents[5] = b"nothing"
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(post, [address] * len(contents), contents))
    assert answers[5][0] == 422 and b"no known picture format" in answers[5][1]
    fast = fuse(load_checkpoint(weights))
    for content, (status, body) in zip(contents, answers):
        if content != b"nothing":
            assert status == 200
            found = np.asarray(Image.open(io.BytesIO(body)))
            assert np.array_equal(found, segment(fast, content))


def test_serving_refuses_what_is_too_large(address: str) -> None:
    status, body = post(address, bytes((1 << 25) + 1))
    assert status == 413 and b"at most 33554432 bytes" in body
    assert post(address, b"")[0] == 422
