"""Arrays -> WebP bytes, by Pillow. Knows no HTTP."""

from __future__ import annotations

import io

from PIL import Image

from model.arrays import ByteArray

MAX_SIDE = 16383
"""Pixels, of the format (RFC 9649, section 2.5)."""
_QUALITY = 90
_METHOD = 2
"""0 to 6, from fast to small."""


def encode_webp(image: ByteArray) -> bytes:
    """Encode (H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA. Colours are lossy, opacity is exact."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", quality=_QUALITY, method=_METHOD, exact=False)
    return buffer.getvalue()
