"""What training minimises: targets and weights from labels, and the loss of logits."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from model.arrays import FloatArray, Int32Array
from model.config import PreprocessConfig

_SMOOTH = 1.0
"""Added to both sides of the Dice fraction: 1 where nothing is there and nothing found."""
_FAR = 4.0
"""Distances beyond this many σ add less than exp(-8) to eq. 2 and are not looked for."""


def border_weights(labels: Int32Array, weight: float, sigma: float) -> FloatArray:
    """w(x) of the paper's eq. 2, with a class weight of 1.

    w(x) = 1 + w0 · exp(-(d1 + d2)² / 2σ²) on background pixels, d1 and d2 the distances to the
    nearest and the second nearest object: the narrow gaps between touching objects weigh most.

    Args:
        labels: (H, W), 0 background, one value an object.
        weight: w0.
        sigma: σ, in pixels.
    """
    reach = int(np.ceil(_FAR * sigma))
    nearest = np.full(labels.shape, np.inf)
    second = nearest.copy()
    # `find_objects` lists the bounding boxes of labels 1..max, None where a label does not occur
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        near = tuple(slice(max(s.start - reach, 0), s.stop + reach) for s in box)
        distance = ndimage.distance_transform_edt(labels[near] != label)
        first = nearest[near]
        second[near] = np.minimum(second[near], np.maximum(first, distance))
        nearest[near] = np.minimum(first, distance)
    gap = np.exp(-((nearest + second) ** 2) / (2 * sigma**2))
    weights: FloatArray = (1 + weight * gap * (labels == 0)).astype(np.float32)
    return weights


def targets(labels: Tensor, preprocess: PreprocessConfig, channels: int, reach: int) -> Tensor:
    """What the probabilities should be.

    Args:
        labels: (N, H, W) integers.
        channels: of the network's output.
        reach: of the border channel, in pixels.

    Returns:
        (N, channels, H, W) float. Binary: foreground, and the border between objects if there is
        a second channel. Else one-hot over the classes.
    """
    if not preprocess.binary:
        return F.one_hot(labels.long(), channels).permute(0, 3, 1, 2).float()
    if channels == 1:
        return (labels[:, None] > 0).float()
    return foreground_and_border(labels, reach)


def foreground_and_border(labels: Tensor, reach: int = 2) -> Tensor:
    """Targets of a model that separates touching objects, from instance labels.

    Args:
        labels: (N, H, W) integers, 0 background.
        reach: a pixel is border where two different objects lie within this many pixels of it.

    Returns:
        (N, 2, H, W) float: foreground, border.
    """
    values = labels[:, None].float()
    size = 2 * reach + 1
    highest = F.max_pool2d(values, size, 1, reach)
    # the lowest label that is not background: the highest of the negated ones
    lowest = -F.max_pool2d((-values).masked_fill(values == 0, -(2.0**24)), size, 1, reach)
    border = (highest > 0) & (lowest < highest)
    return torch.cat([values > 0, border], dim=1).float()


def dice_loss(probabilities: Tensor, target: Tensor) -> Tensor:
    """1 - the soft Dice coefficient over batch and pixels (Milletari et al. 2016, eq. 1).

    Pooled over the batch: a crop without any foreground gives no noise of its own.

    Args:
        probabilities, target: (N, C, H, W) in 0..1.
    """
    axes = (0, 2, 3)
    shared = (probabilities * target).sum(axes)
    total = probabilities.sum(axes) + target.sum(axes)
    return (1 - (2 * shared + _SMOOTH) / (total + _SMOOTH)).mean()


def segmentation_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    binary: bool = True,
    dice_weight: float = 1.0,
) -> Tensor:
    """Cross-entropy plus Dice: the first is well-behaved far away, the second near.

    Args:
        logits, target: (N, C, H, W).
        weight: (N, 1, H, W) of the cross-entropy, the paper's w(x) of eq. 1; None is 1.
        binary: a sigmoid a channel; else a softmax over them.
    """
    if binary:
        entropy = F.binary_cross_entropy_with_logits(logits, target, weight=weight)
        probabilities = logits.sigmoid()
    else:
        each = -(logits.log_softmax(dim=1) * target).sum(1, keepdim=True)
        entropy = (each if weight is None else each * weight).mean()
        probabilities = logits.softmax(dim=1)
    return entropy + dice_weight * dice_loss(probabilities, target) if dice_weight else entropy
