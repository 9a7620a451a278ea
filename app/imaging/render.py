"""An image and its mask -> an image for people. Knows NumPy; no files, no network, no HTTP."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from model.arrays import BoolArray, ByteArray, Color, FloatArray

TINT = (255, 64, 129)
"""Color of what is not background in an overlay. The page removes it again where the browser
cannot show the image itself (`app/static/imaging.js`)."""
_EDGE = 2
"""Rows and columns on either side of the border of a mask, where a cutout is soft."""
_BLOCK_PIXELS = 1 << 20
"""Pixels whose opacity is computed at once."""


def overlay(image: ByteArray, mask: ByteArray) -> ByteArray:
    """Tint an image where the mask is not background: (H, W, 3) uint8.

    Args:
        image: (H, W) or (H, W, 3).
        mask: (H, W), 0 is background.
    """
    rgb = to_rgb(image).copy()
    inside = mask > 0
    rgb[inside] = (rgb[inside].astype(np.uint16) + np.array(TINT, np.uint16)) // 2
    return rgb


def cutout(image: ByteArray, alpha: ByteArray, background: Color | None = None) -> ByteArray:
    """Show an image where it is opaque: (H, W, 4) uint8, RGBA, or (H, W, 3) on a background.

    Args:
        image: (H, W) or (H, W, 3).
        alpha: (H, W) from `soften_edge`.
        background: red, green and blue.
    """
    rgb = to_rgb(image)
    if background is None:
        return np.dstack([rgb, alpha])
    composed = np.empty_like(rgb)
    composed[:] = background
    composed[alpha == 255] = rgb[alpha == 255]
    edge = (alpha > 0) & (alpha < 255)
    opacity = alpha[edge, None].astype(np.uint32)
    color = np.array(background, np.uint32)
    composed[edge] = (rgb[edge] * opacity + color * (255 - opacity) + 127) // 255
    return composed


def soften_edge(mask: ByteArray, margin: FloatArray) -> ByteArray:
    """Compute the opacity of a cutout: (H, W) uint8.

    It is 255 inside the mask and 0 outside. Within `_EDGE` pixels of the mask's border it is a ramp
    of two pixels. The ramp is at the place where the probability equals the threshold, between
    pixels: their distance to it is the margin over its slope.

    Args:
        mask: (H, W), 0 is background.
        margin: (H, W) by how much the probability of the foreground exceeds the threshold.
    """
    alpha = np.empty(mask.shape, np.uint8)
    step = max(1, _BLOCK_PIXELS // mask.shape[1])
    for start in range(0, len(mask), step):  # a few rows at a time, to save memory
        stop = min(start + step, len(mask))
        first = max(0, start - _EDGE - 1)
        seen = slice(first, stop + _EDGE + 1)
        softened = _soften_rows(mask[seen] > 0, margin[seen])
        alpha[start:stop] = softened[start - first : stop - first]
    return alpha


def _soften_rows(inside: BoolArray, margin: FloatArray) -> ByteArray:
    alpha = np.where(inside, np.uint8(255), np.uint8(0))
    rows, columns = np.nonzero(grow(inside, _EDGE) & grow(~inside, _EDGE))
    slope = np.hypot(_slope(margin, rows, columns, 0), _slope(margin, rows, columns, 1))
    distance = margin[rows, columns] / np.maximum(slope, 1e-6)
    # Parts that were removed from the mask have a positive margin as well.
    near = inside[rows, columns]
    distance = np.where(near, np.maximum(distance, 0), np.minimum(distance, 0))
    alpha[rows, columns] = np.rint(255 * np.clip((distance + 1) / 2, 0, 1))
    return alpha


def _slope(
    values: FloatArray, rows: npt.NDArray[np.intp], columns: npt.NDArray[np.intp], axis: int
) -> FloatArray:
    """Compute the change per pixel along an axis, at some pixels."""
    last = values.shape[axis] - 1
    at = rows if axis == 0 else columns
    before, after = np.maximum(at - 1, 0), np.minimum(at + 1, last)
    ends = [(each, columns) if axis == 0 else (rows, each) for each in (before, after)]
    change = values[ends[1]] - values[ends[0]]
    slope: FloatArray = change / np.maximum(after - before, 1)
    return slope


def grow(mask: BoolArray, pixels: int) -> BoolArray:
    """Add all pixels within a number of rows and columns of a mask."""
    for axis in (0, 1):
        grown = mask.copy()
        size = mask.shape[axis]
        for shift in range(1, min(pixels, size - 1) + 1):
            here, there = (
                tuple(part if axis == each else slice(None) for each in (0, 1))
                for part in (slice(0, size - shift), slice(shift, size))
            )
            grown[here] |= mask[there]
            grown[there] |= mask[here]
        mask = grown
    return mask


def to_rgb(image: ByteArray) -> ByteArray:
    """Repeat the channel of a grey image: (H, W, 3)."""
    return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)
