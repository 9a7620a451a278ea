"""Separate touching objects: probabilities -> a label map. Knows NumPy and SciPy; no torch."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from model.arrays import FloatArray, UInt16Array

MIN_PIXELS = 36
"""Pixels. Smaller objects are discarded."""
MAX_OBJECTS = 65535
"""Labels that 16 bits can hold. If there are more objects, the largest are kept."""
MIN_CONFIDENCE = 0.6
"""An object's mean probability exceeds the threshold t by at least this times min(t, 1 - t). Debris
and blur that are barely foreground everywhere stay in the mask, but are not objects.

`MIN_PIXELS` and this were chosen on the validation fields of the nuclei; see weights/README.md."""


def label_instances(probabilities: FloatArray, threshold: float = 0.5) -> UInt16Array:
    """Label objects: (C, H, W) probabilities -> (H, W), 0 is background, 1..n are objects.

    Seeds are the foreground without the border channel, or the eroded foreground where there is
    none. Each foreground pixel is assigned to its nearest seed. Objects that are too small or too
    uncertain are discarded.
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
    means = np.bincount(labels.ravel(), probabilities[0].ravel()) / np.maximum(sizes, 1)
    sure = threshold + MIN_CONFIDENCE * min(threshold, 1 - threshold)
    keep = (sizes >= MIN_PIXELS) & (means >= sure)
    keep[0] = False
    if keep.sum() > MAX_OBJECTS:
        keep &= sizes >= np.partition(sizes[keep], -MAX_OBJECTS)[-MAX_OBJECTS]
        keep &= np.cumsum(keep) <= MAX_OBJECTS  # ties at the smallest size
    renumbered = np.where(keep, np.cumsum(keep), 0)
    return renumbered[labels].astype(np.uint16)
