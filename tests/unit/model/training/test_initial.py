"""Initial weights for networks with other inputs, outputs and widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from model.config import PreprocessConfig, UNetConfig
from model.predict import attach_golden, build_network
from model.training.initial import load_initial_weights
from model.training.recipe import Recipe
from model.transforms import normalize
from model.unet import UNet
from tests.conftest import drawn_weights, nuclei

RGB = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
GREY = {"mean": (0.5,), "std": (0.25,)}


def write_checkpoint(path: Path, outputs: int = 1, **preprocess: Any) -> Checkpoint:
    channels = len(preprocess.get("mean", (0, 0, 0)))
    architecture = UNetConfig(channels, outputs, 4, 1)
    config = PreprocessConfig(window=((64, 64),), overlap=0, **preprocess)
    state = drawn_weights(architecture, 0)
    draft = Checkpoint(path.stem, architecture, config, state)
    save_checkpoint(path, attach_golden(draft, nuclei(64, 64)[0]))
    return load_checkpoint(path)


def make_recipe(
    channels: int = 3, outputs: int = 1, features: int = 4, **preprocess: Any
) -> Recipe:
    document = {
        "network": {"in_channels": channels, "out_channels": outputs, "base_features": features},
        "preprocess": {name: list(value) if isinstance(value, tuple) else value
                       for name, value in preprocess.items()},
        "data": {"labels": "classes" if outputs > 2 else "instances"},
    }  # fmt: skip
    return Recipe.merge(document, {"steps": "1"})


@torch.no_grad()
def compute(network: UNet, pixels: np.ndarray, preprocess: PreprocessConfig) -> torch.Tensor:
    return network.eval()(normalize(torch.from_numpy(pixels)[None], preprocess))


@pytest.mark.parametrize(
    ("former", "present", "said"),
    [
        ({}, GREY, "3 input channels become 1"),
        (GREY, {}, "1 input channels become 3"),
        ({}, RGB, "mean 0.5, 0.5, 0.5 and std 0.25, 0.25, 0.25 become 0.485, 0.456, 0.406"),
        (RGB, GREY, "mean 0.485, 0.456, 0.406 and std 0.229, 0.224, 0.225 become 0.5 and 0.25"),
    ],
)
def test_grey_images_give_the_same_logits(
    tmp_path: Path, former: dict[str, Any], present: dict[str, Any], said: str
) -> None:
    """But at the edges, where the padding has another meaning."""
    checkpoint = write_checkpoint(tmp_path / "a.safetensors", **former)
    channels = len(present.get("mean", (0, 0, 0)))
    recipe = make_recipe(channels, **present)
    initial = load_initial_weights(tmp_path / "a.safetensors", recipe)
    assert any(said in change for change in initial.changes)
    network = UNet.from_config(recipe.network)
    network.load_state_dict(initial.weights)
    grey = np.full((320, 320, 1), 40, np.uint8)
    grey[150:170, 140:180] = 200
    before = compute(
        build_network(checkpoint),
        grey.repeat(checkpoint.unet.in_channels, 2),
        checkpoint.preprocess,
    )
    after = compute(network, grey.repeat(channels, 2), recipe.preprocess)
    inner = (..., slice(96, -96), slice(96, -96))
    assert (after[inner] - before[inner]).abs().max() < 1e-4
    assert before[inner].std() > 1e-3


def test_unchanged_network_is_loaded_exactly(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "a.safetensors", 2)
    initial = load_initial_weights(tmp_path / "a.safetensors", make_recipe(outputs=2))
    assert initial.checkpoint == checkpoint.id
    assert not initial.changes
    for name, value in checkpoint.state.items():
        assert torch.equal(initial.weights[name], torch.from_numpy(value).float())


def test_foreground_is_kept_when_a_border_is_added_or_removed(tmp_path: Path) -> None:
    for former, present, said in ((1, 2, "keeps foreground and adds border"), (2, 1, "keeps fore")):
        path = tmp_path / "a.safetensors"
        checkpoint = write_checkpoint(path, former)
        initial = load_initial_weights(path, make_recipe(outputs=present))
        assert said in initial.changes[-1]
        weight = initial.weights["final_conv.weight"]
        assert weight.shape[0] == present
        expected = torch.from_numpy(checkpoint.state["final_conv.weight"][0]).float()
        assert torch.equal(weight[0], expected)
        assert not weight[1:].any()
        assert not initial.weights["final_conv.bias"][1:].any()


def test_classes_are_kept_by_their_names(tmp_path: Path) -> None:
    path, three = tmp_path / "a.safetensors", ((0, 0, 0), (255, 0, 0), (0, 255, 0))
    names = ("background", "cell", "debris")
    checkpoint = write_checkpoint(path, 3, classes=names, palette=three)
    wanted = ("background", "debris", "wall", "cell")
    recipe = make_recipe(outputs=4, classes=wanted, palette=((0, 0, 0),) * 4)
    initial = load_initial_weights(path, recipe)
    assert (
        "keeps class background, class debris, class cell and adds class wall"
        in initial.changes[-1]
    )
    former = torch.from_numpy(checkpoint.state["final_conv.bias"]).float()
    bias = initial.weights["final_conv.bias"]
    assert torch.equal(bias, torch.tensor([*former[[0, 2]], 0, former[1]]))


def test_several_classes_start_anew_after_a_binary_network(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.safetensors", 2)
    recipe = make_recipe(
        features=8, outputs=3, classes=("background", "cell", "wall"), palette=((0, 0, 0),) * 3
    )
    initial = load_initial_weights(tmp_path / "a.safetensors", recipe)
    assert "adds class background, class cell, class wall" in initial.changes[0]
    assert "4 base features become 8" in initial.changes[1]
    assert not initial.weights["final_conv.weight"].any()
    UNet.from_config(recipe.network).load_state_dict(initial.weights)


def test_other_intensities_are_reported(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.safetensors", intensity="range")
    recipe = make_recipe(intensity="percentile", percentiles=(1.0, 99.8))
    changes = load_initial_weights(tmp_path / "a.safetensors", recipe).changes
    assert "intensity range becomes percentiles 1 to 99.8" in changes[-1]


@pytest.mark.parametrize(("former", "present"), [(1, 1), (2, 2), (2, 1)])
def test_weights_of_every_output_solve_the_task(tmp_path: Path, former: int, present: int) -> None:
    write_checkpoint(tmp_path / "a.safetensors", former)
    recipe = make_recipe(outputs=present)
    assert load_initial_weights(tmp_path / "a.safetensors", recipe).solve_task


def test_weights_without_one_of_the_outputs_do_not_solve_the_task(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.safetensors", 1)
    recipe = make_recipe(outputs=2)
    assert not load_initial_weights(tmp_path / "a.safetensors", recipe).solve_task
