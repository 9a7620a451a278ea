"""Label maps as objects of one class, for the tests of their outputs."""

from __future__ import annotations

import numpy as np

from model.arrays import AnyArray
from model.objects import Objects

CLASSES = ("background", "nucleus")


def make_objects(labels: AnyArray, score: float = 0.75) -> Objects:
    """Objects of the labels 1..max, each of which occurs."""
    count = int(labels.max())
    return Objects(
        labels.astype(np.int32),
        np.ones(count, np.uint8),
        np.bincount(labels.ravel(), minlength=count + 1)[1:],
        np.full(count, score, np.float32),
    )


def draw_discs(side: int, pitch: int) -> AnyArray:
    """A label map (H, W) with a disc in each square of a grid."""
    y, x = np.indices((pitch, pitch)) - (pitch - 1) / 2
    disc = x**2 + y**2 < (0.3 * pitch) ** 2
    cells = np.arange(1, (side // pitch) ** 2 + 1).reshape(side // pitch, -1)
    return np.kron(cells, disc).astype(np.int32)
