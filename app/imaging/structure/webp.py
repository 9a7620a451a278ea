"""Chunks and canvas of a WebP (RFC 9649, section 2). Knows no decoder and no HTTP.

| part | bound |
|---|---|
| chunks | 20,000 |
| pixels of a side of the canvas | 16,383, as libwebp |
| pixels of an animation's canvas | 33,554,432: libwebp allocates 8 bytes for each at once |
"""

from __future__ import annotations

import math
import struct

from app.imaging.structure.counter import METADATA_BYTES, PartCounter

_BOUNDS = {
    "chunks": 20_000,
    "pixels of a side": 16_383,
    "pixels of an animation": 1 << 25,
    "bytes of metadata": METADATA_BYTES,
}
_ANIMATED = 2
"""In the flags of the chunk VP8X."""
_PIXELS = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")


def check_webp_parts(data: bytes) -> None:
    """Count the chunks, and compare the canvas with its bounds. Other RIFF files pass.

    Raises:
        ImageTooLarge: a bound is exceeded.
        struct.error, IndexError: the file is truncated.
    """
    if data[8:12] != b"WEBP":
        return
    count = PartCounter("WebP", _BOUNDS)
    at = 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        count.add("chunks")
        if kind == b"VP8X":
            _check_canvas(data, at + 8, count)
        elif kind not in _PIXELS:
            count.add("bytes of metadata", min(length, len(data) - at))
        at += 8 + length + length % 2


def _check_canvas(data: bytes, at: int, count: PartCounter) -> None:
    """Check the content of a chunk VP8X: flags, and width and height less one in 24 bits each."""
    sides = [
        int.from_bytes(data[side_at : side_at + 3], "little") + 1 for side_at in (at + 4, at + 7)
    ]
    for side in sides:
        count.set("pixels of a side", side)
    if data[at] & _ANIMATED:
        count.set("pixels of an animation", math.prod(sides))
