"""Label maps: components, sums over objects, and runs of equal labels."""

from __future__ import annotations

import numpy as np

from model.labels import (
    bound_objects,
    find_runs,
    label_components,
    renumber,
    sum_by_label,
    touches_edge,
)

LABELS = np.array([[0, 1, 1, 0], [2, 0, 1, 0], [2, 2, 0, 3]], np.int32)


def test_components_are_8_connected() -> None:
    labels, count = label_components(np.eye(4, dtype=bool))
    assert count == labels.max() == 1
    assert label_components(np.zeros((3, 3), bool))[1] == 0


def test_kept_labels_are_numbered_without_gaps() -> None:
    kept = renumber(LABELS, np.array([True, True, False, True]))
    np.testing.assert_array_equal(kept, [[0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 2]])


def test_sums_do_not_depend_on_the_blocks_of_rows() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 9, (1500, 1500)).astype(np.int32)
    values = rng.integers(0, 65536, labels.shape).astype(np.uint16)
    sums, counts = sum_by_label(labels, 10, values), sum_by_label(labels, 10)
    for label in range(9):
        assert sums[label] == values[labels == label].sum(dtype=np.int64)
        assert counts[label] == (labels == label).sum()
    assert sums[10] == counts[10] == 0


def test_labels_at_every_edge_touch_it() -> None:
    labels = np.zeros((6, 6), np.int32)
    labels[0, 2], labels[5, 2], labels[2, 0], labels[2, 5], labels[3, 3] = 1, 2, 3, 4, 5
    assert touches_edge(labels, 5)[1:].tolist() == [True, True, True, True, False]


def test_runs_cover_each_object_in_order() -> None:
    runs = find_runs(LABELS)
    assert runs.labels.tolist() == [1, 1, 2, 2, 3]
    assert runs.rows.tolist() == [0, 1, 1, 2, 2]
    assert runs.starts.tolist() == [1, 2, 0, 0, 3]
    assert runs.stops.tolist() == [3, 3, 1, 2, 4]
    assert bound_objects(runs, 3).tolist() == [[1, 0, 3, 2], [0, 1, 2, 3], [3, 2, 4, 3]]


def test_runs_end_with_their_row() -> None:
    runs = find_runs(np.ones((2, 3), np.int32))
    assert runs.rows.tolist() == [0, 1]
    assert runs.stops.tolist() == [3, 3]


def test_an_empty_map_has_no_runs() -> None:
    runs = find_runs(np.zeros((2, 3), np.int32))
    assert len(runs.labels) == 0
    assert bound_objects(runs, 0).shape == (0, 4)
