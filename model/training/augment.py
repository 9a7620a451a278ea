"""Random crops of a training pair, with random geometry, intensities and noise.

Position, scale, rotation, flip and elastic deformation (paper, section 3.1) are combined into one
grid of coordinates. The image is therefore interpolated only once; labels take the nearest pixel,
so they stay labels. Interpolation makes an image softer than a microscope's. A share of the crops
is therefore cut without it, and only rotated by multiples of 90 degrees and mirrored.

Knows pixels; no files, no network.
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
    """Take one random crop of a prepared pair.

    Args:
        image: (H, W, C) uint8, prepared by `model.transforms.prepare`.
        labels: (H, W).
        config: of the recipe; its crop has a height and a width.
        rng: the only source of randomness.

    Returns:
        image (*crop, C) uint8 and labels (*crop) int32.
    """
    cut = config.unresampled > 0 and rng.random() < config.unresampled
    crop, crop_labels = (_cut_crop if cut else _resample_crop)(image, labels, config, rng)
    values: FloatArray = crop.astype(np.float32) / np.float32(255)
    varied = _vary_intensities(values, config, rng)
    pixels = np.rint(varied * 255).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0)), crop_labels.astype(np.int32)


def _resample_crop(
    image: ByteArray, labels: Int32Array, config: AugmentConfig, rng: np.random.Generator
) -> tuple[AnyArray, AnyArray]:
    """Sample image (C, *crop) and labels (*crop) on a random grid."""
    grid = _draw_grid(labels.shape, config, rng)
    source = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    target = torch.from_numpy(labels)[None, None].float()  # exact up to 2^24 labels
    crop = F.grid_sample(source, grid, "bilinear", "reflection", align_corners=False)[0]
    crop_labels = F.grid_sample(target, grid, "nearest", "reflection", align_corners=False)[0, 0]
    return crop.numpy(), crop_labels.numpy()


def _cut_crop(
    image: ByteArray, labels: Int32Array, config: AugmentConfig, rng: np.random.Generator
) -> tuple[AnyArray, AnyArray]:
    """Copy image (C, *crop) and labels (*crop), mirrored and rotated by multiples of 90 degrees."""
    turns = int(rng.integers(4)) if config.rotate else 0
    height, width = config.crop[:: -1 if turns % 2 else 1]
    rows = _draw_range(labels.shape[0], height, rng)
    columns = _draw_range(labels.shape[1], width, rng)
    crop, crop_labels = image[rows[:, None], columns], labels[rows[:, None], columns]
    if config.flip and rng.random() < 0.5:
        crop, crop_labels = crop[:, ::-1], crop_labels[:, ::-1]
    return np.rot90(crop, turns).transpose(2, 0, 1), np.rot90(crop_labels, turns)


def _draw_range(length: int, crop: int, rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """Draw `crop` adjacent indices of an axis of `length`; a short axis is reflected."""
    if crop <= length:
        return np.arange(crop) + int(rng.integers(length - crop + 1))
    before = (crop - length) // 2
    return np.pad(np.arange(length), (before, crop - length - before), mode="symmetric")


def _draw_grid(size: tuple[int, ...], config: AugmentConfig, rng: np.random.Generator) -> Tensor:
    """Draw the coordinates of a crop for `torch.nn.functional.grid_sample`.

    Args:
        size: (H, W) of the source.

    Returns:
        (1, *crop, 2) coordinates in the source, x before y, in -1..1.
    """
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
    x += _draw_center(size[1], width / zoom, rng)
    y += _draw_center(size[0], height / zoom, rng)
    grid = np.stack([(2 * x + 1) / size[1] - 1, (2 * y + 1) / size[0] - 1], axis=-1)
    return torch.from_numpy(grid.astype(np.float32))[None]


def _draw_center(length: int, crop: float, rng: np.random.Generator) -> float:
    """Draw the crop's center on an axis, in pixels, so that an unrotated crop stays inside.

    A crop longer than the axis is centered.
    """
    free = max(length - crop, 0.0)
    return float((length - 1) / 2 + rng.uniform(-0.5, 0.5) * free)


def _vary_intensities(
    image: FloatArray, config: AugmentConfig, rng: np.random.Generator
) -> FloatArray:
    """Vary brightness, contrast, colour, sharpness and noise of an image, (C, H, W) in 0..1.

    The result has the same shape. It may leave 0..1.
    """
    gamma, gain = np.exp(rng.uniform(-1, 1, 2) * (config.gamma, config.gain))
    colour = np.exp(rng.uniform(-config.colour, config.colour, (len(image), 1, 1)))
    offset = rng.uniform(-config.offset, config.offset)
    varied: FloatArray = (image**gamma * gain * colour + offset).astype(np.float32)
    if rng.random() < config.blur:
        soft = F.avg_pool2d(torch.from_numpy(varied)[None], 3, 1, 1, count_include_pad=False)
        varied = soft[0].numpy()
    if config.noise:
        noise = rng.standard_normal(varied.shape, dtype=np.float32)
        varied = varied + noise * np.float32(rng.uniform(0, config.noise))
    if rng.random() < config.invert:
        varied = 1 - varied
    return varied
