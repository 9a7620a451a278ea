"""The strips and tiles of a plane -> its samples as they are stored.

tifffile knows where strips and tiles lie, and undoes predictors and packed bits; imagecodecs and
libtiff decompress. No codec may produce more than the tags announce: it gets an output of that
size. Knows no colors.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

import imagecodecs
import numpy as np
from tifffile import COMPRESSION, PHOTOMETRIC, PREDICTOR, TiffPage

from model.arrays import AnyArray
from model.readers.base import DamagedImage
from model.tiff.pages import Plane

_PLANAR = 2
_LOW_BITS_FIRST = 2
"""Value of FillOrder."""
_T4_OPTIONS, _T6_OPTIONS = 292, 293

JPEG = (COMPRESSION.JPEG, COMPRESSION.ALT_JPEG)
_JPEG_2000 = (
    COMPRESSION.JPEG2000,
    COMPRESSION.JPEG_2000_LOSSY,
    COMPRESSION.APERIO_JP2000_RGB,
)
_EMBEDDED: dict[int, Callable[..., AnyArray]] = {
    **dict.fromkeys(JPEG, imagecodecs.jpeg8_decode),
    **dict.fromkeys(_JPEG_2000, imagecodecs.jpeg2k_decode),
    COMPRESSION.WEBP: imagecodecs.webp_decode,
    COMPRESSION.WEBP_DEPRECATED: imagecodecs.webp_decode,
    COMPRESSION.PNG: imagecodecs.png_decode,
    COMPRESSION.JPEGXL: imagecodecs.jpegxl_decode,
    COMPRESSION.JPEGXL_DNG: imagecodecs.jpegxl_decode,
    COMPRESSION.JPEGXR: imagecodecs.jpegxr_decode,
    COMPRESSION.JPEGXR_NDPI: imagecodecs.jpegxr_decode,
    COMPRESSION.LERC: imagecodecs.lerc_decode,
}
"""Compressions whose strips and tiles are images with a header of their own, and a size in it."""
_FAX = (
    COMPRESSION.CCITTRLE,
    COMPRESSION.CCITTFAX3,
    COMPRESSION.CCITTFAX4,
    COMPRESSION.CCIRLEW,
)
_UNPACK: dict[int, Callable[..., bytes | bytearray]] = {
    COMPRESSION.ADOBE_DEFLATE: imagecodecs.deflate_decode,
    COMPRESSION.DEFLATE: imagecodecs.deflate_decode,
    COMPRESSION.PIXTIFF: imagecodecs.deflate_decode,
    COMPRESSION.PACKBITS: imagecodecs.packbits_decode,
    COMPRESSION.LZMA: imagecodecs.lzma_decode,
    COMPRESSION.ZSTD: imagecodecs.zstd_decode,
    COMPRESSION.ZSTD_DEPRECATED: imagecodecs.zstd_decode,
}
"""Compressions of bytes; tifffile undoes the predictor."""
COMPRESSIONS = frozenset(
    {*_EMBEDDED, *_FAX, *_UNPACK, COMPRESSION.NONE, COMPRESSION.LZW, COMPRESSION.OJPEG}
)
"""Supported. imagecodecs decodes more, but not all of it within the size that the tags state."""
PREDICTORS = frozenset(
    {
        *(PREDICTOR.NONE, PREDICTOR.HORIZONTAL, PREDICTOR.FLOATINGPOINT),
        *(PREDICTOR.HORIZONTALX2, PREDICTOR.HORIZONTALX4),
        *(PREDICTOR.FLOATINGPOINTX2, PREDICTOR.FLOATINGPOINTX4),
    }
)
_LERC_SIGNATURES, _ZSTD_SIGNATURE = (b"Lerc2 ", b"CntZImage "), b"\x28\xb5\x2f\xfd"
_LERC_HEADER = 1 << 16


def check_complete(page: TiffPage, plane: Plane, size: int) -> None:
    """Reject a page some of whose strips or tiles are missing: tifffile would fill them with 0.

    Args:
        size: of the file, in bytes.

    Raises:
        ValueError: a strip or a tile is missing, or lies beyond the end of the file.
    """
    if page.is_contiguous:  # read in one piece, whatever the sizes of its strips are said to be
        if page.dataoffsets[0] + plane.skip + page.nbytes > size:
            raise DamagedImage("the TIFF ends before its pixels do")
        return
    count = math.prod(page.chunked)
    ends = [
        offset + length
        for offset, length in zip(page.dataoffsets, page.databytecounts, strict=False)
        if offset > 0 and length > 0
    ][:count]
    if len(ends) < count or max(ends) > size:
        raise DamagedImage("some strips or tiles of the TIFF are missing")


def read_samples(page: TiffPage, plane: Plane, data: bytes) -> AnyArray:
    """Decode a plane: (H, W, samples), native byte order, as it is stored.

    Args:
        page: the directory of the plane; it is not to be used for anything else after that.
        data: the bytes of the file.

    Raises:
        ValueError: pixels are missing or damaged. Codecs raise other exceptions as well.
    """
    check_complete(page, plane, len(data))
    if plane.skip:
        samples = _read_contiguous(page, plane.skip, data)
    elif page.is_contiguous:
        samples = page.asarray(squeeze=False, maxworkers=1)
    else:
        samples = _decode_segments(page, data)
    # (separate samples, planes, H, W, interleaved samples), one of the samples being 1
    return np.moveaxis(samples[:, plane.depth], 0, 2).reshape(*samples.shape[2:4], -1)


def _read_contiguous(page: TiffPage, skip: int, data: bytes) -> AnyArray:
    """Read a plane that follows the pixels of its directory."""
    assert page.dtype is not None
    dtype = page.dtype.newbyteorder(page.parent.byteorder)
    stored: AnyArray = np.frombuffer(
        data, dtype, math.prod(page.shaped), page.dataoffsets[0] + skip
    )
    return stored.astype(page.dtype).reshape(page.shaped)


def _decode_segments(page: TiffPage, data: bytes) -> AnyArray:
    """Decode strips or tiles: (separate samples, planes, H, W, interleaved samples)."""
    decode = _choose_decoder(page)
    assert page.dtype is not None
    result = np.empty(page.shaped, page.dtype)
    for index in range(math.prod(page.chunked)):
        start = page.dataoffsets[index]
        encoded = data[start : start + page.databytecounts[index]]
        _, (sample, depth, top, left, _), shape = page.decode(None, index)
        part = result[
            sample,
            depth : depth + shape[0],
            top : top + shape[1],
            left : left + shape[2],
        ]
        segment = decode(page, encoded, index, shape)
        part[...] = segment[: part.shape[0], : part.shape[1], : part.shape[2]]
    return result


def _choose_decoder(
    page: TiffPage,
) -> Callable[[TiffPage, bytes, int, Sequence[int]], AnyArray]:
    """Choose how segments are decoded.

    Unless they are images, tifffile gets unpacked bytes, so the page becomes one without
    compression.
    """
    compression, bit_order = page.compression, page.fillorder
    if compression in _EMBEDDED:
        return _decode_embedded
    page.compression, page.fillorder = COMPRESSION.NONE, 1

    def decode_fax(page: TiffPage, encoded: bytes, index: int, shape: Sequence[int]) -> AnyArray:
        return _decode_fax(page, encoded, shape, {259: compression, 266: bit_order})

    def decode(page: TiffPage, encoded: bytes, index: int, shape: Sequence[int]) -> AnyArray:
        if bit_order == _LOW_BITS_FIRST:
            encoded = bytes(imagecodecs.bitorder_decode(encoded))
        unpacked = _unpack(compression, encoded, page, shape)
        segment, _, _ = page.decode(unpacked, index)
        assert segment is not None
        return segment

    return decode_fax if compression in _FAX else decode


def _unpack(
    compression: int, encoded: bytes | bytearray, page: TiffPage, shape: Sequence[int]
) -> bytes | bytearray:
    """Decompress the bytes of a segment of a shape (planes, H, W, interleaved samples)."""
    if compression == COMPRESSION.NONE:
        return encoded
    depth, height, width, samples = shape
    bits = sum(page.bitspersample) if isinstance(page.bitspersample, tuple) else page.bitspersample
    row = -(-width * samples * bits // 8)
    if compression == COMPRESSION.LZW:
        return _unpack_lzw(encoded, depth * height * row)
    # Some programs fill up the last strip, so it may be longer than the image.
    rows = height if page.is_tiled else max(height, page.rowsperstrip)
    return _UNPACK[compression](encoded, out=depth * rows * row)


def _unpack_lzw(encoded: bytes | bytearray, size: int) -> bytes:
    """Decompress LZW by libtiff.

    The decoder of imagecodecs 2026.3.6 reads beyond its table when a strip is damaged.
    """
    out = np.empty((1, size), np.uint8)
    tags = {259: COMPRESSION.LZW, 258: 8, 262: PHOTOMETRIC.MINISBLACK}
    imagecodecs.tiff_decode(_write_strip(encoded, 1, size, tags), index=0, out=out)
    return out.tobytes()


def _decode_fax(
    page: TiffPage, encoded: bytes, shape: Sequence[int], tags: dict[int, int]
) -> AnyArray:
    """Decode a segment of fax lines, by libtiff."""
    _, height, width, _ = shape
    out = np.empty((height, width), np.bool_)
    tags = tags | {258: 1, 262: page.photometric}
    for code in (_T4_OPTIONS, _T6_OPTIONS):
        tags[code] = page.tags.valueof(code, 0)
    imagecodecs.tiff_decode(_write_strip(encoded, height, width, tags), index=0, out=out)
    return out.reshape(shape)


def _write_strip(
    encoded: bytes | bytearray, height: int, width: int, tags: dict[int, int]
) -> bytes:
    """Write a TIFF of one encoded strip, for libtiff."""
    header = 8
    values = tags | {256: width, 257: height, 277: 1, 278: height}
    values |= {273: header, 279: len(encoded)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, values[tag]) for tag in sorted(values))
    directory = struct.pack("<H", len(values)) + entries + bytes(4)
    padding = bytes(len(encoded) % 2)  # a directory begins at an even offset
    start = header + len(encoded) + len(padding)
    return b"".join((b"II*\0", struct.pack("<I", start), encoded, padding, directory))


def _decode_embedded(page: TiffPage, encoded: bytes, index: int, shape: Sequence[int]) -> AnyArray:
    """Decode a strip or a tile that is an image with a size of its own.

    A codec rejects an image of another size than its output before it decodes anything, so a small
    TIFF cannot hold a huge image. The last strip may be filled up, and the last tile cut off.
    """
    depth, height, width, samples = shape
    if depth != 1:
        raise DamagedImage("a volume of tiles that are images")
    if page.compression == COMPRESSION.LERC:
        encoded = bytes(_unpack_lerc(page, encoded, shape))
    _, (_, _, top, left, _), _ = page.decode(None, index)
    sizes = [(height, width)]
    if page.is_tiled:
        sizes.append((min(height, page.imagelength - top), min(width, page.imagewidth - left)))
    else:
        sizes.append((page.rowsperstrip, width))
    try:
        return _decode_image(page, encoded, sizes[0], samples)
    except Exception:
        if sizes[1] == sizes[0]:
            raise
        return _decode_image(page, encoded, sizes[1], samples)


def _decode_image(page: TiffPage, encoded: bytes, size: tuple[int, int], samples: int) -> AnyArray:
    """Decode an image of a known size: (1, H, W, samples)."""
    options = _jpeg_options(page) if page.compression in JPEG else {}
    if page.compression in _JPEG_2000:
        _check_jpeg_2000(encoded, *size, samples)
    if page.compression in (COMPRESSION.WEBP, COMPRESSION.WEBP_DEPRECATED):
        options = {"hasalpha": samples == 4}
    out = np.empty((*size, samples) if samples > 1 else size, page.dtype)
    _EMBEDDED[page.compression](encoded, out=out, **options)
    return out.reshape(1, *size, samples)


def _jpeg_options(page: TiffPage) -> dict[str, Any]:
    """Options of the JPEG codec: tables that strips share, and color spaces.

    YCbCr becomes RGB where it is decoded; everything else stays as it is stored.
    """
    spaces = imagecodecs.JPEG8.CS
    options: dict[str, Any] = {"tables": page.jpegtables}
    if page.planarconfig == _PLANAR:
        options["outcolorspace"] = spaces.GRAYSCALE
    elif page.samplesperpixel == 3:
        options["outcolorspace"] = spaces.RGB
        if page.photometric != PHOTOMETRIC.YCBCR and not page.is_jfif:
            options["colorspace"] = spaces.RGB
    return options


def _check_jpeg_2000(encoded: bytes, height: int, width: int, samples: int) -> None:
    """Compare the size of a JPEG 2000 codestream (ISO/IEC 15444-1, A.5.1): its codec does not.

    Raises:
        ValueError: another size, or not a bare codestream.
    """
    signature, right, bottom, left, top = struct.unpack_from(">4s4xIIII", encoded)
    (count,) = struct.unpack_from(">H", encoded, 40)
    if signature != b"\xff\x4f\xff\x51" or count != samples:
        raise DamagedImage("not a JPEG 2000 codestream of as many channels as the TIFF has")
    if (bottom - top, right - left) != (height, width):
        raise DamagedImage("a JPEG 2000 codestream of another size than its TIFF states")


def _unpack_lerc(page: TiffPage, encoded: bytes, shape: Sequence[int]) -> bytes | bytearray:
    """Undo the second compression that LERC may have: its codec would do so without a bound."""
    if encoded.startswith(_LERC_SIGNATURES):
        return encoded
    assert page.dtype is not None
    most = 2 * math.prod(shape) * page.dtype.itemsize + _LERC_HEADER
    if encoded.startswith(_ZSTD_SIGNATURE):
        return imagecodecs.zstd_decode(encoded, out=most)
    return imagecodecs.deflate_decode(encoded, out=most)
