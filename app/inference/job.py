"""One image on its way through the pipeline: what is asked of it, and how long its stages took.

Knows no queue, no workers and no HTTP.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from app.inference.image_group import ImageGroup
from app.inference.registry import ServedModel
from model.arrays import AnyArray
from model.config import PreprocessConfig

if TYPE_CHECKING:
    from app.tracing.spans import ImageTrace


class StageTimer:
    """Measures stages that run one after the other.

    Attributes:
        seconds: by stage.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """Start to measure a stage."""
        self._start = time.perf_counter()

    def record(self, stage: str) -> None:
        """Record the stage that was measured and start the next one."""
        now = time.perf_counter()
        self.add({stage: now - self._start})
        self._start = now

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add to the seconds of stages."""
        for stage, duration in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + duration


@dataclasses.dataclass(frozen=True)
class ImageJob:
    """One image, and what is needed of it.

    Attributes:
        model: segments the image.
        source: the encoded image, or its pixels: (H, W) or (H, W, C), uint8 or uint16.
        threshold: of the mask; None is the model's own.
        page, channel: of the file, from 0; None for the only page and for all colours.
        percentiles: for the contrast of the image; None are the model's own.
        needs_image: the outputs need the decoded image.
        needs_full_probabilities: the outputs need the probabilities at the size of the image.
        needs_all_channels: the outputs need every channel of a binary model, not only the first.
        group: of the request, if it has several images.
        timer: started when the job was created.
        trace: of the image, if its request has one.
    """

    model: ServedModel
    source: bytes | AnyArray
    threshold: float | None = None
    page: int | None = None
    channel: int | None = None
    percentiles: tuple[float, float] | None = None
    needs_image: bool = False
    needs_full_probabilities: bool = False
    needs_all_channels: bool = False
    group: ImageGroup | None = None
    timer: StageTimer = dataclasses.field(default_factory=StageTimer)
    trace: ImageTrace | None = None

    @property
    def preprocess(self) -> PreprocessConfig:
        """The preprocessing of the model, with the percentiles of the job."""
        own = self.model.checkpoint.preprocess
        if self.percentiles is None:
            return own
        return dataclasses.replace(own, percentiles=self.percentiles)

    @property
    def channels(self) -> int:
        """How many of the model's channels are blended."""
        if self.preprocess.binary and not self.needs_all_channels:
            return 1
        return self.model.checkpoint.architecture.out_channels
