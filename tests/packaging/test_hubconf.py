"""``torch.hub.load`` of this repository, from a checkout and from an archive, in which links become plain files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
import torch
from helpers import ROOT

from fastscnn_fast import FastSCNN, fuse, load_checkpoint
from fastscnn_fast.backends import registry

UNPACKED = """
import sys, torch
model = torch.hub.load(sys.argv[1], "fast_scnn", source="local", weights="camvid11")
import fastscnn_fast
assert fastscnn_fast.__file__.startswith(sys.argv[1])
with torch.no_grad():
    print(*model(torch.zeros(1, 3, 64, 96)).shape)
"""


def test_from_a_checkout() -> None:
    loaded = torch.hub.load(str(ROOT), "fast_scnn", source="local", weights="camvid11")
    assert isinstance(loaded, FastSCNN) and not loaded.training
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(loaded.reference(x), load_checkpoint().reference(x))
    five = torch.hub.load(str(ROOT), "fast_scnn", source="local", num_classes=5, preset="tramac")
    assert five.config.num_classes == 5 and five.training


@pytest.mark.slow
def test_from_an_archive(tmp_path: Path) -> None:
    """Kernels are neither compiled nor, of Triton's, to be found: plain torch."""
    copytree(
        ROOT / "fastscnn_fast",
        tmp_path / "fastscnn_fast",
        ignore=ignore_patterns("kernels", "*.so", "__pycache__"),
    )
    (tmp_path / "fastscnn_fast" / "kernels").write_text("../kernels")
    (tmp_path / "hubconf.py").write_bytes((ROOT / "hubconf.py").read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", UNPACKED, tmp_path],
        cwd=ROOT.anchor,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1 11 64 96"


def test_triton_says_that_its_kernels_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"triton": True, "fastscnn_fast.kernels": None}
    monkeypatch.setattr(registry, "find_spec", found.get)
    with pytest.raises(registry.CannotRun, match=r"fastscnn_fast.kernels is missing.*pip install"):
        fuse(FastSCNN(num_classes=2).eval(), "triton")
