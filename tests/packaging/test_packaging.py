"""The package imports anywhere, and its sdist and wheel build and install with nothing but what they declare."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT

import fastscnn_fast

SITE = sysconfig.get_path("purelib")


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a command outside the source tree; its output is shown where it fails."""
    result = subprocess.run(
        list(map(str, command)),
        cwd=ROOT.anchor,
        env=os.environ | env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout
    return result


IMPORT_EVERYTHING = """
import sys, pkgutil, importlib
sys.modules["triton"] = None
import torch
def no_gpu(*args, **kwargs):
    raise AssertionError("the GPU was queried at import")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = no_gpu
import fastscnn_fast, fastscnn_fast.kernels
TRITON = ("fastscnn_fast.kernels.", "fastscnn_fast.backends.gpu.aot")
for package in (fastscnn_fast, fastscnn_fast.kernels):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ImportError as error:  # only what defines or launches kernels may need Triton
            assert error.name == "triton", error
            assert module.name.startswith(TRITON)
print("imported")
"""


def test_every_module_imports_without_triton_and_gpu() -> None:
    assert run(sys.executable, "-c", IMPORT_EVERYTHING).stdout.strip() == "imported"


IMPORT_TIME = """
import torch, sys, time
before, start = set(sys.modules), time.process_time()
import fastscnn_fast
from fastscnn_fast import FastSCNN, fuse, load_checkpoint, segment
print(time.process_time() - start, *(set(sys.modules) - before))
"""


#: Parts of the package that segmenting pictures does not need.
RARE = tuple(
    f"fastscnn_fast.{name}" for name in ("train", "data.scenes", "bench", "export", "compat", "cli")
)

COMMAND_LINE = """
import sys
from fastscnn_fast import cli
try:
    cli.main(sys.argv[1:])
finally:
    print("modules:", *sys.modules)
"""


def test_import_is_light() -> None:
    """On top of torch: under a second of CPU time, and nothing that only some uses of the package need."""
    seconds, *modules = run(sys.executable, "-c", IMPORT_TIME).stdout.split()
    heavy = {
        "tqdm",
        "matplotlib",
        "triton",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "openvino",
        "nncf",
        "huggingface_hub",
        "ray",
        "av",
        "tifffile",
        "pyarrow",
        "gradio",
    }
    assert not heavy & {name.partition(".")[0] for name in modules}
    assert not [name for name in modules if name.startswith(RARE)]
    assert float(seconds) < 1.0


@pytest.mark.parametrize(
    ("argument", "said"), [("--help", "evaluate"), ("--version", fastscnn_fast.__version__)]
)
def test_a_command_is_loaded_when_it_is_run(argument: str, said: str) -> None:
    """What every command shares loads not even torch."""
    printed = run(sys.executable, "-c", COMMAND_LINE, argument).stdout
    assert said in printed.partition("modules:")[0]
    modules = printed.partition("modules:")[2].split()
    assert {"torch", "numpy", "PIL"}.isdisjoint(modules) and "fastscnn_fast.cli" in modules
    commands = [name for name in modules if name.startswith("fastscnn_fast.cli.")]
    assert commands == ["fastscnn_fast.cli.parser"]  # which is what they share


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel built from it; importing torch during the build is an error."""
    folder = tmp_path_factory.mktemp("dist")
    poison = folder / "poison"
    poison.mkdir()
    (poison / "torch.py").write_text("raise ImportError('the build imports torch')")
    run(
        *(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT),
        PYTHONPATH=str(poison),
        FASTSCNN_REQUIRE_CPU="1",
        FASTSCNN_CUDA="0",  # minutes
    )
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of an empty environment that borrows the installed torch, but not this checkout."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout
    Path(purelib.strip(), "borrowed.pth").write_text(SITE)
    return python


def pip_install(python: Path, *arguments: str | Path, **env: str) -> None:
    pip = (sys.executable, "-m", "pip", "--python", python, "install")
    run(
        *pip,
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        *arguments,
        FASTSCNN_CUDA="0",
        **env,
    )


USE = """
import sys, torch, fastscnn_fast, fastscnn_fast.kernels
from fastscnn_fast import FastSCNN, fuse
model = FastSCNN(num_classes=5).eval()
fast = fuse(model)
x = torch.rand(1, 3, 64, 96)
with torch.no_grad():
    assert torch.allclose(fast(x), model.reference(x), atol=1e-4)
print(fastscnn_fast.__file__, fast.backend)
"""


def use(python: Path) -> tuple[Path, str]:
    """Runs the installed package with no compiler in reach: its folder and the backend it chose."""
    output = run(python, "-c", USE, PATH=str(python.parent)).stdout
    file, backend = output.splitlines()[-1].split()
    return Path(file).parent, backend


@pytest.mark.slow
def test_wheel(dist: tuple[Path, Path], python: Path, tmp_path: Path) -> None:
    sdist, wheel = dist
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {
        str(path.relative_to(ROOT))
        for folder in (
            "csrc",
            "docs",
            "examples",
            "fastscnn_fast",
            "kernels",
            "tests",
            "benchmarks",
        )
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix not in {".pyc", ".so"}
    }
    assert sources <= names
    assert {"LICENSE", "README.md", "SECURITY.md", "Makefile", "constraints.txt"} <= names
    assert "hubconf.py" in names
    assert not any(name.endswith(".so") for name in names)

    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"fastscnn_fast/py.typed", "fastscnn_fast/kernels/__init__.py"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastscnn_fast"}

    pip_install(python, wheel)
    folder, backend = use(python)
    assert folder.is_relative_to(python.parent.parent)
    assert backend == "cpu"
    script = python.with_name("fastscnn_fast")  # what pipx and uvx run
    assert "backend cpu: can run" in run(script, "info").stdout
    done = run(script, "demo", "-o", tmp_path / "demo", "--weights", "camvid11").stdout
    assert "labels of the street" in done and (tmp_path / "demo" / "street_labels.png").exists()

    for extension in folder.glob("_cpu*"):
        extension.unlink()
    assert use(python) == (folder, "reference")
    assert "reference" in run(python, "-m", "fastscnn_fast", "info").stdout


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True])
def test_install_without_a_compiler(
    dist: tuple[Path, Path], python: Path, tmp_path: Path, editable: bool
) -> None:
    """The C++ build fails: reported and left out, or an error where FASTSCNN_REQUIRE_CPU=1 asks for that."""
    with tarfile.open(dist[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    source = next(tmp_path.glob("fastscnn_fast-*"))
    how = ["-e"] if editable else []
    no_compiler = {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
    with pytest.raises(AssertionError, match="no-such-compiler"):
        pip_install(python, *how, source, FASTSCNN_REQUIRE_CPU="1", **no_compiler)
    pip_install(python, *how, source, FASTSCNN_REQUIRE_CPU="0", **no_compiler)
    folder, backend = use(python)
    assert folder.is_relative_to(source) == editable
    assert backend == "reference"
