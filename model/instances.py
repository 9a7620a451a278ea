"""Probabilities -> one label an object. NumPy and SciPy; no torch, since the service calls it."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from model.arrays import FloatArray, UInt16Array

MIN_PIXELS = 36
"""Smaller objects are specks."""
MAX_OBJECTS = 65535
"""What a 16-bit label map can tell apart; of more, the largest are kept."""
SURENESS = 0.6
"""An object's mean probability is above the threshold t by this times min(t, 1 - t) at least. What
is barely foreground everywhere (debris, blur) is foreground in the mask, but no object.

Both were chosen on the validation fields of the nuclei; see weights/README.md."""


def label_instances(probabilities: FloatArray, threshold: float = 0.5) -> UInt16Array:
    """(C, H, W) probabilities -> (H, W) labels, 0 background, 1..n one object each.

    With a border channel, seeds are the foreground without the borders; without one, what erosion
    leaves. Every foreground pixel then goes to its nearest seed. Specks and what the network is
    unsure of are left out.
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
    sure = threshold + SURENESS * min(threshold, 1 - threshold)
    keep = (sizes >= MIN_PIXELS) & (means >= sure)
    keep[0] = False
    if keep.sum() > MAX_OBJECTS:
        keep &= sizes >= np.partition(sizes[keep], -MAX_OBJECTS)[-MAX_OBJECTS]
        keep &= np.cumsum(keep) <= MAX_OBJECTS  # of several as small as the last
    renumbered = np.where(keep, np.cumsum(keep), 0)
    return renumbered[labels].astype(np.uint16)
