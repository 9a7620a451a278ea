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


def test_sixteen_bit_color_keeps_its_values() -> None:
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
    color = DEEP_RGB.reshape(-1, 3)[7]
    keyed = decode_image(deep_png(DEEP_RGB, (b"tRNS", struct.pack(">3H", *color.tolist()))))
    clear = (color == DEEP_RGB).all(axis=2)
    assert (keyed[clear] == 0).all()
    assert (keyed[~clear] == DEEP_RGB[~clear]).all()


def test_transparency_of_eight_bits_is_laid_on_black() -> None:
    alpha = np.zeros((20, 30, 1), np.uint8)
    alpha[:10] = 255
    pixels = decode_image(encode(np.dstack([RGB, alpha])))
    assert (pixels[:10] == RGB[:10]).all()
    assert (pixels[10:] == 0).all()


def test_a_transparent_palette_color_is_black() -> None:
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
    colors = np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(256, axis=0)
    alpha = colors.swapaxes(0, 1)
    expected = np.rint(colors.astype(float) * alpha / 255)[:, :, 0]
    assert (lay_on_black(colors, alpha) == expected).all()
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


SMOOTH = (np.add.outer(np.arange(128), np.arange(128)) / 254).astype(np.float32)


def test_hot_pixels_do_not_change_the_others() -> None:
    plain = spread(SMOOTH).astype(int)
    for amount in (3.0, 1e6, -1e6, 1e30):
        damaged = SMOOTH.copy()
        damaged[5:8, 5], damaged[60, 60:64] = amount, 2 * amount
        assert np.abs(spread(damaged) - plain).max() <= 800  # the median of the neighbours
        assert np.median(np.abs(spread(damaged) - plain)) == 0


@pytest.mark.parametrize("share", [0.001, 0.3, 0.7])
@pytest.mark.parametrize("value", [np.nan, -np.inf, -9999.0, -3.4028234663852886e38, 1e20])
def test_missing_data_are_black_and_do_not_change_the_others(value: float, share: float) -> None:
    rows = max(1, int(128 * share))
    damaged = np.vstack([np.full((rows, 128), value, np.float32), SMOOTH])
    for inverted in (False, True):
        pixels = spread(damaged, inverted=inverted)
        assert (pixels[:rows] == 0).all()
        assert (pixels[rows:] == spread(SMOOTH, inverted=inverted)).all()


def test_a_value_that_a_tag_names_is_missing_wherever_it_lies() -> None:
    damaged = SMOOTH.copy()
    damaged[:40] = 0.5
    assert (spread(damaged, nodata=0.5)[:40] == 0).all()
    assert (spread(damaged)[:40] > 0).all()
    values = np.arange(400, dtype=np.int32).reshape(20, 20) * 1000
    assert spread(values, nodata=7000.0)[0, 7] == 0
    assert (spread(values, nodata=1e300) == spread(values)).all()  # no value of this type


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint32, np.uint64])
def test_the_full_range_of_a_type_keeps_its_order(dtype: type) -> None:
    limits = np.iinfo(dtype)
    step = (int(limits.max) - int(limits.min)) / 4095
    steps = [min(int(limits.max), int(limits.min) + round(step * i)) for i in range(4096)]
    values = np.array(steps, dtype).reshape(64, 64)
    pixels = spread(values)
    assert (np.diff(pixels.ravel().astype(int)) >= 0).all()
    assert (pixels[0, 0], pixels[-1, -1]) == (0, 65535)


def test_integers_that_fit_into_sixteen_bits_do_so_beside_hot_pixels() -> None:
    values = np.arange(64 * 64, dtype=np.int32).reshape(64, 64)
    damaged = values.copy()
    damaged[3, 3], damaged[40, 40] = 2**31 - 1, -(2**31)
    pixels = spread(damaged)
    same = damaged == values
    assert (pixels[same] == values[same]).all()
    assert abs(int(pixels[40, 40]) - 40 * 65) <= 66


def test_constant_images_are_black_and_two_values_stay_apart() -> None:
    assert (spread(np.full((9, 9), 0.5)) == 0).all()
    assert (spread(np.full((9, 9), -3, np.int16)) == 0).all()
    binary = np.zeros((128, 128), np.float32)
    binary[:3, :4] = 1e9
    assert (spread(binary) == binary.clip(0, 1) * 65535).all()
