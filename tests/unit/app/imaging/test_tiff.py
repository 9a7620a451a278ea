"""Arrays -> TIFF: what comes back is what went in, with its resolution."""

from __future__ import annotations

import io

import numpy as np
import pytest
import tifffile

from app.imaging.tiff import encode_tiff, stack_tiff
from model.arrays import AnyArray

RNG = np.random.default_rng(0)


def opened(data: bytes) -> tifffile.TiffFile:
    return tifffile.TiffFile(io.BytesIO(data))


@pytest.mark.parametrize(
    "values",
    [
        RNG.integers(0, 256, (20, 30), np.uint8),
        RNG.integers(0, 65536, (20, 30), np.uint16),
        RNG.integers(0, 1 << 20, (20, 30), np.uint32),
        RNG.random((20, 30), np.float32),
        RNG.integers(0, 256, (20, 30, 3), np.uint8),
        RNG.integers(0, 256, (20, 30, 4), np.uint8),
        RNG.integers(0, 256, (3, 4), np.uint8),
    ],
    ids=lambda values: f"{values.dtype}-{values.shape}",
)
def test_values_come_back(values: AnyArray) -> None:
    with opened(encode_tiff(values)) as file:
        assert len(file.pages) == 1
        assert file.pages.first.compression is tifffile.COMPRESSION.ADOBE_DEFLATE
        assert file.pages.first.asarray().dtype == values.dtype
        np.testing.assert_array_equal(file.pages.first.asarray(), values)


def test_the_pixel_size_is_the_resolution() -> None:
    with opened(encode_tiff(np.zeros((3, 3), np.uint8), 0.25)) as file:
        assert file.pages.first.get_resolution("micrometer") == (4, 4)
    with opened(encode_tiff(np.zeros((3, 3), np.uint8))) as file:
        assert "ResolutionUnit" not in file.pages.first.tags or (
            file.pages.first.tags.valueof("ResolutionUnit") == 1
        )


def test_a_stack_has_every_page_in_order_and_its_resolution() -> None:
    values = RNG.integers(0, 256, (4, 5, 6), np.uint8)
    stacked = stack_tiff([encode_tiff(page, 0.5) for page in values])
    with opened(stacked) as file:
        assert len(file.pages) == 4
        assert file.pages[3].get_resolution("micrometer") == (2, 2)
    np.testing.assert_array_equal(tifffile.imread(io.BytesIO(stacked)), values)


def test_the_pages_of_a_stack_have_one_type() -> None:
    few, many = np.full((4, 4), 7, np.uint16), np.full((4, 4), 70_000, np.uint32)
    stacked = tifffile.imread(io.BytesIO(stack_tiff([encode_tiff(few), encode_tiff(many)])))
    assert stacked.dtype == np.uint32
    np.testing.assert_array_equal(stacked, [few, many])
