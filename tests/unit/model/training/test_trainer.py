"""What one step changes."""

import pytest
import torch

from model.training.crops import Crops
from model.training.data import open_dataset, split_dataset
from model.training.recipe import OptimConfig, Recipe
from model.training.trainer import Trainer, learning_rate


def test_the_schedule_warms_up_and_falls_to_a_hundredth():
    optim = OptimConfig(learning_rate=1.0, warmup=10)
    assert learning_rate(optim, 0, 0) == pytest.approx(0.1)
    assert learning_rate(optim, 9, 0) == pytest.approx(1)
    assert learning_rate(optim, 500, 0.5) == pytest.approx(0.505)
    assert learning_rate(optim, 999, 1) == pytest.approx(0.01)
    assert learning_rate(OptimConfig(schedule="constant", warmup=0), 5, 0.9) == 4e-4


def test_the_average_follows_the_weights(data):
    recipe = Recipe.read(data / "recipe.toml")
    samples, _ = split_dataset(open_dataset(recipe.data, recipe.preprocess), recipe.data)
    trainer = Trainer(recipe, torch.device("cpu"), Crops(samples, recipe))
    before = trainer.average.final_conv.weight.clone()
    pixels = torch.randint(0, 255, (2, 48, 48, 3), dtype=torch.uint8)
    trainer.step(pixels, torch.ones(2, 48, 48), torch.ones(2, 48, 48), 0.0)
    after, fast = trainer.average.final_conv.weight, trainer.network.final_conv.weight
    assert torch.allclose(after, before.lerp(fast, 1 - 1 / 10))
    assert not torch.equal(after, fast)
