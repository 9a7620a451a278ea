"""Files of two folders become pairs of an image and its mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from model.arrays import AnyArray
from model.errors import DataError
from model.training.pairs import find_pairs


def save(path: Path, array: AnyArray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_empty_and_missing_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    with pytest.raises(DataError, match="images contains no images"):
        find_pairs(tmp_path / "images", tmp_path / "masks")
    with pytest.raises(DataError, match="absent is not a folder"):
        find_pairs(tmp_path / "absent", tmp_path / "masks")


def test_folder_of_images_is_not_the_folder_of_their_masks(tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(DataError, match="is the folder of the images and of the masks"):
        find_pairs(tmp_path, tmp_path)


def test_hidden_files_are_not_images(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        save(tmp_path / folder / "a.png", np.zeros((8, 8), np.uint8))
        (tmp_path / folder / "._a.png").write_bytes(b"AppleDouble")
    assert [pair.id for pair in find_pairs(tmp_path / "images", tmp_path / "masks")] == ["a"]


def test_stack_and_mask_of_different_lengths_are_rejected(tmp_path: Path) -> None:
    for folder, shape in (("images", (3, 8, 8)), ("masks", (8, 8))):
        (tmp_path / folder).mkdir()
        tifffile.imwrite(
            tmp_path / folder / "a.tif", np.zeros(shape, np.uint8), photometric="minisblack"
        )
    with pytest.raises(DataError, match=r"a.tif has 3 pages, but its mask a.tif has 1"):
        find_pairs(tmp_path / "images", tmp_path / "masks")


def test_two_files_with_the_same_name_are_both_named(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg"):
        save(tmp_path / "images" / name, np.zeros((8, 8), np.uint8))
    save(tmp_path / "masks/a.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(DataError, match=r"a.jpg and a.png have the same name"):
        find_pairs(tmp_path / "images", tmp_path / "masks")
