"""Overlays and cutouts."""

from __future__ import annotations

import numpy as np
import pytest

from app.imaging import render
from model.arrays import BoolArray, FloatArray

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 30, 3), np.uint8)
GREY = RNG.integers(0, 256, (20, 30), np.uint8)


def draw_disc(
    slope: float, center: float = 50.3, radius: float = 30.4
) -> tuple[BoolArray, FloatArray]:
    """A disc, and the margin of a probability that falls by `slope` per pixel at its border."""
    y, x = np.mgrid[:100, :100]
    distance = radius - np.hypot(x - center, y - center)
    margin = np.clip(distance * slope, -0.5, 0.5).astype(np.float32)
    return margin >= 0, margin


def test_an_overlay_tints_the_mask_alone() -> None:
    mask = np.zeros((20, 30), np.uint8)
    mask[5:] = 255
    for image in (RGB, GREY):
        tinted = render.overlay(image, mask)
        assert tinted.shape == RGB.shape
        assert (tinted[:5] == render.to_rgb(image)[:5]).all()
        assert (tinted[5:] != render.to_rgb(image)[5:]).any()


@pytest.mark.parametrize("slope", [0.01, 0.1, 0.5, 5.0])
def test_a_cutout_is_soft_at_the_edge_alone(slope: float) -> None:
    mask, margin = draw_disc(slope)
    alpha = render.soften_edge(mask.astype(np.uint8), margin)
    y, x = np.mgrid[:100, :100]
    distance = 30.4 - np.hypot(x - 50.3, y - 50.3)
    assert (alpha[distance > 3] == 255).all()
    assert (alpha[distance < -3] == 0).all()
    if slope < 0.5:  # the probability is not 0 or 1 within the ramp
        np.testing.assert_allclose(alpha, 255 * np.clip((distance + 1) / 2, 0, 1), atol=12)


def test_a_cutout_has_no_holes_where_the_model_is_less_certain() -> None:
    mask = np.ones((40, 40), np.uint8)
    margin = RNG.uniform(0.0, 0.5, mask.shape).astype(np.float32)
    assert (render.soften_edge(mask, margin) == 255).all()


def test_parts_removed_from_the_mask_are_transparent() -> None:
    mask, margin = draw_disc(0.1)
    assert (render.soften_edge(np.zeros_like(mask, np.uint8), margin) == 0).all()
    mask[:, 50:] = False
    alpha = render.soften_edge(mask.astype(np.uint8), margin)
    assert (alpha[:, 52:] == 0).all()
    assert alpha[50, 45] == 255


def test_opacity_does_not_depend_on_how_many_rows_are_computed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    margin = draw_disc(0.1)[1]
    noisy = margin + RNG.normal(0, 0.1, margin.shape).astype(np.float32)
    whole = render.soften_edge((noisy >= 0).astype(np.uint8), noisy)
    for pixels in (1, 700):
        monkeypatch.setattr(render, "_BLOCK_PIXELS", pixels)
        blocks = render.soften_edge((noisy >= 0).astype(np.uint8), noisy)
        np.testing.assert_array_equal(blocks, whole)


def test_tiny_masks_have_an_edge_too() -> None:
    for shape in ((1, 1), (1, 7), (3, 1)):
        for value in (0, 255):
            mask = np.full(shape, value, np.uint8)
            alpha = render.soften_edge(mask, mask.astype(np.float32) / 255 - 0.5)
            np.testing.assert_array_equal(alpha, mask)


def test_a_cutout_is_transparent_or_on_a_background() -> None:
    alpha = np.zeros((20, 30), np.uint8)
    alpha[:, 10:20], alpha[:, 20:] = 128, 255
    transparent = render.cutout(GREY, alpha)
    np.testing.assert_array_equal(transparent[..., :3], render.to_rgb(GREY))
    np.testing.assert_array_equal(transparent[..., 3], alpha)
    opaque = render.cutout(RGB, alpha, (10, 200, 30))
    assert opaque.shape == RGB.shape
    assert (opaque[:, :10] == (10, 200, 30)).all()
    np.testing.assert_array_equal(opaque[:, 20:], RGB[:, 20:])
    half = (RGB[:, 10:20] * (128 / 255) + np.array((10, 200, 30)) * (127 / 255)).round()
    np.testing.assert_allclose(opaque[:, 10:20], half, atol=1)


def test_a_mask_grows_by_rows_and_columns() -> None:
    mask = np.zeros((9, 9), bool)
    mask[4, 4] = True
    grown = render.grow(mask, 2)
    assert grown[2:7, 2:7].all()
    assert grown.sum() == 25
    assert render.grow(np.ones((1, 1), bool), 2).all()
