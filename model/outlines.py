"""Label maps -> the outlines of their objects, along the edges between pixels.

An outline encloses exactly the pixels of its object, so its area is their number. Polygons are
valid in the sense of OGC Simple Features (simple rings, holes inside, a connected interior),
whatever the label map looks like. Knows NumPy and SciPy; no file formats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from model.arrays import BoolArray, Int64Array, LabelArray

Ring = npt.NDArray[np.int64]
"""(K, 2): x and y of the corners; the first is not repeated at the end. The shoelace formula is
positive for outer rings and negative for holes (RFC 7946, section 3.1.6)."""
Polygon = list[Ring]
"""An outer ring, then its holes."""

_TOP, _RIGHT, _BOTTOM, _LEFT = range(4)
"""The sides of a pixel, clockwise. Each is an edge from one corner of the pixel to the next."""


def trace_outlines(labels: LabelArray, count: int) -> Iterator[list[Polygon]]:
    """Yield the polygons of each object 1..count; an empty list for a label that does not occur.

    Parts of an object that only touch at a corner are polygons of their own.

    Args:
        labels: (H, W), 0 is background.
    """
    rings = _trace_rings(labels)
    bounds = np.searchsorted(rings.labels, np.arange(1, count + 2))
    for label, (first, last) in enumerate(pairwise(bounds.tolist()), start=1):
        if last - first == 1 and not rings.pinched[first]:
            yield [[rings.corners(first)]]
        else:
            yield _group_rings(labels, label, rings, range(first, last))


@dataclasses.dataclass(frozen=True)
class _Rings:
    """All rings of a label map, in the order of the labels.

    A ring bounds pixels that are connected by their sides, from outside or around a hole.

    Attributes:
        x, y: of the corners, ring after ring.
        starts: (N + 1,) where each ring begins in them.
        labels: (N,) of the pixels.
        rows, columns: (N,) one of the pixels.
        pinched: (N,) whether the ring may pass through a corner twice.
    """

    x: Int64Array
    y: Int64Array
    starts: Int64Array
    labels: Int64Array
    rows: Int64Array
    columns: Int64Array
    pinched: BoolArray

    def corners(self, index: int) -> Ring:
        part = slice(self.starts[index], self.starts[index + 1])
        return np.column_stack([self.x[part], self.y[part]])


def _trace_rings(labels: LabelArray) -> _Rings:
    """Follow the edges of all objects at once.

    An edge has its pixel on the right-hand side. Where it ends, the ring turns right around the
    pixel, or continues along the next pixel, or turns left along the pixel diagonally ahead.
    """
    padded = np.pad(labels, 1)
    width, flat = padded.shape[1], padded.ravel()
    steps = np.array([1, width, -1, -width])  # along each side, in the direction of its edge
    outwards = np.array([-width, 1, width, -1])

    by_side = [
        _find_edges(padded, axis, shift) for axis, shift in ((0, 1), (1, -1), (0, -1), (1, 1))
    ]
    first = np.cumsum([0, *map(len, by_side)])
    pixel = np.concatenate(by_side)
    side = np.repeat(np.arange(4), np.diff(first))

    label = flat[pixel]
    ahead = pixel + steps[side]
    diagonal = ahead + outwards[side]
    right = flat[ahead] != label
    same_diagonal = flat[diagonal] == label
    left = ~right & same_diagonal
    next_pixel = np.where(right, pixel, np.where(left, diagonal, ahead))
    next_side = (side + right - left) % 4
    following = np.empty_like(pixel)
    for index, pixels in enumerate(by_side):
        chosen = next_side == index
        following[chosen] = first[index] + np.searchsorted(pixels, next_pixel[chosen])

    # A corner begins an edge that does not continue the one before: jump from corner to corner.
    is_corner, is_pinched = np.zeros((2, len(pixel)), bool)
    is_corner[following[right | left]] = True
    is_pinched[following[right & same_diagonal]] = True
    while not is_corner[following].all():
        following = np.where(is_corner[following], following, following[following])
    corners = np.flatnonzero(is_corner)
    order, starts = _order_cycles(np.searchsorted(corners, following[corners]))

    edges = corners[order]
    begins = edges[starts[:-1]]
    rows, columns = np.divmod(pixel, width)
    ring_of = np.repeat(np.arange(len(begins)), np.diff(starts))
    return _sort_by_label(
        _Rings(
            x=columns[edges] - 1 + np.isin(side[edges], (_RIGHT, _BOTTOM)),
            y=rows[edges] - 1 + np.isin(side[edges], (_BOTTOM, _LEFT)),
            starts=starts,
            labels=label[begins].astype(np.int64),
            rows=rows[begins] - 1,
            columns=columns[begins] - 1,
            pinched=np.bincount(ring_of, is_pinched[edges], len(begins)) > 0,
        )
    )


def _find_edges(padded: LabelArray, axis: int, shift: int) -> Int64Array:
    """Find the pixels of objects whose neighbour in one direction is another label.

    Returns:
        Indices into the flat array, in ascending order.
    """
    neighbours = np.roll(padded, shift, axis)  # the border is background, so nothing wraps around
    return np.flatnonzero((padded != neighbours) & (padded > 0))


def _order_cycles(following: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Order the indices of a permutation cycle by cycle.

    Returns:
        The indices, and where each cycle begins in them, with the number of indices at the end.
    """
    successors = following.tolist()
    seen = bytearray(len(successors))
    order, starts = list[int](), list[int]()
    for first in range(len(successors)):
        if seen[first]:
            continue
        starts.append(len(order))
        index = first
        while not seen[index]:
            seen[index] = 1
            order.append(index)
            index = successors[index]
    return np.array(order, np.int64), np.array([*starts, len(order)], np.int64)


def _sort_by_label(rings: _Rings) -> _Rings:
    order = np.argsort(rings.labels, kind="stable")
    lengths = np.diff(rings.starts)[order]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    corners = np.arange(starts[-1]) + np.repeat(rings.starts[:-1][order] - starts[:-1], lengths)
    return _Rings(
        rings.x[corners],
        rings.y[corners],
        starts,
        rings.labels[order],
        rings.rows[order],
        rings.columns[order],
        rings.pinched[order],
    )


def _group_rings(labels: LabelArray, label: int, rings: _Rings, indices: range) -> list[Polygon]:
    """Make polygons of all rings of an object: one for each part, connected by sides of pixels."""
    if not indices:
        return []
    corners = slice(rings.starts[indices.start], rings.starts[indices.stop])
    left, top = rings.x[corners].min(), rings.y[corners].min()
    box = np.s_[top : rings.y[corners].max(), left : rings.x[corners].max()]
    parts, _ = ndimage.label(labels[box] == label)
    polygons: dict[int, Polygon] = {}
    for index in indices:
        polygon = polygons.setdefault(
            int(parts[rings.rows[index] - top, rings.columns[index] - left]), []
        )
        for ring in (
            _split_ring(rings.corners(index)) if rings.pinched[index] else [rings.corners(index)]
        ):
            polygon.insert(0 if _is_outer(ring) else len(polygon), ring)
    return list(polygons.values())


def _split_ring(ring: Ring) -> list[Ring]:
    """Split a ring at every corner that it passes through twice.

    Such a corner is between a hole and the outside, or between two holes, which touch there.
    """
    split, path = [], list[tuple[int, int]]()
    position: dict[tuple[int, int], int] = {}
    for x, y in ring.tolist():
        if (at := position.get((x, y))) is None:
            position[x, y] = len(path)
            path.append((x, y))
            continue
        split.append(np.array(path[at:]))
        for passed in path[at + 1 :]:
            del position[passed]
        del path[at + 1 :]
    return [*split, np.array(path)]


def _is_outer(ring: Ring) -> bool:
    x, y = ring.T
    return bool((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() > 0)
