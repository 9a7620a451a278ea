"""The structure of an image file, checked before a decoder sees the file.

Decoders spend time and memory on every segment, chunk, scan, frame and tag, however few pixels the
image has. A file of a few kilobytes can keep a decoder busy for minutes. This package walks through
a file, counts its parts without reading their contents, and stops at the first bound that is
exceeded. One module per format has the table of its bounds. Files of other formats pass.

Knows no decoder, no pixels and no HTTP.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from app.imaging.structure.bmp import check_bmp_parts
from app.imaging.structure.boxes import check_boxes
from app.imaging.structure.gif import check_gif_parts
from app.imaging.structure.jpeg import check_jpeg_parts
from app.imaging.structure.jpeg2000 import check_jpeg2000_parts
from app.imaging.structure.png import check_png_parts
from app.imaging.structure.tiff import check_tiff_parts
from app.imaging.structure.webp import check_webp_parts

_CHECKS: tuple[tuple[bytes | tuple[bytes, ...], Callable[[bytes], None]], ...] = (
    (b"\xff\xd8", check_jpeg_parts),
    (b"\x89PNG\r\n\x1a\n", check_png_parts),
    ((b"GIF87a", b"GIF89a"), check_gif_parts),
    ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), check_tiff_parts),
    (b"BM", check_bmp_parts),
    (b"RIFF", check_webp_parts),
    ((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n"), check_jpeg2000_parts),
    (b"\0", check_boxes),
)
"""First bytes of a file, and what checks it. The first entry that fits counts."""


def check_structure(data: bytes) -> None:
    """Check that no part of an image file is repeated, or as large, beyond its bound.

    Takes at most a second for the worst files of 128 MB, and milliseconds for others. A truncated
    file passes, since a decoder notices that.

    Raises:
        ImageTooLarge: a bound is exceeded.
        CorruptImage: a TIFF whose first directory, or a tag of it that pixels need, points outside
            the file, or whose strips or tiles overlap.
    """
    for signature, check in _CHECKS:
        if data.startswith(signature):
            try:
                check(data)
            except (struct.error, IndexError, OverflowError):  # it is truncated or damaged
                return
