"""TIFFs of many kinds as other programs write them, with the pixels they should become.

Written on the spot by tifffile, imagecodecs and Pillow; `tests/fixtures/tiff` has some of
ImageMagick, libvips, libtiff and GDAL.
"""

from __future__ import annotations

import dataclasses
import io
import zlib
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from tests.conftest import nuclei, set_tag

GREY = nuclei(48, 64)[0]
DEEP = GREY.astype(np.uint16) * 257
RGB = np.dstack([GREY, GREY[::-1], GREY[:, ::-1]])
DEEP_RGB = RGB.astype(np.uint16) * 257
LOSSY = 6.0
"""Mean difference that lossy compression may make."""


@dataclasses.dataclass(frozen=True)
class Written:
    """A file, and what it should be read as.

    Attributes:
        data: the file.
        expected: pixels.
        tolerance: mean difference of pixels; 0 for the same pixels.
        page, channel: to choose.
    """

    data: bytes
    expected: np.ndarray
    tolerance: float = 0
    page: int | None = None
    channel: int | None = None


def by_tifffile(values: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    photometric = "rgb" if values.ndim == 3 and values.shape[2] in (3, 4) else "minisblack"
    tifffile.imwrite(buffer, values, **{"photometric": photometric} | options)
    return buffer.getvalue()


def by_pillow(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "TIFF", **options)
    return buffer.getvalue()


def by_codec(values: np.ndarray, encoded: bytes, compression: str | int, **options: Any) -> bytes:
    """A single strip that was encoded beforehand."""
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        iter([encoded]),
        shape=values.shape,
        dtype=values.dtype,
        photometric="rgb" if values.ndim == 3 else "minisblack",
        compression=compression,
        rowsperstrip=values.shape[0],
        metadata=None,
        **options,
    )
    return buffer.getvalue()


def spread(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    return np.rint((values.astype(np.float64) - low) / (high - low) * 65535).astype(np.uint16)


def write_all() -> dict[str, Written]:
    """Name -> file."""
    return _by_layout() | _by_compression() | _by_number() | _by_color() | _by_program()


def _by_layout() -> dict[str, Written]:
    files = {}
    for name, options in {
        "big-endian": {"byteorder": ">"},
        "BigTIFF": {"bigtiff": True},
        "BigTIFF big-endian": {"bigtiff": True, "byteorder": ">"},
        "tiles": {"tile": (16, 32)},
        "one row per strip": {"rowsperstrip": 1},
        "tiles and predictor": {"tile": (16, 16), "compression": "zlib", "predictor": True},
    }.items():
        files[name] = Written(by_tifffile(DEEP, **options), DEEP)
        files[f"{name}, color"] = Written(by_tifffile(DEEP_RGB, **options), DEEP_RGB)
    planes = np.moveaxis(DEEP_RGB, 2, 0)
    for compression in (None, "lzw", "zstd"):
        data = by_tifffile(
            planes, photometric="rgb", planarconfig="separate", compression=compression
        )
        files[f"planes, {compression}"] = Written(data, DEEP_RGB)
    data = by_tifffile(planes, photometric="rgb", planarconfig="separate", tile=(16, 16))
    files["planes in tiles"] = Written(data, DEEP_RGB)
    return files


def _by_compression() -> dict[str, Written]:
    files = {}
    lossless = ("lzw", "zlib", "lzma", "zstd", "packbits", "jpeg2000", "jpegxl", "png", "lerc")
    for name in lossless:
        for kind, values in (("grey", DEEP), ("color", RGB)):
            files[f"{name}, {kind}"] = Written(by_tifffile(values, compression=name), values)
    for name in ("jpeg", "webp", "jpegxr"):
        files[name] = Written(by_tifffile(RGB, compression=name), RGB, LOSSY)
    twelve = DEEP >> 4
    jpeg = imagecodecs.jpeg8_encode(twelve, bitspersample=12, level=98)
    data = set_tag(by_codec(twelve, jpeg, "jpeg"), 258, 12)
    files["jpeg of 12 bits"] = Written(data, twelve * (65535 / 4095), 640)
    lossless_jpeg = imagecodecs.jpeg8_encode(DEEP, lossless=True, bitspersample=16)
    data = set_tag(by_codec(DEEP, lossless_jpeg, "jpeg"), 258, 16)  # tifffile writes 12
    files["jpeg without loss"] = Written(data, DEEP)
    for second, pack in (("deflate", zlib.compress), ("zstd", imagecodecs.zstd_encode)):
        packed = pack(imagecodecs.lerc_encode(DEEP))
        files[f"lerc, {second}"] = Written(by_codec(DEEP, packed, "lerc"), DEEP)
    floats = DEEP.astype(np.float32) / 7
    for predictor in (False, True):
        data = by_tifffile(floats, compression="zlib", predictor=predictor)
        files[f"float, predictor {predictor}"] = Written(data, spread(floats))
    return files


def _by_number() -> dict[str, Written]:
    files = {}
    for dtype in ("i1", "i2", "i4", "i8", "u4", "u8", "f2", "f4", "f8"):
        wide = DEEP.astype(np.float64) * (1.0 if dtype in ("i1", "i2", "f2") else 40_000)
        if dtype[0] == "i":
            wide -= wide.max() / 2
        values = (wide / (300 if dtype == "i1" else 3)).astype(dtype)
        files[f"number {dtype}"] = Written(by_tifffile(values), spread(values))
    for bits in (1, 2, 4, 6):
        values = GREY >> (8 - bits)
        stored = values.astype(bool) if bits == 1 else values
        expected = np.rint(values * (255 / ((1 << bits) - 1)))
        files[f"{bits} bits"] = Written(by_tifffile(stored, bitspersample=bits), expected)
    for bits in (10, 12, 14):
        values = DEEP >> (16 - bits)
        expected = np.rint(values * (65535 / ((1 << bits) - 1)))
        files[f"{bits} bits"] = Written(by_tifffile(values, bitspersample=bits), expected)
    values = DEEP.astype(np.uint32) << 6
    files["24 bits"] = Written(by_tifffile(values, bitspersample=24), spread(values))
    return files


def _by_color() -> dict[str, Written]:
    alpha = np.full((*GREY.shape, 1), 65535, np.uint16)
    alpha[:20] = 30_000
    laid = np.rint(DEEP_RGB * (alpha / 65535)).astype(np.uint16)
    straight = {"extrasamples": ["unassalpha"], "planarconfig": "contig"}
    grey_alpha = np.dstack([DEEP, alpha[:, :, 0]])
    inverted = {"photometric": "miniswhite"}
    return {
        "color and alpha of 16 bits": Written(
            by_tifffile(np.dstack([DEEP_RGB, alpha]), **straight), laid
        ),
        "grey and alpha of 16 bits": Written(
            by_tifffile(grey_alpha, photometric="minisblack", **straight), laid[:, :, 0]
        ),
        "white is zero": Written(by_tifffile(DEEP, **inverted), 65535 - DEEP),
        "two channels": Written(
            by_tifffile(np.dstack([DEEP, DEEP[::-1]]), planarconfig="contig"), DEEP[::-1], channel=1
        ),
        "no photometric interpretation": Written(_without_photometric(by_tifffile(DEEP)), DEEP),
        "constant": Written(by_tifffile(np.full_like(DEEP, 700)), np.full_like(DEEP, 700)),
        "constant float": Written(by_tifffile(np.full(DEEP.shape, 0.5)), np.zeros_like(DEEP)),
    }


def _without_photometric(data: bytes) -> bytes:
    """Turn the tag into one that does not exist."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        offset = file.pages.first.tags[262].offset
    return data[:offset] + (263).to_bytes(2, "little") + data[offset + 2 :]


def _by_program() -> dict[str, Written]:
    grey, color = Image.fromarray(GREY), Image.fromarray(RGB)
    files = {
        f"Pillow {compression}": Written(by_pillow(color, compression=compression), RGB)
        for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "lzma", "zstd")
    }
    for compression in ("group3", "group4", "tiff_ccitt"):
        page = Image.fromarray(GREY > 60)
        data = by_pillow(page, compression=compression)
        files[f"Pillow {compression}"] = Written(data, np.asarray(page) * np.uint8(255))
    frames = [Image.fromarray(GREY // 2), grey]
    pages = by_pillow(frames[0], save_all=True, append_images=frames[1:], compression="tiff_lzw")
    files |= {
        "Pillow pages": Written(pages, GREY, page=1),
        "Pillow palette": Written(by_pillow(color.quantize(16)), RGB, 40),
        "Pillow float": Written(by_pillow(grey.convert("F")), spread(GREY)),
        "Pillow 32 bits": Written(by_pillow(grey.convert("I")), GREY),
        "Pillow CMYK": Written(by_pillow(color.convert("CMYK")), RGB, 1),
        "ImageJ": Written(by_tifffile(np.stack([DEEP // 2, DEEP]), imagej=True), DEEP, channel=1),
        "OME": Written(
            by_tifffile(np.stack([DEEP // 2, DEEP]), ome=True, metadata={"axes": "ZYX"}),
            DEEP,
            page=1,
        ),
    }
    return files
