"""Augmentation: geometry changes image and labels together, intensities change only the image."""

from __future__ import annotations

import numpy as np
import pytest

from model.training.augment import augment
from model.training.sections import AugmentConfig
from tests.conftest import nuclei

SAME_INTENSITIES: dict[str, float] = dict.fromkeys(
    ("gain", "offset", "gamma", "color", "noise", "blur", "invert"), 0.0
)


def test_same_seed_gives_the_same_crop() -> None:
    image, labels = nuclei(120, 100, seed=1)
    pixels, labels = np.repeat(image[:, :, None], 3, 2), labels.astype(np.int32)
    config = AugmentConfig(crop=(64, 48))
    first, again, other = (
        augment(pixels, labels, config, np.random.default_rng(seed)) for seed in (5, 5, 6)
    )
    assert first[0].shape == (64, 48, 3)
    assert first[0].dtype == np.uint8
    assert first[1].shape == (64, 48)
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


def test_resampling_creates_no_new_labels() -> None:
    image, labels = nuclei(120, 100, seed=1)
    pixels, labels = np.repeat(image[:, :, None], 3, 2), labels.astype(np.int32)
    for seed in range(5):
        crop = augment(pixels, labels, AugmentConfig(crop=(64, 48)), np.random.default_rng(seed))
        assert set(np.unique(crop[1])) <= set(np.unique(labels))


def test_image_and_labels_move_together() -> None:
    labels = nuclei(160, 160, seed=4)[1].astype(np.int32)
    image = np.repeat(((labels > 0) * 255).astype(np.uint8)[:, :, None], 3, 2)
    config = AugmentConfig(crop=(96, 96), **SAME_INTENSITIES)  # type: ignore[arg-type]
    for seed in range(5):
        pixels, moved = augment(image, labels, config, np.random.default_rng(seed))
        assert ((pixels[:, :, 0] > 127) == (moved > 0)).mean() > 0.99


@pytest.mark.parametrize("crop", [(40, 24), (200, 96)], ids=["inside", "higher than the image"])
def test_unresampled_crops_keep_their_pixels(crop: tuple[int, int]) -> None:
    """Every pixel of the image has its own value, so two neighbours show the orientation."""
    values = np.arange(100 * 120, dtype=np.int32).reshape(100, 120)
    image = np.stack([values % 256, values // 256, np.zeros_like(values)], 2).astype(np.uint8)
    config = AugmentConfig(crop=crop, unresampled=1, **SAME_INTENSITIES)  # type: ignore[arg-type]
    found = set()
    for seed in range(60):
        pixels, moved = augment(image, values, config, np.random.default_rng(seed))
        assert moved.shape == crop
        assert np.array_equal(pixels[:, :, 0] + 256 * pixels[:, :, 1].astype(int), moved)
        right, down = moved[10, 11] - moved[10, 10], moved[11, 10] - moved[10, 10]
        found.add((int(right), int(down)))
    ways = {(a * x, b * y) for x, y in ((1, 120), (120, 1)) for a in (1, -1) for b in (1, -1)}
    assert found == ways  # four rotations, each mirrored or not
