"""Bytes -> decoded image: bounds from the header first, then decoding.

Maps what goes wrong to errors for clients. Pixels come from `model.readers` and `model.tiff`, as in
training. Knows no network and no HTTP.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from app.errors import CorruptImage, ServiceError, UnsupportedImage
from app.imaging import bounds, formats
from app.imaging.structure import check_structure
from model.arrays import AnyArray
from model.pixels import SIDEWAYS, is_tiff, turn
from model.readers import open_image
from model.readers.base import ImageReader, MissingPixels, UnknownFormat, UnsupportedKind

if TYPE_CHECKING:
    from model.tiff import TiffReader

Image.MAX_IMAGE_PIXELS = None  # `app.imaging.bounds` has a limit, as an error and not a warning

_ACCEPTED = "JPEG, PNG, TIFF, WebP, BMP, GIF, AVIF or JPEG 2000"


@dataclasses.dataclass(frozen=True)
class ImageHeader:
    """Facts about an image that are known before it is decoded.

    Attributes:
        format: name of the format.
        width, height: of the upright image, in pixels.
        orientation: EXIF orientation, 1 to 8; 1 for a TIFF, whose reader turns it.
        pages: number of frames of an animation, of which the first is decoded.
        channels: 1 for grey, 3 for colors; transparency is none of them.
    """

    format: str
    width: int
    height: int
    orientation: int = 1
    pages: int = 1
    channels: int = 1


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
    reader = _open(data)
    bounds.check_size(reader.height, reader.width, max_pixels)
    width, height = reader.width, reader.height
    if reader.orientation in SIDEWAYS:
        width, height = height, width
    return ImageHeader(
        reader.format, width, height, reader.orientation, reader.pages, reader.channels
    )


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
        reader = _open(data)
        if at_least is not None and header.orientation in SIDEWAYS:
            at_least = at_least[::-1]
        with _image_errors(data):
            pixels = turn(reader.read(at_least), header.orientation)
    if at_least is None and pixels.shape[:2] != (header.height, header.width):
        raise CorruptImage("the image is not as large as its header says")
    return np.ascontiguousarray(pixels)


def _open(data: bytes) -> ImageReader:
    """Open an image of any format but TIFF, and map what goes wrong meanwhile."""
    with _image_errors(data):
        return open_image(data)


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata
            yield
    except ServiceError:
        raise
    except UnsupportedKind as error:
        raise UnsupportedImage(f"{error} is not accepted; send {_ACCEPTED}") from None
    except MissingPixels as error:
        raise CorruptImage(str(error)) from None
    except UnknownFormat:
        if other := formats.known(data):
            raise UnsupportedImage(f"{other} is not accepted; send {_ACCEPTED}") from None
        raise CorruptImage(
            f"not a recognised image ({len(data)} bytes); send {_ACCEPTED}"
        ) from None
    except Exception as error:  # decoders raise whatever a damaged file makes them stumble on
        raise CorruptImage(f"the image is damaged or incomplete: {error}") from error
