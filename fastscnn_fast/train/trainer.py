"""Training by a recipe: resumable to the same result, one process or many."""

from __future__ import annotations

import copy
import json
import math
import platform
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..arch.config import PRESETS, SMALLEST_SIDE, WIDTHS, Config, preset as config_preset
from ..arch.network import Ranges
from ..backends.registry import logger
from ..checkpoints import load_checkpoint, located, save_checkpoint
from ..data.augmentation import Augmentation
from ..data.classes import CAMVID_CLASSES
from ..data.datasets import Batch, Batches, Examples, load
from ..data.scenery import Pieces, Scenery, Styles
from ..data.sources import Streets
from ..program.labels import labels_of
from ..runtime.calibrate import calibrate
from ..runtime.model import FastSCNN
from ..writing import claimed
from . import evaluate, files
from .distil import Teacher
from .loss import Targets
from .processes import Processes
from .recipe import Recipe, learning_rate
from .signals import Interrupt
from .step import (
    Objective,
    class_weights,
    deployable,
    parameter_groups,
    seed_step,
    update_average,
)

_MOMENTUM = 0.9
_SAVE_SECONDS = 120.0
_SHOW_SECONDS = 2.0
_STREET_SCENES = 500
_RANGES_OF = 16  # training pictures
_RARE_BELOW = 0.03  # share of all labelled pixels


def start_from(path: str, config: Config) -> FastSCNN:
    """The network of ``config`` but with the widths, the normalisation and the weights of a checkpoint.

    Of other classes or input channels :func:`load_checkpoint` makes what fits; auxiliary heads that the
    checkpoint lacks are random.

    Raises:
        ValueError: another architecture, apart from widths, heads, dropout and size.
    """
    start = load_checkpoint(path, num_classes=config.num_classes, in_channels=config.in_channels)
    kept = (*WIDTHS, "mean", "std")
    config = replace(config, **{name: getattr(start.config, name) for name in kept})
    theirs = replace(start.config, aux=config.aux, dropout=config.dropout, size=config.size)
    if theirs != config:
        names = (
            f.name for f in fields(config) if getattr(config, f.name) != getattr(theirs, f.name)
        )
        raise ValueError(
            f"weights must be of the preset trained; {path} differs in {', '.join(names)}"
        )
    model = FastSCNN.from_config(config)
    own = model.state_dict()
    state = {k: v for k, v in start.state_dict().items() if k in own and v.shape == own[k].shape}
    model.load_state_dict(own | state)
    return model


def _check_examples(recipe: Recipe, train: Examples, val: Examples | None) -> None:
    """ValueError where examples are not alike, or where what is done to them is done in colours that they lack."""
    if val is not None:
        if val.channels != train.channels:
            raise ValueError(
                f"val must have pictures of {train.channels} channels like train, got {val.channels}"
            )
        if evaluate.agreed(train.classes, val.classes) is None:
            raise ValueError(
                f"val must have the classes of train, {', '.join(train.classes)},"
                f" got {', '.join(val.classes)}"
            )
        if val.ignore != train.ignore:
            raise ValueError(f"val must ignore label {train.ignore} like train, got {val.ignore}")
    for name in ("paste", "mix", "style", "weather", "streets"):
        if train.channels != 3 and getattr(recipe, name):
            raise ValueError(
                f"{name} must be 0 for pictures of {train.channels} channels (it is done in RGB), got"
                f" {getattr(recipe, name)}"
            )


def _check_classes(recipe: Recipe, train: Examples, val: Examples | None, warn: bool) -> None:
    """Warns of classes that do not occur; ValueError where a single label does, so that nothing is to be learnt."""
    if train.absent and not recipe.streets:
        if (train.pixels > 0).sum() == 1:
            raise ValueError(
                f"all labels are the same, so that there is nothing to learn: {train.absent}"
            )
        if warn:
            logger.warning("training cannot teach what is not there: %s", train.absent)
    if val is not None and val.absent and warn:
        logger.warning("validation says nothing of what is not there: %s", val.absent)


def said(row: Mapping[str, float]) -> str:
    """The scores of a row of the metrics."""
    score = f"mIoU {row.get('miou', math.nan):.4f}"
    if "miou_float32" in row:
        score += f" in int8, {row['miou_float32']:.4f} in float32"
    if "flops" in row:
        score += f" with {row['flops']:.3f} of the operations"
    return score


class Trainer:
    """One run in one folder.

    ``out`` receives ``last.pt`` (everything to go on from), ``best.safetensors`` (the weights with the
    highest mIoU on ``val``; the last without), ``metrics.csv`` and ``curves.png``.

    Args:
        recipe: what to learn by.
        train: the examples to learn from.
        val: those to choose by, if any, of the same classes.
        out: the run's folder.
        device: where to compute.
        validations: how many over the run, at most one an epoch.
        workers: threads that prepare examples; 0: each is prepared when it is asked for.
        command: recorded in the weights.
        group: this process among others.

    Raises:
        ValueError: recipe and examples do not fit together, or weights cannot be used.
        OSError: weights cannot be read. Where ``out`` holds a run, which :meth:`resume` goes on with without those to start
            from, it is :meth:`run` that raises either because of these.
    """

    def __init__(
        self,
        recipe: Recipe,
        train: Examples,
        val: Examples | None,
        out: Path,
        device: torch.device | str = "cpu",
        validations: int = 100,
        workers: int = 2,
        command: str = "",
        group: Processes | None = None,
    ) -> None:
        for name, value, least in (("validations", validations, 1), ("workers", workers, 0)):
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        self.device, self.out, self.command = torch.device(device), out, command
        self.group = Processes() if group is None else group
        self.recipe = recipe = replace(recipe, dtype=_resolved(recipe, self.device))
        self.train, self.val, self.classes = train, val, tuple(train.classes)
        _check_examples(recipe, train, val)
        _check_classes(recipe, train, val, self.group.rank == 0)
        share = recipe.batch // self.group.world
        if recipe.batch % self.group.world or share % recipe.accumulate:
            raise ValueError(
                f"batch must divide by processes * accumulate = "
                f"{self.group.world} * {recipe.accumulate}, got {recipe.batch}"
            )
        self.epoch_steps = len(train) / recipe.batch
        self.steps = max(1, round(recipe.epochs * self.epoch_steps))
        self.validate_every = max(round(self.epoch_steps), self.steps // validations, 1)

        torch.manual_seed(recipe.seed)
        weights = class_weights(recipe, train)
        self.targets = Targets(
            len(train.classes), train.ignore, weights, recipe.smoothing, self.device
        )
        self._unstarted: Exception | None = None
        try:
            network = self._network()
        except (OSError, ValueError) as error:
            if not (out / files.LAST).exists():
                raise
            self._unstarted = error
            network = FastSCNN.from_config(Config.from_dict(files.read_last(out)["config"]))
        self.teacher = self._teacher()
        self._take(network)
        self.step = 0
        self.best = -1.0
        self.history: list[dict[str, float]] = []
        self._clear_window()
        self.batches = self._batches(workers)

    def _network(self) -> FastSCNN:
        """The network that the run begins with."""
        recipe, train = self.recipe, self.train
        config = config_preset(
            recipe.preset,
            num_classes=len(train.classes),
            in_channels=train.channels,
            aux=recipe.aux_weight > 0 and bool(PRESETS[recipe.preset].aux_taps),
            size=recipe.size,
        )
        if recipe.dropout is not None:
            config = replace(config, dropout=recipe.dropout)
        if recipe.weights is None:
            return FastSCNN.from_config(config)
        return start_from(recipe.weights, config)

    def _take(self, model: FastSCNN) -> None:
        """Learns ``model`` from here on, with nothing averaged and no momentum yet."""
        self._call(model)
        for module in model.modules():  # the auxiliary heads' dropout is not in the config
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = model.config.dropout
        if self.group.world > 1 and self.device.type == "cuda":  # torch has none for the CPU
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = copy.deepcopy(self.model) if self.recipe.ema else None
        self.optimizer = torch.optim.SGD(
            parameter_groups(self.model, self.recipe.weight_decay),
            lr=self.recipe.lr,
            momentum=_MOMENTUM,
            fused=True,
        )
        self.plain = Objective(self.model, self.targets, self.recipe, self.group.world)
        self.plain.teacher = self.teacher
        self.objective: nn.Module = self.plain
        if self.group.world > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self.objective = DistributedDataParallel(self.plain, device_ids=ids)

    def _teacher(self) -> Teacher | None:
        recipe = self.recipe
        if recipe.teacher is None or not recipe.distil:
            return None
        model = load_checkpoint(recipe.teacher).float()
        self._classes_with("teacher", model)
        return Teacher(model.to(self.device), self.targets, recipe.distil, recipe.temperature)

    def _classes_with(self, argument: str, model: FastSCNN) -> tuple[str, ...]:
        """What the classes are called that the pictures share with a network.

        Raises:
            ValueError: it has others, or other channels.
        """
        for name, theirs, ours in (
            ("classes", model.config.num_classes, len(self.train.classes)),
            ("channels", model.config.in_channels, self.train.channels),
        ):
            if theirs != ours:
                raise ValueError(
                    f"{argument} must have as many {name} as the pictures have, {ours}, got {theirs}"
                )
        classes = evaluate.agreed(self.classes, model.classes)
        if classes is None:
            raise ValueError(
                f"{argument} must have the classes of the pictures, {', '.join(self.classes)},"
                f" got {', '.join(model.classes)}"
            )
        return classes

    def _call(self, model: FastSCNN) -> None:
        """Names its classes."""
        model.classes = self.classes

    def _batches(self, workers: int) -> Batches:
        recipe = self.recipe
        extra = None
        if recipe.streets:
            if tuple(self.train.classes) != CAMVID_CLASSES:
                raise ValueError(
                    f"streets need CamVid's {len(CAMVID_CLASSES)} classes, by name and in this order, a line each in"
                    f" classes.txt: {', '.join(CAMVID_CLASSES)}; got {', '.join(self.train.classes)}"
                )
            height, width = self.train[0].labels.shape
            scenes = Streets(_STREET_SCENES, size=(height, width), ignore=self.train.ignore)
            extra = load(scenes, workers=workers)
        if recipe.size is not None:
            self.train.require_one_size("--size")
        augmentation = Augmentation(
            recipe.crop or _default_crop(recipe, self.train),
            recipe.size,
            recipe.scale,
            recipe.flip,
            recipe.colour,
            recipe.photo,
            self.train.ignore,
        )
        return Batches(
            self.train,
            augmentation,
            recipe.batch,
            recipe.seed,
            extra,
            recipe.streets,
            self.group.rank,
            self.group.world,
            workers,
            self._scenery(extra),
        )

    def _scenery(self, extra: Examples | None) -> Scenery | None:
        recipe = self.recipe
        if not (recipe.paste or recipe.mix or recipe.style or recipe.weather):
            return None
        rare = (self.train.pixels < _RARE_BELOW * self.train.pixels.sum()).nonzero()[0]
        sources = [source for source in (self.train, extra) if source is not None]
        return Scenery(
            self.train,
            Pieces(self.train if recipe.paste else (), rare.tolist(), recipe.seed),
            Styles(*sources if recipe.style else ()),
            recipe.mix,
            recipe.paste,
            recipe.style,
            recipe.weather,
        )

    # What has been seen since the last row of the metrics.

    def _clear_window(self) -> None:
        k = len(self.train.label_names)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.seen = torch.zeros(k, k, dtype=torch.int64, device=self.device)
        self.window = 0

    def _observe(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Loss and confusion at the logits' own resolution."""
        h, w = logits.shape[2:]
        k = len(self.seen)
        rows, columns = (
            ((torch.arange(n, device=labels.device) + 0.5) * (full / n)).long()
            for n, full in ((h, labels.shape[1]), (w, labels.shape[2]))
        )
        true = labels[:, rows][:, :, columns].long()
        pairs = torch.where(true < k, true * k + labels_of(logits), k * k).flatten()
        self.seen += torch.bincount(pairs, minlength=k * k + 1)[: k * k].view(k, k)
        self.loss_sum += loss

    # One step.

    def _before_step(self) -> None:
        """What else happens, which follows from what :meth:`_save` saves."""

    def _learn(self, batch: Batch, *wishes: bool) -> list[bool]:
        """Computes gradients and takes the step; which wishes any process has, the same on all of them."""
        pictures = batch.pictures.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.step, self.steps)
        seed_step(self.recipe.seed, self.step, self.group.rank)
        denominator = self.targets.denominator(labels)
        shared = self.group.sum(torch.stack([denominator, *map(denominator.new_tensor, wishes)]))
        self.optimizer.zero_grad(set_to_none=True)
        parts = zip(*(x.chunk(self.recipe.accumulate) for x in (pictures, labels)))
        for index, (x, y) in enumerate(parts, 1):
            with self._gradients_wait(index):
                loss, logits = self.objective(x, y, shared[0])
                loss.backward()
            self._observe(loss.detach(), logits, y)
        self.optimizer.step()
        if self.average is not None:
            update_average(self.average, self.model, self.recipe.ema, self.step)
        self.step += 1
        self.window += 1
        return [bool(wish) for wish in shared[1:]] if self.group.world > 1 else list(wishes)

    def _gradients_wait(self, index: int) -> Any:
        """Only the last part of a batch exchanges gradients."""
        last = index == self.recipe.accumulate
        if last or not isinstance(self.objective, DistributedDataParallel):
            return nullcontext()
        return self.objective.no_sync()

    def _mode(self) -> None:
        self.model.train()
        if self.recipe.freeze_bn:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def run(self) -> int:
        """Trains to the end, or until a signal; 0, or 128 + the signal's number. Everything is saved.

        Raises:
            ValueError: another run is writing to the folder, or the weights to start from cannot be used.
            RuntimeError: the loss is not finite.
            OSError: a file cannot be written, which is named; those that were there are whole. Or the weights to start from
                cannot be read.
        """
        if self._unstarted is not None:
            raise self._unstarted
        if self.recipe.quantize and self.plain.ranges is None:
            self.plain.ranges = self._measured(self._kept())
        self._mode()
        begun, shown, saved = time.monotonic(), 0.0, time.monotonic()
        mine = claimed(self.out) if self.group.rank == 0 else nullcontext()
        with mine, Interrupt() as interrupt, self._bar() as bar:
            for batch in self.batches.steps(self.step, self.steps):
                self._before_step()
                late = time.monotonic() - saved > _SAVE_SECONDS
                stop, save = self._learn(batch, interrupt.signal != 0, late)
                if time.monotonic() - shown > _SHOW_SECONDS:
                    self._show(bar)
                    shown = time.monotonic()
                bar.update()
                done = self.step == self.steps
                if done or self.step % self.validate_every == 0:
                    self._validate(time.monotonic() - begun)
                    self._save()
                    begun = saved = time.monotonic()
                    bar.set_description(said(self.history[-1]))
                    stop |= self.group.world == 1 and interrupt.signal != 0
                elif stop or save:
                    self._save()
                    saved = time.monotonic()
                if stop and not done:
                    if self.group.rank == 0:
                        bar.write(f"stopped at step {self.step} of {self.steps}; --resume goes on")
                    return 128 + (interrupt.signal or signal.SIGTERM)
        return 0

    def _bar(self) -> Any:
        return tqdm(
            total=self.steps,
            initial=self.step,
            unit="step",
            disable=self.group.rank > 0,
            mininterval=0.1 if sys.stderr.isatty() else 30,
            dynamic_ncols=True,
        )

    def _show(self, bar: Any) -> None:
        confusion = evaluate.Confusion(len(self.train.label_names))
        confusion.matrix = self.seen.cpu().numpy()
        bar.set_postfix(
            loss=f"{float(self.loss_sum) / max(1, self.window):.3f}",
            lr=f"{self.optimizer.param_groups[0]['lr']:.4f}",
            train_mIoU=f"{confusion.miou:.3f}",
            refresh=False,
        )

    # Between steps.

    def _window_total(self) -> Tensor:
        """Loss and confusion since the last row of the metrics, over all processes.

        Raises:
            RuntimeError: the loss is not finite, on every process.
        """
        total = self.group.sum(torch.cat([self.loss_sum[None], self.seen.flatten().double()]))
        if not total[0].isfinite():
            raise RuntimeError(
                f"the loss is {float(total[0])} at step {self.step}: start again with a lower --lr"
            )
        return total

    def _validate(self, seconds: float) -> None:
        """Scores the kept weights on the validation examples, each process some of them."""
        total = self._window_total()
        self._agree()
        train = evaluate.Confusion(len(self.train.label_names))
        train.matrix = total[1:].view_as(self.seen).long().cpu().numpy()
        row = self._row() | {
            "loss": float(total[0]) / max(1, self.window) / self.group.world,
            "train_miou": train.miou,
            "seconds": round(seconds, 2),
        }
        self._clear_window()
        kept = self._kept()
        if self.recipe.quantize:
            self.plain.ranges = kept.ranges = self._measured(kept)
        if self.val is not None:
            backend = "auto" if self.device.type == "cpu" else "plain"
            scores = self._scores(self.val, evaluate.labeller(kept, backend, torch.float32))
            if self.recipe.quantize:
                row["miou_float32"] = scores.miou
                scores = self._scores(self.val, evaluate.labeller(kept, "auto", torch.int8))
            row |= {"miou": scores.miou, "accuracy": scores.accuracy}
            row |= {
                f"iou_{name}": iou for name, iou in zip(self.val.label_names, scores.iou.tolist())
            }
        self.history.append(row)
        if self.group.rank == 0:
            self._report(row, kept)

    def _row(self) -> dict[str, float]:
        """What a row of the metrics begins with: where the run is."""
        return {
            "step": self.step,
            "epoch": round(self.step / self.epoch_steps, 3),
            "lr": self.optimizer.param_groups[0]["lr"],
        }

    def _agree(self) -> None:
        """Batch norm's running statistics are each process's own until the next step: here all take the first's."""
        if self.group.world > 1:
            for net in filter(None, (self.model, self.average)):
                for buffer in net.buffers():
                    distributed.broadcast(buffer, 0)

    def _kept(self) -> FastSCNN:
        """The network as it is stored and scored."""
        return deployable(self.model if self.average is None else self.average)

    def _scores(self, val: Examples, run: evaluate.Labeller) -> evaluate.Confusion:
        """Over all processes."""
        scores = evaluate.score(run, val, range(self.group.rank, len(val), self.group.world))
        matrix = torch.from_numpy(scores.matrix).to(self.device)
        scores.matrix = self.group.sum(matrix).cpu().numpy()
        return scores

    def _measured(self, kept: FastSCNN) -> Ranges:
        """The ranges of its values on training pictures, those of the first process on all of them."""
        count = min(_RANGES_OF, len(self.train))
        chosen = np.linspace(0, len(self.train) - 1, count).round().astype(int)
        found = calibrate(kept, [self.train[k].picture for k in chosen], size=self.recipe.size)
        ends = torch.tensor(list(found.values()), dtype=torch.float64, device=self.device)
        shared = self.group.sum(ends if self.group.rank == 0 else torch.zeros_like(ends)).tolist()
        return {name: (low, high) for name, (low, high) in zip(found, shared)}

    def _report(self, row: dict[str, float], kept: FastSCNN) -> None:
        """Writes the metrics so far, and the weights where they are the best."""
        miou = row.get("miou", math.nan)
        if not miou <= self.best:
            self.best = self.best if math.isnan(miou) else miou
            save_checkpoint(kept, self.out / files.BEST, self._details(row, kept))
        files.write_history(self.history, self.out)

    def _details(self, row: dict[str, float], kept: FastSCNN) -> dict[str, Any]:
        return {
            "classes": kept.classes,
            "palette": kept.palette,
            "miou": row.get("miou"),
            **{name: row[name] for name in ("miou_float32", "flops") if name in row},
            "step": row["step"],
            "steps": self.steps,
            "recipe": asdict(self.recipe),
            "command": self.command,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }

    def _save(self) -> None:
        """Everything that :meth:`resume` needs."""
        total = self._window_total()
        if self.group.rank > 0:
            return
        state = {
            "run": self._run(),
            "config": self.model.config.to_dict(),
            "step": self.step,
            "best": self.best,
            "history": self.history,
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ranges": self.plain.ranges,
            "window": (self.window, total),
        }
        files.write_last(state, self.out)

    def _run(self) -> dict[str, Any]:
        """All that decides what the run comes to, as values of JSON."""
        run = asdict(self.recipe) | {
            "processes": self.group.world,
            "classes": self.train.classes,
            "ignore": self.train.ignore,
            "channels": self.train.channels,
            "examples": len(self.train),
            "validation examples": 0 if self.val is None else len(self.val),
            "steps between validations": self.validate_every,
            "labelled pixels of each class": self.train.pixels.tolist(),
            "validation pixels of each class": [] if self.val is None else self.val.pixels.tolist(),
            "bits": _bits(self.train),
            "validation bits": _bits(self.val),
        }
        if self.recipe.teacher is not None:
            content = located(self.recipe.teacher).read_bytes()
            run["content of teacher"] = blake2b(content, digest_size=16).hexdigest()
        values: dict[str, Any] = json.loads(json.dumps(run))
        return values

    def resume(self) -> None:
        """Goes on from ``last.pt``, also to more epochs than its run was to have.

        The learning rate then is that of the longer run from where it is.

        Raises:
            ValueError: it is damaged, belongs to another recipe, other data or another number of processes, or
                has as many epochs behind it.
            OSError: it is not there.
        """
        state = files.read_last(self.out, self.device)
        run = self._run()
        files.check_run(state, run, self.out)
        if run["epochs"] != state["run"]["epochs"] and self.steps <= state["step"]:
            done = state["step"] / self.epoch_steps
            raise ValueError(
                f"epochs must be above {done:g}, which {self.out / files.LAST} has behind it, got {run['epochs']:g}"
            )
        config = Config.from_dict(state["config"])
        if config != self.model.config:
            self._take(FastSCNN.from_config(config))
        self._unstarted = None
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.plain.ranges = state["ranges"]
        self.step, self.best, self.history = state["step"], state["best"], state["history"]
        self.window, total = state["window"]
        if self.group.rank == 0:  # the sum over all processes
            self.loss_sum = total[0].clone()
            self.seen = total[1:].view_as(self.seen).long()


def _bits(examples: Examples | None) -> int | None:
    """What pictures are read by, if they are of files."""
    return getattr(getattr(examples, "source", None), "bits", None)


def _resolved(recipe: Recipe, device: torch.device) -> str:
    if recipe.dtype != "auto":
        return recipe.dtype
    if recipe.quantize:
        return "float32"
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return "bfloat16" if fast else "float32"


def _default_crop(recipe: Recipe, examples: Examples) -> tuple[int, int]:
    height, width = recipe.size or examples[0].labels.shape
    height, width = (side // SMALLEST_SIDE * SMALLEST_SIDE for side in (height, width))
    return max(SMALLEST_SIDE, height), max(SMALLEST_SIDE, width)
