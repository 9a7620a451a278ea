"""Random variations of a pair: geometry moves both, light the image alone."""

import numpy as np
import pytest

from model.training.augment import augment
from model.training.recipe import AugmentConfig
from tests.conftest import nuclei


def test_a_crop_is_the_same_for_the_same_place_and_labels_stay_labels():
    image, labels = nuclei(120, 100, seed=1)
    image, labels = np.repeat(image[:, :, None], 3, 2), labels.astype(np.int32)
    config = AugmentConfig(crop=(64, 48))
    first = augment(image, labels, config, np.random.default_rng(5))
    again = augment(image, labels, config, np.random.default_rng(5))
    other = augment(image, labels, config, np.random.default_rng(6))
    assert first[0].shape == (64, 48, 3)
    assert first[0].dtype == np.uint8
    assert first[1].shape == (64, 48)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    assert set(np.unique(other[1])) <= set(np.unique(labels))


def test_image_and_labels_move_together():
    labels = nuclei(160, 160, seed=4)[1].astype(np.int32)
    image = np.repeat(((labels > 0) * 255).astype(np.uint8)[:, :, None], 3, 2)
    config = AugmentConfig(
        crop=(96, 96), gain=0, offset=0, gamma=0, colour=0, noise=0, blur=0, invert=0
    )
    for seed in range(5):
        pixels, moved = augment(image, labels, config, np.random.default_rng(seed))
        assert ((pixels[:, :, 0] > 127) == (moved > 0)).mean() > 0.99


@pytest.mark.parametrize("crop", [(40, 24), (200, 96)], ids=["inside", "higher than the image"])
def test_exact_crops_keep_their_pixels(crop):
    """Every pixel of the image has a value of its own, so that its neighbours tell how it lies."""
    values = np.arange(100 * 120).reshape(100, 120)
    image = np.stack([values % 256, values // 256, np.zeros_like(values)], 2).astype(np.uint8)
    still = dict.fromkeys(("gain", "offset", "gamma", "colour", "noise", "blur", "invert"), 0.0)
    config = AugmentConfig(crop=crop, unresampled=1, **still)
    found = set()
    for seed in range(60):
        pixels, moved = augment(image, values, config, np.random.default_rng(seed))
        assert moved.shape == crop
        assert np.array_equal(pixels[:, :, 0] + 256 * pixels[:, :, 1].astype(int), moved)
        right, down = moved[10, 11] - moved[10, 10], moved[11, 10] - moved[10, 10]
        found.add((int(right), int(down)))
    ways = {(a * x, b * y) for x, y in ((1, 120), (120, 1)) for a in (1, -1) for b in (1, -1)}
    assert found == ways  # four turns, mirrored or not
