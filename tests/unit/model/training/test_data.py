"""Data sets on disk: pairs, masks of every kind, and the split into training and validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from model.arrays import AnyArray
from model.errors import DataError
from model.training.data import CarvanaDataset, PairedDataset, read_sample
from model.training.masks import MaskCoding
from model.training.pairs import Pair, find_pairs
from model.training.sections import DataConfig
from model.training.split import split_dataset
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


def read_labels(
    folder: Path, mask: Image.Image, kind: str = "binary", name: str = "a.png", **options: Any
) -> AnyArray:
    """Save a mask with an image of its size, and read its labels."""
    save(folder / "images/a.png", np.zeros((mask.height, mask.width), np.uint8))
    (folder / "masks").mkdir(exist_ok=True)
    mask.save(folder / "masks" / name, **options)
    (pair,) = find_pairs(folder / "images", folder / "masks")
    return read_sample(pair, MaskCoding(kind)).labels


def test_binary_palette_mask_is_read_by_its_colors(tmp_path: Path) -> None:
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
