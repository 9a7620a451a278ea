"""Mask files -> labels.

A mask file holds one channel of integers, or colors. Knows Pillow and the reader of TIFFs; no
images, no data sets.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from model.arrays import AnyArray, Int32Array
from model.errors import DataError
from model.evaluation.metrics import VOID
from model.files import MAX_IMAGE_BYTES, read_file
from model.pixels import is_tiff

_INTEGER_MODES = ("L", "1", "I;16", "I;16B", "I")
"""Pillow's modes with one channel of integers, without a palette."""
_COLOR_MODES = ("RGB", "RGBA", "LA", "PA")
_MAX_COLORS = 256
"""More colors than this are a photograph, not a mask."""
_GREY_SPREAD, _GREY_SHARE = 64, 0.001
"""Difference of the channels of a pixel that compression does not make, and the share of pixels
that may have more."""


@dataclasses.dataclass(frozen=True)
class MaskCoding:
    """The meaning of the values of mask files.

    Attributes:
        kind: "binary", "classes" or "instances", as in `DataConfig.labels`.
        classes: number of classes, including the background; used if `kind` is "classes".
        ignore: the value of pixels that have no label; -1 for none.
        colors: (red, green, blue) of each class, in their order; empty: values are indices.
    """

    kind: str = "binary"
    classes: int = 2
    ignore: int = -1
    colors: tuple[tuple[int, int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class StoredMask:
    """The content of a mask file.

    Attributes:
        values: (H, W) integers as they are stored, or (H, W, 3) uint8 colors.
        palette: (N, 3) uint8, the colors that the integers stand for; None without a palette.
        is_lossy: compression has changed values near edges.
    """

    values: AnyArray
    palette: AnyArray | None = None
    is_lossy: bool = False

    def pack_colors(self) -> Int32Array:
        """Return the color of each pixel as one integer, (H, W), 0xRRGGBB.

        Raises:
            ValueError: integers without a palette do not fit into 8 bits.
        """
        values = self.values
        if values.ndim == 2 and self.palette is not None:
            table = np.zeros((max(256, len(self.palette)), 3), np.uint8)
            table[: len(self.palette)] = self.palette
            values = table[values.astype(np.intp)]
        elif values.ndim == 2:
            if values.min() < 0 or values.max() > 255:
                raise ValueError(f"the value {values.max()} is not a color of 8 bits")
            values = np.repeat(values[:, :, None], 3, axis=2)
        return pack_colors(values)


def pack_colors(colors: AnyArray) -> Int32Array:
    """Convert colors (..., 3) in 0..255 to integers (...), 0xRRGGBB."""
    wide = colors.astype(np.int32)
    packed: Int32Array = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
    return packed


def read_mask(path: Path, page: int | None, coding: MaskCoding) -> Int32Array:
    """Read labels, (H, W): the stored values, or 0 and 1 if binary; `VOID` where there is none.

    Args:
        page: of a stack, from 0; None for the only one.

    Raises:
        DataError: the file cannot be read, or its values are not what `coding` says.
    """
    stored = read_stored_mask(path, page)
    try:
        labels = _decode(stored, coding)
    except ValueError as error:
        raise DataError(f"{path} {error}") from error
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < (VOID if coding.ignore >= 0 else 0):
        raise DataError(
            f"{path} contains the label {lowest}; labels are 0 or more (set ignore to the value of "
            "pixels without a label, and store it as a positive number)"
        )
    if coding.kind == "classes" and highest >= coding.classes:
        raise DataError(
            f"{path} contains the label {highest}; the {coding.classes} classes are 0 to "
            f"{coding.classes - 1}"
        )
    return labels


def _decode(stored: StoredMask, coding: MaskCoding) -> Int32Array:
    """Convert the values of a mask to labels.

    Raises:
        ValueError: the values are not what `coding` says; the message continues the file's name.
    """
    values = stored.values
    if stored.is_lossy and (coding.kind != "binary" or coding.colors):
        raise ValueError(
            "has lossy compression, which changes labels near edges; save masks of several values "
            "as PNG, TIFF or GIF"
        )
    if coding.colors:
        return _decode_colors(stored, coding)
    if values.ndim == 3 and coding.kind == "classes":
        raise ValueError("has 3 channels; list the color of each class in `colors`")
    if coding.kind == "binary":
        labels = _binarize(stored)
    elif values.ndim == 3:
        labels = number_colors(pack_colors(values))
    else:
        limits = np.iinfo(np.int32)
        if values.min() < limits.min or values.max() > limits.max:
            raise ValueError(f"contains a label that is not within {limits.min} to {limits.max}")
        labels = values.astype(np.int32)
    if coding.ignore >= 0 and values.ndim == 2:
        labels[values == coding.ignore] = VOID
    return labels


def number_colors(packed: Int32Array) -> Int32Array:
    """Convert packed colors to labels 1..n, and black to 0."""
    colors, numbers = np.unique(packed, return_inverse=True)
    labels: Int32Array = numbers.reshape(packed.shape).astype(np.int32)
    return labels + np.int32(colors[0] != 0)


def _decode_colors(stored: StoredMask, coding: MaskCoding) -> Int32Array:
    """Convert colors to the indices of their classes."""
    packed = stored.pack_colors()
    known = pack_colors(np.array(coding.colors))
    order = np.argsort(known)
    place = np.minimum(np.searchsorted(known, packed, sorter=order), len(known) - 1)
    labels: Int32Array = order[place].astype(np.int32)
    unknown = known[labels] != packed
    if unknown.any() and coding.ignore < 0:
        color = int(packed[unknown][0])
        raise ValueError(
            f"contains the color {[color >> 16, color >> 8 & 255, color & 255]}, which is not "
            "in `colors` (with `ignore` set, such pixels have no label)"
        )
    labels[unknown] = VOID
    return labels


def _binarize(stored: StoredMask) -> Int32Array:
    """Convert the values of a mask to 0 and 1."""
    values = stored.values
    if stored.is_lossy:
        return (values > 127).astype(np.int32)  # compression leaves grey values near edges
    if values.ndim == 3:
        packed = pack_colors(values)
        if (count := len(np.unique(packed))) > 2:
            raise ValueError(f"has 3 channels and {count} colors; a binary mask has two")
        foreground: Int32Array = (packed > 0).astype(np.int32)
        return foreground
    if values.min() < 0:
        return values.astype(np.int32)  # rejected by `read_mask`, which names the value
    if stored.palette is not None:
        # The order of a palette is arbitrary: white may have the index 0.
        packed = stored.pack_colors()
        if not packed.all():
            values = packed
    labels: Int32Array = (values != 0).astype(np.int32)
    return labels


def read_stored_mask(path: Path, page: int | None = None) -> StoredMask:
    """Read the values of a mask file. Three equal channels become one.

    Args:
        page: of a stack, from 0; None for the only one.

    Raises:
        DataError: the file cannot be read, has fractions, or has more colors than a mask has.
    """
    try:
        data = read_file(path, MAX_IMAGE_BYTES)
        if path.suffix.lower() == ".npy":
            return _check_colors(path, _read_npy(data), is_lossy=False)
        if is_tiff(data):
            return _read_tiff(path, data, page)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    with _open_image(path, data) as file:
        is_lossy = file.format == "JPEG" or (file.format == "WEBP" and b"VP8L" not in data[:64])
        if file.mode == "P":
            palette = np.array(file.getpalette() or (), np.uint8).reshape(-1, 3)
            return StoredMask(np.asarray(file), palette)
        if file.mode in _INTEGER_MODES:
            return StoredMask(np.asarray(file), is_lossy=is_lossy)
        if file.mode not in _COLOR_MODES:
            raise DataError(f"{path} has mode {file.mode}; a mask contains integers or colors")
        if is_lossy:
            _check_grey(path, np.asarray(file.convert("RGB")))
            return StoredMask(np.asarray(file.convert("L")), is_lossy=True)
        return _check_colors(path, _drop_alpha(path, file), is_lossy)


def _check_grey(path: Path, colors: AnyArray) -> None:
    """Check that a mask with lossy compression has no colors.

    Raises:
        DataError: it has. Compression changes colors, so they would not be those of the classes.
    """
    spread = colors.max(axis=2).astype(np.int16) - colors.min(axis=2)
    if (spread > _GREY_SPREAD).mean() > _GREY_SHARE:
        raise DataError(
            f"{path} has colors and lossy compression, which changes them; save such masks as PNG, "
            "TIFF or GIF"
        )


def _read_npy(data: bytes) -> AnyArray:
    """Read an array of integers or booleans, (H, W) or (H, W, 3).

    Raises:
        ValueError: it is something else.
    """
    values: AnyArray = np.load(io.BytesIO(data), allow_pickle=False)
    if values.dtype.kind == "f" and (values == np.rint(values)).all():
        values = values.astype(np.int64)
    if values.dtype.kind not in "biu" or values.shape[2:] not in ((), (1,), (3,)):
        raise ValueError(f"a mask has integers (H, W) or (H, W, 3), not {values.dtype}")
    if values.dtype.kind == "b":
        values = values.astype(np.uint8)
    return values[:, :, 0] if values.shape[2:] == (1,) else values


def _read_tiff(path: Path, data: bytes, page: int | None) -> StoredMask:
    from model.tiff.reader import TiffReader

    image = TiffReader(data).select(page)
    if image.channels == 3:
        colors = image.read()
        if colors.ndim == 3 and colors.dtype == np.uint8:
            return _check_colors(path, colors, is_lossy=False)
    labels = image.read_labels()
    return StoredMask(labels.values, labels.palette)


def _drop_alpha(path: Path, file: Image.Image) -> AnyArray:
    """Return the colors of an image, or its alpha if that alone varies."""
    rgba = np.asarray(file.convert("RGBA"))
    colors, alpha = rgba[:, :, :3], rgba[:, :, 3]
    if alpha.min() == alpha.max():
        return colors
    visible = pack_colors(colors)
    if visible.min() == visible.max():
        return alpha
    raise DataError(f"{path} has colors and transparency; a mask has one of them")


def _check_colors(path: Path, values: AnyArray, is_lossy: bool) -> StoredMask:
    """Join equal channels.

    Raises:
        DataError: there are more colors than a mask has.
    """
    if values.ndim == 3 and (values == values[:, :, :1]).all():
        values = values[:, :, 0]
    if values.ndim == 3:
        count = len(np.unique(pack_colors(values)))
        if count > _MAX_COLORS and len(np.unique(values[::7, ::7])) > _MAX_COLORS // 2:
            raise DataError(
                f"{path} has {count} colors, as a photograph has; a mask has at most {_MAX_COLORS}"
            )
    return StoredMask(values, is_lossy=is_lossy)


@contextmanager
def _open_image(path: Path, data: bytes) -> Iterator[Image.Image]:
    """Open an image; errors of Pillow in the block become a `DataError` that names the file."""
    try:
        with Image.open(io.BytesIO(data)) as file:
            yield file
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
