"""Objects -> annotations in COCO's format, with run-length encoded masks.

The format is that of `pycocotools`, which compresses the runs. Knows no images and no HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from model.arrays import AnyArray
from model.labels import bound_objects, find_runs
from model.objects import Objects


def encode_coco(objects: Objects, classes: Sequence[str], name: str = "") -> bytes:
    """Encode the objects of one image as a COCO data set, in JSON.

    Args:
        classes: names of the classes, the background first.
        name: of the image's file.

    Returns:
        `images`, `annotations` and `categories`. Ids are those of the label map. An annotation has
        `segmentation` (RLE), `area`, `bbox` (left, top, width, height), `category_id` (index of the
        class), `iscrowd` (0), and `score` (mean probability).
    """
    height, width = objects.labels.shape
    image = {"id": 1, "width": width, "height": height, "file_name": name}
    categories = [
        {"id": index, "name": each, "supercategory": ""}
        for index, each in enumerate(classes)
        if index
    ]
    # Joined as text: as Python objects, the annotations would take several times the memory.
    annotations = ", ".join(map(json.dumps, _annotate(objects)))
    return (
        f'{{"images": [{json.dumps(image)}], "annotations": [{annotations}], '
        f'"categories": {json.dumps(categories)}}}'
    ).encode()


def _annotate(objects: Objects) -> Iterator[dict[str, Any]]:
    from pycocotools.mask import frPyObjects

    height, width = objects.labels.shape
    runs = find_runs(objects.labels.T)  # COCO counts column by column
    boxes = bound_objects(runs, objects.count)[:, [1, 0, 3, 2]]
    starts = runs.rows * height + runs.starts
    stops = runs.rows * height + runs.stops
    first = np.searchsorted(runs.labels, np.arange(1, objects.count + 2))
    for index, (left, top, right, bottom) in enumerate(boxes.tolist()):
        part = slice(first[index], first[index + 1])
        counts = _count_runs(starts[part], stops[part], height * width)
        (segmentation,) = frPyObjects([{"size": [height, width], "counts": counts}], height, width)
        yield {
            "id": index + 1,
            "image_id": 1,
            "category_id": int(objects.classes[index]),
            "segmentation": {
                "size": [height, width],
                "counts": segmentation["counts"].decode("ascii"),
            },
            "area": int(objects.areas[index]),
            "bbox": [left, top, right - left, bottom - top],
            "iscrowd": 0,
            "score": round(float(objects.scores[index]), 4),
        }


def _count_runs(starts: AnyArray, stops: AnyArray, size: int) -> list[int]:
    """Convert the runs of an object to lengths: outside, inside, outside, and so on to the end."""
    apart = starts[1:] != stops[:-1]  # a run may continue at the top of the next column
    bounds = np.empty(2 * int(apart.sum()) + 4, np.int64)
    bounds[0], bounds[-1] = 0, size
    bounds[1:-1:2] = starts[np.append(True, apart)]
    bounds[2:-1:2] = stops[np.append(apart, True)]
    counts: list[int] = np.diff(bounds).tolist()
    return counts if counts[-1] else counts[:-1]
