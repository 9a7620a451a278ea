"""The bounds of an image, checked from its header before it is decoded. Knows no decoder.

`app.imaging.structure` has the bounds of the parts of its file.

| bound | value |
|---|---|
| pixels | `UNET_MAX_MEGAPIXELS` |
| pixels of a side | 131,072: a long and narrow image has many windows for few pixels |
| bytes, decoded | 8 per pixel of that: 16-bit RGBA at full size, wider samples in smaller images |
| bytes of a TIFF page, decoded | 128 MB and 24 per pixel: many channels in small images |
| a strip or a tile of a TIFF | 16 megapixels, or as many as the image has |
| pixels of all pages of a TIFF together | `UNET_MAX_MEGAPIXELS`, where all are asked for |
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from app.errors import CorruptImage, ImageTooLarge

if TYPE_CHECKING:
    from model.arrays import Shape
    from model.tiff.reader import TiffLayout

BYTES_PER_PIXEL = 8
PAGE_BYTES, PAGE_BYTES_PER_PIXEL = 128_000_000, 24
SEGMENT_PIXELS = 1 << 24
MAX_SIDE = 131_072


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Reject an image of too many pixels, or with a side that is too long.

    Raises:
        ImageTooLarge: more than `max_pixels`, or a side longer than `MAX_SIDE`.
    """
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"the image has {width} x {height} = {width * height / 1e6:.1f} megapixels; "
            f"{max_pixels / 1e6:g} are allowed"
        )
    if max(height, width) > MAX_SIDE:
        raise ImageTooLarge(f"the image has {width} x {height} pixels; a side may have {MAX_SIDE}")


def check_tiff(layout: TiffLayout, max_pixels: int) -> None:
    """Reject a TIFF that is too large, or whose decoder would need far more than its image.

    Raises:
        ImageTooLarge: too many pixels, or too many bytes for them.
        CorruptImage: strips or tiles much larger than the image.
    """
    pixels = layout.height * layout.width
    check_size(layout.height, layout.width, max_pixels)
    allowed = min(max_pixels * BYTES_PER_PIXEL, PAGE_BYTES + pixels * PAGE_BYTES_PER_PIXEL)
    if pixels * layout.bytes_per_pixel > allowed:
        raise ImageTooLarge(
            f"the image has {pixels / 1e6:.1f} megapixels of {layout.bytes_per_pixel} bytes each; "
            f"{allowed / 1e6:.0f} MB are allowed"
        )
    height, width = layout.segment
    if height * width > max(SEGMENT_PIXELS, pixels):
        raise CorruptImage(f"a TIFF of {pixels} pixels with tiles of {height * width}")


def check_pages(sizes: Iterable[Shape], max_pixels: int) -> None:
    """Reject a file whose pages together have too many pixels.

    Args:
        sizes: (height, width) of each page.

    Raises:
        ImageTooLarge: more than `max_pixels`.
    """
    pixels = [height * width for height, width in sizes]
    if sum(pixels) > max_pixels:
        raise ImageTooLarge(
            f"the image has {len(pixels)} pages of {sum(pixels) / 1e6:.1f} megapixels together; "
            f"{max_pixels / 1e6:g} are allowed at once; choose page=N for one page at a time"
        )
