"""Segments and scans of a JPEG (ITU-T T.81, annex B). Knows no decoder and no HTTP.

| part | bound |
|---|---|
| scans | 64: encoders write up to 21 |
| segments | 2,000: a color profile has up to 255 |
| segments of EXIF | 64: Pillow joins them, in quadratic time |
| resources of Photoshop | 10,000 |
| bytes between segments | 65,536 |
"""

from __future__ import annotations

import re
import struct

from app.imaging.structure.counter import METADATA_BYTES, SEARCHED_BYTES, PartCounter

_BOUNDS = {
    "scans": 64,
    "segments": 2000,
    "segments of EXIF": 64,
    "resources of Photoshop": 10_000,
    "bytes between segments": 65_536,
    "bytes of metadata": METADATA_BYTES,
}

_FILL = re.compile(rb"\xff{1,%d}" % (_BOUNDS["bytes between segments"] + 2))
"""A marker begins with 0xFF, which may be repeated. A longer run is beyond the bound."""
_END_OF_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""In a scan, 0xFF is followed by 0 or by the number of a restart marker."""
_STANDALONE = frozenset({0x00, 0x01, *range(0xD0, 0xDA)})
"""Markers without a length; 0 is an escaped 0xFF, which Pillow skips."""
_EOI, _SOS, _APP0, _APP1, _APP13 = 0xD9, 0xDA, 0xE0, 0xE1, 0xED


def check_jpeg_parts(data: bytes) -> None:
    """Count segments and scans up to the end of the first image.

    Raises:
        ImageTooLarge: a bound is exceeded.
        struct.error, IndexError: the file is truncated.
    """
    count = PartCounter("JPEG", _BOUNDS)
    at, scanned = 2, False
    while fill := _FILL.search(data, at):
        count.add("bytes between segments", fill.end() - 1 - at)
        marker, at = data[fill.end()], fill.end() + 1
        count.add("segments")
        if marker == _EOI and scanned:
            return
        if marker in _STANDALONE:
            continue
        (length,) = struct.unpack_from(">H", data, at)
        if marker >= _APP0:  # APPn, JPGn and comments
            _count_metadata(data, at, marker, length, count)
        at += max(length, 2)  # Pillow accepts shorter lengths
        if marker == _SOS:
            scanned = True
            count.add("scans")
            at = _skip_scan(data, at)


def _skip_scan(data: bytes, at: int) -> int:
    """Return the position of the marker after a scan, or the end of the file."""
    for start in range(at, len(data), SEARCHED_BYTES):
        end = _END_OF_SCAN.search(data, start, start + SEARCHED_BYTES + 1)
        if end is not None:
            return end.start()
    return len(data)


def _count_metadata(data: bytes, at: int, marker: int, length: int, count: PartCounter) -> None:
    count.add("bytes of metadata", length)
    if marker == _APP1 and data.startswith(b"Exif\0\0", at + 2):
        count.add("segments of EXIF")
    if marker == _APP13:
        count.add("resources of Photoshop", data.count(b"8BIM", at, at + length))
