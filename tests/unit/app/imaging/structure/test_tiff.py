"""TIFFs whose directories, tags or strips would keep a decoder busy, and TIFFs that are fine."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest

from app.errors import CorruptImage, ImageTooLarge
from app.imaging.structure import check_structure
from tests.conftest import encode, tiff
from tests.unit.app.imaging.structure.pieces import (
    GREY,
    animation,
    assert_too_large,
    many_scans,
    photo,
)
from tests.unit.model.readers.writers import saved


def big_tiff(tag: int, offset: int) -> bytes:
    """A BigTIFF of one tag whose value lies at an offset."""
    head = b"II+\0\x08\0\0\0" + struct.pack("<Q", 16)
    return head + struct.pack("<QHHQQ", 1, tag, 4, 100, offset) + bytes(8)


def tiff_of_tags(*tags: tuple[int, int, int, int], size: int = 0) -> bytes:
    """A TIFF of tag, type, number of values and value, and `size` bytes after them."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4 + size)


def tiff_of_directories(number: int) -> bytes:
    """A chain of empty directories."""
    head = b"II*\0" + struct.pack("<I", 8)
    return head + b"".join(struct.pack("<HI", 0, 14 + 6 * index) for index in range(number))


def tiles(number: int) -> bytes:
    """A TIFF of as many tiles of 16 x 16 pixels."""
    offsets = struct.pack(f"<{number}I", *range(1000, 1000 + number))
    sizes = struct.pack(f"<{number}I", *[256] * number)
    first = 8 + 2 + 8 * 12 + 4
    data = tiff_of_tags(
        (256, 4, 1, 16 * number),
        (257, 4, 1, 16),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (322, 4, 1, 16),
        (323, 4, 1, 16),
        (324, 4, number, first),
        (325, 4, number, first + len(offsets)),
    )
    return data + offsets + sizes


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(tiff_of_tags(*[(300, 3, 1, 1)] * 2000), id="tags"),
        pytest.param(tiff_of_tags((273, 4, 200_000, 100), size=900_000), id="strips"),
        pytest.param(
            tiff_of_tags(*((40_000 + tag, 7, 1 << 20, 8) for tag in range(100)), size=1 << 20),
            id="shared-metadata",
        ),
        pytest.param(tiff_of_directories(11_000), id="directories"),
    ],
)
def test_tiff_beyond_a_bound_is_too_large(data: bytes) -> None:
    assert_too_large(data)


def tiff_of_strips(
    strips: list[bytes], compression: int, order: str = "<", copies: int = 1
) -> bytes:
    """A TIFF of strips that follow its directory; each is listed `copies` times."""
    number = len(strips) * copies
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HIH", 42, 8, 3)
    arrays_at = len(head) + 3 * 12 + 4
    place = arrays_at + 2 * 4 * number
    offsets, sizes = [], []
    for strip in strips:
        offsets += [place - index for index in range(copies)]
        sizes += [len(strip)] * copies
        place += len(strip)
    arrays = struct.pack(f"{order}{number}I", *offsets) + struct.pack(f"{order}{number}I", *sizes)
    tags = struct.pack(order + "HHIHH", 259, 3, 1, compression, 0)
    for tag, values, at in ((273, offsets, arrays_at), (279, sizes, arrays_at + 4 * number)):
        tags += struct.pack(order + "HHII", tag, 4, number, at if number > 1 else values[0])
    return head + tags + bytes(4) + arrays + b"".join(strips)


@pytest.mark.parametrize("order", "<>")
def test_scans_of_jpegs_in_a_tiff_are_counted(order: str) -> None:
    plain = encode(GREY, "JPEG")
    check_structure(tiff_of_strips([many_scans(40)], 7, order))
    check_structure(tiff_of_strips([many_scans(7000)], 1, order))  # they only look like scans
    check_structure(tiff_of_strips([plain] * 1000, 7, order))
    for strips in ([many_scans(7000)], [plain, plain, many_scans(7000)]):
        with pytest.raises(ImageTooLarge, match="more than 64 JPEG scans"):
            check_structure(tiff_of_strips(strips, 7, order))


def test_strips_that_overlap_are_corrupt() -> None:
    """Each would be decoded."""
    with pytest.raises(CorruptImage, match="overlap"):
        check_structure(tiff_of_strips([encode(GREY, "JPEG") + bytes(10_000)], 7, copies=100))


@pytest.mark.parametrize("offset", [52, 1 << 40, 1 << 63, (1 << 64) - 1])
def test_tag_outside_a_big_tiff_is_corrupt(offset: int) -> None:
    with pytest.raises(CorruptImage, match="outside the file"):
        check_structure(big_tiff(273, offset))
    check_structure(big_tiff(50_000, offset))  # metadata


def test_directory_outside_a_big_tiff_is_corrupt() -> None:
    with pytest.raises(CorruptImage, match="outside the file"):
        check_structure(b"II+\0\x08\0\0\0" + struct.pack("<Q", 1 << 63))


def test_directories_in_subifds_are_counted() -> None:
    children = 10_500
    head = b"II*\0" + struct.pack("<IH", 8, 1)
    array_at = len(head) + 12 + 4
    first = array_at + 4 * children
    data = head + struct.pack("<HHII", 330, 4, children, array_at) + bytes(4)
    data += struct.pack(f"<{children}I", *(first + 6 * index for index in range(children)))
    data += bytes(6 * children)  # directories without tags
    with pytest.raises(ImageTooLarge, match="more than 10000 directories"):
        check_structure(data)
    looping = head + struct.pack("<HHII", 330, 4, 1, 8) + bytes(4)
    check_structure(looping)


def test_loop_of_tiff_directories_ends() -> None:
    check_structure(b"II*\0" + struct.pack("<IHI", 8, 0, 8))


def test_truncated_tiff_is_left_to_the_decoder() -> None:
    check_structure(b"II*\0")


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: tiles(20_000), id="20000-tiles"),
        pytest.param(lambda: animation(1000, "TIFF"), id="1000-pages"),
        pytest.param(lambda: saved(photo(), "TIFF", compression="tiff_lzw"), id="lzw"),
        pytest.param(lambda: tiff(GREY, big=True), id="bigtiff"),
        pytest.param(lambda: tiff(GREY.astype(np.uint16), order=">"), id="big-endian"),
        pytest.param(lambda: tiff(np.dstack([GREY] * 3), 2, planes=True), id="planes"),
    ],
)
def test_real_tiff_passes(make: Callable[[], bytes]) -> None:
    check_structure(make())
