"""`unet serve` with an engine that returns at once: `python -m benchmarks.free_engine FLAGS`.

Everything but the network is as in production: the connections, the event loop, the batcher and the
image workers. What a request costs here is what it costs beside the network. The golden mask is not
checked, since nothing is computed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import numpy as np

from app import cli
from app.cli.bench.stages import draw_image
from app.engine.base import Engine, check_batch
from app.engine.selection import EngineChoice
from app.inference import registry
from model.arrays import ByteArray, FloatArray, Shape
from model.checkpoint import Checkpoint


class FreeEngine(Engine):
    """Returns the same probabilities for every window. See `app.engine.base.Engine`.

    They are those of bright objects on a dark background, with noise on the objects, so that the
    mask costs about as much to encode as a real one that is not smooth.
    """

    def __init__(self, choice: EngineChoice, checkpoint: Checkpoint) -> None:
        self.shapes: tuple[Shape, ...] = checkpoint.preprocess.window
        self.max_batch = choice.max_batch
        self._in_channels = checkpoint.architecture.in_channels
        channels, margin = checkpoint.architecture.out_channels, checkpoint.architecture.margin
        self._results = {
            shape: _draw_results(shape, self.max_batch, channels, margin) for shape in self.shapes
        }

    def stage(self, shape: Shape, count: int) -> ByteArray:
        check_batch(self, shape, count)
        return np.empty((count, *shape, self._in_channels), np.uint8)

    def submit(self, windows: ByteArray) -> ByteArray:
        return windows

    def collect(self, submitted: ByteArray) -> FloatArray:
        return self._results[submitted.shape[1], submitted.shape[2]][: len(submitted)]

    def warm_steps(self) -> Iterator[Callable[[], None]]:
        return iter(())  # nothing to prepare

    def close(self) -> None:
        self._results.clear()


def _draw_results(shape: Shape, batch: int, channels: int, margin: int) -> FloatArray:
    """Probabilities (batch, channels, h, w), all windows and channels in the same memory."""
    height, width = (side - 2 * margin for side in shape)
    drawn = (draw_image(height, width) / 255).astype(np.float32)
    return np.broadcast_to(drawn, (batch, channels, height, width))


def main() -> int | str | None:
    registry.build_engine = FreeEngine
    registry.GOLDEN_IOU = 0.0
    sys.argv[1:1] = ["serve"]
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
