"""Readers of image formats: bytes of a file -> header and pixels, for training and the service.

One module per format; each is imported when the first image of its format arrives. TIFF has its own
module, `model.tiff`, because it has pages and channels to choose from. Color profiles are ignored:
models are trained on the values that are stored. Knows no limits on size and no HTTP.
"""

from __future__ import annotations

from collections.abc import Callable

from model.readers.base import ImageReader, UnknownFormat

HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"})
AVIF_BRANDS = frozenset({b"avif", b"avis"})
_HEAD_BYTES = 4096


def open_image(data: bytes) -> ImageReader:
    """Read the header of an image of any format but TIFF.

    Raises:
        UnknownFormat: the first bytes are those of no format that is read.
        UnsupportedKind: an image of a kind that is not read.
        OSError, ValueError, SyntaxError: a damaged header.
    """
    name = name_image_format(data)
    if name is None:
        raise UnknownFormat("not a recognised image")
    return _READERS[name](data)


def name_image_format(head: bytes) -> str | None:
    """Name the format of an image by its first bytes; None if `open_image` does not read it."""
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return name
    if head[8:12] == b"WEBP" and head.startswith(b"RIFF"):
        return "WebP"
    brands = read_brands(head)
    if brands & AVIF_BRANDS:
        return "AVIF"
    return "HEIC" if brands & HEIC_BRANDS else None


def read_brands(data: bytes) -> frozenset[bytes]:
    """List the brands of an ISO base media file (ISO/IEC 14496-12); empty for other files.

    The first box holds its length, `ftyp`, the major brand, a version, and further brands.
    """
    if data[4:8] != b"ftyp":
        return frozenset()
    end = min(int.from_bytes(data[:4], "big"), _HEAD_BYTES, len(data))
    return frozenset({data[8:12], *(data[at : at + 4] for at in range(16, end, 4))})


def _open_png(data: bytes) -> ImageReader:
    from model.readers.png import PngReader

    return PngReader(data)


def _open_jpeg(data: bytes) -> ImageReader:
    from model.readers.jpeg import JpegReader

    return JpegReader(data)


def _open_bmp(data: bytes) -> ImageReader:
    from model.readers.bmp import BmpReader

    return BmpReader(data)


def _open_gif(data: bytes) -> ImageReader:
    from model.readers.gif import GifReader

    return GifReader(data)


def _open_webp(data: bytes) -> ImageReader:
    from model.readers.webp import WebpReader

    return WebpReader(data)


def _open_avif(data: bytes) -> ImageReader:
    from model.readers.avif import AvifReader

    return AvifReader(data)


def _open_heic(data: bytes) -> ImageReader:
    from model.readers.heic import HeicReader

    return HeicReader(data)


def _open_jpeg2000(data: bytes) -> ImageReader:
    from model.readers.jpeg2000 import Jpeg2000Reader

    return Jpeg2000Reader(data)


_SIGNATURES: tuple[tuple[bytes | tuple[bytes, ...], str], ...] = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    ((b"GIF87a", b"GIF89a"), "GIF"),
    (b"BM", "BMP"),
    ((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n"), "JPEG 2000"),
)
"""First bytes of a file, and the name of its format."""

_READERS: dict[str, Callable[[bytes], ImageReader]] = {
    "PNG": _open_png,
    "JPEG": _open_jpeg,
    "GIF": _open_gif,
    "BMP": _open_bmp,
    "JPEG 2000": _open_jpeg2000,
    "WebP": _open_webp,
    "AVIF": _open_avif,
    "HEIC": _open_heic,
}
"""Name of a format -> what opens an image of it."""
