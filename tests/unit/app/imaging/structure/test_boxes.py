"""AVIFs whose boxes, items or frames would keep a decoder busy, and AVIFs that are fine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from app.errors import CorruptImage
from app.imaging.decode import inspect
from app.imaging.structure import check_structure
from tests.unit.app.imaging.structure.pieces import (
    ENDLESS,
    animation,
    assert_too_large,
    box,
    endless_box,
    full_exif,
    photo,
)
from tests.unit.model.readers.writers import saved


def avif(*boxes: bytes) -> bytes:
    return box(b"ftyp", b"avif\0\0\0\0avif") + b"".join(boxes)


def meta(*boxes: bytes) -> bytes:
    return box(b"meta", bytes(4) + b"".join(boxes))


def items(kind: bytes, version: int, number: int) -> bytes:
    """A box that says how many entries it lists."""
    head = bytes([version, 0, 0, 0]) + (bytes(2) if kind == b"iloc" else b"")
    long = kind == b"ipma" or version >= {b"iinf": 1, b"iloc": 2}[kind]
    return box(kind, head + number.to_bytes(4 if long else 2))


def frames(number: int) -> bytes:
    content = box(b"stsz", bytes(8) + number.to_bytes(4))
    for kind in (b"stbl", b"minf", b"mdia", b"trak", b"moov"):
        content = box(kind, content)
    return content


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(avif(box(b"free") * 70_000), id="boxes"),
        pytest.param(avif(meta(box(b"free") * 70_000)), id="boxes-within"),
        pytest.param(avif(meta(items(b"iinf", 0, 5000))), id="items"),
        pytest.param(avif(meta(items(b"iinf", 1, 5000))), id="items-of-version-1"),
        pytest.param(avif(meta(items(b"iloc", 2, 5000))), id="locations"),
        pytest.param(avif(meta(items(b"ipma", 0, 5000))), id="properties"),
        pytest.param(avif(frames(20_000)), id="frames"),
        pytest.param(avif(box(b"uuid", bytes(17 << 20))), id="metadata"),
    ],
)
def test_avif_beyond_a_bound_is_too_large(data: bytes) -> None:
    assert_too_large(data)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(avif()[:10], id="first-box"),
        pytest.param(avif(meta(items(b"iinf", 0, 9)))[:-1], id="items"),
    ],
)
def test_truncated_avif_is_left_to_the_decoder(data: bytes) -> None:
    check_structure(data)


@pytest.mark.parametrize("length", ENDLESS)
def test_avif_box_that_ends_beyond_any_file_is_left_to_the_decoder(length: int) -> None:
    data = box(b"ftyp", b"avif\0\0\0\0") + endless_box(length)
    check_structure(data)
    with pytest.raises(CorruptImage):
        inspect(data, max_pixels=10**8)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: saved(photo(), "AVIF", exif=full_exif()), id="exif"),
        pytest.param(lambda: animation(200, "AVIF"), id="animation"),
    ],
)
def test_real_avif_passes(make: Callable[[], bytes]) -> None:
    check_structure(make())
