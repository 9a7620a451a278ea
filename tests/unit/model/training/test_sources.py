"""Training on several sources of images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from app import cli
from model.errors import ConfigError, DataError
from model.training.crops import CropDataset
from model.training.data import open_dataset
from model.training.device_crops import DeviceCrops
from model.training.losses import segmentation_loss
from model.training.recipe import Recipe
from model.training.run_folder import RunFolder
from model.training.split import split_dataset
from model.training.trainer import Trainer
from tests.conftest import nuclei

CPU = torch.device("cpu")


@pytest.fixture
def two_sources(data: Path) -> Path:
    """The recipe of `data` with a second source, whose masks are connected components."""
    for index in range(4):
        image, labels = nuclei(96, 112, seed=100 + index)
        for name, array in (("images", np.stack([image] * 3, 2)), ("masks", labels > 0)):
            folder = data / "tissue" / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / f"{index}.png")
    text = (data / "recipe.toml").read_text()
    head, _, tail = text.partition("[network]")
    own = head.partition("[data]")[2].replace('licence = "MIT"', "")
    sources = f"""
        [data]
        licence = "MIT"
        [[data.sources]]
        name = "cells"
        {own}
        share = 0.5
        [[data.sources]]
        name = "tissue"
        images = "{data}/tissue/images"
        masks = "{data}/tissue/masks"
        pattern = "[0-2]"
        validation_share = 0.3
        share = 0.5
        [network]"""
    (data / "recipe.toml").write_text('name = "drawn"\n' + sources + tail)
    return data


def read_recipe(folder: Path, **flags: object) -> Recipe:
    return Recipe.read(folder / "recipe.toml", {name: str(value) for name, value in flags.items()})


def make_crops(recipe: Recipe) -> CropDataset:
    training, _ = split_dataset(open_dataset(recipe.data, recipe.preprocess), recipe.data)
    return CropDataset(training, recipe)


def test_each_source_is_split_by_itself(two_sources: Path) -> None:
    recipe = read_recipe(two_sources)
    dataset = open_dataset(recipe.data, recipe.preprocess)
    assert dataset.sources == ["cells", "tissue"]
    assert dataset.kind == "instances"
    training, validation = split_dataset(dataset, recipe.data)
    assert [part.sources for part in (training, validation)] == [["cells", "tissue"]] * 2
    assert len(validation.select_source("cells")) == 2
    assert len(validation.select_source("tissue")) == 1
    assert len(training.select_source("tissue")) == 2
    sample = validation.select_source("tissue")[0]
    assert sample.id.startswith("tissue/")
    assert (sample.source, sample.has_objects, sample.labels.max()) == ("tissue", False, 1)


def test_split_of_a_source_is_that_of_a_recipe_with_it_alone(data: Path, two_sources: Path) -> None:
    recipe = read_recipe(two_sources)
    both = split_dataset(open_dataset(recipe.data, recipe.preprocess), recipe.data)[1]
    first = recipe.data.sources[0]
    alone = Recipe.merge(
        {"data": {"images": first.images, "masks": first.masks, "validation_share": 0.25}},
        {"steps": "1"},
    )
    expected = split_dataset(open_dataset(alone.data, alone.preprocess), alone.data)[1]
    assert [f"cells/{id}" for id in expected.ids] == both.select_source("cells").ids


def test_crops_are_drawn_by_the_shares(two_sources: Path) -> None:
    crops = make_crops(read_recipe(two_sources))
    epochs = 10 * len(crops.samples)
    drawn = [crops.samples.pairs[crops.image_index(i)].source for i in range(epochs)]
    assert drawn.count("tissue") == epochs / 2


def test_border_of_a_source_without_objects_has_no_loss(two_sources: Path) -> None:
    """The loss of its crops changes with the foreground and not with the border."""
    recipe = read_recipe(two_sources)
    crops = make_crops(recipe)
    trainer = Trainer(recipe, CPU, crops)
    indices = range(8)
    pixels, labels, weights, _ = DeviceCrops(crops, CPU, 1e9).batch(0, 8)
    unseparated = crops.find_unseparated(indices)
    assert unseparated is not None
    assert unseparated == [crops.image_id(i).startswith("tissue/") for i in indices]
    assert 0 < sum(unseparated) < 8
    logits = torch.randn(8, 2, 48, 48, requires_grad=True)
    trainer._forward = lambda inputs: logits
    trainer._compute_loss(pixels, labels, weights, unseparated).backward()
    gradients = logits.grad.abs().sum((2, 3))
    here = torch.tensor(unseparated)
    assert (gradients[here, 1] == 0).all()
    assert (gradients[~here, 1] > 0).all()
    assert (gradients[:, 0] > 0).all()


def test_other_crops_have_the_loss_of_a_batch_without_the_masked_ones() -> None:
    """In the border channel, the mean is over the crops whose labels separate objects."""
    from types import SimpleNamespace

    logits, target = torch.randn(4, 2, 8, 8), (torch.rand(4, 2, 8, 8) > 0.5).float()
    unseparated = [False, True, False, True]
    trainer = SimpleNamespace(device=CPU)
    known, scale = Trainer._mask_border(trainer, unseparated)
    loss = segmentation_loss(logits, target, torch.ones(4, 1, 8, 8) * scale, valid=known)
    each = [
        segmentation_loss(logits[:, :1], target[:, :1]),
        segmentation_loss(logits[::2, 1:], target[::2, 1:]),
    ]
    assert loss == pytest.approx(float(sum(each)) / 2, rel=1e-5)


@pytest.mark.parametrize("place", ["host", "device"])
def test_run_reports_each_source(two_sources: Path, place: str) -> None:
    out = two_sources / "run"
    arguments = ["train", str(two_sources / "recipe.toml"), "--out", str(out), "--steps", "2"]
    assert cli.main([*arguments, "--augment-on", place]) == 0
    scores = json.loads((out / "report.json").read_text())["validation"]
    by_source = scores["by_source"]
    assert {name: each["images"] for name, each in by_source.items()} == {"cells": 2, "tissue": 1}
    assert scores["images"] == 3
    assert "f1_50" in by_source["cells"]
    assert "f1_50" not in by_source["tissue"]
    assert scores["found"] == by_source["cells"]["found"]
    assert cli.main([*arguments, "--augment-on", place, "--steps", "3"]) == 0  # resumed
    checkpoint = str(out / "drawn.safetensors")
    assert cli.main(["evaluate", checkpoint, "--config", str(out / "config.json")]) == 0


def test_run_of_one_source_from_an_earlier_version_is_resumed(data: Path) -> None:
    out = data / "run"
    recipe = read_recipe(data)
    RunFolder(out, recipe) if out.mkdir() is None else None
    (out / "state.pt").touch()
    config = json.loads((out / "config.json").read_text())
    for name in ("sources", "pattern"):
        del config["data"][name]
    (out / "config.json").write_text(json.dumps(config))
    RunFolder(out, recipe)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sources": [{"name": "a"}, {"name": "a"}]}, "different names"),
        ({"sources": [{"images": "a"}]}, "needs a name"),
        ({"sources": [{"name": "a", "share": 1}, {"name": "b"}]}, "share must be set for all"),
        ({"sources": [{"name": "a"}], "images": "b"}, "images must be set in each"),
        ({"sources": [{"name": "a", "labels": "classes"}]}, "more than two names"),
        ({"sources": [{"name": "a", "image": "b"}]}, "unknown key 'image'"),
    ],
)
def test_invalid_sources_are_rejected(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe.merge({"data": values}, {"steps": "1"})


def test_pattern_without_images_is_rejected(data: Path) -> None:
    recipe = read_recipe(data, pattern="x*")
    with pytest.raises(DataError, match=r"no image in .* matches"):
        open_dataset(recipe.data, recipe.preprocess)
