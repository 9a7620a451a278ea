"""Arrays -> PNG: what comes back is what went in."""

from __future__ import annotations

import io

import imagecodecs
import numpy as np
from PIL import Image

from app.imaging import png
from tests.conftest import encode, nuclei

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 30, 3), np.uint8)
GREY = RNG.integers(0, 256, (20, 30), np.uint8)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_a_mask_comes_back() -> None:
    mask = np.where(GREY > 100, 255, 0).astype(np.uint8)
    assert (np.asarray(opened(png.encode_mask(mask))) == mask).all()
    assert opened(png.encode_mask(mask)).mode == "L"


def test_strides_and_thin_images_come_back() -> None:
    for strange in (GREY[:, ::2], GREY[:1], GREY[:, :1], np.asfortranarray(GREY)):
        assert (np.asarray(opened(png.encode_mask(strange))) == strange).all()


def test_labels_come_back_with_their_palette() -> None:
    labels = (GREY % 3).astype(np.uint8)
    palette = [(0, 0, 0), (255, 0, 0), (0, 255, 0)]
    image = opened(png.encode_labels(labels, palette))
    assert image.mode == "P"
    assert (np.asarray(image) == labels).all()
    assert image.convert("RGB").getpixel((0, 0)) == palette[labels[0, 0]]


def test_sixteen_bits_come_back() -> None:
    wide = RNG.integers(0, 65536, (20, 30)).astype(np.uint16)
    assert (np.asarray(opened(png.encode_grey16(wide))) == wide).all()


def test_pictures_come_back() -> None:
    assert (np.asarray(opened(png.encode_picture(GREY))) == GREY).all()
    assert (np.asarray(opened(png.encode_picture(RGB))) == RGB).all()
    rgba = np.dstack([RGB, GREY])
    assert (np.asarray(opened(png.encode_picture(rgba))) == rgba).all()
    assert (imagecodecs.png_decode(png.encode_picture(rgba)) == rgba).all()


def test_a_mask_takes_few_bytes() -> None:
    mask = (nuclei(512, 512)[1] > 0) * np.uint8(255)
    assert len(png.encode_mask(mask)) < 1.5 * len(encode(mask))
