"""Bounds that hold before an image is decoded."""

from __future__ import annotations

import pytest

from app.errors import CorruptImage, ImageTooLarge
from app.imaging import bounds
from model.tiff.reader import TiffLayout


def test_more_pixels_than_allowed_are_rejected() -> None:
    bounds.check_size(20, 30, 600)
    with pytest.raises(ImageTooLarge, match="30 x 20"):
        bounds.check_size(20, 30, 599)


def test_side_that_is_too_long_is_rejected() -> None:
    bounds.check_size(1, bounds.MAX_SIDE, 100_000_000)
    for height, width in ((1, bounds.MAX_SIDE + 1), (100_000_000, 1)):
        with pytest.raises(ImageTooLarge, match="a side may have 131072"):
            bounds.check_size(height, width, 100_000_000)


def test_more_bytes_than_the_pixels_may_have_are_rejected() -> None:
    allowed = TiffLayout(1000, 1000, (1000, 1000), 8)
    bounds.check_tiff(allowed, 1_000_000)
    bounds.check_tiff(TiffLayout(500, 1000, (10, 1000), 16), 1_000_000)
    with pytest.raises(ImageTooLarge, match="12 bytes each; 8 MB"):
        bounds.check_tiff(TiffLayout(1000, 1000, (1000, 1000), 12), 1_000_000)


def test_a_small_image_may_have_many_channels_but_not_any_number() -> None:
    bounds.check_tiff(TiffLayout(500, 500, (10, 500), 400), 100_000_000)
    with pytest.raises(ImageTooLarge, match="65535 bytes each; 128 MB"):
        bounds.check_tiff(TiffLayout(48, 64, (48, 64), 65_535), 100_000_000)


def test_tiles_may_be_larger_than_a_small_image_but_not_huge() -> None:
    bounds.check_tiff(TiffLayout(10, 10, (4096, 4096), 1), 1_000_000)
    with pytest.raises(CorruptImage, match="tiles of"):
        bounds.check_tiff(TiffLayout(10, 10, (65536, 65536), 1), 1_000_000)


def test_all_pages_together_may_have_as_many_pixels_as_one_image() -> None:
    bounds.check_pages([(1000, 500), (1000, 500)], 1_000_000)
    with pytest.raises(ImageTooLarge, match=r"3 pages of 1.5 megapixels .*choose page=N"):
        bounds.check_pages([(1000, 500)] * 3, 1_000_000)
