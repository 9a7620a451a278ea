"""How well the contours of a mask fit. Apart from the other metrics, which a service needs: SciPy
takes a third of a second to import."""

from __future__ import annotations

from scipy import ndimage

from model.arrays import BoolArray


def boundary_f1(predicted: BoolArray, true: BoolArray, tolerance: float = 2.0) -> float:
    """F1 of the contours: how much of each lies within `tolerance` pixels of the other.

    Csurka et al. 2013. 1 where neither mask has a contour, 0 where one of them alone has.
    """
    ours, theirs = _contour(predicted), _contour(true)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    precision = (ndimage.distance_transform_edt(~theirs)[ours] <= tolerance).mean()
    recall = (ndimage.distance_transform_edt(~ours)[theirs] <= tolerance).mean()
    return float(2 * precision * recall / max(precision + recall, 1e-12))


def _contour(mask: BoolArray) -> BoolArray:
    """Pixels of the mask with a neighbour outside; the edge of the image is no contour."""
    return mask & ~ndimage.binary_erosion(mask, border_value=1)
