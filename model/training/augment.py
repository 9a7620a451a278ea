"""Random variations of a training pair: where a crop is taken, and how it is lit.

Geometry is one resampling of the source: position, scale, rotation, flip and elastic deformation
(paper, section 3.1) are composed into one grid of coordinates, so that the image is interpolated
once and its labels, by the nearest neighbour, stay labels. What is interpolated is softer than
what a microscope gives, so some crops are not: they keep their pixels, turned by quarters.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from model.arrays import AnyArray, ByteArray, FloatArray, Int32Array
from model.training.recipe import AugmentConfig


def augment(
    image: ByteArray, labels: Int32Array, config: AugmentConfig, rng: np.random.Generator
) -> tuple[ByteArray, Int32Array]:
    """One random crop of a prepared pair.

    Args:
        image: (H, W, C) uint8, from `model.transforms.prepare`.
        labels: (H, W).

    Returns:
        image (*crop, C) uint8 and labels (*crop).
    """
    exact = config.unresampled > 0 and rng.random() < config.unresampled
    crop, cropped = (_exact if exact else _resampled)(image, labels, config, rng)
    values: FloatArray = crop.astype(np.float32) / np.float32(255)
    lit = _light(values, config, rng)
    pixels = np.rint(lit * 255).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0)), cropped.astype(np.int32)


def _resampled(
    image: ByteArray, labels: Int32Array, config: AugmentConfig, rng: np.random.Generator
) -> tuple[AnyArray, AnyArray]:
    """(C, *crop) and (*crop) on a random grid."""
    grid = _grid(labels.shape, config, rng)
    source = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    target = torch.from_numpy(labels)[None, None].float()  # exact up to 2^24 labels
    crop = F.grid_sample(source, grid, "bilinear", "reflection", align_corners=False)[0]
    cropped = F.grid_sample(target, grid, "nearest", "reflection", align_corners=False)[0, 0]
    return crop.numpy(), cropped.numpy()


def _exact(
    image: ByteArray, labels: Int32Array, config: AugmentConfig, rng: np.random.Generator
) -> tuple[AnyArray, AnyArray]:
    """(C, *crop) and (*crop) pixel for pixel: turned by quarters and mirrored."""
    turns = int(rng.integers(4)) if config.rotate else 0
    height, width = config.crop[:: -1 if turns % 2 else 1]
    rows, columns = _place(labels.shape[0], height, rng), _place(labels.shape[1], width, rng)
    crop, cropped = image[rows[:, None], columns], labels[rows[:, None], columns]
    if config.flip and rng.random() < 0.5:
        crop, cropped = crop[:, ::-1], cropped[:, ::-1]
    return np.rot90(crop, turns).transpose(2, 0, 1), np.rot90(cropped, turns)


def _place(length: int, crop: int, rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """`crop` places in a row of `length`, at random; reflected where there are too few."""
    if crop <= length:
        return np.arange(crop) + int(rng.integers(length - crop + 1))
    before = (crop - length) // 2
    return np.pad(np.arange(length), (before, crop - length - before), mode="symmetric")


def _grid(size: tuple[int, ...], config: AugmentConfig, rng: np.random.Generator) -> Tensor:
    """(1, *crop, 2) coordinates into the source, x before y, in -1..1."""
    height, width = config.crop
    low, high = np.log(config.zoom)
    zoom = np.exp(rng.uniform(low, high))
    angle = np.radians(rng.uniform(-config.rotate, config.rotate))
    mirror = -1.0 if config.flip and rng.random() < 0.5 else 1.0
    y, x = np.meshgrid(
        np.arange(height, dtype=np.float32) - (height - 1) / 2,
        (np.arange(width, dtype=np.float32) - (width - 1) / 2) * mirror,
        indexing="ij",
    )
    if config.elastic:
        coarse = torch.from_numpy(rng.normal(0, config.elastic, (1, 2, 3, 3)).astype(np.float32))
        fine = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
        x, y = x + fine[0, 0].numpy(), y + fine[0, 1].numpy()
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    x, y = cos * x - sin * y, sin * x + cos * y
    # the centre lies anywhere that keeps an unrotated crop inside, or in the middle of a small one
    x += _centre(size[1], width / zoom, rng)
    y += _centre(size[0], height / zoom, rng)
    grid = np.stack([(2 * x + 1) / size[1] - 1, (2 * y + 1) / size[0] - 1], axis=-1)
    return torch.from_numpy(grid.astype(np.float32))[None]


def _centre(length: int, crop: float, rng: np.random.Generator) -> float:
    free = max(length - crop, 0.0)
    return float((length - 1) / 2 + rng.uniform(-0.5, 0.5) * free)


def _light(image: FloatArray, config: AugmentConfig, rng: np.random.Generator) -> FloatArray:
    """(C, H, W) in 0..1 -> the same under another lamp, stain and camera."""
    gamma, gain = np.exp(rng.uniform(-1, 1, 2) * (config.gamma, config.gain))
    colour = np.exp(rng.uniform(-config.colour, config.colour, (len(image), 1, 1)))
    offset = rng.uniform(-config.offset, config.offset)
    lit: FloatArray = (image**gamma * gain * colour + offset).astype(np.float32)
    if rng.random() < config.blur:
        soft = F.avg_pool2d(torch.from_numpy(lit)[None], 3, 1, 1, count_include_pad=False)
        lit = soft[0].numpy()
    if config.noise:
        noise = rng.standard_normal(lit.shape, dtype=np.float32)
        lit = lit + noise * np.float32(rng.uniform(0, config.noise))
    if rng.random() < config.invert:
        lit = 1 - lit
    return lit
