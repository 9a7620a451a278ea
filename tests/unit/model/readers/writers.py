"""Files assembled by hand: chunks of PNGs, and BMPs of every header."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image


def saved(image: Image.Image | np.ndarray, format: str, **options: object) -> bytes:
    """A file of this format, written by Pillow."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    """A chunk of a PNG; `checksum` replaces the right one."""
    right = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", right)


def png(
    rows: np.ndarray,
    *,
    bits: int = 8,
    color: int = 0,
    before: bytes = b"",
    packed: bytes | None = None,
    after: bytes = b"",
    end: bytes = chunk(b"IEND", b""),
) -> bytes:
    """A PNG of rows without a filter.

    Args:
        rows: (H, W, samples) or (H, W), of the type that is stored.
        before, after: chunks around IDAT.
        packed: replaces the compressed rows.
    """
    height, width = rows.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    if packed is None:
        packed = zlib.compress(filtered(rows))
    body = chunk(b"IHDR", header) + before + chunk(b"IDAT", packed) + after + end
    return b"\x89PNG\r\n\x1a\n" + body


def filtered(rows: np.ndarray) -> bytes:
    """The rows of a PNG, each after a zero for its filter."""
    stored = rows.astype(rows.dtype.newbyteorder(">"))
    return b"".join(b"\0" + row.tobytes() for row in stored)


def bmp(
    rows: Sequence[bytes],
    width: int,
    bits: int,
    *,
    header: int = 40,
    compression: int = 0,
    masks: Sequence[int] = (),
    palette: bytes = b"",
    colors: int = 0,
    top_down: bool = False,
    gap: int = 0,
    body: bytes | None = None,
) -> bytes:
    """A BMP.

    Args:
        rows: the top one first, without padding.
        header: size of the header in bytes: 12, 16 and 64 are those of OS/2.
        gap: bytes between the palette and the pixels.
        body: replaces the rows.
    """
    height = len(rows)
    if body is None:
        padded = [row + bytes(-len(row) % 4) for row in rows]
        body = b"".join(padded if top_down else padded[::-1])
    if header == 12:
        fields = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        size = (width, -height if top_down else height)
        fields = struct.pack(
            "<IiiHHIIiiII", header, *size, 1, bits, compression, len(body), 2835, 2835, colors, 0
        )
        if masks and header == 40:
            fields += struct.pack(f"<{len(masks)}I", *masks)
        elif header >= 52:
            fields += struct.pack("<4I", *(*masks, 0, 0, 0, 0)[:4])
        if masks or header != 40:
            fields = fields if header == 40 else fields[:header].ljust(header, b"\0")
    start = 14 + len(fields) + len(palette) + gap
    file_header = b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start)
    return file_header + fields + palette + bytes(gap) + body


def bits_of(values: np.ndarray, bits: int) -> list[bytes]:
    """Rows of integers (H, W) of 1, 2, 4, 8, 16 or 32 bits, as a BMP stores them."""
    if bits < 8:
        each = (values[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1
        packed = np.packbits(each.reshape(len(values), -1).astype(np.uint8), axis=1)
        return [row.tobytes() for row in packed]
    return [row.tobytes() for row in values.astype({8: "<u1", 16: "<u2", 32: "<u4"}[bits])]
