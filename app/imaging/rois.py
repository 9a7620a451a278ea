"""Objects -> a zip of ImageJ's ROIs, by roifile, for the ROI Manager of ImageJ and Fiji.

Knows no images and no HTTP.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from model.arrays import FloatArray
from model.objects import Objects
from model.outlines import Polygon, Ring, trace_outlines

if TYPE_CHECKING:
    from roifile import ImagejRoi

_MOVE, _LINE, _CLOSE = 0.0, 1.0, 4.0
"""Kinds of segments in a composite ROI: those of Java's PathIterator."""
_MAX_GROUP = 255
"""ImageJ groups ROIs by a byte."""


def encode_rois(objects: Objects, classes: Sequence[str], page: int | None = None) -> bytes:
    """Encode each object as a ROI along the edges of its pixels.

    An object without holes and of one part is a traced ROI, as the wand makes; others are composite
    ROIs. The name is the label, padded with zeros; the group is the class, and the properties are
    class and score.

    Args:
        classes: names of the classes, the background first.
        page: from 0: where in a stack the ROIs are shown; None is on every page.
    """
    buffer = io.BytesIO()
    digits = len(str(objects.count))
    outlines = trace_outlines(objects.labels, objects.count)
    with zipfile.ZipFile(buffer, "w") as archive:
        for index, polygons in enumerate(outlines):
            kind = int(objects.classes[index])
            roi = _make_roi(polygons, f"{index + 1:0{digits}}")
            roi.position = 0 if page is None else page + 1  # 0 is everywhere
            roi.group = min(kind, _MAX_GROUP)
            roi.props = f"class: {classes[kind]}\nscore: {objects.scores[index]:.4f}\n"
            entry = zipfile.ZipInfo(f"{roi.name}.roi")  # without a time: equal objects, equal bytes
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, roi.tobytes(), compresslevel=1)
    return buffer.getvalue()


def _make_roi(polygons: list[Polygon], name: str) -> ImagejRoi:
    import roifile

    rings = [ring for polygon in polygons for ring in polygon]
    roi = roifile.ImagejRoi.frompoints(rings[0], name=name)
    corners = np.concatenate(rings)
    roi.left, roi.top = corners.min(axis=0).tolist()
    roi.right, roi.bottom = corners.max(axis=0).tolist()
    if len(rings) == 1:
        roi.roitype = roifile.ROI_TYPE.TRACED
        return roi
    roi.roitype = roifile.ROI_TYPE.RECT  # the type of all composite ROIs
    roi.integer_coordinates = roi.subpixel_coordinates = None
    roi.n_coordinates = 0
    roi.multi_coordinates = np.concatenate([_to_path(ring) for ring in rings])
    roi.shape_roi_size = len(roi.multi_coordinates)
    return roi


def _to_path(ring: Ring) -> FloatArray:
    """Convert a ring to segments: the kind of each, and the point where it ends."""
    segments = np.column_stack([np.full(len(ring), _LINE), ring])
    segments[0, 0] = _MOVE
    return np.append(segments.ravel(), _CLOSE).astype(np.float32)
