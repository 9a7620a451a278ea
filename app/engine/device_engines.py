"""The engines of one device, behind the interface that the batcher runs batches on.

Knows windows and engines; no queues, files or HTTP.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from app.engine.base import Engine
from model.arrays import ByteArray, Probabilities, Shape
from model.windows import Window, WindowPlan


class BatchKey(NamedTuple):
    """Windows with equal keys may share a batch: they have the same model and the same shape.

    The batcher looks keys up all the time, and a tuple is hashed faster than a dataclass.
    """

    model: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.model} {self.shape[0]}x{self.shape[1]}"


@dataclasses.dataclass(frozen=True)
class WindowJob:
    """One window of a prepared image. Its pixels are cut only when its batch is prepared.

    Attributes:
        trace: of the image (`app.tracing`), if it has one.
    """

    image: ByteArray
    plan: WindowPlan
    window: Window
    trace: Any = None


class DeviceEngines:
    """The engines of all served models on one device.

    Implements `app.batching.device_worker.Runner`.

    Args:
        name: of the device, "cpu" or "cuda:N", as metrics show it.

    Attributes:
        depth: batches in flight. A CPU computes one batch with all its cores; a CUDA device gets
            the next one while it computes.
        engines: by `BatchKey.model`.
        used_bytes: of the device's memory, by all processes, at the last `check`; NaN if unknown.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.depth = 1 if name == "cpu" else 2
        self.engines: dict[str, Engine] = {}
        self.used_bytes = math.nan

    def max_batch(self, key: BatchKey) -> int:
        return self.engines[key.model].max_batch

    def prepare(self, key: BatchKey, items: Sequence[WindowJob]) -> ByteArray:
        """Cut windows into one buffer (n, height, width, C)."""
        staged = self.engines[key.model].stage(key.shape, len(items))
        for job, out in zip(items, staged, strict=True):
            job.plan.cut(job.image, job.window, out)
        return staged

    def submit(self, key: BatchKey, staged: ByteArray) -> tuple[Engine, Any]:
        """Start to compute a batch, as `Engine.submit`."""
        engine = self.engines[key.model]
        return engine, engine.submit(staged)

    def collect(self, key: BatchKey, submitted: tuple[Engine, Any]) -> Sequence[Probabilities]:
        """Wait for the probabilities (channels, h, w) of each window, as `Engine.collect`."""
        engine, batch = submitted
        return list(engine.collect(batch))

    def check(self) -> None:
        """Check that the device responds, and measure its memory.

        Raises:
            DeviceLost: it does not respond.
        """
        self.used_bytes = math.nan
        for engine in list(self.engines.values())[:1]:
            self.used_bytes = engine.check()
