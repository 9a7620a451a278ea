import numpy as np
import pytest
import torch
from scipy import ndimage

from model.config import PreprocessConfig
from model.training.losses import (
    border_weights,
    dice_loss,
    foreground_and_border,
    segmentation_loss,
    targets,
)
from tests.conftest import nuclei


def plain_eq_2(labels, w0, sigma):
    """The paper's formula, word by word: two distances from all objects at every pixel."""
    distances = np.stack(
        [ndimage.distance_transform_edt(labels != k) for k in np.unique(labels) if k]
    )
    d1, d2 = np.sort(distances, axis=0)[:2]
    return 1 + w0 * np.exp(-((d1 + d2) ** 2) / (2 * sigma**2)) * (labels == 0)


def test_border_weights_are_those_of_the_paper():
    labels = nuclei(300, 320, seed=3)[1].astype(np.int32)
    expected = plain_eq_2(labels, 10, 5)
    assert expected.max() > 3
    # what is farther than four sigma from an object is left out: at most 10 exp(-8)
    assert np.abs(border_weights(labels, 10, 5) - expected).max() < 10 * np.exp(-8) + 1e-6


@pytest.mark.parametrize("objects", [0, 1])
def test_border_weights_need_two_objects(objects):
    labels = np.zeros((32, 32), np.int32)
    labels[4:9, 4:9] = objects
    assert (border_weights(labels, 10, 5) == 1).all()


def test_the_border_lies_between_touching_objects_only():
    labels = torch.zeros((1, 16, 16), dtype=torch.int32)
    labels[0, 2:14, 2:8], labels[0, 2:14, 8:14] = 1, 2
    foreground, border = foreground_and_border(labels, reach=2)[0]
    assert torch.equal(foreground > 0, labels[0] > 0)
    assert set(border[8].nonzero().ravel().tolist()) == {6, 7, 8, 9}
    labels[labels == 2] = 1
    assert foreground_and_border(labels)[0, 1].sum() == 0


def test_targets_of_each_kind_of_model():
    labels = torch.tensor([[[0, 1], [2, 1]]])
    one = targets(labels, PreprocessConfig(), 1, 2)
    assert one.shape == (1, 1, 2, 2)
    assert one.sum() == 3
    three = PreprocessConfig(classes=("0", "1", "2"), palette=((0, 0, 0),) * 3)
    hot = targets(labels, three, 3, 2)
    assert torch.equal(hot.argmax(1), labels)
    assert torch.equal(hot.sum(1), torch.ones(1, 2, 2))


def test_dice_loss_of_a_perfect_and_of_an_empty_answer():
    target = torch.zeros(2, 1, 8, 8)
    assert dice_loss(target, target) == 0  # nothing there, nothing found: no NaN
    target[:, :, 2:6, 2:6] = 1
    assert dice_loss(target, target) == 0
    assert dice_loss(1 - target, target) > 0.9


@pytest.mark.parametrize("binary", [True, False])
def test_the_loss_falls_towards_the_truth_and_heeds_the_weights(binary):
    channels = 1 if binary else 3
    target = torch.zeros(1, channels, 8, 8)
    target[:, 0, :4] = 1
    if not binary:
        target[:, 1, 4:] = 1
    right, wrong = (target - 0.5) * 8, (0.5 - target) * 8
    assert segmentation_loss(right, target, binary=binary) < 0.2
    assert segmentation_loss(wrong, target, binary=binary) > 2
    weight = torch.ones(1, 1, 8, 8)
    plain = segmentation_loss(wrong, target, binary=binary, dice_weight=0)
    doubled = segmentation_loss(wrong, target, 2 * weight, binary=binary, dice_weight=0)
    assert doubled == pytest.approx(2 * float(plain))
