"""One training step: the learning rate, the weights and their moving average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.training.crops import CropDataset
from model.training.data import open_dataset
from model.training.device_crops import DeviceCrops
from model.training.recipe import Recipe
from model.training.sections import OptimConfig
from model.training.split import split_dataset
from model.training.trainer import Trainer, compute_learning_rate


def make_crops(data: Path) -> CropDataset:
    recipe = Recipe.read(data / "recipe.toml")
    samples, _ = split_dataset(open_dataset(recipe.data, recipe.preprocess), recipe.data)
    return CropDataset(samples, recipe)


def make_trainer(data: Path) -> Trainer:
    crops = make_crops(data)
    return Trainer(crops.recipe, torch.device("cpu"), crops)


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


class CountReads(TorchDispatchMode):
    """Counts how often a tensor's value is read by Python, which waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        blocking = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
        self.reads += function in blocking
        return function(*args, **(kwargs or {}))


def test_step_and_its_crops_read_no_value(data: Path) -> None:
    trainer = make_trainer(data)
    crops = DeviceCrops(make_crops(data), torch.device("cpu"), 1e9)
    with CountReads() as counter:
        for first in (0, 2, 4):
            pixels, labels, weights, _ = crops.batch(first, 2)
            trainer.step(pixels, labels, weights, 0.0)
    assert counter.reads == 0
    with CountReads() as counter:
        figures = trainer.read_steps()
        float(torch.ones(2).sum())
    assert counter.reads == 1
    assert len(figures) == 3
    assert trainer.read_steps() == []


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
