"""AVIF files -> the pixels of their first frame, by libavif in Pillow.

Pillow reads 10 and 12 bits at 8, so imagecodecs decodes still images of that kind. Source: AVIF
1.1.0, and AV1 Codec ISO Media File Format Binding 1.2.0, section 2.3.3 (av1C).
"""

from __future__ import annotations

import io

import numpy as np
from PIL import AvifImagePlugin, Image

from model.arrays import AnyArray, Shape
from model.pixels import to_array
from model.readers.base import (
    ImageReader,
    check_tail,
    count_channels,
    drop_alpha,
    read_orientation,
    scale_to_bits,
)

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the caller decodes several images at once

_HIGH_BITDEPTH, _TWELVE_BIT = 0x40, 0x20


class AvifReader(ImageReader):
    """An AVIF.

    Raises:
        OSError, SyntaxError, ValueError: damaged or truncated.
    """

    format = "AVIF"

    def __init__(self, data: bytes) -> None:
        self._data = data
        check_tail(data, "AVIF")
        self._image = Image.open(io.BytesIO(data), formats=("AVIF",))
        self.width, self.height = self._image.size
        self.channels = count_channels(self._image)
        self.pages = getattr(self._image, "n_frames", 1)
        # Pillow describes the rotation of the container as EXIF does.
        self.orientation = read_orientation(self._image.info.get("exif", b""))

    def read(self, at_least: Shape | None = None) -> AnyArray:
        bits = self._bits()
        if bits == 8 or self.pages > 1:  # imagecodecs decodes all frames
            return to_array(self._image)
        import imagecodecs

        values: AnyArray = imagecodecs.avif_decode(self._data, numthreads=1)
        deep = values.dtype != np.uint8
        return drop_alpha(scale_to_bits(values, bits) if deep else values)

    def _bits(self) -> int:
        """Bits of a sample, from the first configuration of AV1."""
        at = self._data.find(b"av1C")
        flags = self._data[at + 6] if at >= 0 and at + 6 < len(self._data) else 0
        if not flags & _HIGH_BITDEPTH:
            return 8
        return 12 if flags & _TWELVE_BIT else 10
