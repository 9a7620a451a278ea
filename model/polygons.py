"""Objects -> outlines in GeoJSON (RFC 7946), which QuPath, napari and GIS programs read.

Coordinates are pixels, x before y, with (0, 0) at the outer corner of the first pixel. Knows no
images and no HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from model.arrays import AnyArray, Color
from model.measurements import to_short_numbers
from model.objects import Objects
from model.outlines import Polygon, trace_outlines


def encode_polygons(
    objects: Objects,
    classes: Sequence[str],
    colors: Sequence[Color],
    measurements: Mapping[str, AnyArray],
    object_type: str = "detection",
) -> bytes:
    """Encode the objects of an image as a GeoJSON FeatureCollection.

    A feature is a Polygon, or a MultiPolygon if the object has parts that no side of a pixel
    connects. Its `id` is the label. The properties `objectType`, `name`, `classification` and
    `measurements` are those that QuPath 0.4 and later read; `class`, `area` (pixels) and `score`
    (mean probability) repeat the most important for other programs.

    Args:
        classes, colors: of each class, the background first.
        measurements: columns of finite numbers, one value per object.
        object_type: QuPath's: detection, for many small objects, or annotation.
    """
    features = ", ".join(
        json.dumps(feature)
        for feature in _describe_features(objects, classes, colors, measurements, object_type)
    )
    return f'{{"type": "FeatureCollection", "features": [{features}]}}'.encode()


def _describe_features(
    objects: Objects,
    classes: Sequence[str],
    colors: Sequence[Color],
    measurements: Mapping[str, AnyArray],
    object_type: str,
) -> Iterator[dict[str, Any]]:
    columns = {name: to_short_numbers(values) for name, values in measurements.items()}
    outlines = trace_outlines(objects.labels, objects.count)
    for index, polygons in enumerate(outlines):
        outer = np.concatenate([polygon[0] for polygon in polygons])
        kind = int(objects.classes[index])
        score = round(float(objects.scores[index]), 4)
        measured = {name: values[index] for name, values in columns.items()}
        yield {
            "type": "Feature",
            "id": index + 1,
            "bbox": [*outer.min(axis=0).tolist(), *outer.max(axis=0).tolist()],
            "geometry": _to_geometry(polygons),
            "properties": {
                "objectType": object_type,
                "name": str(index + 1),
                "classification": {"name": classes[kind], "color": list(colors[kind])},
                "measurements": measured | {"score": score},
                "class": classes[kind],
                "area": int(objects.areas[index]),
                "score": score,
            },
        }


def _to_geometry(polygons: list[Polygon]) -> dict[str, Any]:
    coordinates = [[_close(ring.tolist()) for ring in polygon] for polygon in polygons]
    if len(coordinates) == 1:
        return {"type": "Polygon", "coordinates": coordinates[0]}
    return {"type": "MultiPolygon", "coordinates": coordinates}


def _close(ring: list[list[int]]) -> list[list[int]]:
    return [*ring, ring[0]]
