"""Label maps -> outlines in GeoJSON (RFC 7946), which QuPath, napari and GIS programs read.

Coordinates are pixels, x before y, with (0, 0) at the outer corner of the first pixel. Knows NumPy,
SciPy and contourpy; no torch.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from contourpy import FillType, contour_generator
from scipy import ndimage

from model.arrays import AnyArray, BoolArray, FloatArray, Int32Array


def to_features(labels: AnyArray, probability: FloatArray, name: str) -> list[dict[str, Any]]:
    """Convert each object to a GeoJSON Feature, in the order of the labels.

    Args:
        labels: (H, W), 0 is background, one value per object.
        probability: (H, W), of the foreground.
        name: of the class.

    Returns:
        Features with the outer ring and the holes of each part, a bounding box, and the properties
        `classification.name`, `area` (pixels) and `score` (mean probability).
    """
    features = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        inside = labels[box] == label
        rows, columns = box
        polygons = _rings(inside, columns.start, rows.start)
        geometry = (
            {"type": "Polygon", "coordinates": polygons[0]}
            if len(polygons) == 1
            else {"type": "MultiPolygon", "coordinates": polygons}
        )
        features.append(
            {
                "type": "Feature",
                "bbox": [columns.start, rows.start, columns.stop, rows.stop],
                "geometry": geometry,
                "properties": {
                    "objectType": "detection",
                    "classification": {"name": name},
                    "area": int(inside.sum()),
                    "score": round(float(probability[box][inside].mean()), 4),
                },
            }
        )
    return features


def label_components(mask: BoolArray) -> Int32Array:
    """Label the 8-connected components of a mask, (H, W)."""
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    return np.asarray(labels, np.int32)


def _rings(inside: BoolArray, left: int, top: int) -> list[list[list[list[float]]]]:
    """Trace the polygons of a mask; each lists its closed outer ring first, then its holes."""
    padded = np.pad(inside, 1).astype(np.float32)  # so that rings close at the edge
    contours = contour_generator(z=padded, fill_type=FillType.OuterOffset).filled(0.5, np.inf)
    polygons = []
    for points, offsets in zip(*contours, strict=True):
        # samples are pixel centres, and the padding shifts them by one
        moved = np.asarray(points) - 0.5 + (left, top)
        polygons.append([np.round(moved[a:b], 2).tolist() for a, b in pairwise(offsets)])
    return polygons
