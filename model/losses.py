"""What training minimises. Logits and targets in, a scalar out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dice_loss(probabilities: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """1 - the soft Dice coefficient over batch and pixels (Milletari et al. 2016, eq. 1).

    Pooled over the batch: a crop without any foreground gives no noise of its own.

    Args:
        probabilities, target: (N, C, H, W) in 0..1.
    """
    axes = (0, 2, 3)
    shared = (probabilities * target).sum(axes)
    total = probabilities.sum(axes) + target.sum(axes)
    return (1 - (2 * shared + smooth) / (total + smooth)).mean()


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


def segmentation_loss(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Binary cross-entropy plus Dice: the first is well-behaved far away, the second near.

    Args:
        logits, target: (N, C, H, W).
        weight: (N, 1, H, W) of the cross-entropy, the paper's w(x) of eq. 1; None is 1.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, target, weight=weight)
    return entropy + dice_loss(logits.sigmoid(), target)
