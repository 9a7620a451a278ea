"""Run whole images on a bare engine, without queue and batches: for measuring, not for serving."""

from __future__ import annotations

from collections.abc import Callable

from app.engine.base import Engine
from model.arrays import AnyArray, ByteArray, FloatArray, Probabilities
from model.checkpoint import Checkpoint
from model.sliding_window import sliding_window_inference


def engine_predictor(engine: Engine, checkpoint: Checkpoint) -> Callable[[AnyArray], FloatArray]:
    """Return a function: decoded image -> (C, H, W) probabilities, one window at a time."""

    def compute(window: ByteArray) -> Probabilities:
        staged = engine.stage((window.shape[1], window.shape[2]), 1)
        staged[:] = window
        return engine.collect(engine.submit(staged))

    return lambda image: sliding_window_inference(
        image, checkpoint.architecture, checkpoint.preprocess, compute
    )
