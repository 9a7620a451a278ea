"""Limits that hold before an image is decoded. Knows no decoder and no HTTP."""

from __future__ import annotations

from app.errors import ImageTooLarge

MAX_SIDE = 131_072
"""Pixels. A long and narrow image has many windows for few pixels."""


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Check the size of an image.

    Raises:
        ImageTooLarge: more than `max_pixels`, or a side longer than `MAX_SIDE`.
    """
    if max(height, width) > MAX_SIDE:
        raise ImageTooLarge(
            f"the image is {width} x {height} pixels; a side may have {MAX_SIDE} pixels"
        )
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"the image has {width} x {height} = {width * height / 1e6:.1f} megapixels; "
            f"{max_pixels / 1e6:g} are allowed"
        )
