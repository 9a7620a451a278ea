"""Formats that are not accepted are named; bytes that are not an image are not."""

from __future__ import annotations

import random
import sys
import time

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from app.errors import CorruptImage, ServiceError, UnsupportedImage
from app.imaging import decode, formats
from tests.conftest import encode, nuclei

IMAGE = nuclei(32, 40)[0]
REST = bytes(200)


def boxed(*brands: bytes) -> bytes:
    """The first box of an ISO/IEC 14496-12 file with these brands, the major one first."""
    body = b"ftyp" + brands[0] + bytes(4) + b"".join(brands[1:])
    return (len(body) + 4).to_bytes(4, "big") + body + REST


MARKS = {
    "mif1 alone": (boxed(b"mif1"), "HEIF"),
    "msf1 alone": (boxed(b"msf1", b"iso8"), "HEIF"),
    "cr3": (boxed(b"crx ", b"isom"), "camera raw (CR3)"),
    "jpeg xl": (b"\0\0\0\x0cJXL \r\n\x87\n" + REST, "JPEG XL"),
    "jpeg xl, bare": (b"\xff\x0a\xfa\x1f" + REST, "JPEG XL"),
    "psd": (b"8BPS\0\x01" + REST, "PSD"),
    "mp4": (boxed(b"isom", b"mp41"), "video (MP4, QuickTime)"),
    "quicktime": (boxed(b"qt  "), "video (MP4, QuickTime)"),
    "avi": (b"RIFF\0\0\0\0AVI LIST" + REST, "video (AVI)"),
    "webm": (b"\x1a\x45\xdf\xa3" + REST, "video (Matroska, WebM)"),
    "jpeg xr": (b"II\xbc\x01" + REST, "JPEG XR"),
    "zip": (b"PK\3\4" + REST, "ZIP"),
    "pdf": (b"%PDF-1.7\n" + REST, "PDF"),
    "openexr": (b"\x76\x2f\x31\x01\x02\0\0\0" + REST, "OpenEXR"),
    "dicom": (bytes(128) + b"DICM" + REST, "DICOM"),
    "nifti": ((348).to_bytes(4, "little") + bytes(340) + b"n+1\0" + REST, "NIfTI"),
    "czi": (b"ZISRAWFILE\0\0\0\0\0\0" + REST, "CZI"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "nd2": (b"\xda\xce\xbe\x0a" + REST, "ND2"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + REST, "HDF5"),
    "svg after a declaration": (
        b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- a circle -->\n<svg width="9"></svg>',
        "SVG",
    ),
}


@pytest.mark.parametrize("case", MARKS)
def test_other_formats_are_named(case: str) -> None:
    data, name = MARKS[case]
    assert formats.name_format(data) == name
    with pytest.raises(UnsupportedImage, match=f"^{name.partition(' (')[0]}.* not accepted.*PNG"):
        decode.inspect(data, max_pixels=10**8)


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("DDS", "DDS"),
        ("ICO", "ICO"),
        ("PPM", "Netpbm"),
        ("EPS", "PostScript"),
        ("PDF", "PDF"),
    ],
)
def test_files_that_pillow_writes_are_named(format: str, name: str) -> None:
    Image.init()
    if format not in Image.SAVE:
        pytest.skip(f"Pillow was built without {format}")
    rgb = np.repeat(IMAGE[:, :, None], 3, axis=2)
    with pytest.raises(UnsupportedImage, match=f"^{name}.* not accepted"):
        decode.inspect(encode(rgb, format), max_pixels=10**8)


@pytest.mark.parametrize(
    "format", ["JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "AVIF", "JPEG2000"]
)
def test_accepted_formats_are_damaged_when_cut_and_never_another_format(format: str) -> None:
    data = encode(IMAGE, format)
    assert formats.name_format(data) is None
    for length in range(len(data)):
        try:
            decode.decode(data[:length], decode.inspect(data[:length], max_pixels=10**8))
        except CorruptImage:
            pass
        except ServiceError as error:
            pytest.fail(f"{length} bytes: {error}")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"P1 is not a picture",
        b"<html><svg></svg></html>",
        b'<?xml version="1.0"?><kml></kml>',
        boxed(b"M4A "),  # sound
        boxed(b"heic")[:10],
        b"\0\0\1\0" + REST,  # an icon file without an icon
        bytes(1000),
    ],
    ids=lambda data: repr(data[:16]),
)
def test_bytes_that_only_resemble_a_format_are_not_an_image(data: bytes) -> None:
    assert formats.name_format(data) is None
    with pytest.raises(CorruptImage):
        decode.inspect(data, max_pixels=10**8)


def test_heic_without_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for data in (boxed(b"heic", b"mif1"), boxed(b"heix"), boxed(b"mif1", b"heic")):
        with pytest.raises(UnsupportedImage, match=r"^HEIC.*unet-server\[heic\].* not accepted"):
            decode.inspect(data, max_pixels=10**8)


def test_kinds_of_accepted_formats_that_are_not_read_are_named() -> None:
    with pytest.raises(UnsupportedImage, match=r"^JPEG-LS is not accepted; send JPEG"):
        decode.inspect(imagecodecs.jpegls_encode(IMAGE), max_pixels=10**8)


def test_noise_is_not_an_image() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        assert formats.name_format(rng.randbytes(600)) is None


def test_a_box_that_declares_a_huge_length_is_named_at_once() -> None:
    data = b"\xff\xff\xff\xffftypisom" + bytes(30_000_000)
    started = time.perf_counter()
    assert formats.name_format(data) == "video (MP4, QuickTime)"
    assert time.perf_counter() - started < 0.1
