"""PNGs whose chunks would keep a decoder busy, and PNGs that are fine."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import pytest

from app.imaging.structure import check_structure
from tests.unit.app.imaging.structure.pieces import animation, assert_too_large, full_exif, photo
from tests.unit.model.readers.writers import chunk, saved

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def png(*chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    return SIGNATURE + header + b"".join(chunks) + chunk(b"IEND", b"")


def small_idats() -> bytes:
    """A PNG whose pixels are in chunks of 100 bytes."""
    pixels = zlib.compress(photo().tobytes())
    chunks = (pixels[at : at + 100] for at in range(0, len(pixels), 100))
    return png(*(chunk(b"IDAT", each) for each in chunks))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(png(chunk(b"tIME", b"") * 5000), id="chunks"),
        pytest.param(png(chunk(b"IDAT", b"") * 70_000), id="empty-pixels"),
        pytest.param(png(chunk(b"eXIf", bytes(17 << 20))), id="metadata"),
    ],
)
def test_png_beyond_a_bound_is_too_large(data: bytes) -> None:
    assert_too_large(data)


def test_truncated_png_is_left_to_the_decoder() -> None:
    check_structure(SIGNATURE + b"\0\0")


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: saved(photo(), "PNG", exif=full_exif()), id="exif"),
        pytest.param(small_idats, id="many-idat"),
        pytest.param(lambda: animation(1000, "PNG"), id="apng"),
    ],
)
def test_real_png_passes(make: Callable[[], bytes]) -> None:
    check_structure(make())
