"""GIFs whose frames or blocks would keep a decoder busy, and GIFs that are fine."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from app.imaging.structure import check_structure
from tests.unit.app.imaging.structure.pieces import animation, assert_too_large, photo
from tests.unit.model.readers.writers import saved

FRAME = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"


def gif(*blocks: bytes) -> bytes:
    header = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return header + b"".join(blocks) + FRAME + b";"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(gif(FRAME * 11_000), id="frames"),
        pytest.param(gif(b"!\xfe" + b"\1a" * 2000 + b"\0"), id="comment-of-many-blocks"),
        pytest.param(gif(b"!\xfe\0" * 2000), id="comments"),
        pytest.param(gif(b"!\x01" + b"\1a" * 70_000 + b"\0"), id="extension"),
        pytest.param(gif(b"x" * 70_000), id="junk"),
        pytest.param(gif(FRAME[:11] + b"\1a" * 1_100_000 + b"\0"), id="pixels"),
    ],
)
def test_gif_beyond_a_bound_is_too_large(data: bytes) -> None:
    assert_too_large(data)


def test_truncated_gif_is_left_to_the_decoder() -> None:
    check_structure(gif()[:20])


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: animation(1000, "GIF"), id="1000-frames"),
        pytest.param(lambda: saved(photo(1000), "GIF", comment=b"x" * 60_000), id="comment"),
    ],
)
def test_real_gif_passes(make: Callable[[], bytes]) -> None:
    check_structure(make())
