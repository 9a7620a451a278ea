"""BMPs with run-length encoding that would keep a decoder busy, and BMPs that are fine."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from app.imaging.structure import check_structure
from tests.unit.app.imaging.structure.pieces import assert_too_large, photo
from tests.unit.model.readers.writers import saved


def bmp(width: int, height: int, compression: int, pixels: bytes) -> bytes:
    palette = bytes(4 * 256)
    offset = 54 + len(palette)
    header = struct.pack("<IHHI", offset + len(pixels), 0, 0, offset)
    info = struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, 8, compression, len(pixels), 0, 0, 256, 0
    )
    return b"BM" + header + info + palette + pixels


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(bmp(100_000_000, 1, 1, b"\1\0\0\0\0\1"), id="rle-pixels"),
        pytest.param(bmp(100, 100, 1, b"\0\2\0\0" * 10_000), id="rle-bytes"),
    ],
)
def test_bmp_beyond_a_bound_is_too_large(data: bytes) -> None:
    assert_too_large(data)


def test_truncated_bmp_is_left_to_the_decoder() -> None:
    check_structure(b"BM")


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: saved(photo(), "BMP"), id="plain"),
        pytest.param(lambda: bmp(300, 300, 1, b"\1\7" * 90_000 + b"\0\0" * 300), id="rle"),
    ],
)
def test_real_bmp_passes(make: Callable[[], bytes]) -> None:
    check_structure(make())
