"""JPEG files -> pixels, with libjpeg's own warnings about damage taken as errors.

The segments of pixels alone reach the decoder, so that EXIF, color profiles and comments of any
size or damage cost nothing. libjpeg-turbo decodes, by three libraries:

| kind | library | how missing pixels are noticed |
|---|---|---|
| 8 bits, usual subsampling | simplejpeg | libjpeg warns |
| 8 bits, arithmetic coding | simplejpeg | see `_is_complete` |
| 8 bits, other subsampling | Pillow | see `_is_complete` |
| 9 to 16 bits, and lossless | imagecodecs | see `_is_complete` |

Source: ITU-T T.81, annex B; JFIF 1.02; Adobe Technical Note 5116.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable

import numpy as np
from PIL import Image

from model.arrays import AnyArray, Shape
from model.readers.base import (
    DamagedImage,
    ImageReader,
    MissingPixels,
    UnsupportedKind,
    read_orientation,
    scale_to_bits,
)

_FILL = re.compile(rb"\xff+")
_END_OF_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""In a scan, 0xFF is followed by 0 or by the number of a restart marker."""
_STANDALONE = frozenset({0x00, 0x01, *range(0xD0, 0xDA)})
"""Markers without a length; 0 is an escaped 0xFF."""
_EOI, _SOS, _APP1, _APP0, _APP14 = 0xD9, 0xDA, 0xE1, 0xE0, 0xEE
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE, _LOSSLESS = (0xC2, 0xCA), 0xC3
_ARITHMETIC = (0xC9, 0xCA)
_NO_BIT = 15
_HIERARCHICAL = frozenset({0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF})
_JPEG_LS = 0xF7
_TABLES = frozenset({0xC4, 0xCC, 0xDB, 0xDC, 0xDD})
"""Huffman and arithmetic tables, quantization tables, number of lines, restart interval."""
_ADOBE = b"Adobe"
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"

_LEFT_OVER = "extraneous bytes before marker 0xd9"
"""libjpeg's warning about bytes between the last pixel and the end of the image."""
_DAMAGE = "Corrupt JPEG data: "
"""Beginning of libjpeg's warnings about damaged pixels."""
_ENDS_EARLY = "premature end of data segment"
_OTHER_SUBSAMPLING = "subsampling"
_FILLER = b"\x55" * 64
_SLACK = 16
"""Bytes that may be left over after the last pixel: cameras write one or two."""

_Decoder = Callable[[bytes], AnyArray]


class JpegReader(ImageReader):
    """A JPEG, or the first image of an MPO.

    Raises:
        UnsupportedKind: JPEG-LS, hierarchical, or a number of channels that is not read.
        ValueError: damaged.
    """

    format = "JPEG"

    def __init__(self, data: bytes) -> None:
        self._frame = 0
        self._segments: list[bytes | memoryview] = [b"\xff\xd8"]
        self._scan = memoryview(b"")
        self._components: set[int] = set()
        self._precision: dict[int, list[int]] = {}  # component: lowest bit of each coefficient
        self._inverted = False
        self._exif, self._xmp = b"", b""
        self._read_segments(memoryview(data))
        if not self._frame:
            raise DamagedImage("the JPEG has no frame header")
        if not self.height:
            raise UnsupportedKind("a JPEG whose height follows its pixels")
        if len(self._components) not in (1, 3, 4):
            raise UnsupportedKind(f"a JPEG of {len(self._components)} channels")
        self.channels = 1 if len(self._components) == 1 else 3
        self.orientation = read_orientation(self._exif, self._xmp)

    def read(self, at_least: Shape | None = None) -> AnyArray:
        self._check_scans()
        if self._bits != 8 or self._frame == _LOSSLESS:
            return self._read_deep()
        scale = 1 if at_least is None else self._choose_scale(at_least)
        pixels = self._read_bytes(scale)
        if len(self._components) == 4:
            if self._inverted:
                pixels = ~pixels
            return np.asarray(Image.fromarray(pixels, "CMYK").convert("RGB"))
        return pixels

    def _read_segments(self, view: memoryview) -> None:
        """Keep what pixels depend on, up to the end of the first image."""
        data, at = view.obj, 2
        assert isinstance(data, bytes)
        while fill := _FILL.search(data, at):
            marker = data[fill.end()] if fill.end() < len(data) else _EOI
            at = fill.end() + 1
            if marker == _EOI and self._precision:
                return
            if marker in _STANDALONE or at + 2 > len(data):
                continue
            length = max(int.from_bytes(view[at : at + 2], "big"), 2)
            body = view[at + 2 : at + length]
            at += length
            if marker in _FRAMES or marker == _JPEG_LS:
                self._read_frame(marker, body)
            elif marker in _TABLES:
                self._add(marker, body)
            elif marker == _SOS:
                self._add(marker, body)
                self._note_scan(body)
                end = _END_OF_SCAN.search(data, at)
                self._scan = view[at : end.start() if end else len(data)]
                self._segments.append(self._scan)
                at += len(self._scan)
            else:
                self._read_metadata(marker, bytes(body))

    def _add(self, marker: int, body: bytes | memoryview) -> None:
        self._segments += [struct.pack(">BBH", 0xFF, marker, len(body) + 2), body]

    def _read_frame(self, marker: int, body: memoryview) -> None:
        if marker == _JPEG_LS:
            raise UnsupportedKind("JPEG-LS")
        if marker in _HIERARCHICAL:
            raise UnsupportedKind("a hierarchical JPEG")
        if self._frame or len(body) < 6:
            raise DamagedImage("the frame header of the JPEG is invalid")
        self._frame = marker
        self._bits, self.height, self.width, channels = struct.unpack_from(">BHHB", body)
        if not channels or len(body) != 6 + 3 * channels:
            raise DamagedImage("the frame header of the JPEG is invalid")
        self._components = set(body[6 : 6 + 3 * channels : 3])
        self._add(marker, body)

    def _note_scan(self, body: memoryview) -> None:
        """Note which bits of which coefficients a scan has (T.81, B.2.3 and G.1.1)."""
        if len(body) < 6:
            raise DamagedImage("the header of a scan of the JPEG is invalid")
        first, last, bits = body[-3:]
        for component in body[1 : 1 + 2 * body[0] : 2]:
            lowest = self._precision.setdefault(component, [_NO_BIT] * 64)
            if self._is_progressive():
                lowest[first : last + 1] = [bits & 0xF] * len(lowest[first : last + 1])
            else:
                lowest[:] = [0] * 64

    def _check_scans(self) -> None:
        """Reject a JPEG that ends between two scans.

        Raises:
            MissingPixels: a channel, or bits of progressive ones, are missing.
        """
        missing = self._components - self._precision.keys()
        if missing:
            there, count = len(self._components) - len(missing), len(self._components)
            raise MissingPixels(
                f"the JPEG is incomplete: {there} of its {count} channels are there"
            )
        if any(any(lowest) for lowest in self._precision.values()):
            raise MissingPixels("the JPEG is incomplete: its last progressive scans are missing")

    def _is_progressive(self) -> bool:
        return self._frame in _PROGRESSIVE

    def _read_metadata(self, marker: int, body: bytes) -> None:
        """Read the orientation and what colors mean, and drop the rest."""
        if marker == _APP1 and body.startswith(_EXIF):
            self._exif += body if not self._exif else body[len(_EXIF) :]
        elif marker == _APP1 and body.startswith(_XMP):
            self._xmp = self._xmp or body
        elif marker == _APP0 and body.startswith(b"JFIF\0") and not self._frame:
            self._add(marker, b"JFIF\0\1\1\0\0\1\0\1\0\0")
        elif marker == _APP14 and body.startswith(_ADOBE) and len(body) >= 12:
            self._inverted = True
            # libjpeg warns about other values, and takes them for 1 or 2.
            transform = body[11] if body[11] <= 2 else 2
            self._add(marker, body[:11] + bytes([transform]))

    def _choose_scale(self, at_least: Shape) -> int:
        """The largest of 8, 4 and 2 that leaves enough pixels; 1 if none does."""
        room = min(self.height // at_least[0], self.width // at_least[1])
        return next((scale for scale in (8, 4, 2) if room >= scale), 1)

    def _stream(self, scan: bytes | memoryview | None = None) -> bytes:
        """The JPEG without its metadata, and with other bytes for those of the last scan."""
        segments = self._segments
        if scan is not None:
            at = max(i for i, segment in enumerate(segments) if segment is self._scan)
            segments = [*segments[:at], scan, *segments[at + 1 :]]
        return b"".join((*segments, b"\xff\xd9"))

    def _read_bytes(self, scale: int) -> AnyArray:
        """Decode 8 bits: (H, W), (H, W, 3), or (H, W, 4) CMYK as it is stored."""
        stream, decode = self._stream(), self._decode_by_turbojpeg
        try:
            pixels = decode(stream, scale, strict=True)
        except ValueError as error:
            warning = str(error)
        else:
            if self._frame in _ARITHMETIC:
                self._read_checked(decode)
            return pixels
        if _OTHER_SUBSAMPLING in warning:
            pixels = self._read_checked(_decode_by_pillow)
            return pixels if scale == 1 else _decode_by_pillow(stream, scale)
        if _LEFT_OVER in warning:
            pixels = self._read_checked(decode, left_over=True)
            return pixels if scale == 1 else decode(stream, scale)
        if _ENDS_EARLY in warning:
            raise MissingPixels(self._describe_missing(decode))
        raise MissingPixels(f"pixels of the JPEG are damaged: {warning.removeprefix(_DAMAGE)}")

    def _decode_by_turbojpeg(
        self, stream: bytes, scale: int = 1, *, strict: bool = False
    ) -> AnyArray:
        import simplejpeg

        space = {1: "GRAY", 3: "RGB", 4: "CMYK"}[len(self._components)]
        pixels: AnyArray = simplejpeg.decode_jpeg(
            stream,
            space,
            min_height=-(-self.height // scale),
            min_width=-(-self.width // scale),
            strict=strict,
        )
        return pixels[:, :, 0] if space == "GRAY" else pixels

    def _read_deep(self) -> AnyArray:
        """Decode what only imagecodecs does: (H, W) or (H, W, 3)."""
        import imagecodecs

        if len(self._components) == 4:
            raise UnsupportedKind(f"a CMYK JPEG of {self._bits} bits")
        pixels = self._read_checked(imagecodecs.jpeg8_decode)
        # Lossless files of some encoders have more bits than they declare.
        return scale_to_bits(pixels, max(self._bits, int(pixels.max()).bit_length()))

    def _read_checked(self, decode: _Decoder, *, left_over: bool = False) -> AnyArray:
        """Decode at full size by a decoder that does not say what is missing.

        Args:
            left_over: libjpeg warned about bytes after the last pixel.

        Raises:
            ValueError: pixels are missing, or overwritten.
        """
        pixels, scan = decode(self._stream()), self._scan
        if not self._is_complete(scan, pixels, decode):
            raise MissingPixels(self._describe_missing(decode))
        padding = len(scan) - len(bytes(scan).rstrip(bytes(scan[-1:])))
        if max(padding, len(scan) * left_over) <= _SLACK:
            return pixels
        if self._is_complete(scan[:-_SLACK], pixels, decode):
            # Bytes are left over: padding does not matter, unless pixels were read from it.
            start = len(scan) - max(padding - _SLACK // 2, 0)
            if padding <= _SLACK or not self._is_complete(scan[:start], pixels, decode):
                raise MissingPixels(
                    "pixels of the JPEG are damaged: bytes are left over after them"
                )
        return pixels

    def _filler(self) -> bytes:
        """Bytes that decode to something else than nothing.

        An arithmetic coder leaves out zeros at its end (T.81, D.1.8), so there they come first.
        """
        return bytes(_SLACK if self._frame in _ARITHMETIC else 0) + _FILLER

    def _describe_missing(self, decode: _Decoder) -> str:
        """Find the first row that depends on bytes after the end of the last scan."""
        pixels = decode(self._stream())
        changed = decode(self._stream(bytes(self._scan) + self._filler())) != pixels
        rows = changed.reshape(self.height, -1).any(axis=1)
        if self._is_progressive() or not rows.any():
            return "pixels of the JPEG are missing: a scan ends too early"
        return (
            f"the JPEG is incomplete: {int(rows.argmax())} of its {self.height} rows are there, "
            "the others are missing"
        )

    def _is_complete(self, scan: memoryview, pixels: AnyArray, decode: _Decoder) -> bool:
        """Whether these bytes of the last scan suffice for all pixels.

        A decoder makes up what is missing, so bytes that are appended change its result only then.
        """
        changed = decode(self._stream(bytes(scan) + self._filler()))
        return bool(np.array_equal(changed, pixels))


def _decode_by_pillow(stream: bytes, scale: int = 1) -> AnyArray:
    with Image.open(io.BytesIO(stream), formats=("JPEG",)) as image:
        if scale > 1:
            image.draft(None, (image.width // scale, image.height // scale))
        pixels = np.asarray(image)
    return ~pixels if image.mode == "CMYK" else pixels  # Pillow inverts CMYK
