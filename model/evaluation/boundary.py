"""How well the contours of a mask match. Knows arrays and SciPy.

Separate from `model.evaluation.metrics`, because the service imports that module and importing
SciPy takes a third of a second.
"""

from __future__ import annotations

from scipy import ndimage

from model.arrays import BoolArray


def boundary_f1(predicted: BoolArray, true: BoolArray, tolerance: float = 2.0) -> float:
    """Compute the F1 score of the contours (Csurka et al. 2013).

    Precision is the fraction of the predicted contour that lies within `tolerance` pixels of the
    true one; recall is the reverse.

    Args:
        predicted: (H, W).
        true: (H, W).
        tolerance: in pixels.

    Returns:
        0..1. It is 1 if neither mask has a contour, and 0 if only one has.
    """
    predicted_contour, true_contour = _find_contour(predicted), _find_contour(true)
    if not predicted_contour.any() or not true_contour.any():
        return float(predicted_contour.any() == true_contour.any())
    to_true = ndimage.distance_transform_edt(~true_contour)
    to_predicted = ndimage.distance_transform_edt(~predicted_contour)
    precision = (to_true[predicted_contour] <= tolerance).mean()
    recall = (to_predicted[true_contour] <= tolerance).mean()
    return float(2 * precision * recall / max(precision + recall, 1e-12))


def _find_contour(mask: BoolArray) -> BoolArray:
    """Select the pixels of a mask that have a neighbour outside it; the image's edge is none."""
    return mask & ~ndimage.binary_erosion(mask, border_value=1)
