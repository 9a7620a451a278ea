"""Encoded images of every format and layout, and random mutations of them. Knows no service."""

from __future__ import annotations

import io
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image, features

from model.arrays import AnyArray

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ORIENTATION, _SIDEWAYS = 0x112, 6
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
"""Values at which the arithmetic of readers overflows."""
_HEADER_BYTES = 256
_UUID = re.compile(rb"urn:uuid:[0-9a-f-]{36}")
"""Random in each OME-TIFF."""


def build_corpus(seed: int) -> dict[str, bytes]:
    """Valid images by name. The name begins with the format: "TIFF, tiled".

    What the installed libraries cannot write is left out.
    """
    return dict(_generate(np.random.default_rng(seed)))


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG with its checksum."""
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def bmp(width: int, height: int, data: bytes, *, bits: int = 8, compression: int = 1) -> bytes:
    """A BMP with a palette. Compression 1 is RLE8, 2 is RLE4."""
    palette = bytes(range(256)) * 4 if bits == 8 else bytes(64)
    colors, start = len(palette) // 4, 54 + len(palette)
    info = (40, width, height, 1, bits, compression, len(data), 0, 0, colors, 0)
    return (
        b"BM" + struct.pack("<IIIIiiHHIIiiII", start + len(data), 0, start, *info) + palette + data
    )


def _generate(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    rgb = rng.integers(0, 256, (37, 53, 3), np.uint8)
    smooth = np.kron(rng.integers(0, 256, (5, 6, 3), np.uint8), np.ones((9, 9, 1), np.uint8))
    grey, grey16 = rgb[..., 0], rgb[..., 0].astype(np.uint16) * 257
    for name, pixels in (("colour", rgb), ("grey", grey), ("smooth", smooth)):
        yield f"JPEG, {name}", _encode(pixels, "JPEG")
        yield f"JPEG, {name}, progressive", _encode(pixels, "JPEG", progressive=True)
        yield f"PNG, {name}", _encode(pixels, "PNG")
        yield f"BMP, {name}", _encode(pixels, "BMP")
        yield f"WebP, {name}", _encode(pixels, "WEBP")
        yield f"WebP, {name}, lossless", _encode(pixels, "WEBP", lossless=True)
        yield f"GIF, {name}", _encode(pixels, "GIF")
    yield from _generate_variants(rgb, grey, grey16)
    yield from _generate_tiffs(rgb, grey16)
    if features.check("avif"):
        yield "AVIF, colour", _encode(rgb, "AVIF")
    if features.check("jpg_2000"):
        yield "JPEG 2000, colour", _encode(rgb, "JPEG2000")
        yield "JPEG 2000, 16-bit", _encode(grey16, "JPEG2000")


def _generate_variants(
    rgb: AnyArray, grey: AnyArray, grey16: AnyArray
) -> Iterator[tuple[str, bytes]]:
    exif = Image.Exif()
    exif[_ORIENTATION] = _SIDEWAYS
    for kind, suffix in (("JPEG", "JPEG"), ("PNG", "PNG"), ("WebP", "WEBP")):
        yield f"{kind}, EXIF", _encode(rgb, suffix, exif=exif)
    rgba = np.dstack([rgb, grey])
    yield "JPEG, CMYK", _encode(rgba, "JPEG", mode="CMYK")
    yield "PNG, 16-bit", _encode(grey16, "PNG")
    yield "PNG, 1-bit", _encode(grey > 128, "PNG")
    yield "PNG, RGBA", _encode(rgba, "PNG")
    yield "PNG, palette", _encode(grey, "PNG", mode="P")
    yield "PNG, interlaced", _interlaced_png()
    frames = [Image.fromarray(np.roll(grey, shift)) for shift in range(4)]
    for kind, suffix in (("GIF", "GIF"), ("WebP", "WEBP"), ("PNG", "PNG"), ("JPEG", "MPO")):
        buffer = io.BytesIO()
        converted = [frame.convert("RGB") if suffix == "WEBP" else frame for frame in frames]
        converted[0].save(buffer, suffix, save_all=True, append_images=converted[1:])
        yield f"{kind}, several frames", buffer.getvalue()
    rle8 = (b"\x05\x01\x00\x05abcde\x00\x05\x02\x00\x00") * 20 + b"\0\1"
    yield "BMP, RLE8", bmp(20, 20, rle8)
    rle4 = b"\x05\x12\x0f\x31\x00\x00" * 20 + b"\0\1"
    yield "BMP, RLE4", bmp(20, 20, rle4, bits=4, compression=2)


def _generate_tiffs(rgb: AnyArray, grey16: AnyArray) -> Iterator[tuple[str, bytes]]:
    planes = np.moveaxis(rgb, 2, 0).copy()
    large = np.tile(grey16, (3, 3))
    layouts: dict[str, tuple[AnyArray, dict[str, Any]]] = {
        "colour": (rgb, {"photometric": "rgb"}),
        "16-bit": (grey16, {}),
        "float": (grey16.astype(np.float32), {}),
        "32-bit": (grey16.astype(np.int32), {}),
        "planes": (planes, {"photometric": "rgb", "planarconfig": "separate"}),
        "tiled": (large, {"tile": (16, 16)}),
        "strips": (large, {"rowsperstrip": 4}),
        "BigTIFF": (grey16, {"bigtiff": True}),
        "big-endian": (grey16, {"byteorder": ">"}),
        "pages": (np.stack([grey16] * 3), {"photometric": "minisblack"}),
        "OME": (grey16, {"ome": True}),
    }
    for compression in ("lzw", "zlib", "packbits", "jpeg", "zstd", "webp", "lzma", "jpeg2000"):
        layouts[compression] = (rgb, {"photometric": "rgb", "compression": compression})
        layouts[f"{compression}, tiled"] = (
            np.tile(rgb, (2, 2, 1)),
            {"photometric": "rgb", "compression": compression, "tile": (32, 32)},
        )
    for compression in ("lzw", "zlib"):
        predicted = {"compression": compression, "predictor": True}
        layouts[f"{compression}, predictor"] = (grey16, predicted)
    for name, (pixels, options) in layouts.items():
        data = _write_tiff(pixels, options)
        if data is not None:
            yield f"TIFF, {name}", data
    for compression in ("group3", "group4"):
        bits = _encode(grey16 > 1 << 15, "TIFF", compression=compression)
        yield f"TIFF, {compression}", bits


def _write_tiff(pixels: AnyArray, options: dict[str, Any]) -> bytes | None:
    """A TIFF; None if a library for its compression is missing."""
    import tifffile

    buffer = io.BytesIO()
    try:
        tifffile.imwrite(buffer, pixels, **options)
    except (ImportError, KeyError, ValueError):
        return None
    return _UUID.sub(b"urn:uuid:" + bytes(36), buffer.getvalue())


def _encode(pixels: AnyArray, format: str, *, mode: str | None = None, **options: Any) -> bytes:
    image = Image.fromarray(pixels)
    if mode == "CMYK":
        image = Image.frombytes("CMYK", (pixels.shape[1], pixels.shape[0]), pixels.tobytes())
    elif mode is not None:
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _interlaced_png() -> bytes:
    """16 x 16 grey pixels in the seven passes of Adam7, all of one value."""
    passes = ((2, 2), (2, 2), (4, 2), (4, 4), (8, 4), (8, 8), (16, 8))
    rows = b"".join((b"\0" + bytes(width)) * height for width, height in passes)
    header = struct.pack(">IIBBBBB", 16, 16, 8, 0, 0, 0, 1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return PNG_SIGNATURE + b"".join(png_chunk(*chunk) for chunk in chunks)


class Mutator:
    """Damages images at random, and repeatably.

    Args:
        corpus: valid images by name.
        seed: of the random numbers.
    """

    def __init__(self, corpus: dict[str, bytes], seed: int) -> None:
        self._images = list(corpus.values())
        self._random = random.Random(seed)
        self._operations: tuple[Callable[[bytearray], bytes | bytearray], ...] = (
            self._flip_bits,
            self._truncate,
            self._write_numbers,
            self._move,
            self._splice,
            self._cut,
            self._insert,
            self._repeat,
        )

    def mutate(self, image: bytes) -> bytes:
        """Damage an image, sometimes twice. Checksums of a PNG are mostly corrected."""
        data: bytes | bytearray = image
        for _ in range(self._random.choice((1, 1, 1, 2))):
            data = self._random.choice(self._operations)(bytearray(data or b"\0"))
        if data.startswith(PNG_SIGNATURE) and self._random.random() < 0.7:
            data = correct_checksums(bytes(data))
        return bytes(data)

    def _flip_bits(self, data: bytearray) -> bytearray:
        for _ in range(self._random.choice((1, 2, 8, 64))):
            data[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
        return data

    def _truncate(self, data: bytearray) -> bytearray:
        return data[: self._random.randrange(len(data))]

    def _write_numbers(self, data: bytearray) -> bytearray:
        """Write extreme integers, mostly to the header."""
        for _ in range(self._random.choice((1, 2, 4))):
            end = self._random.choice((32, _HEADER_BYTES, len(data)))
            at, size = self._random.randrange(min(len(data), end)), self._random.choice((1, 2, 4))
            number = self._random.choice(_NUMBERS) % 256**size
            order = self._random.choice(("little", "big"))
            data[at : at + size] = number.to_bytes(size, order)
        return data

    def _move(self, data: bytearray) -> bytearray:
        source, target = self._slice(data), self._slice(data)
        data[target] = data[source]
        return data

    def _splice(self, data: bytearray) -> bytes:
        """Continue with another image, perhaps of another format."""
        other = self._random.choice(self._images)
        start = bytes(data[: self._random.randrange(len(data))])
        return start + other[self._random.randrange(len(other)) :]

    def _cut(self, data: bytearray) -> bytearray:
        del data[self._slice(data)]
        return data

    def _insert(self, data: bytearray) -> bytearray:
        at = self._random.randrange(len(data))
        data[at:at] = self._random.randbytes(self._random.randrange(1, 200))
        return data

    def _repeat(self, data: bytearray) -> bytearray:
        part = self._slice(data)
        data[part] = data[part] * self._random.randrange(2, 30)
        return data

    def _slice(self, data: bytearray) -> slice:
        first, last = sorted(self._random.randrange(len(data)) for _ in range(2))
        return slice(first, last)


def correct_checksums(png: bytes) -> bytes:
    """Make the checksum of every complete chunk right, so that its content is read."""
    data, at = bytearray(png), len(PNG_SIGNATURE)
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        end = at + 8 + length
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)
