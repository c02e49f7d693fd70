"""Random views of labelled pictures: resize, crop, flip; colours, and what cameras and weather do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from .sources import IGNORE, Example, Pixels

_BANK = 1 << 20  # numbers of noise


@dataclass(frozen=True)
class Augmentation:
    """Random views of an example: resize, crop, flip, colours.

    Args:
        crop: (height, width) of the network's input.
        size: (height, width) that a whole picture has as the network's input, before the random resize;
            the picture's own by default. Labels are not enlarged along: a crop of them is smaller than the
            input's by ``size / picture's size``.
        scale: bounds of the random resize, whose logarithm is uniform.
        flip: mirror every other example.
        colour: strength of the changes in brightness, contrast, saturation and hue; 0 for none.
        photo: strength of what cameras and weather do: gamma, colour cast, blur, noise; 0 for none.
        ignore: label of what a crop has beside the picture.
    """

    crop: tuple[int, int]
    size: tuple[int, int] | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    colour: float = 0.2
    photo: float = 0.0
    ignore: int = IGNORE

    def label_size(self, height: int, width: int) -> tuple[int, int]:
        """Size of a crop's labels, for pictures of height x width."""
        rows, columns = self.size or (height, width)
        return (
            max(1, round(self.crop[0] * height / rows)),
            max(1, round(self.crop[1] * width / columns)),
        )

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """One view; picture (*crop, C) and labels of :meth:`label_size`."""
        height, width = example.labels.shape
        out = self.label_size(height, width)
        scale = math.exp(rng.uniform(math.log(self.scale[0]), math.log(self.scale[1])))
        boxes = [_span(rng, length, wanted / scale) for length, wanted in zip((height, width), out)]
        mirrored = self.flip and rng.random() < 0.5

        # Read from the picture the whole pixels under the box, change them, then resize.
        inside = [(max(0.0, a), min(float(n), b)) for (a, b), n in zip(boxes, (height, width))]
        rows, columns = (slice(math.floor(a), math.ceil(b)) for a, b in inside)
        images = recoloured(example.picture[rows, columns], self.colour, self.photo, rng)
        labels = Image.fromarray(example.labels[rows, columns])
        part = tuple((a - s.start, b - s.start) for (a, b), s in zip(inside, (rows, columns)))
        means = _channels(example.picture[::16, ::16].mean((0, 1)).astype(int).tolist())
        views = [
            _resized(image, part, boxes, inside, self.crop, Image.Resampling.BILINEAR, mean)
            for image, mean in zip(images, means)
        ]
        truth = _resized(labels, part, boxes, inside, out, Image.Resampling.NEAREST, self.ignore)
        if mirrored:
            *views, truth = (x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for x in (*views, truth))
        view = [np.asarray(image).reshape(*self.crop, -1) for image in views]
        return Example(view[0] if len(view) == 1 else np.concatenate(view, 2), np.asarray(truth))


def _channels(values: Sequence[int]) -> list[tuple[int, ...] | int]:
    """A value for each channel, as images of grey or colours and of alpha have them."""
    colours = len(values) - 1 + len(values) % 2
    first = values[0] if colours == 1 else tuple(values[:3])
    return [first, *values[colours:]]


def recoloured(
    pixels: Pixels, colour: float, photo: float, rng: np.random.Generator
) -> list[Image.Image]:
    """Pixels (H, W, C) in other colours, of the strengths that :class:`Augmentation` describes: an image in grey
    or RGB and, where there is an alpha channel, that as it was."""
    *_, count = pixels.shape
    grey = count < 3
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if grey else pixels[..., :3]))
    alpha = [] if count % 2 else [Image.fromarray(np.ascontiguousarray(pixels[..., -1]))]
    c, p = colour, photo
    if not (c or p):
        return [image, *alpha]

    def spread(strength: float, size: int | None = None) -> NDArray[np.float64]:
        return np.asarray(rng.uniform(-strength, strength, size))

    brightness, contrast, saturation = 1 + spread(c, 3)
    hue = spread(0.3 * c)
    gamma = np.exp(spread(0.6 * p))
    cast = np.exp(spread(0.15 * p, 3))
    levels = (np.arange(256) / 255) ** gamma
    levels = ((levels - 0.5) * contrast + 0.5) * brightness
    table = np.clip(255 * (np.ones((1, 1)) if grey else cast[:, None]) * levels, 0, 255)
    image = image.point(np.rint(table).astype(int).ravel().tolist())
    if not grey:
        image = image.convert("RGB", _colour_matrix(float(saturation), float(hue)))
    if rng.random() < 0.3 * p:
        image = image.filter(ImageFilter.BoxBlur(rng.uniform(0.3, 1.5)))
    if rng.random() < 0.5 * p:
        image = _noisy(image, rng)
    return [image, *alpha]


def _span(rng: np.random.Generator, length: int, wanted: float) -> tuple[float, float]:
    """A random window of ``wanted`` pixels over a side of ``length``; it contains the side or lies in it."""
    low, high = sorted((0.0, length - wanted))
    start = rng.uniform(low, high)
    return start, start + wanted


def _resized(
    image: Image.Image,
    part: Sequence[tuple[float, float]],
    boxes: Sequence[tuple[float, float]],
    inside: Sequence[tuple[float, float]],
    size: tuple[int, int],
    how: Image.Resampling,
    beside: int | tuple[int, ...],
) -> Image.Image:
    """``part`` of the image, which is what is ``inside`` the picture of ``boxes``, on (height, width)."""
    spans = []
    for (start, stop), (first, last), length in zip(boxes, inside, size):
        pitch = length / (stop - start)
        begin = min(length - 1, round((first - start) * pitch))
        spans.append((begin, max(begin + 1, round((last - start) * pitch))))
    (top, bottom), (left, right) = spans
    (y0, y1), (x0, x1) = part
    piece = image.resize((right - left, bottom - top), how, (x0, y0, x1, y1))
    if piece.size == size[::-1]:
        return piece
    canvas = Image.new(image.mode, size[::-1], beside)
    canvas.paste(piece, (left, top))
    return canvas


def _colour_matrix(saturation: float, hue: float) -> tuple[float, ...]:
    """RGB -> RGB: chroma scaled by ``saturation`` and turned by ``hue`` radians, in YIQ."""
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    cos, sin = saturation * math.cos(hue), saturation * math.sin(hue)
    turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    matrix = np.linalg.inv(to_yiq) @ turn @ to_yiq
    return tuple(np.concatenate([matrix, np.zeros((3, 1))], 1).ravel().tolist())


@cache
def _bank() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(_BANK, np.float32)


def _noisy(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Gaussian noise, taken from one fixed bank at a random place."""
    bank, pixels = _bank(), np.asarray(image)
    start = int(rng.integers(_BANK))
    noise = np.resize(
        np.roll(bank, -start) if pixels.size > _BANK - start else bank[start:], pixels.size
    )
    noise = noise.reshape(pixels.shape) * np.float32(rng.uniform(2, 12))
    noise += pixels
    return Image.fromarray(np.clip(noise, 0, 255, out=noise).astype(np.uint8))
