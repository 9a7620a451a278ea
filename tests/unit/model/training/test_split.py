"""The split into training and validation: groups, tables and lists of images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from model.arrays import AnyArray
from model.config import PreprocessConfig
from model.errors import DataError
from model.training.data import PairedDataset, open_dataset
from model.training.pairs import find_pairs
from model.training.sections import DataConfig
from model.training.split import split_dataset


def save(path: Path, array: AnyArray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


Split = Callable[..., tuple[PairedDataset, PairedDataset]]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Ten empty images, 00 to 09."""
    for index in range(10):
        save(tmp_path / f"images/{index:02}.png", np.full((8, 8), index, np.uint8))
        save(tmp_path / f"masks/{index:02}.png", np.zeros((8, 8), np.uint8))
    return tmp_path


@pytest.fixture
def split(folders: Path) -> Split:
    """Open and split the data set in `folders`: split(**values of DataConfig)."""

    def open_and_split(**values: Any) -> tuple[PairedDataset, PairedDataset]:
        images, masks = str(folders / "images"), str(folders / "masks")
        config = DataConfig(images=images, masks=masks, **values)
        return split_dataset(open_dataset(config, PreprocessConfig()), config)

    return open_and_split


def test_groups_are_never_divided(folders: Path, split: Split) -> None:
    table = "id,field\n" + "".join(f"{index:02},{index // 3}\n" for index in range(10))
    (folders / "groups.csv").write_text(table)
    training, validation = split(groups=str(folders / "groups.csv"), group_column="field")
    fields = [{int(id) // 3 for id in part.ids} for part in (training, validation)]
    assert fields[0]
    assert fields[1]
    assert not fields[0] & fields[1]


def test_removing_a_training_image_does_not_change_validation(folders: Path, split: Split) -> None:
    training, validation = split()
    (folders / "images" / f"{training.ids[0]}.png").unlink()
    assert split()[1].ids == validation.ids


def test_validation_list_names_the_images(folders: Path, split: Split) -> None:
    (folders / "val.txt").write_text("03\n07.png\n\n")
    training, validation = split(validation_list=str(folders / "val.txt"))
    assert validation.ids == ["03", "07"]
    assert len(training) == 8


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"44\n", "names '44', which is not in the data set"),
        ("Müller\n".encode("latin-1"), r"val\.txt is not UTF-8 text"),
        (None, r"val\.txt cannot be read: No such file"),
    ],
)
def test_invalid_validation_list_is_rejected(
    folders: Path, split: Split, content: bytes | None, says: str
) -> None:
    if content is not None:
        (folders / "val.txt").write_bytes(content)
    with pytest.raises(DataError, match=says):
        split(validation_list=str(folders / "val.txt"))


def test_split_with_an_empty_part_is_rejected(folders: Path, split: Split) -> None:
    (folders / "groups.csv").write_text("id,group\n" + "".join(f"{i:02},1\n" for i in range(10)))
    with pytest.raises(DataError, match="both need at least one"):
        split(groups=str(folders / "groups.csv"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"id,group\na\n", "row 2: no value"),
        ("id,group\na,Müller\n".encode("latin-1"), "is not UTF-8 text"),
        (b"id,car\n00,1\n", "needs the columns 'id' and 'group'"),
        pytest.param(b"id,group\n00," + b"1" * 200_000, "is not a CSV file", id="long field"),
        (b"id,group\n00,1\n", "01.png has no row in the table of groups"),
        (None, "cannot be read: No such file"),
    ],
)
def test_invalid_table_of_groups_is_rejected(
    folders: Path, split: Split, content: bytes | None, says: str
) -> None:
    if content is not None:
        (folders / "groups.csv").write_bytes(content)
    with pytest.raises(DataError, match=says):
        split(groups=str(folders / "groups.csv"))


def test_table_with_a_byte_order_mark_is_read(folders: Path, split: Split) -> None:
    """As Excel writes it."""
    table = "id,group\n" + "".join(f"{i:02},{i // 2}\n" for i in range(10))
    (folders / "groups.csv").write_text(table, "utf-8-sig")
    assert split(groups=str(folders / "groups.csv"))


def test_last_pages_of_a_single_stack_are_for_validation(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        pages = np.zeros((10, 8, 8), np.uint8)
        tifffile.imwrite(tmp_path / folder / "a.tif", pages, photometric="minisblack")
    dataset = PairedDataset(find_pairs(tmp_path / "images", tmp_path / "masks"))
    training, validation = split_dataset(dataset, DataConfig(validation_share=0.2))
    assert (len(training), validation.ids) == (8, ["a-page8", "a-page9"])
