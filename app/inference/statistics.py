"""Counts and durations of one model's images since it was loaded. Knows no HTTP."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping


@dataclasses.dataclass
class ModelStatistics:
    """Images and durations of one model.

    Attributes:
        images: segmented.
        failures: images that were not, for whatever reason.
        stage_seconds: of the segmented images, by stage; stages of one image overlap.
        seconds: of the segmented images, from the decision to segment one to its result.
        failure_seconds: the same for the others.
        last: when an image was last segmented, in seconds since the epoch; 0 if never.
    """

    images: int = 0
    failures: int = 0
    stage_seconds: Counter[str] = dataclasses.field(default_factory=Counter)
    seconds: float = 0.0
    failure_seconds: float = 0.0
    last: float = 0.0

    def count_image(self, seconds: float, stages: Mapping[str, float]) -> None:
        """Count an image that was segmented."""
        self.images += 1
        self.seconds += seconds
        self.stage_seconds.update(stages)
        self.last = time.time()

    def count_failure(self, seconds: float) -> None:
        """Count an image that was not segmented."""
        self.failures += 1
        self.failure_seconds += seconds
