"""The structure of an image file, checked before a decoder sees the file.

Decoders spend time and memory on every segment, chunk, scan, frame and tag, however few pixels the
image has. A file of a few kilobytes can keep a decoder busy for minutes. This module walks through
a file, counts its parts without reading their contents, and stops at the first bound that is
exceeded. Formats that are not in the table pass.

| format | part | bound |
|---|---|---|
| JPEG | scans | 64: encoders write up to 21 |
| JPEG | segments | 2,000: a color profile has up to 255 |
| JPEG | segments of EXIF | 64: Pillow joins them, in quadratic time |
| JPEG | resources of Photoshop | 10,000 |
| JPEG | bytes between segments | 65,536 |
| PNG | chunks of pixels | 65,536: libpng writes one per 8 KiB |
| PNG | other chunks | 4,096 |
| GIF | frames | 10,000 |
| GIF | blocks of pixels | 1,000,000 |
| GIF | blocks of comments | 1,024: Pillow joins them, in quadratic time |
| GIF | blocks of other extensions | 65,536 |
| GIF | bytes between blocks | 65,536 |
| TIFF | directories, with SubIFDs | 10,000 |
| TIFF | tags of a directory | 1,024 |
| TIFF | tags | 262,144 |
| TIFF | strips or tiles of a directory | 131,072 |
| TIFF | strips or tiles | 524,288 |
| TIFF | JPEG scans of a strip or tile | 64 |
| BMP | pixels with RLE | 4,194,304: Pillow's decoder is written in Python |
| BMP | bytes of RLE | 2 per pixel and row, and 1,024 |
| WebP | chunks | 20,000 |
| WebP | sides of the canvas | 16,383, as libwebp |
| WebP | pixels of an animation | 33,554,432: libwebp allocates 8 bytes for each at once |
| JPEG 2000 | boxes | 1,024 |
| JPEG 2000 | components | 4 |
| JPEG 2000 | tiles | 65,535, as the standard |
| JPEG 2000 | quality layers | 1,024 |
| AVIF, HEIC | boxes | 65,536 |
| AVIF, HEIC | items | 4,096: libavif searches them one by one |
| AVIF, HEIC | frames | 10,000 |
| all | bytes of metadata | 16 MiB; 64 MiB in a TIFF |

Sources: ITU-T T.81, annex B; PNG, third edition, section 5; GIF89a; TIFF 6.0 and BigTIFF;
RFC 9649; ITU-T T.800, annexes A and I; ISO/IEC 14496-12. Knows no decoder, no pixels and no HTTP.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Callable

from app.errors import CorruptImage, ImageTooLarge

_BOUNDS = {
    "JPEG scans": 64,
    "JPEG segments": 2000,
    "JPEG segments of EXIF": 64,
    "JPEG resources of Photoshop": 10_000,
    "JPEG bytes between segments": 65_536,
    "JPEG bytes of metadata": 16 << 20,
    "PNG chunks of pixels": 65_536,
    "PNG other chunks": 4096,
    "PNG bytes of metadata": 16 << 20,
    "GIF frames": 10_000,
    "GIF blocks of pixels": 1_000_000,
    "GIF blocks of comments": 1024,
    "GIF blocks of other extensions": 65_536,
    "GIF bytes between blocks": 65_536,
    "TIFF directories": 10_000,
    "TIFF tags of a directory": 1024,
    "TIFF tags": 262_144,
    "TIFF strips or tiles of a directory": 131_072,
    "TIFF strips or tiles": 524_288,
    "TIFF JPEG scans of a strip or tile": 64,
    "TIFF bytes of metadata": 64 << 20,
    "BMP pixels with RLE": 1 << 22,
    "WebP chunks": 20_000,
    "WebP bytes of metadata": 16 << 20,
    "WebP pixels of a side": 16_383,
    "WebP pixels of an animation": 1 << 25,
    "JPEG 2000 boxes": 1024,
    "JPEG 2000 components": 4,
    "JPEG 2000 tiles": 65_535,
    "JPEG 2000 quality layers": 1024,
    "JPEG 2000 bytes of metadata": 16 << 20,
    "AVIF or HEIC boxes": 65_536,
    "AVIF or HEIC items": 4096,
    "AVIF or HEIC frames": 10_000,
    "AVIF or HEIC bytes of metadata": 16 << 20,
}
"""The largest number that is allowed of each part: the table above."""

_KINDS = ("JPEG 2000", "JPEG", "PNG", "GIF", "TIFF", "BMP", "WebP", "AVIF or HEIC")

_RLE_SLACK = 1024

_JPEG_FILL = re.compile(rb"\xff{1,65538}")
_JPEG_END_OF_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""In a scan, 0xFF is followed by 0 or by the number of a restart marker."""
_SEARCHED_BYTES = 1 << 20
_JPEG_STANDALONE = frozenset({0x00, 0x01, *range(0xD0, 0xDA)})
"""Markers without a length; 0 is an escaped 0xFF, which Pillow skips."""
_SOS, _EOI, _APP1, _APP13, _COM = 0xDA, 0xD9, 0xE1, 0xED, 0xFE

_PNG_PIXELS = (b"IDAT", b"fdAT", b"fcTL")

_TIFF_SEGMENTS = (273, 324)
"""StripOffsets and TileOffsets: they have one value per strip or tile."""
_TIFF_COMPRESSION, _TIFF_JPEG = 259, (6, 7)
_TIFF_SUBIFDS = 330
_TIFF_JPEG_LAYOUT = (_TIFF_COMPRESSION, 273, 279, 324, 325)
_TIFF_INTEGERS = {3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
_SCAN = b"\xff\xda"
_OVERLAP = 2
"""Largest ratio of the bytes of all strips or tiles to those of the file, for JPEGs."""
_TIFF_LAYOUT = frozenset(
    {*(256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 320, 322, 323, 324, 325, 338, 339)}
)
"""Tags without which pixels cannot be read; the values of the others are metadata."""
_TIFF_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_TIFF_BYTES |= {16: 8, 17: 8, 18: 8}
"""Type of a tag -> size of a value."""

_WEBP_ANIMATED = 2
"""In the flags of the chunk VP8X."""
_WEBP_PIXELS = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")

_CONTAINERS = {
    **dict.fromkeys((b"moov", b"trak", b"mdia", b"minf", b"stbl", b"iprp", b"ipco", b"dinf"), 0),
    b"meta": 4,
}
"""Boxes that hold boxes, and the bytes before those."""
_COUNTS = {
    b"iinf": ("items", 4, ">H"),
    b"iloc": ("items", 6, ">H"),
    b"ipma": ("items", 4, ">I"),
    b"stsz": ("frames", 8, ">I"),
}
"""Boxes that list items or frames: what, and offset and type of the number of entries. Later
versions of `iinf` and `iloc` have 32 bits."""
_BOX_DEPTH = 8


class _Count(Counter[str]):
    """Counts the parts of a file up to their bounds."""

    def add(self, part: str, amount: int = 1) -> None:
        """Count `amount` more of a part.

        Raises:
            ImageTooLarge: more than allowed.
        """
        self[part] += amount
        if self[part] > _BOUNDS[part]:
            kind = next(each for each in _KINDS if part.startswith(each))
            name = part.removeprefix(kind).strip()
            raise ImageTooLarge(f"the {kind} has more than {_BOUNDS[part]} {name}")


def check_structure(data: bytes) -> None:
    """Check that no part of an image file is repeated, or as large, beyond its bound.

    Takes at most a second for the worst files of 128 MB, and milliseconds for others. A truncated
    file passes, since a decoder notices that.

    Raises:
        ImageTooLarge: a bound is exceeded.
        CorruptImage: a TIFF whose first directory points outside the file.
    """
    for signature, check in _CHECKS:
        if data.startswith(signature):
            try:
                check(data, _Count())
            except (struct.error, IndexError):  # the file is truncated or damaged
                return


def _check_jpeg(data: bytes, count: _Count) -> None:
    at, scanned = 2, False
    while fill := _JPEG_FILL.search(data, at):
        count.add("JPEG bytes between segments", fill.end() - 1 - at)
        marker, at = data[fill.end()], fill.end() + 1
        count.add("JPEG segments")
        if marker == _EOI and scanned:
            return
        if marker in _JPEG_STANDALONE:
            continue
        (length,) = struct.unpack_from(">H", data, at)
        if marker >= 0xE0:  # APPn, JPGn and comments
            _count_jpeg_metadata(data, at, marker, length, count)
        at += max(length, 2)  # Pillow accepts shorter lengths
        if marker == _SOS:
            scanned = True
            count.add("JPEG scans")
            at = _skip_jpeg_scan(data, at)


def _skip_jpeg_scan(data: bytes, at: int) -> int:
    """The position of the marker after a scan, or the end of the file.

    A search holds Python's lock, so it is done in pieces: 1 MiB takes up to 8 ms.
    """
    for start in range(at, len(data), _SEARCHED_BYTES):
        end = _JPEG_END_OF_SCAN.search(data, start, start + _SEARCHED_BYTES + 1)
        if end is not None:
            return end.start()
    return len(data)


def _count_jpeg_metadata(data: bytes, at: int, marker: int, length: int, count: _Count) -> None:
    count.add("JPEG bytes of metadata", length)
    if marker == _APP1 and data.startswith(b"Exif\0\0", at + 2):
        count.add("JPEG segments of EXIF")
    if marker == _APP13:
        count.add("JPEG resources of Photoshop", data.count(b"8BIM", at, at + length))


def _check_png(data: bytes, count: _Count) -> None:
    at = 8
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IEND":
            return
        if kind in _PNG_PIXELS:
            count.add("PNG chunks of pixels")
        else:
            count.add("PNG other chunks")
            count.add("PNG bytes of metadata", min(length, len(data) - at))
        at += 12 + length


def _check_gif(data: bytes, count: _Count) -> None:
    at = 13 + _color_table_bytes(data[10])
    while True:
        introducer, at = data[at], at + 1
        if introducer == 0x3B:  # the trailer
            return
        if introducer == 0x21:
            part = "comments" if data[at] == _COM else "other extensions"
            at = _skip_gif_blocks(data, at + 1, f"GIF blocks of {part}", count)
        elif introducer == 0x2C:
            count.add("GIF frames")
            at += 9 + _color_table_bytes(data[at + 8]) + 1  # and the size of a code
            at = _skip_gif_blocks(data, at, "GIF blocks of pixels", count)
        else:
            count.add("GIF bytes between blocks")


def _color_table_bytes(flags: int) -> int:
    return 3 << (flags % 8 + 1) if flags & 0x80 else 0


def _skip_gif_blocks(data: bytes, at: int, part: str, count: _Count) -> int:
    """The position after the blocks that start at a position. The last one is empty."""
    remaining = _BOUNDS[part] - count[part]
    blocks = 0
    while blocks <= remaining:
        blocks += 1
        size = data[at]
        at += size + 1
        if not size:
            break
    count.add(part, blocks)
    return at


def _check_tiff(data: bytes, count: _Count) -> None:
    order = "<" if data.startswith(b"II") else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    entry = struct.Struct(f"{order}HHQ8s" if big else f"{order}HHI4s")
    word, entries = (struct.Struct(order + each) for each in ("QQ" if big else "IH"))
    visited: set[int] = set()
    pending = [word.unpack_from(data, 8 if big else 4)[0]]
    while pending:
        at = pending.pop()
        if not at or at in visited:
            continue
        tags_at = at + entries.size
        tags = entries.unpack_from(data, at)[0] if tags_at <= len(data) else 0
        end = tags_at + tags * entry.size
        if end > len(data) and visited:
            continue  # the reader finds out that it cannot read this one
        if end > len(data):
            raise CorruptImage("the first directory of the TIFF lies outside the file")
        first = not visited
        visited.add(at)
        count.add("TIFF directories")
        count["TIFF tags of a directory"] = count["TIFF strips or tiles of a directory"] = 0
        count.add("TIFF tags of a directory", tags)
        count.add("TIFF tags", tags)
        layout: dict[int, tuple[int, ...]] = {}
        for tag, kind, values, field in entry.iter_unpack(data[tags_at:end]):
            if tag in _TIFF_SEGMENTS:
                count.add("TIFF strips or tiles of a directory", values)
                count.add("TIFF strips or tiles", values)
            size = values * _TIFF_BYTES.get(kind, 1)
            if not _check_tag(data, tag, size, field, word, count):
                if first and tag in _TIFF_LAYOUT:
                    raise CorruptImage(f"the value of tag {tag} of the TIFF lies outside the file")
                continue
            if tag in _TIFF_JPEG_LAYOUT:
                layout[tag] = _read_tag(data, kind, values, field, order, word)
            elif tag == _TIFF_SUBIFDS:
                pending += _read_tag(data, kind, values, field, order, word)
        if layout.get(_TIFF_COMPRESSION, (1,))[0] in _TIFF_JPEG:
            _check_tiff_scans(data, layout, count)
        if end + word.size <= len(data):
            pending += word.unpack_from(data, end)


def _check_tag(
    data: bytes, tag: int, size: int, field: bytes, word: struct.Struct, count: _Count
) -> bool:
    """Count the value of a tag, which lies elsewhere in the file if it does not fit into its field.

    Args:
        size: bytes of the value.
        word: an offset.

    Returns:
        Whether the value is in the file.
    """
    if size <= len(field):
        return True
    if word.unpack(field)[0] + size > len(data):
        return False
    if tag not in _TIFF_LAYOUT:
        count.add("TIFF bytes of metadata", size)
    return True


def _read_tag(
    data: bytes, kind: int, values: int, field: bytes, order: str, word: struct.Struct
) -> tuple[int, ...]:
    """The values of a tag whose place was checked; none if they are not unsigned integers."""
    if kind not in _TIFF_INTEGERS or values > _BOUNDS["TIFF strips or tiles of a directory"]:
        return (0,)
    numbers = struct.Struct(f"{order}{values}{_TIFF_INTEGERS[kind]}")
    if numbers.size <= len(field):
        return numbers.unpack_from(field) or (0,)
    return numbers.unpack_from(data, word.unpack(field)[0])


def _check_tiff_scans(data: bytes, layout: dict[int, tuple[int, ...]], count: _Count) -> None:
    """Count the scans of the JPEGs in strips or tiles.

    The marker of a scan does not occur within one (T.81, section B.1.1.5). Strips that overlap are
    read again each time, so their sizes are added up.
    """
    for offsets_tag, sizes_tag in ((273, 279), (324, 325)):
        offsets, sizes = layout.get(offsets_tag, ()), layout.get(sizes_tag, ())
        if len(offsets) == 1 and not sizes:  # libtiff guesses the size
            sizes = (len(data),)
        for offset, size in set(zip(offsets, sizes, strict=False)):
            end = min(offset + size, len(data))
            count["TIFF bytes of JPEG"] += max(0, end - offset)
            if count["TIFF bytes of JPEG"] > _OVERLAP * len(data):
                raise CorruptImage("the strips or tiles of the TIFF overlap")
            count["TIFF JPEG scans of a strip or tile"] = 0
            for start in range(offset, end, _SEARCHED_BYTES):
                stop = min(end, start + _SEARCHED_BYTES + 1)
                count.add("TIFF JPEG scans of a strip or tile", data.count(_SCAN, start, stop))


def _check_bmp(data: bytes, count: _Count) -> None:
    pixels_at, header, width, height = struct.unpack_from("<IIii", data, 10)
    if header < 40 or struct.unpack_from("<I", data, 30)[0] not in (1, 2):  # not RLE
        return
    pixels, rows = abs(width * height), abs(height)
    count.add("BMP pixels with RLE", pixels)
    if len(data) - pixels_at > 2 * (pixels + rows) + _RLE_SLACK:
        raise ImageTooLarge(f"the BMP has more bytes of RLE than {pixels} pixels need")


def _check_webp(data: bytes, count: _Count) -> None:
    if data[8:12] != b"WEBP":
        return
    at = 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        count.add("WebP chunks")
        if kind == b"VP8X":
            sides = [
                int.from_bytes(data[side_at : side_at + 3], "little") + 1
                for side_at in (at + 12, at + 15)
            ]
            for side in sides:
                count["WebP pixels of a side"] = 0
                count.add("WebP pixels of a side", side)
            if data[at + 8] & _WEBP_ANIMATED:
                count["WebP pixels of an animation"] = 0
                count.add("WebP pixels of an animation", math.prod(sides))
        elif kind not in _WEBP_PIXELS:
            count.add("WebP bytes of metadata", min(length, len(data) - at))
        at += 8 + length + length % 2


def _check_jpeg2000(data: bytes, count: _Count) -> None:
    start, at = 0, 0
    while not data.startswith(b"\xff\x4f\xff\x51", start):
        length, kind = struct.unpack_from(">I4s", data, at)
        start = at + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, start)
            start = at + 16
        count.add("JPEG 2000 boxes")
        if kind != b"jp2c":
            count.add("JPEG 2000 bytes of metadata", min(length, len(data) - at))
        at += length or len(data)
    right, bottom, _, _, width, height, left, top, components = struct.unpack_from(
        ">8IH", data, start + 8
    )
    count.add("JPEG 2000 components", components)
    if width and height:
        count.add("JPEG 2000 tiles", -(-(right - left) // width) * -(-(bottom - top) // height))
    _count_jpeg2000_layers(data, start + 2, count)


def _count_jpeg2000_layers(data: bytes, at: int, count: _Count) -> None:
    """Find the coding style (COD) among the segments before the first tile."""
    while data[at : at + 2] != b"\xff\x90":
        (length,) = struct.unpack_from(">H", data, at + 2)
        if data[at : at + 2] == b"\xff\x52":
            count.add("JPEG 2000 quality layers", struct.unpack_from(">H", data, at + 6)[0])
        count.add("JPEG 2000 bytes of metadata", max(length, 2))
        at += 2 + length


def _check_boxes(data: bytes, count: _Count) -> None:
    if data[4:8] == b"ftyp":
        _count_boxes(data, 0, len(data), count, 0)


def _count_boxes(data: bytes, at: int, end: int, count: _Count, depth: int) -> None:
    """Count the boxes of ISO/IEC 14496-12 from one position to another."""
    while at + 8 <= end:
        length, kind = struct.unpack_from(">I4s", data, at)
        body = at + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, body)
            body += 8
        stop = min(at + length if length else end, end)
        count.add("AVIF or HEIC boxes")
        if kind != b"mdat" and not depth:
            count.add("AVIF or HEIC bytes of metadata", stop - at)
        if kind in _COUNTS:
            _count_entries(data, body, kind, count)
        elif kind in _CONTAINERS and depth < _BOX_DEPTH:
            _count_boxes(data, body + _CONTAINERS[kind], stop, count, depth + 1)
        if stop <= at:
            return
        at = stop


def _count_entries(data: bytes, body: int, kind: bytes, count: _Count) -> None:
    name, offset, number = _COUNTS[kind]
    long = {b"iinf": 1, b"iloc": 2}.get(kind)
    if long is not None and data[body] >= long:
        number = ">I"
    part = f"AVIF or HEIC {name}"
    count[part] = 0  # of each list
    count.add(part, struct.unpack_from(number, data, body + offset)[0])


_CHECKS: tuple[tuple[bytes | tuple[bytes, ...], Callable[[bytes, _Count], None]], ...] = (
    (b"\xff\xd8", _check_jpeg),
    (b"\x89PNG\r\n\x1a\n", _check_png),
    ((b"GIF87a", b"GIF89a"), _check_gif),
    ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), _check_tiff),
    (b"BM", _check_bmp),
    (b"RIFF", _check_webp),
    ((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n"), _check_jpeg2000),
    (b"\0", _check_boxes),
)
