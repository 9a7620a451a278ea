"""Crops of a batch on a device equal those that the host makes one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.training.crops import CropDataset
from model.training.data import open_dataset
from model.training.device_crops import DeviceCrops, ImagesDoNotFit
from model.training.losses import make_border_targets
from model.training.recipe import Recipe
from tests.conftest import nuclei

CPU = torch.device("cpu")


def make_crops(data: Path, **flags: Any) -> CropDataset:
    recipe = Recipe.read(data / "recipe.toml", {name: str(value) for name, value in flags.items()})
    return CropDataset(open_dataset(recipe.data, recipe.preprocess), recipe)


def stack(crops: CropDataset, first: int, count: int) -> list[torch.Tensor]:
    """Return pixels, labels and weights of crops that the host makes."""
    items = [crops[index] for index in range(first, first + count)]
    return [torch.stack(column) for column in list(zip(*items, strict=True))[:3]]


def resize_some(data: Path) -> None:
    """Give the images three different sizes, one of them smaller than a crop on one side."""
    for index, (height, width) in {1: (40, 150), 2: (130, 60)}.items():
        image, labels = nuclei(height, width, seed=index)
        Image.fromarray(image).save(data / f"images/{index}.png")
        Image.fromarray(labels).save(data / f"masks/{index}.png")


@pytest.mark.parametrize("crop", ["[48,48]", "[32,80]"])
def test_interpolated_crops_equal_those_of_the_host(data: Path, crop: str) -> None:
    """But for rounding, which moves a label where a coordinate is halfway between two pixels."""
    resize_some(data)
    crops = make_crops(data, noise=0, crop=crop)
    pixels, labels, weights, indices = DeviceCrops(crops, CPU, 1e9).batch(5, 24)
    assert list(indices) == list(range(5, 29))
    expected_pixels, expected_labels, expected_weights = stack(crops, 5, 24)
    assert pixels.dtype == torch.uint8
    difference = (pixels.int() - expected_pixels.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3
    assert (labels != expected_labels).float().mean() < 1e-3
    assert (weights - expected_weights).abs().mean() < 1e-3


def color_images(data: Path) -> None:
    """Tint objects and background of all images differently, with noise in each channel."""
    rng = np.random.default_rng(0)
    for path in (data / "images").iterdir():
        image = np.asarray(Image.open(path).convert("L")).astype(np.float32)[..., None] / 255
        tinted = image * (90, 60, 200) + (1 - image) * (230, 180, 210)
        noisy = tinted + rng.normal(0, 8, tinted.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path)


@pytest.mark.parametrize(
    "flags",
    [{"hue": 40}, {"saturation": 0.7}, {"grey": 0.5}, {"stain": 0.4},
     {"hue": 25, "saturation": 0.5, "grey": 0.1, "stain": 0.3}],
    ids=["hue", "saturation", "grey", "stain", "all"],
)  # fmt: skip
@pytest.mark.parametrize("unresampled", [0, 1])
def test_colors_vary_as_on_the_host(data: Path, flags: dict[str, float], unresampled: int) -> None:
    color_images(data)
    resize_some(data)
    crops = make_crops(data, noise=0, unresampled=unresampled, crop="[48,48]", **flags)
    plain = make_crops(data, noise=0, unresampled=unresampled, crop="[48,48]")
    pixels = DeviceCrops(crops, CPU, 1e9).batch(5, 24)[0]
    expected = stack(crops, 5, 24)[0]
    difference = (pixels.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 2e-3
    assert (expected.int() - stack(plain, 5, 24)[0].int()).abs().float().mean() > 2


def test_unresampled_crops_equal_those_of_the_host_exactly(data: Path) -> None:
    resize_some(data)
    same = dict.fromkeys(("gain", "offset", "gamma", "color", "noise", "blur", "invert"), 0)
    crops = make_crops(data, unresampled=1, crop="[48,64]", **same)
    pixels, labels, weights, _ = DeviceCrops(crops, CPU, 1e9).batch(0, 40)
    expected_pixels, expected_labels, expected_weights = stack(crops, 0, 40)
    assert torch.equal(pixels, expected_pixels)
    assert torch.equal(labels.int(), expected_labels)
    assert (weights - expected_weights).abs().max() < 10 * np.exp(-8)


def test_noise_has_the_strength_of_the_host(data: Path) -> None:
    """On grey images without objects, so that nothing else varies."""
    for path in (data / "images").iterdir():
        Image.fromarray(np.full((96, 112), 128, np.uint8)).save(path)
    same = dict.fromkeys(("gain", "offset", "gamma", "color", "blur", "invert"), 0)
    crops = make_crops(data, noise=0.1, intensity="range", **same)
    device_crops = DeviceCrops(crops, CPU, 1e9)
    pixels = device_crops.batch(0, 32)[0].float()
    expected = stack(crops, 0, 32)[0].float()
    strengths = [values.flatten(1).std(dim=1) for values in (pixels, expected)]
    assert strengths[0] == pytest.approx(strengths[1], rel=0.05, abs=0.05)
    assert not torch.equal(pixels, expected)
    assert torch.equal(pixels, device_crops.batch(0, 32)[0].float())  # of a resumed run
    assert not torch.equal(pixels, device_crops.batch(32, 32)[0].float())


def test_whole_images_are_not_varied(data: Path) -> None:
    crops = make_crops(data, crop="[]", mode="resize", window="[[96,112]]", size="[90,110]")
    pixels, labels, _, _ = DeviceCrops(crops, CPU, 1e9).batch(3, 6)
    expected = stack(crops, 3, 6)
    assert torch.equal(pixels, expected[0])
    assert torch.equal(labels.int(), expected[1])


def test_labels_above_the_limit_are_numbered_anew(data: Path) -> None:
    crops = make_crops(data, unresampled=1)
    expected = DeviceCrops(crops, CPU, 1e9).batch(0, 8)
    for path in (data / "masks").iterdir():
        labels = np.asarray(Image.open(path)).astype(np.int32)
        Image.fromarray(labels * 50021).save(path.with_suffix(".tif"))
        path.unlink()
    found = DeviceCrops(make_crops(data, unresampled=1), CPU, 1e9).batch(0, 8)
    assert found[1].max() < 100
    for labels, expected_labels in zip(found[1], expected[1], strict=True):
        border, expected_border = (make_border_targets(x[None]) for x in (labels, expected_labels))
        assert torch.equal(border, expected_border)
    assert torch.equal(found[2], expected[2])


def test_images_that_need_more_memory_are_rejected(data: Path) -> None:
    crops = make_crops(data)
    pixels = 8 * 96 * 112
    DeviceCrops(crops, CPU, pixels * (3 + 2))
    with pytest.raises(ImagesDoNotFit):
        DeviceCrops(crops, CPU, pixels * (3 + 2) - 1)
