"""An image and its mask -> an image for people. Knows NumPy; no files, no network, no HTTP."""

from __future__ import annotations

import numpy as np

from model.arrays import AnyArray, ByteArray, FloatArray

_TINT = (255, 64, 129)
"""Colour of what is not background in an overlay. The page removes it again where the browser
cannot show the image itself (`app/static/pictures.js`)."""


def overlay(image: AnyArray, mask: ByteArray) -> ByteArray:
    """Tint an image where the mask is not background: (H, W, 3) uint8.

    Args:
        image: decoded, (H, W) or (H, W, 3), uint8 or uint16.
        mask: (H, W), 0 is background.
    """
    rgb = to_rgb8(image).copy()
    inside = mask > 0
    rgb[inside] = (rgb[inside].astype(np.uint16) + np.array(_TINT, np.uint16)) // 2
    return rgb


def cutout(image: AnyArray, probability: FloatArray) -> ByteArray:
    """Make an image as opaque as its pixels are foreground: (H, W, 4) uint8, RGBA.

    Args:
        image: decoded, (H, W) or (H, W, 3), uint8 or uint16.
        probability: (H, W) of the foreground, 0..1.
    """
    alpha = np.rint(probability * 255).astype(np.uint8)
    return np.dstack([to_rgb8(image), alpha])


def to_rgb8(image: AnyArray) -> ByteArray:
    """Convert a decoded image to (H, W, 3) uint8; 16 bits are spread from their own range."""
    if image.dtype == np.uint16:
        low, high = int(image.min()), int(image.max())
        image = ((image.astype(np.float32) - low) * (255 / max(high - low, 1))).astype(np.uint8)
    return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)
