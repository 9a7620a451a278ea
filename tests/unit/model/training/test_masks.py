"""Mask files of every kind become labels, or are rejected with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from model.arrays import AnyArray
from model.errors import DataError
from model.evaluation.metrics import VOID
from model.training.masks import MaskCoding, read_mask, read_stored_mask

CLASSES = np.array([[0, 1], [2, 1]])
COLORS = ((0, 0, 0), (128, 0, 0), (0, 128, 0))


def save(folder: Path, array: AnyArray, name: str = "a.png", **options: Any) -> Path:
    path = folder / name
    Image.fromarray(array).save(path, **options)
    return path


def color(classes: AnyArray) -> AnyArray:
    return np.array(COLORS, np.uint8)[classes]


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "a.npy"])
def test_colors_of_classes_become_their_indices(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.npy":
        np.save(path, color(CLASSES))
    elif name == "a.tif":
        tifffile.imwrite(path, color(CLASSES), photometric="rgb")
    else:
        save(tmp_path, color(CLASSES), name, lossless=True)
    coding = MaskCoding("classes", 3, colors=COLORS)
    assert np.array_equal(read_mask(path, None, coding), CLASSES)


def test_palette_is_read_by_its_colors_if_classes_have_colors(tmp_path: Path) -> None:
    image = Image.fromarray((2 - CLASSES).astype(np.uint8)).convert("P")
    image.putdata((2 - CLASSES).ravel().tolist())
    image.putpalette([value for color in reversed(COLORS) for value in color])
    image.save(tmp_path / "a.png")
    coding = MaskCoding("classes", 3, colors=COLORS)
    assert np.array_equal(read_mask(tmp_path / "a.png", None, coding), CLASSES)


def test_grey_values_are_colors_too(tmp_path: Path) -> None:
    path = save(tmp_path, (CLASSES * 100).astype(np.uint8))
    coding = MaskCoding("classes", 3, colors=((0, 0, 0), (100, 100, 100), (200, 200, 200)))
    assert np.array_equal(read_mask(path, None, coding), CLASSES)


def test_unknown_color_is_an_error_or_void(tmp_path: Path) -> None:
    path = save(tmp_path, color(CLASSES))
    with pytest.raises(DataError, match=r"a.png contains the color \[0, 128, 0\], which is not"):
        read_mask(path, None, MaskCoding("classes", 2, colors=COLORS[:2]))
    labels = read_mask(path, None, MaskCoding("classes", 2, 255, COLORS[:2]))
    assert np.array_equal(labels, [[0, 1], [VOID, 1]])


def test_ignored_value_has_no_label(tmp_path: Path) -> None:
    path = save(tmp_path, np.array([[0, 1], [255, 2]], np.uint8))
    assert np.array_equal(read_mask(path, None, MaskCoding("classes", 3, 255)), [[0, 1], [VOID, 2]])
    assert np.array_equal(
        read_mask(path, None, MaskCoding("binary", ignore=255)), [[0, 1], [VOID, 1]]
    )


def test_negative_label_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.array([[0, -1], [1, 2]], np.int16))
    for kind in ("binary", "instances", "classes"):
        with pytest.raises(DataError, match=r"a.tif contains the label -1; labels are 0 or more"):
            read_mask(path, None, MaskCoding(kind, 3))


def test_objects_may_have_colors(tmp_path: Path) -> None:
    labels = read_mask(save(tmp_path, color(CLASSES)), None, MaskCoding("instances"))
    assert np.array_equal(labels, [[0, 2], [1, 2]])


def test_two_colors_are_a_binary_mask_and_more_are_not(tmp_path: Path) -> None:
    labels = read_mask(save(tmp_path, color(CLASSES % 2)), None, MaskCoding())
    assert np.array_equal(labels, CLASSES % 2)
    with pytest.raises(DataError, match="3 channels and 3 colors; a binary mask has two"):
        read_mask(save(tmp_path, color(CLASSES)), None, MaskCoding())


def test_lossy_webp_is_rejected_for_several_values(tmp_path: Path) -> None:
    path = save(
        tmp_path, np.kron(CLASSES, np.ones((16, 16))).astype(np.uint8), "a.webp", quality=50
    )
    with pytest.raises(DataError, match="lossy compression"):
        read_mask(path, None, MaskCoding("classes", 3))
    assert read_mask(path, None, MaskCoding()).shape == (32, 32)


@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
def test_colors_with_lossy_compression_are_rejected(tmp_path: Path, name: str) -> None:
    colors = np.kron(color(CLASSES), np.ones((20, 20, 1), np.uint8))
    path = save(tmp_path, colors, name, quality=80)
    with pytest.raises(DataError, match="has colors and lossy compression, which changes them"):
        read_mask(path, None, MaskCoding())
    grey = np.kron(np.array([[0, 255]], np.uint8), np.ones((20, 20), np.uint8))
    path = save(tmp_path, np.dstack([grey] * 3), name, quality=80)
    assert set(np.unique(read_mask(path, None, MaskCoding()))) == {0, 1}


def test_photograph_is_not_a_mask(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with pytest.raises(DataError, match="as a photograph has"):
        read_stored_mask(save(tmp_path, pixels))


def test_transparency_alone_is_a_mask(tmp_path: Path) -> None:
    rgba = np.full((2, 2, 4), 255, np.uint8)
    rgba[:, :, 3] = CLASSES * 100
    assert np.array_equal(read_mask(save(tmp_path, rgba), None, MaskCoding()), CLASSES > 0)
    rgba[0, 0, :3] = 7
    with pytest.raises(DataError, match="colors and transparency"):
        read_mask(save(tmp_path, rgba), None, MaskCoding())
