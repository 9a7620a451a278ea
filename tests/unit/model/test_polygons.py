"""Outlines are closed, have the right area and position, and include holes and parts."""

from __future__ import annotations

import numpy as np

from model.polygons import label_components, to_features
from tests.conftest import nuclei


def compute_area(ring: list[list[float]]) -> float:
    """Apply the shoelace formula; positive if counter-clockwise with y upwards."""
    x, y = np.array(ring).T
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2)


def test_square_in_the_corner_has_closed_ring_and_properties() -> None:
    labels = np.zeros((8, 9), np.int32)
    labels[:4, :4] = 1
    probability = np.full(labels.shape, 0.75, np.float32)
    (feature,) = to_features(labels, probability, "nucleus")
    assert feature["type"] == "Feature"
    assert feature["bbox"] == [0, 0, 4, 4]
    assert feature["properties"]["area"] == 16
    assert feature["properties"]["score"] == 0.75
    assert feature["properties"]["classification"] == {"name": "nucleus"}
    (ring,) = feature["geometry"]["coordinates"]
    assert ring[0] == ring[-1]
    assert np.min(ring) == 0
    assert np.max(ring) == 4


def test_object_with_hole_and_two_parts_is_a_multipolygon() -> None:
    labels = np.zeros((30, 30), np.int32)
    labels[2:12, 2:12] = 1
    labels[5:9, 5:9] = 0
    labels[20:25, 20:25] = 1
    (feature,) = to_features(labels, labels.astype(np.float32), "x")
    assert feature["geometry"]["type"] == "MultiPolygon"
    first, second = feature["geometry"]["coordinates"]
    assert [len(first), len(second)] == [2, 1]
    outer, hole = first
    assert (
        compute_area(outer) * compute_area(hole) < 0
    )  # they wind in opposite directions (RFC 7946, 3.1.6)
    total = abs(compute_area(outer)) - abs(compute_area(hole)) + abs(compute_area(second[0]))
    assert abs(total - feature["properties"]["area"]) < 6  # corners are cut


def test_outlines_of_nuclei_match_their_area_and_position() -> None:
    _, labels = nuclei(120, 150, seed=3)
    features = to_features(labels, (labels > 0).astype(np.float32), "nucleus")
    present = [label for label in np.unique(labels) if label]
    assert len(features) == len(present)
    for label, feature in zip(present, features, strict=True):
        if feature["geometry"]["type"] != "Polygon":
            continue
        rows, columns = np.nonzero(labels == label)
        rings = feature["geometry"]["coordinates"]
        inside = abs(compute_area(rings[0])) - sum(abs(compute_area(ring)) for ring in rings[1:])
        assert abs(inside - len(rows)) <= 0.1 * len(rows) + 3
        x, y = np.array(rings[0]).mean(axis=0)
        assert abs(x - columns.mean() - 0.5) < 3
        assert abs(y - rows.mean() - 0.5) < 3


def test_empty_label_map_has_no_features() -> None:
    empty = np.zeros((5, 5), np.int32)
    assert to_features(empty, empty.astype(np.float32), "x") == []
    assert label_components(empty > 0).max() == 0


def test_components_are_8_connected() -> None:
    mask = np.eye(4, dtype=bool)
    assert label_components(mask).max() == 1
