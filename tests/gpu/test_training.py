"""Training on a CUDA device. Skipped without one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("scipy")

from model.training.crops import CropDataset
from model.training.data import open_dataset
from model.training.device_crops import DeviceCrops
from model.training.loop import train
from model.training.recipe import Recipe
from model.training.trainer import Trainer
from tests.drawing import nuclei

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NUCLEI = Path("model/configs/nuclei.toml")


@pytest.fixture
def flags(tmp_path: Path) -> dict[str, str]:
    """Values of a recipe for eight drawn images."""
    for index in range(8):
        image, labels = nuclei(96, 112, seed=index)
        for name, array in (("images", image), ("masks", labels)):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / name / f"{index}.png")
    values: dict[str, Any] = {
        "images": tmp_path / "images", "masks": tmp_path / "masks", "groups": "", "golden": "",
        "base_features": 8, "crop": "[48,64]", "batch_size": 4, "steps": 120, "noise": 0,
        "window": "[[112,112]]", "overlap": 16, "validate_every": 50, "device": "cuda:0",
    }  # fmt: skip
    return {name: str(value) for name, value in values.items()}


def make_crops(recipe: Recipe) -> CropDataset:
    return CropDataset(open_dataset(recipe.data, recipe.preprocess), recipe)


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Raise an error where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_crops_of_the_device_equal_those_of_the_host(flags: dict[str, str]) -> None:
    crops = make_crops(Recipe.read(NUCLEI, flags))
    device_crops = DeviceCrops(crops, torch.device("cuda:0"), 1e9)
    pixels, labels, weights, _ = (
        each.cpu() if isinstance(each, torch.Tensor) else each for each in device_crops.batch(3, 16)
    )
    expected = [crops[index] for index in range(3, 19)]
    difference = (pixels.int() - torch.stack([item[0] for item in expected]).int()).abs()
    assert difference.max() <= 2
    assert (difference > 0).float().mean() < 1e-2
    assert (labels != torch.stack([item[1] for item in expected])).float().mean() < 1e-3
    assert (weights - torch.stack([item[2] for item in expected])).abs().mean() < 1e-3


def test_steps_do_not_wait_for_the_device(flags: dict[str, str]) -> None:
    recipe = Recipe.read(NUCLEI, flags)
    device = torch.device("cuda:0")
    crops = make_crops(recipe)
    trainer, device_crops = Trainer(recipe, device, crops), DeviceCrops(crops, device, 1e9)

    def step(first: int) -> None:
        pixels, labels, weights, _ = device_crops.batch(first, 4)
        trainer.step(pixels, labels, weights, 0.0)

    step(0)  # allocates, and lets libraries initialize
    with no_synchronization():
        step(4)
        step(8)
    assert np.isfinite(trainer.read_steps()).all()


def test_run_learns_and_resumes(flags: dict[str, str], tmp_path: Path) -> None:
    """Losses are read every 50 steps, and validation runs beside the training."""
    train(Recipe.read(NUCLEI, flags | {"steps": "60"}), tmp_path / "run")
    path = train(Recipe.read(NUCLEI, flags), tmp_path / "run")
    assert path.exists()
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    losses = {record["step"]: record["loss"] for record in records if "loss" in record}
    assert losses[100] < losses[50]
    assert [record["step"] for record in records if "dice" in record] == [50, 100]
    assert json.loads((tmp_path / "run/report.json").read_text())["steps"] == 120
