"""The contract of a reader of one image format, and what readers share. Knows no format."""

from __future__ import annotations

import abc
import re
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from model.arrays import AnyArray, Shape
from model.pixels import lay_on_black, map_rows, to_array

_ORIENTATION = 0x0112
_XMP_ORIENTATION = re.compile(rb"""tiff:Orientation(?:=["']|>)([1-8])""")
_ZERO_TAIL = 64
"""Zero bytes that compressed pixels may end with, whatever their size."""
_ZERO_TAIL_PART = 8
"""Compressed pixels may end with an eighth of zero bytes: white WebPs end with a twentieth."""


class UnsupportedKind(ValueError):
    """An image of a kind that is not read; the message is the name of the kind."""


class DamagedImage(ValueError):
    """An image is damaged; the message names the part. Libraries raise exceptions of their own."""


class MissingPixels(ValueError):
    """Pixels are missing, or overwritten; the message says which."""


class UnknownFormat(ValueError):
    """Bytes that begin like none of the formats that are read."""


class ImageReader(abc.ABC):
    """The first image of a file: the header is read at once, the pixels by `read`.

    Attributes:
        format: name of the format.
        height, width: of the stored image, in pixels.
        orientation: as in EXIF, 1 to 8: how to turn the stored image upright.
        channels: 1 for grey, 3 for colors; transparency is none of them.
        pages: number of frames of an animation; 1 for other images.
    """

    format: ClassVar[str]
    height: int
    width: int
    orientation: int = 1
    channels: int = 3
    pages: int = 1

    @abc.abstractmethod
    def read(self, at_least: Shape | None = None) -> AnyArray:
        """Decode the stored image.

        Args:
            at_least: (height, width) that are enough: a reader may decode at a fraction of the
                size, which is much faster.

        Returns:
            See `model.pixels.decode_image`; not upright yet.

        Raises:
            MissingPixels: the reader knows which pixels are missing.
            DamagedImage: the reader knows which other part is damaged.
            OSError, ValueError: otherwise damaged.
        """


def read_orientation(exif: bytes, xmp: bytes = b"") -> int:
    """Read the orientation, 1 to 8; 1 where there is none, or where the metadata is damaged.

    Args:
        exif: Exif 2.32 data, of which tag 274 counts; empty for none.
        xmp: used if EXIF has no orientation, as Pillow does; empty for none.
    """
    value: Any = None
    if exif:
        tags = Image.Exif()
        try:
            tags.load(exif)
            value = tags.get(_ORIENTATION)
        except Exception:  # Pillow raises errors of many classes for damaged EXIF
            value = None
    if value is None and (match := _XMP_ORIENTATION.search(xmp)):
        value = int(match[1])
    return int(value) if value in range(1, 9) else 1


def scale_to_bits(values: AnyArray, bits: int) -> AnyArray:
    """Scale integers of a declared depth to the full range of 8 or 16 bits.

    Args:
        values: unsigned integers below 2 ** bits.
        bits: 1 to 16.

    Returns:
        uint8 up to 8 bits, otherwise uint16; the same shape.
    """
    full = 255 if bits <= 8 else 65535
    kind = np.uint8 if bits <= 8 else np.uint16
    if bits in (8, 16):
        return values.astype(kind, copy=False)
    top = (1 << bits) - 1
    return map_rows(
        lambda rows: (np.minimum(rows, top).astype(np.uint32) * full + top // 2) // top,
        kind,
        values,
    )


def count_channels(image: Image.Image) -> int:
    """Count the colors of a Pillow image: 1 for grey, otherwise 3."""
    return 1 if image.mode in ("1", "L", "LA", "La", "I", "I;16", "F") else 3


def drop_alpha(values: AnyArray) -> AnyArray:
    """Lay decoded samples on black.

    Args:
        values: (H, W), or (H, W, C) for grey and alpha, RGB, or RGB and alpha; uint8 or uint16.

    Returns:
        See `model.pixels.decode_image`.
    """
    if values.ndim == 2 or values.shape[2] == 3:
        return values
    if values.dtype == np.uint8:  # Pillow is faster
        return to_array(Image.fromarray(values))
    return lay_on_black(values[:, :, :-1], values[:, :, -1:])


def check_tail(pixels: bytes | memoryview, name: str) -> None:
    """Reject compressed pixels that end with many zero bytes: the rest of a download is missing.

    Their decoders read zeros as valid pixels.

    Raises:
        MissingPixels: too many zero bytes.
    """
    zeros = len(pixels) - len(bytes(pixels).rstrip(b"\0"))
    if zeros > max(_ZERO_TAIL, len(pixels) // _ZERO_TAIL_PART):
        raise MissingPixels(
            f"the {name} is incomplete: the last {zeros} of its {len(pixels)} bytes are zeros"
        )
