"""Image -> what the network sees, and logits -> mask: the only code for either.

Training, evaluation, the command line and the service all call these functions, so what was
learnt is what is served. The steps, in the order of the data::

    decoded image (H, W) or (H, W, 3), uint8 or uint16
      -> prepare        uint8 (H, W, C): intensities, colour, and the resize of mode "resize"
      -> model.windows  uint8 windows: what crosses the bus to a device
      -> normalise      float (N, C, h, w): on the device
      -> UNet           logits
      -> probabilities  float in 0..1: on the device
      -> model.windows  stitched
      -> restore        back to the image's own size (mode "resize")
      -> to_mask        uint8 (H, W); `mask_and_confidence` is both in one

`normalize` and `probabilities` use only the methods of the tensors they are given, so that
importing this module, and serving without torch, does not import it.
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

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 20
"""Values of a 16-bit image that are looked at together."""

_VALUES, _COLUMNS = 1 << 18, 1 << 12
"""Probabilities that are looked at together, a megabyte, and how many columns of them at most."""
_WHOLE = 1 << 22
"""Parts that an interpolated value is made of."""

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def prepare(image: AnyArray, config: PreprocessConfig) -> ByteArray:
    """The uint8 image that is cut into windows.

    Eight bits are enough once the intensities are spread over the image's own range, and a quarter
    of the bytes of a float to carry to a device.

    Args:
        image: (H, W) grey or (H, W, 3) RGB, uint8 or uint16.
        config: of the checkpoint.

    Returns:
        (H, W, C) uint8 for C = len(config.mean); mode "resize": of the size `config.resized`.
        To be read only: it may be a view of `image`.

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
        low, high = _percentiles(image, config.percentiles)
    else:
        low, high = 0.0, float(np.iinfo(image.dtype).max)
    pixels = _stretch(image, low, high)
    if config.mode == "resize":
        pixels = _resize_bytes(pixels, *config.resized, config)
    channels = len(config.mean)
    if pixels.shape[2] == channels:
        return np.ascontiguousarray(pixels)
    if pixels.shape[2] == 1:
        return np.broadcast_to(pixels, (*pixels.shape[:2], channels))  # copied when it is cut
    if channels == 1:
        return np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]
    raise ValueError(f"cannot make {channels} channels of {pixels.shape[2]}")


def _percentiles(image: AnyArray, percentiles: tuple[float, float]) -> tuple[float, float]:
    """Percentiles of all the values of the image, the channels together (that keeps its colours).

    From a histogram: exact for integers, and one pass whatever the size.
    """
    counts = _histogram(image)
    cumulated = np.cumsum(counts)
    # at least one value: 0% is the lowest there is
    ranks = [max(cumulated[-1] * percent / 100, 1) for percent in percentiles]
    low, high = (float(value) for value in np.searchsorted(cumulated, ranks))
    if high <= low:  # a nearly empty field: its few bright pixels are all there is to see
        values = np.flatnonzero(counts)
        low, high = float(values[0]), float(values[-1])
    return low, high


def _histogram(image: AnyArray) -> npt.NDArray[np.int64]:
    """How often each value occurs.

    Pillow counts bytes where they lie, ten times as fast as `np.bincount`; and that one widens
    what it counts to eight bytes a value, so it gets a few rows at a time.
    """
    if image.dtype == np.uint8:
        channels = np.array(_pillow(image).histogram(), np.int64)
        total: npt.NDArray[np.int64] = channels.reshape(-1, 256).sum(axis=0)
        return total
    counts = np.zeros(int(np.iinfo(image.dtype).max) + 1, np.int64)
    for rows in _blocks(image):
        counts += np.bincount(rows.ravel(), minlength=len(counts))
    return counts


def _stretch(image: AnyArray, low: float, high: float) -> ByteArray:
    """low..high -> 0..255, clipped. A table, since there are only so many values."""
    values = np.arange(int(np.iinfo(image.dtype).max) + 1, dtype=np.float32)
    table = np.clip((values - low) * (255.0 / max(high - low, 1.0)) + 0.5, 0, 255).astype(np.uint8)
    if image.dtype == np.uint8:
        if (low, high) == (0, 255):
            return image
        looked_up = _pillow(image).point(table.tolist() * image.shape[2])
        return np.asarray(looked_up).reshape(image.shape)
    stretched = np.empty(image.shape, np.uint8)
    for rows, out in zip(_blocks(image), _blocks(stretched), strict=True):
        out[...] = table[rows]
    return stretched


def _pillow(image: ByteArray) -> Image.Image:
    """(H, W, 1) or (H, W, 3)"""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def _blocks(image: AnyArray) -> list[AnyArray]:
    """A few rows at a time, so that what is made of them is never as large as the image."""
    most = max(1, _BLOCK // (image.shape[1] * image.shape[2]))
    return [image[rows] for rows in _parts(image.shape[0], most)]


def _resize_bytes(
    pixels: ByteArray, height: int, width: int, config: PreprocessConfig
) -> ByteArray:
    """Antialiased, by Pillow, whose fixed-point filters are fast on bytes."""
    if pixels.shape[:2] == (height, width):
        return pixels
    resized = _pillow(pixels).resize((width, height), _FILTERS[config.interpolation])
    return np.asarray(resized).reshape(height, width, pixels.shape[2])


def normalize(windows: Tensor, config: PreprocessConfig) -> Tensor:
    """(N, h, w, C) uint8 -> (N, C, h, w) float32, (value/255 - mean) / std, on their device."""
    scaled = windows.permute(0, 3, 1, 2).float()
    mean = scaled.new_tensor(config.mean).view(1, -1, 1, 1)
    std = scaled.new_tensor(config.std).view(1, -1, 1, 1)
    return (scaled / 255 - mean) / std


def probabilities(logits: Tensor, config: PreprocessConfig) -> Tensor:
    """(N, C, h, w) logits -> probabilities in 0..1, float32.

    Binary models: a sigmoid a channel (foreground; the border between touching objects, if there
    is a second). Others: a softmax over the classes.
    """
    logits = logits.float()
    return logits.sigmoid() if config.binary else logits.softmax(dim=1)


def resize_to_image(stitched: FloatArray, height: int, width: int) -> FloatArray:
    """(C, h, w) probabilities -> (C, height, width): the way back of mode "resize".

    Bilinear, and antialiased where the image was smaller than the window.
    """
    if stitched.shape[1:] == (height, width):
        return stitched
    restored = np.empty((len(stitched), height, width), np.float32)
    for rows, columns, tile in _restored(stitched, height, width):
        restored[:, rows, columns] = tile
    return restored


def _restored(
    stitched: FloatArray, height: int, width: int
) -> Iterator[tuple[slice, slice, FloatArray]]:
    """What `resize_to_image` returns in tiles, and their rows and columns: so small that what is
    made of a tile is made while it is in the processor's cache."""
    if height < stitched.shape[1]:  # the fewer rows first: a flat image may be very wide
        stitched = _resized(stitched, 1, height, slice(0, height))
    for columns in _parts(width, _COLUMNS):
        wide = _resized(stitched, 2, width, columns)
        for rows in _parts(height, max(1, _VALUES // (len(wide) * wide.shape[2]))):
            yield rows, columns, _resized(wide, 1, height, rows)


def _parts(length: int, most: int) -> list[slice]:
    return [slice(start, min(start + most, length)) for start in range(0, length, most)]


def _resized(values: FloatArray, axis: int, length: int, part: slice) -> FloatArray:
    """`part` of `values` (C, h, w) resized to `length` along the axis (1 or 2)."""
    if values.shape[axis] == length:
        return values[:, part] if axis == 1 else values[:, :, part]
    index, shares = _taps(values.shape[axis], length, part)
    if axis == 1:
        shares = shares[:, :, None]
    resized: FloatArray = values.take(index[0], axis)
    resized *= shares[0]
    for places, share in zip(index[1:], shares[1:], strict=True):
        tap = values.take(places, axis)
        tap *= share
        resized += tap
    return resized


def _taps(source: int, target: int, part: slice) -> tuple[npt.NDArray[np.intp], FloatArray]:
    """Which of `source` pixels each of `part` of the `target` pixels is made of, and the share of
    each: (taps, pixels).

    A triangle around the centre of each pixel that reaches as far as the next of the coarser ones.
    Shares are multiples of 2^-22 with a sum of exactly 1, so that what is surely 1 stays 1.
    """
    scale = source / target
    reach = max(scale, 1.0)
    centre = (np.arange(part.start, part.stop) + 0.5) * scale
    first = np.floor(centre - reach + 0.5).astype(np.intp)
    index = first + np.arange(math.ceil(2 * reach))[:, None]
    shares = np.maximum(1 - np.abs(index + 0.5 - centre) / reach, 0)
    shares[(index < 0) | (index >= source)] = 0
    whole = np.rint(shares * (_WHOLE / shares.sum(axis=0)))
    whole[whole.argmax(axis=0), np.arange(whole.shape[1])] += _WHOLE - whole.sum(axis=0)
    return index.clip(0, source - 1), (whole / _WHOLE).astype(np.float32)


def mask_and_confidence(
    stitched: FloatArray,
    height: int,
    width: int,
    config: PreprocessConfig,
    threshold: float | None = None,
) -> tuple[ByteArray, float]:
    """(C, h, w) probabilities -> the mask (height, width), and the confidence in it.

    The same as `to_mask` and `confidence` of what `resize_to_image` returns, which is never held as
    a whole: for a photograph that is 10 MB, read and written three times.
    """
    if config.binary:
        stitched = stitched[:1]  # the borders between objects decide nothing here
    mask = np.empty((height, width), np.uint8)
    sure = 0.0
    for rows, columns, tile in _restored(stitched, height, width):
        part = to_mask(tile, config, threshold)
        mask[rows, columns] = part
        sure += confidence(tile, config) * part.size
    return mask, sure / mask.size


def to_mask(
    stitched: FloatArray, config: PreprocessConfig, threshold: float | None = None
) -> ByteArray:
    """(C, H, W) probabilities -> (H, W) uint8.

    Binary models: 255 where the foreground's probability is at least the threshold (the
    checkpoint's, unless given), else 0. Others: the index of the most probable class.
    """
    if config.binary:
        limit = config.threshold if threshold is None else threshold
        mask: ByteArray = (stitched[0] >= limit).view(np.uint8) * np.uint8(255)
        return mask
    indices: ByteArray = stitched.argmax(axis=0).astype(np.uint8)
    return indices


def confidence(stitched: FloatArray, config: PreprocessConfig) -> float:
    """(C, H, W) probabilities -> mean over the pixels of the probability of what was decided."""
    if not config.binary:
        return float(stitched.max(axis=0).mean())
    distances = stitched[0] - np.float32(0.5)  # max(p, 1 - p) is 1/2 + |p - 1/2|
    return 0.5 + float(np.abs(distances, out=distances).mean())
