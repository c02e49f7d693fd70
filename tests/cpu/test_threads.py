"""Threads and processes: torch.set_num_threads governs, calls may overlap, forked children run alone."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import ROOT, err, small_network, threads
from torch.utils.data import DataLoader
from workers import Labels, openmp_libraries

from fastscnn_fast import FastSCNN, FusedFastSCNN, fuse
from fastscnn_fast.backends import registry

BEGIN = """
import ctypes, os, sys, threading
sys.path[:0] = [{root!r}, {support!r}]
import torch
from helpers import small_network
from workers import openmp_libraries, running_threads
from fastscnn_fast import fuse
from fastscnn_fast.backends import registry
torch.manual_seed({seed})
torch.set_num_threads(1)
fast = fuse(small_network())
x = torch.randn(2, 3, 64, 80)
openmp = openmp_libraries()
"""

pytestmark = [
    pytest.mark.skipif(not registry.isas(), reason="the C++ extension is not built"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and forks"),
]

with_gomp = pytest.mark.skipif(
    not (registry.isas() and registry.cpu_module().openmp and openmp_libraries()),
    reason="the C++ extension and torch do not both use GNU OpenMP",
)


@pytest.fixture
def model() -> FastSCNN:
    return small_network()


@pytest.fixture
def fast(model: FastSCNN) -> FusedFastSCNN:
    return fuse(model)


def python(script: str, seed: int) -> None:
    """Runs a script in a fresh process, where no thread was started and every warning is an error."""
    begin = BEGIN.format(root=str(ROOT), support=str(ROOT / "tests" / "support"), seed=seed)
    warnings = ["-W", "error", "-W", "ignore::DeprecationWarning"]  # 3.12 warns of forks
    subprocess.run([sys.executable, *warnings, "-c", begin + script], check=True, timeout=120)


@with_gomp
def test_set_num_threads_governs(seed):
    """Team by team: 1, 2 and 4 threads, shared images and whole ones, and torch's own pool with them."""
    script = """
assert len(openmp) == 1, openmp
before = running_threads()
expected = [fast(x), fast.labels(x)]
assert running_threads() == before
for count in (2, 4):
    torch.set_num_threads(count)
    for run in (fast, fast.labels):
        run(x[:1])
        assert running_threads() == before + count - 1, (count, running_threads())
    assert torch.equal(fast(x), expected[0]) and torch.equal(fast.labels(x), expected[1])
torch.zeros(10**6).add_(1)
assert running_threads() == before + 3  # torch runs on the same threads
torch.set_num_threads(1)
assert torch.equal(fast(x), expected[0])
"""
    python(script, seed)


@with_gomp
def test_fewer_threads_than_asked_for(seed, monkeypatch):
    """OpenMP may give a smaller team: no share of the work may be left undone."""
    monkeypatch.setenv("OMP_THREAD_LIMIT", "2")
    script = """
pictures = [x, x[:1], x.repeat(3, 1, 1, 1)]
expected = [run(y) for y in pictures for run in (fast, fast.labels)]
before = running_threads()
torch.set_num_threads(3)
assert all(map(torch.equal, [run(y) for y in pictures for run in (fast, fast.labels)], expected))
assert running_threads() == before + 1
"""
    python(script, seed)


def test_a_forked_server(seed):
    """Folding, loading and segmenting for the first time in a child, after torch's pool was used in its parent."""
    script = """
import signal
from PIL import Image
from fastscnn_fast import load_checkpoint, segment
torch.set_num_threads(4)
picture = Image.effect_noise((96, 64), 80).convert("RGB")
pixels = torch.randint(256, (1, 3, 64, 96), dtype=torch.uint8)
models = [load_checkpoint() for _ in range(2)]
torch.randn(1000, 1000).mm(torch.randn(1000, 1000)).relu().sum()
expected = segment(load_checkpoint(), picture)
in_tiles = segment(load_checkpoint(), picture, tile=64, overlap=16)
def loaded():
    return (segment(load_checkpoint(), picture) == expected).all()
def first():
    return (segment(models[0], picture) == expected).all()
def fused():
    return (segment(fuse(models[0]), picture) == expected).all()
def tiled():
    return (segment(models[0], picture, tile=64, overlap=16) == in_tiles).all()
def half():
    return fuse(models[0], dtype=torch.bfloat16)(pixels).shape == (1, 11, 64, 96)
def plain():
    os.environ["FASTSCNN_BACKEND"] = "reference"
    return (segment(models[0], picture) == expected).mean() > 0.99
@torch.no_grad()
def called():
    before = torch.get_num_threads()
    return models[1](pixels).shape == (1, 11, 64, 96) and torch.get_num_threads() == before == 4
for run in (loaded, first, fused, tiled, half, plain, called):
    child = os.fork()
    if child == 0:
        code = 1
        signal.alarm(30)  # ends what hangs
        try:
            code = 0 if run() else 2
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, (run, code)
assert torch.get_num_threads() == 4
"""
    python(script, seed)


def test_a_forked_child_runs_alone(seed):
    """The parent's pool of threads does not survive a fork; waiting for it would never end."""
    script = """
torch.set_num_threads(2)
expected = [fast(x), fast.probabilities(x), fast.labels(x)]
busy = threading.Event()
def work():
    while not busy.is_set():
        fast(x)
worker = threading.Thread(target=work)
worker.start()
children = []
for _ in range(8):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(4)
            before = running_threads()
            results = [fast(x), fast.probabilities(x), fast.labels(x)]
            code = 3 if running_threads() != before else 2
            torch.set_num_threads(1)  # torch's own parallel loops hang in a forked child
            if code == 2 and all(map(torch.equal, results, expected)):
                code = 0
        finally:
            os._exit(code)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
busy.set()
worker.join()
assert codes == [0] * 8, codes
assert torch.equal(fast(x), expected[0])
"""
    python(script, seed)


@with_gomp
def test_inside_an_openmp_team_of_the_caller_it_runs_alone(seed):
    """As under a caller whose own parallel region calls back into Python."""
    script = """
torch.set_num_threads(2)
x = torch.randn(2, 3, 256, 256)
expected, results, counts, over = fast(x), [], [], threading.Event()
def watch():
    while not over.is_set():
        counts.append(running_threads())
watcher = threading.Thread(target=watch)
watcher.start()
(gomp,) = map(ctypes.CDLL, openmp)
gomp.omp_set_nested(1)
gomp.omp_set_max_active_levels(4)
@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def region(_):
    torch.set_num_threads(2)
    for _ in range(5):
        results.append(fast(x))
before = running_threads()
gomp.GOMP_parallel(region, None, 3, 0)
over.set()
watcher.join()
assert len(results) == 15 and all(torch.equal(y, expected) for y in results)
assert max(counts) <= before + 2, (before, max(counts))  # the two others of this region
assert torch.equal(fast(x), expected)
"""
    python(script, seed)


def test_calls_from_many_threads_do_not_mix(fast):
    """Each call has its own scratch memory, whatever the sizes; results are the same to the bit."""
    pictures = [torch.randn(1 + i % 3, 3, 33 + 11 * i, 97 - 7 * i) for i in range(6)]
    raw = [torch.randint(256, x.shape, dtype=torch.uint8) for x in pictures]
    jobs = [(run, x) for x in (*pictures, *raw) for run in (fast, fast.probabilities, fast.labels)]
    expected = [run(x) for run, x in jobs]

    def work(index: int) -> bool:
        run, x = jobs[index % len(jobs)]
        return torch.equal(run(x), expected[index % len(jobs)])

    for count in (1, 2):
        with threads(count), ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4 * len(jobs))))


def test_scratch_memory_is_one_buffer_for_each_call_at_once(fast):
    x = torch.randn(1, 3, 64, 64)
    cpu, barrier = registry.cpu_module(), threading.Barrier(3)

    def work(_: int) -> None:
        barrier.wait()
        for _ in range(20):
            fast(x)

    def sweep() -> int:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(work, range(3)))
        return cpu.scratch_bytes()

    fast(x)
    one = cpu.scratch_bytes()
    assert max(sweep() for _ in range(5)) <= 3 * one


def test_other_threads_run_python_meanwhile(fast):
    """The interpreter's lock is released during a call."""
    x, running = torch.randn(4, 3, 512, 512), threading.Event()

    def seen() -> int:
        worker = threading.Thread(target=lambda: (running.set(), fast(x), running.clear()))
        worker.start()
        running.wait()
        times = 0
        while running.is_set():
            times += 1
        worker.join()
        return times

    # On a busy machine this thread may get no processor during one call, or two.
    assert any(seen() > 100 for _ in range(10))


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_of_a_data_loader(context, model, fast):
    pictures = [torch.randn(1, 3, 40 + 8 * i, 64) for i in range(6)]
    with torch.no_grad(), threads(2):
        model(pictures[0])
        expected = [(fast.labels(x), model.reference(x)) for x in pictures]
        loader = DataLoader(
            Labels(fast, model, pictures),
            batch_size=None,
            collate_fn=tuple,
            num_workers=2,
            multiprocessing_context=context,
        )
        results = list(loader)
    assert len(results) == 6
    for (labels, logits, started), (right_labels, right_logits) in zip(results, expected):
        assert torch.equal(torch.from_numpy(labels), right_labels)
        assert err(torch.from_numpy(logits), right_logits.double()) < 1e-4
        assert started == 0
