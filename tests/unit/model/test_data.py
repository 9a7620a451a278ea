import numpy as np
import pytest
from PIL import Image

from model.config import PreprocessConfig
from model.data import (
    CarvanaDataset,
    DataError,
    PairedDataset,
    find_pairs,
    open_dataset,
    read_image,
    split_dataset,
)
from model.recipe import DataConfig


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


@pytest.fixture
def carvana(tmp_path):
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


def test_carvana_ids_are_sorted_and_masks_binary(carvana):
    dataset = CarvanaDataset(carvana / "train", carvana / "train_masks")
    assert len(dataset) == 12
    assert dataset.ids == sorted(dataset.ids)
    sample = dataset[1]
    assert sample.image.shape == (128, 192, 3)
    assert sample.labels.shape == (128, 192)
    assert set(np.unique(sample.labels)) == {0, 1}


def test_carvana_an_empty_mask_stays_empty(carvana):
    empty = CarvanaDataset(carvana / "train", carvana / "train_masks")[0]
    assert empty.labels.sum() == 0
    assert np.isfinite(empty.labels).all()


def test_carvana_is_split_by_car(carvana):
    dataset = CarvanaDataset(carvana / "train", carvana / "train_masks")
    training, validation = split_dataset(dataset, DataConfig(kind="carvana", validation_share=0.3))
    cars = [{id.split("_")[0] for id in part.ids} for part in (training, validation)]
    assert cars[0]
    assert cars[1]
    assert not cars[0] & cars[1]
    assert len(training) + len(validation) == 12


def test_carvana_a_missing_mask_is_named(carvana):
    (carvana / "train_masks/02159e548029_03_mask.gif").unlink()
    with pytest.raises(DataError, match=r"02159e548029_03.jpg has no mask 02159e548029_03_mask"):
        CarvanaDataset(carvana / "train", carvana / "train_masks")


def test_a_mask_of_another_size_is_named(carvana):
    save(carvana / "train_masks/02159e548029_02_mask.gif", np.zeros((64, 64), np.uint8))
    dataset = CarvanaDataset(carvana / "train", carvana / "train_masks")
    with pytest.raises(DataError, match=r"02159e548029_02_mask.gif is 64x64, its image"):
        dataset[dataset.ids.index("02159e548029_02")]


def test_palette_and_16_bit_masks_keep_their_values(tmp_path):
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
    classes = PairedDataset(pairs, "classes", 3)
    assert np.array_equal(classes[0].labels.ravel(), np.arange(64) % 3)
    assert np.array_equal(PairedDataset(pairs, "instances")[1].labels, instances)
    assert np.array_equal(PairedDataset(pairs, "binary")[1].labels, instances > 0)
    with pytest.raises(DataError, match=r"b.png holds the label 63000; the 3 classes are 0 to 2"):
        classes[1]
    with pytest.raises(DataError, match=r"a.png holds the label 2; the 2 classes"):
        PairedDataset(pairs, "classes", 2)[0]


def test_a_colour_mask_is_refused(tmp_path):
    save(tmp_path / "images/a.png", np.zeros((8, 8), np.uint8))
    save(tmp_path / "masks/a.png", np.zeros((8, 8, 3), np.uint8))
    dataset = PairedDataset(find_pairs(tmp_path / "images", tmp_path / "masks"))
    with pytest.raises(DataError, match=r"masks/a.png has 3 channels; a mask has one"):
        dataset[0]


def test_an_empty_folder_and_an_unreadable_image_are_named(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        find_pairs(tmp_path / "images", tmp_path / "masks")
    with pytest.raises(DataError, match="is not a folder"):
        find_pairs(tmp_path / "absent", tmp_path / "masks")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(DataError, match=r"broken.png cannot be read"):
        read_image(tmp_path / "broken.png")


@pytest.fixture
def folders(tmp_path):
    for index in range(10):
        save(tmp_path / f"images/{index:02}.png", np.full((8, 8), index, np.uint8))
        save(tmp_path / f"masks/{index:02}.png", np.zeros((8, 8), np.uint8))
    return tmp_path


def config(folders, **values):
    return DataConfig(images=str(folders / "images"), masks=str(folders / "masks"), **values)


def split(config):
    return split_dataset(open_dataset(config, PreprocessConfig()), config)


def test_the_split_by_groups_never_divides_one(folders):
    table = "id,field\n" + "".join(f"{index:02},{index // 3}\n" for index in range(10))
    (folders / "groups.csv").write_text(table)
    training, validation = split(
        config(folders, groups=str(folders / "groups.csv"), group_column="field")
    )
    fields = [{int(id) // 3 for id in part.ids} for part in (training, validation)]
    assert fields[0]
    assert fields[1]
    assert not fields[0] & fields[1]


def test_the_split_does_not_change_when_a_training_image_is_taken_away(folders):
    training, validation = split(config(folders))
    (folders / "images" / f"{training.ids[0]}.png").unlink()
    assert split(config(folders))[1].ids == validation.ids


def test_the_split_by_a_list(folders):
    (folders / "val.txt").write_text("03\n07.png\n\n")
    training, validation = split(config(folders, validation_list=str(folders / "val.txt")))
    assert validation.ids == ["03", "07"]
    assert len(training) == 8
    (folders / "val.txt").write_text("44\n")
    with pytest.raises(DataError, match="names '44', which is no image"):
        split(config(folders, validation_list=str(folders / "val.txt")))


def test_a_side_without_images_is_an_error(folders):
    (folders / "groups.csv").write_text("id,group\n" + "".join(f"{i:02},1\n" for i in range(10)))
    with pytest.raises(DataError, match="both need some"):
        split(config(folders, groups=str(folders / "groups.csv")))
    with pytest.raises(DataError, match="needs the columns 'id' and 'car'"):
        split(config(folders, groups=str(folders / "groups.csv"), group_column="car"))
