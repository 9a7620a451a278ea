"""Bytes -> pixels and back: modes, orientation, ranges, limits, damage."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from PIL import Image

from app import images
from app.errors import CorruptImage, ImageError, ImageTooLarge, UnsupportedImage
from tests.conftest import FIXTURES, encode, nuclei

LIMIT = 100_000_000
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 30, 3), np.uint8)
GREY = RNG.integers(0, 256, (20, 30), np.uint8)


def read(data: bytes) -> np.ndarray:
    return images.decode(data, images.inspect(data, max_pixels=LIMIT))


def saved(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP"])
def test_lossless_formats_give_the_same_pixels(format: str) -> None:
    assert (read(encode(RGB, format)) == RGB).all()
    assert (read(encode(GREY, format)) == GREY).all()


def test_transparency_is_laid_on_black() -> None:
    alpha = np.zeros((20, 30, 1), np.uint8)
    alpha[:10] = 255
    pixels = read(encode(np.dstack([RGB, alpha])))
    assert (pixels[:10] == RGB[:10]).all()
    assert (pixels[10:] == 0).all()


def test_palette_with_a_transparent_colour() -> None:
    image = Image.fromarray(GREY // 128).convert("P")
    image.putpalette([200, 100, 50, 10, 20, 30])
    pixels = read(saved(image, transparency=0))
    assert (pixels[GREY < 128] == 0).all()
    assert (pixels[GREY >= 128] == (10, 20, 30)).all()


def test_cmyk_and_bilevel_become_what_they_show() -> None:
    cmyk = read(saved(Image.new("CMYK", (9, 8), (0, 255, 255, 0)), "JPEG"))
    assert cmyk.shape == (8, 9, 3)
    assert cmyk[0, 0, 0] > 200 > 60 > cmyk[0, 0, 1]  # red
    bilevel = read(saved(Image.fromarray(GREY > 128), "PNG"))
    assert set(np.unique(bilevel)) == {0, 255}


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_range(format: str) -> None:
    values = RNG.integers(200, 5000, (20, 30)).astype(np.uint16)
    pixels = read(encode(values, format))
    assert pixels.dtype == np.uint16
    assert (pixels == values).all()


def test_a_dark_sixteen_bit_picture_is_shown_over_its_real_range() -> None:
    pixels = read((FIXTURES / "img2d.tif").read_bytes())
    assert pixels.dtype == np.uint16
    assert pixels.max() < 256  # so dark that a division by 256 would leave nothing of it
    shown = images.overlay(pixels, np.zeros(pixels.shape, np.uint8))
    assert shown.max() == 255


def test_floats_are_spread_over_their_finite_range() -> None:
    values = np.linspace(-2, 3, 600, dtype=np.float32).reshape(20, 30)
    values[0, 0] = np.nan
    pixels = read(encode(values, "TIFF"))
    assert pixels[-1, -1] == 65535
    assert pixels[0, 0] == pixels.min() == 0
    assert (np.diff(pixels.ravel()[1:].astype(int)) >= 0).all()
    nothing = read(encode(np.full((4, 4), np.inf, np.float32), "TIFF"))
    assert (nothing == 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_out_upright(orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(RGB), "PNG", exif=exif.tobytes())
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    header = images.inspect(data, max_pixels=LIMIT)
    assert (header.height, header.width) == expected.shape[:2]
    assert (read(data) == expected).all()


def test_a_jpeg_may_be_decoded_smaller_when_that_is_enough() -> None:
    data = encode(np.asarray(Image.fromarray(RGB).resize((1600, 1200))), "JPEG")
    header = images.inspect(data, max_pixels=LIMIT)
    reduced = images.decode(data, header, at_least=(256, 384))
    assert (256, 384) <= reduced.shape[:2] < (1200, 1600)
    # a PNG has no such shortcut: all of it comes
    png = encode(RGB)
    assert (
        images.decode(png, images.inspect(png, max_pixels=LIMIT), at_least=(4, 4)).shape
        == RGB.shape
    )


def test_limits_and_formats() -> None:
    with pytest.raises(ImageTooLarge, match="30 x 20"):
        images.inspect(encode(RGB), max_pixels=599)
    assert images.inspect(encode(RGB), max_pixels=600).width == 30
    with pytest.raises(UnsupportedImage, match="PPM"):
        images.inspect(encode(RGB, "PPM"), max_pixels=LIMIT)
    with pytest.raises(CorruptImage, match="not an image"):
        images.inspect(b"hello", max_pixels=LIMIT)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF"])
def test_damage_is_an_image_error_and_nothing_else(format: str) -> None:
    """200 random wounds a format: bytes changed, cut off, put in."""
    whole = encode(nuclei(40, 50)[0], format)
    rng = random.Random(format)
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        elif rng.random() < 0.2:
            at = rng.randrange(len(data))
            data[at:at] = rng.randbytes(rng.randint(1, 50))
        try:
            header = images.inspect(bytes(data), max_pixels=1_000_000)
            pixels = images.decode(bytes(data), header)
        except ImageError:
            continue
        assert pixels.shape[:2] == (header.height, header.width)
        assert pixels.dtype in (np.uint8, np.uint16)


def test_encoders_give_back_what_they_got() -> None:
    def back(data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data))

    mask = np.where(GREY > 100, 255, 0).astype(np.uint8)
    assert (np.asarray(back(images.encode_mask(mask))) == mask).all()
    assert back(images.encode_mask(mask)).mode == "L"
    labels = (GREY % 3).astype(np.uint8)
    palette = [(0, 0, 0), (255, 0, 0), (0, 255, 0)]
    encoded = back(images.encode_labels(labels, palette))
    assert encoded.mode == "P"
    assert (np.asarray(encoded) == labels).all()
    assert encoded.convert("RGB").getpixel((0, 0)) == palette[labels[0, 0]]
    wide = RNG.integers(0, 65536, (20, 30)).astype(np.uint16)
    assert (np.asarray(back(images.encode_grey16(wide))) == wide).all()


def test_overlay_and_cutout() -> None:
    mask = np.zeros((20, 30), np.uint8)
    mask[5:] = 255
    tinted = images.overlay(RGB, mask)
    assert (tinted[:5] == RGB[:5]).all()
    assert (tinted[5:] != RGB[5:]).any()
    sixteen = images.overlay(np.full((20, 30), 4000, np.uint16), mask)
    assert sixteen.shape == (20, 30, 3)
    probability = np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)
    cut = images.cutout(GREY, probability)
    assert cut.shape == (20, 30, 4)
    assert (cut[..., 3] == np.rint(probability * 255)).all()
