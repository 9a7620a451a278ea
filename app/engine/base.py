"""What every engine promises. Imports no backend."""

from __future__ import annotations

from typing import Any, Protocol

from model.arrays import ByteArray, FloatArray, Shape


class Engine(Protocol):
    """One model on one device, for a closed set of window shapes.

    Attributes:
        shapes: the (height, width) of the windows it takes.
        max_batch: windows it takes at once.
    """

    shapes: tuple[Shape, ...]
    max_batch: int

    def stage(self, shape: Shape, count: int) -> ByteArray:
        """A (count, height, width, C) buffer to cut windows into, in memory the device likes.

        Raises:
            ValueError: not one of `shapes`, or more than `max_batch`.
        """

    def load(self, windows: ByteArray) -> Any:
        """Begin to bring filled windows from `stage` to the device; what `run` takes.

        It may be called on another thread while `run` computes, so that the way is no wait.
        """

    def run(self, windows: Any) -> FloatArray:
        """(n, height, width, C) uint8, from `load` -> (n, channels, h, w) probabilities.

        The result of a window does not depend on the others of its batch.

        Raises:
            OutOfMemory: a smaller batch may fit.
            DeviceLost: nothing will work any more.
            EngineError: anything else the backend says.
        """

    def warm(self) -> None:
        """Prepare every shape, so that no request pays for what a first run costs."""

    def close(self) -> None:
        """Give the device's memory back."""
