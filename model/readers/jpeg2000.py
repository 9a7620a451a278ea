"""JPEG 2000 files, JP2 and bare codestreams -> pixels, by OpenJPEG in imagecodecs.

OpenJPEG takes missing data for a lower quality, so this module checks that every part of every
tile is there. Source: ITU-T T.800, annexes A and I.
"""

from __future__ import annotations

import struct

import numpy as np

from model.arrays import AnyArray, Shape
from model.pixels import spread
from model.readers.base import (
    DamagedImage,
    ImageReader,
    MissingPixels,
    UnsupportedKind,
    check_tail,
    drop_alpha,
    scale_to_bits,
)

_CODESTREAM = b"\xff\x4f\xff\x51"
"""SOC and SIZ, the first markers of a codestream."""
_SOT, _EOC = b"\xff\x90", b"\xff\xd9"
_MAX_DEPTH = 16


class Jpeg2000Reader(ImageReader):
    """A JPEG 2000.

    Raises:
        UnsupportedKind: more than 4 components.
        ValueError: damaged.
    """

    format = "JPEG2000"

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._start, self._end = find_codestream(data)
        size = CodestreamSize(data, self._start)
        self.width, self.height = size.width, size.height
        self._tiles, self._depths = size.tiles, size.depths
        if len(self._depths) not in (1, 2, 3, 4):
            raise UnsupportedKind(f"a JPEG 2000 of {len(self._depths)} components")
        self.channels = 1 if len(self._depths) <= 2 else 3
        if size.subsampling != (1, 1):
            raise UnsupportedKind("a JPEG 2000 whose first component is subsampled")

    def read(self, at_least: Shape | None = None) -> AnyArray:
        import imagecodecs

        self._check_complete()
        values: AnyArray = imagecodecs.jpeg2k_decode(self._data, numthreads=1)
        bits, signed = self._depths[0]
        if values.dtype.kind == "i" and signed and bits <= _MAX_DEPTH:
            values = (values.astype(np.int32) + (1 << (bits - 1))).astype(np.uint16)
        if bits > _MAX_DEPTH:
            values = spread(values)
        elif len(set(self._depths)) == 1 and values.ndim <= 3:
            values = scale_to_bits(values, bits)
        return drop_alpha(values)

    def _check_complete(self) -> None:
        """Walk over the parts of tiles (T.800, A.4.2).

        Raises:
            ValueError: parts are missing or cut off.
        """
        data = self._data
        at = data.find(_SOT, self._start, self._end)
        complete: set[int] = set()
        while at >= 0 and data[at : at + 2] == _SOT and at + 12 <= self._end:
            tile, length = struct.unpack_from(">HI", data, at + 4)
            end = at + length if length else self._end - len(_EOC)  # 0: up to the end
            if end > self._end or end <= at:
                break
            complete.add(tile)
            at = end
        if len(complete) < self._tiles or data[at : at + 2] != _EOC:
            raise MissingPixels(
                f"the JPEG 2000 is truncated: {min(len(complete), self._tiles)} of its "
                f"{self._tiles} tiles are there as a whole"
                + ("" if len(complete) < self._tiles else ", without the end of the codestream")
            )
        check_tail(memoryview(data)[self._start : at], "JPEG 2000")


class CodestreamSize:
    """The SIZ segment of a codestream (T.800, A.5.1).

    Attributes:
        width, height: of the image, in pixels.
        tiles: how many the image has.
        depths: (bits, whether signed) of each component.
        subsampling: (horizontal, vertical) of the first component.

    Raises:
        DamagedImage: sizes that are impossible, or are not in the file.
    """

    def __init__(self, data: bytes, start: int) -> None:
        if len(data) < start + 45:
            raise DamagedImage("the header of the JPEG 2000 is incomplete")
        fields = struct.unpack_from(">8IH", data, start + 8)
        right, bottom, left, top, tile_width, tile_height, tile_left, tile_top, count = fields
        self.width, self.height = right - left, bottom - top
        if min(self.width, self.height, tile_width, tile_height) <= 0:
            raise DamagedImage("the size of the JPEG 2000 is invalid")
        columns = -(-(right - tile_left) // tile_width)
        rows = -(-(bottom - tile_top) // tile_height)
        self.tiles = columns * rows
        components = data[start + 42 : start + 42 + 3 * count : 3]
        self.subsampling = (data[start + 43], data[start + 44])
        self.depths = [((depth & 0x7F) + 1, bool(depth & 0x80)) for depth in components]


def find_codestream(data: bytes) -> tuple[int, int]:
    """Find where the codestream begins and ends, in a JP2 (T.800, I.5) or alone.

    Raises:
        DamagedImage: there is none.
    """
    if data.startswith(_CODESTREAM):
        return 0, len(data)
    at = 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = at + 8
        if length == 1 and at + 16 <= len(data):
            (length,) = struct.unpack_from(">Q", data, at + 8)
            body = at + 16
        end = at + length if length else len(data)
        if kind == b"jp2c" and data.startswith(_CODESTREAM, body):
            return body, min(end, len(data))
        if end <= at:
            break
        at = end
    raise DamagedImage("the JPEG 2000 has no codestream")
