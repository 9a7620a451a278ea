"""The training loss: pixel weights and targets from labels, cross-entropy and Dice from logits.

Knows arrays and tensors; no files, no network.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from model.arrays import FloatArray, Int32Array
from model.config import PreprocessConfig

_SMOOTH = 1.0
"""Added to numerator and denominator of Dice, which is then 1 where mask and target are empty."""
_REACH = 4.0
"""Distances above this many σ are ignored in equation 2: they add less than w0 · exp(-8)."""

_LABEL_BITS = 15
MAX_BATCH_LABEL = (1 << _LABEL_BITS) - 1
"""The highest label that `batch_border_weights` takes; it fits into int16."""


def border_weights(labels: Int32Array, weight: float, sigma: float) -> FloatArray:
    """Compute w(x) of the paper's equation 2, with a class weight of 1.

    On background pixels w(x) = 1 + w0 · exp(-(d1 + d2)² / 2σ²), where d1 and d2 are the distances
    to the nearest and the second nearest object. Narrow gaps between touching objects weigh most.

    Args:
        labels: (H, W), 0 is background, one value per object.
        weight: w0.
        sigma: σ, in pixels.

    Returns:
        (H, W), 1 or more.
    """
    reach = int(np.ceil(_REACH * sigma))
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


def batch_border_weights(labels: Tensor, weight: float, sigma: float) -> Tensor:
    """Compute `border_weights` of a batch, on the device of the labels.

    Distances are found along one axis after the other, as Felzenszwalb and Huttenlocher (2012) do
    for a single set of pixels. In each column only the two objects that are nearest within it can
    be a pixel's two nearest, so two candidates per pixel suffice. A candidate is one integer: the
    squared distance, and the label in the lowest bits.

    Args:
        labels: (N, H, W), at most `MAX_BATCH_LABEL`; 0 and below is background.
        weight, sigma: as for `border_weights`.

    Returns:
        (N, H, W) float32. It differs from `border_weights` by less than weight · exp(-8), where
        that one also counts distances of more than 4σ.
    """
    reach = int(np.ceil(_REACH * sigma))
    kind = torch.int32 if 2 * reach**2 < 1 << 15 else torch.int64
    none = 1 << (30 if kind == torch.int32 else 62)
    columns = labels.to(kind)
    columns = torch.where(columns > 0, columns, none)
    nearest, second = _two_nearest([columns], 1, reach, none)
    nearest, second = _two_nearest([nearest, second], 2, reach, none)
    distances = [(squared >> _LABEL_BITS).float().sqrt() for squared in (nearest, second)]
    gap = torch.exp(-((distances[0] + distances[1]) ** 2) / (2 * sigma**2))
    return 1 + weight * gap * ((labels == 0) & (second < none))


def _two_nearest(
    candidates: list[Tensor], axis: int, reach: int, none: int
) -> tuple[Tensor, Tensor]:
    """Find the two nearest objects of each pixel along an axis.

    Args:
        candidates: (N, H, W) each, as `batch_border_weights` describes them.
        none: larger than every candidate, with the label 0.
    """
    length = candidates[0].shape[axis]
    before_and_after = [reach, reach] if axis == 2 else [0, 0, reach, reach]
    padded = [F.pad(each, before_and_after, value=none) for each in candidates]
    nearest = second = torch.full_like(candidates[0], none)
    for start in range(2 * reach + 1):
        for each in padded:
            moved = each.narrow(axis, start, length) + ((start - reach) ** 2 << _LABEL_BITS)
            farther = torch.maximum(nearest, moved)
            nearest = torch.minimum(nearest, moved)
            same = ((farther ^ nearest) & MAX_BATCH_LABEL) == 0
            second = torch.minimum(second, farther.masked_fill_(same, none))
    return nearest, second


def make_targets(labels: Tensor, preprocess: PreprocessConfig, channels: int, reach: int) -> Tensor:
    """Convert labels to the probabilities that the network should predict.

    Args:
        labels: (N, H, W) integers.
        preprocess: says whether the model is binary.
        channels: of the network's output.
        reach: of the border channel, in pixels; see `make_border_targets`.

    Returns:
        (N, channels, H, W) float. Binary models: the foreground, and the border between objects if
        there is a second channel. Others: one-hot over the classes.
    """
    if not preprocess.binary:
        return F.one_hot(labels.long(), channels).permute(0, 3, 1, 2).float()
    if channels == 1:
        return (labels[:, None] > 0).float()
    return make_border_targets(labels, reach)


def make_border_targets(labels: Tensor, reach: int = 2) -> Tensor:
    """Convert instance labels to the targets of a model that separates touching objects.

    Args:
        labels: (N, H, W) integers, 0 is background.
        reach: a pixel is border if two different objects lie within this many pixels of it.

    Returns:
        (N, 2, H, W) float: foreground and border.
    """
    values = labels[:, None].float()
    size = 2 * reach + 1
    highest = F.max_pool2d(values, size, 1, reach)
    # the lowest label that is not background is the highest of the negated ones
    lowest = -F.max_pool2d((-values).masked_fill(values == 0, -(2.0**24)), size, 1, reach)
    border = (highest > 0) & (lowest < highest)
    return torch.cat([values > 0, border], dim=1).float()


def label_weights(labels: Tensor, class_weights: Sequence[float], classes: int) -> Tensor:
    """Compute the weight of each pixel by its class, and 0 where the label is void.

    Args:
        labels: (N, H, W) integers, below 0 where there is none.
        class_weights: of each class; empty: all 1.
        classes: their number; labels above are objects of the last.

    Returns:
        (N, H, W) float. If some pixels have no label, the others are weighted up, so that the mean
        over the batch is that of the pixels with labels.
    """
    valid = (labels >= 0).float()
    weights = valid * (valid.numel() / valid.sum().clamp(min=1))
    if class_weights:
        table = torch.tensor(class_weights, device=labels.device)
        weights = weights * table[labels.clamp(0, classes - 1).long()]
    return weights


def dice_loss(probabilities: Tensor, target: Tensor) -> Tensor:
    """Compute 1 - the soft Dice coefficient (Milletari et al. 2016, equation 1).

    It is computed over all pixels of the batch, so crops without foreground add no noise.

    Args:
        probabilities: (N, C, H, W) in 0..1.
        target: the same shape and range.

    Returns:
        A scalar, the mean over the channels.
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
    valid: Tensor | None = None,
) -> Tensor:
    """Compute cross-entropy + dice_weight · Dice loss.

    Cross-entropy has useful gradients far from the optimum, Dice close to it.

    Args:
        logits: (N, C, H, W).
        target: (N, C, H, W) in 0..1.
        weight: of the cross-entropy at each pixel: the paper's w(x) of equation 1. (N, 1, H, W),
            or (N, C, H, W) where channels differ. None: 1.
        binary: a sigmoid per channel. False: a softmax over the channels.
        dice_weight: 0 leaves the Dice loss out.
        valid: as `weight`, whether a pixel has a label and is in the Dice loss. None: all are. Set
            `weight` to 0 where it is not.

    Returns:
        A scalar.
    """
    if binary:
        entropy = F.binary_cross_entropy_with_logits(logits, target, weight=weight)
        probabilities = logits.sigmoid()
    else:
        each = -(logits.log_softmax(dim=1) * target).sum(1, keepdim=True)
        entropy = (each if weight is None else each * weight).mean()
        probabilities = logits.softmax(dim=1)
    if not dice_weight:
        return entropy
    if valid is not None:
        probabilities, target = probabilities * valid, target * valid
    return entropy + dice_weight * dice_loss(probabilities, target)
