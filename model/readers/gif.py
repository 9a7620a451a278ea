"""GIF files -> the pixels of their first frame, by Pillow. Source: GIF89a."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from model.arrays import AnyArray, Shape
from model.pixels import to_array
from model.readers.base import ImageReader, count_channels

_EXTENSION, _FRAME = 0x21, 0x2C


class GifReader(ImageReader):
    """A GIF. Viewers leave transparent what its first frame does not cover; so it is black."""

    format = "GIF"

    def __init__(self, data: bytes) -> None:
        self._image = Image.open(io.BytesIO(data), formats=("GIF",))
        self.width, self.height = self._image.size
        self.channels = count_channels(self._image)
        self.pages = max(1, _count_frames(data))

    def read(self, at_least: Shape | None = None) -> AnyArray:
        # Where the first frame lies on the canvas.
        left, top, right, bottom = self._image.tile[0].extents or (0, 0, self.width, self.height)
        pixels = to_array(self._image)
        if pixels[top:bottom, left:right].size == pixels.size:
            return pixels
        canvas = np.zeros_like(pixels)
        canvas[top:bottom, left:right] = pixels[top:bottom, left:right]
        return canvas


def _count_frames(data: bytes) -> int:
    """Count the frames of which at least the header is there, without decoding any."""
    frames, at = 0, 13 + _color_table_bytes(data[10])
    try:
        while True:
            block, at = data[at], at + 1
            if block == _EXTENSION:
                at = _skip_blocks(data, at + 1)
            elif block == _FRAME:
                flags = data[at + 8]
                frames += 1
                at = _skip_blocks(data, at + 10 + _color_table_bytes(flags))
            else:
                return frames
    except IndexError:  # no trailer
        return frames


def _skip_blocks(data: bytes, at: int) -> int:
    while size := data[at]:
        at += size + 1
    return at + 1


def _color_table_bytes(flags: int) -> int:
    return 3 << (flags % 8 + 1) if flags & 0x80 else 0
