"""An image and its mask -> pixels for people. Knows NumPy; no files, no network, no HTTP."""

from __future__ import annotations

import numpy as np

from model.arrays import AnyArray, ByteArray, FloatArray

_TINT = (255, 64, 129)
"""Of what is not background in an overlay. The page takes it off again, where its browser cannot
show the image itself (`app/static/pictures.js`)."""


def overlay(image: AnyArray, mask: ByteArray) -> ByteArray:
    """The image as RGB, (H, W, 3) uint8, tinted where the mask is not background.

    Args:
        image: decoded, (H, W) or (H, W, 3), uint8 or uint16.
        mask: (H, W), 0 is background.
    """
    shown = _shown(image).copy()
    inside = mask > 0
    shown[inside] = (shown[inside].astype(np.uint16) + np.array(_TINT, np.uint16)) // 2
    return shown


def cutout(image: AnyArray, probability: FloatArray) -> ByteArray:
    """The image as RGBA, (H, W, 4) uint8, as opaque as its pixels are foreground.

    Args:
        image: decoded, (H, W) or (H, W, 3), uint8 or uint16.
        probability: (H, W) of the foreground, 0..1.
    """
    alpha = np.rint(probability * 255).astype(np.uint8)
    return np.dstack([_shown(image), alpha])


def _shown(image: AnyArray) -> ByteArray:
    """(H, W, 3) uint8 to look at: 16 bits are spread over their real range."""
    if image.dtype == np.uint16:
        low, high = int(image.min()), int(image.max())
        image = ((image.astype(np.float32) - low) * (255 / max(high - low, 1))).astype(np.uint8)
    return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)
