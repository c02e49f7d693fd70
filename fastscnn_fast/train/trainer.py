"""Training: the paper's recipe by default, resumable to the same result, one process or many."""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..arch.config import PRESETS, SMALLEST_SIDE, preset as config_preset
from ..backends import registry
from ..checkpoints import load_checkpoint, save_checkpoint
from ..cli import options
from ..data import classes as data
from ..data.datasets import Augmentation, Batch, Batches, Examples, Streets, open_source
from ..plots import figure
from ..runtime.model import FastSCNN
from . import evaluate
from .loss import Targets, hard_examples, upsampled_cross_entropy
from .ops import low_logits, normalised

_MOMENTUM, _POWER = 0.9, 0.9
_BATCH_OF_LR = 12
_HARD_BELOW = 0.7
_SAVE_SECONDS = 120.0
_SHOW_SECONDS = 2.0
_STREET_SCENES = 500


def _option(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


_SIZE = {"type": options.size, "metavar": "HxW"}


@dataclass(frozen=True)
class Recipe:
    """All that decides what a run learns. The defaults are the paper's; the fields are options of ``train``."""

    preset: str = _option("paper", "architecture", choices=PRESETS)
    weights: str | None = _option(
        None,
        "checkpoint of the preset to start from (random weights); where its classes are others in number,"
        " the last convolution starts at random",
        metavar="F",
    )
    epochs: float = _option(1000.0, "passes over the training examples")
    batch: int = _option(12, "examples per step over all processes")
    accumulate: int = _option(
        1, "parts a process computes its share of the batch in, to save memory"
    )
    lr: float = _option(0.045, "learning rate at batch 12; it is scaled with the batch")
    weight_decay: float = _option(
        4e-5, "L2 on weights of convolutions, but for depthwise ones, batch norms and biases"
    )
    aux_weight: float = _option(0.4, "weight of each auxiliary loss; 0: no auxiliary heads")
    dropout: float | None = _option(
        None, "dropout before the last convolution of each head (the preset's own)", type=float
    )
    size: tuple[int, int] | None = _option(
        None,
        "size of a whole picture as the network's input (its own); labels are not resized along",
        **_SIZE,
    )
    crop: tuple[int, int] | None = _option(
        None,
        "size of a crop as the network's input (--size, or the first picture's, in whole multiples of 32)",
        **_SIZE,
    )
    scale: tuple[float, float] = _option(
        (0.5, 2.0), "bounds of the random resize", type=float, nargs=2, metavar=("MIN", "MAX")
    )
    flip: bool = _option(True, "mirror half of the examples")
    colour: float = _option(0.2, "strength of changes in brightness, contrast, saturation, hue")
    photo: float = _option(0.0, "strength of changes in gamma and colour cast, blur, noise")
    streets: float = _option(0.0, "share of procedural street scenes in the batches")
    class_weights: float = _option(
        0.0, "C > 1 weighs a class of frequency f by 1 / log(C + f); 0: all classes alike"
    )
    ohem: float = _option(
        0.0, "online hard example mining: the hardest share of pixels to keep in any case; 0: off"
    )
    smoothing: float = _option(0.0, "label smoothing")
    ema: float = _option(
        0.0, "decay per step of a moving average of the weights, which is then what is kept; 0: off"
    )
    freeze_bn: bool = _option(False, "keep the statistics of batch norm as they are")
    dtype: str = _option(
        "auto",
        "autocast to bfloat16, or none; auto: bfloat16 where the processor has it",
        choices=("auto", "bfloat16", "float32"),
    )
    seed: int = _option(0, "of initial weights, order, augmentation and dropout")

    def __post_init__(self) -> None:
        for name in ("size", "crop", "scale"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{option.name} must be finite, got {value}")
        rules = {
            "epochs": (self.epochs > 0, "must be positive"),
            "batch": (self.batch >= 1, "must be at least 1"),
            "accumulate": (self.accumulate >= 1, "must be at least 1"),
            "lr": (self.lr > 0, "must be positive"),
            "weight_decay": (self.weight_decay >= 0, "must be at least 0"),
            "aux_weight": (self.aux_weight >= 0, "must be at least 0"),
            "dropout": (self.dropout is None or 0 <= self.dropout <= 0.99, "must be 0 to 0.99"),
            "seed": (self.seed >= 0, "must be at least 0"),
            "scale": (0 < self.scale[0] <= self.scale[1], "must be two numbers above 0 in order"),
            "colour": (0 <= self.colour < 1, "must be at least 0 and below 1"),
            "photo": (0 <= self.photo <= 2, "must be 0 to 2"),
            "streets": (0 <= self.streets <= 1, "must be 0 to 1"),
            "class_weights": (
                self.class_weights == 0 or self.class_weights > 1,
                "must be 0 or above 1",
            ),
            "ohem": (0 <= self.ohem <= 1, "must be 0 to 1"),
            "smoothing": (0 <= self.smoothing < 1, "must be at least 0 and below 1"),
            "ema": (0 <= self.ema < 1, "must be at least 0 and below 1"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{name} {rule}, got {getattr(self, name)}")


# --- parts of a step -------------------------------------------------------------------------------------


class Objective(nn.Module):
    """(pictures, labels, denominator) -> (loss, the small logits).

    The loss is the mean over the pixels of all processes; torch averages gradients over processes, so each
    process's sum is divided by its share of ``denominator``, the sum of all pixels' weights.
    """

    def __init__(self, model: FastSCNN, targets: Targets, recipe: Recipe, world: int) -> None:
        super().__init__()
        self.model, self.targets, self.recipe, self.world = model, targets, recipe, world

    def forward(self, pictures: Tensor, labels: Tensor, denominator: Tensor) -> Any:
        bf16 = self.recipe.dtype == "bfloat16"
        with torch.autocast(pictures.device.type, torch.bfloat16, enabled=bf16):
            logits = low_logits(self.model, normalised(pictures, self.model.config))
        align_corners = self.model.config.align_corners
        loss = torch.zeros((), device=pictures.device)
        for index, z in enumerate(logits):
            hard, divisor = labels, denominator
            if self.recipe.ohem:
                hard = hard_examples(
                    z, labels, self.targets, align_corners, _HARD_BELOW, self.recipe.ohem
                )
                divisor = self.targets.denominator(hard) * self.world * self.recipe.accumulate
            total = upsampled_cross_entropy(z, hard, self.targets, align_corners)
            weight = self.recipe.aux_weight if index else 1.0
            loss = loss + weight * self.world * total / divisor.clamp(min=1e-12).float()
        return loss, logits[0].detach()


def start_from(model: FastSCNN, path: str) -> None:
    """Copies the weights of a checkpoint of the same architecture, but for other classes.

    Raises:
        ValueError: another architecture or normalisation.
    """
    start = load_checkpoint(path)
    ours = model.config
    theirs = replace(
        start.config,
        num_classes=ours.num_classes,
        aux=ours.aux,
        dropout=ours.dropout,
        size=ours.size,
    )
    if theirs != ours:
        names = (f.name for f in fields(ours) if getattr(ours, f.name) != getattr(theirs, f.name))
        raise ValueError(
            f"weights must be of the preset trained; {path} differs in {', '.join(names)}"
        )
    own = model.state_dict()
    state = {k: v for k, v in start.state_dict().items() if k in own and v.shape == own[k].shape}
    model.load_state_dict(own | state)


def parameter_groups(model: FastSCNN, weight_decay: float) -> list[dict[str, Any]]:
    """Decay for the weights of ordinary convolutions, none for the rest."""
    groups: dict[float, list[nn.Parameter]] = {weight_decay: [], 0.0: []}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            convolution = isinstance(module, nn.Conv2d) and module.groups == 1
            groups[weight_decay if convolution and name == "weight" else 0.0].append(parameter)
    return [{"params": ps, "weight_decay": decay} for decay, ps in groups.items() if ps]


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """lr * batch / 12 * (1 - step / steps) ** 0.9"""
    return recipe.lr * recipe.batch / _BATCH_OF_LR * (1 - step / steps) ** _POWER


def class_weights(recipe: Recipe, examples: Examples) -> list[float] | None:
    """1 / log(C + f) of each class's frequency f, scaled so that the mean over pixels is 1."""
    if not recipe.class_weights:
        return None
    f = examples.pixels / examples.pixels.sum()
    weights = 1 / np.log(recipe.class_weights + f)
    return [float(w) for w in weights / (weights * f).sum()]


@torch.no_grad()
def update_average(average: FastSCNN, model: FastSCNN, decay: float, step: int) -> None:
    """average += (1 - decay) * (model - average); the first steps count for more."""
    decay = min(decay, (1 + step) / (10 + step))
    pairs = zip(average.state_dict().values(), model.state_dict().values())
    floats = [(a, b) for a, b in pairs if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], 1 - decay)


def _seed_step(seed: int, step: int, rank: int) -> None:
    state = np.random.SeedSequence((seed, 4, step, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) >> 1)


# --- processes, signals, files ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started; alone without torchrun."""

    rank: int = 0
    world: int = 1

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.world > 1:
            distributed.all_reduce(x)
        return x


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """Joins the other processes of torchrun: NCCL on GPUs, gloo on CPUs."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


class Interrupt:
    """Turns the first SIGINT or SIGTERM into :attr:`signal`; the second acts as ever."""

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.__exit__()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path to write to; only when all is written does it become ``path``."""
    new = path.with_name(f".{path.stem}.new{path.suffix}")
    try:
        yield new
        with new.open("r+b") as file:
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def deployable(model: FastSCNN) -> FastSCNN:
    """A copy in eval mode without auxiliary heads."""
    plain = FastSCNN.from_config(replace(model.config, aux=False))
    wanted = plain.state_dict()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in wanted})
    return plain.to(model.classifier.conv.weight.device).eval()


# --- the run ---------------------------------------------------------------------------------------------


class Trainer:
    """One run in one folder.

    ``out`` receives ``last.pt`` (everything to go on from), ``best.safetensors`` (the weights with the
    highest mIoU on ``val``; the last without), ``metrics.csv`` and ``curves.png``.

    Args:
        recipe: what to learn by.
        train, val: the examples; validation is optional.
        out: the run's folder.
        device: where to compute.
        validations: how many over the run, at most one an epoch.
        workers: threads that prepare examples.
        command: recorded in the weights.
        group: this process among others.

    Raises:
        ValueError: recipe and examples do not fit together.
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
        self.device, self.out, self.command = torch.device(device), out, command
        self.group = Processes() if group is None else group
        self.recipe = recipe = replace(recipe, dtype=_resolved(recipe.dtype, self.device))
        self.train, self.val = train, val
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
        num_classes = len(train.classes)
        config = config_preset(
            recipe.preset,
            num_classes=num_classes,
            aux=recipe.aux_weight > 0 and bool(PRESETS[recipe.preset].aux_taps),
            size=recipe.size,
        )
        if recipe.dropout is not None:
            config = replace(config, dropout=recipe.dropout)
        model = FastSCNN.from_config(config)
        if recipe.weights is not None:
            start_from(model, recipe.weights)
        for module in model.modules():  # the auxiliary heads' dropout is not in the config
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = config.dropout
        if self.group.world > 1 and self.device.type == "cuda":  # torch has none for the CPU
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = copy.deepcopy(self.model) if recipe.ema else None
        self.optimizer = torch.optim.SGD(
            parameter_groups(self.model, recipe.weight_decay),
            lr=recipe.lr,
            momentum=_MOMENTUM,
            fused=True,
        )
        weights = class_weights(recipe, train)
        self.targets = Targets(num_classes, train.ignore, weights, recipe.smoothing, self.device)
        objective = Objective(self.model, self.targets, recipe, self.group.world)
        self.objective: nn.Module = objective
        if self.group.world > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self.objective = DistributedDataParallel(objective, device_ids=ids)

        self.step = 0
        self.best = -1.0
        self.history: list[dict[str, float]] = []
        self._clear_window()
        self.batches = self._batches(workers)

    def _batches(self, workers: int) -> Batches:
        recipe = self.recipe
        extra = None
        if recipe.streets:
            if tuple(self.train.classes) != data.CAMVID_CLASSES:
                raise ValueError(f"streets need CamVid's {len(data.CAMVID_CLASSES)} classes")
            height, width = self.train[0].labels.shape
            scenes = Streets(_STREET_SCENES, size=(height, width), ignore=self.train.ignore)
            extra = evaluate.load(scenes, workers=workers)
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
        )

    # What has been seen since the last row of the metrics.

    def _clear_window(self) -> None:
        k = len(self.train.classes)
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
        pairs = torch.where(true < k, true * k + logits.argmax(1), k * k).flatten()
        self.seen += torch.bincount(pairs, minlength=k * k + 1)[: k * k].view(k, k)
        self.loss_sum += loss

    # One step.

    def _learn(self, batch: Batch, *wishes: bool) -> list[bool]:
        """Computes gradients and takes the step; which wishes any process has, the same on all of them."""
        pictures = batch.pictures.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.step, self.steps)
        _seed_step(self.recipe.seed, self.step, self.group.rank)
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
        """Trains to the end, or until a signal; 0, or 128 + the signal's number. Everything is saved."""
        self._mode()
        begun, shown, saved = time.monotonic(), 0.0, time.monotonic()
        bar = tqdm(
            total=self.steps,
            initial=self.step,
            unit="step",
            disable=self.group.rank > 0,
            mininterval=0.1 if sys.stderr.isatty() else 30,
            dynamic_ncols=True,
        )
        with Interrupt() as interrupt, bar:
            self.out.mkdir(parents=True, exist_ok=True)
            for batch in self.batches.steps(self.step, self.steps):
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
                    bar.set_description(f"mIoU {self.history[-1].get('miou', math.nan):.4f}")
                    stop |= self.group.world == 1 and interrupt.signal != 0
                elif stop or save:
                    self._save()
                    saved = time.monotonic()
                if stop and not done:
                    if self.group.rank == 0:
                        bar.write(f"stopped at step {self.step} of {self.steps}; --resume goes on")
                    return 128 + (interrupt.signal or signal.SIGTERM)
        return 0

    def _show(self, bar: Any) -> None:
        confusion = evaluate.Confusion(len(self.train.classes))
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
        if self.group.world > 1:
            # Batch norm's running statistics are each process's own until the next step.
            for net in filter(None, (self.model, self.average)):
                for buffer in net.buffers():
                    distributed.broadcast(buffer, 0)
        train = evaluate.Confusion(len(self.train.classes))
        train.matrix = total[1:].view_as(self.seen).long().cpu().numpy()
        row = {
            "step": self.step,
            "epoch": round(self.step / self.epoch_steps, 3),
            "lr": self.optimizer.param_groups[0]["lr"],
            "loss": float(total[0]) / max(1, self.window) / self.group.world,
            "train_miou": train.miou,
            "seconds": round(seconds, 2),
        }
        self._clear_window()
        kept = deployable(self.model if self.average is None else self.average)
        if self.val is not None:
            backend = "auto" if self.device.type == "cpu" else "plain"
            run = evaluate.labeller(kept, backend, torch.float32)
            mine = range(self.group.rank, len(self.val), self.group.world)
            scores = evaluate.score(run, self.val, mine)
            matrix = torch.from_numpy(scores.matrix).to(self.device)
            scores.matrix = self.group.sum(matrix).cpu().numpy()
            row |= {"miou": scores.miou, "accuracy": scores.accuracy}
            row |= {f"iou_{name}": iou for name, iou in zip(self.val.classes, scores.iou.tolist())}
        self.history.append(row)
        if self.group.rank == 0:
            self._report(row, kept)

    def _report(self, row: dict[str, float], kept: FastSCNN) -> None:
        """Writes the metrics so far, and the weights where they are the best."""
        miou = row.get("miou", math.nan)
        if not miou <= self.best:
            self.best = self.best if math.isnan(miou) else miou
            with atomic(self.out / "best.safetensors") as path:
                save_checkpoint(kept, path, self._details(row))
        with atomic(self.out / "metrics.csv") as path:
            _write_csv(self.history, path)
        try:
            with atomic(self.out / "curves.png") as path:
                _draw_curves(self.history, path)
        except Exception as error:  # no matplotlib, or no way to draw: the run is worth more
            registry.log_once(f"no curves.png: {error}")

    def _details(self, row: dict[str, float]) -> dict[str, Any]:
        classes = list(self.train.classes)
        colours = data.class_names(len(classes))[1]
        return {
            "classes": classes,
            "palette": [list(colour) for colour in colours],
            "miou": row.get("miou"),
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
            "step": self.step,
            "best": self.best,
            "history": self.history,
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "window": (self.window, total),
        }
        with atomic(self.out / "last.pt") as path:
            torch.save(state, path)

    def _run(self) -> dict[str, Any]:
        """All that decides what the run comes to, as values of JSON."""
        run = asdict(self.recipe) | {
            "processes": self.group.world,
            "classes": self.train.classes,
            "ignore": self.train.ignore,
            "examples": len(self.train),
            "validation examples": 0 if self.val is None else len(self.val),
            "steps between validations": self.validate_every,
        }
        values: dict[str, Any] = json.loads(json.dumps(run))
        return values

    def resume(self) -> None:
        """Goes on from ``last.pt``.

        Raises:
            ValueError: it is damaged, or belongs to another recipe, other data or another number of processes.
            OSError: it is not there.
        """
        path = self.out / "last.pt"
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except OSError:
            raise
        except Exception as error:  # torch raises nearly anything on a damaged file
            raise ValueError(f"{path}: is damaged: {str(error).splitlines()[0]}") from error
        mine = self._run()
        for name, value in state["run"].items():
            if mine.get(name) != value:
                raise ValueError(
                    f"{name} must be {value!r} to go on with {path}, got {mine.get(name)!r}"
                )
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best, self.history = state["step"], state["best"], state["history"]
        self.window, total = state["window"]
        if self.group.rank == 0:  # the sum over all processes
            self.loss_sum = total[0].clone()
            self.seen = total[1:].view_as(self.seen).long()


def _resolved(dtype: str, device: torch.device) -> str:
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return "bfloat16" if fast else "float32"


def _default_crop(recipe: Recipe, examples: Examples) -> tuple[int, int]:
    height, width = recipe.size or examples[0].labels.shape
    height, width = (side // SMALLEST_SIDE * SMALLEST_SIDE for side in (height, width))
    return max(SMALLEST_SIDE, height), max(SMALLEST_SIDE, width)


def _write_csv(history: list[dict[str, float]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(history[-1]))
        writer.writeheader()
        writer.writerows(history)


def _draw_curves(history: list[dict[str, float]], path: Path) -> None:
    epochs = [row["epoch"] for row in history]
    chart = figure((10, 4))
    left, right = chart.subplots(1, 2)
    left.plot(epochs, [row["loss"] for row in history], label="loss")
    left.set_xlabel("epoch")
    left.set_ylabel("training loss")
    rates = left.twinx()
    rates.plot(epochs, [row["lr"] for row in history], color="grey", linestyle=":")
    rates.set_ylabel("learning rate")
    for name, text in (
        ("train_miou", "training (1/8 resolution)"),
        ("miou", "validation"),
        ("accuracy", "validation, pixel accuracy"),
    ):
        if name in history[-1]:
            right.plot(epochs, [row[name] for row in history], label=text)
    right.set_xlabel("epoch")
    right.set_ylabel("mIoU")
    right.set_ylim(0, 1)
    right.grid(alpha=0.3)
    right.legend()
    chart.savefig(path, dpi=120)


# --- the command -----------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``train``: the data, the run, and every field of :class:`Recipe`."""
    evaluate.add_data_arguments(parser)
    parser.add_argument("-o", "--out", type=Path, required=True, help="the run's folder")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in OUT, with the same options"
    )
    parser.add_argument(
        "--splits",
        nargs=2,
        default=("train", "val"),
        metavar=("TRAIN", "VAL"),
        help="parts of DATA to learn from and to choose by (train val)",
    )
    parser.add_argument(
        "--validations",
        type=options.count,
        default=100,
        metavar="N",
        help="how many over the run, at most one an epoch (%(default)s)",
    )
    parser.add_argument("--device", default="auto", help="torch device (auto: GPU, else CPU)")
    parser.add_argument(
        "--workers",
        type=options.count,
        default=2,
        metavar="N",
        help="threads that prepare examples (%(default)s)",
    )
    parser.add_argument(
        "--memory",
        type=float,
        default=8.0,
        metavar="GIB",
        help="of each process, to keep examples in (%(default)s)",
    )
    recipe = parser.add_argument_group("recipe")
    for option in fields(Recipe):
        how = dict(option.metadata)
        default = option.default
        if isinstance(default, bool):
            how["action"] = argparse.BooleanOptionalAction
        elif default is not None and "choices" not in how:
            how.setdefault("type", type(default))
            how.setdefault("metavar", "X" if isinstance(default, float) else "N")
        if default is not None:
            how["help"] += " (%(default)s)"
        recipe.add_argument("--" + option.name.replace("_", "-"), default=default, **how)
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    """Runs ``train``."""
    recipe = Recipe(**{option.name: getattr(args, option.name) for option in fields(Recipe)})
    device = options.device(args.device)
    if args.out.exists() and not (args.out.is_dir() and os.access(args.out, os.W_OK)):
        raise ValueError(f"--out must be a folder that can be written to, got {args.out}")
    there = (args.out / "last.pt").exists()
    if there and not args.resume:
        raise ValueError(f"{args.out}: holds a run already; add --resume, or name another folder")
    if args.resume and not there:
        raise ValueError(f"{args.out}: holds no run (last.pt) for --resume to go on with")
    with processes(device) as group:
        sources = [
            open_source(args.data, split, args.classes, args.ignore) for split in args.splits
        ]
        limits = {"memory": args.memory * 2**30 / 2, "workers": args.workers}
        train, val = (evaluate.load(source, **limits) for source in sources)
        command = getattr(args, "command_line", shlex.join(sys.argv))
        trainer = Trainer(
            recipe, train, val, args.out, device, args.validations, args.workers, command, group
        )
        if args.resume:
            trainer.resume()
        if group.rank == 0:
            _announce(trainer)
        status = trainer.run()
        if group.rank == 0 and status == 0:
            print(f"mIoU {trainer.best:.4f} on {args.splits[1]}: {args.out}/best.safetensors")
        return status


def _announce(trainer: Trainer) -> None:
    parameters = sum(p.numel() for p in trainer.model.parameters())
    crop = trainer.batches.augmentation.crop
    print(
        f"{len(trainer.train)} examples, {len(trainer.train.classes)} classes, crops {crop[0]}x{crop[1]};"
        f" {parameters} parameters, {trainer.recipe.dtype}, {trainer.group.world} x {trainer.device};"
        f" step {trainer.step} of {trainer.steps}"
    )
