"""Label maps as objects of one class, and objects as QuPath reads them, for tests of outputs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from shapely.geometry import shape

from model.arrays import AnyArray
from model.objects import Objects

CLASSES = ("background", "nucleus")


def make_objects(labels: AnyArray, score: float = 0.75) -> Objects:
    """Objects of the labels 1..max, each of which occurs."""
    count = int(labels.max())
    return Objects(
        labels.astype(np.int32),
        np.ones(count, np.uint8),
        np.bincount(labels.ravel(), minlength=count + 1)[1:],
        np.full(count, score, np.float32),
    )


def draw_discs(side: int, pitch: int) -> AnyArray:
    """A label map (H, W) with a disc in each square of a grid."""
    y, x = np.indices((pitch, pitch)) - (pitch - 1) / 2
    disc = x**2 + y**2 < (0.3 * pitch) ** 2
    cells = np.arange(1, (side // pitch) ** 2 + 1).reshape(side // pitch, -1)
    return np.kron(cells, disc).astype(np.int32)


def read_like_qupath(feature: dict[str, Any]) -> dict[str, Any]:
    """Read a feature by the rules of QuPath 0.4 and later.

    From its `QuPathTypeAdapters` and `GsonTools.PathClassTypeAdapter`: an `objectType` that it does
    not know becomes an annotation; a classification needs a name and a color of three integers;
    measurements are a map of names to numbers, where nothing else can be cast; a name is a string.
    """
    properties = feature["properties"]
    assert properties["objectType"] in ("annotation", "detection", "cell", "tile")
    classification = properties["classification"]
    assert isinstance(classification["name"], str)
    assert len(classification["color"]) == 3
    assert all(type(value) is int and 0 <= value <= 255 for value in classification["color"])
    assert isinstance(properties["name"], str)
    for name, value in properties["measurements"].items():
        assert isinstance(name, str)
        assert type(value) in (int, float)
        assert math.isfinite(value)
    geometry = feature["geometry"]
    assert geometry["type"] in ("Polygon", "MultiPolygon")
    if geometry["type"] == "MultiPolygon":
        assert len(geometry["coordinates"]) > 1
    return {
        "type": properties["objectType"],
        "class": classification["name"],
        "roi": shape(geometry),
        "measurements": properties["measurements"],
    }
