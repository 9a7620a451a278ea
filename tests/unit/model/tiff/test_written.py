"""TIFFs as other programs write them."""

from __future__ import annotations

import numpy as np
import pytest

from model.tiff.reader import TiffReader
from tests.conftest import FIXTURES
from tests.unit.model.tiff.written import DEEP, GREY, RGB, Written, spread, write_all

FILES = write_all()
BLACK_AND_WHITE = (GREY >= 64) * np.uint8(255)
FIXED: dict[str, tuple[np.ndarray, float]] = {
    **dict.fromkeys(("gdal-cog", "gdal-int32", "gdal-lerc-deflate", "im-rle-msb"), (GREY, 0)),
    **dict.fromkeys(("tc-big-be", "tc-lsb", "tc-tiles", "vips-pyramid", "vips-pages"), (GREY, 0)),
    **dict.fromkeys(("gdal-band-lzma", "gm-lzma", "im-cmyk", "im-zstd", "im-pages"), (RGB, 0)),
    **dict.fromkeys(("tc-lzw-sep", "vips-subifd"), (RGB, 0)),
    **dict.fromkeys(("im-jpeg-rgb", "im-palette", "im-webp", "tc-jpeg", "vips-jpeg"), (RGB, 6)),
    **dict.fromkeys(("gdal-lerc-zstd", "vips-big"), (DEEP, 0)),
    **dict.fromkeys(("gdal-float-nodata", "im-float"), (spread(GREY), 0)),
    "gdal-nbits12": (np.rint(DEEP.clip(0, 4095) * (65535 / 4095)), 0),
    "im-grey-alpha": (np.rint(GREY * 0.5), 0.5),
    "im-planar16": (RGB.astype(np.uint16) * 257, 0),
    "tc-g3": (BLACK_AND_WHITE, 0),
}
"""File of `tests/fixtures/tiff` -> its pixels, of its last page, and their mean difference."""


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_that_were_written(name: str) -> None:
    written: Written = FILES[name]
    pixels = TiffReader(written.data).select(written.page, written.channel).read()
    assert pixels.shape == written.expected.shape
    assert pixels.dtype in (np.uint8, np.uint16)
    assert np.abs(pixels - written.expected.astype(float)).mean() <= written.tolerance


@pytest.mark.parametrize("name", [path.stem for path in (FIXTURES / "tiff").glob("*.tif")])
def test_files_of_other_programs(name: str) -> None:
    reader = TiffReader((FIXTURES / "tiff" / f"{name}.tif").read_bytes())
    pixels = reader.select(reader.pages - 1).read()
    expected, tolerance = FIXED[name]
    assert reader.pages == (2 if name in ("im-pages", "vips-pages") else 1)
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected.astype(float)).mean() <= tolerance
