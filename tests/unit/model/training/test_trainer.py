"""One training step: the learning rate, the weights and their moving average."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.training.crops import CropDataset
from model.training.data import open_dataset, split_dataset
from model.training.recipe import OptimConfig, Recipe
from model.training.trainer import Trainer, compute_learning_rate


def make_trainer(data: Path) -> Trainer:
    recipe = Recipe.read(data / "recipe.toml")
    samples, _ = split_dataset(open_dataset(recipe.data, recipe.preprocess), recipe.data)
    return Trainer(recipe, torch.device("cpu"), CropDataset(samples, recipe))


def test_schedule_warms_up_and_falls_to_a_hundredth() -> None:
    optim = OptimConfig(learning_rate=1.0, warmup=10)
    assert compute_learning_rate(optim, 0, 0) == pytest.approx(0.1)
    assert compute_learning_rate(optim, 9, 0) == pytest.approx(1)
    assert compute_learning_rate(optim, 500, 0.5) == pytest.approx(0.505)
    assert compute_learning_rate(optim, 999, 1) == pytest.approx(0.01)
    assert compute_learning_rate(OptimConfig(schedule="constant", warmup=0), 5, 0.9) == 4e-4


def test_ema_moves_towards_the_weights(data: Path) -> None:
    trainer = make_trainer(data)
    before = trainer.ema.final_conv.weight.clone()
    pixels = torch.randint(0, 255, (2, 48, 48, 3), dtype=torch.uint8)
    trainer.step(pixels, torch.ones(2, 48, 48), torch.ones(2, 48, 48), 0.0)
    after, weights = trainer.ema.final_conv.weight, trainer.network.final_conv.weight
    assert torch.allclose(after, before.lerp(weights, 1 - 1 / 10))
    assert not torch.equal(after, weights)


def test_state_with_old_keys_restores_the_trainer(data: Path) -> None:
    """As saved when the average and the optimizer had other keys."""
    trainer = make_trainer(data)
    pixels = torch.randint(0, 255, (2, 48, 48, 3), dtype=torch.uint8)
    trainer.step(pixels, torch.ones(2, 48, 48), torch.ones(2, 48, 48), 0.0)
    state = trainer.snapshot().state
    old = {"average": state["ema"], "optimiser": state["optimizer"]}
    old |= {key: state[key] for key in ("network", "step", "seconds")}
    again = make_trainer(data)
    again.load_state(old)
    for name, tensor in trainer.ema.state_dict().items():
        assert torch.equal(again.ema.state_dict()[name], tensor)
    assert again.optimizer.state_dict()["state"].keys() == state["optimizer"]["state"].keys() != {}
    assert again.steps_done == 1
