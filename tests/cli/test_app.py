"""The page to try weights: what it shows of a picture, and that it does so in a browser where there is one."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastscnn_fast import bench, cli, fuse, load_checkpoint, page, segment
from fastscnn_fast.checkpoints import SHIPPED, save_checkpoint
from fastscnn_fast.data.classes import CAMVID_CLASSES
from fastscnn_fast.data.pictures import overlay
from fastscnn_fast.data.scenes import street

PICTURE = street(4, 60, 80)[0]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without ranges."""
    path = tmp_path_factory.mktemp("weights") / "one.safetensors"
    save_checkpoint(bench.untrained_model(num_classes=1), path)
    return path


def test_what_is_shown(weights: Path) -> None:
    tried = page.Page({**SHIPPED, "one": weights})
    shown = tried.label(PICTURE, "camvid11", "float32", "as trained")
    fast = fuse(load_checkpoint())
    labels = segment(fast, PICTURE)
    assert shown.overlay == overlay(PICTURE, labels, fast.classes, fast.palette)
    shares = {CAMVID_CLASSES[k]: np.mean(labels == k) for k in np.unique(labels)}
    assert shown.shares == pytest.approx(shares)
    assert list(shown.shares.values()) == sorted(shares.values(), reverse=True)
    assert " ms** for 720x960 pixels in float32, on the backend cpu, " in shown.told
    shown = tried.label(PICTURE, "one", "bfloat16", "256x512")
    assert set(shown.shares) <= {"background", "class 0"} and " ms** for 256x512 " in shown.told
    assert sum(shown.shares.values()) == pytest.approx(1)
    with pytest.raises(ValueError, match="int8 needs the ranges"):
        tried.label(PICTURE, "one", "int8", "256x512")


def test_few_networks_are_kept(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_KEPT", 2)
    tried = page.Page({str(k): weights for k in range(3)})
    for name in ("0", "1", "0", "2", "0"):
        tried.label(PICTURE, name, "float32", "256x512")
    assert list(tried._networks) == [("2", "float32"), ("0", "float32")]


def test_the_arithmetics_are_those_with_kernels() -> None:
    assert {"float32", "bfloat16", "int8"} <= set(page.arithmetics()) and (
        "float64" not in page.arithmetics()
    )


def test_without_the_extra_it_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["app"]) == 2
    said = "the page needs gradio: pip install 'fastscnn_fast[app]'"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("port", ["0", "70000", "http"])
def test_a_port_that_is_none(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["app", "--port", port])
    said = f"must be an integer from 1 to 65535, got '{port}'"
    assert said in capsys.readouterr().err


def choose(tab: Any, label: str, option: str) -> None:
    tab.get_by_label(label).click()
    tab.get_by_role("option", name=option).click()


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def address(weights: Path) -> Iterator[str]:
    """Where the command serves."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fastscnn_fast", "app", "--port", str(port)]
    served = subprocess.Popen(
        [*command, "--weights", str(weights)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert served.stdout is not None
        assert served.stdout.readline() == f"http://127.0.0.1:{port}\n"
        yield f"http://127.0.0.1:{port}"
    finally:
        served.terminate()
        served.communicate(timeout=60)


@pytest.mark.slow
class TestInABrowser:
    def test_by_its_interface(self, address: str, tmp_path: Path) -> None:
        client = pytest.importorskip("gradio_client")
        Image.fromarray(PICTURE).save(tmp_path / "a.png")
        picture = client.handle_file(str(tmp_path / "a.png"))
        asked = client.Client(address, verbose=False)
        chosen = ("camvid11", "float32", "as trained")
        shown, shares, told = asked.predict(picture, *chosen, api_name="/label")
        expected = page.Page(SHIPPED).label(PICTURE, *chosen)
        assert np.array_equal(np.asarray(Image.open(shown)), np.asarray(expected.overlay))
        assert shares["label"] == next(iter(expected.shares)) and " ms** for 720x960" in told
        assert asked.predict(picture, "one.safetensors", "int8", "256x512", api_name="/label")[
            2
        ].startswith("**int8 needs the ranges of the network's values")

    @pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
    @pytest.mark.skipif(find_spec("playwright") is None, reason="there is no playwright")
    def test_by_hand(self, address: str, tmp_path: Path) -> None:
        """In Chromium: the street at first, another arithmetic, a picture of one's own, one of the camera, a mistake."""
        api = import_module("playwright.sync_api")
        Image.fromarray(PICTURE).save(tmp_path / "a.png")
        screenshots = os.environ.get("FASTSCNN_SCREENSHOTS", str(tmp_path))
        with api.sync_playwright() as browsers:
            browser = browsers.chromium.launch(
                executable_path=CHROMIUM,
                args=[
                    "--no-sandbox",
                    "--use-fake-device-for-media-stream",
                    "--use-fake-ui-for-media-stream",
                ],
            )
            tab = browser.new_page(viewport={"width": 1300, "height": 800})
            tab.goto(address)

            def told(text: str, name: str) -> None:
                tab.get_by_text(text).wait_for()
                tab.screenshot(path=f"{screenshots}/{name}.png")

            told("for 360x720 pixels in float32", "street")
            choose(tab, "Weights", "camvid11")
            told("for 588x1176 pixels in float32", "classes")
            assert tab.get_by_text("Road").count() and tab.get_by_text("Share of the").count()
            choose(tab, "Arithmetic", "int8")
            told("for 588x1176 pixels in int8", "int8")
            tab.locator("input[type=file]").first.set_input_files(str(tmp_path / "a.png"))
            told("for 720x960 pixels in int8", "picture")
            choose(tab, "Weights", "one.safetensors")
            told("int8 needs the ranges", "error")
            choose(tab, "Arithmetic", "float32")
            told("for 60x80 pixels in float32", "one")
            tab.get_by_label("Remove Image").click()
            tab.get_by_text("pixels in float32").wait_for(state="hidden")
            tab.get_by_label("Capture from camera").click()
            tab.get_by_text("Click to Access Webcam").click()
            tab.wait_for_function("document.querySelector('video')?.currentTime > 0")
            tab.get_by_title("capture photo").click()
            told("pixels in float32", "camera")  # of whatever size it has
            browser.close()
