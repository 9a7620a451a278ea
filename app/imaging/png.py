"""Arrays -> PNG bytes, by zlib-ng. Knows NumPy and the PNG format; no Pillow and no HTTP."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence

import numpy as np
from zlib_ng import zlib_ng

from model.arrays import AnyArray, ByteArray, UInt16Array

_GREY, _RGB, _PALETTE, _RGBA = 0, 2, 3, 6  # PNG's colour types
_UP = 2  # PNG's filter: a line less the line above


def encode_mask(mask: ByteArray) -> bytes:
    """(H, W) of 0 and 255 -> 8-bit grey PNG."""
    return _png(mask, _GREY)


def encode_labels(labels: ByteArray, palette: Sequence[tuple[int, int, int]]) -> bytes:
    """(H, W) class indices -> palette PNG whose values are the indices."""
    return _png(labels, _PALETTE, (b"PLTE", bytes(itertools.chain.from_iterable(palette))))


def encode_grey16(values: UInt16Array) -> bytes:
    """(H, W) -> 16-bit grey PNG."""
    return _png(values, _GREY)


def encode_rgb(image: ByteArray) -> bytes:
    """(H, W, 3) -> RGB PNG."""
    return _png(image, _RGB)


def encode_rgba(image: ByteArray) -> bytes:
    """(H, W, 4) -> RGBA PNG."""
    return _png(image, _RGBA)


def _png(image: AnyArray, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """(H, W) or (H, W, C) uint8 or uint16 -> PNG of that colour type (PNG 1.2, chapters 4 to 6).

    Pillow tries every filter on every line, which is most of what it takes. Here each line is
    stored as its difference to the one above: zeros wherever a mask does not change.
    zlib-ng deflates them in a fifth of zlib's time (docs/decisions/0020-png-by-zlib-ng.md).

    Args:
        chunks: kind and data of what stands in front of the pixels.
    """
    height, width = image.shape[:2]
    depth = image.itemsize
    lines = np.ascontiguousarray(image, f">u{depth}").view(np.uint8).reshape(height, -1)
    filtered = np.empty((height, lines.shape[1] + 1), np.uint8)
    filtered[:, 0] = _UP
    filtered[0, 1:] = lines[0]
    np.subtract(lines[1:], lines[:-1], out=filtered[1:, 1:])
    # In greys there are runs to be found, in colours rather what was there before.
    runs = colour in (_GREY, _PALETTE)
    packer = zlib_ng.compressobj(1, strategy=zlib_ng.Z_RLE) if runs else zlib_ng.compressobj(2)
    header = struct.pack(">IIBBBBB", width, height, 8 * depth, colour, 0, 0, 0)
    body = packer.compress(filtered.data) + packer.flush()
    chunks = ((b"IHDR", header), *chunks, (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib_ng.crc32(kind + data))
        for kind, data in chunks
    )
