"""Limits that hold before an image is decoded. Knows no decoder and no HTTP."""

from __future__ import annotations

from app.errors import ImageTooLarge


def check_size(height: int, width: int, max_pixels: int) -> None:
    """
    Raises:
        ImageTooLarge: more than `max_pixels`.
    """
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"the image has {width} x {height} = {width * height / 1e6:.1f} megapixels; "
            f"{max_pixels / 1e6:g} are allowed"
        )
