"""A small data set and its recipe for tests that train, and one thread for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.conftest import nuclei


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread.

    The order of a sum, and so its rounding, depends on the number of threads. Small networks gain
    nothing from a second one, and lose much on a busy machine.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with eight synthetic fields of nuclei and a recipe for them, `recipe.toml`."""
    for index in range(8):
        image, labels = nuclei(96, 112, seed=index)
        for name, array in (("images", image), ("masks", labels)):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / name / f"{index}.png")
    (tmp_path / "recipe.toml").write_text(
        f"""
        name = "drawn"
        [data]
        images = "{tmp_path}/images"
        masks = "{tmp_path}/masks"
        labels = "instances"
        validation_share = 0.25
        licence = "MIT"
        [network]
        out_channels = 2
        base_features = 4
        [preprocess]
        intensity = "percentile"
        window = [[112, 112]]
        overlap = 16
        classes = ["background", "nucleus"]
        [augment]
        crop = [48, 48]
        [optim]
        steps = 12
        batch_size = 2
        warmup = 2
        batch_norm = true
        [run]
        validate_every = 4
        """
    )
    return tmp_path
