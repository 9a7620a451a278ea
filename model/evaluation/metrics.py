"""Metrics of masks and of separated objects. Arrays in, numbers out. Knows no network, no files."""

from __future__ import annotations

import dataclasses

import numpy as np

from model.arrays import AnyArray, BoolArray, Int64Array, LabelArray

VOID = -1
"""Label of pixels that have none: they count neither in the loss nor in a score."""

THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
"""Least IoU of a found object with a true object to count as found: 0.5, 0.55, ..., 0.95."""


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Pixel counts of a predicted and a true mask. Counts of several images can be added.

    Attributes:
        shared: pixels of both masks.
        predicted: pixels of the predicted mask.
        true: pixels of the true mask.
    """

    shared: int = 0
    predicted: int = 0
    true: int = 0

    @classmethod
    def of(cls, predicted: BoolArray, true: BoolArray) -> Overlap:
        """Count the pixels of two masks, (H, W).

        Raises:
            ValueError: their shapes differ.
        """
        if predicted.shape != true.shape:
            raise ValueError(f"the mask has shape {predicted.shape}, the labels {true.shape}")
        return cls(int((predicted & true).sum()), int(predicted.sum()), int(true.sum()))

    @classmethod
    def of_classes(cls, predicted: LabelArray, true: LabelArray) -> Overlap:
        """Count the pixels of two masks of class indices, (H, W), where 0 is background.

        A pixel is shared if both masks assign it to the same class.
        """
        shared = int(((true > 0) & (predicted == true)).sum())
        return cls(shared, int((predicted > 0).sum()), int((true > 0).sum()))

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(
            self.shared + other.shared, self.predicted + other.predicted, self.true + other.true
        )

    @property
    def occurs(self) -> bool:
        """Whether one of the masks has pixels. A class that occurs nowhere has no score."""
        return self.predicted + self.true > 0

    @property
    def dice(self) -> float:
        """2|A∩B| / (|A| + |B|); 1 if both masks are empty."""
        total = self.predicted + self.true
        return 2 * self.shared / total if total else 1.0

    @property
    def iou(self) -> float:
        """|A∩B| / |A∪B|; 1 if both masks are empty."""
        union = self.predicted + self.true - self.shared
        return self.shared / union if union else 1.0


def count_classes(predicted: LabelArray, true: LabelArray, classes: int) -> Int64Array:
    """Count the pixels of each pair of classes: the confusion matrix.

    Args:
        predicted: (H, W) class indices; those beyond `classes` count as none.
        true: (H, W) class indices; others, such as `VOID`, are left out.

    Returns:
        (classes, classes + 1): true classes in rows, predicted ones in columns. The last column
        is for predictions that are not a class.

    Raises:
        ValueError: their shapes differ.
    """
    if predicted.shape != true.shape:
        raise ValueError(f"the mask has shape {predicted.shape}, the labels {true.shape}")
    valid = (true >= 0) & (true < classes)
    columns = np.minimum(predicted[valid].astype(np.int64), classes)
    pairs = true[valid].astype(np.int64) * (classes + 1) + columns
    counts: Int64Array = np.bincount(pairs, minlength=classes * (classes + 1))
    return counts.reshape(classes, classes + 1)


def overlaps_of(confusion: AnyArray) -> tuple[Overlap, ...]:
    """Convert a confusion matrix of `count_classes` to the overlap of each class."""
    shared, predicted, true = confusion.diagonal(), confusion.sum(axis=0), confusion.sum(axis=1)
    return tuple(
        Overlap(int(shared[index]), int(predicted[index]), int(true[index]))
        for index in range(len(confusion))
    )


@dataclasses.dataclass(frozen=True)
class Matches:
    """Counts of found and true objects. Counts of several images can be added.

    Attributes:
        found: number of predicted objects.
        true: number of true objects.
        matched: for each of `THRESHOLDS`, the number of pairs whose IoU is at least that.
    """

    found: int = 0
    true: int = 0
    matched: tuple[int, ...] = (0,) * len(THRESHOLDS)

    @classmethod
    def of(cls, found: LabelArray, true: LabelArray) -> Matches:
        """Match the objects of two label maps, (H, W), where 0 is background.

        Above an IoU of one half a match is unique, because two objects cannot both cover more than
        half of a third. So matches are counted, and no assignment is needed.

        Raises:
            ValueError: their shapes differ.
        """
        if found.shape != true.shape:
            raise ValueError(f"the label map has shape {found.shape}, the labels {true.shape}")
        _, a = np.unique(found, return_inverse=True)
        _, b = np.unique(true, return_inverse=True)
        # index 0 is the background on each side, even if the image has none
        a = a.ravel() + int(found.min(initial=1) > 0)
        b = b.ravel() + int(true.min(initial=1) > 0)
        rows, columns = int(a.max(initial=0)) + 1, int(b.max(initial=0)) + 1
        shared = np.bincount(a * columns + b, minlength=rows * columns).reshape(rows, columns)
        union = shared.sum(1, keepdims=True) + shared.sum(0, keepdims=True) - shared
        iou = (shared / np.maximum(union, 1))[1:, 1:]
        best = iou.max(axis=1, initial=0)
        # at an IoU of exactly one half two found objects may match one true object: count it once
        halves = int((iou >= 0.5).any(axis=0).sum())
        matched = [min(int((best >= threshold).sum()), halves) for threshold in THRESHOLDS]
        return cls(rows - 1, columns - 1, tuple(matched))

    def __add__(self, other: Matches) -> Matches:
        return Matches(
            self.found + other.found,
            self.true + other.true,
            tuple(a + b for a, b in zip(self.matched, other.matched, strict=True)),
        )

    @property
    def precisions(self) -> tuple[float, ...]:
        """TP / (TP + FP + FN) at each of `THRESHOLDS`; 1 if there are no objects at all.

        The metric of the 2018 Data Science Bowl.
        """
        return tuple(
            hits / (self.found + self.true - hits) if self.found + self.true else 1.0
            for hits in self.matched
        )

    @property
    def average_precision(self) -> float:
        """Mean of `precisions`."""
        return float(np.mean(self.precisions))

    @property
    def f1(self) -> float:
        """2TP / (2TP + FP + FN) at an IoU of 0.5; 1 if there are no objects at all."""
        total = self.found + self.true
        return 2 * self.matched[0] / total if total else 1.0
