"""Random variations of a training pair: where a crop is taken, and how it is lit.

Geometry is one resampling of the source: position, scale, rotation, flip and elastic deformation
(paper, section 3.1) are composed into one grid of coordinates, so that the image is interpolated
once and its labels, by the nearest neighbour, stay labels.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Each value is the strength of one variation; 0 (or 1 for `scale`) turns it off."""

    crop: int = 192
    """Side of the square crop, in pixels; a multiple of 16."""
    scale: float = 1.5
    """Objects appear between 1/scale and scale times their size, evenly in the logarithm."""
    rotate: bool = True
    flip: bool = True
    elastic: float = 6.0
    """Standard deviation of the displacements on a coarse 3×3 grid, in pixels (paper: 10)."""
    gain: float = 0.3
    """Contrast is multiplied by exp(±gain)."""
    offset: float = 0.15
    """Brightness is moved by up to this share of the full range."""
    gamma: float = 0.4
    """Intensities are raised to the power exp(±gamma)."""
    colour: float = 0.15
    """Each channel's own gain, exp(±colour)."""
    noise: float = 0.04
    """Largest standard deviation of added noise, as a share of the full range."""
    blur: float = 0.2
    """Share of the crops that are blurred a little."""
    invert: float = 0.1
    """Share of the crops with dark and bright exchanged."""


def augment(
    image: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int32],
    config: AugmentConfig,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """One random crop of a prepared pair.

    Args:
        image: (H, W, C) uint8, from `model.transforms.prepare`.
        labels: (H, W) int32.

    Returns:
        image (crop, crop, C) uint8 and labels (crop, crop) int64.
    """
    grid = _grid(labels.shape, config, rng)
    source = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    target = torch.from_numpy(labels)[None, None].float()  # exact up to 2^24 labels
    crop = F.grid_sample(source, grid, "bilinear", "reflection", align_corners=False)[0]
    cropped = F.grid_sample(target, grid, "nearest", "reflection", align_corners=False)[0, 0]
    lit = _light(crop.numpy() / 255, config, rng)
    pixels = torch.from_numpy(lit).mul_(255).round_().clamp_(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 0).contiguous(), cropped.long()


def _grid(size: tuple[int, ...], config: AugmentConfig, rng: np.random.Generator) -> Tensor:
    """(1, crop, crop, 2) coordinates into the source, x before y, in -1..1."""
    height, width = size
    zoom = np.exp(rng.uniform(-1, 1) * np.log(config.scale))
    angle = rng.uniform(0, 2 * np.pi) if config.rotate else 0.0
    mirror = -1.0 if config.flip and rng.random() < 0.5 else 1.0
    axis = np.arange(config.crop, dtype=np.float32) - (config.crop - 1) / 2
    y, x = np.meshgrid(axis, axis * mirror, indexing="ij")
    if config.elastic:
        coarse = torch.from_numpy(rng.normal(0, config.elastic, (1, 2, 3, 3)).astype(np.float32))
        fine = F.interpolate(coarse, (config.crop, config.crop), mode="bicubic", align_corners=True)
        x, y = x + fine[0, 0].numpy(), y + fine[0, 1].numpy()
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    x, y = cos * x - sin * y, sin * x + cos * y
    # the centre lies anywhere that keeps an unrotated crop inside, or in the middle of a small one
    x += _centre(width, config.crop / zoom, rng)
    y += _centre(height, config.crop / zoom, rng)
    grid = np.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], axis=-1)
    return torch.from_numpy(grid.astype(np.float32))[None]


def _centre(length: int, crop: float, rng: np.random.Generator) -> float:
    free = max(length - crop, 0.0)
    return float((length - 1) / 2 + rng.uniform(-0.5, 0.5) * free)


def _light(
    image: npt.NDArray[np.float32], config: AugmentConfig, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """(C, H, W) in 0..1 -> the same under another lamp, stain and camera."""
    image = image ** np.exp(rng.uniform(-config.gamma, config.gamma))
    gain = np.exp(rng.uniform(-config.gain, config.gain))
    colour = np.exp(rng.uniform(-config.colour, config.colour, (len(image), 1, 1)))
    image = image * gain * colour + rng.uniform(-config.offset, config.offset)
    if rng.random() < config.blur:
        image = F.avg_pool2d(torch.from_numpy(image)[None], 3, 1, 1, count_include_pad=False)[0].numpy()
    if config.noise:
        image = image + rng.normal(0, rng.uniform(0, config.noise), image.shape)
    if rng.random() < config.invert:
        image = 1 - image
    return image.astype(np.float32)
