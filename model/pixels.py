"""Bytes of an image file -> the array of its pixels: for training, evaluation and the service.

The formats are read by `model.readers` and `model.tiff`. Knows no limits on size and no HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from model.arrays import AnyArray, UInt16Array
from model.outliers import count_few, find_range, replace_absurd

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".avif"),
    *(".jp2", ".j2k", ".jpf", ".jpx", ".heic", ".heif"),
)
"""Suffixes of files that are taken for images."""

SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""

_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""Little-endian and big-endian TIFF and BigTIFF."""
_SENTINELS = (-9999.0, -99999.0, -32768.0, -32767.0, 1e20, 9.969209968386869e36)
"""Values that programs write where data are missing, besides the extremes of a number type."""
_BLOCK_VALUES = 1 << 20
"""Values that are converted at once, so that temporary arrays stay small."""


class SelectionError(ValueError):
    """A page or a channel has to be chosen, or the chosen one does not exist.

    Attributes:
        choices: the pages or channels to choose from, as `page=N` or `channel=N`; empty if the
            message says it. Not part of the message: training has no such parameters.
    """

    def __init__(self, message: str, choices: str = "") -> None:
        super().__init__(message)
        self.choices = choices


def describe_choices(number: int, what: str) -> str:
    """Say how many pages or channels an image has, and how they are counted."""
    if number == 1:
        return f"the image has 1 {what}, {what}=0"
    return f"the image has {number} {what}s, {what}=0 to {what}={number - 1}"


def decode_image(data: bytes, page: int | None = None) -> AnyArray:
    """Decode an image of a file, upright.

    Args:
        page: of a TIFF, from 0; None for the only one.

    Returns:
        (H, W, 3) or, for grey images, (H, W); uint8, or uint16 where the file has more than 8 bits.
        Integers that fit into 16 bits keep their values; other integers and floats are spread over
        their own range, see `spread`. Transparency is laid on black.

    Raises:
        SelectionError: a TIFF of several pages or channels, and nothing says which one is meant.
        OSError, ValueError, SyntaxError: not an image, a damaged one, or a kind that is not read.
    """
    if is_tiff(data):
        from model.tiff.reader import TiffReader

        return TiffReader(data).select(page).read()
    from model.readers import open_image

    reader = open_image(data)
    return np.ascontiguousarray(turn(reader.read(), reader.orientation))


def is_tiff(data: bytes) -> bool:
    return data.startswith(_TIFF_SIGNATURES)


def to_array(image: Image.Image) -> AnyArray:
    """Convert a Pillow image; 16-bit color has lost its lower 8 bits before.

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


def lay_on_black(colors: AnyArray, alpha: AnyArray | None) -> AnyArray:
    """Multiply colors by their alpha, rounded to the nearest.

    Args:
        colors: (H, W, C), uint8 or uint16.
        alpha: (H, W, 1), of the same type; (H, W, 0) or None for none.

    Returns:
        (H, W, C), or (H, W) for one channel.
    """
    if alpha is not None and alpha.shape[2]:
        full = np.uint32(np.iinfo(colors.dtype).max)
        # Products of 16 bits fit into 32, also with half of `full` added.
        colors = map_rows(
            lambda rows, opacity: (rows.astype(np.uint32) * opacity + full // 2) // full,
            colors.dtype.type,
            colors,
            alpha,
        )
    return colors[:, :, 0] if colors.shape[2] == 1 else colors


def spread(values: AnyArray, *, inverted: bool = False, nodata: float | None = None) -> UInt16Array:
    """Convert numbers of any type to 16 bits.

    A few absurd values do not change what becomes of the others: see `model.outliers`. Values that
    stand for missing data are left out as well: `nodata`, what is not finite, and `_SENTINELS`
    where many lie apart from the others.

    Args:
        values: (H, W) or (H, W, C), integers or floats.
        inverted: whether the smallest number is the brightest.
        nodata: the value of pixels without data.

    Returns:
        Integers from 0 to 65535 as they are; others spread over their range, 0 where data are
        missing. Absurd values become the median of their neighbours. The same shape, uint16.
    """
    missing = _find_missing(values, nodata)
    count, *ends = _measure(values, missing)
    low, high = find_range(_present(values, missing), count) if count else ends
    as_they_are = values.dtype.kind in "iu" and low >= 0 and high <= 65535
    # Halves, because the range of float64 itself may not fit into float64.
    start, width = (high, low) if inverted else (low, high)
    start, width = start / 2, width / 2 - start / 2

    def scale(rows: AnyArray) -> AnyArray:
        present = _is_present(rows, missing)
        clipped = np.where(present, rows, low).astype(np.float64).clip(low, high)
        if as_they_are:
            return np.where(present, 65535 - clipped if inverted else clipped, 0)
        scaled = (clipped / 2 - start) / (width or 1.0)
        return np.where(present, np.rint(scaled * 65535), 0)

    scaled = map_rows(scale, np.uint16, values)
    if [low, high] != ends:
        absurd = map_rows(
            lambda rows: _is_present(rows, missing) & ((rows < low) | (rows > high)),
            np.bool_,
            values,
        )
        gone = map_rows(lambda rows: ~_is_present(rows, missing), np.bool_, values)
        replace_absurd(scaled, absurd, gone)
    return scaled


def _find_missing(values: AnyArray, nodata: float | None) -> tuple[float, ...]:
    """Find the values that stand for missing data.

    One that no tag names must lie further from the others than these are apart. So it has to be
    the least or the greatest.
    """
    missing = () if nodata is None else (nodata,)
    sentinels = _list_sentinels(values.dtype)
    count, *ends = _measure(values, missing)
    for extreme in ends if count else ():
        if extreme not in sentinels:
            continue
        others = (*missing, extreme)
        rest, _, _ = _measure(values, others)
        if rest == 0 or count - rest <= count_few(count):  # a few are absurd instead
            continue
        low, high = find_range(_present(values, others), rest)
        # Halves, because the range of float64 itself may not fit into float64.
        gap = max(low / 2 - extreme / 2, extreme / 2 - high / 2)
        if low < high and gap > high / 2 - low / 2:
            missing = others
    return missing


def _measure(values: AnyArray, missing: tuple[float, ...]) -> tuple[int, float, float]:
    """Count the values that are present, and find the least and the greatest; zeros for none."""
    count, low, high = 0, np.inf, -np.inf
    for rows in _present(values, missing):
        if rows.size:
            count += rows.size
            low, high = min(low, float(rows.min())), max(high, float(rows.max()))
    return (count, low, high) if count else (0, 0.0, 0.0)


def _list_sentinels(dtype: np.dtype[Any]) -> tuple[float, ...]:
    """List the values that programs write where a number type has no data."""
    if dtype.kind == "f":
        extremes = [value for kind in (np.float32, dtype) for value in _list_extremes(kind)]
    else:
        extremes = [np.iinfo(dtype).min, np.iinfo(dtype).max]
    own = [float(value) for value in extremes if value != 0]
    if dtype.kind == "f":
        with np.errstate(over="ignore"):  # some are beyond float16
            return (*own, *np.array(_SENTINELS).astype(dtype).tolist())
    return (*own, *_SENTINELS)


def _list_extremes(kind: npt.DTypeLike) -> tuple[Any, Any]:
    """The least and the greatest value of a type of floats."""
    limits = np.finfo(kind)
    return limits.min, limits.max


def _is_present(rows: AnyArray, missing: tuple[float, ...]) -> AnyArray:
    present: AnyArray = np.isfinite(rows)
    for value in missing:
        if _fits(value, rows.dtype):
            with np.errstate(over="ignore"):
                present &= rows != rows.dtype.type(value)
    return present


def _fits(value: float, dtype: np.dtype[Any]) -> bool:
    """Whether a type has a value, so that numbers of it can be compared with it."""
    if dtype.kind == "f":
        return True
    limits = np.iinfo(dtype)
    return value.is_integer() and limits.min <= value <= limits.max


def _present(values: AnyArray, missing: tuple[float, ...]) -> Iterator[AnyArray]:
    """Yield the values that are present, a few rows at a time."""
    whole = values.dtype.kind in "iu" and not missing
    for rows in _split_rows(values):
        yield rows if whole else rows[_is_present(rows, missing)]


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
