"""PNG files -> pixels, at full depth, whatever their metadata is like.

The chunks of pixels alone reach the decoder (libpng, by imagecodecs), so that text, color profiles
and other metadata of any size or damage cost nothing. Source: PNG, third edition (W3C, 2025).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from zlib_ng import zlib_ng

from model.arrays import AnyArray, Shape
from model.readers.base import (
    DamagedImage,
    ImageReader,
    MissingPixels,
    UnsupportedKind,
    drop_alpha,
    read_orientation,
)

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Color type -> samples of a pixel."""
_GREY = (0, 4)
_ADAM7 = (
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
)
"""First row and column, and steps down and right, of the passes of an interlaced image."""
_NEEDED = (b"IHDR", b"PLTE", b"tRNS")
"""Chunks before IDAT that pixels depend on."""
_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_TEXT_BYTES = 1 << 20
"""Metadata of an orientation is not larger than this when it is decompressed."""
_RAW_EXIF = b"Raw profile type exif\0"
"""Keyword of the text chunk in which ImageMagick wrote EXIF before PNG had a chunk for it."""
_XMP = b"XML:com.adobe.xmp\0"
_ZLIB_HEADER = 2
_INFLATED_AT_ONCE = 1024
"""Bytes to decompress at once; what they give is lost if one of them is damaged."""


class _Chunk(NamedTuple):
    """A chunk of a PNG; `data` may be cut off by the end of the file."""

    kind: bytes
    data: memoryview
    intact: bool


class PngReader(ImageReader):
    """A PNG, or the still image of an APNG.

    Raises:
        UnsupportedKind: Apple's variant of PNG.
        ValueError: damaged.
    """

    format = "PNG"

    def __init__(self, data: bytes) -> None:
        first: dict[bytes, _Chunk] = {}
        self._pixels: list[_Chunk] = []
        for chunk in _walk(data):
            if chunk.kind == b"IDAT":
                self._pixels.append(chunk)
            elif chunk.kind in _TEXT:
                for keyword in (_RAW_EXIF, _XMP):
                    if chunk.data[: len(keyword)] == keyword:
                        first.setdefault(keyword, chunk)
            else:
                first.setdefault(chunk.kind, chunk)
        self._chunks = first
        header = self._read_header()
        self.width, self.height, self._bits, color, _, _, self._interlaced = header
        self._samples = _SAMPLES[color]
        self.channels = 1 if color in _GREY else 3
        self.orientation = self._read_orientation()
        animation = first.get(b"acTL")
        if animation is not None and len(animation.data) == 8:
            self.pages = max(1, int.from_bytes(animation.data[:4], "big"))

    def read(self, at_least: Shape | None = None) -> AnyArray:
        import imagecodecs

        end = self._chunks.get(b"IEND")
        if end is None or not end.intact:
            raise MissingPixels(f"the PNG is truncated: {self._describe_missing('no IEND chunk')}")
        packed = b"".join(chunk.data for chunk in self._pixels)
        try:
            values: AnyArray = imagecodecs.png_decode(self._assemble(packed))
        except imagecodecs.PngError as error:
            # The last bytes of the pixels are a checksum, as the chunks have one each.
            rows = self._inflate(packed)
            if len(rows) < self._row_bytes() or not all(chunk.intact for chunk in self._pixels):
                what = self._describe_missing(str(error) or "its pixels cannot be decoded")
                raise MissingPixels(f"the PNG is damaged: {what}") from None
            values = imagecodecs.png_decode(self._assemble(zlib.compress(rows, 0)))
        return drop_alpha(values)

    def _read_header(self) -> tuple[int, ...]:
        chunk = self._chunks.get(b"IHDR")
        if b"CgBI" in self._chunks:
            raise UnsupportedKind("a PNG of Apple's variant for iOS (CgBI)")
        if chunk is None or len(chunk.data) != 13 or not chunk.intact:
            raise DamagedImage("the PNG has no intact IHDR chunk")
        header = struct.unpack(">IIBBBBB", chunk.data)
        if not header[0] or not header[1] or header[3] not in _SAMPLES:
            raise DamagedImage("the IHDR chunk of the PNG is invalid")
        return header

    def _assemble(self, packed: bytes) -> bytes:
        """Write a PNG of the chunks that pixels depend on."""
        needed = (self._chunks[kind] for kind in _NEEDED if kind in self._chunks)
        chunks = [(chunk.kind, bytes(chunk.data)) for chunk in needed if chunk.intact]
        parts = [_SIGNATURE]
        for kind, data in (*chunks, (b"IDAT", packed), (b"IEND", b"")):
            checksum = zlib_ng.crc32(data, zlib_ng.crc32(kind))
            parts += [struct.pack(">I", len(data)), kind, data, struct.pack(">I", checksum)]
        return b"".join(parts)

    def _passes(self) -> list[tuple[int, int]]:
        """The (rows, bytes of a row and its filter) of each pass."""
        bits, passes = self._bits * self._samples, []
        for top, left, down, right in _ADAM7 if self._interlaced else ((0, 0, 1, 1),):
            rows = -(-(self.height - top) // down)
            columns = -(-(self.width - left) // right)
            if rows > 0 and columns > 0:
                passes.append((rows, 1 + -(-columns * bits // 8)))
        return passes

    def _row_bytes(self) -> int:
        """Bytes of all rows with their filters."""
        return sum(rows * size for rows, size in self._passes())

    def _inflate(self, packed: bytes) -> bytes:
        """Decompress as much as the rows need, or as much as there is; checksums do not count."""
        needed, parts = self._row_bytes(), list[bytes]()
        stream = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            for at in range(_ZLIB_HEADER, len(packed), _INFLATED_AT_ONCE):
                parts.append(stream.decompress(packed[at : at + _INFLATED_AT_ONCE], needed))
                needed -= len(parts[-1])
                if needed <= 0:
                    break
        except zlib.error:
            pass  # damaged from here on
        return b"".join(parts)

    def _describe_missing(self, otherwise: str) -> str:
        """Say how many rows are missing; `otherwise` if none is."""
        there = len(self._inflate(b"".join(chunk.data for chunk in self._pixels)))
        if there >= self._row_bytes():
            return f"it has {otherwise}" if otherwise.startswith("no ") else otherwise
        if self._interlaced:
            return f"{there} of {self._row_bytes()} bytes of its interlaced rows are there"
        return f"{there // self._passes()[0][1]} of its {self.height} rows are there"

    def _read_orientation(self) -> int:
        exif, xmp = b"", b""
        if (chunk := self._chunks.get(b"eXIf")) is not None:
            exif = bytes(chunk.data)
        elif (chunk := self._chunks.get(_RAW_EXIF)) is not None:
            exif = _read_raw_exif(chunk)
        if (chunk := self._chunks.get(_XMP)) is not None:
            xmp = _read_text(chunk, len(_XMP))
        return read_orientation(exif, xmp)


def _walk(data: bytes) -> Iterator[_Chunk]:
    """List the chunks up to IEND, or to the end of the file."""
    view, at = memoryview(data), len(_SIGNATURE)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body, end = view[at + 8 : at + 8 + length], at + 12 + length
        checksum = zlib_ng.crc32(body, zlib_ng.crc32(kind)).to_bytes(4, "big")
        yield _Chunk(kind, body, checksum == data[end - 4 : end])
        if kind == b"IEND":
            return
        at = end


def _read_text(chunk: _Chunk, start: int) -> bytes:
    """Read the text after the keyword of a text chunk; empty if it is damaged."""
    data = bytes(chunk.data[start:])
    if chunk.kind == b"tEXt":
        return data
    packed = chunk.kind == b"zTXt"
    if packed:
        data = data[1:]
    else:  # iTXt: flag and method of compression, language, translated keyword
        packed, (*_, data) = data[:1] == b"\1", data[2:].split(b"\0", 2)
    try:
        return zlib.decompressobj().decompress(data, _TEXT_BYTES) if packed else data
    except zlib.error:
        return b""


def _read_raw_exif(chunk: _Chunk) -> bytes:
    """Read EXIF that is written as text: a name, a length, and hexadecimal digits."""
    lines = _read_text(chunk, len(_RAW_EXIF)).split(b"\n")[3:]
    try:
        return bytes.fromhex(b"".join(lines).decode("ascii"))
    except ValueError:
        return b""
