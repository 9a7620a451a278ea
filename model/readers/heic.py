"""HEIC files -> the pixels of their main image, by pillow-heif, which is an extra.

Source: ISO/IEC 23008-12.
"""

from __future__ import annotations

import numpy as np

from model.arrays import AnyArray, Shape
from model.readers.base import ImageReader, UnsupportedKind, check_tail, drop_alpha


class HeicReader(ImageReader):
    """A HEIC. Its rotation is applied by libheif; EXIF repeats it and does not count.

    Raises:
        UnsupportedKind: pillow-heif is not installed.
        ValueError: damaged or truncated.
    """

    format = "HEIC"

    def __init__(self, data: bytes) -> None:
        try:
            import pillow_heif
        except ImportError:
            raise UnsupportedKind(
                "HEIC (without the extra `heic`: pip install 'unet-server[heic]')"
            ) from None
        pillow_heif.options.DECODE_THREADS = 1  # the caller decodes several images at once
        check_tail(data, "HEIC")
        file = pillow_heif.open_heif(data, convert_hdr_to_8bit=False)
        self._image = file[file.primary_index]
        self.channels = 1 if self._image.mode.startswith("L") else 3
        self.width, self.height = self._image.size

    def read(self, at_least: Shape | None = None) -> AnyArray:
        return drop_alpha(np.asarray(self._image))
