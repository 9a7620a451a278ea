"""Make golden pairs: images, and the masks of them that an engine must reproduce.

Knows no network; the caller computes probabilities.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from model.arrays import AnyArray, ByteArray, FloatArray
from model.checkpoint import Golden
from model.config import PreprocessConfig
from model.transforms import to_mask

GOLDEN_SIDE = 256
"""Height and width of a golden image in pixels; mode "resize" keeps the whole image."""


def make_golden(
    image: AnyArray, preprocess: PreprocessConfig, predict: Callable[[AnyArray], FloatArray]
) -> Golden:
    """Make a golden pair of an image, in mode "native" cropped to its centre.

    Args:
        predict: decoded image -> probabilities (C, H, W), by the reference in fp32.
    """
    if preprocess.mode == "native":
        top, left = (max(0, (length - GOLDEN_SIDE) // 2) for length in image.shape[:2])
        image = np.ascontiguousarray(image[top : top + GOLDEN_SIDE, left : left + GOLDEN_SIDE])
    return Golden(image, to_mask(predict(image), preprocess))


def draw_synthetic_image(channels: int) -> ByteArray:
    """Draw bright blobs on a dark background, for a golden pair without an image.

    Args:
        channels: 1 for grey; otherwise RGB.

    Returns:
        (256, 256) or (256, 256, 3) uint8, always the same.
    """
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:256, :256]
    field = np.zeros((256, 256))
    for cy, cx, radius in zip(*rng.uniform(0, 256, (2, 24)), rng.uniform(6, 28, 24), strict=True):
        field += np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * radius**2))
    grey = np.clip(field * 200 + rng.normal(20, 6, field.shape), 0, 255).astype(np.uint8)
    return grey if channels == 1 else np.repeat(grey[:, :, None], 3, axis=2)
