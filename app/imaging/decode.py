"""Bytes <-> image: limits from the header first, then decoding; and PNG encoding.

Knows Pillow, NumPy and zlib-ng, and of the model how pixels are read; no HTTP, no network.
"""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from app.errors import CorruptImage, InsufficientBitDepth, ServiceError, UnsupportedImage
from app.imaging import formats, tiff
from app.imaging.bounds import check_size
from app.imaging.structure import check_structure
from model.arrays import AnyArray, ByteArray
from model.pixels import MIN_IS_WHITE, PHOTOMETRIC, to_array

Image.MAX_IMAGE_PIXELS = None  # `inspect` holds a limit of its own, as an error and not a warning

_READERS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF")  # the JPEG reader opens MPO too
_NAMES = "JPEG, PNG, TIFF, WebP, BMP and GIF"
_INSTEAD = "grey of 8 or 16 bits where 0 is black, or RGB of 8, pixel by pixel"
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
_BITS, _PLANAR = 258, 284  # tags of TIFF
_IN_PLANES = 2  # a value of the second
_FEWEST_LEVELS = 32
"""Of the 256 that 8 bits can tell apart: what colour of 16 bits must have left of them."""
_PNG_EXIF = (b"eXIf", b"Raw profile type exif")
"""What a PNG that has EXIF data contains: the chunk's name, or an old tool's text chunk."""

_IEND = b"\0\0\0\0IEND\xaeB`\x82"
"""The chunk a PNG ends with: no data, and always the same checksum."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What an image says of itself before it is decoded.

    Attributes:
        format: Pillow's name of it.
        width, height: of the upright image, in pixels.
        mode: Pillow's name of its pixels.
        orientation: EXIF's, 1..8.
    """

    format: str
    width: int
    height: int
    mode: str
    orientation: int = 1


def inspect(data: bytes, *, max_pixels: int) -> Header:
    """Read the header, and nothing else.

    Raises:
        CorruptImage: not an image.
        UnsupportedImage: an image, of a format that is not accepted, or a TIFF of such a kind.
        ImageTooLarge: more than `max_pixels`, or parts beyond the bounds of `check_structure`.
    """
    check_structure(data)
    with _opened(data) as image:
        if isinstance(image, TiffImagePlugin.TiffImageFile) and _is_misread(image):
            raise _unsupported_tiff(tiff.kind(data) or "this kind")
        width, height = image.size
        check_size(height, width, max_pixels)
        orientation = _orientation(image, data)
        if orientation in _SIDEWAYS:
            width, height = height, width
        return Header(str(image.format), width, height, image.mode, orientation)


def decode(data: bytes, header: Header, *, at_least: tuple[int, int] | None = None) -> AnyArray:
    """The upright pixels of the first frame.

    Args:
        at_least: (height, width) that are enough: a JPEG may then be decoded at a fraction of its
            size, which is much faster, and the result is smaller than the header says.

    Returns:
        (H, W, 3) uint8, or (H, W) uint8 or uint16 for grey images. Greys of more than 8 bits keep
        their range; 32-bit ones are spread over theirs. Colours of 16 bits are their upper 8.
        Transparency is laid on black.

    Raises:
        CorruptImage: truncated or damaged.
        InsufficientBitDepth: of colours of 16 bits, the upper 8 are nearly all the same.
    """
    if header.format == "PNG" and not _has_end(data):
        raise CorruptImage("the image is incomplete: it stops before the end of a PNG, IEND")
    with _opened(data) as image:
        if at_least is not None and header.format in ("JPEG", "MPO"):
            height, width = at_least
            if header.orientation in _SIDEWAYS:
                height, width = width, height
            image.draft("RGB", (width, height))
        image.load()
        pixels = to_array(image)
        if pixels.dtype == np.uint8 and _bits(image, data) > 8:
            _check_levels(pixels)
    upright = _turn(pixels, header.orientation)
    if at_least is None and upright.shape[:2] != (header.height, header.width):
        raise CorruptImage("the image is not as large as its header says")
    return np.ascontiguousarray(upright)


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, which is not our concern
            # Pillow's readers of other formats are not tried on bytes that anybody may send.
            with Image.open(io.BytesIO(data), formats=_READERS) as image:
                yield image
    except ServiceError:  # found by the block itself
        raise
    except UnidentifiedImageError:
        if other := formats.known(data):
            raise UnsupportedImage(f"{other} is not accepted; send {_NAMES}") from None
        if kind := tiff.kind(data):
            raise _unsupported_tiff(kind) from None
        raise CorruptImage(f"these {len(data)} bytes are not an image; send {_NAMES}") from None
    except (
        Exception
    ) as error:  # Pillow's decoders raise whatever their format makes them stumble on
        raise CorruptImage(f"the image is damaged or incomplete: {error}") from error


def _unsupported_tiff(kind: str) -> UnsupportedImage:
    return UnsupportedImage(
        f"a TIFF of {kind} is not accepted; send a PNG or little-endian TIFF: {_INSTEAD}"
    )


def _is_misread(image: TiffImagePlugin.TiffImageFile) -> bool:
    """Whether it is of a kind that Pillow opens, but gives other pixels of, without a word."""
    tags, bands = image.tag_v2, image.getbands()
    in_planes = tags.get(_PLANAR, 1) == _IN_PLANES
    # Numbers of more than one byte that are put in order although they are so already, or not
    # at all. Greys of 16 bits have a reader of their own, that is right.
    disordered = tags.prefix == b"MM" and image.mode in ("I", "F")
    if in_planes and (len(bands) == 2 or image.mode == "LAB"):
        return True  # the second channel is lost; a and b have another zero
    if image.info["compression"] != "raw":  # libtiff reads these
        return disordered
    # Planes that are not packed are read as if they had a byte a pixel and 0 was black.
    bits = tags.get(_BITS, (1,))[0]
    odd = bits not in (1, 8, 32) or tags.get(PHOTOMETRIC, MIN_IS_WHITE) == MIN_IS_WHITE
    return in_planes and (odd or disordered)


def _bits(image: Image.Image, data: bytes) -> int:
    """Of a channel, as it is stored; Pillow's modes do not tell of colours."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return int(image.tag_v2.get(_BITS, (1,))[0])
    return data[24] if image.format == "PNG" else 8  # in IHDR, the first chunk


def _check_levels(pixels: ByteArray) -> None:
    """
    Raises:
        InsufficientBitDepth: the upper 8 bits hold too few levels.
    """
    levels = int(pixels.max()) - int(pixels.min()) + 1
    if levels < _FEWEST_LEVELS:
        raise InsufficientBitDepth(
            f"colour of 16 bits is read at 8, and {levels} of 256 levels are left of this image; "
            "send it as grey of 16 bits, which are all read, or spread over 0..65535"
        )


def _has_end(png: bytes) -> bool:
    """Whether its last chunk is there; Pillow does without. What stands behind it is no concern."""
    if png.endswith(_IEND):
        return True
    at = 8  # behind the signature; from chunk to chunk, without a look at what is in them
    while at < len(png) and png[at + 4 : at + 8] != b"IEND":
        at += 12 + int.from_bytes(png[at : at + 4], "big")
    return png.startswith(_IEND, at)


def _orientation(image: Image.Image, data: bytes) -> int:
    if image.format == "TIFF":
        return 1  # Pillow has turned its size already, and turns its pixels as it reads them
    # In a PNG it may stand behind the pixels, so Pillow decodes all of them to look for it.
    if image.format == "PNG" and not any(mark in data for mark in _PNG_EXIF):
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF: the image itself may be fine
        return 1
    return value if value in range(1, 9) else 1


def _turn(pixels: AnyArray, orientation: int) -> AnyArray:
    """As EXIF's orientation says (Exif 2.32, tag 274)."""
    if orientation in _SIDEWAYS:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
