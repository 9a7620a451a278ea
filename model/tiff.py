"""TIFF files -> pixel arrays, by tifffile and imagecodecs: for training and the service alike.

Import it only where a TIFF has arrived. Knows no limits on size and no HTTP.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import math
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import imagecodecs
import numpy as np
from PIL import Image
from tifffile import COMPRESSION, PHOTOMETRIC, PREDICTOR, SAMPLEFORMAT, TiffFile, TiffPage

from model.arrays import AnyArray, Shape
from model.pixels import SIDEWAYS, lay_on_black, map_rows, spread, to_array, turn

# tifffile logs every odd tag, and the files are those of clients, who could fill the log.
logging.getLogger("tifffile").disabled = True

_LAYOUT_TAGS = {
    *(256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284),  # size, samples and strips
    *(317, 320, 322, 323, 324, 325, 338, 339, 347, 530, 32997),  # predictor, tiles and colours
}
"""Tags without which pixels would be read wrongly."""
_HEIGHT, _PHOTOMETRIC, _ORIENTATION = 257, 262, 274
_PLANAR = 2
_PREMULTIPLIED, _STRAIGHT = 1, 2
"""Values of ExtraSamples: alpha that colours are multiplied with already, and alpha that is not."""

_COLOURS: dict[int, tuple[int, ...]] = {
    PHOTOMETRIC.MINISWHITE: (1,),
    PHOTOMETRIC.MINISBLACK: (1, 3),
    PHOTOMETRIC.RGB: (3,),
    PHOTOMETRIC.PALETTE: (1,),
    PHOTOMETRIC.SEPARATED: (4,),
    PHOTOMETRIC.YCBCR: (3,),
    PHOTOMETRIC.CIELAB: (3,),
}
"""Photometric interpretation -> samples of a pixel that are colours."""
_DEPTHS: dict[int, Sequence[int]] = {
    PHOTOMETRIC.PALETTE: range(1, 17),
    PHOTOMETRIC.SEPARATED: (8, 16),
    PHOTOMETRIC.YCBCR: (8,),
    PHOTOMETRIC.CIELAB: (8,),
}
"""Bits of unsigned samples in these; the others may be of any type."""

_JPEG = (COMPRESSION.JPEG, COMPRESSION.ALT_JPEG)
_JPEG_2000 = (
    COMPRESSION.JPEG2000,
    COMPRESSION.JPEG_2000_LOSSY,
    COMPRESSION.APERIO_JP2000_RGB,
)
_EMBEDDED: dict[int, Callable[..., AnyArray]] = {
    **dict.fromkeys(_JPEG, imagecodecs.jpeg8_decode),
    **dict.fromkeys(_JPEG_2000, imagecodecs.jpeg2k_decode),
    COMPRESSION.WEBP: imagecodecs.webp_decode,
    COMPRESSION.PNG: imagecodecs.png_decode,
    COMPRESSION.JPEGXL: imagecodecs.jpegxl_decode,
    COMPRESSION.LERC: imagecodecs.lerc_decode,
}
"""Compressions whose strips and tiles are images with a header of their own, and a size in it."""
_BY_LIBTIFF = (
    COMPRESSION.LZW,
    COMPRESSION.CCITTRLE,
    COMPRESSION.CCITTFAX3,
    COMPRESSION.CCITTFAX4,
    COMPRESSION.CCIRLEW,
)
"""Compressions that libtiff decodes: the LZW decoder of imagecodecs 2026.3.6 reads beyond its table
when a strip is damaged."""
_BY_TIFFFILE = (
    COMPRESSION.NONE,
    COMPRESSION.ADOBE_DEFLATE,
    COMPRESSION.DEFLATE,
    COMPRESSION.PACKBITS,
    COMPRESSION.LZMA,
    COMPRESSION.ZSTD,
)
_COMPRESSIONS = {*_EMBEDDED, *_BY_LIBTIFF, *_BY_TIFFFILE, COMPRESSION.OJPEG}
"""Supported. imagecodecs decodes more, but not all of it within the size that the tags state."""
_PREDICTORS = (PREDICTOR.NONE, PREDICTOR.HORIZONTAL, PREDICTOR.FLOATINGPOINT)

_KINDS: dict[int, str] = {
    SAMPLEFORMAT.UINT: "unsigned integers",
    SAMPLEFORMAT.INT: "signed integers",
    SAMPLEFORMAT.IEEEFP: "floats",
    SAMPLEFORMAT.VOID: "samples of an undefined type",
    SAMPLEFORMAT.COMPLEXINT: "complex integers",
    SAMPLEFORMAT.COMPLEXIEEEFP: "complex floats",
}
_MAX_BITS = 128


class UnsupportedTiff(ValueError):
    """A TIFF of a kind that is not read; the message completes "a TIFF ..."."""


@dataclasses.dataclass(frozen=True)
class TiffLayout:
    """How large the image of a page is, and how large its decoder's buffers are.

    Attributes:
        height, width: of the upright image, in pixels.
        segment: (height, width) of a strip or a tile, in pixels.
        bytes_per_pixel: of all samples, as they are decoded.
    """

    height: int
    width: int
    segment: Shape
    bytes_per_pixel: int


class TiffReader:
    """The pages of a TIFF; only the first is read so far.

    Args:
        data: the bytes of the file.

    Raises:
        UnsupportedTiff: a kind that is not read.
        ValueError: damaged.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        with _value_errors():
            file = TiffFile(io.BytesIO(data))
            self._page = file.pages.first
            _check_tags(self._page, data)
            _check_supported(self._page)

    def layout(self) -> TiffLayout:
        """Read the tags alone; nothing is decoded."""
        page = self._page
        height, width = page.imagelength, page.imagewidth
        if _orientation(page) in SIDEWAYS:
            height, width = width, height
        segment = (page.tilelength, page.tilewidth)
        if not page.is_tiled:
            segment = (min(page.rowsperstrip, page.imagelength), page.imagewidth)
        assert page.dtype is not None
        return TiffLayout(height, width, segment, page.dtype.itemsize * page.samplesperpixel)

    def read(self) -> AnyArray:
        """Decode the page, upright.

        Returns:
            See `model.pixels.decode_image`.

        Raises:
            ValueError: pixels are missing or damaged.
        """
        page = self._page
        with _value_errors():
            _check_complete(page, len(self._data))
            if _is_left_to_pillow(page):
                with Image.open(io.BytesIO(self._data), formats=("TIFF",)) as image:
                    return to_array(image)  # upright: Pillow turns TIFFs itself
            pixels = _to_pixels(page, _read_samples(page, self._data))
            return np.ascontiguousarray(turn(pixels, _orientation(page)))


@contextlib.contextmanager
def _value_errors() -> Iterator[None]:
    """Raise a ValueError for whatever tifffile and its codecs stumble on in a damaged file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd tags
            yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(str(error)) from error


def _orientation(page: TiffPage) -> int:
    value = page.tags.valueof(_ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def _check_tags(page: TiffPage, data: bytes) -> None:
    """Reject a page that lacks a tag which its directory lists: tifffile skips damaged tags.

    Raises:
        ValueError: a tag cannot be read, or has an impossible value.
    """
    form = page.parent.tiff
    (count,) = struct.unpack_from(form.tagnoformat, data, page.offset)
    start = page.offset + form.tagnosize
    listed = {
        struct.unpack_from(f"{form.byteorder}H", data, start + index * form.tagsize)[0]
        for index in range(count)
    }
    if lost := (listed & _LAYOUT_TAGS).difference(page.tags.keys()):
        raise ValueError(f"the TIFF tag {min(lost)} cannot be read")
    sizes = [page.imagelength, page.imagewidth, page.samplesperpixel, page.rowsperstrip]
    if page.is_tiled:
        sizes = [*sizes[:3], page.tilelength, page.tilewidth]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"impossible sizes in the TIFF tags: {sizes}")
    if not page.dataoffsets or page.dataoffsets[0] >= len(data):
        raise ValueError("the TIFF tags give no place for the pixels")


def _check_supported(page: TiffPage) -> None:
    """Reject a page whose pixels would not be read, or not be read rightly.

    Raises:
        UnsupportedTiff: another compression, type of numbers, colour space or number of channels.
        ValueError: a tag has an impossible value.
    """
    bits, kind = page.bitspersample, page.sampleformat
    if page.compression not in _COMPRESSIONS:
        raise UnsupportedTiff(f"with the compression {_name(COMPRESSION, page.compression)}")
    known = (PREDICTOR.NONE,) if page.compression == COMPRESSION.LERC else _PREDICTORS
    if page.predictor not in known:
        raise UnsupportedTiff(f"with the predictor {_name(PREDICTOR, page.predictor)}")
    if isinstance(bits, int) and (kind not in _KINDS or not 0 < bits <= _MAX_BITS):
        raise ValueError(f"impossible samples in the TIFF tags: {bits} bits of the type {kind}")
    if not isinstance(bits, int) or page.dtype is None or page.dtype.kind == "c":
        raise UnsupportedTiff(f"of {bits}-bit {_KINDS.get(kind, 'samples of different types')}")
    if page.imagedepth != 1 or page.tiledepth != 1:
        raise UnsupportedTiff(f"of a volume of {page.imagedepth} planes")
    space = _name(PHOTOMETRIC, page.photometric)
    if page.photometric not in _COLOURS:
        raise UnsupportedTiff(f"with the photometric interpretation {space}")
    depths = _DEPTHS.get(page.photometric)
    if depths is not None and (bits not in depths or page.dtype.kind not in "bu"):
        raise UnsupportedTiff(f"of {bits}-bit {_KINDS[kind]} in {space} colours")
    if _count_colours(page) == 0:
        raise UnsupportedTiff(
            f"of {page.samplesperpixel} channels of {bits}-bit {_KINDS[kind]} (photometric "
            f"interpretation {space})"
        )
    if page.photometric == PHOTOMETRIC.PALETTE and page.colormap is None:
        raise ValueError("a palette image without a palette")


def _name(names: type[Any], value: int) -> str:
    """Name a tag's value as TIFF does, with the number where it is unknown."""
    try:
        return f"{names(value).name} ({int(value)})"
    except ValueError:
        return str(value)


def _count_colours(page: TiffPage) -> int:
    """Count the samples of a pixel that are colours; 0 where one would be left out silently.

    A grey image may have alpha, but not a second channel of unknown meaning.
    """
    if page.photometric == PHOTOMETRIC.YCBCR and page.samplesperpixel != 3:
        return 0
    alpha = any(kind in (_PREMULTIPLIED, _STRAIGHT) for kind in page.extrasamples)
    grey = page.photometric in (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.MINISWHITE)
    for count in _COLOURS[page.photometric]:
        extra = page.samplesperpixel - count
        if extra == 0 or (extra == 1 and alpha) or (extra > 0 and not grey):
            return count
    return 0


def _is_left_to_pillow(page: TiffPage) -> bool:
    """Whether colours may be stored at a lower resolution, which tifffile reads in JPEGs alone."""
    jpeg = page.compression in _JPEG
    return page.compression == COMPRESSION.OJPEG or (
        page.photometric == PHOTOMETRIC.YCBCR and not jpeg
    )


def _check_complete(page: TiffPage, size: int) -> None:
    """Reject a page some of whose strips or tiles are missing: tifffile would fill them with 0.

    Raises:
        ValueError: a strip or a tile is missing, or lies beyond the end of the file.
    """
    if page.is_contiguous:
        return  # read in one piece, whatever the sizes of its strips are said to be
    count = math.prod(page.chunked)
    ends = [
        offset + length
        for offset, length in zip(page.dataoffsets, page.databytecounts, strict=False)
        if offset > 0 and length > 0
    ][:count]
    if len(ends) < count or max(ends) > size:
        raise ValueError("some strips or tiles of the TIFF are missing")


def _read_samples(page: TiffPage, data: bytes) -> AnyArray:
    """Decode a page: (H, W, samples), native byte order, as it is stored."""
    if page.compression in _EMBEDDED:
        samples = _decode_embedded(page, data)
    elif page.compression in _BY_LIBTIFF:
        samples = _decode_by_libtiff(page, data)
    else:
        try:
            samples = page.asarray(squeeze=False, maxworkers=1)
        except Exception:
            if page.is_tiled or page.imagelength % page.rowsperstrip == 0:
                raise
            samples = _decode_full_strips(page, data)
    # (separate samples, 1, H, W, interleaved samples), one of the two being 1
    return np.moveaxis(samples[:, 0], 0, 2).reshape(*samples.shape[2:4], -1)


def _decode_by_libtiff(page: TiffPage, data: bytes) -> AnyArray:
    """Decode a page by the libtiff that imagecodecs contains.

    Returns:
        As `TiffPage.asarray` without squeezing: (samples, 1, H, W, 1) or (1, 1, H, W, samples).
    """
    if page.photometric == PHOTOMETRIC.SEPARATED:
        # libtiff would convert CMYK to RGB at 8 bits. As grey it gives the samples.
        data = _replace_tag(page, data, _PHOTOMETRIC, PHOTOMETRIC.MINISBLACK)
    # With an output of the right size, an image of another size is rejected before it is decoded.
    out = np.zeros(page.shape, page.dtype)
    imagecodecs.tiff_decode(data, index=0, out=out)
    return out.reshape(page.shaped)


def _decode_full_strips(page: TiffPage, data: bytes) -> AnyArray:
    """Decode a page whose last strip is longer than the image: some programs fill it up.

    Returns:
        As `_decode_by_libtiff`.
    """
    height = page.imagelength
    strips = -(-height // page.rowsperstrip)
    taller = _replace_tag(page, data, _HEIGHT, strips * page.rowsperstrip)
    samples = TiffFile(io.BytesIO(taller)).pages.first.asarray(squeeze=False, maxworkers=1)
    return samples[:, :, :height]


def _replace_tag(page: TiffPage, data: bytes, code: int, value: int) -> bytes:
    """Copy a file with another value in a tag that has one."""
    tag = page.tags[code]
    start, stop = tag.valueoffset, tag.valueoffset + tag.valuebytecount
    little_endian = page.parent.byteorder == "<"
    new = int(value).to_bytes(stop - start, "little" if little_endian else "big")
    return b"".join((data[:start], new, data[stop:]))


def _decode_embedded(page: TiffPage, data: bytes) -> AnyArray:
    """Decode strips or tiles that are images with a size of their own.

    A codec rejects an image of another size than its output before it decodes anything, so a small
    TIFF cannot hold a huge image.

    Returns:
        As `_decode_by_libtiff`.
    """
    decode = _EMBEDDED[page.compression]
    options = _jpeg_options(page) if page.compression in _JPEG else {}
    result = np.empty(page.shaped, page.dtype)
    for index in range(math.prod(page.chunked)):
        encoded = data[page.dataoffsets[index] :][: page.databytecounts[index]]
        _, (plane, _, top, left, _), (_, *shape) = page.decode(None, index)
        out = np.empty(shape if shape[2] > 1 else shape[:2], page.dtype)
        if page.compression in _JPEG_2000:
            _check_jpeg_2000(encoded, *shape)
        decode(encoded, out=out, **options)
        rows = result[plane, 0, top : top + shape[0], left : left + shape[1]]
        rows[...] = out.reshape(shape)[: rows.shape[0], : rows.shape[1]]
    return result


def _jpeg_options(page: TiffPage) -> dict[str, Any]:
    """Options of the JPEG codec: tables that strips share, and colour spaces.

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
        raise ValueError("not a JPEG 2000 codestream of as many channels as the TIFF has")
    if (bottom - top, right - left) != (height, width):
        raise ValueError("a JPEG 2000 codestream of another size than its TIFF states")


def _to_pixels(page: TiffPage, samples: AnyArray) -> AnyArray:
    """Convert stored samples (H, W, S) to (H, W) or (H, W, 3), uint8 or uint16."""
    colours, alpha = _split_alpha(page, samples)
    if page.photometric == PHOTOMETRIC.PALETTE:
        table = (np.asarray(page.colormap) >> 8).astype(np.uint8).T
        indices = colours[:, :, 0]
        colours = table[indices.view(np.uint8) if indices.dtype == np.bool_ else indices]
        return lay_on_black(colours, alpha.astype(np.uint8, copy=False))
    inverted = page.photometric == PHOTOMETRIC.MINISWHITE
    if colours.dtype not in (np.bool_, np.uint8, np.uint16):
        if alpha.shape[2]:
            full = 1.0 if alpha.dtype.kind == "f" else float(np.iinfo(alpha.dtype).max)
            colours = colours * (alpha / full).astype(np.float32)
        return lay_on_black(spread(colours, inverted=inverted), None)
    colours, alpha = (_to_depth(each, page.bitspersample) for each in (colours, alpha))
    if inverted:
        white = (1 << max(8, page.bitspersample)) - 1
        colours = map_rows(lambda rows: white - rows, colours.dtype.type, colours)
    elif page.photometric == PHOTOMETRIC.SEPARATED:
        colours = _from_cmyk(colours)
    elif page.photometric == PHOTOMETRIC.YCBCR and page.planarconfig == _PLANAR:
        colours = _from_pillow("YCbCr", colours)  # otherwise the JPEG codec has done so
    elif page.photometric == PHOTOMETRIC.CIELAB:
        colours = _from_pillow("LAB", colours)
    return lay_on_black(colours, alpha)


def _split_alpha(page: TiffPage, samples: AnyArray) -> tuple[AnyArray, AnyArray]:
    """Split (H, W, S) into colours and the alpha that is still to be applied: 1 sample or none."""
    count = _count_colours(page)
    colours, extra = samples[:, :, :count], samples[:, :, count:]
    kinds = page.extrasamples
    if page.photometric == PHOTOMETRIC.RGB and extra.shape[2] == 1 and not kinds:
        kinds = (_STRAIGHT,)  # a fourth sample that is not declared: libtiff takes it for alpha
    for index, kind in zip(range(extra.shape[2]), kinds, strict=False):
        if kind == _STRAIGHT:
            return colours, extra[:, :, index : index + 1]
    return colours, extra[:, :, :0]


def _to_depth(samples: AnyArray, bits: int) -> AnyArray:
    """Convert unsigned samples of fewer than 8 bits to the full range of uint8."""
    if bits >= 8:
        return samples
    top = (1 << bits) - 1
    table: AnyArray = np.rint(np.arange(top + 1) * (255 / top)).astype(np.uint8)
    return table.take(samples.view(np.uint8))


def _from_cmyk(inks: AnyArray) -> AnyArray:
    """Convert (H, W, 4) inks of uint8 or uint16 to RGB, as Pillow does without a profile."""
    full = np.uint32(np.iinfo(inks.dtype).max)

    def mix(colours: AnyArray, black: AnyArray) -> AnyArray:
        light = full - black.astype(np.uint32)
        return light - (colours.astype(np.uint32) * light + full // 2) // full

    return map_rows(mix, inks.dtype.type, inks[:, :, :3], inks[:, :, 3:])


def _from_pillow(mode: str, samples: AnyArray) -> AnyArray:
    """Convert (H, W, 3) uint8 of a colour space that Pillow knows to RGB."""
    height, width, _ = samples.shape
    image = Image.frombytes(mode, (width, height), np.ascontiguousarray(samples).tobytes())
    return np.asarray(image.convert("RGB"))
