"""How good a mask is. Arrays in, numbers out; knows nothing of networks."""

from __future__ import annotations

import dataclasses

import numpy as np

from model.arrays import BoolArray, LabelArray

THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
"""IoU from which a found object counts as the true one: 0.5, 0.55, ..., 0.95."""


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Pixel counts of a mask against the truth; counts of several images add up (pooled)."""

    shared: int = 0
    predicted: int = 0
    true: int = 0

    @classmethod
    def of(cls, predicted: BoolArray, true: BoolArray) -> Overlap:
        """
        Raises:
            ValueError: of different shapes.
        """
        if predicted.shape != true.shape:
            raise ValueError(f"a mask of {predicted.shape} against a truth of {true.shape}")
        return cls(int((predicted & true).sum()), int(predicted.sum()), int(true.sum()))

    @classmethod
    def of_classes(cls, predicted: LabelArray, true: LabelArray) -> Overlap:
        """Of index masks, 0 the background: a pixel is shared where both say the same class."""
        found, there = predicted > 0, true > 0
        shared = int((there & (predicted == true)).sum())
        return cls(shared, int(found.sum()), int(there.sum()))

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(
            self.shared + other.shared, self.predicted + other.predicted, self.true + other.true
        )

    @property
    def dice(self) -> float:
        """2|A∩B| / (|A| + |B|); 1 where both are empty, since nothing was there and none found."""
        total = self.predicted + self.true
        return 2 * self.shared / total if total else 1.0

    @property
    def iou(self) -> float:
        """|A∩B| / |A∪B|; 1 where both are empty."""
        union = self.predicted + self.true - self.shared
        return self.shared / union if union else 1.0


@dataclasses.dataclass(frozen=True)
class Matches:
    """Objects found against true objects; counts of several images add up.

    Attributes:
        found, true: how many objects there are.
        matched: for each of `THRESHOLDS`, how many pairs have at least that IoU.
    """

    found: int = 0
    true: int = 0
    matched: tuple[int, ...] = (0,) * len(THRESHOLDS)

    @classmethod
    def of(cls, found: LabelArray, true: LabelArray) -> Matches:
        """Match label maps of the same shape, 0 the background.

        From an IoU above one half a match is unique: two objects cannot both cover more than half
        of a third. So each threshold is a count, and nothing has to be assigned.

        Raises:
            ValueError: they are of different shapes.
        """
        if found.shape != true.shape:
            raise ValueError(f"labels of {found.shape} against a truth of {true.shape}")
        _, a = np.unique(found, return_inverse=True)
        _, b = np.unique(true, return_inverse=True)
        # the background is class 0 of each side even where an image has none of it
        a = a.ravel() + int(found.min(initial=1) > 0)
        b = b.ravel() + int(true.min(initial=1) > 0)
        rows, columns = int(a.max(initial=0)) + 1, int(b.max(initial=0)) + 1
        shared = np.bincount(a * columns + b, minlength=rows * columns).reshape(rows, columns)
        union = shared.sum(1, keepdims=True) + shared.sum(0, keepdims=True) - shared
        iou = (shared / np.maximum(union, 1))[1:, 1:]
        best = iou.max(axis=1, initial=0)
        # at exactly one half two objects may share a true one: it is found once
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
        """TP / (TP + FP + FN) at each threshold, the metric of the 2018 Data Science Bowl.

        1 where nothing was there and none found.
        """
        return tuple(
            hits / (self.found + self.true - hits) if self.found + self.true else 1.0
            for hits in self.matched
        )

    @property
    def average_precision(self) -> float:
        """The mean of `precisions`."""
        return float(np.mean(self.precisions))

    @property
    def f1(self) -> float:
        """2TP / (2TP + FP + FN) at IoU 0.5."""
        total = self.found + self.true
        return 2 * self.matched[0] / total if total else 1.0
