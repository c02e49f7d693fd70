"""Files are whole or not there, folders are made in time and belong to one run; a full disk is named."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import small_network
from PIL import Image

from fastscnn_fast.checkpoints import load_checkpoint, save_checkpoint
from fastscnn_fast.cli import main
from fastscnn_fast.data.datasets import Examples
from fastscnn_fast.data.scenes import street
from fastscnn_fast.data.sources import Streets
from fastscnn_fast.train import Recipe, Trainer
from fastscnn_fast.writing import claimed, folder, folder_of, whole, write_whole

QUICK = Recipe(epochs=0.5, batch=4, crop=(64, 64), dtype="float32")

#: As on a full disk, every file ends after so many bytes.
FULL = """
import resource, sys
from fastscnn_fast import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def streets() -> Examples:
    return Examples(Streets(8, 0, (72, 96)))


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def on_a_full_disk(size: int, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", FULL, str(size), *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_folder_of_a_file_is_made_and_a_device_has_none(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "file"
    with folder_of(file):
        write_whole(file, b"all")
    with folder_of(tmp_path / "c" / "file"):
        assert (tmp_path / "c").is_dir()
    assert file.read_bytes() == b"all" and not (tmp_path / "c").exists()
    with folder_of(Path("/dev/null")):  # whose folder is not for everyone to write to
        pass
    with pytest.raises(IsADirectoryError, match=str(tmp_path)), folder_of(tmp_path):
        pass


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_whole(path, b"old")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_whole(path, b"half of the new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write_whole(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_called_by_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/file\.txt'$"):
        write_whole(tmp_path / "nowhere" / "file.txt", b"")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        write_whole(tmp_path, b"")
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        write_whole("/dev/full", b"x")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)  # a device stays one


def test_a_link_stays_one_and_long_names_are_no_matter(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link", tmp_path / "there" / "target"
    link.symlink_to(target)
    for content in (b"one", b"two"):
        write_whole(link, content)
        assert link.is_symlink() and target.read_bytes() == content
    write_whole(tmp_path / ("n" * 255), b"long")


def test_modes_are_the_umasks(
    umask: int, streets: Examples, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Trainer(QUICK, streets, None, tmp_path / "run").run() == 0
    Image.fromarray(street(1, 40, 56)[0]).save(tmp_path / "a.png")
    weights = tmp_path / "run" / "best.safetensors"
    out = tmp_path / "out"
    assert (
        main(["segment", str(tmp_path / "a.png"), "-o", str(out), "--weights", str(weights)]) == 0
    )
    files = [*(tmp_path / "run").iterdir(), *out.iterdir()]
    assert {path.suffix for path in files} >= {".safetensors", ".pt", ".csv", ".png"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}


def test_a_folder_that_nothing_came_into_is_not_left(tmp_path: Path) -> None:
    with folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not list(tmp_path.iterdir())
    with folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]
    with folder(tmp_path / "a"):
        pass
    (tmp_path / "a" / "file").unlink()
    with folder(tmp_path / "a"):  # it was there before
        pass
    assert (tmp_path / "a").is_dir()


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_folder_that_cannot_be_made_is_found_before_the_data(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for out, said in (
        (tmp_path / "file" / "run", f"{tmp_path / 'file'}: Not a directory"),
        (tmp_path / "file", "Not a directory"),
        (tmp_path / ("n" * 300), "File name too long"),
    ):
        words = [command, str(tmp_path / "no data"), "-o", str(out)]
        words += ["--classes", "2"] if command == "train" else []
        assert main(words) == 2
        error = capsys.readouterr().err
        rule = "--out must be a folder that can be made and written to"
        assert error == f"fastscnn_fast: error: {rule}, got {out} ({said})\n"
    new = tmp_path / "new" / "run"
    assert main([command, str(tmp_path / "no data"), "-o", str(new)]) == 2
    assert "no data: no such folder" in capsys.readouterr().err
    assert not new.parent.exists()


def test_of_runs_that_begin_together_one_has_the_folder(tmp_path: Path) -> None:
    """Also where none of them found it there, and those that lose leave it to the winner."""
    for turn in range(20):
        path, together = tmp_path / str(turn) / "run", threading.Barrier(4)
        over = threading.Barrier(4)
        outcomes: list[str] = []

        def run(path: Path = path, together: Any = together, over: Any = over) -> None:
            together.wait()
            try:
                with claimed(path):
                    outcomes.append("claimed")  # noqa: B023
                    over.wait()  # until all have tried
                    (path / "result").touch()
            except ValueError:
                outcomes.append("refused")  # noqa: B023
                over.wait()

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["claimed", *["refused"] * 3]
        assert (path / "result").exists()


def test_a_folder_is_one_runs(streets: Examples, tmp_path: Path) -> None:
    refused = f"{tmp_path}: another run is writing to this folder"
    (tmp_path / ".fastscnn-0123.part").write_bytes(b"of a run that was killed")
    with claimed(tmp_path):
        assert not list(tmp_path.iterdir())
        Trainer(QUICK, streets, None, tmp_path).run()  # in the same thread: it is the same run
        errors: list[BaseException] = []

        def other() -> None:
            try:
                Trainer(QUICK, streets, None, tmp_path).run()
            except ValueError as error:
                errors.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert [str(error) for error in errors] == [refused]
        command = ["train", "streets:4", "-o", str(tmp_path), "--resume"]
        result = on_a_full_disk(1 << 30, *command)
        assert result.returncode == 2
        assert result.stderr == f"fastscnn_fast: error: {refused}\n"
    with claimed(tmp_path):
        pass


def test_a_claim_leaves_what_others_are_writing(tmp_path: Path) -> None:
    (tmp_path / ".fastscnn-0123.part").write_bytes(b"of a run that was killed")
    with whole(tmp_path / "file") as part:
        with claimed(tmp_path):  # not begun yet
            assert list(tmp_path.iterdir()) == [part]
        part.write_bytes(b"all")
        with claimed(tmp_path):
            assert list(tmp_path.iterdir()) == [part]
    assert (tmp_path / "file").read_bytes() == b"all"


OPTIONS = ["--batch", "4", "--crop", "64x64", "--epochs", "1", "--device", "cpu"]


@pytest.mark.parametrize(
    ("size", "name"), [(100_000, "best.safetensors"), (6_000_000, "last.pt"), (100, "metrics.csv")]
)
def test_training_on_a_full_disk(size: int, name: str, tmp_path: Path) -> None:
    """The file and the cause in one line; what an earlier run left is as it was."""
    for old in ("best.safetensors", "metrics.csv"):
        (tmp_path / old).write_text("old")
    if name == "metrics.csv":
        (tmp_path / "best.safetensors").unlink()
        (tmp_path / "best.safetensors").symlink_to("/dev/null")
    result = on_a_full_disk(size, "train", "streets:4", "-o", tmp_path, *OPTIONS)
    assert result.returncode == 2, result.stderr
    expected = f"fastscnn_fast: error: {tmp_path / name}: File too large"
    assert result.stderr.splitlines()[-1] == expected
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "last.pt").exists()
    if name == "last.pt":
        assert load_checkpoint(tmp_path / "best.safetensors").config.num_classes == 11
    else:
        assert (tmp_path / "metrics.csv").read_text() == "old"


def test_saving_on_a_full_disk_keeps_the_old_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.safetensors"
    save_checkpoint(small_network(3), path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*net\.safetensors'"):
        save_checkpoint(small_network(4), path)
    assert load_checkpoint(path).config.num_classes == 3
    assert list(tmp_path.iterdir()) == [path]


def test_segment_on_a_full_disk(tmp_path: Path) -> None:
    Image.fromarray(street(1, 240, 320)[0]).save(tmp_path / "a.png")
    out = tmp_path / "out"
    result = on_a_full_disk(20_000, "segment", tmp_path / "a.png", "-o", out)
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last == f"fastscnn_fast: error: {out / 'a_overlay.png'}: File too large"
    assert [path.name for path in out.iterdir()] == ["a_labels.png"]
    with Image.open(out / "a_labels.png") as image:
        image.load()
