"""Drawn images and weights for tests. Needs NumPy and `model` alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from model.config import UNetConfig


def nuclei(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A synthetic field of nuclei: image (H, W) uint8 with shot noise, labels (H, W) uint16."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    image = np.full((height, width), 12.0)
    labels = np.zeros((height, width), np.uint16)
    for label in range(1, max(2, height * width // 2500)):
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
        a, b, angle = rng.uniform(6, 13), rng.uniform(6, 13), rng.uniform(0, np.pi)
        u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        inside = (u / a) ** 2 + (v / b) ** 2 < 1
        if (labels[inside] > 0).any():
            continue
        labels[inside] = label
        image[inside] = rng.uniform(70, 180)
    noisy = rng.poisson(image).clip(0, 255)
    return noisy.astype(np.uint8), labels


def drawn_weights(architecture: UNetConfig, seed: int) -> dict[str, np.ndarray]:
    """He-initialised weights, so that activations keep their size through all layers."""
    from model.checkpoint import parameter_shapes

    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=shape) * np.sqrt(2 / max(1, int(np.prod(shape[1:]))))).astype(
            np.float32
        )
        for name, shape in parameter_shapes(architecture)
    }
