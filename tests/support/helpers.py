"""What the tests share: how equality is measured, poisoned memory, and networks whose every parameter matters."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastscnn_fast.arch.config import Config
from fastscnn_fast.arch.network import resize
from fastscnn_fast.backends import registry
from fastscnn_fast.ops import schemas
from fastscnn_fast.program.layers import Layer
from fastscnn_fast.runtime.model import FastSCNN

#: The checkout.
ROOT = Path(__file__).parents[2]

# ---------------------------------------------------------------- kernels


class Kernels(NamedTuple):
    """An arithmetic of the cpu backend on an instruction set."""

    arithmetic: str
    isa: str

    @staticmethod
    def of_floats() -> list[Kernels]:
        """Those that are compiled in and run here; int8 has tests of its own, of equality."""
        return [
            Kernels(name, isa)
            for name, one in registry.CPU_ARITHMETICS.items()
            for isa in registry.isas(name)
            if not one.quantised
        ]

    @property
    def dtype(self) -> torch.dtype:
        return registry.CPU_ARITHMETICS[self.arithmetic].dtype

    @property
    def precision(self) -> str:
        return registry.CPU_ARITHMETICS[self.arithmetic].precision

    def __str__(self) -> str:
        return f"{self.arithmetic}-{self.isa}"


class Bound(NamedTuple):
    """How far from float64 an arithmetic may be: what every test of parity goes by, whatever the package says of itself.

    ``op`` and ``network`` are factor and floor of :func:`assert_parity`, for a layer by itself and for logits: an
    untrained network amplifies rounding, torch's own float32 result errs by up to 1.5e-5. ``labels`` is the share
    of pixels whose class may differ. ``rounding`` is as far as one number is moved each time that it is rounded
    (test_fuzz.py).
    """

    op: tuple[float, float]
    network: tuple[float, float]
    labels: float
    rounding: float


#: In "high", a float a is a1 + a2 + r, where a1 is a in bfloat16 (8 bits), a2 is a - a1 in bfloat16 and
#: |r| <= 2^-16 |a|; of a product a b the sum a1 b1 + a1 b2 + a2 b1 is kept. What is lost, a2 b2 + r_a b + a r_b, has
#: a mean square of 2^-17.7 |a b| (2^-9.25 for each rounding of numbers of all sizes, twice in each of the three
#: terms) with random signs, so a sum of products errs by 2^-17.7 of its own size, and two or three such sums in a
#: row, or one whose mean is taken off, by about twice that: 2^-16. Products are then exact to 2^-18 where float32's
#: are to 2^-24, which a network amplifies alike, and its labels differ as much more often.
#: Both operands of a product in TF32 (a GPU's "high") are cut to 10 bits: each errs by up to 2^-10, half of that on
#: average, and up to three products follow each other.
BOUNDS = {
    "float32": Bound((2.0, 1e-6), (2.0, 1e-5), 1e-4, 1e-6),
    "bfloat16": Bound((1.5, 1e-6), (1.5, 1e-5), 5e-3, 2**-8),
    "float16": Bound((1.5, 1e-6), (1.5, 1e-5), 1e-3, 2**-11),
    "high": Bound((2.0, 2**-16), (2.0**6, 1e-5), 2.0**6 * 1e-4 / 2, 3 * 2**-16),
    "tf32": Bound((2.0, 2**-9), (2.0, 2**-9), 5e-3, 2**-10),
}


# ---------------------------------------------------------------- equality


def err(y: Tensor, ref64: Tensor, least: float = 0.0) -> float:
    """``||y - ref64|| / ||ref64 - its mean per channel||``; channels are dimension 1.

    A constant offset cannot hide an error that way. Where a channel holds one value, or the reference is
    constant, the mean is left in. ``least`` is the smallest deviation per value that counts as one. A result
    with NaN or infinity is infinitely wrong.
    """
    assert ref64.dtype == torch.float64, "the reference must be computed in float64"
    assert ref64.isfinite().all(), "the reference itself is not finite"
    assert y.shape == ref64.shape, f"shape {tuple(y.shape)}, expected {tuple(ref64.shape)}"
    if not y.isfinite().all():
        return float("inf")
    others = [d for d in range(ref64.ndim) if d != 1]
    size = ref64.norm().item()
    spread = (ref64 - ref64.mean(others, keepdim=True)).norm().item()
    if spread <= 1e-9 * size:
        spread = size
    spread = max(spread, least * ref64.numel() ** 0.5)
    difference = (y.double() - ref64).norm().item()
    if difference == 0:
        return 0.0
    return difference / spread if spread > 0 else float("inf")


def border(x: Tensor, width: int = 2) -> Tensor:
    """The outermost ``width`` rows and columns of (N, C, H, W) as (N, C, values)."""
    strips = (x[..., :width, :], x[..., -width:, :], x[..., :width], x[..., -width:])
    return torch.cat([strip.flatten(2) for strip in strips], dim=2)


def assert_parity(
    y: Tensor,
    own: Tensor,
    ref64: Tensor,
    factor: float = 2.0,
    floor: float = 1e-6,
    least: float = 0.0,
) -> None:
    """``y`` (N, C, H, W) errs at most ``factor`` times as much as torch's ``own`` result in that dtype.

    Both are measured against ``ref64`` by :func:`err`, over everything and over the border alone; errors up
    to ``floor`` pass in any case.
    """
    for where, part in (("everywhere", lambda x: x), ("on the border", border)):
        ours, torchs = (err(part(z), part(ref64), least) for z in (y, own))
        bound = max(factor * torchs, floor)
        assert ours <= bound < float("inf"), (
            f"error {where} {ours:.2e}, bound {bound:.2e}, torch's {torchs:.2e}"
        )


def png(width: int, height: int, data: bytes, depth: int, kind: int, interlaced: int = 0) -> bytes:
    """A PNG file of which Pillow could not write every kind; ``data`` are its filtered rows, perhaps too few."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlaced)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    if kind == 3:
        chunks.insert(1, (b"PLTE", bytes(range(3 << min(depth, 6)))))
    packed = (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


class Moved(TorchDispatchMode):
    """Within, every number that arithmetic makes is moved by ``step`` of itself, up or down by chance."""

    ARITHMETIC = (
        torch.ops.aten.convolution,
        torch.ops.aten.upsample_bilinear2d,
        torch.ops.aten._adaptive_avg_pool2d,
        torch.ops.aten.mean,
        torch.ops.aten._softmax,
        torch.ops.aten.add,
        torch.ops.aten.sub,
        torch.ops.aten.mul,
        torch.ops.aten.div,
    )

    def __init__(self, step: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.step = step

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        y = func(*args, **(kwargs or {}))
        if func.overloadpacket in self.ARITHMETIC:
            y = y * (1 + self.step * (2 * torch.randint(2, y.shape) - 1))
        return y


def honest(run64: Callable[[], Tensor], step: float, times: int = 4) -> list[Tensor]:
    """What ``run64`` makes of the same where every number on its way is :class:`Moved` by ``step``, so many times."""
    results = []
    for _ in range(times):
        with Moved(step):
            results.append(run64())
    return results


def assert_honest(
    y: Tensor, own: Tensor, ref64: Tensor, others: list[Tensor], factor: float
) -> None:
    """As :func:`assert_parity`, for what no one has, whatever that does to rounding errors.

    Up to the errors of ``others``, from :func:`honest`, in mean square an error passes in any case; nothing else
    does where torch's own result is not finite, as it is on an AMX processor (2.13, bfloat16) for a 3x3 of
    stride 2 without padding over a width of 3.
    """
    assert y.shape == ref64.shape and y.isfinite().all() and ref64.isfinite().all()
    if not own.isfinite().all():
        own = ref64
    for where, part in (("everywhere", lambda x: x), ("on the border", border)):
        ours, torchs, *least = (
            (part(z.double()) - part(ref64)).norm().item() for z in (y, own, *others)
        )
        bound = max(factor * torchs, (sum(e * e for e in least) / len(least)) ** 0.5)
        assert ours <= bound < float("inf"), (
            f"error {where} {ours:.2e}, bound {bound:.2e}, torch's {torchs:.2e}"
        )


def assert_labels(labels: Tensor, logits64: Tensor, tolerance: float) -> Tensor:
    """``labels`` (N, H, W) are the classes of the largest of ``logits64`` (N, K, H, W).

    Another class passes where its logit is within ``tolerance`` of the largest. Returns by how much each is below.
    One class alone is told from the background, label 0, whose logit is 0.
    """
    assert labels.dtype == torch.uint8
    if logits64.shape[1] == 1:
        logits64 = torch.cat([torch.zeros_like(logits64), logits64], 1)
    classes, largest = logits64.shape[1], int(labels.max())
    assert largest < classes, f"label {largest} is none of {classes} classes"
    chosen = logits64.gather(1, labels.long()[:, None])[:, 0]
    gap = logits64.amax(1) - chosen
    assert (gap <= tolerance).all(), (
        f"{int((gap > tolerance).sum())} of {gap.numel()} labels are wrong, a logit by {gap.max():.2e}"
    )
    return gap


def probabilities_of(logits: Tensor) -> Tensor:
    """What each class's probability should be."""
    return torch.sigmoid(logits) if logits.shape[1] == 1 else torch.softmax(logits, 1)


# ---------------------------------------------------------------- memory

#: Bytes: more than a tile of any kernel reaches beyond the image that it begins in.
GUARD = 1 << 16


class Guarded:
    """``size`` bytes between two guard zones, all of value ``byte``: as floats, 255 makes NaN."""

    def __init__(self, size: int, byte: int = 255, device: torch.device | str = "cpu") -> None:
        self._byte = byte
        self._memory = torch.full((size + 2 * GUARD,), byte, dtype=torch.uint8, device=device)
        self.inside = self._memory[GUARD : GUARD + size]

    def intact(self) -> bool:
        """Whether the guard zones are as they were."""
        zones = (self._memory[:GUARD], self._memory[-GUARD:])
        return all(bool((zone == self._byte).all()) for zone in zones)


LAYOUTS = (
    "contiguous",
    "channels_last",
    "cropped",
    "cropped_channels_last",
    "every_second",
    "transposed",
    "expanded",
)


def in_layout(x: Tensor, layout: str, byte: int = 255) -> Tensor:
    """``x`` (N, C, H, W) copied into memory of that layout; ``byte`` is all around it and in its gaps.

    An "expanded" result repeats the first column of x's first image.
    """
    n, c, h, w = x.shape

    def memory(*shape: int) -> Tensor:
        guarded = Guarded(prod(shape) * x.element_size(), byte, x.device)
        return guarded.inside.view(x.dtype).view(shape)

    if layout == "expanded":
        column = memory(1, c, h, 1)
        column.copy_(x[:1, ..., :1])
        return column.expand(n, c, h, w)
    views = {
        "contiguous": lambda: memory(n, c, h, w),
        "channels_last": lambda: memory(n, h, w, c).permute(0, 3, 1, 2),
        "cropped": lambda: memory(n, c, h + 3, w + 5)[..., 1 : h + 1, 2 : w + 2],
        "cropped_channels_last": lambda: memory(n, h + 3, w + 5, c + 1)[
            :, 1 : h + 1, 2 : w + 2, :c
        ].permute(0, 3, 1, 2),
        "every_second": lambda: memory(n, c, 2 * h, 2 * w)[..., ::2, ::2],
        "transposed": lambda: memory(n, c, w, h).transpose(2, 3),
    }
    view = views[layout]()
    view.copy_(x)
    return view


def run_poisoned(op: str, *args: Any, backend: str = "cpu") -> Tensor:
    """The op on ``backend``, into a poisoned result between guard zones, on cpu with poisoned scratch.

    ``args`` are those of ``torch.ops.fastscnn.<op>`` without the backend. Whatever the op does not
    write stays NaN, or differs between two fillings where the result has no NaN. The channels that pad
    the result's memory must come out as zeros: the layers of a network rely on that (on a GPU, of those
    up to a multiple of 16; it leaves the rest alone), but of bytes, which may be anything there.
    """
    _, result, fill = schemas.DEFINITIONS[op]
    like = result(*args, backend)
    written: list[Tensor] = []
    for byte in (255,) if like.dtype.is_floating_point else (255, 0):
        guarded = Guarded(like.untyped_storage().nbytes(), byte, like.device)
        inside = guarded.inside.view(like.dtype)
        out = inside.as_strided(like.shape, like.stride(), inside.storage_offset())
        if backend == "cpu":
            registry.cpu_module().fill_scratch(byte)
        fill(out, *args, backend)
        assert guarded.intact(), f"{op} wrote outside of its result"
        padding = torch.ones(inside.shape, dtype=torch.bool, device=like.device)
        padding.as_strided(like.shape, like.stride()).fill_(False)
        if backend in ("triton", "cuda") and padding.any():
            n, c, h, w = like.shape
            padding.view(n, h, w, -1)[..., -(-c // 16) * 16 :] = False
        of_bytes = not like.dtype.is_floating_point
        assert of_bytes or (inside[padding] == 0).all(), (
            f"{op} left something in the padding channels"
        )
        written.append(out)
    assert torch.equal(written[0], written[-1]) or like.dtype.is_floating_point, (
        f"{op} left part of its result unwritten, or depends on old scratch"
    )
    return written[0]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch.set_num_threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- weights


@contextmanager
def drawn_once(seed: int = 1) -> Iterator[None]:
    """Within, torch draws the same random numbers in every run, whatever FASTSCNN_SEED is; around it nothing changes.

    For what is said of one network or one picture, and does not hold for every draw.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        yield


def random_weights(layer: Layer, gain: float = 2.0) -> dict[str, Tensor]:
    """What ``layer.weights()`` names, in float32; a product with them multiplies the size by ``gain``.

    With inputs of size 1 every activation then clamps a part of its values, relu6 on both sides.
    """
    tensors = {}
    for name, shape in layer.weights().items():
        if name == "std":
            tensors[name] = torch.empty(shape).uniform_(0.2, 0.4)
        elif name.endswith("weight"):
            fan_in = shape[2] if name == "branch_weight" else prod(shape[1:])
            tensors[name] = torch.randn(shape) * gain / fan_in**0.5
        else:
            tensors[name] = torch.randn(shape) / 2
    return tensors


def randomise(model: nn.Module) -> nn.Module:
    """Weights that keep activations at size 1, so that no layer's share is lost, and busy batch norms.

    Every batch norm has statistics and an affine of its own: folding cannot go unnoticed.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model


def small_network(num_classes: int = 5, **overrides: Any) -> FastSCNN:
    """A network of every kind of layer that fuses quickly, in eval mode."""
    overrides = {"bottleneck_repeats": (1, 2, 1), **overrides}
    network = randomise(FastSCNN(num_classes, **overrides)).eval()
    assert isinstance(network, FastSCNN)
    return network


def noise(batch: int, channels: int, height: int, width: int) -> Tensor:
    """Pictures (N, C, H, W) with structure of every size, as real ones have, so that no layer sees grey."""
    octaves = [
        resize(
            torch.randn(batch, channels, (height >> k) + 1, (width >> k) + 1),
            (height, width),
            align_corners=False,
        )
        for k in range(7)
    ]
    return torch.stack(octaves).sum(0) / 2


def lifelike(config: Config, pictures: Tensor | None = None) -> FastSCNN:
    """A network that has seen ``pictures`` (noise by default) but learnt nothing, in eval mode.

    Every activation has the size that training gives it: the batch norms' statistics are those of the
    pictures. The last layer is scaled so that each class's logits have mean 0 and deviation 1 on them:
    otherwise one class would win everywhere.
    """
    model = FastSCNN.from_config(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.momentum = None  # statistics of all batches seen
    if pictures is None:
        pictures = noise(8, config.in_channels, 96, 128)
    with torch.no_grad():
        model.train().reference(pictures)
        logits = model.eval().reference(pictures)
        last = model.classifier.conv
        assert last.bias is not None
        deviation, mean = torch.std_mean(logits, (0, 2, 3))
        last.weight /= deviation[:, None, None, None]
        last.bias.copy_((last.bias - mean) / deviation)
    return model
