"""AVIF, HEIC and JPEG 2000: depth, orientation and missing pixels."""

from __future__ import annotations

import io
import struct
import sys

import imagecodecs
import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageOps

from model.pixels import decode_image
from model.readers import open_image
from model.readers.base import DamagedImage, MissingPixels, UnsupportedKind
from tests.conftest import FIXTURES
from tests.unit.model.readers.writers import saved

FOLDER = FIXTURES / "formats"
PICTURE = Image.open(FOLDER / "reference.png")
RGB = np.asarray(PICTURE)
GREY = np.asarray(PICTURE.convert("L"))
pillow_heif.register_heif_opener()


def avif(values: np.ndarray, bits: int) -> bytes:
    return imagecodecs.avif_encode(values.astype(np.uint16), bitspersample=bits, level=98, speed=10)


@pytest.mark.parametrize("bits", [10, 12])
def test_avif_of_more_than_eight_bits_keeps_them(bits: int) -> None:
    top = (1 << bits) - 1
    for values in (RGB, GREY):
        pixels = decode_image(avif(values * (top / 255), bits))
        assert pixels.dtype == np.uint16
        assert pixels.shape == values.shape
        assert np.abs(pixels / 257 - values).mean() < 1
        assert (pixels % 257).any()
    opacity = np.full(GREY.shape, 0.25)
    half = decode_image(avif(np.dstack([RGB / 255, opacity]) * top, bits))
    assert np.abs(half / 257 - RGB / 4).mean() < 1


@pytest.mark.parametrize("format", ["AVIF", "HEIF"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_eight_bits_are_read(format: str, mode: str) -> None:
    pixels = decode_image(saved(PICTURE.convert(mode), format, quality=95))
    expected = GREY if mode == "L" else RGB
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.reshape(48, 64, -1) - expected.reshape(48, 64, -1).astype(int)).mean() < 3


def test_heic_of_ten_bits_keeps_them() -> None:
    deep = RGB.astype(np.uint16) * 257
    buffer = io.BytesIO()
    pillow_heif.from_bytes("RGB;16", (64, 48), deep.tobytes()).save(buffer, quality=95)
    pixels = decode_image(buffer.getvalue())
    assert pixels.dtype == np.uint16
    assert np.abs(pixels / 257 - RGB).mean() < 3


@pytest.mark.parametrize("format", ["AVIF", "HEIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied_once(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = ImageOps.exif_transpose(Image.open(_with_exif(exif)))
    pixels = decode_image(saved(PICTURE, format, exif=exif.tobytes(), quality=95))
    assert pixels.shape[:2] == expected.size[::-1]
    assert np.abs(pixels - np.asarray(expected).astype(int)).mean() < 3


def _with_exif(exif: Image.Exif) -> object:
    return io.BytesIO(saved(PICTURE, "PNG", exif=exif.tobytes()))


@pytest.mark.parametrize("format", ["AVIF", "HEIF", "JPEG2000"])
def test_missing_pixels_are_an_error(format: str) -> None:
    whole = saved(PICTURE, format)
    half = len(whole) // 2
    for length in (half, len(whole) - 3):
        with pytest.raises((OSError, SyntaxError, ValueError)):
            decode_image(whole[:length])
    with pytest.raises(MissingPixels):
        decode_image(whole[:half] + bytes(len(whole) - half))


def test_heic_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(PICTURE, "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UnsupportedKind, match=r"pip install 'unet-server\[heic\]'"):
        decode_image(data)


@pytest.mark.parametrize("bits", [9, 12, 14, 16])
def test_jpeg_2000_of_more_than_eight_bits_is_scaled_to_sixteen(bits: int) -> None:
    values = GREY.astype(np.uint16) << (bits - 8)
    pixels = decode_image(imagecodecs.jpeg2k_encode(values, bitspersample=bits, level=0))
    expected = np.rint(values * (65535 / ((1 << bits) - 1)))
    assert (pixels == expected).all()


@pytest.mark.parametrize("codec", ["j2k", "jp2"])
def test_jpeg_2000_of_signed_values_keeps_their_order(codec: str) -> None:
    for kind in (np.int8, np.int16):
        middle = 1 << (8 * np.dtype(kind).itemsize - 1)
        values = GREY.astype(np.int32) - 128
        data = imagecodecs.jpeg2k_encode(values.astype(kind), level=0, codecformat=codec)
        assert (decode_image(data) == values + middle).all()


def test_tiles_of_jpeg_2000_are_counted() -> None:
    whole = (FOLDER / "tiles.j2k").read_bytes()
    with pytest.raises(MissingPixels, match="2 of its 4 tiles"):
        decode_image(whole[: len(whole) * 2 // 3])
    with pytest.raises(MissingPixels, match="without the end"):
        decode_image(whole[:-2])
    assert (decode_image(whole + b"rest") == RGB).all()


@pytest.mark.parametrize("codec", ["j2k", "jp2"])
def test_incomplete_header_of_a_jpeg_2000_is_damage(codec: str) -> None:
    data = imagecodecs.jpeg2k_encode(np.zeros((20, 31, 3), np.uint8), codecformat=codec)
    start = data.index(b"\xff\x4f\xff\x51")
    for length in range(start + 4, start + 45):
        with pytest.raises(DamagedImage, match="the header of the JPEG 2000 is incomplete"):
            decode_image(data[:length])


def test_zeros_in_place_of_a_jpeg_2000_are_an_error_also_before_its_end() -> None:
    whole = (FOLDER / "16-bits.j2k").read_bytes()
    half = len(whole) // 2
    zeroed = whole[:half] + bytes(len(whole) - half - 2) + whole[-2:]
    with pytest.raises(MissingPixels, match="are zeros"):
        decode_image(zeroed)


def test_kinds_of_jpeg_2000_that_are_not_read_are_named() -> None:
    whole = bytearray((FOLDER / "16-bits.j2k").read_bytes())
    whole[43] = 2
    with pytest.raises(UnsupportedKind, match="subsampled"):
        open_image(bytes(whole))
    five = (FOLDER / "16-bits.j2k").read_bytes()
    five = five[:2] + b"\xff\x51" + struct.pack(">H", 38 + 15) + five[6:40] + b"\0\5"
    with pytest.raises(UnsupportedKind, match="5 components"):
        open_image(five + b"\x0f\1\1" * 5)
