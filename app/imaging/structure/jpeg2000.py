"""Boxes and header of a JPEG 2000 (ITU-T T.800, annexes A and I). Knows no decoder and no HTTP.

| part | bound |
|---|---|
| boxes | 1,024 |
| components | 4 |
| tiles | 65,535, as the standard |
| quality layers | 1,024 |
"""

from __future__ import annotations

import struct

from app.imaging.structure.counter import METADATA_BYTES, PartCounter

_BOUNDS = {
    "boxes": 1024,
    "components": 4,
    "tiles": 65_535,
    "quality layers": 1024,
    "bytes of metadata": METADATA_BYTES,
}
_START_AND_SIZE = b"\xff\x4f\xff\x51"
"""The markers SOC and SIZ, with which a codestream begins."""
_CODING_STYLE, _TILE = b"\xff\x52", b"\xff\x90"
"""The markers COD and SOT."""


def check_jpeg2000_parts(data: bytes) -> None:
    """Count the boxes before the codestream, and check the main header of that.

    Raises:
        ImageTooLarge: a bound is exceeded.
        struct.error, OverflowError: the file is truncated or damaged.
    """
    count = PartCounter("JPEG 2000", _BOUNDS)
    start = _find_codestream(data, count)
    right, bottom, _, _, width, height, left, top, components = struct.unpack_from(
        ">8IH", data, start + 8
    )
    count.add("components", components)
    if width and height:
        count.add("tiles", -(-(right - left) // width) * -(-(bottom - top) // height))
    _check_segments(data, start + 2, count)


def _find_codestream(data: bytes, count: PartCounter) -> int:
    """Return the position of the codestream: in a box of a JP2, or that of the whole file."""
    start, at = 0, 0
    while not data.startswith(_START_AND_SIZE, start):
        length, kind = struct.unpack_from(">I4s", data, at)
        start = at + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, start)
            start = at + 16
        count.add("boxes")
        if kind != b"jp2c":
            count.add("bytes of metadata", min(length, len(data) - at))
        at += length or len(data)
    return start


def _check_segments(data: bytes, at: int, count: PartCounter) -> None:
    """Check the segments before the first tile, of which one has the number of layers."""
    while data[at : at + 2] != _TILE:
        (length,) = struct.unpack_from(">H", data, at + 2)
        if data[at : at + 2] == _CODING_STYLE:
            count.add("quality layers", struct.unpack_from(">H", data, at + 6)[0])
        count.add("bytes of metadata", max(length, 2))
        at += 2 + length
