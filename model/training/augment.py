"""Random crops of a training pair, with random geometry, intensities and noise.

`draw_crop` draws every random number of a crop except its noise. `augment` applies them on the
host; `model.training.device_crops` applies the same numbers to a whole batch on a device.

Position, scale, rotation, flip and elastic deformation (paper, section 3.1) are combined into one
grid of coordinates. The image is therefore interpolated only once; labels take the nearest pixel,
so they stay labels. Interpolation makes an image softer than a microscope's. A share of the crops
is therefore cut without it, and only rotated by multiples of 90 degrees and mirrored.

Knows pixels; no files, no network.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from model.arrays import AnyArray, ByteArray, FloatArray, Int32Array
from model.training.sections import AugmentConfig

DARKEST = 1 / 256
"""Added to values in 0..1 before the logarithm, which gives optical densities."""
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Optical densities of hematoxylin, eosin and DAB in red, green and blue (Ruifrok and Johnston
2001)."""
_UNMIX = np.linalg.inv(_STAINS)
_TURN = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
"""The cross product with the axis of grey, which turns hues."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the pixels of a crop are in the source.

    A crop pixel at (x, y) from the crop's centre is at `rotation @ ((mirror * x, y) + e) + centre`
    in the source, in pixels. e is its elastic displacement, and rotation is
    ((cos, -sin), (sin, cos)).

    Attributes:
        exact: source pixels are copied, not interpolated: every coordinate is an integer.
        mirror: -1 or 1.
        cos, sin: of the angle, divided by the zoom.
        centre: (x, y) in the source.
        elastic: (2, 3, 3) displacements (x, y) on a coarse grid over the crop, or None.
    """

    exact: bool
    mirror: float
    cos: float
    sin: float
    centre: tuple[float, float]
    elastic: FloatArray | None = None


@dataclasses.dataclass(frozen=True)
class Intensities:
    """How the values of a crop change, in 0..1 and in this order.

    Attributes:
        stain: (3, 3), by which optical densities (.., 3) are multiplied from the right; None: they
            are not.
        mix: (3, 3), the same for colors; the result is limited to 0..1.
        gamma: the power to which values are raised.
        gains: per channel, by which they are multiplied.
        offset: added to them.
        blur: whether they are averaged over 3×3 pixels.
        noise: standard deviation of the added noise.
        invert: whether they are subtracted from 1.
    """

    stain: FloatArray | None
    mix: FloatArray | None
    gamma: float
    gains: tuple[float, ...]
    offset: float
    blur: bool
    noise: float
    invert: bool


def draw_crop(
    size: tuple[int, int], channels: int, config: AugmentConfig, rng: np.random.Generator
) -> tuple[Placement, Intensities]:
    """Draw where a crop lies and how its values change.

    Args:
        size: (H, W) of the source.
        channels: of the source.
        config: of the recipe; its crop has a height and a width.
        rng: the only source of randomness.
    """
    exact = config.unresampled > 0 and rng.random() < config.unresampled
    placement = (_draw_exact if exact else _draw_resampled)(size, config, rng)
    return placement, _draw_intensities(channels, config, rng)


def augment(
    image: ByteArray, labels: Int32Array, config: AugmentConfig, rng: np.random.Generator
) -> tuple[ByteArray, Int32Array]:
    """Take one random crop of a prepared pair.

    Args:
        image: (H, W, C) uint8, prepared by `model.transforms.prepare`.
        labels: (H, W).
        config, rng: as for `draw_crop`.

    Returns:
        image (*crop, C) uint8 and labels (*crop) int32.
    """
    height, width, channels = image.shape
    placement, intensities = draw_crop((height, width), channels, config, rng)
    sample = _copy_crop if placement.exact else _resample_crop
    crop, crop_labels = sample(image, labels, config.crop, placement)
    values: FloatArray = crop.astype(np.float32) / np.float32(255)
    varied = _vary_intensities(values, intensities, rng)
    pixels = np.rint(varied * 255).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0)), crop_labels.astype(np.int32)


def _draw_exact(
    size: tuple[int, int], config: AugmentConfig, rng: np.random.Generator
) -> Placement:
    """Draw a crop that is only mirrored and rotated by multiples of 90 degrees."""
    turns = int(rng.integers(4)) if config.rotate else 0
    height, width = config.crop[:: -1 if turns % 2 else 1]  # of the source's pixels
    centre_y = _draw_exact_centre(size[0], height, rng)
    centre_x = _draw_exact_centre(size[1], width, rng)
    mirror = _draw_mirror(config, rng)
    cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[turns]
    return Placement(True, mirror, float(cos), float(sin), (centre_x, centre_y))


def _draw_exact_centre(length: int, crop: int, rng: np.random.Generator) -> float:
    """Draw the centre of `crop` adjacent pixels of an axis; a shorter axis is centred."""
    start = int(rng.integers(length - crop + 1)) if crop <= length else -((crop - length) // 2)
    return start + (crop - 1) / 2


def _draw_resampled(
    size: tuple[int, int], config: AugmentConfig, rng: np.random.Generator
) -> Placement:
    """Draw a crop with any rotation, magnification and deformation."""
    height, width = config.crop
    low, high = config.zoom
    zoom = math.exp(rng.uniform(math.log(low), math.log(high)))
    angle = math.radians(rng.uniform(-config.rotate, config.rotate))
    mirror = _draw_mirror(config, rng)
    elastic: FloatArray | None = None
    if config.elastic:
        elastic = rng.normal(0, config.elastic, (2, 3, 3)).astype(np.float32)
    x = _draw_centre(size[1], width / zoom, rng)
    y = _draw_centre(size[0], height / zoom, rng)
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    return Placement(False, mirror, cos, sin, (x, y), elastic)


def _draw_mirror(config: AugmentConfig, rng: np.random.Generator) -> float:
    return -1.0 if config.flip and rng.random() < 0.5 else 1.0


def _draw_centre(length: int, crop: float, rng: np.random.Generator) -> float:
    """Draw the crop's centre on an axis, in pixels, so that an unrotated crop stays inside.

    A crop longer than the axis is centred.
    """
    free = max(length - crop, 0.0)
    return float((length - 1) / 2 + rng.uniform(-0.5, 0.5) * free)


def _draw_intensities(
    channels: int, config: AugmentConfig, rng: np.random.Generator
) -> Intensities:
    stain = mix = None
    if channels == 3:
        stain, mix = _draw_stain(config, rng), _draw_mix(config, rng)
    gamma, gain = np.exp(rng.uniform(-1, 1, 2) * (config.gamma, config.gain))
    colors = np.exp(rng.uniform(-config.color, config.color, channels))
    return Intensities(
        stain=stain,
        mix=mix,
        gamma=float(gamma),
        gains=tuple((gain * colors).tolist()),
        offset=float(rng.uniform(-config.offset, config.offset)),
        blur=bool(rng.random() < config.blur),
        noise=float(rng.uniform(0, config.noise)),
        invert=bool(rng.random() < config.invert),
    )


def _draw_stain(config: AugmentConfig, rng: np.random.Generator) -> FloatArray | None:
    """Draw a matrix that changes the amounts of the stains. Grey stays as it is.

    Images without stains, such as fluorescence, are therefore unchanged if they are grey.
    """
    if not config.stain:
        return None
    amounts = np.exp(rng.uniform(-config.stain, config.stain, 3))
    matrix = (_UNMIX * amounts) @ _STAINS
    balanced: FloatArray = (matrix / matrix.sum(axis=0)).astype(np.float32)
    return balanced


def _draw_mix(config: AugmentConfig, rng: np.random.Generator) -> FloatArray | None:
    """Draw a matrix that turns hues around the axis of grey and changes the distance from it."""
    if not (config.hue or config.saturation or config.grey):
        return None
    angle = math.radians(rng.uniform(-config.hue, config.hue))
    saturation = math.exp(rng.uniform(-config.saturation, config.saturation))
    if rng.random() < config.grey:
        saturation = 0.0
    grey = np.full((3, 3), 1 / 3)
    turned = math.cos(angle) * (np.eye(3) - grey) + math.sin(angle) * _TURN
    mix: FloatArray = (grey + saturation * turned).astype(np.float32)
    return mix


def _copy_crop(
    image: ByteArray, labels: Int32Array, crop: tuple[int, ...], placement: Placement
) -> tuple[AnyArray, AnyArray]:
    """Copy image (C, *crop) and labels (*crop) without interpolation."""
    y, x = _crop_coordinates(crop)
    x = x * placement.mirror
    # Either the sine or the cosine is 0, so each axis of the source follows one axis of the crop.
    if placement.sin:
        rows, columns = x * placement.sin, -y * placement.sin
    else:
        rows, columns = y * placement.cos, x * placement.cos
    inside = (
        _reflect(rows + placement.centre[1], labels.shape[0]),
        _reflect(columns + placement.centre[0], labels.shape[1]),
    )
    return image[inside].transpose(2, 0, 1), labels[inside]


def _crop_coordinates(crop: tuple[int, ...]) -> tuple[FloatArray, FloatArray]:
    """Return y (height, 1) and x (1, width) of a crop's pixels, from its centre."""
    y, x = (np.arange(length, dtype=np.float32) - np.float32((length - 1) / 2) for length in crop)
    return y[:, None], x[None]


def _reflect(index: FloatArray, length: int) -> npt.NDArray[np.intp]:
    """Reflect the indices of an axis into 0..length - 1; the edge's pixels are repeated."""
    folded = index.astype(np.intp) % (2 * length)
    reflected: npt.NDArray[np.intp] = np.minimum(folded, 2 * length - 1 - folded)
    return reflected


def _resample_crop(
    image: ByteArray, labels: Int32Array, crop: tuple[int, ...], placement: Placement
) -> tuple[AnyArray, AnyArray]:
    """Sample image (C, *crop) and labels (*crop) on the grid of a placement."""
    grid = _make_grid(labels.shape, crop, placement)
    source = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    target = torch.from_numpy(labels)[None, None].float()  # exact up to 2^24 labels
    pixels = F.grid_sample(source, grid, "bilinear", "reflection", align_corners=False)[0]
    crop_labels = F.grid_sample(target, grid, "nearest", "reflection", align_corners=False)[0, 0]
    return pixels.numpy(), crop_labels.numpy()


def _make_grid(size: tuple[int, ...], crop: tuple[int, ...], placement: Placement) -> Tensor:
    """Compute the coordinates of a crop for `torch.nn.functional.grid_sample`.

    Args:
        size: (H, W) of the source.

    Returns:
        (1, *crop, 2) coordinates in the source, x before y, in -1..1.
    """
    y, x = _crop_coordinates(crop)
    x = x * np.float32(placement.mirror)
    if placement.elastic is not None:
        coarse = torch.from_numpy(placement.elastic)[None]
        fine = F.interpolate(coarse, crop, mode="bicubic", align_corners=True)[0].numpy()
        x, y = x + fine[0], y + fine[1]
    grid = np.empty((1, *crop, 2), np.float32)
    # (2 x + 1) / size - 1 of the source's x, and the same of y
    for axis, (along_x, along_y) in enumerate(
        ((placement.cos, -placement.sin), (placement.sin, placement.cos))
    ):
        scale = 2 / size[1 - axis]
        shift = (2 * placement.centre[axis] + 1) / size[1 - axis] - 1
        grid[0, ..., axis] = x * (along_x * scale) + y * (along_y * scale) + shift
    return torch.from_numpy(grid)


def _vary_colors(image: FloatArray, intensities: Intensities) -> FloatArray:
    """Change stains and hues of an image, (3, H, W) in 0..1."""
    if intensities.stain is not None:
        densities = -np.log(image + np.float32(DARKEST))
        changed = np.tensordot(intensities.stain.T, densities, 1)
        image = np.exp(-changed) - np.float32(DARKEST)
    if intensities.mix is not None:
        image = np.tensordot(intensities.mix.T, image, 1)
    if intensities.stain is not None or intensities.mix is not None:
        image = image.clip(0, 1)
    return image


def _vary_intensities(
    image: FloatArray, intensities: Intensities, rng: np.random.Generator
) -> FloatArray:
    """Vary brightness, contrast, color, sharpness and noise of an image, (C, H, W) in 0..1.

    The result has the same shape. It may leave 0..1.
    """
    gains = np.array(intensities.gains, np.float32)[:, None, None]
    image = _vary_colors(image, intensities)
    varied: FloatArray = image ** np.float32(intensities.gamma)
    varied *= gains
    varied += np.float32(intensities.offset)
    if intensities.blur:
        soft = F.avg_pool2d(torch.from_numpy(varied)[None], 3, 1, 1, count_include_pad=False)
        varied = soft[0].numpy()
    if intensities.noise:
        noise = rng.standard_normal(varied.shape, dtype=np.float32)
        varied = varied + noise * np.float32(intensities.noise)
    if intensities.invert:
        varied = 1 - varied
    return varied
