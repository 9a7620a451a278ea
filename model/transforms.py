"""Image -> network input, and logits -> mask.

Training, evaluation, the command line and the service all call these functions, so a model serves
exactly what it was trained on. The steps, in the order of the data::

    decoded image (H, W) or (H, W, 3), uint8 or uint16
      -> prepare        uint8 (H, W, C): intensities, color, and the resize of mode "resize"
      -> model.windows  uint8 windows, copied to a device
      -> normalize      float (N, C, h, w): on the device
      -> UNet           logits
      -> probabilities  float in 0..1: on the device
      -> model.windows  blended
      -> resize_to_image  to the image's own size (mode "resize")
      -> to_mask        uint8 (H, W); `mask_and_confidence` does the last two steps

`normalize` and `probabilities` only call methods of the tensors they are given, so this module does
not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from model.arrays import AnyArray, ByteArray, FloatArray
from model.config import PreprocessConfig
from model.outliers import count_few, find_gaps, replace_absurd

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_VALUES = 1 << 20
"""Values of a 16-bit image that are processed at once."""

_TILE_VALUES, _TILE_COLUMNS = 1 << 18, 1 << 12
"""Probabilities in a tile (a megabyte, which fits the cache), and most columns of a tile."""
_WEIGHT_UNIT = 1 << 22
"""Interpolation weights are multiples of 1 over this."""

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def prepare(image: AnyArray, config: PreprocessConfig) -> ByteArray:
    """Prepare an image for cutting into windows.

    Eight bits suffice once intensities are stretched to the image's own range, and a device
    receives a quarter of the bytes of float32.

    Args:
        image: (H, W) grey or (H, W, 3) RGB, uint8 or uint16.
        config: of the checkpoint.

    Returns:
        (H, W, C) uint8 for C = len(config.mean); in mode "resize", of size `config.resized`.
        Read-only: it may be a view of `image`.

    Raises:
        ValueError: another type or shape.
    """
    if image.dtype not in (np.uint8, np.uint16) or image.ndim not in (2, 3) or not image.size:
        raise ValueError(
            f"an image is uint8 or uint16, (H, W) or (H, W, 3), not {image.dtype} {image.shape}"
        )
    if image.ndim == 2:
        image = image[:, :, None]
    if config.intensity == "percentile":
        grey = _take_grey(image)
        pixels = stretch_contrast(grey, config.percentiles, image.shape[2] // grey.shape[2])
    else:
        pixels = _stretch(image, 0.0, float(np.iinfo(image.dtype).max))
    if config.mode == "resize":
        pixels = _resize_bytes(pixels, *config.resized, config)
    channels = len(config.mean)
    if pixels.shape[2] == channels:
        return np.ascontiguousarray(pixels)
    if pixels.shape[2] == 1:
        return np.broadcast_to(pixels, (*pixels.shape[:2], channels))  # a view; cutting copies
    if channels == 1:
        return np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]
    raise ValueError(f"cannot make {channels} channels of {pixels.shape[2]}")


def _take_grey(image: AnyArray) -> AnyArray:
    """Take one channel, (H, W, 1), of an 8-bit image (H, W, 3) with three equal ones.

    Grey images are often stored in color, and one channel takes a third of the time. Others are
    returned as they are; most of these differ in their first row.
    """
    if image.dtype != np.uint8 or image.shape[2] != 3:
        return image
    for rows in (image[:1], image):
        values = rows.reshape(-1)
        changes = values[1:] != values[:-1]
        changes[2::3] = False  # from one pixel to the next
        if changes.any():
            return image
    return np.ascontiguousarray(image[:, :, :1])


def stretch_contrast(
    image: AnyArray, percentiles: tuple[float, float], copies: int = 1
) -> ByteArray:
    """Map the values between two percentiles of an image to 0..255.

    Args:
        image: (H, W) or (H, W, C), uint8 or uint16.
        percentiles: low and high, 0..100, of all channels together.
        copies: equal channels that each channel stands for. They only affect how ranks are rounded.

    Returns:
        The same shape, uint8.
    """
    channels = image[:, :, None] if image.ndim == 2 else image
    channels, counts = _without_absurd(channels)
    return _stretch(channels, *_percentiles(counts * copies, percentiles)).reshape(image.shape)


def _without_absurd(image: AnyArray) -> tuple[AnyArray, npt.NDArray[np.int64]]:
    """Replace absurd values of a 16-bit image (see `model.outliers`), and count each value.

    Images without absurd values, and those of 8 bits, stay as they are.
    """
    counts = _histogram(image)
    few = count_few(image.size)
    if image.dtype == np.uint8 or few == 0:
        return image, counts
    cumulated = np.cumsum(counts)
    ranks = np.arange(1, few + 2)
    low, high = find_gaps(
        np.searchsorted(cumulated, ranks), np.searchsorted(cumulated, image.size - few - 1 + ranks)
    )
    values = np.arange(len(counts))
    if not counts[(values < low) | (values > high)].any():
        return image, counts
    image = image.copy()
    replace_absurd(image, (image < low) | (image > high))
    return image, _histogram(image)


def _percentiles(
    counts: npt.NDArray[np.int64], percentiles: tuple[float, float]
) -> tuple[float, float]:
    """Compute percentiles over all channels together, which keeps the colors.

    A histogram is exact for integers and takes one pass.

    Args:
        counts: how often the image has each value.
        percentiles: low and high, 0..100.
    """
    cumulated = np.cumsum(counts)
    # at least one value, so that 0% is the minimum
    ranks = [max(cumulated[-1] * percent / 100, 1) for percent in percentiles]
    low, high = (float(value) for value in np.searchsorted(cumulated, ranks))
    if high <= low:  # nearly empty: use the full range of the few others
        values = np.flatnonzero(counts)
        low, high = float(values[0]), float(values[-1])
    return low, high


def _histogram(image: AnyArray) -> npt.NDArray[np.int64]:
    """Count each value.

    For bytes Pillow is four times as fast as `np.bincount`. That one converts its input to eight
    bytes per value, so it gets a few rows at a time.
    """
    if image.dtype == np.uint8:  # all channels as one, which Pillow need not copy
        return np.array(Image.fromarray(image.reshape(len(image), -1)).histogram(), np.int64)
    counts = np.zeros(int(np.iinfo(image.dtype).max) + 1, np.int64)
    for rows in _row_blocks(image):
        counts += np.bincount(rows.ravel(), minlength=len(counts))
    return counts


def _stretch(image: AnyArray, low: float, high: float) -> ByteArray:
    """Map low..high to 0..255, clipped, by a lookup table."""
    values = np.arange(int(np.iinfo(image.dtype).max) + 1, dtype=np.float32)
    table = np.clip((values - low) * (255.0 / max(high - low, 1.0)) + 0.5, 0, 255).astype(np.uint8)
    if image.dtype == np.uint8:
        if (low, high) == (0, 255):
            return image
        # Faster than indexing by the array, and than Pillow.
        looked_up = image.tobytes().translate(table.tobytes())
        return np.frombuffer(looked_up, np.uint8).reshape(image.shape)
    stretched = np.empty(image.shape, np.uint8)
    for rows, out in zip(_row_blocks(image), _row_blocks(stretched), strict=True):
        out[...] = table[rows]
    return stretched


def _to_pillow(image: ByteArray) -> Image.Image:
    """Wrap an array, (H, W, 1) or (H, W, 3), as a Pillow image."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def _row_blocks(image: AnyArray) -> list[AnyArray]:
    """Split an image into blocks of rows, so that temporary arrays stay small."""
    most = max(1, _BLOCK_VALUES // (image.shape[1] * image.shape[2]))
    return [image[rows] for rows in _slices(image.shape[0], most)]


def _resize_bytes(
    pixels: ByteArray, height: int, width: int, config: PreprocessConfig
) -> ByteArray:
    """Resize with antialiasing, by Pillow, whose fixed-point filters are fast on bytes."""
    if pixels.shape[:2] == (height, width):
        return pixels
    resized = _to_pillow(pixels).resize((width, height), _FILTERS[config.interpolation])
    return np.asarray(resized).reshape(height, width, pixels.shape[2])


def normalize(windows: Tensor, config: PreprocessConfig) -> Tensor:
    """Compute (value/255 - mean) / std: (N, h, w, C) uint8 -> (N, C, h, w) float32, same device."""
    scaled = windows.permute(0, 3, 1, 2).float()
    mean, std = (_constants(values, scaled) for values in (config.mean, config.std))
    return (scaled / 255 - mean) / std


def _constants(values: tuple[float, ...], like: Tensor) -> Tensor:
    """The values as a tensor (1, C, 1, 1) on the device of `like`.

    They are copied there once: every copy would wait for the device, and one within the capture of
    a CUDA graph is an error.
    """
    key = values, like.device
    if key not in _constants_by_device:
        _constants_by_device[key] = like.new_tensor(values).view(1, -1, 1, 1)
    return _constants_by_device[key]


_constants_by_device: dict[tuple[tuple[float, ...], object], Tensor] = {}


def probabilities(logits: Tensor, config: PreprocessConfig) -> Tensor:
    """Convert logits to probabilities: (N, C, h, w) -> the same shape, float32 in 0..1.

    Binary models: a sigmoid per channel (the foreground, and the border between touching objects if
    there is a second channel). Others: a softmax over the classes.
    """
    logits = logits.float()
    return logits.sigmoid() if config.binary else logits.softmax(dim=1)


def resize_to_image(stitched: FloatArray, height: int, width: int) -> FloatArray:
    """Resize probabilities (C, h, w) to the image's size: (C, height, width).

    Bilinear, and antialiased where the image is smaller than the window. Undoes mode "resize".
    """
    if stitched.shape[1:] == (height, width):
        return stitched
    restored = np.empty((len(stitched), height, width), np.float32)
    for rows, columns, tile in _resized_tiles(stitched, height, width):
        restored[:, rows, columns] = tile
    return restored


def _resized_tiles(
    stitched: FloatArray, height: int, width: int
) -> Iterator[tuple[slice, slice, FloatArray]]:
    """Yield the rows, columns and values of `resize_to_image` in tiles that fit the CPU's cache."""
    if height < stitched.shape[1]:  # rows first: the image may be very wide
        stitched = _resize_axis(stitched, 1, height, slice(0, height))
    for columns in _slices(width, _TILE_COLUMNS):
        wide = _resize_axis(stitched, 2, width, columns)
        for rows in _slices(height, max(1, _TILE_VALUES // (len(wide) * wide.shape[2]))):
            yield rows, columns, _resize_axis(wide, 1, height, rows)


def _slices(length: int, most: int) -> list[slice]:
    return [slice(start, min(start + most, length)) for start in range(0, length, most)]


def _resize_axis(values: FloatArray, axis: int, length: int, part: slice) -> FloatArray:
    """Resize `values` (C, h, w) to `length` along axis 1 or 2, and return the slice `part`."""
    if values.shape[axis] == length:
        return values[:, part] if axis == 1 else values[:, :, part]
    index, weights = _kernel(values.shape[axis], length, part)
    if axis == 1:
        weights = weights[:, :, None]
    resized: FloatArray = values.take(index[0], axis)
    resized *= weights[0]
    for indices, weight in zip(index[1:], weights[1:], strict=True):
        tap = values.take(indices, axis)
        tap *= weight
        resized += tap
    return resized


def _kernel(source: int, target: int, part: slice) -> tuple[npt.NDArray[np.intp], FloatArray]:
    """Compute the interpolation kernel for the target pixels in `part`.

    The filter is a triangle around each pixel's centre, as wide as two pixels of the coarser grid.
    Weights are multiples of 2^-22 that sum to exactly 1, so that constants are preserved.

    Returns:
        Source indices and weights, each (taps, pixels).
    """
    scale = source / target
    reach = max(scale, 1.0)
    centre = (np.arange(part.start, part.stop) + 0.5) * scale
    first = np.floor(centre - reach + 0.5).astype(np.intp)
    index = first + np.arange(math.ceil(2 * reach))[:, None]
    weights = np.maximum(1 - np.abs(index + 0.5 - centre) / reach, 0)
    weights[(index < 0) | (index >= source)] = 0
    units = np.rint(weights * (_WEIGHT_UNIT / weights.sum(axis=0)))
    units[units.argmax(axis=0), np.arange(units.shape[1])] += _WEIGHT_UNIT - units.sum(axis=0)
    return index.clip(0, source - 1), (units / _WEIGHT_UNIT).astype(np.float32)


def mask_and_confidence(
    stitched: FloatArray,
    height: int,
    width: int,
    config: PreprocessConfig,
    threshold: float | None = None,
) -> tuple[ByteArray, float]:
    """Compute the mask (height, width) of probabilities (C, h, w), and the confidence in it.

    The result equals `to_mask` and `confidence` after `resize_to_image`, without ever holding the
    resized probabilities: for a photograph these are 10 MB, read and written three times.
    """
    if config.binary:
        stitched = stitched[:1]  # the mask does not depend on the border channel
    mask = np.empty((height, width), np.uint8)
    certainty = 0.0
    for rows, columns, tile in _resized_tiles(stitched, height, width):
        part = to_mask(tile, config, threshold)
        mask[rows, columns] = part
        certainty += confidence(tile, config) * part.size
    return mask, certainty / mask.size


def to_mask(
    stitched: FloatArray, config: PreprocessConfig, threshold: float | None = None
) -> ByteArray:
    """Convert probabilities (C, H, W) to a mask (H, W) uint8.

    Binary models: 255 where the foreground's probability reaches the threshold (the checkpoint's,
    unless given), 0 elsewhere. Others: the index of the most probable class.
    """
    if config.binary:
        limit = config.threshold if threshold is None else threshold
        mask: ByteArray = (stitched[0] >= limit).view(np.uint8) * np.uint8(255)
        return mask
    indices: ByteArray = stitched.argmax(axis=0).astype(np.uint8)
    return indices


def confidence(stitched: FloatArray, config: PreprocessConfig) -> float:
    """Mean over all pixels of the predicted class's probability, from (C, H, W)."""
    if not config.binary:
        return float(stitched.max(axis=0).mean())
    distances = stitched[0] - np.float32(0.5)  # max(p, 1 - p) = 1/2 + |p - 1/2|
    return 0.5 + float(np.abs(distances, out=distances).mean())
