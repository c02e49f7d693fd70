"""``dump``: its list of parameters against the PTX, of every op and its errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fastscnn_fast.cli import main
from fastscnn_fast.program.layers import OPS

pytest.importorskip("triton", reason="the package triton is not installed")

LAUNCHES = {"pyramid_pooling": 3}
LAUNCHES_INT8 = {"pyramid_pooling": 4, "feature_fusion": 2}


def _dump(folder: Path, *options: str) -> list[dict]:
    assert main(["dump", "--backend", "triton", "--out", str(folder), *options]) == 0
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def _check(folder: Path, about: dict) -> None:
    """The parameters are those of the PTX, and what they name lies where it is said to."""
    ptx = (folder / f"{about['op']}_{about['launch']}.ptx").read_text()
    entry = re.search(r"\.visible \.entry (\w+)\((.*?)\)\s*\.reqntid (\d+)", ptx, re.DOTALL)
    assert entry is not None
    assert entry[1] == about["entry"]
    assert int(entry[3]) == about["block"][0] == 32 * about["warps"]
    types = re.findall(r"\.param \.(\w+)( \.ptr)?", entry[2])
    assert len(types) == len(about["parameters"])
    for (type_, pointer), parameter in zip(types, about["parameters"]):
        assert bool(pointer) == (parameter["kind"] == "pointer")
        if parameter["kind"] == "scalar":
            assert type_[1:] == parameter["dtype"][1:]
            assert parameter["value"] != 1
        elif parameter["role"] == "null":
            assert parameter["value"] == 0
        else:
            assert parameter["role"] in ("input", "weight", "output", "scratch")
            assert len(parameter["shape"]) == len(parameter["strides"])
            assert parameter["offset_bytes"] % 16 == 0
            assert parameter["holds"]
    assert [p["name"] for p in about["parameters"][-2:]] == ["global_scratch", "profile_scratch"]
    names = [p["name"] for p in about["parameters"][:-2]]
    assert not set(names) & set(about["constants"])
    cubin = (folder / f"{about['op']}_{about['launch']}.cubin").read_bytes()
    assert cubin[:4] == b"\x7fELF"


@pytest.mark.parametrize("op", OPS)
def test_every_op(op: str, tmp_path: Path) -> None:
    launches = _dump(tmp_path, "--op", op, "--arch", "80", "--size", "256x512", "--dtype", "fp16")
    assert len(launches) == LAUNCHES.get(op, 1)
    for about in launches:
        _check(tmp_path, about)
    roles = [p["role"] for about in launches for p in about["parameters"] if "role" in p]
    assert "input" in roles
    assert "output" in roles
    assert ("weight" in roles) == (op != "upsample_classify")


@pytest.mark.machine_code
@pytest.mark.parametrize("op", OPS[:-1])
def test_every_op_of_int8(op: str, tmp_path: Path) -> None:
    launches = _dump(tmp_path, "--op", op, "--arch", "90", "--size", "256x512", "--dtype", "int8")
    assert len(launches) == LAUNCHES_INT8.get(op, 1)
    for about in launches:
        _check(tmp_path, about)
        for p in about["parameters"]:
            if (
                p["kind"] == "pointer"
                and p["role"] == "weight"
                and p["holds"] != "not read by this launch"
            ):
                assert not p["holds"].startswith("(N, H, W, C)"), p["name"]


def test_launches_name_their_scratch_alike(tmp_path: Path) -> None:
    sums, grids, out = _dump(
        tmp_path, "--op", "pyramid_pooling", "--arch", "90", "--shape", "7", "9", "--dtype", "bf16"
    )

    def memory(about: dict, name: str) -> dict:
        (found,) = (p for p in about["parameters"] if p["name"] == name)
        return {key: found[key] for key in ("memory", "role", "shape", "strides", "dtype")}

    assert memory(sums, "sums") == memory(grids, "sums")
    assert memory(grids, "shares") == memory(out, "shares")
    assert memory(out, "shares")["role"] == "scratch"


@pytest.mark.parametrize(
    "options",
    [
        ("--op", "dsconv", "--layer", "classifier.dsconv2", "--preset", "tramac"),
        ("--op", "dsconv", "--layer", "2", "--shape", "5", "7"),
        ("--op", "feature_fusion", "--preset", "mmseg_legacy", "--size", "250x333"),
        ("--op", "stem_conv", "--raw", "--shape", "33", "49"),
        ("--op", "upsample_classify", "--output", "labels"),
    ],
)
def test_any_layer(options: tuple[str, ...], tmp_path: Path) -> None:
    for about in _dump(tmp_path, "--arch", "80", *options):
        _check(tmp_path, about)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--op", "dsconv", "--arch", "81"), "arch must be one of 75, 80"),
        (("--op", "dsconv", "--arch", "75", "--dtype", "bf16"), "no bfloat16"),
        (
            ("--op", "dsconv", "--arch", "75", "--dtype", "int8"),
            "arch must be at least 80 for int8",
        ),
        (("--op", "dsconv", "--arch", "80", "--layer", "stem"), "must be of op dsconv"),
        (("--op", "dsconv", "--arch", "80", "--layer", "99"), "layer must be below"),
        (("--op", "dsconv", "--arch", "80", "--layer", "nought"), "got nought"),
    ],
)
def test_errors(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dump", "--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err
