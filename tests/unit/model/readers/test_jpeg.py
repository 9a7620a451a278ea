"""JPEG: missing pixels are noticed whatever the coding, and other damage does not matter."""

from __future__ import annotations

import struct

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from model.pixels import decode_image
from model.readers import open_image
from model.readers.base import MissingPixels, UnsupportedKind
from tests.conftest import FIXTURES, nuclei
from tests.unit.model.readers.writers import saved

REFERENCE = Image.open(FIXTURES / "formats" / "reference.png")
GREY = nuclei(64, 80)[0]
CODINGS = {
    path.stem: path.read_bytes() for path in sorted((FIXTURES / "formats").glob("*.jpg"))
} | {
    "12 bits": imagecodecs.jpeg8_encode(GREY.astype(np.uint16) * 16, bitspersample=12),
    "lossless": imagecodecs.jpeg8_encode(GREY, lossless=True),
    "CMYK": saved(REFERENCE.convert("CMYK"), "JPEG"),
    "CMYK, subsampled": saved(REFERENCE.convert("CMYK"), "JPEG", subsampling="4:2:2"),
}
END = b"\xff\xd9"


@pytest.mark.parametrize("coding", CODINGS)
def test_half_of_the_pixels_is_an_error(coding: str) -> None:
    whole = CODINGS[coding]
    half = whole[: len(whole) // 2]
    for data in (half + END, half, half + bytes(len(half)), half + bytes(len(half)) + END):
        with pytest.raises(MissingPixels):
            decode_image(data)


@pytest.mark.parametrize("coding", CODINGS)
def test_what_surrounds_the_pixels_does_not_matter(coding: str) -> None:
    whole = CODINGS[coding]
    pixels = decode_image(whole)
    start = whole[:-2]
    for data in (
        start,  # without an end
        whole + bytes(512),
        whole + b"\xff\xd8 another image",
        start + b"\x12" + END,
        start + bytes(300) + END,
        start + bytes(512),  # padding in place of the end
    ):
        assert (decode_image(data) == pixels).all()


def test_the_rows_that_are_there_are_counted() -> None:
    whole = CODINGS["baseline"]
    with pytest.raises(MissingPixels, match="32 of its 48 rows"):
        decode_image(whole[: len(whole) * 3 // 4] + END)
    with pytest.raises(MissingPixels, match="1 of its 3 channels"):
        decode_image(CODINGS["three-scans"][:1200] + END)
    progressive = CODINGS["progressive"]
    last = progressive.rindex(b"\xff\xc4")
    with pytest.raises(MissingPixels, match="last progressive scans are missing"):
        decode_image(progressive[:last] + END)


def test_a_flat_image_whose_code_is_all_zeros_is_complete() -> None:
    for value in (0, 128, 255):
        flat = np.full((400, 600), value, np.uint8)
        for options in ({"optimize": True}, {"progressive": True}, {}):
            assert (decode_image(saved(flat, "JPEG", **options)) == flat).all()


def test_a_byte_that_breaks_the_code_is_an_error() -> None:
    data = bytearray(CODINGS["baseline"])
    at = len(data) // 2
    data[at : at + 8] = b"\xfe" * 8
    with pytest.raises(MissingPixels):
        decode_image(bytes(data))


SEGMENTS = {
    "EXIF damaged": (0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "EXIF of 60 KB": (0xE1, b"Exif\0\0" + bytes(60_000)),
    "MPF damaged": (0xE2, b"MPF\0II*\0\xff\xff\xff\x7f"),
    "ICC profile, part 9 of 3": (0xE2, b"ICC_PROFILE\0\x09\x03abc"),
    "JFIF of a later version": (0xE0, b"JFIF\0\x09\x09\0\0\1\0\1\0\0"),
    "JFIF too short": (0xE0, b"JFIF"),
    "Photoshop resources damaged": (0xED, b"Photoshop 3.0\x008BIM\xff\xff\xff\xff"),
    "Adobe too short": (0xEE, b"Ado"),
    "comment that is not text": (0xFE, bytes(range(256))),
    "JPGn": (0xF5, b"abc"),
}


@pytest.mark.parametrize("kind", SEGMENTS)
def test_broken_metadata_does_not_cost_the_pixels(kind: str) -> None:
    marker, body = SEGMENTS[kind]
    whole = CODINGS["baseline"]
    segment = struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body
    after_jfif = 2 + 18
    for at in (2, after_jfif):
        data = whole[:at] + segment + whole[at:]
        assert (decode_image(data) == decode_image(whole)).all()
    stray = whole[:after_jfif] + b"stray bytes" + whole[after_jfif:]
    assert (decode_image(stray) == decode_image(whole)).all()


@pytest.mark.parametrize("options", [{}, {"quality": 97}, {"progressive": True}])
def test_cmyk_is_inverted_only_with_the_marker_of_adobe(options: dict[str, object]) -> None:
    inks = REFERENCE.convert("CMYK")
    expected = np.asarray(inks.convert("RGB")).astype(int)
    adobe = saved(inks, "JPEG", **options)  # Pillow writes the marker, and inverts
    assert np.abs(decode_image(adobe) - expected).mean() < 4
    plain = saved(Image.fromarray(255 - np.asarray(inks), "CMYK"), "JPEG", **options)
    at = plain.index(b"\xff\xee")
    plain = plain[:at] + plain[at + 2 + int.from_bytes(plain[at + 2 : at + 4]) :]
    assert np.abs(decode_image(plain) - expected).mean() < 4


def test_ycck_is_read() -> None:
    """A CMYK JPEG whose marker says that C, M and Y are stored as YCbCr."""
    inks = np.array(REFERENCE.convert("CMYK"))
    inks[:, :, 3] = 20
    ycc = np.asarray(Image.fromarray(inks[:, :, :3]).convert("YCbCr"))
    stored = Image.fromarray(np.dstack([255 - ycc, inks[:, :, 3:]]), "CMYK")
    data = saved(stored, "JPEG", quality=97)
    at = data.index(b"Adobe") + 11
    ycck = data[:at] + b"\2" + data[at + 1 :]
    expected = np.asarray(Image.fromarray(inks, "CMYK").convert("RGB")).astype(int)
    assert np.abs(decode_image(ycck) - expected).mean() < 4


def test_kinds_that_are_not_read_are_named() -> None:
    with pytest.raises(UnsupportedKind, match="JPEG-LS"):
        decode_image(imagecodecs.jpegls_encode(GREY))
    whole = saved(GREY, "JPEG")
    at = whole.index(b"\xff\xc0") + 1
    with pytest.raises(UnsupportedKind, match="hierarchical"):
        decode_image(whole[:at] + b"\xc5" + whole[at + 1 :])


@pytest.mark.parametrize("coding", ["baseline", "subsampled-4x2", "restart-intervals"])
@pytest.mark.parametrize("scale", [2, 4])
def test_a_fraction_is_that_of_pillow(coding: str, scale: int) -> None:
    data = CODINGS[coding]
    with Image.open(FIXTURES / "formats" / f"{coding}.jpg") as image:
        image.draft("RGB", (64 // scale, 48 // scale))
        expected = np.asarray(image)
    pixels = open_image(data).read((48 // scale, 64 // scale))
    assert pixels.shape == (48 // scale, 64 // scale, 3)
    assert (pixels == expected).all()
