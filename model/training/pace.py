"""Measure how long a training step takes, before a run begins. Knows torch and a recipe."""

from __future__ import annotations

import time

import torch

from model.training.batchnorm import add_batch_norm
from model.training.recipe import Recipe
from model.unet import UNet

_STEPS = 3


def measure_step(recipe: Recipe, device: torch.device) -> float:
    """Return the seconds of the fastest of three steps of a new network on random crops.

    Making crops is not part of it.
    """
    network = UNet.from_config(recipe.network).to(device)
    if recipe.optim.batch_norm:
        add_batch_norm(network, None)
    crop = recipe.augment.crop or recipe.preprocess.window[0]
    inputs = torch.rand(
        recipe.optim.batch_size, recipe.network.in_channels, *crop, device=device
    ).contiguous(memory_format=torch.channels_last)
    seconds = []
    for _ in range(_STEPS):
        start = time.perf_counter()
        loss = network(inputs).mean()
        loss.backward()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return min(seconds)
