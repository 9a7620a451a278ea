"""JPEGs whose segments or scans would keep a decoder busy, and JPEGs that are fine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from app.imaging.structure import check_structure
from tests.conftest import encode
from tests.unit.app.imaging.structure.pieces import (
    GREY,
    assert_too_large,
    full_exif,
    many_scans,
    photo,
    segment,
)
from tests.unit.model.readers.writers import saved


def jpeg(*segments: bytes, **options: Any) -> bytes:
    """A JPEG with more segments at its start."""
    plain = encode(GREY, "JPEG", **options)
    return plain[:2] + b"".join(segments) + plain[2:]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(many_scans(7000), id="scans"),
        pytest.param(jpeg(segment(0xE1, b"Exif\0\0") * 100), id="exif"),
        pytest.param(jpeg(segment(0xFE) * 3000), id="comments"),
        pytest.param(jpeg(b"\xff\xfe\0\0" * 3000), id="lengths-of-zero"),
        pytest.param(jpeg(b"\xff" * 100_000), id="padding"),
        pytest.param(jpeg(b"x" * 100_000), id="junk"),
        pytest.param(jpeg(b"\xff\xd9" * 3000), id="ends-before-the-scan"),
        pytest.param(jpeg(segment(0xE2, bytes(60_000)) * 300), id="metadata"),
        pytest.param(
            jpeg(segment(0xED, b"Photoshop 3.0\0" + b"8BIM\0\1\0\0\0\0\0\0" * 5000) * 3),
            id="photoshop",
        ),
    ],
)
def test_jpeg_beyond_a_bound_is_too_large(data: bytes) -> None:
    assert_too_large(data)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xff\xd8", id="start"),
        pytest.param(jpeg()[:300], id="in-a-segment"),
        pytest.param(b"\xff\xd8" + b"\xff" * 30_000, id="in-padding"),
    ],
)
def test_truncated_jpeg_is_left_to_the_decoder(data: bytes) -> None:
    check_structure(data)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: saved(photo(), "JPEG"), id="baseline"),
        pytest.param(
            lambda: saved(
                photo(), "JPEG", progressive=True, exif=full_exif(), icc_profile=bytes(700_000)
            ),
            id="progressive-exif-icc",
        ),
        pytest.param(lambda: saved(photo().convert("CMYK"), "JPEG", progressive=True), id="cmyk"),
        pytest.param(lambda: jpeg(restart_marker_blocks=1), id="restart-markers"),
    ],
)
def test_real_jpeg_passes(make: Callable[[], bytes]) -> None:
    check_structure(make())
