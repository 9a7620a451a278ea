"""The size of a BMP with run-length encoding (Windows GDI, "Bitmap Compression").

Other BMPs pass. Knows no decoder and no HTTP.

| part | bound |
|---|---|
| pixels with RLE | 4,194,304: Pillow's decoder is written in Python |
| bytes of RLE | 2 per pixel and row, and 1,024 |
"""

from __future__ import annotations

import struct

from app.errors import ImageTooLarge
from app.imaging.structure.counter import PartCounter

_BOUNDS = {"pixels with RLE": 1 << 22}
_SLACK_BYTES = 1024
_RLE = (1, 2)
"""Values of biCompression: BI_RLE8 and BI_RLE4."""


def check_bmp_parts(data: bytes) -> None:
    """Compare the pixels, and the bytes for them, with their bounds.

    Raises:
        ImageTooLarge: a bound is exceeded.
        struct.error: the file is truncated.
    """
    pixels_at, header, width, height = struct.unpack_from("<IIii", data, 10)
    if header < 40 or struct.unpack_from("<I", data, 30)[0] not in _RLE:
        return
    pixels, rows = abs(width * height), abs(height)
    PartCounter("BMP", _BOUNDS).add("pixels with RLE", pixels)
    if len(data) - pixels_at > 2 * (pixels + rows) + _SLACK_BYTES:
        raise ImageTooLarge(f"the BMP has more bytes of RLE than {pixels} pixels need")
