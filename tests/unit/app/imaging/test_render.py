"""Overlays, cutouts, and the 8-bit RGB that both are made from."""

from __future__ import annotations

import numpy as np

from app.imaging import decode, render
from tests.conftest import FIXTURES

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 30, 3), np.uint8)
GREY = RNG.integers(0, 256, (20, 30), np.uint8)


def test_an_overlay_tints_the_mask_alone() -> None:
    mask = np.zeros((20, 30), np.uint8)
    mask[5:] = 255
    tinted = render.overlay(RGB, mask)
    assert (tinted[:5] == RGB[:5]).all()
    assert (tinted[5:] != RGB[5:]).any()


def test_a_cutout_is_as_opaque_as_the_foreground_is_probable() -> None:
    probability = np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)
    cut = render.cutout(GREY, probability)
    assert cut.shape == (20, 30, 4)
    assert (cut[..., 3] == np.rint(probability * 255)).all()
    assert (cut[..., :3] == GREY[:, :, None]).all()


def test_sixteen_bits_are_shown_over_their_own_range() -> None:
    grey = np.linspace(2000, 6000, 600).astype(np.uint16).reshape(20, 30)
    for image in (grey, np.dstack([grey] * 3)):
        shown = render.to_rgb8(image)
        assert shown.shape == (20, 30, 3)
        assert shown.dtype == np.uint8
        assert shown.min() == 0
        assert shown.max() == 255
    assert (render.to_rgb8(np.full((4, 4), 4000, np.uint16)) == 0).all()


def test_a_dark_sixteen_bit_image_is_shown_bright() -> None:
    data = (FIXTURES / "img2d.tif").read_bytes()
    pixels = decode.decode(data, decode.inspect(data, max_pixels=10**8))
    assert pixels.dtype == np.uint16
    assert pixels.max() < 256  # a division by 256 would leave nothing
    assert render.overlay(pixels, np.zeros(pixels.shape, np.uint8)).max() == 255
