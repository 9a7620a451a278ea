"""napari: segments the selected image layer by unet-server, and adds the objects with measurements.

Paste it into napari's console, or run it as a script. It needs unet-client[arrays].

    segment_layer(viewer)
"""

from __future__ import annotations

import csv
from typing import Any

import numpy as np

from unet_client import Client


def segment_layer(
    viewer: Any, url: str = "http://localhost:8000", key: str | None = None, **query: Any
) -> Any:
    """Segment the active image layer: (H, W) of uint8 or uint16, or (H, W, 3) of uint8.

    Args:
        viewer: `napari.Viewer`.
        url: of the service.
        key: API key.
        query: parameters of `Client.segment`, for example model="nuclei" or min_area=20.

    Returns:
        The new labels layer. Its features have a row for each label.
    """
    layer = viewer.layers.selection.active
    with Client(url, key=key) as client:
        result = client.segment(
            np.asarray(layer.data), output=["instances", "measurements"], format="tiff", **query
        )
    rows = list(csv.DictReader(result.measurements().splitlines()))
    columns = rows[0].keys() if rows else ()
    features = {name: [_parse(row[name]) for row in rows] for name in columns}
    features["index"] = [int(row["id"]) for row in rows]  # napari's name for the label
    return viewer.add_labels(
        result.image().astype(np.int32),
        name=f"{layer.name} objects",
        features=features,
        scale=layer.scale,
        translate=layer.translate,
    )


def _parse(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value
