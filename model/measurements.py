"""Label maps -> the size, shape and intensity of each object.

The definitions are those of scikit-image's `regionprops`, with which the tests compare them. That
library works object by object; here all objects are measured at once
(docs/decisions/0030-outputs-of-objects.md). Knows NumPy and CSV; no images and no HTTP.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from model.arrays import AnyArray, BoolArray, Int64Array, LabelArray
from model.labels import Runs, bound_objects, find_runs, sum_by_label
from model.objects import Objects

_Amounts = npt.NDArray[np.float64]

_PERIMETER_WEIGHTS = np.zeros(42)
"""Length that a border pixel contributes. The index adds 2 for each neighbour at a side, and 10 for
each at a corner, that is a border pixel of the same object (Benkrid and Crookes, 2000)."""
_PERIMETER_WEIGHTS[[4, 6, 14, 16, 24, 26]] = 1
_PERIMETER_WEIGHTS[[20, 32]] = math.sqrt(2)
_PERIMETER_WEIGHTS[[12, 22]] = (1 + math.sqrt(2)) / 2
_HULL_POINTS = 1 << 20
"""Points whose hulls are computed at once."""


def measure_objects(
    objects: Objects, image: AnyArray, pixel_size: float | None = None
) -> dict[str, AnyArray]:
    """Measure each object.

    Args:
        image: (H, W) or (H, W, C), whose intensities are measured.
        pixel_size: in micrometres; None measures in pixels.

    Returns:
        Columns with one value per object. A name ends with the unit, `px`, `um` or `um2`, if the
        column has one. Intensities have a column for each channel, numbered from 1.
    """
    labels, count, area = objects.labels, objects.count, objects.areas
    runs = find_runs(labels)
    unit, size = ("px", 1.0) if pixel_size is None else ("um", pixel_size)
    area_unit = "px" if pixel_size is None else "um2"
    left, top, right, bottom = bound_objects(runs, count).T
    x, y, eccentricity = _compute_moments(runs, area, left, top)
    lengths = {
        "centroid_x": x,
        "centroid_y": y,
        "left": left,
        "top": top,
        "width": right - left,
        "height": bottom - top,
        "perimeter": _compute_perimeters(labels, count),
        "equivalent_diameter": np.sqrt(4 * area / math.pi),
    }
    columns: dict[str, AnyArray] = {f"area_{area_unit}": area if size == 1 else area * size**2}
    for name, values in lengths.items():
        columns[f"{name}_{unit}"] = values if size == 1 else values * size
    columns["eccentricity"] = eccentricity
    columns["solidity"] = area / _compute_hull_areas(runs, count, top, bottom)
    channels = image[:, :, None] if image.ndim == 2 else image
    for channel in range(channels.shape[2]):
        total = sum_by_label(labels, count, channels[:, :, channel])[1:]
        columns[f"mean_intensity_{channel + 1}"] = total / area
        columns[f"integrated_intensity_{channel + 1}"] = total.astype(np.int64)
    return columns


def to_short_numbers(values: AnyArray) -> list[int | float]:
    """Convert measured values to Python numbers, floats to eight significant digits."""
    if values.dtype.kind in "iu":
        integers: list[int | float] = values.tolist()
        return integers
    return [float(f"{value:.8g}") for value in values.tolist()]


def encode_csv(
    objects: Objects, classes: Sequence[str], measurements: Mapping[str, AnyArray]
) -> bytes:
    """Encode measurements as a CSV file with a header, one line per object.

    Args:
        classes: names of the classes, the background first.
        measurements: columns of `measure_objects`. They follow `id` (the label) and `class`, and
            precede `score` (the mean probability).
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["id", "class", *measurements, "score"])
    writer.writerows(
        zip(
            range(1, objects.count + 1),
            (classes[index] for index in objects.classes.tolist()),
            *map(to_short_numbers, measurements.values()),
            (round(score, 4) for score in objects.scores.tolist()),
            strict=True,
        )
    )
    return buffer.getvalue().encode()


def _compute_moments(
    runs: Runs, area: Int64Array, left: Int64Array, top: Int64Array
) -> tuple[_Amounts, _Amounts, _Amounts]:
    """Compute the centroids x and y, from the outer corner of the first pixel, and eccentricities.

    The eccentricity is that of the ellipse with the same second moments: 0 for a circle, 1 for a
    line.
    """
    index = runs.labels - 1
    # Relative to the box of each object, where the sums are exact.
    start, stop, row = runs.starts - left[index], runs.stops - left[index], runs.rows - top[index]
    length = stop - start
    sums = (stop * (stop - 1) - start * (start - 1)) // 2  # of the columns start..stop - 1
    squares = _sum_squares(stop) - _sum_squares(start)

    def mean(values: Int64Array) -> _Amounts:
        return np.bincount(index, values, len(area)) / area

    x, y = mean(sums), mean(length * row)
    xx, yy = mean(squares) - x**2, mean(length * row**2) - y**2
    xy = mean(sums * row) - x * y
    spread = np.hypot(xx - yy, 2 * xy)
    largest, smallest = (xx + yy + spread) / 2, np.maximum((xx + yy - spread) / 2, 0)
    ratio = np.divide(smallest, largest, out=np.ones_like(largest), where=largest > 0)
    return x + left + 0.5, y + top + 0.5, np.sqrt(1 - ratio)


def _sum_squares(stop: Int64Array) -> Int64Array:
    """Sum the squares of 0..stop - 1."""
    return (stop - 1) * stop * (2 * stop - 1) // 6


def _compute_perimeters(labels: LabelArray, count: int) -> _Amounts:
    """Compute the length of each object's border, through the centres of its pixels."""
    padded = np.pad(labels, 1)
    width, flat = padded.shape[1], padded.ravel()
    border = _find_border(padded)
    pixels, label = np.flatnonzero(border), flat[border.ravel()]
    code = np.zeros(len(pixels), np.int64)
    for value, steps in ((2, (1, -1, width, -width)), (10, _diagonal_steps(width))):
        for step in steps:
            neighbour = pixels + step
            code += value * (border.ravel()[neighbour] & (flat[neighbour] == label))
    length = _PERIMETER_WEIGHTS[np.minimum(code, len(_PERIMETER_WEIGHTS) - 1)]
    return np.bincount(label, length, count + 1)[1:].astype(np.float64)


def _diagonal_steps(width: int) -> tuple[int, ...]:
    return (width + 1, width - 1, 1 - width, -1 - width)


def _find_border(padded: LabelArray) -> BoolArray:
    """Find the pixels of objects with another label at one of their sides."""
    border = np.zeros(padded.shape, bool)
    inner = padded[1:-1, 1:-1]
    for neighbour in (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]):
        border[1:-1, 1:-1] |= inner != neighbour
    border &= padded > 0
    return border


def _compute_hull_areas(runs: Runs, count: int, top: Int64Array, bottom: Int64Array) -> _Amounts:
    """Count the pixel centres within the convex hull of each object.

    The hull is of the middles of the sides of all pixels, as in scikit-image.
    """
    areas = np.zeros(count)
    if count == 0:
        return areas
    begins = np.ones(len(runs.labels), bool)
    begins[1:] = (runs.labels[1:] != runs.labels[:-1]) | (runs.rows[1:] != runs.rows[:-1])
    first = np.flatnonzero(begins)
    last = np.append(first[1:], len(begins)) - 1
    labels, rows = runs.labels[first], runs.rows[first]
    leftmost, rightmost = runs.starts[first], runs.stops[last] - 1

    rows_of = np.append(np.searchsorted(labels, np.arange(1, count + 1)), len(labels))
    begin = 0
    while begin < count:  # some objects at a time, at least one
        end = int(np.searchsorted(rows_of, rows_of[begin] + _HULL_POINTS, side="right")) - 1
        end = max(begin + 1, end)
        part = slice(rows_of[begin], rows_of[end])
        objects = slice(begin, end)
        index = labels[part] - 1 - begin
        bounds = top[objects], bottom[objects]
        reach = _reach_of_hull(index, rows[part], rightmost[part], *bounds)
        reach += _reach_of_hull(index, rows[part], -leftmost[part], *bounds)
        heights = bounds[1] - bounds[0]
        areas[objects] = np.add.reduceat(reach + 1, np.cumsum(heights) - heights)
        begin = end
    return areas


def _reach_of_hull(
    index: Int64Array, rows: Int64Array, reach: Int64Array, top: Int64Array, bottom: Int64Array
) -> Int64Array:
    """Compute how far to the right the convex hull reaches in every row of each object.

    Args:
        index: (R,) of the object, in ascending order.
        rows, reach: (R,) a row, and the column of the object's last pixel in it.
        top, bottom: (N,) rows of each object.

    Returns:
        The last column within the hull, for the rows top..bottom - 1 of each object.
    """
    # In half pixels: the middle of the right side, and of the upper and the lower side.
    objects = np.concatenate([index, index, index])
    y = np.concatenate([2 * rows, 2 * rows - 1, 2 * rows + 1])
    x = np.concatenate([2 * reach + 1, 2 * reach, 2 * reach])
    order = np.lexsort((-x, y, objects))
    objects, y, x = objects[order], y[order], x[order]
    unique = np.ones(len(x), bool)
    unique[1:] = (objects[1:] != objects[:-1]) | (y[1:] != y[:-1])
    objects, y, x = objects[unique], y[unique], x[unique]
    while True:  # remove points that are not beyond the line between their neighbours
        inner = objects[2:] == objects[:-2]
        beyond = (x[1:-1] - x[:-2]) * (y[2:] - y[:-2]) > (x[2:] - x[:-2]) * (y[1:-1] - y[:-2])
        keep = np.ones(len(x), bool)
        keep[1:-1] = beyond | ~inner
        if keep.all():
            break
        objects, y, x = objects[keep], y[keep], x[keep]

    heights = bottom - top
    owner = np.repeat(np.arange(len(top)), heights)
    row = np.arange(len(owner)) - np.repeat(np.cumsum(heights) - heights - top, heights)
    stride = 2 * int(bottom.max()) + 2
    after = np.searchsorted(objects * stride + y, owner * stride + 2 * row)
    before = after - 1
    height = y[after] - y[before]
    doubled = x[before] * height + (x[after] - x[before]) * (2 * row - y[before])
    last: Int64Array = doubled // (2 * height)
    return last
