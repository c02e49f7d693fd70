"""Prediction on many machines by Ray Data (the extra [ray]).

:class:`Segmenter` is for ``map_batches`` of datasets of your own, :func:`predict` labels files as ``segment --ray`` does. Both
run as actors, one a GPU or, without GPUs, one a group of processors; Ray starts actors anew that fail.
"""

from __future__ import annotations

import copy
import logging
import os
import platform
import secrets
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import torch
from numpy.typing import NDArray

from .arch.config import Size, picture_size
from .checkpoints import Weights, load_checkpoint
from .data import remote
from .data.jobs import Found, Job, find, result_names
from .data.pictures import ENDINGS, PICTURE_SUFFIXES, VIDEO, check_bits, no_picture, size_of
from .data.results import encode
from .extras import need
from .runtime.flow import flow
from .runtime.fused import fuse
from .runtime.model import FastSCNN
from .runtime.segment import Confidence, Labels, Prepared, prepare
from .writing import OF_ONE, write_whole

#: Processors of a group that shares a network: with more of them its kernels gain little.
_GROUP = 8
#: How often a picture may be in work when its actor dies; a picture that kills ends so.
_DEATHS = 3
#: The most pictures that an actor takes at a time.
_CHUNK = 32
#: What Ray Data is to tell: neither its plan, nor that its bars are off, nor in traces what we say in a sentence.
_TALK = {
    "": logging.WARNING,
    "._internal.progress": logging.ERROR,
    "._internal.execution.streaming_executor_state": logging.CRITICAL,
    ".exceptions": logging.CRITICAL,
}


class Segmenter:
    """The classes of the pixels of batches of pictures, for ``map_batches`` of ray.data.

    pictures = ray.data.read_images(folder, include_paths=True)
    pictures.map_batches(Segmenter, compute=ray.data.ActorPoolStrategy(size=2), num_cpus=4, batch_size=16)

    It takes numpy batches and adds two columns: ``labels``, uint8 (H, W) of each picture's own size, and ``error``, text, empty
    where all went well; where it is not, the labels are (0, 0). A picture that cannot be read does not end the run.

    Args:
        weights: a name of :class:`Weights`, a path that every machine has, or a :class:`FastSCNN` in eval mode, which
            travels.
        column: where the pictures are: arrays as ``read_images`` gives them, the bytes of their files, or paths.
        size: as :func:`fastscnn_fast.segment` has it; so is ``bits``.
        bits: see ``size``.
        backend: as :func:`fastscnn_fast.fuse` has it; so are ``dtype`` and ``precision``.
        dtype: see ``backend``.
        precision: see ``backend``.

    Raises:
        TypeError: ``size`` or ``bits`` are no integers.
        ValueError: the weights cannot be read, or cannot run so; ``size`` is below 32 a side, ``bits`` not 8 to 16.
        KeyError: a batch has no such column.
    """

    def __init__(
        self,
        weights: str | os.PathLike[str] | FastSCNN = Weights.DEFAULT,
        column: str = "image",
        size: Size | None = None,
        bits: int | None = None,
        backend: str = "auto",
        dtype: torch.dtype = torch.float32,
        precision: str = "highest",
    ) -> None:
        if size is not None:  # told now, not with each picture
            size = picture_size(size)
        bits = check_bits(bits)
        if isinstance(weights, FastSCNN):
            model = copy.deepcopy(weights)  # it may move to a GPU
        else:
            model = load_checkpoint(weights)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.fast = fuse(model, backend, dtype, precision)
        self.column, self.size, self.bits = column, size, bits

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if self.column not in batch:
            raise KeyError(
                f"column must be one of the batch's, {sorted(batch)}, got {self.column!r}"
            )
        pictures = batch[self.column]
        labels, errors = np.empty(len(pictures), object), np.full(len(pictures), "", object)

        def read(index: int) -> Prepared:
            return prepare(pictures[index], self.fast.config, self.size, self.bits)

        steps = flow(self.fast, range(len(pictures)), read, lambda *made: made[2], lambda index: 0)
        with closing(steps):
            for index, outcome in steps:
                try:
                    labels[index] = outcome.result()
                except (TypeError, ValueError) as error:
                    labels[index], errors[index] = np.zeros((0, 0), np.uint8), str(error)
        return {**batch, "labels": labels, "error": errors}


@dataclass(frozen=True)
class Results:
    """What is written of each picture, and where.

    Attributes:
        out: a folder that every machine has under this path, or a URI.
        size: as :func:`fastscnn_fast.segment` has it; so is ``bits``.
        bits: see ``size``.
        overlay_format: "png", "jpg" or None, no picture tinted by class.
        confidence: whether to write how probable each label is.
    """

    out: str
    size: Size | None = None
    bits: int | None = None
    overlay_format: str | None = "png"
    confidence: bool = False

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Writes a file below ``out``, whole or not at all.

        Raises:
            ValueError: an object store refuses it, or its name cannot be.
            OSError: nothing can be written any more.
        """
        if remote.is_uri(self.out):
            remote.write(remote.joined(self.out, name), content)
            return
        path = Path(self.out, name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content, durable=False)
        except OSError as error:
            if error.errno not in OF_ONE:
                raise
            raise ValueError(f"{error.filename} cannot be written: {error.strerror}") from error

    def check_shared(self, sign: str) -> None:
        """Whether this machine sees the file ``sign`` that the driver wrote.

        Raises:
            ValueError: it does not.
        """
        if not remote.is_uri(self.out) and not Path(self.out, sign).exists():
            rule = "out must be a folder that all machines share, or a URI"
            raise ValueError(f"{rule}, got {self.out}, in which {platform.node()} finds nothing")


def found(arguments: Sequence[str]) -> Found:
    """The pictures that ``arguments`` come to, either files and folders, as :func:`find` has them, or URIs.

    Raises:
        ValueError: there are both.
    """
    uris = [remote.is_uri(argument) for argument in arguments]
    if not any(uris):
        here = find(arguments)
        videos = [f"{job.path}: {VIDEO}" for job in here.jobs if job.video]
        pictures = [job for job in here.jobs if not job.video]
        return here._replace(jobs=pictures, problems=[*here.problems, *videos])
    if not all(uris):
        raise ValueError("pictures must be all URIs or all files and folders, got both")
    places: dict[str, tuple[str, ...]] = {}
    problems, repeats = [], []
    for argument in arguments:
        taken = False
        try:
            files = remote.below(argument)
        except ValueError as error:
            problems.append(str(error))
            continue
        for uri, below in files:
            name = (below or (uri.partition("?")[0],))[-1]
            if below and (name.startswith(".") or name.endswith(ENDINGS)):
                continue
            if (why_not := no_picture(name)) is not None:
                problems.append(f"{uri}: {why_not}")
            elif below and Path(name).suffix.lower() not in PICTURE_SUFFIXES:
                continue
            elif uri in places:
                repeats.append(f"{uri}: is there already")
            else:
                places[uri] = below
            taken = True
        if not taken:
            problems.append(f"{argument}: no pictures in this folder")
    parts = [Path(unquote(uri.partition("?")[0].partition("://")[2])).parts for uri in places]
    names = result_names(parts, [len(below) for below in places.values()])
    return Found([Job(uri, n) for uri, n in zip(places, names)], problems, repeats, len(repeats))  # type: ignore[arg-type]


def predict(
    jobs: Sequence[Job],
    results: Results,
    model: FastSCNN,
    address: str | None = None,
    backend: str = "auto",
    dtype: torch.dtype = torch.float32,
    precision: str = "highest",
) -> Generator[tuple[Job, str | None], None, None]:
    """Labels pictures on a cluster and writes ``results``: each job once, as they get done, with what is wrong with it.

    No picture is lost: what an actor had not finished when it died is done again, by an actor that takes its place. None is
    written twice: what was finished is known, wherever it was. A picture that is in work each time when an actor dies, three
    times, is given up, and said.

    Args:
        jobs: files that every machine has under these paths, or URIs.
        results: what to write, and where.
        model: in eval mode; it travels to the actors.
        address: of a cluster ("auto", "HOST:6379"), "local" for this machine alone; not used where Ray is
            connected already.
        backend: as :func:`fastscnn_fast.fuse` has it; so are ``dtype`` and ``precision``.
        dtype: see ``backend``.
        precision: see ``backend``.

    Raises:
        ImportError: ray is missing.
        ConnectionError: there is no cluster.
        ValueError: the cluster has nothing to run on, machines do not share ``results.out``, or no actor can run so.
        OSError: nothing can be written any more.
    """
    need("prediction on many machines", "ray", "ray", "pyarrow")
    import ray

    if not jobs:
        return
    if not ray.is_initialized():
        ray.init(address=address, logging_level="warning", log_to_driver=True)
        with closing(_predicted(jobs, results, model, (backend, dtype, precision))) as outcomes:
            try:
                yield from outcomes
            finally:
                ray.shutdown()
    else:
        yield from _predicted(jobs, results, model, (backend, dtype, precision))


def _predicted(
    jobs: Sequence[Job], results: Results, model: FastSCNN, arithmetic: tuple[Any, ...]
) -> Generator[tuple[Job, str | None], None, None]:
    import ray
    import ray.data
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    actors, needs = _groups([node["Resources"] for node in ray.nodes() if node["Alive"]])
    here = ray.get_runtime_context().get_node_id()
    ledger = (
        ray.remote(_Ledger)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True))
        .remote(model)
    )
    sign = f".fastscnn-{secrets.token_hex(8)}.run"
    results.write(sign, b"")
    context = ray.data.DataContext.get_current()
    shown, context.enable_progress_bars = context.enable_progress_bars, False
    for name, level in _TALK.items():
        logging.getLogger(f"ray.data{name}").setLevel(level)
    try:
        rows = [
            {"index": index, "path": _everywhere(job), "name": str(job.name)}
            for index, job in enumerate(jobs)
        ]
        chunk = min(_CHUNK, max(1, len(rows) // (8 * actors)))
        chunks = -(-len(rows) // chunk)
        done = ray.data.from_items(rows, override_num_blocks=chunks).map_batches(
            _Files,
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=min(actors, chunks)),
            fn_constructor_args=(arithmetic, results, sign, ledger),
            **needs,
        )
        left = set(range(len(jobs)))
        for batch in done.iter_batches(batch_size=None, prefetch_batches=0):
            for index, error in zip(batch["index"].tolist(), batch["error"].tolist()):
                left.remove(index)
                yield jobs[index], error or None
        if left:
            raise RuntimeError(f"the cluster gave no answer for {len(left)} pictures")
    except RayError as error:
        reason = ray.get(ledger.reason.remote())
        raise (
            ValueError(reason) if reason else RuntimeError(f"the cluster failed: {error}")
        ) from error
    finally:
        context.enable_progress_bars = shown
        _removed(results.out, sign)


def _everywhere(job: Job) -> str:
    """Its path in any process."""
    return str(job.path) if remote.is_uri(job.path) else os.path.abspath(job.path)


def _removed(out: str, sign: str) -> None:
    if remote.is_uri(out):
        remote.delete(remote.joined(out, sign))
    else:
        with suppress(OSError):
            Path(out, sign).unlink()


def _groups(nodes: Sequence[Mapping[str, float]]) -> tuple[int, dict[str, float]]:
    """How many actors there are to be on machines of such resources, and what each needs.

    Raises:
        ValueError: there is no processor.
    """
    gpus = [node for node in nodes if node.get("GPU", 0) >= 1 and node.get("CPU", 0) >= 1]
    if gpus:
        each = min(node["CPU"] // node["GPU"] for node in gpus)
        count = int(sum(node["GPU"] for node in gpus))
        return count, {"num_gpus": 1, "num_cpus": max(1, min(_GROUP, each))}
    processors = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    if not processors:
        raise ValueError("the cluster must have processors, got none")
    group = min(_GROUP, *processors)
    return sum(number // group for number in processors), {"num_cpus": group}


class _Ledger:
    """An actor beside the driver that outlives the others, and tells those that take their place what they need.

    That is the model, which pictures were begun, how often, and which are finished.
    """

    def __init__(self, model: FastSCNN) -> None:
        self._model = model
        self._begun = Counter[int]()
        self._finished: dict[int, str] = {}
        self._reason = ""

    def model(self) -> FastSCNN:
        return self._model

    def known(self, indices: Sequence[int]) -> list[tuple[int, str | None]]:
        """How often each was begun, and how it ended."""
        return [(self._begun[index], self._finished.get(index)) for index in indices]

    def begin(self, index: int) -> None:
        self._begun[index] += 1

    def finish(self, index: int, error: str) -> None:
        self._finished[index] = error

    def end(self, reason: str) -> None:
        """Notes why all must end, which Ray keeps only in the text of traces."""
        self._reason = self._reason or reason

    def reason(self) -> str:
        return self._reason


class _Files:
    """An actor that labels files and writes what is to be written."""

    def __init__(
        self, arithmetic: tuple[Any, ...], results: Results, sign: str, ledger: Any
    ) -> None:
        import ray

        self.results, self.ledger = results, ledger
        model: FastSCNN = ray.get(ledger.model.remote())
        backend, dtype, precision = arithmetic
        with self._ending():
            self.fast = Segmenter(model, backend=backend, dtype=dtype, precision=precision).fast
            results.check_shared(sign)

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """What is raised within ends the run, and the driver hears why."""
        import ray

        try:
            yield
        except Exception as error:
            ray.get(self.ledger.end.remote(str(error) or type(error).__name__))
            raise

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        with self._ending():
            return self._labelled(batch)

    def _labelled(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        import ray

        indices = batch["index"].tolist()
        files = dict(zip(indices, zip(batch["path"].tolist(), batch["name"].tolist())))
        known = dict(zip(indices, ray.get(self.ledger.known.remote(indices))))
        ended = {index: error for index, (_, error) in known.items() if error is not None}
        for index, (begun, error) in known.items():
            if error is None and begun >= _DEATHS:
                error = f"{files[index][0]}: {begun} processes died that had it in work"
                ray.get(self.ledger.finish.remote(index, error))
                ended[index] = error
        # Of those that were in work when an actor died one may be why: each by itself, so that it takes no other along.
        suspects = [index for index, (begun, _) in known.items() if begun and index not in ended]
        fresh = [index for index, (begun, _) in known.items() if not begun and index not in ended]
        for group in (*([index] for index in suspects), fresh):
            ended |= self._done({index: files[index] for index in group})
        errors = np.array([ended[index] for index in indices], object)
        return {"index": batch["index"], "error": errors}

    def _done(self, files: Mapping[int, tuple[str, str]]) -> dict[int, str]:
        """Labels files of a path and a name each; what was wrong with each."""
        import ray

        def read(index: int) -> Prepared:
            ray.get(self.ledger.begin.remote(index))
            path, results = files[index][0], self.results
            content = remote.read(path) if remote.is_uri(path) else path
            return prepare(content, self.fast.config, results.size, results.bits, path)

        def write(
            index: int, pixels: NDArray[np.uint8], labels: Labels, confidence: Confidence | None
        ) -> None:
            contents = encode(pixels, labels, self.fast, self.results.overlay_format, confidence)
            for ending, content in contents.items():
                self.results.write(files[index][1] + ending, content)
            ray.get(self.ledger.finish.remote(index, ""))

        def size(index: int) -> int:
            return 0 if remote.is_uri(files[index][0]) else size_of(files[index][0])

        ended = {}
        steps = flow(self.fast, files, read, write, size, self.results.confidence)
        with closing(steps):
            for index, outcome in steps:
                ended[index] = ""
                try:
                    outcome.result()
                except ValueError as error:
                    ended[index] = str(error)
                    ray.get(self.ledger.finish.remote(index, ended[index]))
        return ended
