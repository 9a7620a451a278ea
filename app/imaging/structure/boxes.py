"""Boxes, items and frames of an AVIF or HEIC.

Source: ISO/IEC 14496-12:2022, sections 4.2, 8.7.3 and 8.11. Knows no decoder and no HTTP.

| part | bound |
|---|---|
| boxes | 65,536 |
| items | 4,096: libavif searches them one by one |
| frames | 10,000 |
"""

from __future__ import annotations

import struct

from app.imaging.structure.counter import METADATA_BYTES, PartCounter

_BOUNDS = {
    "boxes": 65_536,
    "items": 4096,
    "frames": 10_000,
    "bytes of metadata": METADATA_BYTES,
}
_CONTAINERS = {
    **dict.fromkeys((b"moov", b"trak", b"mdia", b"minf", b"stbl", b"iprp", b"ipco", b"dinf"), 0),
    b"meta": 4,
}
"""Boxes that hold boxes, and the bytes before those."""
_LISTS = {
    b"iinf": ("items", 4, ">H"),
    b"iloc": ("items", 6, ">H"),
    b"ipma": ("items", 4, ">I"),
    b"stsz": ("frames", 8, ">I"),
}
"""Boxes that list items or frames: the part, and offset and type of the number of entries."""
_LONG_VERSIONS = {b"iinf": 1, b"iloc": 2}
"""The first versions whose number of entries has 32 bits."""
_MAX_DEPTH = 8


def check_boxes(data: bytes) -> None:
    """Count boxes, items and frames. Files of other formats pass.

    Raises:
        ImageTooLarge: a bound is exceeded.
        struct.error, IndexError, OverflowError: the file is truncated or damaged.
    """
    if data[4:8] == b"ftyp":
        _count_boxes(data, 0, len(data), PartCounter("AVIF or HEIC", _BOUNDS), 0)


def _count_boxes(data: bytes, at: int, end: int, count: PartCounter, depth: int) -> None:
    """Count the boxes from one position to another, and the boxes in them."""
    while at + 8 <= end:
        length, kind = struct.unpack_from(">I4s", data, at)
        body = at + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, body)
            body += 8
        stop = min(at + length if length else end, end)
        count.add("boxes")
        if kind != b"mdat" and not depth:
            count.add("bytes of metadata", stop - at)
        if kind in _LISTS:
            _check_list(data, body, kind, count)
        elif kind in _CONTAINERS and depth < _MAX_DEPTH:
            _count_boxes(data, body + _CONTAINERS[kind], stop, count, depth + 1)
        if stop <= at:
            return
        at = stop


def _check_list(data: bytes, body: int, kind: bytes, count: PartCounter) -> None:
    """Check the number of entries of a box that lists items or frames."""
    part, offset, number = _LISTS[kind]
    if kind in _LONG_VERSIONS and data[body] >= _LONG_VERSIONS[kind]:
        number = ">I"
    count.set(part, struct.unpack_from(number, data, body + offset)[0])
