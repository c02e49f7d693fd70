"""What the documents say of the tree, of files, names, commands and options is so, and their examples run."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path

import clips
import numpy as np
import pytest
from PIL import Image

from fastscnn_fast.cli import main
from fastscnn_fast.data.scenes import street

ROOT = Path(__file__).parents[2]
PROJECT = "https://github.com/fastscnn-fast/fastscnn_fast"
RAW = "https://raw.githubusercontent.com/fastscnn-fast/fastscnn_fast/main/"
PAGES = sorted(
    path.relative_to(ROOT)
    for pattern in (
        "*.md",
        "docs/*.md",
        "kernels/*.md",
        "csrc/*/*.md",
        "benchmarks/*.md",
        "tests/*.md",
    )
    for path in ROOT.glob(pattern)
)
page = pytest.mark.parametrize("page", PAGES, ids=str)
SOURCES = ("benchmarks", "csrc", "docs", "examples", "fastscnn_fast", "kernels", "tests")
# Below these the README names no folders; and what builds leave.
CLOSED = {"benchmarks", "docs", "tests"}
BUILT = {"build", "dist", "demo_out", "__pycache__"}


def text_of(page: Path) -> str:
    return (ROOT / page).read_text()


def test_the_readme_is_a_page() -> None:
    assert len(text_of(Path("README.md")).splitlines()) <= 150


def folders(parent: Path = ROOT) -> set[str]:
    """The folders of the tree, as the README has them."""
    found = set()
    for path in parent.iterdir():
        if (
            path.is_dir()
            and path.name not in BUILT
            and not re.match(r"\.|.*\.egg-info$", path.name)
        ):
            name = str(path.relative_to(ROOT))
            found.add(name)
            if name not in CLOSED and not path.is_symlink():
                found |= folders(path)
    return found


def test_the_readmes_tree_is_the_tree() -> None:
    tree = text_of(Path("README.md")).split("## The tree")[1]
    listed, package = [], ""
    for indent, name in re.findall(r"^ {4}( *)([\w/]+)/ +\S", tree, re.MULTILINE):
        listed.append(package + name if indent else name)
        package = package if indent else name + "/"
    assert len(listed) == len(set(listed))
    assert set(listed) == folders()


@page
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(
        r"^\[[^]]+\]: (\S+)$", text, re.MULTILINE
    )
    for link in links:
        target, _, anchor = link.partition("#")
        for prefix in (f"{PROJECT}/blob/main/", RAW):
            if target.startswith(prefix):
                assert (ROOT / target.removeprefix(prefix)).exists(), link
        if re.match(r"https?:", target):
            continue
        assert page != Path("README.md"), f"{link}: a package index has no such file"
        file = ROOT / page.parent / target if target else ROOT / page
        assert file.exists(), link
        if anchor and "fastscnn_fast." not in anchor:  # those of the API are `make docs`'s
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]


@page
def test_files_and_names_exist(page: Path) -> None:
    text = text_of(page)
    for name in re.findall(
        r"(?<![\w/.])((?:fastscnn_fast|kernels|csrc|tests|docs)/[\w/.]*\w)", text
    ):
        assert (ROOT / name).exists(), name
    sources = {path.name for folder in SOURCES for path in (ROOT / folder).rglob("*.*")}
    for name in re.findall(r"(?<![\w*.])\w+\.(?:cpp|cu|cuh|h|inl|py)\b", text):
        assert name in sources | {"setup.py"}, name
    for name in re.findall(r"(?<![\w/.-])(fastscnn_fast(?:\.[A-Za-z_]\w*)+)(?!\.?\w*[(/])", text):
        if name.startswith("fastscnn_fast.kernels.") and importlib.util.find_spec("triton") is None:
            continue
        pkgutil.resolve_name(name)


@cache
def options_of(command: str) -> set[str]:
    """The options that a command's help lists."""
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setenv("COLUMNS", "200")
        patch.setattr(
            sys, "stdout", type("Out", (), {"write": lines.append, "flush": lambda: None})
        )
        with pytest.raises(SystemExit):
            main([command, "--help"])
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", "".join(lines)))


@page
def test_commands_and_options_exist(page: Path) -> None:
    text = text_of(page).replace("\\\n", " ")
    for command, rest in re.findall(r"-m fastscnn_fast (\w+)([^\n`#]*)", text):
        assert set(re.findall(r"(?<!\S)\[?(--?[a-z][\w-]*)", rest)) <= options_of(command), command
    for script, rest in re.findall(r"python (\w+/\w+\.py)([^`#]*?)(?:`|#|\n\n|\n {4})", text):
        options = re.findall(r"(?<!\S)\[?(--[a-z][\w-]*)", rest)
        source = (ROOT / script).read_text()
        assert all(f'"{option}"' in source for option in options), (script, options)
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets is not None
    assert set(re.findall(r"(?:^ {4}|`)make ([a-z]+)", text, re.MULTILINE)) <= {*targets[1].split()}


@pytest.mark.parametrize(
    ("page", "result", "shape"),
    [
        ("README.md", "logits", (1, 11, 64, 96)),
        ("docs/use.md", "logits", (1, 11, 64, 96)),
        ("docs/anywhere.md", "labels", (1, 360, 480)),
    ],
)
def test_examples_run(
    page: str, result: str, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each after the other, beside a street.jpg, a clip.mp4 and a map.tif."""
    monkeypatch.chdir(tmp_path)
    for file in ("street.jpg", "map.tif"):
        Image.fromarray(street(0, 64, 96)[0]).save(file)
    clips.write(Path("clip.mp4"), clips.drawn(3, 64, 96), "libx264", "yuv420p")
    examples = re.findall(r"```python\n(.*?)```", text_of(Path(page)), re.DOTALL)
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, page, "exec"), names)
    assert names[result].shape == shape  # type: ignore[attr-defined]


def test_the_picture_is_what_its_command_draws() -> None:
    """But for how this version of Pillow writes letters, and a label here and there."""
    drawn = runpy.run_path(str(ROOT / "docs" / "street.py"))["draw"]()
    a, b = (
        np.asarray(picture.convert("RGB").crop((0, 0, 960, 240)), int)
        for picture in (drawn, Image.open(ROOT / "docs" / "street.png"))
    )
    assert np.mean(np.abs(a - b).max(-1) > 24) < 0.01


def test_the_version_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import fastscnn_fast; print(fastscnn_fast.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+", done.stdout.strip())
