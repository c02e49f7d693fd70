"""Tuning: measured with a clock of the test's own under Triton's interpreter, kept, and followed by calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import err, noise, randomise
from integers import with_ranges
from targets import odd_network

from fastscnn_fast import FastSCNN, bench, cli, fuse
from fastscnn_fast.backends import registry
from fastscnn_fast.backends.gpu import choices, runner, tune
from fastscnn_fast.backends.gpu.choices import TORCH, Choice, Sliced
from fastscnn_fast.backends.gpu.plan import PlacedLayer, Plan
from fastscnn_fast.backends.gpu.torch_step import TorchStep
from fastscnn_fast.backends.gpus import INTERPRETER
from fastscnn_fast.kernels.launch import Tile
from fastscnn_fast.lower.fold import fold
from fastscnn_fast.program.program import encode, fast_scnn

pytestmark = pytest.mark.interpreted
SIZE = (64, 96)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> FastSCNN:
    return odd_network()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "deep" / "tune.json"
    monkeypatch.setenv("FASTSCNN_TUNE_CACHE", str(file))
    choices._load.cache_clear()
    return file


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(choices, "log_once", messages.append)
    return messages


def places(model: FastSCNN, output: str = "logits") -> list[PlacedLayer]:
    from fastscnn_fast.lower.gpu import layout

    folded = fold(model)
    pieces, _ = layout(folded.layers, torch.float32, 64)
    networks = tune._networks(folded, [SIZE], 1, torch.float32, pieces)
    return next(found for found, kind in networks if kind == output)


def keys(model: FastSCNN, output: str = "logits") -> dict[str, str]:
    """By the layer's name."""
    return {
        p.layer.name: p.key(torch.float32, "interpreted", output) for p in places(model, output)
    }


def plan(model: FastSCNN) -> Plan:
    """What is made for a call with one contiguous picture."""
    x, out = torch.empty(1, 3, *SIZE), torch.empty(1, 5, *SIZE)
    return runner._network_plan(
        encode(fast_scnn(model.config).layers),
        runner._where(x),
        runner._where(out),
        torch.float32,
        "logits",
        INTERPRETER,
        "highest",
        choices.load(CPU),
        "triton",
    )


def check(model: FastSCNN) -> None:
    """The network is right."""
    x = noise(1, 3, *SIZE)
    fast = fuse(model, "triton")
    with torch.inference_mode():
        y = fast(x)
    with torch.no_grad():  # and outside: no buffer of a plan is an inference tensor
        assert torch.equal(fast(x), y)
        exact = bench.exact_logits(model, x)
        assert err(y, exact) < 1e-5
        assert (fast.labels(x) == exact.argmax(1)).double().mean() > 0.999


def test_what_is_saved_is_loaded(model: FastSCNN, cache: Path, said: list[str]) -> None:
    first, second, third, *_ = keys(model).values()
    found: dict[str, Choice] = {first: Tile(64, stages=3), second: TORCH}
    assert choices.load(CPU) is choices.NONE  # no file, no word
    assert choices.save(found, CPU) == cache
    assert dict(choices.load(CPU).by_layer) == found
    others: dict[str, Choice] = {second: Tile(32), third: Sliced(3)}
    choices.save(others, CPU)
    assert dict(choices.load(CPU).by_layer) == {first: found[first], **others}
    assert choices.load(CPU) is choices.load(CPU) and not said
    assert [path.name for path in cache.parent.iterdir()] == ["tune.json"]
    value = json.loads(cache.read_text())
    assert value["schema"] == choices.SCHEMA and list(value["choices"]) == [
        choices.environment(CPU)
    ]


def test_keys_tell_layers_and_all_their_shapes_apart(model: FastSCNN) -> None:
    place = places(model)[3]
    seen = {place.key(torch.float32, "ieee", "logits"), place.key(torch.float32, "tf32", "logits")}
    for other in (
        replace(place, layer=replace(place.layer, residual=not place.layer.residual)),
        replace(place, inputs=(replace(place.inputs[0], shape=(2, 8, 12, 24)),)),
        replace(place, inputs=(replace(place.inputs[0], dtype=torch.float16),)),
    ):
        seen.add(other.key(torch.float32, "ieee", "logits"))
    seen.add(place.key(torch.float16, "ieee", "logits"))
    assert len(seen) == 6
    assert place.key(torch.float32, "ieee", "labels") in seen  # it has no output of its own
    assert keys(model, "labels")["upsample"] != keys(model)["upsample"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "it is damaged"),
        ("[]", "schema must be 4, got None"),
        ('{"schema": 0, "choices": {}}', "schema must be 4, got 0"),
        ('{"schema": 4}', "it is damaged"),
        ('{"schema": 4, "choices": {"HERE": {"a": "opencl"}}}', "it is damaged"),
        (
            '{"schema": 4, "choices": {"HERE": {"a": {"cuda": {"slices": 0}}}}}',
            "a number from 1 on, got 0",
        ),
        ('{"schema": 4, "choices": {"HERE": {"a": {"cuda": {}}}}}', "it is damaged"),
        ('{"schema": 4, "choices": {"HERE": {"a": {"tile": {"pixels": 0}}}}}', "tile must have"),
        (
            '{"schema": 4, "choices": {"HERE": {"a": {"tile": {"pixels": 16, "block": 64, "rows": 3, "columns": 1,'
            ' "warps": 4, "stages": 1, "slices": 9}}}}}',
            "powers of two but for stages and slices",
        ),
        ('{"schema": 4, "choices": {"another GPU": {}}}', "it has no choices for interpreter"),
    ],
)
def test_damaged_and_foreign_files_are_ignored_with_a_reason(
    content: str, reason: str, cache: Path, said: list[str], model: FastSCNN
) -> None:
    cache.parent.mkdir()
    cache.write_text(content.replace("HERE", choices.environment(CPU)))
    for _ in range(2):
        assert choices.load(CPU) is choices.NONE
    assert len(said) == 1 and reason in said[0] and str(cache) in said[0]
    choices.save({"key": TORCH}, CPU)
    assert dict(choices.load(CPU).by_layer) == {"key": TORCH}
    assert ("another GPU" in cache.read_text()) == ("another GPU" in content)


def test_a_file_that_is_no_file_is_ignored(cache: Path, said: list[str]) -> None:
    cache.mkdir(parents=True)
    assert choices.load(CPU) is choices.NONE and "is ignored" in said[0]


def test_a_chosen_tile_is_used(model: FastSCNN) -> None:
    key = keys(model)["downsample.dsconv1"]
    (before,) = [s for s in plan(model).launches if s.kernel.__name__ == "dsconv_kernel"][:1]
    choices.save({key: Tile(128, block=16, warps=8, stages=3)}, CPU)
    (after,) = [s for s in plan(model).launches if s.kernel.__name__ == "dsconv_kernel"][:1]
    assert (after.arguments["BLOCK_PIXELS"], after.warps, after.stages) == (128, 8, 3)
    assert before.arguments["BLOCK_PIXELS"] != 128
    check(model)


@pytest.mark.parametrize("which", ["alternate", "alternate, the others", "all"])
def test_a_network_with_torch_steps_is_right(model: FastSCNN, which: str) -> None:
    first = which == "alternate, the others"
    step = 1 if which == "all" else 2
    chosen: dict[str, Choice] = {}
    for output in ("logits", "probabilities", "labels"):
        chosen |= dict.fromkeys(list(keys(model, output).values())[first::step], TORCH)
    choices.save(chosen, CPU)
    steps = plan(model).steps
    own = [step for step in steps if isinstance(step, TorchStep)]
    assert len(own) == len(list(keys(model))[first::step])
    assert (len(own) == len(steps)) == (which == "all")
    check(model)


def test_torch_steps_follow_weights_that_change(model: FastSCNN) -> None:
    choices.save(dict.fromkeys(keys(model).values(), TORCH), CPU)
    x, fast = noise(1, 3, *SIZE), fuse(model, "triton")
    before = fast(x)
    other = randomise(FastSCNN.from_config(model.config)).eval()
    fast.load_state_dict(fuse(other, "triton").state_dict())
    assert err(fast(x), bench.exact_logits(other, x)) < 1e-5 < err(before, fast(x).double())


@pytest.mark.parametrize("preset", ["mmseg", "mmseg_legacy", "leftthomas"])
def test_packed_weights_are_unpacked_as_they_were(preset: str) -> None:
    from fastscnn_fast.lower import gpu as weights
    from fastscnn_fast.lower.pack import plain_weights
    from fastscnn_fast.program.arithmetic import ARITHMETICS

    folded = fold(FastSCNN(num_classes=7, preset=preset).eval())
    plain = plain_weights(folded.layers, folded.tensors, ARITHMETICS["float32"], torch.float32)
    pieces, size = weights.layout(folded.layers, torch.float32, 0)
    memory = torch.zeros(size, dtype=torch.uint8)
    weights.fill(memory, pieces, folded.layers, plain)
    for layer, buffers, expected in zip(folded.layers, pieces, plain):
        got = weights.unpacked(layer, {name: b.view(memory) for name, b in buffers.items()})
        assert list(got) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, msg=f"{layer.op} {name}")


def test_the_fastest_that_is_right_wins(model: FastSCNN, monkeypatch: pytest.MonkeyPatch) -> None:
    def two(place: PlacedLayer, dtype: torch.dtype, architecture: Any) -> list[Tile]:
        usual = place.tile(dtype, architecture)
        return [usual, replace(usual, pixels=128)] if place.layer.op == "stem_conv" else [usual]

    def clock(runs: Sequence[Callable[[], None]]) -> list[float]:
        """Torch is the fastest at pyramid pooling and the slowest elsewhere; of tiles the one of more pixels is."""
        assert len(runs) == 2
        step = runs[0].args[1].steps[-1]  # type: ignore[attr-defined]
        if isinstance(step, TorchStep):
            return [9.0, 1.0 if step.layer.op == "pyramid_pooling" else 9.0, 0.0]
        names = ("BLOCK_PIXELS", "LANES", "BLOCK_COLUMNS")
        pixels = next(step.arguments[name] for name in names if name in step.arguments)
        return [5 - pixels / 1e3]

    right = TorchStep._unpack

    def wrong_fusion(step: TorchStep, pieces: Any) -> Any:
        plain = right(step, pieces)
        return {k: w * 1.1 if k == "low_weight" else w for k, w in plain.items()}

    monkeypatch.setattr(TorchStep, "_unpack", wrong_fusion)
    found = list(tune.tune(fold(model), [SIZE], 1, torch.float32, "highest", CPU, clock, two))
    assert len({f.key for f in found}) == len(found)
    by_name = {f.name: f for f in found}
    assert {"stem", "stem uint8", "upsample logits", "upsample labels"} <= set(by_name)
    pyramid, stem, fusion = (by_name[name] for name in ("pyramid", "stem", "fusion"))
    assert pyramid.best is not None and pyramid.best.choice == TORCH
    assert stem.best is not None and stem.best.choice == stem.trials[0].choice
    assert fusion.trials[-1].ms is None and "bound" in fusion.trials[-1].problem
    assert all(f.best is not None for f in found)
    assert set(keys(model).values()) <= {f.key for f in found}
    assert pyramid.row()["torch ms"] == pyramid.row()["best ms"] == "1.0000"
    choices.save({f.key: f.best.choice for f in found if f.best}, CPU)
    monkeypatch.setattr(TorchStep, "_unpack", right)
    assert sum(isinstance(step, TorchStep) for step in plan(model).steps) == 1
    check(model)


@pytest.mark.slow
def test_int8_is_tuned_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles alone compete, one whose bits are others is left out, and what is chosen is used."""
    network = with_ranges(odd_network())

    def usual(place: PlacedLayer, dtype: torch.dtype, architecture: Any) -> list[Tile]:
        tile = place.tile(dtype, architecture)
        return [tile, replace(tile, pixels=64)] if place.layer.op == "dsconv" else [tile]

    def tuned() -> list[tune.Found]:
        return list(
            tune.tune(
                fold(network), [(32, 48)], 1, torch.int8, "highest", CPU, lambda runs: [1.0], usual
            )
        )

    found = tuned()
    assert all(f.best is not None for f in found)
    by_name = {f.name: f for f in found}
    assert [t.choice for t in by_name["upsample labels"].trials][-1] == TORCH  # which is float32's
    assert all(isinstance(t.choice, Tile) for t in by_name["fusion"].trials)
    dsconv = by_name["downsample.dsconv1"]
    choices.save({dsconv.key: dsconv.trials[1].choice}, CPU)
    fast = fuse(network, "triton", torch.int8)
    x = torch.randint(256, (1, 3, 32, 48), dtype=torch.uint8)
    seen: list[Any] = []
    steps = runner.network_plan
    monkeypatch.setattr(
        runner, "network_plan", lambda *a, **k: seen.append(steps(*a, **k)) or seen[-1]
    )
    runner._network_plan.cache_clear()
    assert err(fast(x), fuse(network, "reference", torch.int8)(x).double()) < 1e-5
    used = [s for s in seen[0].launches if s.kernel.__name__ == "dsconv_int8_kernel"]
    assert used[0].arguments["BLOCK_PIXELS"] == 64 != used[1].arguments["BLOCK_PIXELS"]


def test_a_candidate_that_does_not_run_is_left_out(model: FastSCNN) -> None:
    def broken(place: PlacedLayer, dtype: torch.dtype, architecture: Any) -> list[Tile]:
        return [Tile(100)]  # no power of two

    (stem, *_) = tune.tune(
        fold(model), [SIZE], 1, torch.float32, "highest", CPU, lambda runs: [1.0], broken
    )
    kernel, torchs = stem.trials
    assert kernel.ms is None and kernel.problem and stem.best == torchs
    assert stem.row()["left out"] == "1"


def test_candidates_begin_with_what_is_used_untuned() -> None:
    for place in places(FastSCNN()):
        for dtype in (torch.float32, torch.float16):
            tiles = tune.candidates(place, dtype, 90)
            assert tiles[0] == place.tile(dtype, 90) and len(tiles) == len(set(tiles)) > 8


def test_the_command_prints_and_keeps_what_it_found(
    model: FastSCNN,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "device", lambda *args: CPU)
    monkeypatch.setattr(bench, "untrained_model", lambda preset: model)
    monkeypatch.setattr(registry, "choose", lambda *args: "triton")
    measured = tune.tune

    def quick(*args: Any) -> Any:
        return measured(*args, lambda runs: [1.0, 2.0, 3.0], lambda *of: [PlacedLayer.tile(*of)])

    monkeypatch.setattr(tune, "tune", quick)
    assert cli.main(["tune", "--size", "64x96", "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {cache}" in printed and "| fusion " in printed and "2.0000" in printed
    assert choices.load(CPU).by_layer
