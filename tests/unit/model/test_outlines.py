"""Outlines enclose exactly their pixels, and are valid for any label map."""

from __future__ import annotations

import numpy as np
import pytest
from shapely import MultiPolygon, Polygon, contains_xy
from shapely.validation import explain_validity

from model.arrays import Int32Array
from model.outlines import trace_outlines
from tests.conftest import nuclei

RING = np.pad(np.zeros((2, 2), np.int32), 1, constant_values=1)


def trace(labels: Int32Array, count: int) -> list[MultiPolygon]:
    return [
        MultiPolygon([Polygon(polygon[0], polygon[1:]) for polygon in polygons])
        for polygons in trace_outlines(labels, count)
    ]


def assert_exact(labels: Int32Array, count: int) -> None:
    y, x = np.mgrid[: labels.shape[0], : labels.shape[1]] + 0.5
    for label, shape in enumerate(trace(labels, count), start=1):
        inside = labels == label
        assert shape.is_valid, f"{explain_validity(shape)}: {labels.tolist()}"
        assert shape.area == inside.sum()
        np.testing.assert_array_equal(contains_xy(shape, x, y), inside)
        for polygon in shape.geoms:
            assert polygon.is_valid
            assert polygon.exterior.is_ccw  # RFC 7946, section 3.1.6
            assert not any(hole.is_ccw for hole in polygon.interiors)


@pytest.mark.parametrize("seed", range(40))
def test_outlines_of_noise_are_valid_and_exact(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 1 + seed % 3
    height, width = rng.integers(1, 16, 2)
    noise = rng.random((height, width)) < rng.uniform(0.2, 0.9)
    assert_exact(np.where(noise, rng.integers(1, count + 1, (height, width)), 0), count)


@pytest.mark.parametrize(
    ("rows", "parts", "holes"),
    [
        (["1"], 1, 0),
        (["10", "01"], 2, 0),  # touch at a corner
        (["111", "101", "111"], 1, 1),
        (["11111", "10101", "11111"], 1, 2),
        (["1111", "1011", "1101", "1111"], 1, 2),  # two holes touch at a corner
        (["111", "101", "110"], 1, 1),  # a hole touches the outside at a corner
        (["11111", "10001", "10101", "10001", "11111"], 2, 1),  # an island in a hole
        (["1111", "1001", "1011", "1110"], 1, 1),
    ],
)
def test_parts_and_holes(rows: list[str], parts: int, holes: int) -> None:
    labels = np.array([list(map(int, row)) for row in rows], np.int32)
    assert_exact(labels, 1)
    (shape,) = trace(labels, 1)
    assert len(shape.geoms) == parts
    assert sum(len(polygon.interiors) for polygon in shape.geoms) == holes


def test_an_object_within_the_hole_of_another_is_left_out_of_it() -> None:
    labels = np.array([[1, 1, 1], [1, 2, 1], [1, 1, 1]], np.int32)
    assert_exact(labels, 2)
    outer, inner = trace(labels, 2)
    assert outer.touches(inner)


def test_only_corners_are_vertices() -> None:
    ((polygon,),) = trace_outlines(np.ones((3, 5), np.int32), 1)
    assert sorted(map(tuple, polygon[0].tolist())) == [(0, 0), (0, 3), (5, 0), (5, 3)]


def test_labels_that_do_not_occur_have_no_polygons() -> None:
    assert list(trace_outlines(np.full((2, 2), 2, np.int32), 3))[::2] == [[], []]
    assert list(trace_outlines(np.zeros((2, 2), np.int32), 0)) == []


def test_outlines_of_nuclei_are_exact() -> None:
    labels = nuclei(120, 150, seed=3)[1].astype(np.int32)
    assert_exact(labels, int(labels.max()))
