"""Measure a bare engine, and compare it with the peak of its machine."""

from __future__ import annotations

import statistics
from typing import Any

from app.cli.bench.peaks import measure_peak
from app.cli.bench.stages import draw_image
from app.cli.bench.timing import measure_seconds
from app.engine.base import Engine
from app.engine.selection import EngineChoice, build_engine
from model.arrays import Shape
from model.checkpoint import Checkpoint
from model.convert.flops import count_flops


def measure_engine(checkpoint: Checkpoint, choice: EngineChoice, seconds: float) -> dict[str, Any]:
    """Measure an engine at every window shape and batch size, and the peak before and after it.

    The peak is measured twice because a shared machine is not always equally fast.

    Args:
        seconds: to measure each figure for.

    Returns:
        An entry of `engines` in the report.

    Raises:
        CheckpointError: the network is an ONNX graph, whose arithmetic is not counted.
    """

    def peak() -> float:
        return measure_peak(
            choice.backend, choice.device, choice.precision, choice.threads, seconds
        )

    shapes = checkpoint.preprocess.window
    work = {shape: count_flops(checkpoint.unet, *shape) for shape in shapes}
    peaks = [peak()]
    engine = build_engine(choice, checkpoint)
    engine.warm()
    rates = [
        (shape, batch, measure_images_per_second(engine, shape, batch, seconds))
        for shape in engine.shapes
        for batch in batch_sizes(engine.max_batch)
    ]
    engine.close()
    peaks.append(peak())
    return {
        "backend": choice.backend,
        "device": choice.device,
        "precision": choice.precision,
        "threads": choice.threads,
        "peak_flops_per_second": peaks,
        "runs": [
            {
                "window": list(shape),
                "batch": batch,
                "images_per_second": rate,
                "flops_per_second": rate * work[shape],
                "roofline_fraction": rate * work[shape] / statistics.fmean(peaks),
            }
            for shape, batch, rate in rates
        ],
    }


def measure_bare_engine(
    checkpoint: Checkpoint, choice: EngineChoice, shape: Shape, seconds: float
) -> float:
    """Build an engine, and return its windows/s at its best batch size."""
    engine = build_engine(choice, checkpoint)
    sizes = batch_sizes(engine.max_batch)
    rates = [measure_images_per_second(engine, shape, size, seconds) for size in sizes]
    engine.close()
    return max(rates)


def measure_images_per_second(engine: Engine, shape: Shape, batch: int, seconds: float) -> float:
    """Return the windows/s of a bare engine, from bytes in its buffer to probabilities."""
    staged = engine.stage(shape, batch)
    staged[:] = draw_image(*shape)[None, :, :, None]
    return batch / measure_seconds(lambda: engine.collect(engine.submit(staged)), seconds)


def batch_sizes(largest: int) -> list[int]:
    """List 1, 2, 4, ... and the largest."""
    return [*(2**n for n in range(largest.bit_length()) if 2**n < largest), largest]
