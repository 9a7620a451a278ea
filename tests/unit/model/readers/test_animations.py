"""GIF and WebP: the first frame as viewers show it, the number of frames, and truncation."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image

from model.pixels import decode_image
from model.readers import open_image
from model.readers.base import MissingPixels
from tests.conftest import nuclei
from tests.unit.model.readers.writers import saved

GREY = nuclei(64, 80)[0]
RGB = np.dstack([GREY, 255 - GREY, GREY // 2])
FRAMES = {
    "save_all": True,
    "append_images": [Image.fromarray(255 - RGB), Image.fromarray(RGB // 2)],
    "duration": 50,
}
COLORS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (9, 9, 9)]


def gif(canvas: tuple[int, int], at: tuple[int, int], transparent: int | None = None) -> bytes:
    """A GIF of a frame of 6 x 5 pixels of color 1, with an uncompressed LZW code."""
    header = b"GIF89a" + struct.pack("<HHBBB", *canvas, 0x91, 0, 0)
    table = b"".join(bytes(color) for color in COLORS)
    control = b"" if transparent is None else b"\x21\xf9\4\1\0\0" + bytes([transparent, 0])
    codes = [code for _ in range(30) for code in (4, 1)] + [5]  # clear, pixel, ..., end
    bits = [code >> bit & 1 for code in codes for bit in range(3)]
    body = np.packbits(np.array(bits, np.uint8), bitorder="little").tobytes()
    frame = b"\x2c" + struct.pack("<HHHHB", *at, 6, 5, 0) + b"\2" + bytes([len(body)]) + body
    return header + table + control + frame + b"\0;"


@pytest.mark.parametrize("transparent", [None, 2])
def test_what_the_first_frame_of_a_gif_does_not_cover_is_black(transparent: int | None) -> None:
    pixels = decode_image(gif((20, 21), (3, 4), transparent))
    expected = np.zeros((21, 20, 3), np.uint8)
    expected[4:9, 3:9] = COLORS[1]
    assert (pixels == expected).all()


def test_transparent_pixels_of_a_gif_are_black() -> None:
    assert not decode_image(gif((6, 5), (0, 0), transparent=1)).any()
    assert (decode_image(gif((6, 5), (0, 0))) == COLORS[1]).all()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "AVIF"])
def test_an_animation_gives_its_first_frame_and_its_number_of_frames(format: str) -> None:
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 95}}.get(format, {})
    first = Image.fromarray(RGB)
    data = saved(first, format, **FRAMES, **options)
    assert open_image(data).pages == 3
    assert open_image(saved(first, format)).pages == 1
    assert np.abs(decode_image(data) - RGB.astype(int)).mean() < (8 if format == "GIF" else 4)


def test_a_gif_needs_its_pixels_and_not_its_trailer() -> None:
    whole = saved(GREY, "GIF")
    for missing in (1, 2):
        assert (decode_image(whole[:-missing]) == decode_image(whole)).all()
    for missing in (10, len(whole) // 2):
        with pytest.raises(OSError, match="truncated"):
            decode_image(whole[:-missing])


def webp(**options: object) -> bytes:
    return saved(RGB, "WEBP", **options)


@pytest.mark.parametrize(
    "options", [{}, {"lossless": True}, FRAMES], ids=["lossy", "lossless", "frames"]
)
def test_missing_pixels_of_a_webp_are_an_error(options: dict[str, object]) -> None:
    whole = saved(Image.fromarray(RGB), "WEBP", **options)
    for length in (len(whole) - 3, len(whole) // 2):
        with pytest.raises(MissingPixels, match=r"truncated: \d+ of \d+ bytes of pixels"):
            decode_image(whole[:length])
    if not options.get("save_all"):
        half = len(whole) // 2
        with pytest.raises(MissingPixels, match="are zeros"):
            decode_image(whole[:half] + bytes(len(whole) - half))


@pytest.mark.parametrize("size", [0, 4, 1 << 31])
def test_the_size_in_the_header_of_a_webp_does_not_matter(size: int) -> None:
    whole = webp(lossless=True)
    data = whole[:4] + struct.pack("<I", size) + whole[8:] + b"bytes after the image"
    assert (decode_image(data) == RGB).all()


def test_damaged_metadata_of_a_webp_does_not_matter() -> None:
    whole = saved(RGB, "WEBP", lossless=True, exif=b"Exif\0\0abcd", icc_profile=b"x" * 99)
    assert (decode_image(whole) == RGB).all()
    assert (decode_image(whole[:-5]) == RGB).all()  # EXIF is the last chunk
    at = whole.index(b"ICCP")
    without = whole[:at] + whole[at + 8 + 100 :]
    assert (decode_image(without) == RGB).all()


@pytest.mark.parametrize("side", [64, 2000])
def test_a_white_webp_is_complete(side: int) -> None:
    white = np.full((side, side, 3), 255, np.uint8)
    assert (decode_image(saved(white, "WEBP")) == 255).all()


def test_transparency_is_laid_on_black() -> None:
    alpha = np.full(GREY.shape, 51, np.uint8)
    data = saved(np.dstack([RGB, alpha]), "WEBP", lossless=True, exact=True)
    assert np.abs(decode_image(data) - RGB / 5).max() <= 0.5
