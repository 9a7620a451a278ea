"""Chunks of a PNG (PNG, third edition, section 5). Knows no decoder and no HTTP.

| part | bound |
|---|---|
| chunks of pixels | 65,536: libpng writes one per 8 KiB |
| other chunks | 4,096 |
"""

from __future__ import annotations

import struct

from app.imaging.structure.counter import METADATA_BYTES, PartCounter

_BOUNDS = {
    "chunks of pixels": 65_536,
    "other chunks": 4096,
    "bytes of metadata": METADATA_BYTES,
}
_PIXELS = (b"IDAT", b"fdAT", b"fcTL")


def check_png_parts(data: bytes) -> None:
    """Count the chunks up to IEND.

    Raises:
        ImageTooLarge: a bound is exceeded.
        struct.error: the file is truncated.
    """
    count = PartCounter("PNG", _BOUNDS)
    at = 8
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IEND":
            return
        if kind in _PIXELS:
            count.add("chunks of pixels")
        else:
            count.add("other chunks")
            count.add("bytes of metadata", min(length, len(data) - at))
        at += 12 + length
