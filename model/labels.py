"""Label maps: making them of masks, and sums over their objects.

A label map is (H, W): 0 is background, 1..n are objects. Knows NumPy and SciPy; no torch.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import ndimage

from model.arrays import AnyArray, BoolArray, Int32Array, Int64Array, LabelArray

_BLOCK_PIXELS = 1 << 20
"""Pixels that are summed at once: NumPy converts them to eight bytes each."""


def label_components(mask: BoolArray) -> tuple[Int32Array, int]:
    """Label the 8-connected components of a mask, (H, W), and count them."""
    labels = np.empty(mask.shape, np.int32)
    count = ndimage.label(mask, np.ones((3, 3)), output=labels)
    return labels, int(count)


def renumber(labels: LabelArray, keep: BoolArray) -> Int32Array:
    """Remove labels, and number the others 1..n in their order.

    Args:
        keep: (n + 1,) by label; that of the background does not matter.
    """
    numbers = np.where(keep, np.cumsum(keep) - keep[0], 0).astype(np.int32)
    numbers[0] = 0
    return numbers[labels]


def sum_by_label(labels: LabelArray, count: int, values: AnyArray | None = None) -> AnyArray:
    """Sum the values of the pixels of each label; without values, count the pixels.

    Args:
        count: the largest label.
        values: (H, W).

    Returns:
        (count + 1,) by label: float64, or int64 without values.
    """
    total = np.zeros(count + 1, np.int64 if values is None else np.float64)
    step = max(1, _BLOCK_PIXELS // labels.shape[1])
    for start in range(0, len(labels), step):
        rows = slice(start, start + step)
        weights = None if values is None else values[rows].ravel()
        total += np.bincount(labels[rows].ravel(), weights, count + 1)
    return total


def touches_edge(labels: LabelArray, count: int) -> BoolArray:
    """Find the labels that touch the edge of the image: (count + 1,) by label."""
    touching = np.zeros(count + 1, bool)
    for line in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        touching[line] = True
    return touching


@dataclasses.dataclass(frozen=True)
class Runs:
    """The pixels of all objects, as runs along rows; ordered by label, then by row and column.

    Attributes:
        labels, rows: (R,) of each run.
        starts, stops: (R,) its columns; `stops` are excluded.
    """

    labels: Int64Array
    rows: Int64Array
    starts: Int64Array
    stops: Int64Array


def find_runs(labels: LabelArray) -> Runs:
    """Find the runs of equal labels along the rows of a label map."""
    height, width = labels.shape
    begins = np.ones((height, width), bool)
    np.not_equal(labels[:, 1:], labels[:, :-1], out=begins[:, 1:])
    starts = np.flatnonzero(begins)
    stops = np.append(starts[1:], labels.size)
    found = labels.ravel()[starts]
    order = np.argsort(found, kind="stable")
    order = order[np.searchsorted(found, 1, sorter=order) :]
    rows = starts[order] // width
    return Runs(
        found[order].astype(np.int64),
        rows,
        starts[order] - rows * width,
        stops[order] - rows * width,
    )


def bound_objects(runs: Runs, count: int) -> Int64Array:
    """Find the box of each object: (count, 4), left, top, right and bottom, the latter excluded."""
    if count == 0:
        return np.zeros((0, 4), np.int64)
    first = np.searchsorted(runs.labels, np.arange(1, count + 1))
    last = np.append(first[1:], len(runs.labels)) - 1
    return np.column_stack(
        [
            np.minimum.reduceat(runs.starts, first),
            runs.rows[first],
            np.maximum.reduceat(runs.stops, first),
            runs.rows[last] + 1,
        ]
    )
