"""One training step, the obvious eager loop and ours in turns within one run: images per second, where time goes.

    python benchmarks/bench_train.py [--size 352x480] [--batch 12] [--rounds 8] [--compile] [--profile]

The losses must agree first. The eager loop is torch's own: bf16 autocast, full-size logits of all three
heads, cross_entropy, SGD. Ours is a step of :class:`fastscnn_fast.train.Trainer`; its pictures come from
procedural streets, augmented while it runs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from fastscnn_fast import FastSCNN
from fastscnn_fast.arch.network import normalise
from fastscnn_fast.backends import registry
from fastscnn_fast.cli.options import size
from fastscnn_fast.data.datasets import Batch, Examples
from fastscnn_fast.data.sources import Streets
from fastscnn_fast.train import Recipe, Trainer
from fastscnn_fast.train.step import Objective

WEIGHTS = (1.0, 0.4, 0.4)


def eager_loss(model: FastSCNN, batch: Batch, weights: Tensor, ignore: int, bf16: bool) -> Tensor:
    """The loss as one writes it down."""
    x = normalise(batch.pictures, model.config, torch.float32)
    labels = batch.labels.long()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits, auxiliary = model.reference(x)
        losses = [
            weight * F.cross_entropy(z, labels, weights, ignore_index=ignore)
            for weight, z in zip(WEIGHTS, (logits, *auxiliary))
        ]
    return torch.stack(losses).sum()


def our_loss(trainer: Trainer, batch: Batch, bf16: bool) -> Tensor:
    recipe = replace(trainer.recipe, dtype="bfloat16" if bf16 else "float32")
    objective = Objective(trainer.model, trainer.targets, recipe, world=1)
    loss: Tensor = objective(
        batch.pictures, batch.labels, trainer.targets.denominator(batch.labels)
    )[0]
    return loss


def check(trainer: Trainer, batch: Batch, weights: Tensor) -> None:
    """Prints both losses in float32 and bfloat16; raises where ours is further from float32's than eager's."""
    model, losses = trainer.model, {}
    dropouts = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    rates = [m.p for m in dropouts]
    with torch.no_grad():
        for m in dropouts:
            m.p = 0.0
        state = copy.deepcopy(model.state_dict())
        for bf16 in (False, True):
            eager = eager_loss(model, batch, weights, trainer.train.ignore, bf16).item()
            losses[bf16] = eager, our_loss(trainer, batch, bf16).item()
        model.load_state_dict(state)
        for m, p in zip(dropouts, rates):
            m.p = p
    exact = losses[False][0]
    for bf16, (eager, ours) in losses.items():
        name = "bfloat16" if bf16 else "float32"
        print(f"loss, {name:<8}  eager {eager:.7f}  ours {ours:.7f}")
        bound = max(abs(eager - exact), (1e-3 if bf16 else 1e-5) * exact)
        if abs(ours - exact) > bound:
            raise AssertionError(f"our loss in {name} is off by {ours - exact:+.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=size, default=(352, 480), metavar="HxW")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--compile", action="store_true", help="also torch.compile of the eager loop"
    )
    parser.add_argument("--profile", action="store_true", help="where the time goes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    examples = Examples(Streets(24, 0, args.size))
    recipe = Recipe(batch=args.batch, crop=args.size, class_weights=1.1, dtype="bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe, examples, None, Path(folder))
    trainer._mode()
    weights = trainer.targets.weight[: len(examples.classes)]
    stream = trainer.batches.steps(0, 10**6)
    batch = next(stream)
    check(trainer, batch, weights)

    contestants: dict[str, Callable[[], None]] = {}

    def eager(channels_last: bool, compiled: bool = False) -> Callable[[], None]:
        model = copy.deepcopy(trainer.model)
        if not channels_last:
            model.to(memory_format=torch.contiguous_format)
        pictures = batch.pictures if channels_last else batch.pictures.contiguous()
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=4e-5)
        loss_of = torch.compile(eager_loss, dynamic=False) if compiled else eager_loss

        def step() -> None:
            loss = loss_of(model, Batch(pictures, batch.labels), weights, examples.ignore, True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    def ours(batches: Iterator[Batch]) -> Callable[[], None]:
        def step() -> None:
            trainer._learn(next(batches), False)

        return step

    contestants["eager"] = eager(False)
    contestants["eager, channels-last"] = eager(True)
    if args.compile:
        contestants["torch.compile, channels-last"] = eager(True, True)
    contestants["ours"] = ours(iter(lambda: batch, None))
    contestants["ours, with data"] = ours(stream)

    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for name, step in contestants.items():
        start = time.perf_counter()
        step()
        step()
        print(f"first two steps of {name}: {time.perf_counter() - start:.1f} s")
    for _ in range(args.rounds):
        for name, step in contestants.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)

    isa = registry.isa() if registry.isas() else "plain torch"
    print(f"\n{args.batch} x {args.size[0]}x{args.size[1]}, {args.threads} threads, {isa}")
    base = statistics.median(seconds["eager"])
    print(f"{'step':<30} {'median s':>9} {'fastest':>9} {'images/s':>9} {'x eager':>8}")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f"{name:<30} {median:9.3f} {min(times):9.3f} {args.batch / median:9.1f} {base / median:8.2f}"
        )
    if args.profile:
        for name in ("eager, channels-last", "ours"):
            with profile(activities=[ProfilerActivity.CPU]) as record:
                contestants[name]()
            print(f"\n{name}")
            events = sorted(record.key_averages(), key=lambda e: -e.self_cpu_time_total)
            total = sum(event.self_cpu_time_total for event in events)
            for event in events[:12]:
                share = event.self_cpu_time_total / total
                print(
                    f"  {100 * share:5.1f} %  {event.self_cpu_time_total / 1e3:8.1f} ms  {event.key}"
                )


if __name__ == "__main__":
    main()
