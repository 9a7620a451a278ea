"""Data sets on disk: pairs, masks of every kind, and the split into training and validation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from app.imaging import decode
from model.arrays import AnyArray
from model.config import PreprocessConfig
from model.errors import DataError
from model.training.data import (
    CarvanaDataset,
    Pair,
    PairedDataset,
    find_pairs,
    open_dataset,
    read_image,
    read_sample,
    split_dataset,
)
from model.training.masks import MaskCoding
from model.training.recipe import DataConfig
from tests.conftest import tiff


def save(path: Path, array: AnyArray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


@pytest.fixture
def carvana(tmp_path: Path) -> Path:
    """Three cars in four views each; the first view of each has an empty mask."""
    rng = np.random.default_rng(0)
    for car in ("0cdf5b5d0ce1", "02159e548029", "fff9b3a5373f"):
        for view in range(1, 5):
            image = rng.integers(0, 255, (128, 192, 3), np.uint8)
            mask = np.zeros((128, 192), np.uint8)
            if view > 1:
                mask[30:90, 40:160] = 255
            save(tmp_path / f"train/{car}_{view:02}.jpg", image)
            save(tmp_path / f"train_masks/{car}_{view:02}_mask.gif", mask)
    return tmp_path


def open_carvana(folder: Path) -> CarvanaDataset:
    return CarvanaDataset(folder / "train", folder / "train_masks")


def test_carvana_ids_are_sorted_and_masks_binary(carvana: Path) -> None:
    dataset = open_carvana(carvana)
    assert len(dataset) == 12
    assert dataset.ids == sorted(dataset.ids)
    sample = dataset[1]
    assert sample.image.shape == (128, 192, 3)
    assert sample.labels.shape == (128, 192)
    assert set(np.unique(sample.labels)) == {0, 1}


def test_carvana_empty_mask_stays_empty(carvana: Path) -> None:
    assert open_carvana(carvana)[0].labels.sum() == 0


def test_carvana_is_split_by_car(carvana: Path) -> None:
    dataset = open_carvana(carvana)
    training, validation = split_dataset(dataset, DataConfig(kind="carvana", validation_share=0.3))
    cars = [{id.split("_")[0] for id in part.ids} for part in (training, validation)]
    assert cars[0]
    assert cars[1]
    assert not cars[0] & cars[1]
    assert len(training) + len(validation) == 12


def test_carvana_missing_mask_is_named(carvana: Path) -> None:
    (carvana / "train_masks/02159e548029_03_mask.gif").unlink()
    with pytest.raises(DataError, match=r"02159e548029_03.jpg has no mask 02159e548029_03_mask"):
        open_carvana(carvana)


def test_mask_of_another_size_is_rejected(carvana: Path) -> None:
    save(carvana / "train_masks/02159e548029_02_mask.gif", np.zeros((64, 64), np.uint8))
    dataset = open_carvana(carvana)
    with pytest.raises(DataError, match=r"02159e548029_02_mask.gif is 64x64, but its image"):
        dataset[dataset.ids.index("02159e548029_02")]


def test_slice_decodes_several_samples(carvana: Path) -> None:
    dataset = open_carvana(carvana)
    assert [sample.id for sample in dataset[2:4]] == dataset.ids[2:4]


def test_palette_and_16_bit_masks_keep_their_values(tmp_path: Path) -> None:
    grey = np.zeros((8, 8), np.uint8)
    save(tmp_path / "images/a.png", grey)
    save(tmp_path / "images/b.png", grey)
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 3).convert("P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    palette.putdata([index % 3 for index in range(64)])
    (tmp_path / "masks").mkdir()
    palette.save(tmp_path / "masks/a.png")
    instances = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    save(tmp_path / "masks/b.png", instances)
    pairs = find_pairs(tmp_path / "images", tmp_path / "masks")
    assert np.array_equal(
        read_sample(pairs[0], MaskCoding("classes", 3)).labels.ravel(), np.arange(64) % 3
    )
    assert np.array_equal(read_sample(pairs[1], MaskCoding("instances")).labels, instances)
    assert np.array_equal(read_sample(pairs[1], MaskCoding("binary")).labels, instances > 0)
    with pytest.raises(DataError, match=r"b.png contains the label 63000; the 3 classes are 0 to"):
        read_sample(pairs[1], MaskCoding("classes", 3))
    with pytest.raises(DataError, match=r"a.png contains the label 2; the 2 classes"):
        read_sample(pairs[0], MaskCoding("classes", 2))


def test_mask_of_three_equal_channels_is_one_channel(tmp_path: Path) -> None:
    values = np.arange(64, dtype=np.uint8).reshape(8, 8)
    save(tmp_path / "images/a.png", values)
    save(tmp_path / "masks/a.png", np.dstack([values] * 3))
    (pair,) = find_pairs(tmp_path / "images", tmp_path / "masks")
    assert np.array_equal(read_sample(pair, MaskCoding("instances")).labels, values)


def test_empty_and_missing_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    with pytest.raises(DataError, match="images contains no images"):
        find_pairs(tmp_path / "images", tmp_path / "masks")
    with pytest.raises(DataError, match="absent is not a folder"):
        find_pairs(tmp_path / "absent", tmp_path / "masks")


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\nbroken", None])
def test_unreadable_image_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "broken.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken.png cannot be read"):
        read_image(path)


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


def read_labels(
    folder: Path, mask: Image.Image, kind: str = "binary", name: str = "a.png", **options: Any
) -> AnyArray:
    """Save a mask with an image of its size, and read its labels."""
    save(folder / "images/a.png", np.zeros((mask.height, mask.width), np.uint8))
    (folder / "masks").mkdir(exist_ok=True)
    mask.save(folder / "masks" / name, **options)
    (pair,) = find_pairs(folder / "images", folder / "masks")
    return read_sample(pair, MaskCoding(kind)).labels


def test_binary_palette_mask_is_read_by_its_colours(tmp_path: Path) -> None:
    """An adaptive palette may give white the index 0."""
    truth = np.zeros((20, 20), bool)
    truth[5:9, 4:16] = True
    mask = Image.fromarray((~truth).astype(np.uint8)).convert("P")
    mask.putdata((~truth).ravel().astype(int).tolist())
    mask.putpalette([255, 255, 255, 0, 0, 0])
    assert np.array_equal(read_labels(tmp_path, mask), truth)
    mask.putdata(truth.ravel().astype(int).tolist())
    mask.putpalette([68, 1, 84, 253, 231, 37])  # violet and yellow: index 0 is the background
    assert np.array_equal(read_labels(tmp_path, mask), truth)


def test_jpeg_mask_is_thresholded_if_binary_and_rejected_otherwise(tmp_path: Path) -> None:
    truth = np.zeros((64, 64), bool)
    truth[20:41, 13:50] = True
    mask = Image.fromarray(truth.astype(np.uint8) * 255)
    assert np.array_equal(read_labels(tmp_path, mask, name="a.jpg", quality=75), truth)
    with pytest.raises(DataError, match=r"a.jpg has lossy compression, which changes labels"):
        read_labels(tmp_path, mask, "instances", name="a.jpg")


def test_mask_of_fractions_is_rejected(tmp_path: Path) -> None:
    values = np.arange(64, dtype=np.float32).reshape(8, 8)
    whole = read_labels(tmp_path, Image.fromarray(values), "instances", name="a.tif")
    assert np.array_equal(whole, values)
    with pytest.raises(DataError, match="it has fractions; a mask contains integers"):
        read_labels(tmp_path, Image.fromarray(values / 2), name="a.tif")


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "u4", "i4", "u8", "f8", ">u2", ">i4"])
@pytest.mark.parametrize("compression", [None, "lzw", "zlib"])
def test_tiff_masks_of_every_type_keep_their_labels(
    tmp_path: Path, dtype: str, compression: str | None
) -> None:
    values = (np.arange(64).reshape(8, 8) * 3).astype(dtype)
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(values, compression=compression))
    save(tmp_path / "a.png", np.zeros((8, 8), np.uint8))
    pair = Pair("a", tmp_path / "a.png", path, "a")
    assert np.array_equal(read_sample(pair, MaskCoding("instances")).labels, values)
    assert np.array_equal(read_sample(pair).labels, values > 0)


def test_label_beyond_31_bits_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(np.full((8, 8), 2**31, np.uint32)))
    save(tmp_path / "a.png", np.zeros((8, 8), np.uint8))
    pair = Pair("a", tmp_path / "a.png", path, "a")
    with pytest.raises(DataError, match=r"a.tif contains a label that is not within"):
        read_sample(pair, MaskCoding("instances"))


def test_folder_of_images_is_not_the_folder_of_their_masks(tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(DataError, match="is the folder of the images and of the masks"):
        find_pairs(tmp_path, tmp_path)


def test_hidden_files_are_not_images(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        save(tmp_path / folder / "a.png", np.zeros((8, 8), np.uint8))
        (tmp_path / folder / "._a.png").write_bytes(b"AppleDouble")
    assert [pair.id for pair in find_pairs(tmp_path / "images", tmp_path / "masks")] == ["a"]


def test_last_pages_of_a_single_stack_are_for_validation(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        write_stack(tmp_path / folder / "a.tif", np.zeros((10, 8, 8), np.uint8))
    dataset = PairedDataset(find_pairs(tmp_path / "images", tmp_path / "masks"))
    training, validation = split_dataset(dataset, DataConfig(validation_share=0.2))
    assert (len(training), validation.ids) == (8, ["a-page8", "a-page9"])


def test_array_files_are_images_and_masks(tmp_path: Path) -> None:
    values = np.arange(64, dtype=np.int64).reshape(8, 8)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    np.save(tmp_path / "images/a.npy", values / 64)
    np.save(tmp_path / "masks/a.npy", values)
    (pair,) = find_pairs(tmp_path / "images", tmp_path / "masks")
    sample = read_sample(pair, MaskCoding("instances"))
    assert sample.image.dtype == np.uint16
    assert np.array_equal(sample.labels, values)


def write_stack(path: Path, pages: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    tifffile.imwrite(path, pages, photometric="minisblack")


def test_stacks_are_split_into_pages_of_one_group(tmp_path: Path) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"
    values = np.arange(3 * 64, dtype=np.uint16).reshape(3, 8, 8)
    write_stack(images / "a.tif", values)
    write_stack(masks / "a.tif", values % 5)
    save(images / "b.png", np.zeros((8, 8), np.uint8))
    save(masks / "b.png", np.zeros((8, 8), np.uint8))
    dataset = PairedDataset(find_pairs(images, masks), MaskCoding("instances"))
    assert dataset.ids == ["a-page0", "a-page1", "a-page2", "b"]
    assert [pair.group for pair in dataset.pairs] == ["a", "a", "a", "b"]
    for index, sample in enumerate(dataset[:3]):
        assert np.array_equal(sample.image, values[index])
        assert np.array_equal(sample.labels, values[index] % 5)
    (tmp_path / "validation.txt").write_text("a.tif\n")
    config = DataConfig(validation_list=str(tmp_path / "validation.txt"))
    training, validation = split_dataset(dataset, config)
    assert (training.ids, validation.ids) == (["b"], ["a-page0", "a-page1", "a-page2"])


def test_stack_and_mask_of_different_lengths_are_rejected(tmp_path: Path) -> None:
    write_stack(tmp_path / "images" / "a.tif", np.zeros((3, 8, 8), np.uint8))
    write_stack(tmp_path / "masks" / "a.tif", np.zeros((8, 8), np.uint8))
    with pytest.raises(DataError, match=r"a.tif has 3 pages, but its mask a.tif has 1"):
        find_pairs(tmp_path / "images", tmp_path / "masks")


def test_two_files_with_the_same_name_are_both_named(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg"):
        save(tmp_path / "images" / name, np.zeros((8, 8), np.uint8))
    save(tmp_path / "masks/a.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(DataError, match=r"a.jpg and a.png have the same name"):
        find_pairs(tmp_path / "images", tmp_path / "masks")


@pytest.mark.parametrize("kind", ["float", "32-bit", "rotated", "transparent", "white is 0"])
def test_images_are_read_as_the_service_reads_them(tmp_path: Path, kind: str) -> None:
    ramp = np.linspace(0, 1, 12 * 8, dtype=np.float32).reshape(12, 8)
    path = tmp_path / "a.tif"
    options: dict[str, Any] = {}
    if kind == "float":
        image = Image.fromarray(ramp)
    elif kind == "32-bit":
        image = Image.fromarray((ramp * 1e6).astype(np.int32))
    elif kind == "white is 0":
        image, options = Image.fromarray((ramp * 60000).astype(np.uint16)), {"tiffinfo": {262: 0}}
    else:
        path = tmp_path / "a.png"
        colours = np.dstack([np.uint8(ramp * 255)] * 3 + [np.uint8(255 - ramp * 255)])
        image = Image.fromarray(colours)
        if kind == "rotated":
            image = image.convert("RGB")
            options["exif"] = image.getexif()
            options["exif"][0x0112] = 6
    image.save(path, **options)
    data = path.read_bytes()
    served = decode.decode(data, decode.inspect(data, max_pixels=1000))
    read = read_image(path)
    assert read.shape[:2] == ((8, 12) if kind == "rotated" else (12, 8))
    assert np.array_equal(read, served)
    assert read.max() > read.min()
