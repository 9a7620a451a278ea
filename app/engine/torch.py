"""The torch engine on a CPU: the fp32 reference of the other engines. See `app.engine.cuda`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch

from app.engine.base import Engine, check_batch, check_finite
from app.engine.torch_network import WindowNetwork
from app.errors import EngineError
from model.arrays import ByteArray, FloatArray, Shape
from model.checkpoint import Checkpoint


class TorchEngine(Engine):
    """See `app.engine.base.Engine`.

    Args:
        checkpoint: the model.
        max_batch: most windows in a batch.
    """

    def __init__(self, checkpoint: Checkpoint, *, max_batch: int) -> None:
        self.shapes: tuple[Shape, ...] = checkpoint.preprocess.window
        self.max_batch = max_batch
        self._channels = checkpoint.architecture.in_channels
        self._network = WindowNetwork(checkpoint, torch.device("cpu"))

    def stage(self, shape: Shape, count: int) -> ByteArray:
        check_batch(self, shape, count)
        return np.empty((count, *shape, self._channels), np.uint8)

    def submit(self, windows: ByteArray) -> ByteArray:
        return windows  # `collect` computes: a CPU does nothing else meanwhile

    @torch.inference_mode()
    def collect(self, submitted: ByteArray) -> FloatArray:
        try:
            return check_finite(self._network(torch.from_numpy(submitted)).numpy())
        except RuntimeError as error:
            raise EngineError(f"torch: {error}") from error

    def warm_steps(self) -> Iterator[Callable[[], None]]:
        for shape in self.shapes:
            yield functools.partial(self._compute_black, shape)

    def _compute_black(self, shape: Shape) -> None:
        self.collect(self.submit(np.zeros((1, *shape, self._channels), np.uint8)))

    def close(self) -> None:
        del self._network
