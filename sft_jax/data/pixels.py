"""Pixels that are made when a batch is, and how those of training are changed: pure functions of (seed, visit, image).

Each time that an image is read it is changed anew, and what is drawn depends on nothing but the seed, which document it
is and how often it was read before: on no batch, order, host or worker. Only what images are mixed with is of the
batch. Changes are made to grey levels of 8 bits, before they are normalised. Holds numpy and Pillow only.
"""

import hashlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Float32
from PIL import Image, ImageEnhance, ImageOps
from scipy.special import betaincinv

from sft_jax.config.data import Images
from sft_jax.data.batch import Batch, Encoded
from sft_jax.data.images import Picture, Pixels, in_threads
from sft_jax.data.order import AUGMENT, BLEND, random_bits
from sft_jax.data.processor import Processor, Size, resized

PIXELS = "pixel_values"
TRIES, RATIOS = 10, (3 / 4, 4 / 3)  # of a random crop: torchvision's RandomResizedCrop, arXiv 1409.4842
MOST = 30  # strength of an operation: torchvision's RandAugment, arXiv 1909.13719
DRAWS = 4 * TRIES + 3  # numbers drawn for each image, before its operations


@dataclass(frozen=True, eq=False)
class Changes:
    """What is done to the images of training."""

    section: Images
    seed: int

    def __call__(self, pixels: Pixels, processor: Processor, document: int, visit: int) -> Pixels:
        """An image as it is on this visit, in the size of the processor."""
        section = self.section
        draws = _draws(self.seed, AUGMENT, DRAWS + 2 * section.rand_augment, document, visit)
        tries, (flip, down, right), drawn = draws[: 4 * TRIES], draws[4 * TRIES : DRAWS], draws[DRAWS:]
        if section.crop is None:
            pixels = processor.shape(pixels)
        else:
            pixels = _random_crop(pixels, section.crop, processor.size, processor.resample, tries.reshape(TRIES, 4))
        if section.pad:
            pixels = _window(pixels, section.pad, down, right)
        if flip < section.flip:
            pixels = pixels[:, ::-1]
        for which, sign in drawn.reshape(-1, 2):
            pixels = _operate(pixels, which, sign, section.magnitude)
        return np.ascontiguousarray(pixels)


@dataclass(frozen=True, eq=False)
class PixelValues:
    """The normalised pixels of images: a `Lazy`."""

    pictures: Sequence[Picture]
    processor: Processor
    digest: str
    changes: Changes | None = None  # of images that are read to be trained on

    def __call__(self, documents: np.ndarray, visits: np.ndarray | None) -> Float32[np.ndarray, "k h w 3"]:
        """The images of these documents, changed as they are on these visits."""
        counts = [None] * len(documents) if visits is None else visits.tolist()
        threads = 1 if multiprocessing.parent_process() else os.cpu_count() or 1  # one of a worker
        asked = list(zip(documents.tolist(), counts, strict=True))
        made = in_threads(lambda one: self._made(*one), asked, threads)
        return self.processor.normalise(np.stack(made) if made else np.zeros((0, *self.processor.size, 3), np.uint8))

    def _made(self, document: int, visit: int | None) -> Pixels:
        pixels = self.pictures[document].pixels()
        if self.changes is None or visit is None:
            return self.processor.shape(pixels)
        return self.changes(pixels, self.processor, document, visit)


@dataclass(frozen=True)
class Blend:
    """Mixup and cutmix: each image of a batch with another one of it, arXiv 1710.09412 and 1905.04899.

    A batch then has `label_other`, the label of the other image, and `label_share`, how much of the loss the own label
    is. Who goes with whom depends on which documents are in the batch, and on nothing else of it.
    """

    section: Images
    seed: int

    def __call__(self, batch: Batch, visits: np.ndarray) -> Batch:
        """The batch with its images mixed; filler stays as it is."""
        documents = batch["index"][:, 0][batch["index"][:, 0] >= 0].tolist()
        pairs = zip(documents, visits.tolist(), strict=True)
        draws = np.stack([_draws(self.seed, BLEND, 5, document, visit) for document, visit in pairs])
        order = np.argsort(draws[:, 0], kind="stable")
        other = np.empty_like(order)
        other[order] = np.roll(order, 1)
        pixels, share = batch[PIXELS].copy(), np.ones(batch["label"].shape, np.float32)
        for row, drawn in enumerate(draws):
            pixels[row], share[row] = self._mixed(batch[PIXELS][row], batch[PIXELS][other[row]], drawn)
        label = batch["label"].copy()
        label[: len(other)] = batch["label"][other]
        return {**batch, PIXELS: pixels, "label_other": label, "label_share": share}

    def _mixed(
        self, one: Float32[np.ndarray, "h w 3"], other: Float32[np.ndarray, "h w 3"], draws: np.ndarray
    ) -> tuple[Float32[np.ndarray, "h w 3"], float]:
        """(an image with another one, how much of it is its own); by one way or the other where there are both."""
        mixup, cutmix = self.section.mixup, self.section.cutmix
        cuts = cutmix > 0 and (mixup == 0 or draws[1] < 0.5)
        alpha = cutmix if cuts else mixup
        share = float(betaincinv(alpha, alpha, draws[2]))
        if not cuts:
            return (share * one + (1 - share) * other).astype(np.float32), share
        height, width = one.shape[:2]
        edges = [round(edge * (1 - share) ** 0.5) for edge in (height, width)]
        middles = [int(draw * edge) for draw, edge in zip(draws[3:5], (height, width), strict=True)]
        top, left = (max(0, middle - edge // 2) for middle, edge in zip(middles, edges, strict=True))
        bottom = min(height, middles[0] - edges[0] // 2 + edges[0])
        right = min(width, middles[1] - edges[1] // 2 + edges[1])
        mixed = one.copy()
        mixed[top:bottom, left:right] = other[top:bottom, left:right]
        return mixed, 1 - max(0, bottom - top) * max(0, right - left) / (height * width)


def encode_pictures(pictures: Sequence[Any], label: np.ndarray, processor: Processor) -> Encoded:
    """Images as documents of one token, their pixels made with the batch."""
    digest = hashlib.sha256(processor.table.tobytes())
    digest.update(repr((processor.resize, processor.crops, int(processor.resample))).encode())
    for picture in pictures:
        digest.update(picture.digest)
    lazy = {PIXELS: PixelValues(pictures, processor, digest.hexdigest())}
    return Encoded({}, np.arange(len(pictures) + 1), {"label": label}, lazy=lazy)


def changed(encoded: Encoded, section: Images, seed: int) -> Encoded:
    """The same documents, their images changed each time that they are read to be trained on."""
    if not encoded.lazy or section.model_copy(update={"mixup": 0.0, "cutmix": 0.0}) == Images():
        return encoded
    made = {name: replace(lazy, changes=Changes(section, seed)) for name, lazy in _pixel_values(encoded).items()}
    return replace(encoded, lazy={**encoded.lazy, **made})


def blend(section: Images, seed: int) -> Blend | None:
    """What mixes the images of a batch; None where nothing does."""
    return Blend(section, seed) if section.mixup or section.cutmix else None


def _pixel_values(encoded: Encoded) -> dict[str, PixelValues]:
    return {name: lazy for name, lazy in encoded.lazy.items() if isinstance(lazy, PixelValues)}


def _draws(seed: int, stream: int, count: int, document: int, visit: int) -> Float[np.ndarray, " n"]:
    """Numbers in [0, 1)."""
    return (random_bits(seed, stream, count, at=(document, visit)) >> np.uint64(11)) * 2.0**-53


def _random_crop(
    pixels: Pixels, least: float, size: Size, resample: Image.Resampling, draws: Float[np.ndarray, "t 4"]
) -> Pixels:
    """A part of an image of a random size and shape, made as large as is asked for; the middle where no try fits."""
    height, width = pixels.shape[:2]
    low, high = np.log(RATIOS)
    for area, shape, down, right in draws:
        part, ratio = height * width * (least + (1 - least) * area), np.exp(low + (high - low) * shape)
        w, h = round(float(np.sqrt(part * ratio))), round(float(np.sqrt(part / ratio)))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(down * (height - h + 1)), int(right * (width - w + 1))
            return resized(pixels[top : top + h, left : left + w], size, resample)
    w, h = min(width, round(height * RATIOS[1])), min(height, round(width / RATIOS[0]))
    top, left = (height - h) // 2, (width - w) // 2
    return resized(pixels[top : top + h, left : left + w], size, resample)


def _window(pixels: Pixels, pad: int, down: float, right: float) -> Pixels:
    """A window of the old size somewhere on the image with a black edge around it."""
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((pad, pad), (pad, pad), (0, 0)))
    top, left = (int(draw * (2 * pad + 1)) for draw in (down, right))
    return padded[top : top + height, left : left + width]


def _moved(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


def _sheared(image: Image.Image, x: float, y: float) -> Image.Image:
    """Sheared about its corner, as torchvision does."""
    return _moved(image, (1, x, 0, y, 1, 0))


# What RandAugment draws from: each with its image and a strength from -1 to 1, or 0 to 1 where it has no sign.
SIGNED: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    lambda image, s: _sheared(image, 0.3 * s, 0),
    lambda image, s: _sheared(image, 0, 0.3 * s),
    lambda image, s: _moved(image, (1, 0, int(150 / 331 * image.width * s), 0, 1, 0)),
    lambda image, s: _moved(image, (1, 0, 0, 0, 1, int(150 / 331 * image.height * s))),
    lambda image, s: image.rotate(30 * s),
    lambda image, s: ImageEnhance.Brightness(image).enhance(1 + 0.9 * s),
    lambda image, s: ImageEnhance.Color(image).enhance(1 + 0.9 * s),
    lambda image, s: ImageEnhance.Contrast(image).enhance(1 + 0.9 * s),
    lambda image, s: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * s),
)
UNSIGNED: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    lambda image, s: image,
    lambda image, s: ImageOps.posterize(image, 8 - round(4 * s)),
    lambda image, s: ImageOps.solarize(image, round(255 * (1 - s))),
    lambda image, s: ImageOps.autocontrast(image),
    lambda image, s: ImageOps.equalize(image),
)


def _operate(pixels: Pixels, which: float, sign: float, magnitude: int) -> Pixels:
    """One operation of RandAugment, drawn by two numbers in [0, 1)."""
    number, strength = int(which * (len(SIGNED) + len(UNSIGNED))), magnitude / MOST
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if number < len(SIGNED):
        return np.asarray(SIGNED[number](image, strength if sign < 0.5 else -strength))
    return np.asarray(UNSIGNED[number - len(SIGNED)](image, strength))
