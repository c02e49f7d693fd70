"""Prediction on many machines: two nodes of a cluster on this one, an actor that dies, pictures that kill, object stores."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastscnn_fast import FastSCNN, bench, checkpoints, cli, cluster, fuse, segment
from fastscnn_fast.cluster import Results, Segmenter
from fastscnn_fast.data import remote
from fastscnn_fast.data.scenes import street


@pytest.fixture(scope="module")
def model() -> FastSCNN:
    return bench.untrained_model(num_classes=5)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 good ones in two folders."""
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(64):
        path = folder / f"{index % 2}" / f"{index:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(street(index, 40, 32 + index)[0]).save(path)
    return folder


def labels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.mark.parametrize(
    ("nodes", "count", "needs"),
    [
        ([{"CPU": 16.0}, {"CPU": 4.0}], 5, {"num_cpus": 4}),
        ([{"CPU": 64.0}, {"CPU": 0.0, "memory": 1.0}], 8, {"num_cpus": 8}),
        ([{"CPU": 1.0}, {}], 1, {"num_cpus": 1}),
        ([{"CPU": 64.0, "GPU": 4.0}, {"CPU": 8.0}], 4, {"num_gpus": 1, "num_cpus": 8}),
        (
            [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 64.0, "GPU": 1.0}],
            5,
            {"num_gpus": 1, "num_cpus": 2},
        ),
        ([{"CPU": 2.0, "GPU": 4.0}], 4, {"num_gpus": 1, "num_cpus": 1}),
    ],
)
def test_an_actor_a_gpu_or_a_group_of_processors(
    nodes: list[dict[str, float]], count: int, needs: dict[str, float]
) -> None:
    assert cluster._groups(nodes) == (count, needs)


def test_a_cluster_without_processors() -> None:
    with pytest.raises(ValueError, match="must have processors, got none"):
        cluster._groups([{"memory": 1.0}])


def test_without_the_extra_it_is_named(
    model: FastSCNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"needs ray.*: pip install 'fastscnn_fast\[ray\]'"):
        next(cluster.predict([], Results(str(tmp_path)), model, "local"))


def test_out_is_a_folder_without_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["segment", "a.png", "-o", "s3://bucket/out"]) == 2
    assert "--out must be a folder unless --ray is given, got s3://" in capsys.readouterr().err


class TestSegmenter:
    def test_it_labels_a_batch(self, model: FastSCNN) -> None:
        pixels = np.stack([street(seed, 48, 64)[0] for seed in range(3)])
        labelled = Segmenter(model)({"image": pixels, "path": np.array(["a", "b", "c"])})
        assert list(labelled) == ["image", "path", "labels", "error"]
        assert labelled["error"].tolist() == [""] * 3
        assert all(map(np.array_equal, labelled["labels"], segment(fuse(model), list(pixels))))

    def test_what_cannot_be_read_is_told_beside_the_rest(self, model: FastSCNN) -> None:
        good = Path(__file__).parents[2] / "docs" / "street.png"
        contents = np.array([b"nothing", good.read_bytes(), None], object)
        labelled = Segmenter(model, column="bytes", size=64)({"bytes": contents})
        assert labelled["labels"][0].shape == labelled["labels"][2].shape == (0, 0)
        assert "no known picture format" in labelled["error"][0] and labelled["error"][1] == ""
        assert labelled["error"][2].startswith("picture must be a path")
        assert np.array_equal(labelled["labels"][1], segment(fuse(model), good, 64))

    def test_a_column_that_is_not_there(self, model: FastSCNN) -> None:
        with pytest.raises(KeyError, match=r"column must be one of the batch's, \['bytes'\], got"):
            Segmenter(model)({"bytes": np.zeros(1)})

    def test_arguments_that_no_picture_could_run_with(self, model: FastSCNN) -> None:
        with pytest.raises(ValueError, match="size must be at least 32x32, got 3x3"):
            Segmenter(model, size=3)
        with pytest.raises(ValueError, match="bits must be 8 to 16, got 7"):
            Segmenter(model, bits=7)

    def test_weights_by_name_and_arithmetic(self) -> None:
        assert Segmenter("camvid11", dtype=torch.int8).fast.dtype == torch.int8


@dataclass(frozen=True)
class Watched(Results):
    """Notes each file that is written, and ends the process before those that are deadly, so many times."""

    log: str = ""
    deadly: tuple[tuple[str, int], ...] = ()

    def write(self, name: str, content: bytes | memoryview) -> None:
        for part, times in self.deadly:
            if part in name and self.written()[f"died-of-{part}"] < times:
                self._note(f"died-of-{part}")
                os.kill(os.getpid(), signal.SIGKILL)
        super().write(name, content)
        if not name.startswith("."):
            self._note(name)

    def _note(self, what: str) -> None:
        with open(self.log, "a") as file:
            file.write(what + "\n")

    def written(self) -> Counter[str]:
        return Counter(Path(self.log).read_text().split())


def test_a_folder_that_machines_do_not_share(tmp_path: Path) -> None:
    Results(str(tmp_path)).write("sign", b"")
    Results(str(tmp_path)).check_shared("sign")
    with pytest.raises(ValueError, match=r"must be a folder that all machines share, or a URI"):
        Results(str(tmp_path)).check_shared("other")


@pytest.fixture(scope="module")
def nodes() -> Iterator[None]:
    """Two nodes of a processor each, and no more: a third would be the driver's."""
    pytest.importorskip("pyarrow")
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        nodes.add_node(num_cpus=1)
        ray.init(address=nodes.address, logging_level="error", log_to_driver=False)
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield
    finally:
        ray.shutdown()
        nodes.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # of itself
@pytest.mark.filterwarnings("ignore::FutureWarning:ray")
@pytest.mark.usefixtures("nodes")
class TestOnACluster:
    def test_whatever_dies_no_picture_is_lost_or_written_twice(
        self,
        model: FastSCNN,
        pictures: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """From the command line: one picture kills its actor once, another always, which is given up; a third is none."""
        monkeypatch.chdir(pictures.parent)
        checkpoints.save_checkpoint(model, tmp_path / "model.safetensors")
        (pictures / "1" / "bad.png").write_bytes(b"nothing")
        log = tmp_path / "log"
        log.touch()
        watched = partial(Watched, log=str(log), deadly=(("1/33", 1), ("0/22", 9)))
        monkeypatch.setattr(cluster, "Results", watched)
        command = ["segment", pictures.name, "-o", str(tmp_path / "out"), "--ray", "auto"]
        command += ["--weights", str(tmp_path / "model.safetensors"), "--confidence"]
        try:
            assert cli.main([*command, "--overlay-format", "jpg"]) == 1
        finally:
            (pictures / "1" / "bad.png").unlink()
        printed = capsys.readouterr()
        assert "63 segmented, 2 skipped; results: " in printed.out
        assert [said for said in printed.err.splitlines() if said.startswith("skipped")] == [
            f"skipped {pictures}/0/22.png: 3 processes died that had it in work",
            f"skipped {pictures}/1/bad.png: cannot be read: it is of no known picture format",
        ]
        written = watched("").written()
        assert (written.pop("died-of-1/33"), written.pop("died-of-0/22")) == (1, 3)
        assert written == Counter(
            f"{index % 2}/{index:02}{ending}"
            for index in {*range(64)} - {22}
            for ending in ("_labels.png", "_confidence.png", "_overlay.jpg")
        )
        there = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
        assert there == set(written)
        fast = fuse(model)
        for index in range(0, 64, 9):
            name = f"{index % 2}/{index:02}"
            label, sure = segment(fast, pictures / f"{name}.png", confidence=True)
            assert np.array_equal(labels(tmp_path / "out" / f"{name}_labels.png"), label)
            grey = labels(tmp_path / "out" / f"{name}_confidence.png")
            assert np.abs(grey - 255 * sure).max() <= 0.51

    def test_nothing_to_do(self, model: FastSCNN, tmp_path: Path) -> None:
        assert not list(cluster.predict([], Results(str(tmp_path)), model))

    def test_what_no_actor_can_do_ends_the_run(
        self, model: FastSCNN, pictures: Path, tmp_path: Path
    ) -> None:
        jobs = cluster.found([str(pictures / "0")]).jobs[:2]
        with pytest.raises(ValueError, match="^int8 needs the ranges of the network's values"):
            list(cluster.predict(jobs, Results(str(tmp_path)), model, dtype=torch.int8))
        assert not list(tmp_path.iterdir())

    def test_in_a_dataset(self, model: FastSCNN, pictures: Path) -> None:
        ray = pytest.importorskip("ray.data")
        rows = ray.read_binary_files(str(pictures / "0"), include_paths=True).map_batches(
            Segmenter,
            fn_constructor_kwargs={"weights": model, "column": "bytes"},
            compute=ray.ActorPoolStrategy(size=1),
            batch_size=8,
        )
        taken = {Path(row["path"]): (row["labels"], row["error"]) for row in rows.take_all()}
        assert set(taken) == set((pictures / "0").iterdir())
        for path in sorted(taken)[::11]:
            found, error = taken[path]
            assert error == "" and np.array_equal(found, segment(fuse(model), path))


class TestObjectStores:
    @pytest.fixture(autouse=True)
    def bucket(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A folder in the place of a store."""
        fs = pytest.importorskip("pyarrow.fs")
        store = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
        monkeypatch.setattr(
            remote, "_opened", lambda uri: (store, uri.partition("://")[2].partition("?")[0])
        )
        for name in ("b/in/a.png", "b/in/sub/a.jpg", "b/in/a_labels.png", "b/in/.hidden.png"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(name.encode())
        for name in ("b/in/notes.txt", "b/in/film.mp4", "b/other/a.png"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        return tmp_path

    def test_pictures_are_found_and_named(self) -> None:
        found = cluster.found(["s3://b/in?region=x", "s3://b/other", "s3://b/in/a.png?region=x"])
        assert [(str(job.path), str(job.name)) for job in found.jobs] == [
            ("s3://b/in/a.png?region=x", "in/a"),
            ("s3://b/in/sub/a.jpg?region=x", "sub/a"),
            ("s3://b/other/a.png", "other/a"),
        ]
        assert [said.partition(":")[2][:30] for said in found.problems] == [
            "//b/in/film.mp4?region=x: is a "
        ] or found.problems[0].startswith("s3://b/in/film.mp4?region=x: is a video")
        assert found.repeated == 1 and found.repeats == [
            "s3://b/in/a.png?region=x: is there already"
        ]
        assert cluster.found(["s3://b/nothing"]).problems == ["s3://b/nothing: does not exist"]

    def test_names_with_marks_of_their_own(self, bucket: Path) -> None:
        """A URI has them in percent, as pyarrow takes it; results do not."""
        (bucket / "b" / "marks").mkdir()
        (bucket / "b" / "marks" / "ä b#1?.png").touch()
        (job,) = cluster.found(["s3://b/marks"]).jobs
        assert (str(job.path), str(job.name)) == ("s3://b/marks/%C3%A4%20b%231%3F.png", "ä b#1?")

    def test_uris_and_folders_do_not_mix(self) -> None:
        with pytest.raises(ValueError, match="must be all URIs or all files and folders, got both"):
            cluster.found(["s3://b/in", "in"])

    def test_reading_writing_and_deleting(self, bucket: Path) -> None:
        assert remote.read("s3://b/in/sub/a.jpg") == b"b/in/sub/a.jpg"
        with pytest.raises(ValueError, match=r"s3://b/nothing: cannot be read: "):
            remote.read("s3://b/nothing")
        Results("s3://b/in?x=1").write("new.png", b"content")
        assert (bucket / "b" / "in" / "new.png").read_bytes() == b"content"
        with pytest.raises(ValueError, match=r"s3://b/no/new.png: cannot be written: "):
            Results("s3://b/no").write("new.png", b"content")
        remote.delete("s3://b/in/new.png")
        remote.delete("s3://b/in/new.png")
        assert not (bucket / "b" / "in" / "new.png").exists()


def test_a_store_that_there_is_not() -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=r"https?://a/b.png: no store that can be read: "):
        remote.read("http://a/b.png")


def test_what_is_a_uri() -> None:
    assert remote.is_uri("s3://b") and remote.is_uri("abfss://a@b/c")
    assert not any(map(remote.is_uri, ("C:\\a", "a/b", "s3:/b", Path("s3://b"), "://b")))
    assert remote.joined("s3://b/out/?region=x", "a/b.png") == "s3://b/out/a/b.png?region=x"
