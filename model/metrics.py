"""How good a mask is. Arrays in, numbers out; knows nothing of networks."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Pixel counts of a mask against the truth; counts of several images add up (pooled)."""

    shared: int
    predicted: int
    true: int

    @classmethod
    def of(cls, predicted: BoolArray, true: BoolArray) -> Overlap:
        if predicted.shape != true.shape:
            raise ValueError(f"a mask of {predicted.shape} against a truth of {true.shape}")
        return cls(int((predicted & true).sum()), int(predicted.sum()), int(true.sum()))

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
