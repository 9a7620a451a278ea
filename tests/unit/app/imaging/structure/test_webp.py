"""WebPs whose chunks or canvas would keep a decoder busy, and WebPs that are fine."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from app.imaging.structure import check_structure
from tests.unit.app.imaging.structure.pieces import animation, assert_too_large, full_exif, photo
from tests.unit.model.readers.writers import saved


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(kind + struct.pack("<I", len(each)) + each for kind, each in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def canvas(width: int, height: int, *, animated: bool = False) -> bytes:
    sides = ((side - 1).to_bytes(3, "little") for side in (width, height))
    return bytes([2 * animated, 0, 0, 0]) + b"".join(sides)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(webp((b"VP8X", canvas(16, 16)), *[(b"ABCD", b"")] * 21_000), id="chunks"),
        pytest.param(webp((b"VP8X", canvas(1 << 24, 255))), id="canvas"),
        pytest.param(webp((b"VP8X", canvas(16_383, 2049, animated=True))), id="animation-canvas"),
        pytest.param(webp((b"XMP ", bytes(17 << 20))), id="metadata"),
    ],
)
def test_webp_beyond_a_bound_is_too_large(data: bytes) -> None:
    assert_too_large(data)


def test_truncated_webp_is_left_to_the_decoder() -> None:
    check_structure(b"RIFF")


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            lambda: saved(photo(), "WEBP", lossless=True, exif=full_exif()), id="lossless-exif"
        ),
        pytest.param(lambda: animation(200, "WEBP"), id="animation"),
    ],
)
def test_real_webp_passes(make: Callable[[], bytes]) -> None:
    check_structure(make())
