"""Probabilities -> one label an object. NumPy and SciPy; no torch, since the service calls it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

MIN_PIXELS = 16
"""Smaller objects are specks."""


def label_instances(
    probabilities: npt.NDArray[np.float32], threshold: float = 0.5
) -> npt.NDArray[np.uint16]:
    """(C, H, W) probabilities -> (H, W) labels, 0 background, 1..n one object each.

    With a border channel, seeds are the foreground without the borders; without one, what erosion
    leaves. Every foreground pixel then goes to its nearest seed.
    """
    foreground = probabilities[0] >= threshold
    if len(probabilities) > 1:
        inner = foreground & (probabilities[1] < 0.5)
    else:
        inner = ndimage.binary_erosion(foreground, iterations=2)
    seeds, _ = ndimage.label(inner)
    nearest = ndimage.distance_transform_edt(
        seeds == 0, return_distances=False, return_indices=True
    )
    labels = np.where(foreground, seeds[tuple(nearest)], 0)
    sizes = np.bincount(labels.ravel())
    keep = sizes >= MIN_PIXELS
    keep[0] = False
    renumbered = np.where(keep, np.cumsum(keep), 0)
    return renumbered[labels].astype(np.uint16)
