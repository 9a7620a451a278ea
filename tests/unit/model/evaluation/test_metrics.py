"""Metrics of masks, objects and contours, on cases computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from model.evaluation.boundary import boundary_f1
from model.evaluation.metrics import THRESHOLDS, Matches, Overlap
from tests.conftest import nuclei


def test_overlap_of_two_masks() -> None:
    predicted, true = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    predicted[:2], true[1:3] = True, True
    overlap = Overlap.of(predicted, true)
    assert overlap == Overlap(shared=4, predicted=8, true=8)
    assert overlap.dice == 0.5
    assert overlap.iou == pytest.approx(1 / 3)
    assert (overlap + Overlap(4, 4, 4)).dice == pytest.approx(16 / 24)


def test_overlap_of_classes_counts_equal_classes() -> None:
    overlap = Overlap.of_classes(np.array([[0, 1, 2, 2]]), np.array([[0, 1, 1, 0]]))
    assert overlap == Overlap(shared=1, predicted=3, true=2)


def test_two_empty_masks_match_perfectly() -> None:
    empty = np.zeros((4, 4), bool)
    assert Overlap.of(empty, empty).dice == Overlap.of(empty, empty).iou == 1
    assert boundary_f1(empty, empty) == 1
    matches = Matches.of(empty.astype(int), empty.astype(int))
    assert matches.f1 == matches.average_precision == 1


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 2\), the labels \(3, 3\)"):
        Overlap.of(np.zeros((2, 2), bool), np.zeros((3, 3), bool))
    with pytest.raises(ValueError, match=r"shape \(2, 2\), the labels \(3, 3\)"):
        Matches.of(np.zeros((2, 2), int), np.zeros((3, 3), int))


def test_matches_of_found_missed_and_extra_objects() -> None:
    true, found = np.zeros((20, 20), int), np.zeros((20, 20), int)
    true[0:10, 0:10] = 7  # found with IoU 0.8
    found[0:8, 0:10] = 3
    true[12:18, 12:18] = 9  # missed
    found[0:4, 14:18] = 5  # extra
    matches = Matches.of(found, true)
    assert (matches.found, matches.true) == (2, 2)
    assert matches.matched == tuple(int(threshold <= 0.8) for threshold in THRESHOLDS)
    assert matches.f1 == 0.5
    assert matches.precisions[0] == pytest.approx(1 / 3)
    assert matches.average_precision == pytest.approx(7 / 10 / 3)


def test_matches_do_not_depend_on_the_values_of_labels() -> None:
    labels = nuclei(200, 200, seed=1)[1].astype(int)
    shuffled = np.append(0, 1 + np.random.default_rng(0).permutation(labels.max()))
    matches = Matches.of(shuffled[labels] * 100, labels)
    assert matches.found == matches.true == len(np.unique(labels)) - 1
    assert matches.average_precision == 1


def test_image_without_background_is_matched() -> None:
    full = np.repeat([[1, 2]], 4, axis=0)
    assert Matches.of(full, full).matched[0] == 2
    assert Matches.of(np.ones((4, 4), int), np.ones((4, 4), int)).f1 == 1


def test_merged_objects_match_at_most_one() -> None:
    true = np.zeros((10, 20), int)
    true[:, :10], true[:, 10:] = 1, 2
    merged = (true > 0).astype(int)
    matches = Matches.of(merged, true)
    assert matches.matched[1] == 0
    assert matches.matched[0] <= 1  # the IoU with each is exactly one half


def test_boundary_f1_falls_when_a_shift_exceeds_the_tolerance() -> None:
    true = np.zeros((64, 64), bool)
    true[20:40, 20:40] = True
    assert boundary_f1(true, true) == 1
    assert boundary_f1(np.roll(true, 2, axis=1), true, tolerance=2) > 0.98
    assert boundary_f1(np.roll(true, 6, axis=1), true, tolerance=2) < 0.7
    assert boundary_f1(np.zeros_like(true), true) == 0
