"""How well the contours of a mask match. Knows arrays and SciPy.

Separate from `model.evaluation.metrics`, because the service imports that module and importing
SciPy takes a third of a second.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from model.arrays import BoolArray


def boundary_f1(
    predicted: BoolArray,
    true: BoolArray,
    tolerance: float = 2.0,
    valid: BoolArray | None = None,
) -> float:
    """Compute the F1 score of the contours (Csurka et al. 2013).

    Precision is the fraction of the predicted contour that lies within `tolerance` pixels of the
    true one; recall is the reverse.

    Args:
        predicted: (H, W).
        true: (H, W).
        tolerance: in pixels.
        valid: (H, W), the pixels that have a label; the others count as predicted correctly, and
            contours there are left out. None: all.

    Returns:
        0..1. It is 1 if neither mask has a contour, and 0 if only one has.
    """
    if valid is not None:
        true = np.where(valid, true, predicted)
    predicted_contour, true_contour = _find_contour(predicted), _find_contour(true)
    if valid is not None:
        predicted_contour, true_contour = predicted_contour & valid, true_contour & valid
    if not predicted_contour.any() or not true_contour.any():
        return float(predicted_contour.any() == true_contour.any())
    precision = _widen(true_contour, tolerance)[predicted_contour].mean()
    recall = _widen(predicted_contour, tolerance)[true_contour].mean()
    return float(2 * precision * recall / max(precision + recall, 1e-12))


def _widen(contour: BoolArray, distance: float) -> BoolArray:
    """Select the pixels within a distance of a contour, which is faster than all distances."""
    reach = int(distance)
    y, x = np.ogrid[-reach : reach + 1, -reach : reach + 1]
    widened: BoolArray = ndimage.binary_dilation(contour, x**2 + y**2 <= distance**2)
    return widened


def _find_contour(mask: BoolArray) -> BoolArray:
    """Select the pixels of a mask that have a neighbour outside it; the image's edge is none."""
    return mask & ~ndimage.binary_erosion(mask, border_value=1)
