"""GeoJSON features: their geometry, their properties, and what QuPath reads of them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from shapely.geometry import shape

from model.arrays import AnyArray
from model.measurements import measure_objects
from model.polygons import encode_polygons
from tests.conftest import nuclei
from tests.objects import make_objects, read_like_qupath

CLASSES, COLORS = ("background", "nucleus"), ((0, 0, 0), (255, 64, 129))


def collect(labels: AnyArray, object_type: str = "detection") -> list[dict[str, Any]]:
    objects = make_objects(labels)
    columns = measure_objects(objects, np.full(labels.shape, 3, np.uint8))
    content = encode_polygons(objects, CLASSES, COLORS, columns, object_type)
    document = json.loads(content)
    assert document["type"] == "FeatureCollection"
    features: list[dict[str, Any]] = document["features"]
    return features


def test_square_in_the_corner_has_closed_ring_and_properties() -> None:
    labels = np.zeros((8, 9), np.int32)
    labels[:4, :4] = 1
    (feature,) = collect(labels)
    assert feature["type"] == "Feature"
    assert feature["id"] == 1
    assert feature["bbox"] == [0, 0, 4, 4]
    properties = feature["properties"]
    assert (properties["class"], properties["area"], properties["score"]) == ("nucleus", 16, 0.75)
    (ring,) = feature["geometry"]["coordinates"]
    assert ring[0] == ring[-1]
    assert np.min(ring) == 0
    assert np.max(ring) == 4


def test_object_with_hole_and_two_parts_is_a_multipolygon() -> None:
    labels = np.zeros((30, 30), np.int32)
    labels[2:12, 2:12] = 1
    labels[5:9, 5:9] = 0
    labels[20:25, 20:25] = 1
    (feature,) = collect(labels)
    assert feature["geometry"]["type"] == "MultiPolygon"
    assert sorted(map(len, feature["geometry"]["coordinates"])) == [1, 2]
    assert feature["bbox"] == [2, 2, 25, 25]
    assert shape(feature["geometry"]).area == feature["properties"]["area"] == 100 - 16 + 25


def test_qupath_reads_every_object_with_its_measurements() -> None:
    labels = np.unique(nuclei(120, 150, seed=3)[1], return_inverse=True)[1].reshape(120, 150)
    features = collect(labels)
    assert len(features) == labels.max()
    for label, feature in enumerate(features, start=1):
        read = read_like_qupath(feature)
        assert (read["type"], read["class"]) == ("detection", "nucleus")
        assert read["roi"].is_valid
        assert read["roi"].area == (labels == label).sum() == read["measurements"]["area_px"]
        assert read["measurements"]["mean_intensity_1"] == 3
        assert read["measurements"]["score"] == 0.75


def test_regions_can_be_annotations() -> None:
    (feature,) = collect(np.ones((2, 2), int), "annotation")
    assert read_like_qupath(feature)["type"] == "annotation"


def test_empty_label_map_has_no_features() -> None:
    assert collect(np.zeros((5, 5), np.int32)) == []
