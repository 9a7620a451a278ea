"""Directories and tags of a TIFF or BigTIFF, and the JPEGs in it.

Source: TIFF 6.0, section 2; BigTIFF (libtiff, "BigTIFF Design"). Knows no decoder and no HTTP.

| part | bound |
|---|---|
| directories, with SubIFDs | 10,000 |
| tags of a directory | 1,024 |
| tags | 262,144 |
| strips or tiles of a directory | 131,072 |
| strips or tiles | 524,288 |
| JPEG scans of a strip or tile | 64 |
| bytes of metadata | 64 MiB |
| bytes of strips or tiles that are JPEGs | twice those of the file |
"""

from __future__ import annotations

import struct

from app.errors import CorruptImage
from app.imaging.structure.counter import SEARCHED_BYTES, PartCounter

_BOUNDS = {
    "directories": 10_000,
    "tags of a directory": 1024,
    "tags": 262_144,
    "strips or tiles of a directory": 131_072,
    "strips or tiles": 524_288,
    "JPEG scans of a strip or tile": 64,
    "bytes of metadata": 64 << 20,
}
_MAX_OVERLAP = 2
"""Largest ratio of the bytes of all strips or tiles to those of the file, for JPEGs."""

_COMPRESSION, _SUBIFDS = 259, 330
_STRIP_OFFSETS, _STRIP_SIZES, _TILE_OFFSETS, _TILE_SIZES = 273, 279, 324, 325
_SEGMENT_TAGS = ((_STRIP_OFFSETS, _STRIP_SIZES), (_TILE_OFFSETS, _TILE_SIZES))
_JPEG_TAGS = (_COMPRESSION, _STRIP_OFFSETS, _STRIP_SIZES, _TILE_OFFSETS, _TILE_SIZES)
"""Tags that say where JPEGs are."""
_LAYOUT_TAGS = frozenset(
    {*(256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 320, 322, 323, 324, 325, 338, 339)}
)
"""Tags without which pixels cannot be read; the values of the others are metadata."""
_JPEG = (6, 7)
"""Values of Compression."""
_SCAN = b"\xff\xda"
"""The marker of a scan. It does not occur within one (T.81, section B.1.1.5)."""

_VALUE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_VALUE_BYTES |= {16: 8, 17: 8, 18: 8}
"""Type of a tag -> size of a value."""
_UNSIGNED = {3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
"""Type of a tag -> format of `struct`, for the types of unsigned integers."""


def check_tiff_parts(data: bytes) -> None:
    """Count directories, tags, strips and tiles, and the scans of JPEGs in them.

    Raises:
        ImageTooLarge: a bound is exceeded.
        CorruptImage: the first directory, or a tag of it that pixels need, points outside the file;
            or strips or tiles of JPEGs overlap.
        struct.error: the file is truncated.
    """
    _Walk(data).check_directories()


class _Walk:
    """A walk through the directories of one TIFF."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._order = "<" if data.startswith(b"II") else ">"
        big = data[2:4] in (b"+\0", b"\0+")
        self._entry = struct.Struct(f"{self._order}HHQ8s" if big else f"{self._order}HHI4s")
        self._offset = struct.Struct(f"{self._order}{'Q' if big else 'I'}")
        self._entries = struct.Struct(f"{self._order}{'Q' if big else 'H'}")
        self._count = PartCounter("TIFF", _BOUNDS)
        self._jpeg_bytes = 0
        self._pending = [self._offset.unpack_from(data, 8 if big else 4)[0]]

    def check_directories(self) -> None:
        """Check each directory once, with those in SubIFDs."""
        size = len(self._data)
        visited: set[int] = set()
        while self._pending:
            at = self._pending.pop()
            if not at or at in visited:
                continue
            tags_at = at + self._entries.size
            tags = self._entries.unpack_from(self._data, at)[0] if tags_at <= size else 0
            end = tags_at + tags * self._entry.size
            if end > size and visited:
                continue  # the reader finds out that it cannot read this one
            if end > size:
                raise CorruptImage("the first directory of the TIFF lies outside the file")
            self._count.add("directories")
            self._count.set("tags of a directory", tags)
            self._count.add("tags", tags)
            is_first = not visited
            visited.add(at)
            self._check_tags(tags_at, end, is_first=is_first)
            if end + self._offset.size <= size:
                self._pending += self._offset.unpack_from(self._data, end)

    def _check_tags(self, start: int, end: int, *, is_first: bool) -> None:
        """Check the tags of a directory, which lie between two positions."""
        self._count.set("strips or tiles of a directory", 0)
        jpeg: dict[int, tuple[int, ...]] = {}
        for tag, kind, values, field in self._entry.iter_unpack(self._data[start:end]):
            if tag in (_STRIP_OFFSETS, _TILE_OFFSETS):  # they have one value per strip or tile
                self._count.add("strips or tiles of a directory", values)
                self._count.add("strips or tiles", values)
            if not self._check_place(tag, values * _VALUE_BYTES.get(kind, 1), field):
                if is_first and tag in _LAYOUT_TAGS:
                    raise CorruptImage(f"the value of tag {tag} of the TIFF lies outside the file")
                continue
            if tag in _JPEG_TAGS:
                jpeg[tag] = self._read_integers(kind, values, field)
            elif tag == _SUBIFDS:
                self._pending += self._read_integers(kind, values, field)
        if jpeg.get(_COMPRESSION, (1,))[0] in _JPEG:
            self._check_scans(jpeg)

    def _check_place(self, tag: int, size: int, field: bytes) -> bool:
        """Return whether the value of a tag is in the file, and count it if it is metadata.

        Args:
            size: bytes of the value.
            field: holds the value if it fits, or its offset in the file.
        """
        if size <= len(field):
            return True
        if self._offset.unpack(field)[0] + size > len(self._data):
            return False
        if tag not in _LAYOUT_TAGS:
            self._count.add("bytes of metadata", size)
        return True

    def _read_integers(self, kind: int, values: int, field: bytes) -> tuple[int, ...]:
        """Read the values of a tag that is in the file; (0,) if they are not unsigned integers."""
        if kind not in _UNSIGNED or values > _BOUNDS["strips or tiles of a directory"]:
            return (0,)
        numbers = struct.Struct(f"{self._order}{values}{_UNSIGNED[kind]}")
        if numbers.size <= len(field):
            return numbers.unpack_from(field) or (0,)
        return numbers.unpack_from(self._data, self._offset.unpack(field)[0])

    def _check_scans(self, jpeg: dict[int, tuple[int, ...]]) -> None:
        """Count the scans of the JPEGs in strips or tiles.

        Strips that overlap are read again each time, so their sizes are added up.

        Args:
            jpeg: values of `_JPEG_TAGS`.
        """
        size = len(self._data)
        for offsets_tag, sizes_tag in _SEGMENT_TAGS:
            offsets, sizes = jpeg.get(offsets_tag, ()), jpeg.get(sizes_tag, ())
            if len(offsets) == 1 and not sizes:  # libtiff guesses the size
                sizes = (size,)
            for start, length in set(zip(offsets, sizes, strict=False)):
                end = min(start + length, size)
                self._jpeg_bytes += max(0, end - start)
                if self._jpeg_bytes > _MAX_OVERLAP * size:
                    raise CorruptImage("the strips or tiles of the TIFF overlap")
                self._count.set("JPEG scans of a strip or tile", 0)
                for at in range(start, end, SEARCHED_BYTES):
                    stop = min(end, at + SEARCHED_BYTES + 1)
                    scans = self._data.count(_SCAN, at, stop)
                    self._count.add("JPEG scans of a strip or tile", scans)
