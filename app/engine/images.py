"""Whole images by an engine alone, without queue and batches: for measuring, not for serving."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from app.engine.base import Engine
from model.by_window import by_window
from model.checkpoint import Checkpoint

FloatArray = npt.NDArray[np.float32]


def by_engine(engine: Engine, checkpoint: Checkpoint) -> Callable[[npt.NDArray[Any]], FloatArray]:
    """Decoded image -> (C, H, W) probabilities by an engine, one window at a time."""

    def compute(window: npt.NDArray[np.uint8]) -> FloatArray:
        staged = engine.stage((window.shape[1], window.shape[2]), 1)
        staged[:] = window
        return engine.run(engine.load(staged))

    return lambda image: by_window(image, checkpoint.architecture, checkpoint.preprocess, compute)
