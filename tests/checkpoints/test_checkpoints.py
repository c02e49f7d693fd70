from __future__ import annotations

import ast
import contextlib
import copy
import io
import json
import os
import pickle
import random
import resource
import struct
import sys
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from layouts import SMALL, free_widths, key_lists, random_state
from safetensors.torch import save_file
from torch import Tensor, nn

from fastscnn_fast import FastSCNN, fuse, load_checkpoint
from fastscnn_fast.arch.config import PRESETS, preset
from fastscnn_fast.backends import registry
from fastscnn_fast.checkpoints import (
    LAYOUTS,
    MAX_BYTES,
    CheckpointError,
    from_state_dict,
    read_details,
    save_checkpoint,
    to_layout,
)
from fastscnn_fast.data.classes import colours_of, numbered
from fastscnn_fast.lower.quantise import value_names
from fastscnn_fast.program.program import fast_scnn


def layout_of(name: str) -> str:
    return name.removesuffix("_aux")


def expected_config(name: str, **overrides: Any) -> Any:
    aux = name not in ("tramac", "leftthomas")
    return preset(layout_of(name), aux=aux, **overrides)


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )


def check_round_trip(state: dict[str, Tensor], name: str, path: Path) -> None:
    torch.save({"meta": {"epoch": 3}, "state_dict": state}, path)
    model = load_checkpoint(path)
    assert model.config == expected_config(name)
    assert not model.training
    assert same_tensors(to_layout(model, layout_of(name)), state)


NAMES = sorted(key_lists())


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_comes_back_byte_for_byte(name: str, tmp_path: Path) -> None:
    check_round_trip(random_state(key_lists()[name]), name, tmp_path / "weights.pth")


REFERENCE = ROOT.resolve().parent / "shared" / "reference"


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="no complete key lists beside the checkout")
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"mmseg_legacy"}))
def test_complete_key_lists(name: str) -> None:
    lines = (REFERENCE / f"keys_{name}.txt").read_text().splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    shapes = {key: tuple(ast.literal_eval(shape)) for key, shape, _ in rows}
    assert shapes == key_lists()[name]
    state = random_state(shapes)
    assert same_tensors(to_layout(from_state_dict(state), layout_of(name)), state)


def test_parameter_count_is_the_published_one() -> None:
    model = from_state_dict(random_state(key_lists()["tramac"]))
    assert sum(p.numel() for p in model.parameters()) == 1_138_051
    assert all(p.requires_grad for p in model.parameters())


# --- what is derived -------------------------------------------------------------------------------------


def wrap(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in state.items()}


WRAPPINGS = {
    "plain": lambda s: s,
    "ordered": OrderedDict,
    "module.": lambda s: wrap(s, "module."),
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"state": {}}},
    "model": lambda s: {"model": s, "best_pred": 0.5},
    "model_state_dict": lambda s: {"model_state_dict": s},
    "net": lambda s: {"net": s},
    "everything": lambda s: {"model": {"state_dict": wrap(s, "module._orig_mod.model.")}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappers_are_stripped(wrapping: str) -> None:
    model = FastSCNN(5, "tramac", aux=True, **SMALL)
    state = to_layout(model, "tramac")
    got = from_state_dict(WRAPPINGS[wrapping](state))
    assert got.config == model.config
    assert same_tensors(to_layout(got, "tramac"), state)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_widths_classes_and_channels_are_derived(layout: str, tmp_path: Path) -> None:
    name = "paper" if layout == "fastscnn_fast" else layout
    aux = layout != "leftthomas"
    more = {"in_channels": 4, "aux_channels": 64} if aux else {"in_channels": 1}
    model = FastSCNN(7, name, aux=aux, **SMALL, **more)
    torch.save(to_layout(model, layout), tmp_path / "weights.pt")
    assert load_checkpoint(tmp_path / "weights.pt").config == model.config


def same_function(a: FastSCNN, b: FastSCNN) -> bool:
    x = torch.randn(1, a.config.in_channels, 64, 96)
    return torch.equal(a.eval().reference(x), b.eval().reference(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_widths_round_trip(layout: str, tmp_path: Path) -> None:
    """Free for each block and multiples of nothing, under the names of every layout and in our own files."""
    name = "paper" if layout == "fastscnn_fast" else layout
    widths = free_widths()
    aux = layout != "leftthomas"
    if aux:
        widths["aux_channels"] = random.randint(1, 60)
    model = FastSCNN(random.randint(1, 30), name, aux=aux, **widths)
    assert model.config.bottlenecks == widths["bottlenecks"]
    state = to_layout(model, layout)
    torch.save(state, tmp_path / "weights.pth")
    save_checkpoint(model, tmp_path / "own.safetensors")
    for file in ("weights.pth", "own.safetensors"):
        got = load_checkpoint(tmp_path / file)
        assert got.config == model.config
        assert same_tensors(to_layout(got, layout), state)
        assert same_function(got, model)


def test_strides_are_in_our_files_and_can_be_told(tmp_path: Path) -> None:
    """No tensor shows them, and the code of other layouts has the paper's."""
    model = FastSCNN(3, **free_widths(strides=(1, 2, 2)))
    save_checkpoint(model, tmp_path / "own.safetensors")
    got = load_checkpoint(tmp_path / "own.safetensors")
    assert got.config == model.config and same_function(got, model)
    told = from_state_dict(model.state_dict(), bottlenecks=model.config.bottlenecks)
    assert told.config == model.config
    assert from_state_dict(model.state_dict()).config != model.config
    model = FastSCNN(3, "tramac", **free_widths(strides=(1, 2, 2)))
    with pytest.raises(
        ValueError, match=r"there the strides of its bottlenecks are \(\(2.*, got \(\(1"
    ):
        to_layout(model, "tramac")


def test_bottlenecks_the_short_way(tmp_path: Path) -> None:
    """As an override of a file's, and in the config that a file of ours states."""
    model = FastSCNN(3, **SMALL)
    short = {k: SMALL[k] for k in ("bottleneck_channels", "bottleneck_repeats", "expansion")}
    assert from_state_dict(model.state_dict(), **short).config == model.config
    with pytest.raises(CheckpointError, match="of another shape"):
        from_state_dict(model.state_dict(), **short | {"expansion": 3})
    config = model.config.to_dict()
    del config["bottlenecks"]
    path = tmp_path / "own.safetensors"
    save_file(dict(model.state_dict()), path, {"fastscnn_fast.config": json.dumps(config | short)})
    assert load_checkpoint(path).config == model.config


@pytest.mark.parametrize("name", PRESETS)
def test_own_keys_tell_the_preset(name: str) -> None:
    for aux in {False, bool(PRESETS[name].aux_taps)}:
        model = FastSCNN(3, name, aux=aux, **SMALL)
        config = from_state_dict(model.state_dict()).config
        same_function = {"zacario": {"dropout": 0.1}}
        assert config == preset(
            name, num_classes=3, aux=aux, **SMALL, **same_function.get(name, {})
        )
        assert from_state_dict(model.state_dict(), preset=name).config == model.config


@pytest.mark.parametrize("layout", ["paper", "tramac", "mmseg"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1e-6])
def test_weights_of_a_broken_training_are_refused_by_name(
    layout: str, value: float, tmp_path: Path
) -> None:
    model = FastSCNN(5, layout)
    if layout == "paper":
        state, path = model.state_dict(), tmp_path / "own.safetensors"
    else:
        state, path = to_layout(model, layout), tmp_path / "theirs.pth"
    for key in [key for key in state if value != -1e-6 or key.endswith("running_var")][::40]:
        if not state[key].is_floating_point():
            continue
        kept = state[key].clone()
        state[key].view(-1)[-1] = value
        if layout == "paper":
            save_checkpoint(model, path)
        else:
            torch.save(state, path)
        state[key].copy_(kept)
        with pytest.raises(CheckpointError, match=f"{path}: {key} holds (NaN or inf|a negative)"):
            load_checkpoint(path)


def test_one_of_two_auxiliary_heads() -> None:
    shapes = {k: s for k, s in key_lists()["mmseg"].items() if "auxiliary_head.1" not in k}
    state = random_state(shapes)
    model = from_state_dict(state)
    assert model.config.aux_taps == ("global",)
    assert same_tensors(to_layout(model, "mmseg"), state)


def test_other_pooling_bins_must_be_given() -> None:
    model = FastSCNN(3, **SMALL, pyramid_bins=(1, 4, 5))
    with pytest.raises(CheckpointError, match=r"pyramid_bins must be given, since the 3 branches"):
        from_state_dict(model.state_dict())
    assert from_state_dict(model.state_dict(), pyramid_bins=(1, 4, 5)).config == model.config


def test_num_batches_tracked_may_be_missing() -> None:
    state = FastSCNN(3, **SMALL).state_dict()
    bare = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert len(bare) < len(state)
    assert same_tensors(from_state_dict(bare).state_dict(), state)


def test_overrides_and_normalisation(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(to_layout(FastSCNN(3, "tramac", **SMALL), "tramac"), path)
    model = load_checkpoint(
        path, mean=[0.1, 0.2, 0.3], std=(0.4, 0.5, 0.6), bottleneck_activation="relu6"
    )
    assert model.config.mean == (0.1, 0.2, 0.3)
    assert model.config.std == (0.4, 0.5, 0.6)
    assert model.config.bottleneck_activation == "relu6"
    for wrong in ({"mean": (0.5,)}, {"colour": 1}, {"aux": True}, {"num_classes": 0}):
        with pytest.raises(CheckpointError, match=r"weights\.pth: "):
            load_checkpoint(path, **wrong)
    with pytest.raises(CheckpointError, match="no 'global' auxiliary head"):
        load_checkpoint(path, preset="paper", aux=True)
    with pytest.raises(ValueError, match="preset must be one of"):
        load_checkpoint(path, preset="papier")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = FastSCNN(3, **SMALL).to(dtype)
    save_checkpoint(model, tmp_path / "own.safetensors")
    assert same_tensors(
        load_checkpoint(tmp_path / "own.safetensors").state_dict(), model.state_dict()
    )


def test_mixed_dtypes_become_the_widest() -> None:
    state = FastSCNN(3, **SMALL).half().state_dict()
    state["classifier.conv.bias"] = state["classifier.conv.bias"].float()
    model = from_state_dict(state)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_weights_are_copies_and_random_numbers_untouched() -> None:
    state = FastSCNN(3, **SMALL).state_dict()
    before = torch.get_rng_state()
    model = from_state_dict(state)
    assert torch.equal(torch.get_rng_state(), before)
    bias = state["classifier.conv.bias"].clone()
    with torch.no_grad():
        model.classifier.conv.bias += 1
    assert torch.equal(state["classifier.conv.bias"], bias)


# --- files -----------------------------------------------------------------------------------------------


def test_own_file_comes_back_exactly(tmp_path: Path) -> None:
    model = FastSCNN(
        11, "mmseg", aux=True, **SMALL, pyramid_bins=(2, 5), mean=(0.1, 0.2, 0.3), in_channels=3
    )
    path = tmp_path / "own.safetensors"
    save_checkpoint(model, path)
    got = load_checkpoint(path)
    assert got.config == model.config
    assert same_tensors(got.state_dict(), model.state_dict())
    assert load_checkpoint(path, mean=(0.5, 0.5, 0.5)).config.mean == (0.5, 0.5, 0.5)
    x = torch.randn(1, 3, 40, 56)
    assert torch.equal(got.reference(x), model.eval().reference(x))
    with pytest.raises(CheckpointError, match="carries its own config"):
        load_checkpoint(path, preset="mmseg")
    with pytest.raises(ValueError, match=r"path must end in \.safetensors"):
        save_checkpoint(model, tmp_path / "own.pth")


def test_stored_in_half_the_bytes(tmp_path: Path) -> None:
    """The weights are rounded, the dtype, the counters, the config and the details come back."""
    model = FastSCNN(2, **SMALL, size=(720, 960))
    path, whole = tmp_path / "half.safetensors", tmp_path / "whole.safetensors"
    save_checkpoint(model, path, {"classes": ["a", "b"]}, stored_as=torch.float16)
    save_checkpoint(model, whole)
    assert path.stat().st_size < 0.6 * whole.stat().st_size
    assert read_details(path) == {"classes": ["a", "b"]} and read_details(whole) == {}
    got = load_checkpoint(path)
    assert got.config == model.config
    rounded = {
        name: t.half().float() if t.is_floating_point() else t
        for name, t in model.state_dict().items()
    }
    assert same_tensors(got.state_dict(), rounded)
    with torch.no_grad():
        model.classifier.conv.bias[0] = 1e6
    with pytest.raises(ValueError, match=r"stored_as must hold classifier.conv.bias, up to 1e\+06"):
        save_checkpoint(model, path, stored_as=torch.float16)


def test_unknown_dtype_of_the_stored(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_checkpoint(FastSCNN(2, **SMALL), path, stored_as=torch.float16)
    content = path.read_bytes()
    assert content.count(b'"fastscnn_fast.dtype":"float32"') == 1
    path.write_bytes(content.replace(b'dtype":"float32"', b'dtype":"float33"'))
    with pytest.raises(CheckpointError, match="its dtype must be one of .*, got 'float33'"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"bottlenecks": [[[32, 16, 2]] * 3, [[32, 32, 2]], [[32, 48, 1]]]},
            r"bottlenecks is \(\(\(32, 16, 2\)",
        ),
        ({"fusion_bias": True}, r"missing \(first: feature_fusion\.low\.conv\.bias\)"),
        ({"num_classes": 4}, "num_classes is 4 by its config, 3 by its tensors"),
        ({"num_classes": 0}, "num_classes must be an integer of at least 1"),
        ({"colour": 1}, "colour"),
    ],
)
def test_own_file_whose_config_lies(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = FastSCNN(3, **SMALL)
    config = json.dumps(model.config.to_dict() | change)
    save_file(
        dict(model.state_dict()), tmp_path / "own.safetensors", {"fastscnn_fast.config": config}
    )
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "own.safetensors")


def test_foreign_safetensors_and_old_torch_files(tmp_path: Path) -> None:
    state = to_layout(FastSCNN(3, "segmentron", aux=True, **SMALL), "segmentron")
    save_file(state, tmp_path / "foreign.safetensors")
    save_file(state, tmp_path / "LOUD.SAFETENSORS")
    torch.save(
        {"state_dict": wrap(state, "module.")},
        tmp_path / "old.pth",
        _use_new_zipfile_serialization=False,
    )
    for name in ("foreign.safetensors", "LOUD.SAFETENSORS", "old.pth"):
        assert same_tensors(to_layout(load_checkpoint(tmp_path / name), "segmentron"), state)


# --- layouts that cannot be written ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "overrides", "layout", "message"),
    [
        ("paper", {}, "tramac", "stem_padding is 0, got 1"),
        ("tramac", {}, "mmseg", "stem_padding is 1, got 0"),
        ("mmseg", {}, "mmseg_legacy", "stem_padding is 0, got 1"),
        ("tramac", {"bottleneck_activation": "relu6"}, "tramac", "bottleneck_activation is 'relu'"),
        ("tramac", {"pyramid_bins": (1, 2, 3, 4)}, "tramac", r"pyramid_bins is \(1, 2, 3, 6\)"),
        ("tramac", {"aux": True, "aux_taps": ("global",)}, "tramac", "aux_taps is"),
        ("leftthomas", {"aux": True, "aux_taps": ("global",)}, "leftthomas", "aux is False"),
        ("zacario", {"aux": False}, "zacario", "aux is True, got False"),
        ("paper", {}, "caffe", "layout must be one of fastscnn_fast, tramac"),
    ],
)
def test_layout_of_another_architecture_is_refused(
    name: str, overrides: dict[str, Any], layout: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        to_layout(FastSCNN(3, name, **SMALL, **overrides), layout)


def test_same_function_under_another_name() -> None:
    model = FastSCNN(3, "tramac", aux=True, **SMALL)
    assert to_layout(from_state_dict(to_layout(model, "zacario")), "tramac").keys() == (
        to_layout(model, "tramac").keys()
    )
    assert to_layout(model, "fastscnn_fast").keys() == model.state_dict().keys()


# --- wrong, broken and hostile files ---------------------------------------------------------------------


def test_wrong_network_names_the_closest_layout() -> None:
    state = random_state(key_lists()["segmentron"])
    del state["classifier.dsconv1.block.pointwise.weight"]
    state["extra.weight"] = torch.zeros(1)
    state["auxlayer2.0.weight"] = torch.zeros(32, 64, 3, 3)
    with pytest.raises(CheckpointError) as caught:
        from_state_dict(state, source="x.pth")
    assert str(caught.value) == (
        "x.pth: no known Fast-SCNN; closest is layout 'segmentron': "
        "1 missing (first: classifier.dsconv1.block.pointwise.weight); "
        "1 unexpected (first: extra.weight); 1 of another shape "
        "(first: auxlayer2.0.weight is (32, 64, 3, 3), should be (32, 128, 3, 3))"
    )
    with pytest.raises(CheckpointError, match=r"closest is layout .*: \d+ missing .* 1 unexpected"):
        from_state_dict({"fc.weight": torch.zeros(2, 2)})


@pytest.mark.parametrize(
    "shape", [(), (0,), (3,), (19, 128), (0, 128, 1, 1), (19, 128, 1, 1, 1), (2**30, 2**30, 1, 1)]
)
def test_odd_shapes_are_only_errors(shape: tuple[int, ...]) -> None:
    for key in ("classifier.conv.1.weight", "learning_to_downsample.conv.conv.0.weight"):
        state = random_state(key_lists()["tramac"])
        state[key] = torch.zeros(()).expand(shape)
        with pytest.raises(CheckpointError):
            from_state_dict(state)


def test_a_network_beyond_counting_is_only_an_error() -> None:
    state = random_state(key_lists()["tramac"])
    for key in list(state):
        if key.endswith("weight") and state[key].dim() == 4:
            state[key] = torch.zeros(()).expand(1 << 40, 1, 1, 1)
    with pytest.raises(CheckpointError):
        from_state_dict(state)


cyclic: dict[str, Any] = {}
cyclic["state_dict"] = cyclic


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds a NoneType, not a dictionary of tensors"),
        ([torch.zeros(1)], "holds a list"),
        (torch.zeros(3), "holds a Tensor"),
        ({}, "holds no tensors"),
        ({"state_dict": {}}, "holds no tensors"),
        ({"epoch": 3}, "'epoch' is a int"),
        ({3: torch.zeros(1)}, "3 is a Tensor"),
        ({"a.weight": torch.zeros(3, dtype=torch.int32)}, "a.weight is of torch.int32"),
        (cyclic, "nested more than 8 dictionaries deep"),
    ],
)
def test_files_without_named_tensors(content: Any, message: str, tmp_path: Path) -> None:
    for new in (True, False):
        torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=new)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / "x.pth")


def test_special_tensors_are_refused(tmp_path: Path) -> None:
    for tensor in (torch.eye(3).to_sparse(), torch.zeros(3, device="meta")):
        with pytest.raises(CheckpointError, match="not an ordinary dense tensor"):
            from_state_dict({"a.weight": tensor})
        torch.save({"a.weight": tensor}, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match="not tensors"):
            load_checkpoint(tmp_path / "x.pth")


@pytest.fixture
def valid(tmp_path: Path) -> dict[str, bytes]:
    """One valid file of each kind: name -> content."""
    model = FastSCNN(2, **SMALL)
    save_checkpoint(model, tmp_path / "a.safetensors")
    torch.save(model.state_dict(), tmp_path / "a.pth")
    torch.save(model.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    return {f.name: f.read_bytes() for f in tmp_path.iterdir()}


def test_truncated_files(valid: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in valid.items():
        for length in {0, 1, 4, 8, 9, 100, 1000, len(content) // 2, len(content) - 1}:
            path = tmp_path / name
            path.write_bytes(content[:length])
            with pytest.raises(CheckpointError, match="is empty" if length == 0 else "damaged"):
                load_checkpoint(path)


def test_damaged_files_never_raise_anything_else(valid: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in valid.items():
        for _ in range(25):
            damaged = bytearray(content)
            for _ in range(random.randint(1, 4)):
                near = random.choice((100, 3000, len(content)))
                at = random.choice((0, max(0, len(content) - near))) + random.randrange(near)
                damaged[min(at, len(content) - 1)] = random.randrange(256)
            (tmp_path / name).write_bytes(damaged)
            with contextlib.suppress(CheckpointError):
                load_checkpoint(tmp_path / name)


def test_foreign_bytes(tmp_path: Path) -> None:
    contents = (b"hello", b"\x89PNG\r\n\x1a\n", b"{}", b"PK\x03\x04", b"\x80\x02.", bytes(5000))
    for content in contents:
        for name in ("x.pth", "x.safetensors", "x"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
                load_checkpoint(tmp_path / name)


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "nothing.pth")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_checkpoint(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.pth")
        with pytest.raises(CheckpointError, match="not a regular file"):
            load_checkpoint(tmp_path / "pipe.pth")


def test_what_is_no_path_is_named(tmp_path: Path) -> None:
    model = FastSCNN(2, **SMALL)
    for path, got in ((None, "None"), (b"c.pth", "b'c.pth'"), (model, "FastSCNN"), (3, "int")):
        for use in (load_checkpoint, lambda path: save_checkpoint(model, path)):
            with pytest.raises(TypeError, match=f"^path must be a str or os.PathLike, got {got}$"):
                use(path)
    with pytest.raises(TypeError, match=r"^path must be .*, got a dict: from_state_dict takes"):
        load_checkpoint(model.state_dict())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^path must name a file, got ''$"):
        load_checkpoint("")
    with pytest.raises(TypeError, match="^stored_as must be a torch.dtype, .*, got 'float16'$"):
        save_checkpoint(model, tmp_path / "a.safetensors", stored_as="float16")  # type: ignore[arg-type]


def test_unknown_fields_are_named(tmp_path: Path) -> None:
    model = FastSCNN(2, **SMALL)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    save_checkpoint(model, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        rule = rf"{name}: overrides must be fields of Config \(.*\), got"
        with pytest.raises(CheckpointError, match=f"{rule} 'foo'$"):
            load_checkpoint(tmp_path / name, foo=1)
        with pytest.raises(CheckpointError, match=f"{rule} 'in_chanels', did you mean in_channels"):
            load_checkpoint(tmp_path / name, in_chanels=1)
        with pytest.raises(
            CheckpointError, match=r"mean must hold one finite number .*, got 0\.5$"
        ):
            load_checkpoint(tmp_path / name, mean=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_mean_and_std_follow_a_first_convolution_replaced_by_hand(
    channels: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = FastSCNN(4).eval()
    model.learning_to_downsample.stem.conv = nn.Conv2d(channels, 32, 3, 2, 1, bias=False)
    save_checkpoint(model, tmp_path / "own.safetensors")
    assert f"model has {channels} input channels now, 3 by its config: mean" in caplog.text
    loaded = load_checkpoint(tmp_path / "own.safetensors")
    save_checkpoint(FastSCNN(4), tmp_path / "rgb.safetensors")
    as_asked = load_checkpoint(tmp_path / "rgb.safetensors", in_channels=channels).config
    assert loaded.config == as_asked
    wanted = {1: (0.449,), 2: (0.485, 0.456), 4: (0.485, 0.456, 0.406, 0.485)}[channels]
    assert loaded.config.mean == pytest.approx(wanted)
    x = torch.randn(1, channels, 64, 64)
    model.config = replace(model.config, in_channels=channels, mean=wanted, std=wanted)
    assert torch.equal(loaded.reference(x), model.reference(x))
    save_checkpoint(model, tmp_path / "own.safetensors")
    assert load_checkpoint(tmp_path / "own.safetensors").config.std == wanted


def test_huge_sparse_file_is_not_read(tmp_path: Path) -> None:
    for name in ("x.pth", "x.safetensors"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(MAX_BYTES + 1)
        with pytest.raises(CheckpointError, match=r"has 1073741825 bytes, more than"):
            load_checkpoint(tmp_path / name)


class Call:
    """Pickles as a call of ``function(*arguments)``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def old_file(payload: Any) -> bytes:
    """A file of torch before 1.6 around any pickle."""
    stream = io.BytesIO()
    torch.save({}, stream, _use_new_zipfile_serialization=False)
    parts, at = [], 0
    for _ in range(3):  # magic number, version, system
        reader = io.BytesIO(stream.getvalue()[at:])
        pickle.load(reader)
        parts.append(stream.getvalue()[at : at + reader.tell()])
        at += reader.tell()
    return b"".join([*parts, pickle.dumps(payload, 2), pickle.dumps([], 2)])


def new_file(payload: Any, compression: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        content = payload if isinstance(payload, bytes) else pickle.dumps(payload, 2)
        archive.writestr("x/data.pkl", content)
        archive.writestr("x/version", "3\n")
        for name, record in records.items():
            archive.writestr(f"x/data/{name}", record)
    return stream.getvalue()


@pytest.fixture
def thrifty() -> Any:
    """Fails the test where it makes the process grow by more than half a gigabyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    unit = 1 if sys.platform == "darwin" else 1024
    assert grown * unit < 500e6, f"the process grew by {grown * unit} bytes"


@pytest.mark.parametrize("make", [new_file, old_file])
def test_code_is_never_executed(make: Any, tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "x.pth"
    for call in (
        Call(os.system, f"touch {marker}"),
        Call(eval, f"open({str(marker)!r}, 'w')"),
        Call(open, str(marker), "w"),
        Call(os.mkdir, str(marker)),
    ):
        for payload in (call, {"state_dict": {"a": call}}, {"a.weight": torch.zeros(1), "b": call}):
            if make is new_file and "a.weight" in (payload if isinstance(payload, dict) else ()):
                torch.save(payload, path)
            else:
                path.write_bytes(make(payload))
            with pytest.raises(CheckpointError, match="Python objects that are not tensors"):
                load_checkpoint(path)
            assert not marker.exists()
    (tmp_path / "x.safetensors").write_bytes(make(Call(os.mkdir, str(marker))))
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        load_checkpoint(tmp_path / "x.safetensors")
    path.write_bytes(pickle.dumps(Call(os.mkdir, str(marker))))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert not marker.exists()


def test_a_pickled_module_says_what_to_do(tmp_path: Path) -> None:
    torch.save(FastSCNN(2, **SMALL), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"Save a state_dict of tensors instead"):
        load_checkpoint(tmp_path / "x.pth")


def test_an_archive_of_code_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}, 2))
        archive.writestr("x/constants.pkl", pickle.dumps((), 2))
    with pytest.raises(CheckpointError, match="TorchScript"):
        load_checkpoint(tmp_path / "x.pth")


@pytest.mark.usefixtures("thrifty")
@pytest.mark.parametrize("make", [new_file, old_file])
def test_a_small_pickle_cannot_fill_memory(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(make({"a": Call(bytearray, 1 << 33)}))
    with pytest.raises(CheckpointError, match=r"not tensors \(.*bytearray\)"):
        load_checkpoint(path)
    path.write_bytes(make({"a": "x" * (1 << 22)}))
    with pytest.raises(CheckpointError, match="more than 4194304 bytes that are not tensors"):
        load_checkpoint(path)


@pytest.mark.usefixtures("thrifty")
@pytest.mark.parametrize("name", ["UntypedStorage", "TypedStorage"])
def test_a_pickle_cannot_call_a_storage(name: str, tmp_path: Path) -> None:
    call = f"ctorch.storage\n{name}\n".encode() + b"\x8a\x05" + (1 << 33).to_bytes(5, "little")
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + call + b"\x85R.")
        archive.writestr("x/version", b"3\n")
    with pytest.raises(CheckpointError, match=f"not tensors .*{name}"):
        load_checkpoint(path)


@pytest.mark.usefixtures("thrifty")
def test_a_compressed_archive_cannot_fill_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(new_file({}, zipfile.ZIP_DEFLATED, zeros=bytes(1 << 26)))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(CheckpointError, match="compressed or self-overlapping"):
        load_checkpoint(path)


@pytest.mark.usefixtures("thrifty")
def test_tensors_cannot_claim_more_than_the_file_has(tmp_path: Path) -> None:
    one = torch.zeros(1)
    for new in (True, False):
        torch.save(
            {"a.weight": one.expand(1 << 31)},
            tmp_path / "x.pth",
            _use_new_zipfile_serialization=new,
        )
        with pytest.raises(CheckpointError, match="tensors claim 8589934592 bytes"):
            load_checkpoint(tmp_path / "x.pth")

        torch.save({"a.weight": one}, tmp_path / "x.pth", _use_new_zipfile_serialization=new)
        content = (tmp_path / "x.pth").read_bytes()
        numel, large = b"K\x01", b"J" + struct.pack("<i", (1 << 31) - 1)
        assert content.count(numel) >= 1
        pieces = content.split(numel)
        for i in range(
            1, len(pieces)
        ):  # each number 1 of the pickle in turn: counts, sizes, strides
            claim = numel.join(pieces[:i]) + large + numel.join(pieces[i:])
            if new:
                with zipfile.ZipFile(io.BytesIO(content)) as archive:
                    record = archive.read("x/data.pkl")
                parts = record.split(numel)
                if i >= len(parts):
                    break
                lie = numel.join(parts[:i]) + large + numel.join(parts[i:])
                claim = new_file(lie, **{"0": bytes(4)})
            (tmp_path / "y.pth").write_bytes(claim)
            with pytest.raises(CheckpointError):
                load_checkpoint(tmp_path / "y.pth")


@pytest.mark.usefixtures("thrifty")
def test_safetensors_headers_cannot_fill_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"

    def header(tensors: Any) -> bytes:
        text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
        return struct.pack("<Q", len(text)) + text

    big = {"dtype": "F32", "shape": [1 << 31], "data_offsets": [0, 1 << 33]}
    for content in (
        struct.pack("<Q", 1 << 33) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        header({"a.weight": big}),
        header({"a.weight": big | {"data_offsets": [0, 4]}}) + bytes(4),
        header(b"[" * 100_000),
        header({"__metadata__": {"fastscnn_fast.config": "[" * 100_000}}),
        header({"__metadata__": {"fastscnn_fast.config": "[]"}}),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
            load_checkpoint(path)


def test_names_and_colours_travel(tmp_path):
    """From whoever set them, through copies, fusing and files; numbers where no one did, however many."""
    for count in (5, 11, 19):
        model = FastSCNN(count)
        assert model.classes == numbered(count) and not model.named
        assert model.palette == colours_of(model.classes)
        save_checkpoint(model, tmp_path / "plain.safetensors", {"miou": 0.5})
        assert read_details(tmp_path / "plain.safetensors") == {"miou": 0.5}
        loaded = load_checkpoint(tmp_path / "plain.safetensors")
        assert loaded.classes == fuse(loaded).classes == numbered(count)
        torch.save(model.state_dict(), tmp_path / "foreign.pth")
        assert load_checkpoint(tmp_path / "foreign.pth").classes == numbered(count)
    model = FastSCNN(3)
    model.classes = ["cat", "dog", "\u00fc"]
    assert model.palette == colours_of(("cat", "dog", "\u00fc"))
    palette = ((1, 2, 3), (4, 5, 6), (255, 0, 0))
    model.palette = [list(colour) for colour in palette]
    save_checkpoint(model, tmp_path / "named.safetensors", {"miou": 0.5})
    details = read_details(tmp_path / "named.safetensors")
    assert details["miou"] == 0.5 and details["palette"] == [list(colour) for colour in palette]
    loaded = load_checkpoint(tmp_path / "named.safetensors")
    for network in (
        loaded,
        fuse(model),
        fuse(loaded),
        copy.deepcopy(model),
        copy.deepcopy(fuse(model)),
        pickle.loads(pickle.dumps(model)),
    ):
        assert network.classes == ("cat", "dog", "\u00fc") and network.palette == palette
    assert fuse(FastSCNN(3)).classes == numbered(3)


@pytest.mark.parametrize(
    "details",
    [
        {"classes": ["a", "b"]},
        {"classes": "abc"},
        {"classes": [1, 2, 3]},
        {"classes": {"a": 1}},
        {"classes": ["a", "b", "c"], "palette": [[0, 0, 0]]},
        {"palette": [[0, 0, 256]] * 3},
        {"palette": [[0, 0, True]] * 3},
        {"palette": 3},
    ],
    ids=str,
)
def test_names_that_do_not_fit_are_left_alone(details, tmp_path, caplog):
    path = tmp_path / "net.safetensors"
    save_checkpoint(FastSCNN(3), path, details)
    registry.log_once.cache_clear()
    model = load_checkpoint(path)
    assert f"{path}: " in caplog.text and "must be 3" in caplog.text
    assert model.classes == (("a", "b", "c") if len(details) == 2 else numbered(3))
    assert model.palette == colours_of(model.classes)
    with pytest.raises(ValueError, match="must be 3"):
        for name, value in details.items():
            setattr(FastSCNN(3), name, value)


@pytest.mark.parametrize("text", ["no JSON", "[" * 100_000, '{"a": 1'])
def test_damaged_details_are_named(text, tmp_path):
    path = tmp_path / "net.safetensors"
    model = FastSCNN(3)
    metadata = {"fastscnn_fast.config": json.dumps(model.config.to_dict())}
    save_file(dict(model.state_dict()), path, {**metadata, "fastscnn_fast.details": text})
    for read_it in (read_details, load_checkpoint):
        with pytest.raises(CheckpointError, match=r"net\.safetensors: is damaged: "):
            read_it(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"net\.safetensors: is damaged: "):
        read_details(path)


def ranged(**overrides: Any) -> FastSCNN:
    """A small network with a range for each of its values, in eval mode."""
    model = FastSCNN(3, **SMALL, **overrides).eval()
    names = value_names(fast_scnn(model.config))
    model.ranges = {name: (-0.1 * k, 1 + 1 / 3 * k) for k, name in enumerate(names)}
    return model


def test_ranges_travel(tmp_path: Path) -> None:
    """To the last bit, beside weights of half the bytes too; a network without stays without."""
    model = ranged()
    for stored in (None, torch.float16):
        save_checkpoint(model, tmp_path / "net.safetensors", {"miou": 0.5}, stored)
        loaded = load_checkpoint(tmp_path / "net.safetensors")
        assert loaded.ranges == model.ranges
        assert list(loaded.state_dict()) == list(model.state_dict())
        assert read_details(tmp_path / "net.safetensors") == {"miou": 0.5}
    model.ranges = None
    save_checkpoint(model, tmp_path / "net.safetensors")
    assert load_checkpoint(tmp_path / "net.safetensors").ranges is None
    model.ranges = {}
    save_checkpoint(model, tmp_path / "net.safetensors")
    assert load_checkpoint(tmp_path / "net.safetensors").ranges is None
    for none in ("null", "{}"):
        metadata = {"fastscnn_fast.config": json.dumps(model.config.to_dict())}
        metadata["fastscnn_fast.ranges"] = none
        save_file(dict(model.state_dict()), tmp_path / "none.safetensors", metadata)
        assert load_checkpoint(tmp_path / "none.safetensors").ranges is None
    model.ranges = {"stem.conv": (0.0, 1.0)}
    before = (tmp_path / "net.safetensors").read_bytes()
    with pytest.raises(ValueError, match="ranges must hold every value of the network"):
        save_checkpoint(model, tmp_path / "net.safetensors")
    assert (tmp_path / "net.safetensors").read_bytes() == before


def test_ranges_stay_with_their_network(tmp_path: Path) -> None:
    """An override that makes another network of the weights leaves them behind."""
    path = tmp_path / "net.safetensors"
    model = ranged()
    save_checkpoint(model, path)
    config = model.config
    for same in ({}, {"size": (64, 96)}, {"dropout": 0.3}, {"mean": config.mean}):
        assert load_checkpoint(path, **same).ranges == model.ranges, same
    for other in (
        {"mean": (0.5, 0.5, 0.5)},
        {"std": (0.5, 0.5, 0.5)},
        {"align_corners": True},
        {"bottleneck_activation": "relu6"},
    ):
        assert load_checkpoint(path, **other).ranges is None, other


@pytest.mark.usefixtures("thrifty")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no JSON", "damaged or no checkpoint"),
        ("[" * 100_000, "damaged or no checkpoint"),
        ("[]", "in its ranges: "),
        ("[1]", r"in its ranges: ranges must be a mapping of names to \(low, high\), got \[1\]"),
        ('{"a": [0, 1]}', "in its ranges: ranges must hold every value"),
        ("+", "in its ranges: ranges must be of the network's values, it has no 'more'"),
        ("NaN", r"in its ranges: range of fusion.sum must be two finite numbers .* \[0, nan\]"),
        ("-Infinity", "range of fusion.sum must be two finite numbers in order"),
        ("1" * 4000, "range of fusion.sum must be two finite numbers in order"),
        ("-1", "range of fusion.sum must be two finite numbers in order"),
        ("true", "range of fusion.sum must be two finite numbers in order"),
        ('"1"', "range of fusion.sum must be two finite numbers in order"),
        ("[[]]", "range of fusion.sum must be two finite numbers in order"),
        ("null", "range of fusion.sum must be two finite numbers in order"),
    ],
    ids=lambda value: value[:12],
)
def test_ranges_of_a_hostile_file(text: str, message: str, tmp_path: Path) -> None:
    model = ranged()
    assert model.ranges is not None
    whole = json.dumps({name: list(ends) for name, ends in model.ranges.items()})
    if text == "+":
        text = whole.replace("{", '{"more": [0, 1], ')
    elif len(text) < 5000 and not text.startswith(("no", "{", "[1")):
        end = f'"fusion.sum": [0, {text}]'
        text = whole.replace(json.dumps({"fusion.sum": model.ranges["fusion.sum"]})[1:-1], end)
        assert end in text
    metadata = {"fastscnn_fast.config": json.dumps(model.config.to_dict())}
    path = tmp_path / "net.safetensors"
    save_file(dict(model.state_dict()), path, {**metadata, "fastscnn_fast.ranges": text})
    with pytest.raises(CheckpointError, match=rf"net\.safetensors: .*{message}"):
        load_checkpoint(path)
