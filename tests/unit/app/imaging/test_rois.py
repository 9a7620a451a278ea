"""ImageJ's ROIs, as roifile reads them."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import roifile
from shapely import Polygon, contains_xy

from app.imaging.rois import encode_rois
from model.arrays import AnyArray, BoolArray
from tests.conftest import nuclei
from tests.objects import CLASSES, draw_discs, make_objects

RING = np.pad(np.zeros((2, 3), int), 2, constant_values=1)
PARTS = np.array([[1, 0, 0], [0, 1, 0], [2, 0, 2]])
NUCLEI = np.unique(nuclei(90, 130)[1], return_inverse=True)[1].reshape(90, 130)


def read(labels: AnyArray, page: int | None = None) -> list[roifile.ImagejRoi]:
    with zipfile.ZipFile(io.BytesIO(encode_rois(make_objects(labels), CLASSES, page))) as archive:
        assert archive.testzip() is None
        return [roifile.ImagejRoi.frombytes(archive.read(name)) for name in archive.namelist()]


def fill(roi: roifile.ImagejRoi, height: int, width: int) -> BoolArray:
    """The pixels whose centres are within an odd number of the ROI's paths."""
    paths = roi.coordinates(multi=True) if roi.composite else [roi.coordinates()]
    y, x = np.mgrid[:height, :width] + 0.5
    inside = np.zeros((height, width), bool)
    for path in paths:
        inside ^= contains_xy(Polygon(path), x, y)
    return inside


@pytest.mark.parametrize("labels", [RING, PARTS, NUCLEI, draw_discs(48, 12)])
def test_rois_enclose_the_pixels_of_their_objects(labels: AnyArray) -> None:
    rois = read(labels)
    assert len(rois) == labels.max()
    for label, roi in enumerate(rois, start=1):
        inside = labels == label
        np.testing.assert_array_equal(fill(roi, *labels.shape), inside)
        rows, columns = np.nonzero(inside)
        assert (roi.left, roi.right) == (columns.min(), columns.max() + 1)
        assert (roi.top, roi.bottom) == (rows.min(), rows.max() + 1)


def test_holes_and_parts_make_composite_rois() -> None:
    assert [roi.composite for roi in read(RING)] == [True]
    assert [roi.composite for roi in read(PARTS)] == [True, True]
    (square,) = read(np.ones((3, 3), int))
    assert not square.composite
    assert square.roitype is roifile.ROI_TYPE.TRACED


def test_rois_have_names_classes_and_positions() -> None:
    rois = read(draw_discs(48, 12), page=6)
    assert [roi.name for roi in rois] == [f"{label:02}" for label in range(1, 17)]
    assert {roi.position for roi in rois} == {7}
    assert {roi.group for roi in rois} == {1}
    assert rois[0].properties == {"class": "nucleus", "score": 0.75}
    assert {roi.position for roi in read(draw_discs(48, 12))} == {0}


def test_rois_beyond_16_bits_keep_their_place() -> None:
    labels = np.zeros((3, 70_000), int)
    labels[1, 40_000], labels[1, 66_000:66_003] = 1, 2
    for roi, left in zip(read(labels), (40_000, 66_000), strict=True):
        assert roi.coordinates()[:, 0].min() == left


def test_no_objects_make_an_empty_zip() -> None:
    assert read(np.zeros((2, 2), int)) == []
