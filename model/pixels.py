"""Bytes of an image file -> the array of its pixels: for training, evaluation and the service.

The formats are read by `model.readers` and `model.tiff`. Knows no limits on size and no HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from model.arrays import AnyArray, UInt16Array

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".avif"),
    *(".jp2", ".j2k", ".jpf", ".jpx", ".heic", ".heif"),
)
"""Suffixes of files that are taken for images."""

SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""

_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""Little-endian and big-endian TIFF and BigTIFF."""
_BLOCK_VALUES = 1 << 20
"""Values that are converted at once, so that temporary arrays stay small."""


def decode_image(data: bytes) -> AnyArray:
    """Decode the first image of a file, upright.

    Returns:
        (H, W, 3) or, for grey images, (H, W); uint8, or uint16 where the file has more than 8 bits.
        Integers that fit into 16 bits keep their values; other integers and floats are spread over
        their own range. Transparency is laid on black.

    Raises:
        OSError, ValueError, SyntaxError: not an image, a damaged one, or a kind that is not read.
    """
    if is_tiff(data):
        from model.tiff import TiffReader

        return TiffReader(data).read()
    from model.readers import open_image

    reader = open_image(data)
    return np.ascontiguousarray(turn(reader.read(), reader.orientation))


def is_tiff(data: bytes) -> bool:
    return data.startswith(_TIFF_SIGNATURES)


def to_array(image: Image.Image) -> AnyArray:
    """Convert a Pillow image; 16-bit colour has lost its lower 8 bits before.

    Returns:
        See `decode_image`; not upright yet.
    """
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if image.mode in ("I", "F"):
        return spread(np.asarray(image))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        # Multiplied by its alpha: the same as laid on black, without a black image to lay it on.
        return np.asarray(image.convert("RGBA").convert("RGBa"))[:, :, :3]
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    return np.asarray(image.convert("RGB"))


def turn(pixels: AnyArray, orientation: int) -> AnyArray:
    """Turn stored pixels upright, as a view: (H, W, ...) or, for `SIDEWAYS`, (W, H, ...)."""
    if orientation in SIDEWAYS:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def lay_on_black(colours: AnyArray, alpha: AnyArray | None) -> AnyArray:
    """Multiply colours by their alpha, rounded to the nearest.

    Args:
        colours: (H, W, C), uint8 or uint16.
        alpha: (H, W, 1), of the same type; (H, W, 0) or None for none.

    Returns:
        (H, W, C), or (H, W) for one channel.
    """
    if alpha is not None and alpha.shape[2]:
        full = np.uint32(np.iinfo(colours.dtype).max)
        # Products of 16 bits fit into 32, also with half of `full` added.
        colours = map_rows(
            lambda rows, opacity: (rows.astype(np.uint32) * opacity + full // 2) // full,
            colours.dtype.type,
            colours,
            alpha,
        )
    return colours[:, :, 0] if colours.shape[2] == 1 else colours


def spread(values: AnyArray, *, inverted: bool = False) -> UInt16Array:
    """Convert numbers of any type to 16 bits.

    Args:
        values: (H, W) or (H, W, C), integers or floats.
        inverted: whether the smallest number is the brightest.

    Returns:
        Integers from 0 to 65535 as they are; others spread over their finite range, 0 where they
        are not finite. The same shape, uint16.
    """
    low, high = _finite_range(values)
    if values.dtype.kind in "iu" and low >= 0 and high <= 65535:
        same = values.astype(np.uint16)
        return ~same if inverted else same
    # Halves, because the range of float64 itself may not fit into float64.
    start, width = (high, low) if inverted else (low, high)
    start, width = start / 2, width / 2 - start / 2

    def scale(rows: AnyArray) -> AnyArray:
        finite = np.isfinite(rows)
        halves = np.where(finite, rows, low).astype(np.float64) / 2
        scaled = (halves - start) / (width or 1.0)
        return np.where(finite, np.rint(scaled * 65535), 0)

    return map_rows(scale, np.uint16, values)


def _finite_range(values: AnyArray) -> tuple[float, float]:
    """Find the least and the greatest finite value; (0, 0) where there is none."""
    if values.dtype.kind in "iu":
        return float(values.min()), float(values.max())
    low, high = np.inf, -np.inf
    for rows in _split_rows(values):
        finite = rows[np.isfinite(rows)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    return (low, high) if low <= high else (0.0, 0.0)


def map_rows(
    function: Callable[..., AnyArray], kind: type[np.generic], *arrays: AnyArray
) -> AnyArray:
    """Apply a function to a few rows of the arrays at a time.

    Args:
        function: gets rows of each array; its result has the shape of the first.
        kind: type of the result.
    """
    result = np.empty(arrays[0].shape, kind)
    blocks = (_split_rows(array, arrays[0]) for array in (*arrays, result))
    for *rows, out in zip(*blocks, strict=True):
        out[...] = function(*rows)
    return result


def _split_rows(array: AnyArray, like: AnyArray | None = None) -> Iterator[AnyArray]:
    """Split an array into blocks of rows of about `_BLOCK_VALUES` values of `like`."""
    like = array if like is None else like
    step = max(1, _BLOCK_VALUES * len(like) // max(1, like.size))
    return (array[start : start + step] for start in range(0, len(array), step))
