import numpy as np
import pytest

from model.evaluation.boundary import boundary_f1
from model.evaluation.metrics import THRESHOLDS, Matches, Overlap
from tests.conftest import nuclei


def test_overlap_of_a_mask_worked_out_by_hand():
    predicted, true = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    predicted[:2], true[1:3] = True, True
    overlap = Overlap.of(predicted, true)
    assert overlap == Overlap(shared=4, predicted=8, true=8)
    assert overlap.dice == 0.5
    assert overlap.iou == pytest.approx(1 / 3)
    assert (overlap + Overlap(4, 4, 4)).dice == pytest.approx(16 / 24)


def test_empty_against_empty_is_perfect_and_not_nan():
    nothing = np.zeros((4, 4), bool)
    assert Overlap.of(nothing, nothing).dice == Overlap.of(nothing, nothing).iou == 1
    assert boundary_f1(nothing, nothing) == 1
    matches = Matches.of(nothing.astype(int), nothing.astype(int))
    assert matches.f1 == matches.average_precision == 1


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2, 2\) against a truth of \(3, 3\)"):
        Overlap.of(np.zeros((2, 2), bool), np.zeros((3, 3), bool))
    with pytest.raises(ValueError, match="against a truth"):
        Matches.of(np.zeros((2, 2), int), np.zeros((3, 3), int))


def test_matches_worked_out_by_hand():
    true, found = np.zeros((20, 20), int), np.zeros((20, 20), int)
    true[0:10, 0:10] = 7  # found with IoU 0.8
    found[0:8, 0:10] = 3
    true[12:18, 12:18] = 9  # missed
    found[0:4, 14:18] = 5  # nothing there
    matches = Matches.of(found, true)
    assert (matches.found, matches.true) == (2, 2)
    assert matches.matched == tuple(int(threshold <= 0.8) for threshold in THRESHOLDS)
    assert matches.f1 == 0.5
    assert matches.precisions[0] == pytest.approx(1 / 3)
    assert matches.average_precision == pytest.approx(7 / 10 / 3)


def test_matching_does_not_depend_on_the_numbers_of_the_labels():
    labels = nuclei(200, 200, seed=1)[1].astype(int)
    shuffled = np.append(0, 1 + np.random.default_rng(0).permutation(labels.max()))
    matches = Matches.of(shuffled[labels] * 100, labels)
    assert matches.found == matches.true == len(np.unique(labels)) - 1
    assert matches.average_precision == 1


def test_an_image_full_of_objects_has_no_background():
    full = np.repeat([[1, 2]], 4, axis=0)
    assert Matches.of(full, full).matched[0] == 2
    assert Matches.of(np.ones((4, 4), int), np.ones((4, 4), int)).f1 == 1


def test_merging_two_objects_costs_both():
    true = np.zeros((10, 20), int)
    true[:, :10], true[:, 10:] = 1, 2
    merged = (true > 0).astype(int)
    matches = Matches.of(merged, true)
    assert matches.matched[1] == 0  # at exactly one half one of them counts as found
    assert matches.matched[0] <= 1


def test_boundary_f1_sees_a_shift_beyond_its_tolerance():
    true = np.zeros((64, 64), bool)
    true[20:40, 20:40] = True
    assert boundary_f1(true, true) == 1
    assert boundary_f1(np.roll(true, 2, axis=1), true, tolerance=2) > 0.98
    assert boundary_f1(np.roll(true, 6, axis=1), true, tolerance=2) < 0.7
    assert boundary_f1(np.zeros_like(true), true) == 0
