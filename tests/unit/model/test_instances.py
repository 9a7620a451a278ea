"""Separating objects: touching, small and uncertain ones."""

from __future__ import annotations

import numpy as np
import torch

from model.arrays import Int32Array
from model.evaluation.metrics import Matches
from model.instances import label_instances
from model.training.losses import make_border_targets
from tests.conftest import nuclei


def draw_touching_squares() -> Int32Array:
    labels = np.zeros((60, 60), np.int32)
    labels[10:50, 5:30], labels[10:50, 30:55] = 1, 2
    return labels


def test_border_channel_separates_touching_objects() -> None:
    truth = draw_touching_squares()
    channels = make_border_targets(torch.from_numpy(truth)[None], reach=2)[0].numpy()
    found = label_instances(channels.astype(np.float32))
    assert found.dtype == np.int32
    assert found.max() == 2
    assert ((found > 0) == (truth > 0)).all()
    assert Matches.of(found, truth).precisions[-1] == 1


def test_separate_objects_need_no_border_channel() -> None:
    labels = nuclei(200, 200, seed=2)[1]
    found = label_instances((labels > 0).astype(np.float32)[None])
    assert found.max() > 5
    assert ((found > 0) & (labels == 0)).sum() == 0


def test_specks_are_discarded_and_labels_have_no_gaps() -> None:
    foreground = np.zeros((40, 40), np.float32)
    foreground[2, 2] = foreground[30, 3] = 1
    foreground[10:20, 10:20] = 1
    found = label_instances(np.stack([foreground, np.zeros_like(foreground)]))
    assert sorted(np.unique(found)) == [0, 1]
    assert found[15, 15] == 1


def test_empty_and_full_masks() -> None:
    assert label_instances(np.zeros((2, 16, 16), np.float32)).max() == 0
    full = np.stack([np.ones((16, 16)), np.zeros((16, 16))]).astype(np.float32)
    assert (label_instances(full) == 1).all()


def test_lower_threshold_gives_larger_objects() -> None:
    ramp = np.tile(np.linspace(-0.5, 2, 64, dtype=np.float32).clip(0, 1), (32, 1))
    both = np.stack([ramp, np.zeros_like(ramp)])
    assert (label_instances(both, 0.25) > 0).mean() > (label_instances(both, 0.75) > 0).mean()


def test_uncertain_foreground_is_not_an_object() -> None:
    foreground = np.zeros((60, 60), np.float32)
    foreground[5:20, 5:20], foreground[30:50, 30:50] = 0.6, 0.95
    both = np.stack([foreground, np.zeros_like(foreground)])
    found = label_instances(both)
    assert found[40, 40] == 1
    assert found[10, 10] == 0
    assert label_instances(both, threshold=0.3)[10, 10] == 1  # 0.3 + 0.6 · 0.3 = 0.48
    assert label_instances(both, threshold=0.0)[10, 10] == 1  # the whole image is one object


def test_a_speck_does_not_belong_to_a_distant_object() -> None:
    foreground = np.zeros((60, 60), np.float32)
    foreground[5:25, 5:25] = 1
    foreground[40:43, 40:55] = 1  # too thin to be eroded twice
    foreground[50, 5] = 1
    found = label_instances(foreground[None])
    assert (found[5:25, 5:25] == 1).all()
    assert (found[40:43, 40:55] == 2).all()
    assert found[50, 5] == 0
    assert (found > 0).sum() == 400 + 45


def test_more_objects_than_16_bits_hold_are_labelled() -> None:
    foreground = np.kron(np.indices((520, 520)).sum(0) % 2 == 0, np.ones((1, 1))).astype(np.float32)
    found = label_instances(np.stack([foreground, np.zeros_like(foreground)]), min_pixels=1)
    assert found.max() == foreground.sum() > 65535
