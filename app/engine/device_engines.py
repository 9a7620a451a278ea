"""The engines of one device, behind the interface that the batcher runs batches on.

Knows windows and engines; no queues, files or HTTP.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from app.engine.base import Engine
from app.errors import NonFiniteOutput
from model.arrays import ByteArray, FloatArray, Shape
from model.windows import Window, WindowPlan


@dataclasses.dataclass(frozen=True)
class BatchKey:
    """Windows with equal keys may share a batch: they have the same model and the same shape."""

    model: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.model} {self.shape[0]}x{self.shape[1]}"


@dataclasses.dataclass(frozen=True)
class WindowJob:
    """One window of a prepared image. Its pixels are cut only when its batch is prepared."""

    image: ByteArray
    plan: WindowPlan
    window: Window


class DeviceEngines:
    """The engines of all served models on one device.

    Implements `app.batching.device_worker.Runner`.

    Args:
        name: of the device, as metrics show it.

    Attributes:
        engines: by `BatchKey.model`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.engines: dict[str, Engine] = {}

    def max_batch(self, key: BatchKey) -> int:
        return self.engines[key.model].max_batch

    def prepare(self, key: BatchKey, items: Sequence[WindowJob]) -> Any:
        """Cut windows into one buffer (n, height, width, C) and start to copy it to the device."""
        engine = self.engines[key.model]
        staged = engine.stage(key.shape, len(items))
        for job, out in zip(items, staged, strict=True):
            job.plan.cut(job.image, job.window, out)
        return engine.load(staged)

    def run(self, key: BatchKey, staged: Any) -> Sequence[FloatArray]:
        """Compute the probabilities (channels, h, w) of each window.

        Raises:
            NonFiniteOutput: the network returned NaN or infinity for one of the windows.
            EngineError: as the engine raises it.
        """
        result = self.engines[key.model].run(staged)
        # A sum is NaN or infinite if any of its terms is, and needs no second array.
        if not np.isfinite(result.sum(dtype=np.float64)):
            raise NonFiniteOutput(f"{key.model} returned values that are not finite")
        return list(result)
