"""The ONNX file against plain torch at sizes it was not traced at, and torch.export of the fused network."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers import assert_labels, assert_parity, drawn_once, lifelike, noise, randomise
from layouts import free_widths
from torch import Tensor
from torch.nn import functional as F

from fastscnn_fast import (
    FastSCNN,
    calibrate,
    checkpoints,
    cli,
    export,
    extras,
    fuse,
    load_checkpoint,
)
from fastscnn_fast.arch.config import PRESETS, Config, preset as config_preset
from fastscnn_fast.data.scenes import street

# None of these is the traced one; 32x32 and 33x49 have 1x1 and 2x2 features where the pooling happens.
SIZES = [(1, 32, 32), (3, 33, 49), (1, 97, 131), (2, 160, 224), (1, 375, 242)]


@pytest.fixture(autouse=True)
def one_thread():
    """Threads of busy machines wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("bins", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("size", [1, 2, 5, 6, 7, 12, 13, 64])
def test_averaging_matrices_pool_as_torch_does(size, bins):
    x = torch.randn(3, 5, size, 9, dtype=torch.float64)
    rows, columns = (export.averaging_matrix(n, bins, x) for n in (size, 9))
    assert torch.allclose(
        rows @ x @ columns.T, F.adaptive_avg_pool2d(x, bins), rtol=1e-12, atol=1e-12
    )


def onnx_session(path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(session, x: Tensor) -> Tensor:
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def exported(tmp_path, model):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    path = tmp_path / "net.onnx"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export.export_onnx(model.train(), path, size=(64, 96))
    assert model.training and all(
        torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()
    )
    model.eval()
    return onnx_session(path)


def check_logits(session, model):
    exact = FastSCNN.from_config(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    for n, height, width in SIZES:
        x = torch.randn(n, model.config.in_channels, height, width)
        with torch.no_grad():
            own, ref64 = model.reference(x), exact.reference(x.double())
        assert_parity(run(session, x), own, ref64, floor=1e-5)


@pytest.mark.slow
def test_one_block_a_stage_at_sizes_it_was_not_traced_at(tmp_path):
    model = randomise(FastSCNN(19, bottleneck_repeats=(1, 1, 1))).eval()
    session = exported(tmp_path, model)
    shape = session.get_inputs()[0].shape
    assert [type(axis) for axis in shape] == [str, int, str, str]
    config = json.loads(session.get_modelmeta().custom_metadata_map["fastscnn_fast"])
    assert Config(**config) == model.config
    check_logits(session, model)


@pytest.mark.slow
def test_free_widths(tmp_path):
    model = randomise(FastSCNN(19, **free_widths(least=9))).eval()
    check_logits(exported(tmp_path, model), model)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_as_published(preset, tmp_path):
    model = randomise(FastSCNN(19, preset)).eval()
    check_logits(exported(tmp_path, model), model)


def test_what_cannot_be_exported(monkeypatch, tmp_path):
    onnx = pytest.importorskip("onnx")
    model = FastSCNN(257).eval()
    with pytest.raises(ValueError, match="at most 256 classes, the model has 257"):
        export.export_onnx(model, tmp_path / "x.onnx", "labels")
    with pytest.raises(ValueError, match="output must be logits or labels, got 'mask'"):
        export.export_onnx(model, tmp_path / "x.onnx", "mask")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size must be at least 32x32, got 31x64"):
        export.export_onnx(model, tmp_path / "x.onnx", size=(31, 64))
    newest = onnx.defs.onnx_opset_version()
    for opset in (10, newest + 1):
        with pytest.raises(ValueError, match=f"opset must be 11 to {newest}.*, got {opset}"):
            export.export_onnx(model, tmp_path / "x.onnx", opset=opset)
    for dtype in (torch.float16, torch.int8):
        rule = f"pixels must be torch.uint8 or torch.float32, got {dtype}"
        with pytest.raises(ValueError, match=rule):
            export.export_onnx(model, tmp_path / "x.onnx", pixels=dtype)
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        export.export_onnx(model, tmp_path)
    with pytest.raises(IsADirectoryError, match="path must name the file to write, got a folder"):
        export.export_onnx(model, str(tmp_path))
    for path, kind, got in ((None, TypeError, "None"), ("", ValueError, "''")):
        with pytest.raises(kind, match=f"^path must .*, got {got}$"):
            export.export_onnx(model, path)
    for other, rule in (
        (fuse(model, "reference"), "FastSCNN, not its fused copy, got FusedFastSCNN"),
        (torch.nn.Conv2d(3, 3, 1), "FastSCNN, got Conv2d"),
    ):
        with pytest.raises(TypeError, match=f"^model must be a fastscnn_fast.{rule}$"):
            export.export_onnx(other, tmp_path / "x.onnx")
    with pytest.raises(ValueError, match=r"^size must be .*, got \(96, 160, 3\)$"):
        export.export_onnx(model, tmp_path / "x.onnx", size=(96, 160, 3))
    with pytest.raises(ValueError, match=r"dtype must be torch.float32 or torch.int8, got torch.b"):
        export.export_onnx(model, tmp_path / "x.onnx", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="int8 needs the ranges of the network's values"):
        export.export_onnx(model, tmp_path / "x.onnx", dtype=torch.int8)
    with pytest.raises(ValueError, match=r"opset must be at least 18 in torch.int8, got 17"):
        export.export_onnx(load_checkpoint(), tmp_path / "x.onnx", opset=17, dtype=torch.int8)
    monkeypatch.setattr(torch, "__version__", "2.4.1+cpu")
    with pytest.raises(RuntimeError, match=r"needs torch 2\.6 or newer, got 2\.4\.1"):
        export.export_onnx(model, tmp_path / "x.onnx")
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"fastscnn_fast\[export\]"):
        export.export_onnx(model, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def normalised(model: FastSCNN, pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.config.mean, model.config.std))
    return (pixels.float() / 255 - mean) / std


@pytest.mark.slow
@pytest.mark.parametrize(
    ("opset", "pixels", "fixed"),
    [
        (11, None, False),
        (11, torch.uint8, True),
        (13, torch.float32, False),
        (17, None, True),
        (17, torch.uint8, False),
        (18, None, True),
        (18, torch.uint8, False),
        (18, torch.float32, True),
        (21, torch.float32, False),
    ],
    ids=str,
)
def test_opsets_fixed_sizes_and_pixels(opset, pixels, fixed, tmp_path):
    onnx = pytest.importorskip("onnx")
    model = randomise(FastSCNN(5, bottleneck_repeats=(1, 1, 1))).eval()
    path = tmp_path / "new" / "net.onnx"
    export.export_onnx(model, path, "logits", (65, 96), opset, fixed, pixels)
    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    assert {one.domain: one.version for one in file.opset_import}[""] == opset
    session = onnx_session(path)
    given, made = session.get_inputs()[0], session.get_outputs()[0]
    assert given.type == ("tensor(uint8)" if pixels == torch.uint8 else "tensor(float)")
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["input"] == ("pixels" if pixels else "normalised")
    nodes = {node.op_type for node in file.graph.node}
    assert "Dropout" not in nodes
    if fixed:
        assert (given.shape, made.shape) == ([1, 3, 65, 96], [1, 5, 65, 96])
        allowed = {"Conv", "Relu", "Add", "MatMul", "Resize", "Concat"}
        assert nodes <= allowed | ({"Cast", "Sub", "Div"} if pixels else set())
    else:
        assert (given.shape, made.shape) == (["n", 3, "h", "w"], ["n", 5, "h", "w"])
    exact = FastSCNN.from_config(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    for size in [(1, 65, 96)] if fixed else SIZES:
        raw = torch.randint(256, (size[0], 3, *size[1:]), dtype=torch.uint8)
        x = normalised(model, raw)
        with torch.no_grad():
            own, ref64 = model.reference(x), exact.reference(normalised(model, raw).double())
        assert_parity(run(session, raw.to(pixels) if pixels else x), own, ref64, floor=1e-5)


def test_an_opset_that_torch_does_not_write_is_an_error(monkeypatch, tmp_path):
    """It would leave another, with a logged line."""
    onnx = pytest.importorskip("onnx")
    model = FastSCNN(3).eval()
    written = onnx.helper.make_model(
        onnx.helper.make_graph([], "none", [], []), opset_imports=[onnx.helper.make_opsetid("", 18)]
    )
    monkeypatch.setattr(export, "_export", lambda *_: written)
    with pytest.raises(RuntimeError, match="cannot write opset 20, got 18"):
        export.export_onnx(model, tmp_path / "new" / "x.onnx", opset=20)
    assert not list(tmp_path.iterdir())
    export.export_onnx(model, tmp_path / "new" / "x.onnx", opset=18)
    assert onnx.load(tmp_path / "new" / "x.onnx").metadata_props


@pytest.mark.slow
def test_the_command_line_exports_labels_of_a_grey_network(tmp_path, capsys):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    weights, path = tmp_path / "net.safetensors", tmp_path / "new" / "folder" / "net.onnx"
    model = randomise(
        FastSCNN(7, in_channels=1, bottleneck_repeats=(1, 1, 1), pyramid_bins=(6,))
    ).eval()
    model.classes, model.palette = list("abcdefg"), [(k, 0, 255) for k in range(7)]
    checkpoints.save_checkpoint(model, weights)
    arguments = ["--weights", str(weights), "--size", "64", "--output", "labels"]
    assert cli.main(["export", "--onnx", str(path), *arguments]) == 0
    assert "mean (0.5,), std (0.25,)" in capsys.readouterr().out
    x = torch.randn(2, 1, 65, 70)
    session = onnx_session(path)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list("abcdefg")
    assert json.loads(metadata["palette"]) == [[k, 0, 255] for k in range(7)]
    labels = run(session, x)
    with torch.no_grad():
        expected = model.reference(x).argmax(1)
    assert labels.dtype == torch.uint8 and labels.shape == (2, 65, 70)
    assert (labels == expected).double().mean() > 0.999


@pytest.mark.slow
def test_labels_of_one_class(tmp_path):
    """1 where the logit is above 0, else 0."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    model = lifelike(config_preset("paper", num_classes=1, bottleneck_repeats=(1, 1, 1)))
    model.classes = ["road"]
    export.export_onnx(model, tmp_path / "net.onnx", "labels", size=(64, 96))
    session = onnx_session(tmp_path / "net.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == ["road"]
    seen = set()  # the smallest picture may be of one label
    for n, height, width in SIZES[:3]:
        x = noise(n, 3, height, width)
        labels = run(session, x)
        with torch.no_grad():
            logits = model.double().reference(x.double())
        assert labels.dtype == torch.uint8
        assert_labels(labels, logits, 1e-4)
        seen |= set(labels.unique().tolist())
    assert seen == {0, 1}
    x[0, 0, 20, 20] = float("nan")  # reaches every pixel
    assert (run(session, x)[0] == 0).all()


@pytest.mark.slow
def test_int8_as_qdq_labels_streets_as_our_int8_does(tmp_path, capsys):
    """The weights that come along, by the command line; products of one scale an input become ones of integers."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnx

    path = tmp_path / "int8.onnx"
    words = ["--dtype", "int8", "--output", "labels", "--size", "64x96"]
    assert cli.main(["export", "--onnx", str(path), *words]) == 0
    assert path.stat().st_size < 1.8e6
    nodes = onnx.load(path).graph.node
    made = {output: node.op_type for node in nodes for output in node.output}
    products = [node for node in nodes if node.op_type == "Conv"]
    quantised = [n for n in products if all(made.get(x) == "DequantizeLinear" for x in n.input[:2])]
    # All but the stem, which reads floats, and what reads a concatenation: pyramid and fusion, each part of which has
    # its own scale, and what follows a resize of a value.
    assert len(products) == 45 and len(quantised) >= 36
    session, model = onnx_session(path), load_checkpoint()
    fast = fuse(model, dtype=torch.int8)
    for seed in (3, 2_000_000):
        pixels = torch.from_numpy(street(seed, 360, 480)[0]).permute(2, 0, 1)[None]
        labels = run(session, model._normalised(pixels))
        assert (labels == fast.labels(pixels)).double().mean() > 0.995


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["mmseg", "segmentron"])
def test_int8_as_qdq_of_other_networks(preset, tmp_path):
    """3x3 pyramids, dense fusions: far nearer to the integers than the plain network is, at sizes it was not traced at.

    A network that has seen the pictures which its ranges are of, drawn once: 8 bits cost others so little that as much is
    lost by resizing floats. Of 48 draws 0.47 was the most.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    pictures = [street(seed, 128, 192)[0] for seed in range(3)]
    config = config_preset(preset, num_classes=5, bottleneck_repeats=(1, 2, 1))
    with drawn_once():
        model = lifelike(config, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))
    calibrate(model, pictures)
    export.export_onnx(model, tmp_path / "net.onnx", size=(64, 96), dtype=torch.int8)
    session, fast = onnx_session(tmp_path / "net.onnx"), fuse(model, "reference", torch.int8)
    for n, height, width in ((1, 160, 224), (2, 129, 191)):
        pixels = (
            torch.from_numpy(street(7, height, width)[0]).permute(2, 0, 1).expand(n, -1, -1, -1)
        )
        exact = fast(pixels)
        with torch.no_grad():
            plain = model.reference(pixels)
        y = run(session, model._normalised(pixels))
        assert y.shape == exact.shape
        assert (y - exact).norm() < (plain - exact).norm() / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_torch_export_of_the_fused_network_with_free_sizes(dtype):
    from torch.export import Dim

    fast = fuse(randomise(FastSCNN(7)).eval())

    def batch(n: int, height: int, width: int) -> Tensor:
        return torch.randint(256, (n, 3, height, width), dtype=torch.uint8).to(dtype)

    axes = {
        0: Dim("n", min=1, max=64),
        2: Dim("h", min=32, max=4096),
        3: Dim("w", min=32, max=4096),
    }
    program = torch.export.export(fast, (batch(2, 64, 96),), dynamic_shapes={"x": axes})
    for size in SIZES:
        x = batch(*size)
        assert torch.equal(program.module()(x), fast(x))
