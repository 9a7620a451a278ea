"""Masks are found by the names that programs and people give them."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.training.naming import match_names


def match(images: list[str], masks: list[str], folders: tuple[str, str]) -> dict[str, str]:
    a, b = map(Path, folders)
    found = match_names(a, [a / name for name in images], b, [b / name for name in masks])
    return {
        image.relative_to(a).as_posix(): mask.relative_to(b).as_posix()
        for image, mask in found.pairs.items()
    }


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("a1.jpg", "a1.png"),
        ("car_01.jpg", "car_01_mask.gif"),
        ("x.png", "x_label.png"),
        ("x.png", "x-seg.tif"),
        ("img_7.png", "mask_7.png"),
        ("image012.png", "label012.png"),
        ("0001TP_006690.png", "0001TP_006690_L.png"),
        ("train-volume.tif", "train-labels.tif"),
        ("aachen_0_leftImg8bit.png", "aachen_0_gtFine_labelIds.png"),
        ("train/a/1.png", "train/a/1_mask.png"),
        ("train/1.png", "1.png"),
    ],
)
def test_names_match(image: str, mask: str) -> None:
    other = ("other.jpg", "other.png")
    found = match([image, other[0]], [mask, other[1]], ("images", "masks"))
    assert found == {image: mask, other[0]: other[1]}


def test_one_folder_with_both_kinds() -> None:
    files = ["a.png", "a_mask.png", "b.png", "b_mask.png", "c.png"]
    assert match(files, [], ("data", "data")) == {"a.png": "a_mask.png", "b.png": "b_mask.png"}
    files = ["images/a.png", "masks/a.png", "images/b.png", "masks/b.png"]
    found = match(files, [], ("data", "data"))
    assert found == {"images/a.png": "masks/a.png", "images/b.png": "masks/b.png"}


def test_name_of_two_masks_matches_nothing() -> None:
    found = match(["a.png", "b.png"], ["a_mask.png", "a_seg.png", "b.png"], ("images", "masks"))
    assert found == {"b.png": "b.png"}


def test_other_names_do_not_match() -> None:
    assert match(["a1.png"], ["a2.png"], ("images", "masks")) == {}
