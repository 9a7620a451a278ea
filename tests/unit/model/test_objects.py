"""The objects of an image: which are found, which are removed from the mask as well."""

from __future__ import annotations

import numpy as np
import pytest

from model.config import PreprocessConfig
from model.instances import MIN_PIXELS
from model.objects import Objects, select_objects
from model.transforms import to_mask

SEVERAL = PreprocessConfig(
    classes=("background", "cell", "debris"), palette=((0, 0, 0), (255, 0, 0), (0, 255, 0))
)
SIZES = {"speck": 16, "small": 49, "large": 400}


def draw() -> np.ndarray:
    """Foreground of a speck, a small and a large square, and a large one at the edge."""
    foreground = np.zeros((80, 80), bool)
    foreground[3:7, 3:7] = True
    foreground[10:17, 10:17] = True
    foreground[30:50, 30:50] = True
    foreground[60:, 40:60] = True
    return foreground


def select(config: PreprocessConfig, **options: object) -> tuple[Objects, np.ndarray]:
    foreground = draw()
    if config.binary:
        probabilities = np.stack([np.where(foreground, 0.9, 0.1), np.zeros(foreground.shape)])
    else:
        probabilities = np.full((3, *foreground.shape), 0.1)
        probabilities[1][foreground] = 0.7
        probabilities[2, 60:][foreground[60:]] = 0.8
        probabilities[0][~foreground] = 0.8
    values = probabilities.astype(np.float32)
    mask = to_mask(values, config)
    return select_objects(values, mask, config, config.threshold, **options)  # type: ignore[arg-type]


def test_all_that_is_removed_by_default_are_specks_from_the_objects() -> None:
    objects, mask = select(PreprocessConfig())
    assert objects.areas.tolist() == [49, 400, 400]
    assert min(objects.areas) >= MIN_PIXELS
    assert (mask > 0).sum() == draw().sum()
    np.testing.assert_allclose(objects.scores, 0.9, rtol=1e-6)


@pytest.mark.parametrize(
    ("min_area", "areas"), [(1, [16, 49, 400, 400]), (50, [400, 400]), (401, [])]
)
@pytest.mark.parametrize("config", [PreprocessConfig(), SEVERAL], ids=["binary", "several"])
def test_smaller_objects_leave_the_mask_too(
    config: PreprocessConfig, min_area: int, areas: list[int]
) -> None:
    objects, mask = select(config, min_area=min_area)
    assert objects.areas.tolist() == areas
    np.testing.assert_array_equal(mask > 0, objects.labels > 0)


@pytest.mark.parametrize("config", [PreprocessConfig(), SEVERAL], ids=["binary", "several"])
def test_objects_at_the_edge_leave_the_mask_too(config: PreprocessConfig) -> None:
    objects, mask = select(config, exclude_edges=True)
    assert not mask[-1].any()
    assert mask[40, 40]
    assert objects.labels[-1].max() == 0
    assert objects.areas.max() == 400


def test_connected_parts_of_each_class_are_objects() -> None:
    objects, mask = select(SEVERAL)
    assert objects.areas.tolist() == [16, 49, 400, 400]
    assert objects.classes.tolist() == [1, 1, 1, 2]
    np.testing.assert_allclose(objects.scores, [0.7, 0.7, 0.7, 0.8], rtol=1e-6)
    for label, kind in enumerate(objects.classes, start=1):
        assert set(mask[objects.labels == label]) == {kind}


def test_uncertain_parts_stay_in_the_mask_alone() -> None:
    foreground = np.where(draw(), 0.55, 0.1).astype(np.float32)[None]
    config = PreprocessConfig()
    objects, mask = select_objects(foreground, to_mask(foreground, config), config, 0.5)
    assert objects.count == 0
    assert (mask > 0).sum() == draw().sum()
