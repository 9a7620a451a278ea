"""The engines of one device, as what the batcher runs batches on.

Knows windows and engines; nothing of queues, files or HTTP.
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
    """Windows with equal keys may share a batch: the same weights, the same shape."""

    model: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.model} {self.shape[0]}x{self.shape[1]}"


@dataclasses.dataclass(frozen=True)
class WindowJob:
    """One window of a prepared image; its pixels are cut only when its batch is staged."""

    image: ByteArray
    plan: WindowPlan
    window: Window


class DeviceEngines:
    """A device with the engines of every model in service; a `app.batching.batcher.Runner`.

    Args:
        name: of the device.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.engines: dict[str, Engine] = {}

    def max_batch(self, key: BatchKey) -> int:
        return self.engines[key.model].max_batch

    def prepare(self, key: BatchKey, items: Sequence[WindowJob]) -> Any:
        """Cut the windows into one staging buffer, (n, height, width, C), and send it off."""
        engine = self.engines[key.model]
        staged = engine.stage(key.shape, len(items))
        for piece, out in zip(items, staged, strict=True):
            piece.plan.cut(piece.image, piece.window, out)
        return engine.load(staged)

    def run(self, key: BatchKey, staged: Any) -> Sequence[FloatArray]:
        """The probabilities of each window, (channels, h, w).

        Raises:
            NonFiniteOutput: one of the windows gave NaN or infinity; alone, it is the culprit.
            EngineError: what the engine raises.
        """
        result = self.engines[key.model].run(staged)
        # A sum is NaN or infinite as soon as one of its terms is, and needs no second array.
        if not np.isfinite(result.sum(dtype=np.float64)):
            raise NonFiniteOutput(f"{key.model} gave values that are not finite")
        return list(result)
