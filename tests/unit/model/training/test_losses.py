"""Pixel weights, targets and the loss."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import ndimage

from model.arrays import Int32Array
from model.config import PreprocessConfig
from model.evaluation.metrics import VOID
from model.training.losses import (
    MAX_BATCH_LABEL,
    batch_border_weights,
    border_weights,
    dice_loss,
    label_weights,
    make_border_targets,
    make_targets,
    segmentation_loss,
)
from tests.conftest import nuclei


def plain_equation_2(labels: Int32Array, w0: float, sigma: float) -> npt.NDArray[np.float64]:
    """The paper's formula, literally: the distance of every pixel to all objects."""
    distances = np.stack(
        [ndimage.distance_transform_edt(labels != k) for k in np.unique(labels) if k]
    )
    d1, d2 = np.sort(distances, axis=0)[:2]
    weights = 1 + w0 * np.exp(-((d1 + d2) ** 2) / (2 * sigma**2)) * (labels == 0)
    return np.asarray(weights, np.float64)


def test_border_weights_follow_the_paper() -> None:
    labels = nuclei(300, 320, seed=3)[1].astype(np.int32)
    expected = plain_equation_2(labels, 10, 5)
    assert expected.max() > 3
    # objects beyond four sigma are ignored: they add at most 10 exp(-8)
    assert np.abs(border_weights(labels, 10, 5) - expected).max() < 10 * np.exp(-8) + 1e-6


@pytest.mark.parametrize("objects", [0, 1])
def test_border_weights_are_1_without_a_second_object(objects: int) -> None:
    labels = np.zeros((32, 32), np.int32)
    labels[4:9, 4:9] = objects
    assert (border_weights(labels, 10, 5) == 1).all()


@pytest.mark.parametrize(
    ("sigma", "kind"), [(5, torch.int16), (1.3, torch.int32), (40, torch.int64)]
)
def test_border_weights_of_a_batch_equal_those_of_each_image(
    sigma: float, kind: torch.dtype
) -> None:
    """Also where a gap is wider than 4 sigma, and where it needs 64-bit candidates."""
    labels = np.stack([nuclei(200, 210, seed=seed)[1] for seed in range(3, 7)]).astype(np.int32)
    labels[1][labels[1] > 2] = 0
    labels[2] = 0
    labels[3] *= MAX_BATCH_LABEL // labels[3].max()
    assert labels.max() > 32000
    weights = batch_border_weights(torch.from_numpy(labels).to(kind), 10, sigma)
    assert weights.dtype == torch.float32
    for image, found in zip(labels, weights.numpy(), strict=True):
        assert np.abs(found - border_weights(image, 10, sigma)).max() < 10 * np.exp(-8) + 1e-6
    assert (weights[2] == 1).all()
    assert weights[0].max() > 1 + sigma / 10


def test_border_lies_only_between_touching_objects() -> None:
    labels = torch.zeros((1, 16, 16), dtype=torch.int32)
    labels[0, 2:14, 2:8], labels[0, 2:14, 8:14] = 1, 2
    foreground, border = make_border_targets(labels, reach=2)[0]
    assert torch.equal(foreground > 0, labels[0] > 0)
    assert set(border[8].nonzero().ravel().tolist()) == {6, 7, 8, 9}
    labels[labels == 2] = 1
    assert make_border_targets(labels)[0, 1].sum() == 0


def test_targets_of_each_kind_of_model() -> None:
    labels = torch.tensor([[[0, 1], [2, 1]]])
    one = make_targets(labels, PreprocessConfig(), 1, 2)
    assert one.shape == (1, 1, 2, 2)
    assert one.sum() == 3
    three = PreprocessConfig(classes=("0", "1", "2"), palette=((0, 0, 0),) * 3)
    hot = make_targets(labels, three, 3, 2)
    assert torch.equal(hot.argmax(1), labels)
    assert torch.equal(hot.sum(1), torch.ones(1, 2, 2))


def test_dice_loss_is_0_for_perfect_and_for_empty_masks() -> None:
    target = torch.zeros(2, 1, 8, 8)
    assert dice_loss(target, target) == 0  # both empty: not NaN
    target[:, :, 2:6, 2:6] = 1
    assert dice_loss(target, target) == 0
    assert dice_loss(1 - target, target) > 0.9


@pytest.mark.parametrize("binary", [True, False])
def test_loss_is_lower_for_correct_logits_and_scales_with_weights(binary: bool) -> None:
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


def test_pixels_without_a_label_change_no_loss() -> None:
    labels = torch.tensor([[[0, 1], [VOID, 1]]])
    valid = (labels >= 0)[:, None]
    weight = label_weights(labels, (), 2)[:, None]
    target = (labels > 0)[:, None].float()
    losses = []
    for value in (-9.0, 9.0):
        logits = torch.tensor([[[[-1.0, 2.0], [value, 0.5]]]])
        losses.append(segmentation_loss(logits, target, weight, valid=valid))
    assert losses[0] == losses[1]
    entropy = torch.nn.functional.softplus(torch.tensor([-1.0, -2.0, -0.5])).mean()
    found = segmentation_loss(logits, target, weight, dice_weight=0, valid=valid)
    assert found == pytest.approx(entropy.item())


def test_classes_have_their_weights() -> None:
    labels = torch.tensor([[[0, 1], [2, VOID]]])
    weights = label_weights(labels, (1.0, 2.0, 4.0), 3)
    assert weights.tolist() == [[pytest.approx([4 / 3, 8 / 3]), pytest.approx([16 / 3, 0])]]
