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

from app.errors import CorruptImage, ServiceError, UnsupportedImage, WrongSelection
from app.imaging import bounds, formats
from app.imaging.no_image import ACCEPTED, check_not_empty, describe_no_image
from app.imaging.structure import check_structure
from model.arrays import AnyArray
from model.pixels import SIDEWAYS, SelectionError, describe_choices, is_tiff, turn
from model.readers import open_image
from model.readers.base import (
    DamagedImage,
    ImageReader,
    MissingPixels,
    UnknownFormat,
    UnsupportedKind,
)

if TYPE_CHECKING:
    from model.tiff.reader import TiffReader

Image.MAX_IMAGE_PIXELS = None  # `app.imaging.bounds` has a limit, as an error and not a warning

_DAMAGED = "the image is damaged or incomplete"
_HEADER, _TAGS, _PIXELS = "header", "tags", "pixels"
"""Parts of an image file that are read one after another."""


@dataclasses.dataclass(frozen=True)
class ImageHeader:
    """Facts about an image that are known before it is decoded.

    Attributes:
        format: name of the format.
        width, height: of the upright image, in pixels.
        orientation: EXIF orientation, 1 to 8; 1 for a TIFF, whose reader turns it.
        pages: of a TIFF, or frames of an animation, of which the first is decoded.
        channels: to choose from with `channel`: 1 for grey, 3 for colors, any number in a TIFF. The
            transparency of colors is not one.
        pixel_size: micrometres per pixel as the file's metadata say; None if they do not.
        page, channel: the chosen ones, from 0; None for the only page and for all colors.
    """

    format: str
    width: int
    height: int
    orientation: int = 1
    pages: int = 1
    channels: int = 1
    pixel_size: float | None = None
    page: int | None = None
    channel: int | None = None


def inspect(
    data: bytes, *, max_pixels: int, page: int | None = None, channel: int | None = None
) -> ImageHeader:
    """Read the header and nothing else. See `open_and_inspect`."""
    return open_and_inspect(data, max_pixels=max_pixels, page=page, channel=channel)[0]


def open_and_inspect(
    data: bytes, *, max_pixels: int, page: int | None = None, channel: int | None = None
) -> tuple[ImageHeader, ImageReader | None]:
    """Read the header, and return it with the reader that has read it; None for a TIFF.

    Args:
        page: of a TIFF, from 0; None for the only one.
        channel: from 0; None for all colors.

    Raises:
        CorruptImage: empty, or not an image.
        WrongSelection: a page or a channel has to be chosen, or the chosen one does not exist.
        UnsupportedImage: an image of a format, or a TIFF of a kind, that is not accepted.
        ImageTooLarge: more than `max_pixels`, more bytes than they may have, or parts beyond the
            bounds of `check_structure`.
    """
    check_not_empty(data)
    check_structure(data)
    if is_tiff(data):
        return _inspect_tiff(data, max_pixels, page, channel), None
    reader = _open(data)
    bounds.check_size(reader.height, reader.width, max_pixels)
    width, height = reader.width, reader.height
    if reader.orientation in SIDEWAYS:
        width, height = height, width
    header = ImageHeader(
        reader.format,
        width,
        height,
        reader.orientation,
        reader.pages,
        reader.channels,
        page=page,
        channel=channel,
    )
    _check_selection(header)
    return header, reader


def count_pages(data: bytes, *, max_pixels: int) -> int:
    """Count the pages of a TIFF. Other formats have one: an animation shows its first frame.

    Raises:
        CorruptImage: a damaged TIFF.
        ImageTooLarge: its pages have more than `max_pixels` together, or it has parts beyond the
            bounds of `check_structure`.
    """
    if not is_tiff(data):
        return 1
    check_structure(data)
    with _image_errors(data, _TAGS):
        sizes = _open_tiff(data).sizes()
        bounds.check_pages(sizes, max_pixels)
        return len(sizes)


def decode(
    data: bytes,
    header: ImageHeader,
    *,
    at_least: tuple[int, int] | None = None,
    reader: ImageReader | None = None,
) -> AnyArray:
    """Decode the chosen page and channel, or the first frame, upright.

    Args:
        header: from `inspect`, with page and channel. Its checks are not repeated.
        at_least: (height, width) that are enough: a JPEG may then be decoded at a fraction of its
            size, which is much faster, and the result is smaller than the header says.
        reader: from `open_and_inspect`; None opens the file again.

    Returns:
        (H, W) or (H, W, 3), uint8 or uint16; see `model.pixels.decode_image`.

    Raises:
        CorruptImage: truncated or damaged.
    """
    if header.format == "TIFF":
        with _image_errors(data, _PIXELS):
            pixels = _open_tiff(data).select(header.page, header.channel).read()
    else:
        reader = reader or _open(data)
        if at_least is not None and header.orientation in SIDEWAYS:
            at_least = at_least[::-1]
        with _image_errors(data, _PIXELS):
            pixels = turn(reader.read(at_least), header.orientation)
        if header.channel is not None and pixels.ndim == 3:
            pixels = pixels[:, :, header.channel]
    if at_least is None and pixels.shape[:2] != (header.height, header.width):
        raise CorruptImage("the image is not as large as its header says")
    return np.ascontiguousarray(pixels)


def _open(data: bytes) -> ImageReader:
    """Open an image of any format but TIFF, and map what goes wrong meanwhile."""
    with _image_errors(data, _HEADER):
        return open_image(data)


def _inspect_tiff(
    data: bytes, max_pixels: int, page: int | None, channel: int | None
) -> ImageHeader:
    from model.tiff.colors import UnsupportedTiff

    with _image_errors(data, _TAGS):
        reader = _open_tiff(data)
        try:
            image = reader.select(page, channel)
        except UnsupportedTiff as error:
            raise UnsupportedImage(
                f"a TIFF {error} is not accepted; send grey, RGB or RGBA without compression, or "
                "with LZW or Deflate"
            ) from None
        layout = image.layout()
        bounds.check_tiff(layout, max_pixels)
        return ImageHeader(
            "TIFF",
            layout.width,
            layout.height,
            pages=reader.pages,
            channels=image.channels,
            pixel_size=image.pixel_size,
            page=page,
            channel=channel,
        )


def _open_tiff(data: bytes) -> TiffReader:
    """Read a TIFF's tags. The libraries are imported here, when the first TIFF arrives."""
    from model.tiff.reader import TiffReader

    return TiffReader(data)


def _check_selection(header: ImageHeader) -> None:
    """Check the page and channel that are asked for of an image that is not a TIFF.

    Raises:
        WrongSelection: one that does not exist.
    """
    if header.page not in (None, 0):
        frames = f" and {header.pages} frames, of which the first is read"
        choice = describe_choices(1, "page") + (frames if header.pages > 1 else "")
        raise WrongSelection(f"page={header.page}: {choice}")
    if header.channel is not None and not 0 <= header.channel < header.channels:
        choice = describe_choices(header.channels, "channel")
        raise WrongSelection(f"channel={header.channel}: {choice}")


@contextmanager
def _image_errors(data: bytes, part: str) -> Iterator[None]:
    """Map whatever decoders raise to an `ImageError`.

    Messages of libraries, and of Python, are not for clients: they speak of arrays and buffers.

    Args:
        part: of the file that the block reads.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata
            yield
    except ServiceError:
        raise
    except SelectionError as error:
        hint = f"; choose {error.choices}" if error.choices else ""
        raise WrongSelection(f"{error}{hint}") from None
    except UnsupportedKind as error:
        raise UnsupportedImage(f"{error} is not accepted; send {ACCEPTED}") from None
    except MissingPixels as error:
        raise CorruptImage(str(error)) from None
    except UnknownFormat:
        if other := formats.name_format(data):
            raise UnsupportedImage(f"{other} is not accepted; send {ACCEPTED}") from None
        raise CorruptImage(describe_no_image(data)) from None
    except DamagedImage as error:
        raise CorruptImage(f"{_DAMAGED}: {error}") from None
    except Exception as error:  # decoders raise whatever a damaged file makes them stumble on
        raise CorruptImage(f"{_DAMAGED}: its {part} cannot be read") from error
