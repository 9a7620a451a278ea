"""The interface of every engine. Imports no backend."""

from __future__ import annotations

from typing import Any, Protocol

from model.arrays import ByteArray, FloatArray, Shape


class Engine(Protocol):
    """One model on one device, for a closed set of window shapes.

    Attributes:
        shapes: (height, width) of the windows it takes.
        max_batch: most windows in a batch.
    """

    shapes: tuple[Shape, ...]
    max_batch: int

    def stage(self, shape: Shape, count: int) -> ByteArray:
        """Allocate a (count, height, width, C) buffer for windows, in memory that suits the device.

        Raises:
            ValueError: not one of `shapes`, or more than `max_batch`.
        """

    def load(self, windows: ByteArray) -> Any:
        """Start to copy filled windows from `stage` to the device, and return what `run` takes.

        It may be called on another thread while `run` computes, so that copying and computing
        overlap.
        """

    def run(self, windows: Any) -> FloatArray:
        """Compute a batch from `load`: (n, height, width, C) uint8 -> (n, channels, h, w) float32.

        The probabilities of a window do not depend on the rest of its batch.

        Raises:
            OutOfMemory: a smaller batch may fit.
            DeviceLost: every later call will fail too.
            EngineError: any other error of the backend.
        """

    def warm(self) -> None:
        """Prepare every shape, so that no request waits for the cost of a first run."""

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
