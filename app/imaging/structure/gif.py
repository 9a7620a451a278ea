"""Frames and blocks of a GIF (GIF89a, sections 15 to 27). Knows no decoder and no HTTP.

| part | bound |
|---|---|
| frames | 10,000 |
| blocks of pixels | 1,000,000 |
| blocks of comments | 1,024: Pillow joins them, in quadratic time |
| blocks of other extensions | 65,536 |
| bytes between blocks | 65,536 |
"""

from __future__ import annotations

from app.imaging.structure.counter import PartCounter

_BOUNDS = {
    "frames": 10_000,
    "blocks of pixels": 1_000_000,
    "blocks of comments": 1024,
    "blocks of other extensions": 65_536,
    "bytes between blocks": 65_536,
}
_EXTENSION, _IMAGE, _TRAILER = 0x21, 0x2C, 0x3B
_COMMENT = 0xFE
"""Kind of an extension."""


def check_gif_parts(data: bytes) -> None:
    """Count the frames and blocks up to the trailer.

    Raises:
        ImageTooLarge: a bound is exceeded.
        IndexError: the file is truncated.
    """
    count = PartCounter("GIF", _BOUNDS)
    at = 13 + _count_color_bytes(data[10])
    while True:
        introducer, at = data[at], at + 1
        if introducer == _TRAILER:
            return
        if introducer == _EXTENSION:
            part = "comments" if data[at] == _COMMENT else "other extensions"
            at = _skip_blocks(data, at + 1, f"blocks of {part}", count)
        elif introducer == _IMAGE:
            count.add("frames")
            at += 9 + _count_color_bytes(data[at + 8]) + 1  # and the size of a code
            at = _skip_blocks(data, at, "blocks of pixels", count)
        else:
            count.add("bytes between blocks")


def _count_color_bytes(flags: int) -> int:
    """Return the bytes of the color table that these flags announce."""
    return 3 << (flags % 8 + 1) if flags & 0x80 else 0


def _skip_blocks(data: bytes, at: int, part: str, count: PartCounter) -> int:
    """Return the position after the blocks that start at a position. The last one is empty."""
    remaining = count.remaining(part)
    blocks = 0
    while blocks <= remaining:
        blocks += 1
        size = data[at]
        at += size + 1
        if not size:
            break
    count.add(part, blocks)
    return at
