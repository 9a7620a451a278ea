"""Imported weights and the sizes of images: the statements of docs/import-export.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from app import cli
from model.checkpoint import load_checkpoint
from model.config import PreprocessConfig, UNetConfig
from model.predict import Predictor
from model.unet import UNet
from model.windows import plan_windows
from tests.conftest import nuclei


@pytest.mark.parametrize(
    ("length", "side"), [(100, 256), (256, 256), (368, 368), (512, 544), (544, 544)]
)
def test_side_is_continued_to_the_next_default_window(length: int, side: int) -> None:
    (window,) = plan_windows(length, length, UNetConfig(), PreprocessConfig()).windows
    assert window.shape == (side, side)


@pytest.mark.parametrize("length", range(545, 1200, 41))
def test_side_longer_than_the_largest_window_is_continued_by_less_than_16(length: int) -> None:
    rows = plan_windows(length, 256, UNetConfig(), PreprocessConfig()).rows
    assert 0 <= rows.starts[-1] + rows.sizes[-1] - length < 16


@pytest.mark.parametrize(("flags", "is_equal"), [(["--window", "128x96"], True), ([], False)])
def test_window_of_the_images_size_gives_the_result_of_the_network(
    flags: list[str], is_equal: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = UNet(1, 1, base_features=4).eval()
    torch.save(network.state_dict(), tmp_path / "theirs.pth")
    assert cli.main(["import", str(tmp_path / "theirs.pth"), "--out", str(tmp_path), *flags]) == 0
    image = nuclei(128, 96)[0]
    found = Predictor.of(load_checkpoint(tmp_path / "theirs.safetensors"))(image)
    with torch.inference_mode():
        expected = network(torch.from_numpy(image)[None, None] / 255).sigmoid()[0].numpy()
    assert (np.abs(found - expected).max() < 1e-6) == is_equal
