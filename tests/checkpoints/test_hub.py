"""Models from the Hugging Face Hub and to there; no test reaches it, what it would answer is put in its place."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastscnn_fast import FastSCNN, Weights, load_checkpoint
from fastscnn_fast.checkpoints import CheckpointError, read_details, save_checkpoint
from fastscnn_fast.checkpoints.card import card
from fastscnn_fast.compat import tramac


def same(a: FastSCNN, b: FastSCNN) -> bool:
    """Whether two models are one, weights, config, names and ranges."""
    x = torch.rand(1, a.config.in_channels, 64, 96)
    with torch.no_grad():
        equal = torch.equal(a.reference(x), b.reference(x))
    return equal and (a.config, a.classes, a.palette) == (b.config, b.classes, b.palette)


@pytest.fixture(scope="module")
def model() -> FastSCNN:
    model = FastSCNN(num_classes=3, mean=(0.1, 0.2, 0.3)).eval()
    model.classes = ("sea", "land", "air")
    return model


def test_by_name_and_by_file(model: FastSCNN, tmp_path: Path) -> None:
    """Without the extra."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "huggingface_hub", None)
        assert same(FastSCNN.from_pretrained("camvid11"), load_checkpoint())
        assert FastSCNN.from_pretrained(Weights.CAMVID11, num_classes=5).config.num_classes == 5
        save_checkpoint(model, tmp_path / "a.safetensors")
        assert same(FastSCNN.from_pretrained(tmp_path / "a.safetensors"), model)


def test_without_the_extra_it_is_named(
    model: FastSCNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastscnn_fast.checkpoints import hub

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    hub._mixin.cache_clear()
    said = r"needs huggingface_hub: pip install 'fastscnn_fast\[hub\]'"
    for use in (
        lambda: FastSCNN.from_pretrained("somebody/something"),
        lambda: model.save_pretrained(tmp_path / "model"),
        lambda: model.push_to_hub("somebody/something"),
    ):
        with pytest.raises(ImportError, match=said):
            use()
    assert not (tmp_path / "model").exists()


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(CheckpointError, match=r"run: must hold model.safetensors, as save_pretr"):
        FastSCNN.from_pretrained(str(tmp_path / "run"))
    with pytest.raises(FileNotFoundError, match="nothing"):
        FastSCNN.from_pretrained(tmp_path / "nothing")
    with pytest.raises(TypeError, match="makes a FastSCNN, not a FastSCNN"):
        tramac.FastSCNN.from_pretrained("camvid11")
    with pytest.raises(TypeError, match="path must be a str or os.PathLike, got None"):
        FastSCNN.from_pretrained(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="path must name a file, got ''"):
        FastSCNN.from_pretrained("")


def test_the_card_says_what_is_known(model: FastSCNN) -> None:
    details = read_details(Weights.CAMVID11)
    known = card(load_checkpoint(), details, "somebody/streets")
    assert 'FastSCNN.from_pretrained("somebody/streets")' in known
    assert "| parameters | 1,136,763 |" in known and "trained on 720x960" in known
    assert f"| 0 | Sky | #808080 | {details['iou']['Sky']:.3f} |" in known
    assert f"mIoU {details['miou']:.4f}" in known
    assert "    python -m fastscnn_fast train camvid --classes 11" in known
    assert f"epochs {details['recipe']['epochs']}" in known
    assert "| ranges for int8 | yes" in known
    unknown = card(model)
    assert "| 1 | land | #" in unknown and "No score known." in unknown
    assert "Nothing known." in unknown and "| ranges for int8 | not measured |" in unknown


class TestWithTheExtra:
    @pytest.fixture(autouse=True)
    def hub(self) -> Any:
        from fastscnn_fast.checkpoints import hub

        hub._mixin.cache_clear()
        return pytest.importorskip("huggingface_hub")

    def test_a_folder_and_back(self, model: FastSCNN, tmp_path: Path) -> None:
        details = {"miou": 0.25, "command": "python -m fastscnn_fast train sea"}
        model.save_pretrained(
            tmp_path / "a" / "b", details, model_card_kwargs={"license": "cc0-1.0"}
        )
        written = {path.name for path in (tmp_path / "a" / "b").iterdir()}
        assert written == {"model.safetensors", "config.json", "README.md"}
        assert same(FastSCNN.from_pretrained(tmp_path / "a" / "b"), model)
        assert same(load_checkpoint(tmp_path / "a" / "b" / "model.safetensors"), model)
        assert read_details(tmp_path / "a" / "b" / "model.safetensors")["miou"] == 0.25
        config = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
        assert config["num_classes"] == 3 and config["mean"] == [0.1, 0.2, 0.3]
        readme = (tmp_path / "a" / "b" / "README.md").read_text()
        assert readme.startswith("---\n") and "license: cc0-1.0" in readme
        assert "library_name: fastscnn_fast" in readme and "mIoU 0.2500" in readme
        five = FastSCNN.from_pretrained(tmp_path / "a" / "b", num_classes=5)
        assert five.config.num_classes == 5

    def test_to_the_hub_and_back(
        self, hub: Any, model: FastSCNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        there = tmp_path / "hub"
        asked: dict[str, Any] = {}

        class Api:
            def __init__(self, token: str | None = None) -> None:
                asked["token"] = token

            def create_repo(self, repo_id: str, **options: Any) -> Any:
                asked["create"] = (repo_id, options)
                return SimpleNamespace(repo_id=repo_id)

            def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> str:
                asked["upload"] = (repo_id, options["commit_message"])
                Path(folder_path).rename(there)
                return "https://hub/commit/1"

        def download(repo_id: str, filename: str, **options: Any) -> str:
            asked["download"] = (repo_id, options["revision"], options["token"])
            return str(there / filename)

        monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
        monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        url = model.push_to_hub("me/sea", private=True, token="t", commit_message="First")
        assert url == "https://hub/commit/1"
        assert asked["token"] == "t" and asked["upload"] == ("me/sea", "First")
        assert asked["create"][0] == "me/sea" and asked["create"][1]["private"] is True
        assert 'from_pretrained("me/sea")' in (there / "README.md").read_text()
        assert same(FastSCNN.from_pretrained("me/sea", revision="main", token="r"), model)
        assert asked["download"] == ("me/sea", "main", "r")

    def test_values_of_a_config_become_no_arguments(self, model: FastSCNN, tmp_path: Path) -> None:
        """Other programs' config.json may hold any."""
        model.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text('{"model": 1, "details": 2, "num_classes": 7}')
        assert same(FastSCNN.from_pretrained(tmp_path), model)

    def test_a_name_that_the_hub_cannot_have(self) -> None:
        with pytest.raises(ValueError, match="no/such/name"):
            FastSCNN.from_pretrained("no/such/name")

    def test_what_cannot_be_saved_leaves_nothing_half(
        self, model: FastSCNN, tmp_path: Path
    ) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OSError):
            model.save_pretrained(tmp_path / "file")
        with pytest.raises(ValueError, match="path must name a file, got ''"):
            model.save_pretrained("")
        assert os.listdir(tmp_path) == ["file"]
