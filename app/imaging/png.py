"""Arrays -> PNG bytes, by zlib-ng. Knows the PNG format; no Pillow and no HTTP."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence

import numpy as np
from zlib_ng import zlib_ng

from model.arrays import AnyArray, ByteArray, UInt16Array

_GREY, _RGB, _PALETTE, _RGBA = 0, 2, 3, 6  # PNG's color types
_UP = 2  # PNG's filter type: the difference to the row above


def encode_mask(mask: ByteArray) -> bytes:
    """Encode (H, W) of 0 and 255 as an 8-bit grey PNG."""
    return _encode(mask, _GREY)


def encode_labels(labels: ByteArray, palette: Sequence[tuple[int, int, int]]) -> bytes:
    """Encode (H, W) class indices as a palette PNG whose values are the indices."""
    return _encode(labels, _PALETTE, (b"PLTE", bytes(itertools.chain.from_iterable(palette))))


def encode_grey16(values: UInt16Array) -> bytes:
    """Encode (H, W) as a 16-bit grey PNG."""
    return _encode(values, _GREY)


def encode_picture(image: ByteArray) -> bytes:
    """Encode (H, W) as a grey, (H, W, 3) as an RGB, and (H, W, 4) as an RGBA PNG."""
    channels = 1 if image.ndim == 2 else image.shape[2]
    return _encode(image, {1: _GREY, 3: _RGB, 4: _RGBA}[channels])


def _encode(image: AnyArray, color_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Encode (H, W) or (H, W, C) uint8 or uint16 (PNG 1.2, chapters 4 to 6).

    Pillow tries every filter on every row, which takes most of its time. Here each row is stored as
    its difference to the row above: zeros wherever a mask does not change. zlib-ng compresses them
    in a fifth of zlib's time (docs/decisions/0020-png-by-zlib-ng.md).

    Args:
        chunks: type and data of chunks that precede the pixels.
    """
    height, width = image.shape[:2]
    depth = image.itemsize
    rows = np.ascontiguousarray(image, f">u{depth}").view(np.uint8).reshape(height, -1)
    filtered = np.empty((height, rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = _UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    # Masks consist of runs; colors rather repeat what came before.
    if color_type in (_GREY, _PALETTE):
        compressor = zlib_ng.compressobj(1, strategy=zlib_ng.Z_RLE)
    else:
        compressor = zlib_ng.compressobj(2)
    header = struct.pack(">IIBBBBB", width, height, 8 * depth, color_type, 0, 0, 0)
    body = compressor.compress(filtered.data) + compressor.flush()
    all_chunks = ((b"IHDR", header), *chunks, (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib_ng.crc32(kind + data))
        for kind, data in all_chunks
    )
