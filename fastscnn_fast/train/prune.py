"""Structured pruning: which channels a network can do without, and the narrower network without them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arch.config import Config, Size, picture_size
from ..arch.network import ConvBNAct, InvertedResidual
from ..arch.structure import check
from ..extras import need
from ..program.arithmetic import ARITHMETICS, Arithmetic
from ..program.memory import rounded_up
from ..program.program import fast_scnn, layer_sizes, operations
from ..runtime.model import FastSCNN
from .loss import with_background
from .step import deployable, rebuilt

#: Where a config holds a width: the field, and the indices within it.
Place = tuple[str, tuple[int, ...]]

#: The size that operations and time are counted at, where a network has none of its own.
SIZE = (512, 1024)
#: How channels are weighed.
IMPORTANCES = ("taylor", "norm")


def _work(config: Config, arithmetic: Arithmetic, size: tuple[int, int]) -> float:
    return sum(layer.work(arithmetic.channels) for layer in layer_sizes(config, *size))


@dataclass(frozen=True)
class _Width:
    """Channels that can only be cut together: the places of their number, and what makes them.

    Attributes:
        sources: the convolutions, each with how many of the width's channels one of its channels stands for.
    """

    places: tuple[Place, ...]
    sources: tuple[tuple[nn.Conv2d, int], ...]

    def of(self, config: Config) -> int:
        name, indices = self.places[0]
        value = getattr(config, name)
        for index in indices:
            value = value[index]
        return cast(int, value)

    def put(self, config: Config, channels: int) -> Config:
        for name, indices in self.places:
            value = _put(getattr(config, name), indices, channels)
            config = replace(config, **{name: value})
        return config


def _put(value: Any, indices: tuple[int, ...], channels: int) -> Any:
    """``value``, a number or tuples of such, with ``channels`` in one place."""
    if not indices:
        return channels
    first, *rest = indices
    return tuple(
        _put(one, tuple(rest), channels) if index == first else one
        for index, one in enumerate(value)
    )


def _makers(model: FastSCNN) -> dict[Place, list[nn.Conv2d]]:
    """The convolutions that make the channels that each place of a config counts."""
    down, features = model.learning_to_downsample, model.global_features
    fusion, head = model.feature_fusion, model.classifier
    blocks = [down.stem, down.dsconv1.pointwise, down.dsconv2.pointwise]
    makers: dict[Place, list[nn.Conv2d]] = {
        ("downsample_channels", (k,)): [block.conv] for k, block in enumerate(blocks)
    }
    stages = (features.bottleneck1, features.bottleneck2, features.bottleneck3)
    for s, stage in enumerate(stages):
        for b, part in enumerate(stage):
            residual = cast(InvertedResidual, part)
            makers["bottlenecks", (s, b, 0)] = [residual.expand.conv]
            makers["bottlenecks", (s, b, 1)] = [residual.project.conv]
    refined = [fusion.refine.conv] if model.config.fusion_refine == "dense" else []
    makers["pyramid_channels", ()] = [features.pyramid.out.conv, *refined]
    fused = [fusion.low, head.dsconv1.pointwise, head.dsconv2.pointwise]
    makers["fusion_channels", ()] = [block.conv for block in fused]
    return makers


class Pruning:
    """What can be cut off one network, and what that would cost it.

    torch-pruning's dependency graph finds what must go together: the channels that a residual or the skip connection adds
    to each other, their batch norms, and what reads them. Where a config has one number for several
    convolutions, each loses as many channels, those that it can best do without.

    Attributes:
        model: a copy of the network in eval mode, without auxiliary heads, for :meth:`observe`.

    Args:
        model: the network.
        arithmetic: whose blocks of channels the widths are to be multiples of.
        size: of the pictures that operations and time are counted for.

    Raises:
        ImportError: torch-pruning is not installed.
        Unfusable: the network is no longer the one that its config describes; the message says where.
    """

    def __init__(self, model: FastSCNN, arithmetic: Arithmetic, size: tuple[int, int]) -> None:
        need("pruning", "prune", "torch_pruning")
        import torch_pruning

        check(model)
        self._library = torch_pruning
        self.arithmetic, self.size = arithmetic, size
        with torch.inference_mode(False), torch.enable_grad():  # what it traces by
            self.model = deployable(model).float().requires_grad_(True)
            self._graph = torch_pruning.DependencyGraph().build_dependency(
                self.model,
                torch.zeros(1, model.config.in_channels, 64, 64, device=self._device),
                forward_fn=lambda network, x: network.reference(x),
            )
        self.widths = tuple(self._ties())
        self.scores: dict[nn.Conv2d, Tensor] = {}

    @property
    def _device(self) -> torch.device:
        return self.model.classifier.conv.weight.device

    def _group(self, conv: nn.Conv2d, channels: list[int]) -> Any:
        """These channels of what ``conv`` makes, with all that hangs on them."""
        prune = self._library.prune_conv_out_channels
        return self._graph.get_pruning_group(conv, prune, channels)

    def _coupled(self, conv: nn.Conv2d) -> frozenset[nn.Module]:
        """The convolutions that lose channels of their results where ``conv`` does."""
        return frozenset(
            dependency.target.module
            for dependency, _ in self._group(conv, [0])
            if dependency.handler == self._library.prune_conv_out_channels
        )

    def _ties(self) -> Iterator[_Width]:
        makers = _makers(self.model)
        place_of = {conv: place for place, convs in makers.items() for conv in convs}
        tied = {place: {place} for place in makers}
        for conv, place in place_of.items():
            for other in self._coupled(conv) & place_of.keys():
                together = tied[place] | tied[place_of[cast(nn.Conv2d, other)]]
                tied |= dict.fromkeys(together, together)
        end = ("bottlenecks", (2, len(self.model.config.bottlenecks[2]) - 1, 1))
        for places in {min(together): sorted(together) for together in tied.values()}.values():
            convs = [conv for place in places for conv in makers[place]]
            roots = {self._coupled(conv): conv for conv in reversed(convs)}
            branches = self.model.global_features.pyramid.branches if end in places else ()
            parts = ((cast(ConvBNAct, branch).conv, len(branches)) for branch in branches)
            yield _Width(tuple(places), (*((conv, 1) for conv in roots.values()), *parts))

    def observe(self) -> None:
        """Counts what the gradients of :attr:`model` say of each channel, and clears them.

        That is by how much the loss they are of would change to first order without the channel (Molchanov et
        al., 2019); over several losses, the sum of its absolute values.
        """
        self._add(
            self._library.importance.GroupTaylorImportance(
                normalizer=None, multivariable=True, group_reduction="sum"
            )
        )
        self.model.zero_grad()

    def _add(self, importance: Callable[[Any], Tensor]) -> None:
        for width in self.widths:
            for conv, _ in width.sources:
                found = importance(self._group(conv, list(range(conv.out_channels))))
                self.scores[conv] = self.scores.get(conv, 0) + found

    def choose(self, most: float, loss: Callable[[], float] | None = None) -> Config:
        """The config with at most so many operations that costs the least for the time that it saves.

        A few channels of one width are cut after the other, always those that cost the least by time. No residual
        connection comes or goes.

        Args:
            most: operations.
            loss: of :attr:`model`, which is called with what is cut silenced, in training mode, with batch norms that
                keep no statistics and without dropout: a cut costs what that becomes greater by. Without it cuts
                cost what the channels are worth.

        Raises:
            ValueError: not even the narrowest network has so few operations.
        """
        if not self.scores:
            self._add(self._library.importance.GroupMagnitudeImportance())
        config, whole = self.model.config, operations(self.model.config, *self.size)
        with self._trial() if loss else nullcontext():
            now = loss() if loss else 0.0
            price: dict[_Width, float] = {}
            while operations(config, *self.size) > most:
                work = _work(config, self.arithmetic, self.size)
                saved: dict[_Width, float] = {}
                for width in self.widths:
                    if (narrow := self._next(width, config)) is not None:
                        by = work - _work(narrow, self.arithmetic, self.size)
                        if by > 0:
                            saved[width] = by
                if not saved:
                    share = operations(config, *self.size) / whole
                    raise ValueError(
                        f"flops must be at least {share:.3f} of what they are for widths in multiples of"
                        f" {self.arithmetic.channels}, which {self.arithmetic.name} likes, got {most / whole:.3f}"
                    )
                # Prices of before the last cut tell where to look first; the one that is taken is of now.
                fresh: set[_Width] = set()
                while True:
                    width = min(saved, key=lambda w: price.get(w, -math.inf) / saved[w])
                    narrow = cast(Config, self._next(width, config))
                    if width in fresh:
                        break
                    price[width] = self._price(width, config, narrow, loss) - now
                    fresh.add(width)
                if loss:
                    self._silence(width, narrow)
                    now += price[width]
                del price[width]
                config = narrow
        return config

    def _next(self, width: _Width, config: Config) -> Config | None:
        """With an eighth of the channels less that :attr:`model` has, in whole blocks, or one block."""
        block, channels = self.arithmetic.channels, width.of(config)
        step = max(width.of(self.model.config) // 8 // block, 1) * block
        parts = max(share for _, share in width.sources)
        for fewer in range(max(rounded_up(channels, block) - step, block), 0, -block):
            narrow = width.put(config, fewer)
            fits = fewer < channels and fewer % parts == 0
            if fits and _residuals(narrow) == _residuals(config):
                return narrow
        return None

    def _price(
        self, width: _Width, config: Config, narrow: Config, loss: Callable[[], float] | None
    ) -> float:
        if loss is None:
            least = zip(self._least(width, narrow), self._least(width, config))
            return sum(
                float(self.scores[conv][more[len(less) :]].double().sum())
                for (conv, more), (_, less) in least
            )
        before = copy.deepcopy(self.model.state_dict())
        self._silence(width, narrow)
        found = loss()
        self.model.load_state_dict(before)
        return found

    def _least(self, width: _Width, config: Config) -> list[tuple[nn.Conv2d, list[int]]]:
        """The channels that :attr:`model` has more than ``config``, those worth least, by the convolution that makes them."""
        fewer = width.of(self.model.config) - width.of(config)
        return [
            (conv, self.scores[conv].sort(stable=True).indices[: fewer // share].tolist())
            for conv, share in width.sources
        ]

    @torch.no_grad()
    def _silence(self, width: _Width, config: Config) -> None:
        """Makes zeros of the channels that ``config`` has not."""
        for conv, channels in self._least(width, config):
            for dependency, indices in self._group(conv, channels) if channels else ():
                module = dependency.target.module
                makes = dependency.handler == self._library.prune_conv_out_channels
                if makes or isinstance(module, nn.modules.batchnorm._BatchNorm):
                    for parameter in module.parameters(recurse=False):
                        parameter[indices] = 0

    @contextmanager
    def _trial(self) -> Iterator[None]:
        """Batch norms go by the statistics of each batch, as training would soon have them; afterwards all is as before."""
        before = copy.deepcopy(self.model.state_dict())
        norms = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        self.model.train()
        self.model.classifier.dropout.eval()
        for norm in norms:
            norm.momentum = 0.0
        try:
            with torch.no_grad():
                yield
        finally:
            for norm, momentum in zip(norms, momenta):
                norm.momentum = momentum
            self.model.load_state_dict(before)
            self.model.eval()

    def cut(self, config: Config) -> FastSCNN:
        """The network of ``config``, which :meth:`choose` has found, without the channels that are worth least; in eval mode.

        :attr:`model` is that network afterwards, as far as torch-pruning is concerned, and can be cut no further.
        """
        for width in self.widths:
            for conv, channels in self._least(width, config):
                if channels:
                    self._group(conv, sorted(channels)).prune()
        return rebuilt(self.model, config)


def _residuals(config: Config) -> tuple[bool, ...]:
    return tuple(layer.residual for layer in fast_scnn(config).layers)


def prune(
    model: FastSCNN,
    flops: float,
    batches: Iterable[tuple[Tensor, Tensor]] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    arithmetic: str = "bfloat16",
    size: Size | None = None,
) -> FastSCNN:
    """A narrower copy of a trained network, without the channels that it can best do without for the time that they take.

    It is to be trained further. Many small cuts with training between them cost less than one large one::

        for share in (0.9, 0.8, 0.7, 0.6, 0.5):
            model = prune(model, share * whole / operations_of(model), batches)
            train(model)

    which is what ``python -m fastscnn_fast prune`` and :class:`~fastscnn_fast.train.pruner.Pruner` do on labelled
    pictures.

    Args:
        model: stays as it is.
        flops: operations that are to be left at most, as a share of those of ``model``.
        batches: (x, labels) as ``loss`` takes them, x as the network does: normalised floats or raw uint8 pixels
            (N, C, H, W). A channel is worth as much as the loss would change without it, to first order, and what a cut
            costs is tried out on them: all are kept in memory, a few are enough. Without batches a channel is worth the norm of
            its weights, compared with its like.
        loss: of full-size logits (N, K, H, W) in float32, as all is computed whatever the dtypes of ``model`` and x are, and
            labels; by default the cross-entropy, of one class alone that of its labels 1 and 0, labels of 255 left out.
        arithmetic: whose time is to be saved, a key of :data:`fastscnn_fast.program.arithmetic.ARITHMETICS`; widths become
            multiples of its ``channels``: 32 of bfloat16, 16 of float32, 64 of int8.
        size: (height, width) of the pictures, that operations and time are counted at, or the side of a square; by default
            the network's own, or 512x1024.

    Returns:
        an ordinary network of the same dtype on the same device, in eval mode, without auxiliary heads and without ranges for
        int8.

    Raises:
        ImportError: torch-pruning is not installed.
        TypeError: ``size`` is none.
        Unfusable: the model is no longer the network that its config describes.
        ValueError: ``flops`` is not between 0 and 1 or widths of these multiples allow no network of so few; ``arithmetic`` is
            unknown; ``batches`` is empty, or the loss not finite.
    """
    if not 0 < flops < 1:
        raise ValueError(f"flops must be above 0 and below 1, got {flops}")
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"arithmetic must be one of {', '.join(ARITHMETICS)}, got {arithmetic!r}")
    at = model.config.size or SIZE if size is None else picture_size(size)
    pruning = Pruning(model, ARITHMETICS[arithmetic], at)
    shown = None if batches is None else list(batches)
    if shown == []:
        raise ValueError("batches must hold at least one (x, labels), got none")
    weight = model.classifier.conv.weight

    def value(x: Tensor, labels: Tensor) -> Tensor:
        x = x.to(weight.device, torch.float32 if x.is_floating_point() else x.dtype)
        return (loss or _cross_entropy)(pruning.model.reference(x), labels.to(weight.device))

    def total() -> float:
        return sum(float(value(*batch)) for batch in shown or ())

    for batch in shown or ():
        with torch.inference_mode(False), torch.enable_grad():
            if not (now := value(*batch)).isfinite():
                raise ValueError(f"loss must be finite, got {float(now)}")
            now.backward()
        pruning.observe()
    most = flops * operations(model.config, *at)
    return pruning.cut(pruning.choose(most, total if shown else None)).to(weight.dtype)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(with_background(logits), labels.long(), ignore_index=255)
