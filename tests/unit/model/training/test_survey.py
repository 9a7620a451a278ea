"""The values of masks alone say whether they are binary, classes or instances."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.arrays import AnyArray
from model.errors import DataError
from model.training.masks import StoredMask
from model.training.pairs import Pair
from model.training.survey import (
    MaskMeaning,
    check_not_image,
    summarize_mask,
    survey_images,
    understand_masks,
)
from tests.conftest import nuclei


def understand(*masks: AnyArray, palette: AnyArray | None = None) -> MaskMeaning:
    return understand_masks([summarize_mask(StoredMask(mask, palette)) for mask in masks])


def random_classes(classes: list[int], seed: int = 0) -> AnyArray:
    """Scattered classes: each is in many pieces."""
    return np.random.default_rng(seed).choice(classes, (20, 20)).astype(np.uint8)


@pytest.mark.parametrize("high", [1, 255, 7])
def test_two_values_are_binary(high: int) -> None:
    meaning = understand(random_classes([0, high]), np.zeros((20, 20), np.uint8))
    assert (meaning.labels, meaning.ignore) == ("binary", -1)
    assert f"0 and {high}" in meaning.reason
    assert meaning.shares[0] == pytest.approx(0.25, abs=0.05)


def test_small_values_in_many_pieces_are_classes() -> None:
    meaning = understand(random_classes([0, 1, 2]), random_classes([0, 2, 11], 1))
    assert meaning.labels == "classes"
    assert meaning.values == tuple(range(12))
    assert meaning.shares[5] == 0
    assert not meaning.colors


def test_values_that_differ_by_image_and_are_one_piece_are_instances() -> None:
    fields = [nuclei(220, 220, seed=seed)[1] for seed in range(3)]
    fields[0] = np.where(fields[0] > 4, 0, fields[0])
    assert 8 <= max(field.max() for field in fields) < 30
    meaning = understand(*(field.astype(np.uint16) for field in fields))
    assert meaning.labels == "instances"


def test_classes_of_one_piece_come_with_an_advice() -> None:
    organs = np.zeros((30, 30), np.uint8)
    organs[2:9], organs[12:18], organs[20:28] = 1, 2, 3
    meaning = understand(organs, organs.copy())
    assert meaning.labels == "classes"
    assert "--labels instances" in meaning.reason


@pytest.mark.parametrize(("classes", "labels"), [([0, 1, 255], "binary"), ([0, 3, 255], "binary")])
def test_255_beside_small_values_is_no_label(classes: list[int], labels: str) -> None:
    meaning = understand(random_classes(classes))
    assert (meaning.labels, meaning.ignore) == (labels, 255)
    meaning = understand(random_classes([0, 1, 2, 255]))
    assert (meaning.labels, meaning.ignore, meaning.values) == ("classes", 255, (0, 1, 2))


def test_files_with_1_and_files_with_255_are_binary() -> None:
    meaning = understand(random_classes([0, 1]), random_classes([0, 255]))
    assert (meaning.labels, meaning.ignore) == ("binary", -1)


def test_grey_values_with_gaps_are_classes_by_value() -> None:
    meaning = understand(random_classes([0, 100, 200]))
    assert meaning.labels == "classes"
    assert meaning.colors == ((0, 0, 0), (100, 100, 100), (200, 200, 200))
    meaning = understand(random_classes([1, 2, 3]))
    assert set(meaning.colors) == {(1, 1, 1), (2, 2, 2), (3, 3, 3)}


def test_colors_are_classes_and_those_of_voc_have_no_label() -> None:
    table = np.array([(0, 0, 0), (128, 0, 0), (0, 128, 0), (224, 224, 192)], np.uint8)
    meaning = understand(table[random_classes([0, 1, 2, 3])])
    assert (meaning.labels, meaning.ignore) == ("classes", 255)
    assert meaning.colors == ((0, 0, 0), (0, 128, 0), (128, 0, 0))


def test_palette_whose_white_is_0_is_binary() -> None:
    palette = np.array([(255, 255, 255), (0, 0, 0)], np.uint8)
    mask = np.ones((10, 10), np.uint8)
    mask[:2] = 0
    meaning = understand(mask, palette=palette)
    assert (meaning.labels, meaning.shares) == ("binary", (pytest.approx(0.2),))


@pytest.mark.parametrize(
    ("masks", "says"),
    [
        ([np.zeros((9, 9), np.uint8)] * 2, "all masks are empty"),
        ([np.full((9, 9), 255, np.uint8)] * 2, "every mask is 255; no pixel is background"),
        ([np.full((9, 9), 3, np.uint16)], "every mask is 3"),
        ([np.array([[-1, 0], [1, 2]], np.int16)], "the value -1"),
        ([random_classes([1, 255])], "every mask is 1, beside 255, which is taken for no label"),
        ([np.random.default_rng(0).integers(0, 4000, (90, 90), np.uint16)], "too many for classes"),
    ],
)
def test_masks_that_cannot_be_right_are_rejected(masks: list[AnyArray], says: str) -> None:
    with pytest.raises(DataError, match=says):
        understand(*masks)


def test_image_as_its_own_mask_is_rejected(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.fromarray(random_classes(list(range(200)))).save(tmp_path / name)
    with pytest.raises(DataError, match=r"b.png equals its image"):
        check_not_image(Pair("a", tmp_path / "a.png", tmp_path / "b.png", "a"))


def test_size_depth_and_colors_of_images(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((10, 20), np.uint16)).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((30, 20, 3), np.uint8)).save(tmp_path / "b.png")
    pairs = [Pair(name, tmp_path / name, tmp_path / name, name) for name in ("a.png", "b.png")]
    survey = survey_images(pairs)
    assert (survey.sizes, survey.is_color, survey.bits) == (((10, 20), (30, 20)), False, 16)
    assert survey.middle == (20, 20)
