"""Separate touching objects: probabilities -> a label map. Knows NumPy and SciPy; no torch."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from model.arrays import BoolArray, FloatArray, Int32Array
from model.labels import label_components, renumber, sum_by_label

MIN_PIXELS = 36
"""Pixels. Smaller objects are discarded unless another limit is given."""
MIN_CONFIDENCE = 0.6
"""An object's mean probability exceeds the threshold t by at least this times min(t, 1 - t). Debris
and blur that are barely foreground everywhere stay in the mask, but are not objects.

`MIN_PIXELS` and this were chosen on the validation fields of the nuclei; see weights/README.md."""


def label_instances(
    probabilities: FloatArray, threshold: float = 0.5, min_pixels: int = MIN_PIXELS
) -> Int32Array:
    """Label objects: (C, H, W) probabilities -> (H, W), 0 is background, 1..n are objects.

    Objects that are too small or too uncertain are discarded.
    """
    parts, count = separate_parts(probabilities, threshold)
    return renumber(parts, find_objects(parts, count, probabilities[0], threshold, min_pixels))


def separate_parts(probabilities: FloatArray, threshold: float) -> tuple[Int32Array, int]:
    """Divide the foreground into parts that are candidates for objects.

    Seeds are the foreground without the border channel, or the eroded foreground where there is
    none. A component of the foreground in which nothing remains is a seed itself, so that a speck
    does not belong to a distant object. Each foreground pixel is assigned to its nearest seed.

    Args:
        probabilities: (C, H, W), the foreground first.

    Returns:
        (H, W), 0 is background, and the number of parts.
    """
    foreground = probabilities[0] >= threshold
    if len(probabilities) > 1:
        inner = foreground & (probabilities[1] < 0.5)
    else:
        inner = ndimage.binary_erosion(foreground, iterations=2)
    seeds = np.empty(foreground.shape, np.int32)
    count = int(ndimage.label(inner, output=seeds))
    components, number = label_components(foreground)
    seedless = np.ones(number + 1, bool)
    seedless[components[inner]] = seedless[0] = False
    if seedless.any():
        numbers = np.where(seedless, count + np.cumsum(seedless), 0).astype(np.int32)
        seeds += numbers[components]
        count = int(numbers.max())
    del components
    nearest = ndimage.distance_transform_edt(
        seeds == 0, return_distances=False, return_indices=True
    )
    return np.where(foreground, seeds[tuple(nearest)], 0), count


def find_objects(
    parts: Int32Array,
    count: int,
    probability: FloatArray,
    threshold: float,
    min_pixels: int = MIN_PIXELS,
) -> BoolArray:
    """Decide which parts are objects: large and certain enough.

    Args:
        parts: from `separate_parts`.
        probability: (H, W) of the foreground.

    Returns:
        (count + 1,) by label; False for the background.
    """
    sizes = sum_by_label(parts, count)
    means = sum_by_label(parts, count, probability) / np.maximum(sizes, 1)
    sure = threshold + MIN_CONFIDENCE * min(threshold, 1 - threshold)
    keep: BoolArray = (sizes >= min_pixels) & (sizes > 0) & (means >= sure)
    keep[0] = False
    return keep
