"""Bytes -> decoded image: bounds from the header first, then decoding.

Knows which formats are accepted, and maps what goes wrong to errors for clients. Pixels come from
`model.pixels` and `model.tiff`, as in training. Knows no network and no HTTP.
"""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from app.errors import CorruptImage, ServiceError, UnsupportedImage
from app.imaging import bounds, formats
from app.imaging.structure import check_structure
from model.arrays import AnyArray
from model.pixels import SIDEWAYS, is_tiff, read_orientation, read_pixels, turn

if TYPE_CHECKING:
    from model.tiff import TiffReader

Image.MAX_IMAGE_PIXELS = None  # `app.imaging.bounds` has a limit, as an error and not a warning

_PILLOW_READERS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # the JPEG reader opens MPO too
_ACCEPTED = "JPEG, PNG, TIFF, WebP, BMP or GIF"
_IEND = b"\0\0\0\0IEND\xaeB`\x82"
"""The chunk a PNG ends with: no data, and always the same checksum."""


@dataclasses.dataclass(frozen=True)
class ImageHeader:
    """Facts about an image that are known before it is decoded.

    Attributes:
        format: Pillow's name of the format.
        width, height: of the upright image, in pixels.
        orientation: EXIF orientation, 1 to 8; 1 for a TIFF, whose reader turns it.
    """

    format: str
    width: int
    height: int
    orientation: int = 1


def inspect(data: bytes, *, max_pixels: int) -> ImageHeader:
    """Read the header and nothing else.

    Raises:
        CorruptImage: not an image.
        UnsupportedImage: an image of a format, or a TIFF of a kind, that is not accepted.
        ImageTooLarge: more than `max_pixels`, more bytes than they may have, or parts beyond the
            bounds of `check_structure`.
    """
    check_structure(data)
    if is_tiff(data):
        with _image_errors(data):
            layout = _open_tiff(data).layout()
            bounds.check_tiff(layout, max_pixels)
            return ImageHeader("TIFF", layout.width, layout.height)
    with _open(data) as image:
        width, height = image.size
        bounds.check_size(height, width, max_pixels)
        orientation = read_orientation(image, data)
        if orientation in SIDEWAYS:
            width, height = height, width
        return ImageHeader(str(image.format), width, height, orientation)


def decode(
    data: bytes, header: ImageHeader, *, at_least: tuple[int, int] | None = None
) -> AnyArray:
    """Decode the first frame, upright.

    Args:
        header: from `inspect`, whose checks are not repeated.
        at_least: (height, width) that are enough: a JPEG may then be decoded at a fraction of its
            size, which is much faster, and the result is smaller than the header says.

    Returns:
        (H, W) or (H, W, 3), uint8 or uint16; see `model.pixels.decode_image`.

    Raises:
        CorruptImage: truncated or damaged.
    """
    if header.format == "TIFF":
        with _image_errors(data):
            pixels = _open_tiff(data).read()
    else:
        if header.format == "PNG" and not _has_end(data):
            raise CorruptImage("the PNG is truncated: it has no IEND chunk")
        with _open(data) as image:
            if at_least is not None and header.format in ("JPEG", "MPO"):
                height, width = at_least
                if header.orientation in SIDEWAYS:
                    height, width = width, height
                image.draft("RGB", (width, height))
            image.load()
            pixels = turn(read_pixels(image, data), header.orientation)
    if at_least is None and pixels.shape[:2] != (header.height, header.width):
        raise CorruptImage("the image is not as large as its header says")
    return np.ascontiguousarray(pixels)


@contextmanager
def _open(data: bytes) -> Iterator[Image.Image]:
    """Open an image of any format but TIFF, and map what goes wrong meanwhile."""
    with _image_errors(data), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata
        # Pillow's readers of other formats never see bytes from a client.
        with Image.open(io.BytesIO(data), formats=_PILLOW_READERS) as image:
            yield image


def _open_tiff(data: bytes) -> TiffReader:
    """Read a TIFF's tags. The libraries are imported here, when the first TIFF arrives.

    Raises:
        UnsupportedImage: a kind that is not accepted.
    """
    from model.tiff import TiffReader, UnsupportedTiff

    try:
        return TiffReader(data)
    except UnsupportedTiff as error:
        raise UnsupportedImage(
            f"a TIFF {error} is not accepted; send grey, RGB or RGBA without compression, or with "
            "LZW or Deflate"
        ) from None


@contextmanager
def _image_errors(data: bytes) -> Iterator[None]:
    """Map whatever decoders raise to an `ImageError`."""
    try:
        yield
    except ServiceError:
        raise
    except UnidentifiedImageError:
        if other := formats.known(data):
            raise UnsupportedImage(f"{other} is not accepted; send {_ACCEPTED}") from None
        raise CorruptImage(
            f"not a recognised image ({len(data)} bytes); send {_ACCEPTED}"
        ) from None
    except Exception as error:  # decoders raise whatever a damaged file makes them stumble on
        raise CorruptImage(f"the image is damaged or incomplete: {error}") from error


def _has_end(png: bytes) -> bool:
    """Whether the last chunk of a PNG is there; Pillow does without. Bytes after it do not matter.

    Walks from chunk to chunk without reading their contents.
    """
    if png.endswith(_IEND):
        return True
    at = 8  # after the signature
    while at < len(png) and png[at + 4 : at + 8] != b"IEND":
        at += 12 + int.from_bytes(png[at : at + 4], "big")
    return png.startswith(_IEND, at)
