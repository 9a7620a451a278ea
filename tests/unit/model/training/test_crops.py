"""The sequence of crops: how often each image is drawn, and what a crop contains."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.errors import DataError
from model.training.crops import CropDataset
from model.training.data import PairedDataset, open_dataset
from model.training.pairs import Pair
from model.training.recipe import Recipe
from model.training.sections import DataConfig, OptimConfig
from tests.conftest import ROOT


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_balance_draws_small_groups_more_often(balance: float) -> None:
    """Nine images in one group and one in another: balance 1 draws both groups equally often."""
    pairs = [Pair(str(i), ROOT, ROOT, "large" if i < 9 else "small") for i in range(10)]
    recipe = Recipe(data=DataConfig(balance=balance), optim=OptimConfig(steps=1))
    crops = CropDataset(PairedDataset(pairs), recipe)
    drawn = [crops.image_id(index) for index in range(1000)]
    expected = 1000 / (1 + 9 * 9**-balance)
    assert drawn.count("9") == pytest.approx(expected, abs=60)


def test_epoch_without_balance_draws_each_image_once() -> None:
    pairs = [Pair(str(i), ROOT, ROOT, "large" if i < 9 else "small") for i in range(10)]
    crops = CropDataset(PairedDataset(pairs), Recipe(optim=OptimConfig(steps=1)))
    for epoch in range(3):
        drawn = [crops.image_id(index) for index in range(10 * epoch, 10 * epoch + 10)]
        assert sorted(drawn) == sorted(str(i) for i in range(10))


def test_difficulty_report_draws_images_by_one_minus_dice(tmp_path: Path) -> None:
    """A perfect image is drawn too, but rarely."""
    dice = {"bad": 0.5, "a": 0.9, "b": 0.9, "done": 1.0}
    report = tmp_path / "training.json"
    report.write_text(json.dumps({"images": [{"id": k, "dice": v} for k, v in dice.items()]}))
    recipe = Recipe(data=DataConfig(difficulty_report=str(report)), optim=OptimConfig(steps=1))
    crops = CropDataset(PairedDataset([Pair(id, ROOT, ROOT, id) for id in dice]), recipe)
    drawn = Counter(crops.image_id(index) for index in range(1000))
    for id, difficulty in {"bad": 0.5, "a": 0.1, "b": 0.1, "done": 0.02}.items():
        assert drawn[id] == pytest.approx(1000 * difficulty / 0.72, abs=30)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"images": [{"id": "other", "dice": 1}]}', "no score for a"),
        ('{"images": [{"id": "a", "dice": 1.5}]}', r"Dice of a must be 0\.\.1, not 1\.5"),
        ("[]", "not written by `unet evaluate"),
        (None, r"training\.json cannot be read: No such file"),
    ],
)
def test_invalid_difficulty_report_is_rejected(
    tmp_path: Path, text: str | None, error: str
) -> None:
    report = tmp_path / "training.json"
    if text is not None:
        report.write_text(text)
    recipe = Recipe(data=DataConfig(difficulty_report=str(report)), optim=OptimConfig(steps=1))
    with pytest.raises(DataError, match=error):
        CropDataset(PairedDataset([Pair("a", ROOT, ROOT, "a")]), recipe)


def test_whole_images_of_an_unpadded_network_keep_their_labels(data: Path) -> None:
    """The images show their labels, in a window that reflects them more than once."""
    for path in (data / "masks").iterdir():
        shown = (np.asarray(Image.open(path)) > 0).astype(np.uint8)[:70, :84] * 255
        for folder in ("images", "masks"):
            Image.fromarray(shown).save(data / folder / path.name)
    flags: dict[str, Any] = {"padding": "0", "crop": "[]", "mode": "resize", "overlap": "0"}
    flags |= {"window": "[[284, 300]]", "size": "[70, 84]", "labels": "binary", "out_channels": "1"}
    recipe = Recipe.read(data / "recipe.toml", flags)
    crops = CropDataset(open_dataset(recipe.data, recipe.preprocess), recipe)
    for index in range(4):
        pixels, labels, _, _ = crops[index]
        assert labels.shape == (284, 300)
        assert 0 < labels.float().mean() < 1
        assert torch.equal(pixels[:, :, 0] > 127, labels > 0)


def test_first_crops_and_foreground_fraction_describe_the_data(data: Path) -> None:
    recipe = Recipe.read(data / "recipe.toml")
    samples = open_dataset(recipe.data, recipe.preprocess)
    crops = CropDataset(samples, recipe)
    assert torch.equal(crops.first_crops(3)[2], crops[2][0])
    expected = np.mean([(sample.labels > 0).mean() for sample in samples])
    assert crops.foreground_fraction() == pytest.approx(expected)
