"""Folders in the layouts that people have become recipes that train."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from app import cli
from model.arrays import AnyArray
from model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from model.config import PreprocessConfig, UNetConfig
from model.predict import attach_golden
from model.training.data import open_dataset
from model.training.proposal import propose_recipe
from model.training.recipe import Recipe
from model.training.split import split_dataset
from tests.conftest import drawn_weights, nuclei, write_tiny

SHORT = ["--steps", "2", "--base-features", "2", "--batch-size", "1"]


def save(path: Path, array: AnyArray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def propose(images: Path, masks: Path, **flags: str) -> tuple[Recipe, dict[str, str], str]:
    recipe, proposal = propose_recipe(images, masks, "cpu", flags)
    return recipe, dict(proposal.findings), proposal.to_toml()


@pytest.fixture
def isbi(tmp_path: Path) -> Path:
    """A stack of ten grey pages, and a stack of their masks, as ISBI 2012 has them."""
    fields = [nuclei(96, 112, seed=seed) for seed in range(10)]
    tifffile.imwrite(tmp_path / "train-volume.tif", np.stack([image for image, _ in fields]))
    masks = np.stack([(labels > 0) * np.uint8(255) for _, labels in fields])
    tifffile.imwrite(tmp_path / "train-labels.tif", masks)
    return tmp_path


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    """Photographs, and masks with a color for each class, one of them void."""
    colors = np.array([(0, 0, 0), (128, 128, 128), (128, 64, 128), (64, 0, 128)], np.uint8)
    rng = np.random.default_rng(0)
    for index in range(8):
        classes = np.repeat([0, 1, 2, 3], [8, 30, 30, 28])[:, None] * np.ones((1, 128), int)
        classes[40:50, index * 8 : index * 8 + 20] = 3
        save(
            tmp_path / f"images/0001TP_{index:06}.png", rng.integers(0, 255, (96, 128, 3), np.uint8)
        )
        save(tmp_path / f"labels/0001TP_{index:06}_L.png", colors[classes])
    lines = "0 0 0\tVoid\n128 128 128\tSky\n128 64 128\tRoad\n64 0 128\tCar\n"
    (tmp_path / "label_colors.txt").write_text(lines)
    return tmp_path


@pytest.fixture
def carvana(tmp_path: Path) -> Path:
    """Six cars in four views each."""
    rng = np.random.default_rng(0)
    mask = np.zeros((96, 128), np.uint8)
    mask[30:60, 20:90] = 255
    for car in range(6):
        for view in range(4):
            name = f"{car:012x}_{view:02}"
            save(tmp_path / f"train/{name}.jpg", rng.integers(0, 255, (96, 128, 3), np.uint8))
            save(tmp_path / f"train_masks/{name}_mask.gif", mask)
    return tmp_path


def test_stacks_of_binary_masks(isbi: Path) -> None:
    recipe, findings, _ = propose(isbi, isbi)
    assert recipe.data.labels == "binary"
    assert recipe.network.out_channels == 1
    assert recipe.preprocess.mode == "native"
    assert "10 pages" in findings["images"]
    assert "train-volume.tif with train-labels.tif" in findings["images"]
    training, validation = split_dataset(open_dataset(recipe.data, recipe.preprocess), recipe.data)
    assert (len(training), len(validation)) == (8, 2)


def test_classes_by_color_have_their_names(camvid: Path) -> None:
    recipe, findings, _ = propose(camvid / "images", camvid / "labels")
    assert recipe.preprocess.classes == ("Car", "Road", "Sky")
    assert recipe.data.colors == recipe.preprocess.palette
    assert recipe.data.colors[2] == (128, 128, 128)
    assert recipe.data.ignore == 255
    assert recipe.network.out_channels == 3
    assert "0001TP_000000.png with 0001TP_000000_L.png" in findings["images"]
    sample = open_dataset(recipe.data, recipe.preprocess)[0]
    assert set(np.unique(sample.labels)) == {-1, 0, 1, 2}


def test_views_of_a_car_stay_together(carvana: Path) -> None:
    recipe, findings, _ = propose(carvana / "train", carvana / "train_masks")
    assert (recipe.data.labels, recipe.data.group_by) == ("binary", "prefix")
    assert recipe.preprocess.resized == (96, 128)
    assert "21" not in findings["images"]
    training, validation = split_dataset(open_dataset(recipe.data, recipe.preprocess), recipe.data)
    cars = [{id.split("_")[0] for id in part.ids} for part in (training, validation)]
    assert not cars[0] & cars[1]


def test_instances_get_a_border_channel(tmp_path: Path) -> None:
    for index in range(6):
        image, labels = nuclei(220, 220 + 20 * index, seed=index)
        labels = np.where(labels > 4 + index, 0, labels)
        save(tmp_path / f"images/{index}.png", image)
        save(tmp_path / f"masks/{index}.png", labels.astype(np.uint16))
    recipe, findings, _ = propose(tmp_path / "images", tmp_path / "masks")
    assert recipe.data.labels == "instances"
    assert recipe.network.out_channels == 2
    assert recipe.loss.border_weight > 0
    assert "220x220 to 320x220" in findings["size"]


def test_rare_classes_weigh_more(tmp_path: Path) -> None:
    classes = np.zeros((64, 64), np.uint8)
    classes[::3, ::3], classes[::16, 1::16] = 1, 2
    for index in range(4):
        save(tmp_path / f"images/{index}.png", np.full((64, 64), index, np.uint8))
        save(tmp_path / f"masks/{index}.png", classes)
    recipe, findings, _ = propose(tmp_path / "images", tmp_path / "masks")
    weights = recipe.loss.class_weights
    assert weights[0] < weights[1] == 1 < weights[2]
    assert "class 2" in findings["weights"]


def test_flags_override_what_was_understood(isbi: Path) -> None:
    recipe, findings, text = propose(isbi, isbi, labels="instances", out_channels="2", minutes="3")
    assert (recipe.data.labels, recipe.optim.minutes) == ("instances", 3)
    assert "--labels says so" in findings["masks"]
    assert "minutes = 3" in text


def write_start(folder: Path, channels: int = 3, **preprocess: Any) -> str:
    """Write a checkpoint with this preprocessing; return its path."""
    architecture = UNetConfig(channels, 1, 4, 1)
    config = PreprocessConfig(**preprocess)
    state = drawn_weights(architecture, 0)
    path = folder / "start.safetensors"
    save_checkpoint(
        path, attach_golden(Checkpoint("a", architecture, config, state), nuclei(64, 64)[0])
    )
    return str(path)


NATIVE: dict[str, Any] = {
    "window": ((64, 64),),
    "overlap": 16,
    "intensity": "range",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "threshold": 0.65,
}
WHOLE: dict[str, Any] = {
    "mode": "resize",
    "window": ((128, 96),),
    "size": (120, 90),
    "overlap": 0,
    "interpolation": "bicubic",
    "intensity": "percentile",
    "percentiles": (0.2, 99.9),
}


@pytest.mark.parametrize("preprocess", [NATIVE, WHOLE], ids=["native", "resize"])
@pytest.mark.parametrize("layout", ["isbi", "carvana"])
def test_preprocessing_of_the_start_is_inherited(
    layout: str, preprocess: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """Whatever would be chosen for these images: isbi is seen in windows, carvana as a whole."""
    folder: Path = request.getfixturevalue(layout)
    images, masks = {
        "isbi": (folder, folder),
        "carvana": (folder / "train", folder / "train_masks"),
    }[layout]
    start = write_start(folder, **preprocess)
    recipe, findings, text = propose(images, masks, init_from=start)
    expected = PreprocessConfig(**preprocess)
    assert dataclasses.replace(recipe.preprocess, classes=expected.classes) == expected
    assert recipe.network.base_features == 4
    assert recipe == Recipe.merge(tomllib.loads(text), {})
    assert findings["start"].startswith(f"start@{load_checkpoint(Path(start)).sha256[:12]}, with")
    intensity = "range" if preprocess is NATIVE else "percentiles 0.2 to 99.9"
    assert f"4 base features, 3 channels, intensity {intensity}, threshold" in findings["start"]


def test_values_of_the_user_are_not_inherited(isbi: Path) -> None:
    start = write_start(isbi, **WHOLE)
    flags = {"mode": "native", "percentiles": "[2.0, 98.0]", "threshold": "0.4"}
    recipe, findings, _ = propose(isbi, isbi, init_from=start, learning_rate="0.1", **flags)
    assert (recipe.preprocess.mode, recipe.preprocess.percentiles) == ("native", (2, 98))
    assert len(recipe.preprocess.window) > 1
    assert recipe.preprocess.interpolation == "bilinear"
    assert (recipe.preprocess.threshold, recipe.optim.learning_rate) == (0.4, 0.1)
    assert "channels, intensity; learning" in findings["start"]
    assert findings["start"].endswith("; learning rate 0.1")
    recipe, findings, _ = propose(isbi, isbi, init_from=start, intensity="range")
    assert recipe.preprocess.intensity == "range"
    assert "range" not in findings["start"]


def test_number_of_channels_is_inherited(isbi: Path) -> None:
    start = write_start(isbi, channels=1, mean=(0.4,), std=(0.2,))
    recipe, _, _ = propose(isbi, isbi, init_from=start)
    assert (recipe.network.in_channels, recipe.preprocess.mean) == (1, (0.4,))
    recipe, _, _ = propose(isbi, isbi, init_from=start, in_channels="3")
    assert recipe.preprocess.mean == PreprocessConfig().mean


def test_network_for_grey_images_gets_channels_for_colors(carvana: Path) -> None:
    start = write_start(carvana, channels=1, mean=(0.4,), std=(0.2,))
    recipe, _, _ = propose(carvana / "train", carvana / "train_masks", init_from=start)
    assert (recipe.network.in_channels, recipe.preprocess.mean) == (3, PreprocessConfig().mean)


def test_learning_rate_is_lower_after_a_checkpoint(isbi: Path) -> None:
    fresh, _, _ = propose(isbi, isbi)
    tuned, _, _ = propose(isbi, isbi, init_from=write_start(isbi))
    assert tuned.optim.learning_rate < fresh.optim.learning_rate


def test_images_without_a_mask_are_left_out_and_counted(carvana: Path) -> None:
    (carvana / "train_masks/000000000000_00_mask.gif").unlink()
    _, findings, _ = propose(carvana / "train", carvana / "train_masks")
    assert findings["images"].startswith("23 with masks")
    assert "1 without a mask are left out, such as 000000000000_00.jpg" in findings["images"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["isbi", "camvid", "carvana"])
def test_recipe_repeats_the_run(
    layout: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    folder: Path = request.getfixturevalue(layout)
    folders = {
        "isbi": [folder],
        "camvid": [folder / "images", folder / "labels"],
        "carvana": [folder / "train", folder / "train_masks"],
    }[layout]
    out = folder / "run"
    assert cli.main(["train", *map(str, folders), *SHORT, "--name", "a", "--out", str(out)]) == 0
    output = capsys.readouterr().out
    for name in ("images", "size", "masks", "split", "network", "device", "length", "recipe"):
        assert any(line.startswith(f"{name} ") for line in output.splitlines())
    again = folder / "again"
    assert cli.main(["train", str(out / "recipe.toml"), "--out", str(again)]) == 0
    configs = [json.loads((path / "config.json").read_text()) for path in (out, again)]
    assert configs[0] == configs[1]
    first, second = (load_checkpoint(path / "a.safetensors").state for path in (out, again))
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_run_starts_from_a_checkpoint_of_another_task(
    camvid: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The network has that checkpoint's width, and the log says what differs."""
    start = camvid / "start.safetensors"
    write_tiny(start)
    out = camvid / "run"
    arguments = [str(camvid / "images"), str(camvid / "labels"), "--init-from", str(start)]
    short = [*SHORT[:2], *SHORT[4:]]
    assert cli.main(["train", *arguments, *short, "--name", "a", "--out", str(out)]) == 0
    assert "initial weights of start@" in caplog.text
    assert "the last layer adds class" in caplog.text
    trained = load_checkpoint(out / "a.safetensors").unet
    assert trained.base_features == load_checkpoint(start).unet.base_features
    assert trained.out_channels > 1


def test_file_and_folder_are_not_a_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(tmp_path / "a.toml"), str(tmp_path)]) == 2
    assert "give IMAGES MASKS, or one RECIPE" in capsys.readouterr().err
