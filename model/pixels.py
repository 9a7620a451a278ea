"""What Pillow opened -> the array of its pixels: for training, evaluation and the service alike.

Knows Pillow and no files.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from model.arrays import AnyArray, UInt16Array

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp")
"""Suffixes of files that are taken for images."""

PHOTOMETRIC, MIN_IS_WHITE = 262, 0
"""A tag of TIFF, and its value where 0 is white."""


def to_array(image: Image.Image) -> AnyArray:
    """
    Returns:
        (H, W, 3) uint8, or (H, W) uint8 or uint16 for grey images. Greys of more than 8 bits keep
        their range; 32-bit ones are spread over theirs. Colours of 16 bits are their upper 8.
        Transparency is laid on black.
    """
    if image.mode.startswith("I;16"):
        greys = np.asarray(image).astype(np.uint16)
        return ~greys if _is_inverted(image) else greys
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        return _spread(-values if _is_inverted(image) else values)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        # Multiplied by its alpha: the same as laid on black, without a black image to lay it on.
        return np.asarray(image.convert("RGBA").convert("RGBa"))[:, :, :3]
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    return np.asarray(image.convert("RGB"))


def _is_inverted(image: Image.Image) -> bool:
    """Whether 0 is white in a TIFF. Pillow sees to it in greys of 8 bits and less, only there."""
    tags = getattr(image, "tag_v2", {})
    return image.format == "TIFF" and tags.get(PHOTOMETRIC) == MIN_IS_WHITE


def _spread(values: AnyArray) -> UInt16Array:
    """32-bit integers or floats over their real, finite range."""
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(values.shape, np.uint16)
    low, high = float(values[finite].min()), float(values[finite].max())
    if values.dtype.kind in "iu" and low >= 0 and high <= 65535:
        return values.astype(np.uint16)  # 16 bits in a wide type, as Pillow opens some PNGs
    scaled = (np.where(finite, values, low).astype(np.float64) - low) / max(high - low, 1e-300)
    return np.rint(scaled * 65535).astype(np.uint16)
