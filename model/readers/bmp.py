"""BMP files of every header -> pixels. RLE is decoded by Pillow, everything else here.

An alpha channel that is zero everywhere is opaque, as viewers have it: many programs leave it
empty. Source: BITMAPFILEHEADER to BITMAPV5HEADER of the Windows SDK; OS/2 Presentation Manager
Programming Reference, volume 3.
"""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image

from model.arrays import AnyArray, Shape
from model.pixels import lay_on_black, map_rows, to_array
from model.readers.base import DamagedImage, ImageReader, MissingPixels, UnsupportedKind

_CORE = 12
_OS2 = (16, 64)
"""Sizes of headers of OS/2, where compressions 3 and 4 mean something else."""
_RGB, _RLE8, _RLE4, _BITFIELDS, _JPEG, _PNG, _ALPHA_BITFIELDS = range(7)
_BY_NAME = {_JPEG: "a BMP with JPEG inside", _PNG: "a BMP with PNG inside"}
_FILE_HEADER = 14
_USUAL_MASKS = {16: (0x7C00, 0x3E0, 0x1F, 0), 32: (0xFF0000, 0xFF00, 0xFF, 0)}
_DEPTHS = (1, 2, 4, 8, 16, 24, 32)


class BmpReader(ImageReader):
    """A BMP.

    Raises:
        UnsupportedKind: JPEG or PNG inside, a compression of OS/2 alone, or 64 bits per pixel.
        DamagedImage: the header is damaged or incomplete.
    """

    format = "BMP"

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._pixels_at, self._header = self._unpack("<II", 10)
        self._compression, self._colors = _RGB, 0
        if self._header == _CORE:
            self.width, self.height, _, self._bits = self._unpack("<HHHH", 18)
            self._bottom_up = True
        else:
            self.width, height, _, self._bits = self._unpack("<iiHH", 18)
            self.height, self._bottom_up = abs(height), height > 0
            if self._header >= 40:
                self._compression, *_, self._colors = self._unpack("<I12xI", 30)
        if self.width <= 0 or self.height <= 0:
            raise DamagedImage(f"the BMP has {self.width} x {self.height} pixels")
        self._check_kind()
        self._palette = self._read_palette() if self._bits <= 8 else None
        if self._palette is not None and (self._palette == self._palette[:, :1]).all():
            self.channels = 1

    def read(self, at_least: Shape | None = None) -> AnyArray:
        if self._compression in (_RLE8, _RLE4):
            with Image.open(io.BytesIO(self._data), formats=("BMP",)) as image:
                return to_array(image)
        if self._bits <= 8:
            return self._read_indices()
        if self._bits == 24:
            return self._read_colors()
        return self._read_fields()

    def _unpack(self, fields: str, at: int) -> tuple[int, ...]:
        """Read fields of the headers, which `struct` describes.

        Raises:
            DamagedImage: the file ends before they do.
        """
        try:
            return struct.unpack_from(fields, self._data, at)
        except struct.error:
            raise DamagedImage("the header of the BMP is incomplete") from None

    def _check_kind(self) -> None:
        if self._compression in _BY_NAME and self._header not in _OS2:
            raise UnsupportedKind(_BY_NAME[self._compression])
        if self._header in _OS2 and self._compression > _RLE4:
            raise UnsupportedKind("a BMP with a compression of OS/2")
        if self._compression > _ALPHA_BITFIELDS:
            raise UnsupportedKind(f"a BMP with the compression {self._compression}")
        if self._bits not in _DEPTHS:
            raise UnsupportedKind(f"a BMP of {self._bits} bits per pixel")

    def _read_body(self) -> tuple[bytes, int]:
        """The rows as they are stored, and the bytes of one with its padding.

        Raises:
            MissingPixels: rows are missing.
        """
        row_bytes = -(-self.width * self._bits // 8)
        stride = -(-row_bytes // 4) * 4
        needed = stride * (self.height - 1) + row_bytes
        body = self._data[self._pixels_at : self._pixels_at + stride * self.height]
        if len(body) < needed:
            rows = len(body) // stride
            raise MissingPixels(f"the BMP is truncated: {rows} of its {self.height} rows are there")
        return body.ljust(stride * self.height, b"\0"), stride  # the last row may lack its padding

    def _read_rows(self, kind: np.dtype[np.generic]) -> AnyArray:
        """The stored values, the top row first: (H, values of a row with its padding)."""
        body, _ = self._read_body()
        values = np.frombuffer(body, kind).reshape(self.height, -1)
        return values[::-1] if self._bottom_up else values

    def _read_colors(self) -> AnyArray:
        """(H, W, 3) of 24 bits per pixel."""
        body, stride = self._read_body()
        size, order = (self.width, self.height), -1 if self._bottom_up else 1
        return np.asarray(Image.frombytes("RGB", size, body, "raw", "BGR", stride, order))

    def _read_indices(self) -> AnyArray:
        """(H, W) if all colors are grey, otherwise (H, W, 3)."""
        row_bytes = -(-self.width * self._bits // 8)
        indices = self._read_rows(np.dtype(np.uint8))[:, :row_bytes]
        if self._bits < 8:
            shifts = np.arange(8 - self._bits, -1, -self._bits, dtype=np.uint8)
            indices = (indices[:, :, None] >> shifts) & ((1 << self._bits) - 1)
            indices = indices.reshape(self.height, -1)[:, : self.width]
        assert self._palette is not None
        return (self._palette[:, 0] if self.channels == 1 else self._palette)[indices]

    def _read_palette(self) -> AnyArray:
        """(256, 3) RGB; black where the file has no color."""
        size = 3 if self._header == _CORE else 4
        start = _FILE_HEADER + self._header + (12 if self._has_masks_after_header() else 0)
        count = min(self._colors or 1 << self._bits, 1 << self._bits)
        if self._pixels_at > start:
            count = min(count, (self._pixels_at - start) // size)
        stored = self._data[start : start + size * count]
        colors = np.frombuffer(stored[: len(stored) // size * size], np.uint8).reshape(-1, size)
        palette = np.zeros((256, 3), np.uint8)
        palette[: len(colors)] = colors[:, 2::-1]
        return palette

    def _has_masks_after_header(self) -> bool:
        return self._header == 40 and self._compression in (_BITFIELDS, _ALPHA_BITFIELDS)

    def _read_masks(self) -> tuple[int, ...]:
        """The bits of red, green, blue and alpha in a pixel; 0 for none."""
        if self._compression not in (_BITFIELDS, _ALPHA_BITFIELDS):
            return _USUAL_MASKS[self._bits]
        has_alpha = self._header >= 56 or self._compression == _ALPHA_BITFIELDS
        masks = self._unpack("<4I" if has_alpha else "<3I", _FILE_HEADER + 40)
        return (*masks, 0)[:4]

    def _read_fields(self) -> AnyArray:
        """(H, W, 3), uint16 if a color has more than 8 bits."""
        pixels = self._read_rows(np.dtype("<u2" if self._bits == 16 else "<u4"))
        pixels = pixels[:, : self.width]
        *colors, alpha = self._read_masks()
        deep = any(mask.bit_count() > 8 for mask in colors)
        kind = np.dtype(np.uint16) if deep else np.dtype(np.uint8)
        values = np.empty((self.height, self.width, 3), kind)
        for channel, mask in enumerate(colors):
            values[:, :, channel] = _read_field(pixels, mask, kind)
        opacity = _read_field(pixels, alpha, kind)
        return lay_on_black(values, opacity[:, :, None]) if opacity.any() else values


def _read_field(
    pixels: AnyArray, mask: int, kind: np.dtype[np.uint8] | np.dtype[np.uint16]
) -> AnyArray:
    """Scale the bits of a mask to the range of a type; zeros for an empty mask."""
    if not mask:
        return np.zeros(pixels.shape, kind)
    shift, full = (mask & -mask).bit_length() - 1, np.iinfo(kind).max
    top = mask >> shift

    def scale(rows: AnyArray) -> AnyArray:
        # Rounded down, as Pillow does it.
        return ((rows.astype(np.uint64) & np.uint64(mask)) >> np.uint64(shift)) * full // top

    return map_rows(scale, kind.type, pixels)
