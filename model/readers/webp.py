"""WebP files -> the pixels of their first frame, by libwebp in Pillow.

The chunks of pixels alone reach the decoder, so that metadata of any size or damage, and a wrong
size of the file in its header, cost nothing. Source: RFC 9649.
"""

from __future__ import annotations

import io
import struct

from PIL import Image

from model.arrays import AnyArray, Shape
from model.pixels import to_array
from model.readers.base import ImageReader, MissingPixels, check_tail, read_orientation

_PIXELS = (b"VP8 ", b"VP8L")
_ALPHA, _ANIMATION = 0x10, 0x02
"""Flags of a VP8X chunk."""


class WebpReader(ImageReader):
    """A WebP.

    Raises:
        OSError, ValueError: damaged or truncated.
    """

    format = "WEBP"

    def __init__(self, data: bytes) -> None:
        chunks = dict[bytes, bytes]()
        frames = at = 0
        while 12 + at + 8 <= len(data):
            kind, length = struct.unpack_from("<4sI", data, 12 + at)
            body = data[20 + at : 20 + at + length]
            at += 8 + length + length % 2
            if kind in (*_PIXELS, b"ALPH", b"ANMF"):
                if len(body) < length:
                    raise MissingPixels(
                        f"the WebP is truncated: {len(body)} of {length} bytes of pixels are there"
                    )
                frames += kind == b"ANMF"
            chunks.setdefault(kind, body)
        self.pages = max(1, frames)
        self._check_tails(chunks)
        self._image = Image.open(io.BytesIO(_assemble(chunks)), formats=("WEBP",))
        self.width, self.height = self._image.size
        self.orientation = read_orientation(chunks.get(b"EXIF", b""), chunks.get(b"XMP ", b""))

    def read(self, at_least: Shape | None = None) -> AnyArray:
        return to_array(self._image)

    def _check_tails(self, chunks: dict[bytes, bytes]) -> None:
        for kind in (*_PIXELS, b"ANMF"):
            check_tail(chunks.get(kind, b""), "WebP")


def _assemble(chunks: dict[bytes, bytes]) -> bytes:
    """Write a WebP of the chunks that the pixels of the first frame depend on."""
    parts = []
    for kind in (b"VP8X", b"ANIM", b"ANMF", b"ALPH", *_PIXELS):
        if kind in chunks:
            body = chunks[kind]
            if kind == b"VP8X":
                body = bytes([body[0] & (_ALPHA | _ANIMATION)]) + body[1:]
            parts.append(struct.pack("<4sI", kind, len(body)) + body + bytes(len(body) % 2))
    content = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(content)) + content
