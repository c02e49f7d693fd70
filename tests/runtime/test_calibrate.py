"""Ranges: what pictures they are measured on, how they are chosen, and how long they stay with a model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_network
from PIL import Image
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from fastscnn_fast import FastSCNN, accelerate, calibrate, fuse, load_checkpoint, segment
from fastscnn_fast.arch.network import normalise
from fastscnn_fast.arch.structure import Unfusable
from fastscnn_fast.backends import registry
from fastscnn_fast.checkpoints import save_checkpoint
from fastscnn_fast.compat import tramac
from fastscnn_fast.data.scenes import street
from fastscnn_fast.lower.fold import fold
from fastscnn_fast.lower.quantise import Value, value_names
from fastscnn_fast.program import reference
from fastscnn_fast.runtime.calibrate import METHODS, Histogram

PIXELS = [street(seed, 40 + 8 * seed, 64)[0] for seed in range(3)]


@pytest.fixture
def model() -> FastSCNN:
    return small_network()


def batch(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def close(ends: Any) -> Any:
    """Both ends to float32's rounding of the larger one: the other may happen to be next to nothing."""
    return pytest.approx(ends, rel=0, abs=1e-5 * max(map(abs, ends)))


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(a[name] == close(b[name]) for name in a)


# --- what is measured ------------------------------------------------------------------------------------


def test_min_max_is_the_least_and_the_largest_of_each_value(model: FastSCNN) -> None:
    """By hooks on the plain modules, apart from folding and taps."""
    seen: dict[str, tuple[float, float]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, y: Tensor) -> None:
            low, high = seen.get(name, (torch.inf, -torch.inf))
            seen[name] = min(low, y.min().item()), max(high, y.max().item())

        return hook

    features, head = model.global_features, model.classifier
    down = model.learning_to_downsample
    modules = {
        "stem.conv": down.stem,
        "downsample.dsconv2.pointwise": down.dsconv2.pointwise,
        "bottleneck1.0.expand": features.bottleneck1[0].expand,
        "bottleneck2.0.depthwise": features.bottleneck2[0].depthwise,
        "bottleneck2.0.project": features.bottleneck2[0].project,
        "bottleneck2.1.project": features.bottleneck2[1],  # the residual is in it
        "pyramid.branch3": features.pyramid.branches[3],
        "pyramid.out": features.pyramid,
        "fusion.refine": model.feature_fusion.refine,
        "fusion.sum": model.feature_fusion,
        "classifier.dsconv2.pointwise": head.dsconv2,
    }
    handles = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    with torch.no_grad():
        for pixels in PIXELS:
            model.reference(batch(pixels))
    for handle in handles:
        handle.remove()
    found = calibrate(model, PIXELS, "min-max")
    assert found == model.ranges and list(found) == value_names(fold(model).program)
    for name, ends in seen.items():
        assert found[name] == close(ends), name


def test_pictures_of_every_kind(model: FastSCNN, tmp_path: Path) -> None:
    expected = calibrate(model, PIXELS, "min-max")
    (tmp_path / "in" / "sub").mkdir(parents=True)
    paths = [tmp_path / "in" / name for name in ("a.png", "b.png", "sub/c.png")]
    for path, pixels in zip(paths, PIXELS):
        Image.fromarray(pixels).save(path)
    Image.fromarray(PIXELS[0] // 2).save(
        tmp_path / "in" / "a_labels.png"
    )  # results are no pictures

    def loader() -> Iterator[Any]:
        for pixels in PIXELS:
            yield batch(pixels), torch.zeros(1, 8, 8)

    normalised = [model._normalised(batch(pixels)) for pixels in PIXELS]
    kinds: dict[str, Any] = {
        "paths": paths,
        "names": list(map(str, paths)),
        "a folder": tmp_path / "in",
        "folders and paths": [tmp_path / "in" / "sub", *paths[:2]],
        "images": [Image.fromarray(pixels) for pixels in PIXELS],
        "a generator": (pixels for pixels in PIXELS),
        "tensors": [batch(pixels)[0] for pixels in PIXELS],
        "batches": [batch(pixels) for pixels in PIXELS],
        "floats": normalised,
        "doubles": [x.double() for x in normalised],
        "batches with labels": loader(),
    }
    for kind, pictures in kinds.items():
        assert same(calibrate(model, pictures, "min-max"), expected), kind
    one = calibrate(model, PIXELS[0], "min-max")
    for picture in (paths[0], Image.open(paths[0]), batch(PIXELS[0])):
        assert same(calibrate(model, picture, "min-max"), one)
    three = np.stack([PIXELS[0], PIXELS[0][::-1], PIXELS[0][:, ::-1]])
    each = calibrate(model, list(three), "min-max")
    assert not same(each, one)
    for whole in (three, torch.from_numpy(three).permute(0, 3, 1, 2)):
        assert same(calibrate(model, whole, "min-max"), each)


def test_pictures_run_at_the_size_that_segment_runs_them_at(model: FastSCNN) -> None:
    small = FastSCNN(5, bottleneck_repeats=(1, 2, 1), size=(64, 64)).eval()
    small.load_state_dict(model.state_dict())
    sizes = []
    picture = street(1, 100, 400)[0]
    handle = small.learning_to_downsample.register_forward_pre_hook(
        lambda _, x: sizes.append(tuple(x[0].shape[2:]))
    )
    segment(small, picture)
    handle.remove()
    assert sizes == [(32, 128)]
    resized = np.array(Image.fromarray(picture).resize((128, 32), Image.Resampling.BILINEAR))
    expected = calibrate(model, batch(resized), "min-max")
    assert same(calibrate(small, picture, "min-max"), expected)
    assert same(calibrate(model, picture, "min-max", size=(32, 128)), expected)


def test_every_place_of_eight_bits_is_seen_also_after_pooling_and_resizing(model: FastSCNN) -> None:
    folded, seen = fold(model), []

    def tap(name: str, value: Tensor) -> Tensor:
        seen.append(name)
        return value

    tensors = [{k: t.float() for k, t in named.items()} for named in folded.tensors]
    x = model._normalised(batch(PIXELS[0]))
    reference.network(x, folded.program, tensors, tap=tap)
    assert set(seen) == set(value_names(folded.program))
    for name, times in (
        ("bottleneck3.0.project", 1 + 4),
        ("pyramid.branch0", 2),
        ("pyramid.out", 1 + 1),
        ("fusion.refine", 1),
    ):
        assert seen.count(name) == times, name


# --- histograms ------------------------------------------------------------------------------------------


def test_a_histogram_that_widens_counts_as_one_that_was_wide() -> None:
    # In the middles of the finest bins, whose edges do not round.
    sizes = (1, 30, 900, 3, 4000)
    parts = [(torch.randint(-size, size, (1000, 7)) + 0.5) / 256 for size in sizes]
    grown, wide = Histogram(), Histogram()
    for part in parts:
        grown.add(part)
    for part in reversed(parts):
        wide.add(part)
    assert grown.extremes() == wide.extremes()
    assert grown._reach == wide._reach and grown._counts.sum() == 5 * 7000
    assert torch.equal(grown._counts, wide._counts)


def test_percentile_leaves_out_outliers_at_both_ends_and_counts_no_zeros() -> None:
    values = torch.linspace(-1, 3, 400_001)
    histogram = Histogram()
    histogram.add(torch.cat([values, torch.tensor([-50.0, 80.0]), torch.zeros(10_000_000)]))
    assert histogram.extremes() == (-50, 80)
    low, high = histogram.percentile()
    # 5e-5 of the values at each end, 20 of 400000; a bin is 1/32 wide.
    assert low == pytest.approx(-1, abs=1 / 32) and high == pytest.approx(3, abs=1 / 32)


@pytest.mark.parametrize("kind", ["relu", "signed"])
def test_least_squares_is_the_best_of_what_may_be_tried(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 200_000, generator=generator).prod(0)
    values = values.relu() if kind == "relu" else values - 0.2 * values.relu()
    histogram = Histogram()
    histogram.add(values)

    def error(low: float, high: float) -> float:
        value = Value.of(low, high, "none")
        levels = ((values / value.scale).round() + value.zero).clamp(0, 255)
        return float(((levels - value.zero) * value.scale - values).square().mean())

    low, high = histogram.least_squares()
    least, most = histogram.extremes()
    assert error(low, high) < 0.95 * error(least, most)
    others = [
        error(least * a, most * b)
        for a in ([1, 0.7, 0.4, 0.2] if least < 0 else [0])
        for b in (1, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
    ]
    assert error(low, high) <= 1.02 * min(others)


def test_values_that_are_always_zero_get_some_range(model: FastSCNN) -> None:
    with torch.no_grad():
        model.learning_to_downsample.stem.bn.weight.zero_()
        model.learning_to_downsample.stem.bn.bias.zero_()
    for method in METHODS:
        assert calibrate(model, PIXELS[0], method)["stem.conv"] == (0.0, 1.0)
        fuse(model, "reference", torch.int8)


# --- what cannot be --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pictures", "kind", "message"),
    [
        ([], ValueError, "pictures must be at least one, got none"),
        (iter(()), ValueError, "pictures must be at least one, got none"),
        (torch.zeros(0, 3, 64, 64), ValueError, "pictures must be at least one, got none"),
        ([torch.zeros(0, 3, 64, 64)], ValueError, "pictures must be at least one, got none"),
        (None, TypeError, "pictures must be paths, .*, got NoneType"),
        (3, TypeError, "got int"),
        ([PIXELS[0], 3], TypeError, "got int"),
        ([(PIXELS[0], PIXELS[1])], TypeError, "got tuple"),
        ({"a": PIXELS[0]}, ValueError, "a: does not exist"),
        ("nowhere.png", ValueError, r"nowhere\.png: does not exist"),
        (PIXELS[0].astype(np.float32), ValueError, "must be a uint8 or uint16 array, got float32"),
        (torch.zeros(1, 4, 64, 64), ValueError, r"\(N, 3, H, W\) .* got shape \(4, 64, 64\)"),
        (torch.zeros(3, 31, 64), ValueError, r"from 32x32 up, got shape \(3, 31, 64\)"),
        (torch.zeros(64, 64), ValueError, r"got shape \(64, 64\)"),
        (torch.zeros(3, 64, 64, dtype=torch.int64), TypeError, "got torch.int64"),
        (torch.full((3, 64, 64), torch.nan), ValueError, "values of stem.conv must be from"),
        (torch.full((3, 64, 64), torch.inf), ValueError, "must be normalised by"),
    ],
    ids=str,
)
def test_no_pictures(model: FastSCNN, pictures: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        calibrate(model, pictures)
    assert model.ranges is None


def test_tensors_without_memory_and_empty_paths(model: FastSCNN) -> None:
    for shape in ((3, 64, 64), (2, 3, 64, 64)):
        emptied = torch.zeros(shape)
        emptied.untyped_storage().resize_(0)
        needed = emptied.numel() * 4
        message = f"^picture must have memory of {needed} bytes, its storage holds 0$"
        for pictures in (emptied, [emptied], [(emptied, None)] if len(shape) == 4 else emptied):
            with pytest.raises(RuntimeError, match=message):
                calibrate(model, pictures)
    for nothing in (torch.zeros(3, 64, 64, device="meta"), torch.zeros(3, 64, 64).to_sparse()):
        with pytest.raises(ValueError, match="^picture must be a tensor with pixels, got torch"):
            calibrate(model, nothing)
    for pictures in ("", [""]):
        with pytest.raises(ValueError, match="^picture must be a path, .*, got the path ''$"):
            calibrate(model, pictures)
    assert model.ranges is None


def test_folders_without_pictures_or_with_labels(model: FastSCNN, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot all be read: .*: no pictures in this folder"):
        calibrate(model, tmp_path)
    for kind in ("images", "labels"):
        (tmp_path / "train" / kind).mkdir(parents=True)
        Image.fromarray(PIXELS[0]).save(tmp_path / "train" / kind / "a.png")
    with pytest.raises(ValueError, match=r"pictures alone, .* has labels too \(.*train/labels\)"):
        calibrate(model, [tmp_path])
    calibrate(model, tmp_path / "train" / "images")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png: cannot be read"):
        calibrate(model, [PIXELS[0], tmp_path / "broken.png"])


def test_what_cannot_be_calibrated(model: FastSCNN) -> None:
    with pytest.raises(
        TypeError, match=r"model must be a fastscnn_fast.FastSCNN, got FusedFastSCNN"
    ):
        calibrate(fuse(model, "reference"), PIXELS)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="method must be one of least-squares, min-max, percentile"
    ):
        calibrate(model, PIXELS, "entropy")
    with pytest.raises(ValueError, match="size must be at least 32x32, got 31x64"):
        calibrate(model, PIXELS, size=(31, 64))
    with pytest.raises(ValueError, match=r"eval mode \(model.eval\(\)\)"):
        calibrate(model.train(), PIXELS)
    linear = small_network(bottleneck_activation="none")
    with pytest.raises(Unfusable, match="int8 needs an activation before the depthwise"):
        calibrate(linear, PIXELS)
    assert linear.ranges is None
    with pytest.raises(Unfusable, match=r"int8 needs the ranges .*calibrate\(model, pictures\)"):
        fuse(linear, "reference", torch.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("fusion.sum"), "fusion.sum is missing: measure them anew"),
        (lambda r: r.update({"x.y": (0.0, 1.0)}), "it has no 'x.y'"),
        (
            lambda r: r.update({"fusion.sum": (1.0, 0.0)}),
            r"range of fusion.sum .* got \(1.0, 0.0\)",
        ),
        (lambda r: r.update({"fusion.sum": (0.0, torch.nan)}), "two finite numbers in order"),
        (lambda r: r.update({"fusion.sum": (0, 10**400)}), "two finite numbers in order"),
        (lambda r: r.update({"fusion.sum": (0.0, True)}), "two finite numbers in order"),
        (lambda r: r.update({"fusion.sum": "01"}), "two finite numbers in order, got '01'"),
        (lambda r: r.update({"fusion.sum": (0.0,)}), "two finite numbers in order"),
        (lambda r: r.update({"fusion.sum": None}), "two finite numbers in order, got None"),
        (lambda r: r.update({"fusion.sum": (0.0, 1e-30)}), "a range that is far too small"),
    ],
)
def test_ranges_that_are_none(model: FastSCNN, change: Callable[[Any], Any], message: str) -> None:
    model.ranges = dict(calibrate(model, PIXELS[0]))
    change(model.ranges)
    with pytest.raises(Unfusable, match=message):
        fuse(model, "reference", torch.int8)


# --- how long they stay ----------------------------------------------------------------------------------


def test_copies_and_pickles_keep_them_and_the_state_dict_has_the_same_keys(model: FastSCNN) -> None:
    keys = list(model.state_dict())
    ranges = calibrate(model, PIXELS)
    assert list(model.state_dict()) == keys
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.half().float()):
        assert twin.ranges == ranges
    with torch.no_grad():  # inference, and training mode by itself, leave them
        model.train().eval()(batch(PIXELS[0]))
    assert model.ranges == ranges


@pytest.mark.parametrize("graded", [True, False])
def test_training_drops_them(model: FastSCNN, graded: bool) -> None:
    calibrate(model, PIXELS)
    with torch.set_grad_enabled(graded):
        model.train()(batch(PIXELS[0]))
    assert model.ranges is None


def test_other_weights_drop_them(model: FastSCNN) -> None:
    calibrate(model, PIXELS)
    torch.nn.Sequential(model).load_state_dict(torch.nn.Sequential(small_network()).state_dict())
    assert model.ranges is None
    with pytest.raises(Unfusable, match="int8 needs the ranges"):
        fuse(model, "reference", torch.int8)


# --- int8 everywhere -------------------------------------------------------------------------------------


def test_a_fused_network_of_int8_takes_and_gives_floats(model: FastSCNN) -> None:
    calibrate(model, PIXELS)
    fast = fuse(model, "reference", torch.int8)
    x = batch(PIXELS[0])
    logits = fast(x)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, fast(model._normalised(x)))
    assert torch.equal(fast.labels(x), logits.argmax(1).to(torch.uint8))
    assert np.array_equal(segment(fast, PIXELS[0]), fast.labels(x)[0].numpy())
    for change in (lambda: fast.half(), lambda: fast.double(), lambda: fast.to(torch.bfloat16)):
        with pytest.raises(TypeError, match="a fused network of torch.int8 cannot become one of"):
            change()
    assert fast.float() is fast and fast.to("cpu") is fast
    with pytest.raises(TypeError, match=r"x must be of dtype .*, got torch.int8"):
        fast(x.to(torch.int8))
    for bad in (torch.int8,):
        with pytest.raises(Unfusable, match="int8 needs the ranges"):
            fuse(small_network(), "reference", bad)


def test_accelerate_in_int8(model: FastSCNN) -> None:
    calibrate(model, PIXELS)
    x = batch(PIXELS[0])
    expected = fuse(model, "reference", torch.int8)(x)
    assert torch.equal(accelerate(model, "reference", torch.int8)(x), expected)
    theirs = tramac.FastSCNN(5, aux=True).eval()
    with pytest.raises(Unfusable, match="int8 needs the ranges"):
        accelerate(theirs, "reference", torch.int8)
    calibrate(theirs, PIXELS[0])
    fast = accelerate(theirs, "reference", torch.int8)
    logits, auxiliary = fast(x)
    assert torch.equal(logits, fuse(theirs, "reference", torch.int8)(x))
    with torch.no_grad():
        assert torch.allclose(auxiliary, theirs.auxiliary_logits(x)[0], atol=1e-5)


CHANGES: dict[str, Callable[[FastSCNN], object]] = {
    "data": lambda m: m.classifier.conv.weight.data.mul_(1.01),
    "a statistic": lambda m: m.classifier.dsconv1.pointwise.bn.running_mean.add_(0.1),
    "a part loaded": lambda m: m.classifier.load_state_dict(
        {k: v * 1.01 for k, v in m.classifier.state_dict().items()}
    ),
    "a part in training": lambda m: m.global_features.train()(torch.randn(2, 64, 8, 8)),
    "a step in eval mode": lambda m: [
        m.reference(torch.randn(1, 3, 64, 64)).sum().backward(),
        torch.optim.SGD(m.parameters(), 1e-3).step(),
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_ranges_of_other_weights_are_neither_used_nor_saved(
    change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_checkpoint()
    assert not model.has_stale_ranges()
    CHANGES[change](model)
    model.eval()
    assert model.has_stale_ranges()
    with pytest.raises(ValueError, match="which have changed since they were measured"):
        fuse(model, dtype=torch.int8)
    registry.log_once.cache_clear()
    save_checkpoint(model, tmp_path / "weights.safetensors")
    assert "saved without ranges" in caplog.text
    assert load_checkpoint(tmp_path / "weights.safetensors").ranges is None


def test_an_average_does_not_keep_the_ranges_of_what_it_averages() -> None:
    model = load_checkpoint()
    average = AveragedModel(model, use_buffers=True)
    model.classifier.conv.weight.data.mul_(1.5)
    average.update_parameters(model)
    average.update_parameters(model)
    assert average.module.has_stale_ranges()


def test_ranges_hold_for_copies_of_another_dtype() -> None:
    model = load_checkpoint()
    for other in (copy.deepcopy(model), copy.deepcopy(model).half(), copy.deepcopy(model).double()):
        assert not other.has_stale_ranges() and other.ranges == model.ranges


def test_ranges_are_the_models_own() -> None:
    model = load_checkpoint()
    told = calibrate(model, torch.randint(256, (1, 3, 64, 96), dtype=torch.uint8))
    measured = dict(told)
    told["stem.conv"] = (0.0, 123.0)
    assert model.ranges == measured != told


def test_floats_that_are_not_normalised_are_refused() -> None:
    model, x = load_checkpoint(), torch.randint(256, (1, 3, 64, 96), dtype=torch.uint8)
    with pytest.raises(ValueError, match="must be normalised by the model's mean and std"):
        calibrate(model, x.float())
    ranges = calibrate(model, x)
    beyond = normalise(x, model.config, torch.float32)
    beyond[..., :2] = 1e6  # which int8's stem takes for the brightest pixel
    beyond_ranges = calibrate(model, beyond)
    assert beyond_ranges["stem.conv"][1] < 2 * ranges["stem.conv"][1]
