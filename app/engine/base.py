"""The interface of every engine. Imports no backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from app.errors import NonFiniteOutput
from model.arrays import ByteArray, FloatArray, Probabilities, Shape


class Engine(Protocol):
    """One model on one device, for a closed set of window shapes.

    `stage` may be called on any thread. Everything else is called on the one thread of the device.

    Attributes:
        shapes: (height, width) of the windows it takes.
        max_batch: most windows in a batch.
    """

    shapes: tuple[Shape, ...]
    max_batch: int

    def stage(self, shape: Shape, count: int) -> ByteArray:
        """Return a (count, height, width, C) buffer for windows, in memory that suits the device.

        Raises:
            ValueError: not one of `shapes`, or more than `max_batch`.
            OutOfMemory, DeviceLost, EngineError: as `collect`.
        """

    def submit(self, windows: ByteArray) -> Any:
        """Start to compute a batch, and return what `collect` takes.

        It waits for nothing, so that a device has its next batch before it has completed one. What
        is never collected needs no cleaning up.

        Args:
            windows: from `stage`, filled. They must not change until the batch is collected.

        Raises:
            OutOfMemory, DeviceLost, EngineError: as `collect`.
        """

    def collect(self, submitted: Any) -> Probabilities:
        """Wait for a batch, and return (n, channels, h, w) probabilities.

        The probabilities of a window do not depend on the rest of its batch.

        Raises:
            OutOfMemory: a smaller batch may fit.
            NonFiniteOutput: the network returned NaN or infinity for one of the windows.
            DeviceLost: every later call will fail too.
            EngineError: any other error of the backend.
        """

    def warm_steps(self) -> Iterator[Callable[[], None]]:
        """Return the steps that prepare every shape, so that no request waits for a first run.

        Between two steps the device may compute batches of other models.
        """

    def warm(self) -> None:
        """Take all the steps."""
        for step in self.warm_steps():
            step()

    def check(self) -> float:
        """Check that the device responds, and return the bytes in use on it; NaN on a CPU.

        Raises:
            DeviceLost: it does not respond.
        """
        return math.nan

    def close(self) -> None:
        """Free the device's memory."""


def check_batch(engine: Engine, shape: Shape, count: int) -> None:
    """Check that an engine takes a batch.

    Raises:
        ValueError: not one of its shapes, or not 1 to `max_batch` windows.
    """
    if shape not in engine.shapes or not 1 <= count <= engine.max_batch:
        raise ValueError(
            f"{count} windows of {shape}; supported: 1 to {engine.max_batch} of {engine.shapes}"
        )


def check_finite(probabilities: FloatArray) -> FloatArray:
    """Return a batch of probabilities after checking that all are finite numbers.

    Raises:
        NonFiniteOutput: one is NaN or infinite.
    """
    # A sum is NaN or infinite if any of its terms is, and needs no second array.
    if not np.isfinite(probabilities.sum()):
        raise NonFiniteOutput("the network returned values that are not finite")
    return probabilities
