"""Files of every format but TIFF -> pixels, and what TIFFs share with them."""

from __future__ import annotations

import io
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
from PIL import Image, ImageOps

from model.pixels import decode_image, lay_on_black, spread, turn
from tests.conftest import encode

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 30, 3), np.uint8)
GREY = RNG.integers(0, 256, (20, 30), np.uint8)
DEEP_RGB = RNG.integers(0, 65536, (20, 30, 3)).astype(np.uint16)


def saved(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def deep_png(values: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of (H, W, C) uint16, with further chunks after IHDR."""
    plain: bytes = imagecodecs.png_encode(values)
    extra = b"".join(
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        for kind, data in chunks
    )
    return plain[:33] + extra + plain[33:]


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_give_the_same_pixels(format: str) -> None:
    assert (decode_image(encode(RGB, format)) == RGB).all()
    assert (decode_image(encode(GREY, format)) == GREY).all()


def test_sixteen_bit_grey_keeps_its_values() -> None:
    values = RNG.integers(200, 5000, (20, 30)).astype(np.uint16)
    assert (decode_image(encode(values)) == values).all()


def test_sixteen_bit_colour_keeps_its_values() -> None:
    for chunks in ((), ((b"gAMA", struct.pack(">I", 45455)), (b"sBIT", b"\x0c\x0c\x0c"))):
        assert (decode_image(deep_png(DEEP_RGB, *chunks)) == DEEP_RGB).all()


def test_transparency_of_sixteen_bits_is_laid_on_black() -> None:
    alpha = np.full((20, 30, 1), 65535, np.uint16)
    alpha[:5], alpha[5:10] = 0, 20_000
    expected = DEEP_RGB * (alpha / 65535)
    with_alpha = decode_image(deep_png(np.dstack([DEEP_RGB, alpha])))
    assert np.abs(with_alpha - expected).max() <= 0.5
    grey = decode_image(deep_png(np.dstack([DEEP_RGB[:, :, :1], alpha])))
    assert grey.shape == (20, 30)
    assert np.abs(grey - expected[:, :, 0]).max() <= 0.5
    colour = DEEP_RGB.reshape(-1, 3)[7]
    keyed = decode_image(deep_png(DEEP_RGB, (b"tRNS", struct.pack(">3H", *colour.tolist()))))
    clear = (colour == DEEP_RGB).all(axis=2)
    assert (keyed[clear] == 0).all()
    assert (keyed[~clear] == DEEP_RGB[~clear]).all()


def test_transparency_of_eight_bits_is_laid_on_black() -> None:
    alpha = np.zeros((20, 30, 1), np.uint8)
    alpha[:10] = 255
    pixels = decode_image(encode(np.dstack([RGB, alpha])))
    assert (pixels[:10] == RGB[:10]).all()
    assert (pixels[10:] == 0).all()


def test_a_transparent_palette_colour_is_black() -> None:
    image = Image.fromarray(GREY // 128).convert("P")
    image.putpalette([200, 100, 50, 10, 20, 30])
    pixels = decode_image(saved(image, transparency=0))
    assert (pixels[GREY < 128] == 0).all()
    assert (pixels[GREY >= 128] == (10, 20, 30)).all()


def test_cmyk_and_bilevel_become_what_they_show() -> None:
    cmyk = decode_image(saved(Image.new("CMYK", (9, 8), (0, 255, 255, 0)), "JPEG"))
    assert cmyk.shape == (8, 9, 3)
    assert cmyk[0, 0, 0] > 200 > 60 > cmyk[0, 0, 1]  # red
    bilevel = decode_image(saved(Image.fromarray(GREY > 128), "PNG"))
    assert set(np.unique(bilevel)) == {0, 255}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("depth", [8, 16])
def test_orientation_is_applied(depth: int, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain = saved(Image.fromarray(RGB), exif=exif.tobytes())
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(plain))))
    if depth == 8:
        assert (decode_image(plain) == expected).all()
    else:
        chunk = exif.tobytes().removeprefix(b"Exif\0\0")
        wide = deep_png(RGB.astype(np.uint16) * 257, (b"eXIf", chunk))
        assert (decode_image(wide) == expected * np.uint16(257)).all()


def test_damage_raises_errors_that_training_maps() -> None:
    for data in (b"", b"hello", encode(RGB)[:200], encode(RGB, "TIFF")[:300], b"II*\0"):
        with pytest.raises((OSError, ValueError, SyntaxError)):
            decode_image(data)


def test_turn_returns_a_view() -> None:
    for orientation in range(1, 9):
        assert np.shares_memory(turn(RGB, orientation), RGB)


def test_alpha_rounds_to_the_nearest() -> None:
    colours = np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(256, axis=0)
    alpha = colours.swapaxes(0, 1)
    expected = np.rint(colours.astype(float) * alpha / 255)[:, :, 0]
    assert (lay_on_black(colours, alpha) == expected).all()
    largest = np.full((1, 1, 1), 65535, np.uint16)
    assert lay_on_black(largest, largest)[0, 0] == 65535


def test_spread_fills_sixteen_bits_by_blocks_as_at_once() -> None:
    values = RNG.normal(size=(1500, 1000))  # more than one block
    low, high = values.min(), values.max()
    expected = np.rint((values - low) / (high - low) * 65535)
    assert np.abs(spread(values) - expected).max() <= 1
    assert np.abs(spread(values, inverted=True) - (65535 - expected)).max() <= 1


def test_spread_takes_the_largest_range_of_float64() -> None:
    most = np.finfo(np.float64).max
    assert spread(np.array([[-most, 0.0, most]])).tolist() == [[0, 32768, 65535]]
