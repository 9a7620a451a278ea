import numpy as np
import pytest
from PIL import Image

from app.imaging import decode
from model.config import PreprocessConfig
from model.errors import DataError
from model.training.data import (
    CarvanaDataset,
    PairedDataset,
    find_pairs,
    open_dataset,
    read_image,
    split_dataset,
)
from model.training.recipe import DataConfig


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
    (folders / "val.txt").write_bytes("M\u00fcller\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"val\.txt is no text in UTF-8"):
        split(config(folders, validation_list=str(folders / "val.txt")))


def test_a_side_without_images_is_an_error(folders):
    (folders / "groups.csv").write_text("id,group\n" + "".join(f"{i:02},1\n" for i in range(10)))
    with pytest.raises(DataError, match="both need some"):
        split(config(folders, groups=str(folders / "groups.csv")))
    with pytest.raises(DataError, match="needs the columns 'id' and 'car'"):
        split(config(folders, groups=str(folders / "groups.csv"), group_column="car"))


def labels_of(tmp_path, mask, kind="binary", **options):
    """Labels of a mask that is saved as it is, beside an image of its size."""
    name = options.pop("name", "a.png")
    save(tmp_path / "images/a.png", np.zeros((mask.height, mask.width), np.uint8))
    (tmp_path / "masks").mkdir(exist_ok=True)
    mask.save(tmp_path / "masks" / name, **options)
    return PairedDataset(find_pairs(tmp_path / "images", tmp_path / "masks"), kind)[0].labels


def test_a_binary_palette_mask_is_read_by_its_colours(tmp_path):
    """An adaptive palette gives white the index 0 where there is more of it, or by chance."""
    truth = np.zeros((20, 20), bool)
    truth[5:9, 4:16] = True
    mask = Image.fromarray((~truth).astype(np.uint8)).convert("P")
    mask.putdata((~truth).ravel().astype(int).tolist())
    mask.putpalette([255, 255, 255, 0, 0, 0])
    assert np.array_equal(labels_of(tmp_path, mask), truth)
    mask.putdata(truth.ravel().astype(int).tolist())
    mask.putpalette([68, 1, 84, 253, 231, 37])  # violet and yellow: index 0 is the background
    assert np.array_equal(labels_of(tmp_path, mask), truth)


def test_a_jpeg_mask_is_black_and_white_or_refused(tmp_path):
    truth = np.zeros((64, 64), bool)
    truth[20:41, 13:50] = True
    mask = Image.fromarray(truth.astype(np.uint8) * 255)
    assert np.array_equal(labels_of(tmp_path, mask, name="a.jpg", quality=75), truth)
    with pytest.raises(DataError, match=r"a.jpg is a JPEG, which changes numbers"):
        labels_of(tmp_path, mask, "instances", name="a.jpg")


def test_a_mask_of_floats_is_refused_by_its_mode(tmp_path):
    with pytest.raises(DataError, match="is of mode F; a mask has whole numbers"):
        labels_of(tmp_path, Image.fromarray(np.zeros((8, 8), np.float32)), name="a.tif")


def test_two_files_of_one_name_are_both_named(tmp_path):
    for name in ("a.png", "a.jpg"):
        save(tmp_path / "images" / name, np.zeros((8, 8), np.uint8))
    with pytest.raises(DataError, match=r"a.jpg and a.png have the same name"):
        find_pairs(tmp_path / "images", tmp_path / "images")


@pytest.mark.parametrize("kind", ["float", "wide", "turned", "clear", "white is 0"])
def test_images_are_read_as_the_service_reads_them(tmp_path, kind):
    ramp = np.linspace(0, 1, 12 * 8, dtype=np.float32).reshape(12, 8)
    path, options = tmp_path / "a.tif", {}
    if kind == "float":
        image = Image.fromarray(ramp)
    elif kind == "wide":
        image = Image.fromarray((ramp * 1e6).astype(np.int32))
    elif kind == "white is 0":
        image, options = Image.fromarray((ramp * 60000).astype(np.uint16)), {"tiffinfo": {262: 0}}
    else:
        path = tmp_path / "a.png"
        colours = np.dstack([np.uint8(ramp * 255)] * 3 + [np.uint8(255 - ramp * 255)])
        image = Image.fromarray(colours)
        if kind == "turned":
            image = image.convert("RGB")
            options["exif"] = image.getexif()
            options["exif"][0x0112] = 6
    image.save(path, **options)
    data = path.read_bytes()
    served = decode.decode(data, decode.inspect(data, max_pixels=1000))
    read = read_image(path)
    assert read.shape[:2] == ((8, 12) if kind == "turned" else (12, 8))
    assert np.array_equal(read, served)
    assert read.max() > read.min()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"id,group\na\n", "row 2: no value"),
        ("id,group\na,M\u00fcller\n".encode("latin-1"), "is no CSV file in UTF-8"),
    ],
)
def test_a_bad_table_of_groups_is_named(folders, content, says):
    (folders / "groups.csv").write_bytes(content)
    with pytest.raises(DataError, match=f"groups.csv.*{says}"):
        split(config(folders, groups=str(folders / "groups.csv")))


def test_tables_of_excel_begin_with_a_mark(folders):
    table = "id,group\n" + "".join(f"{i:02},{i // 2}\n" for i in range(10))
    (folders / "groups.csv").write_text(table, "utf-8-sig")
    assert split(config(folders, groups=str(folders / "groups.csv")))
