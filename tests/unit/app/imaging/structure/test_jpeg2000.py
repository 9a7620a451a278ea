"""JPEG 2000s whose boxes or header would keep a decoder busy, and one that is fine."""

from __future__ import annotations

import struct

import pytest

from app.errors import CorruptImage
from app.imaging.decode import inspect
from app.imaging.structure import check_structure
from tests.unit.app.imaging.structure.pieces import (
    ENDLESS,
    assert_too_large,
    box,
    endless_box,
    photo,
    segment,
)
from tests.unit.model.readers.writers import saved

SIGNATURE = box(b"jP  ", b"\r\n\x87\n")


def codestream(
    components: int = 3, tile: int = 64, layers: int = 1, comments: int = 0, size: int = 64
) -> bytes:
    """The header of a JPEG 2000 of size x size pixels."""
    siz = struct.pack(">H8IH", 0, size, size, 0, 0, tile, tile, 0, 0, components)
    siz += b"\x07\1\1" * components
    cod = struct.pack(">BBHB", 0, 0, layers, 0) + b"\5\4\4\0\0"
    header = segment(0x51, siz) + segment(0x52, cod) + segment(0x64, bytes(60_000)) * comments
    return b"\xff\x4f" + header + b"\xff\x90"


def jp2(*boxes: bytes) -> bytes:
    return SIGNATURE + b"".join(boxes) + box(b"jp2c", codestream())


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(codestream(components=5), id="components"),
        pytest.param(codestream(tile=1, size=300), id="tiles"),
        pytest.param(codestream(layers=2000), id="layers"),
        pytest.param(codestream(comments=300), id="comments"),
        pytest.param(jp2(box(b"free") * 2000), id="boxes"),
        pytest.param(jp2(box(b"uuid", bytes(17 << 20))), id="metadata"),
    ],
)
def test_jpeg2000_beyond_a_bound_is_too_large(data: bytes) -> None:
    assert_too_large(data)


@pytest.mark.parametrize(
    "data",
    [pytest.param(codestream()[:20], id="codestream"), pytest.param(jp2()[:40], id="jp2")],
)
def test_truncated_jpeg2000_is_left_to_the_decoder(data: bytes) -> None:
    check_structure(data)


@pytest.mark.parametrize("length", ENDLESS)
def test_jp2_box_that_ends_beyond_any_file_is_left_to_the_decoder(length: int) -> None:
    data = SIGNATURE + endless_box(length)
    check_structure(data)
    with pytest.raises(CorruptImage):
        inspect(data, max_pixels=10**8)


def test_real_jpeg2000_of_many_tiles_passes() -> None:
    check_structure(saved(photo(), "JPEG2000", tile_size=(20, 20)))
