"""Which images are drawn how often, and what a crop of them holds."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from model.errors import DataError
from model.training.crops import Crops
from model.training.data import Pair, PairedDataset, open_dataset
from model.training.recipe import DataConfig, OptimConfig, Recipe
from tests.conftest import ROOT


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_an_epoch_draws_by_the_size_of_groups(balance):
    """Nine images of one group and one of another: balance 1 draws both groups as often."""
    pairs = [Pair(str(i), ROOT, ROOT, "large" if i < 9 else "small") for i in range(10)]
    recipe = Recipe(data=DataConfig(balance=balance), optim=OptimConfig(steps=1))
    crops = Crops(PairedDataset(pairs), recipe)
    drawn = [crops.id(place) for place in range(1000)]
    expected = 1000 / (1 + 9 * 9**-balance)
    assert drawn.count("9") == pytest.approx(expected, abs=60)
    if not balance:
        assert sorted(drawn[:10]) == sorted(str(i) for i in range(10))  # each once an epoch


def test_focus_draws_images_by_what_is_left_to_learn(tmp_path):
    """Half of "bad" is wrong and a tenth of the others; "done" is drawn seldom, but is drawn."""
    dice = {"bad": 0.5, "a": 0.9, "b": 0.9, "done": 1.0}
    report = tmp_path / "training.json"
    report.write_text(json.dumps({"images": [{"id": k, "dice": v} for k, v in dice.items()]}))
    recipe = Recipe(data=DataConfig(difficulty_report=str(report)), optim=OptimConfig(steps=1))
    crops = Crops(PairedDataset([Pair(id, ROOT, ROOT, id) for id in dice]), recipe)
    drawn = Counter(crops.id(place) for place in range(1000))
    for id, left in {"bad": 0.5, "a": 0.1, "b": 0.1, "done": 0.02}.items():
        assert drawn[id] == pytest.approx(1000 * left / 0.72, abs=30)


@pytest.mark.parametrize(
    ("text", "error"),
    [('{"images": [{"id": "other", "dice": 1}]}', "no score of a"), ("[]", "unet evaluate")],
)
def test_a_focus_that_does_not_fit_is_named(tmp_path, text, error):
    report = tmp_path / "training.json"
    report.write_text(text)
    recipe = Recipe(data=DataConfig(difficulty_report=str(report)), optim=OptimConfig(steps=1))
    with pytest.raises(DataError, match=error):
        Crops(PairedDataset([Pair("a", ROOT, ROOT, "a")]), recipe)


def test_whole_images_of_an_unpadded_network_keep_their_labels(data):
    """Images that show their labels, in a window that reflects them more than once."""
    for path in (data / "masks").iterdir():
        shown = (np.asarray(Image.open(path)) > 0).astype(np.uint8)[:70, :84] * 255
        for folder in ("images", "masks"):
            Image.fromarray(shown).save(data / folder / path.name)
    flags = {"padding": 0, "crop": [], "mode": "resize", "window": [[284, 300]]}
    flags |= {"size": [70, 84], "overlap": 0, "labels": "binary", "out_channels": 1}
    recipe = Recipe.read(data / "recipe.toml", flags)
    crops = Crops(open_dataset(recipe.data, recipe.preprocess), recipe)
    for place in range(4):
        pixels, labels, _, _ = crops[place]
        assert labels.shape == (284, 300)
        assert 0 < labels.float().mean() < 1
        assert torch.equal(pixels[:, :, 0] > 127, labels > 0)
