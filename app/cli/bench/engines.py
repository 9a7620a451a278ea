"""An engine alone, under the roof of its machine."""

from __future__ import annotations

import statistics
from typing import Any

from app.cli.bench.roofs import roof
from app.cli.bench.stages import drawn
from app.cli.bench.timing import timed
from app.engine.base import Engine
from app.engine.selection import EngineChoice, build_engine
from model.arrays import Shape
from model.checkpoint import Checkpoint
from model.convert.flops import count_flops


def measure_engine(checkpoint: Checkpoint, choice: EngineChoice, seconds: float) -> dict[str, Any]:
    """An engine alone, for every window shape and batch size, under its roof.

    The roof is measured before and after, since a shared machine is not always equally fast.
    """

    def measure_roof() -> float:
        return roof(choice.backend, choice.device, choice.precision, choice.threads, seconds)

    roofs = [measure_roof()]
    engine = build_engine(choice, checkpoint)
    engine.warm()
    rates = [
        (shape, batch, images_per_second(engine, shape, batch, seconds))
        for shape in engine.shapes
        for batch in batches(engine.max_batch)
    ]
    engine.close()
    roofs.append(measure_roof())
    work = {shape: count_flops(checkpoint.architecture, *shape) for shape in engine.shapes}
    return {
        "backend": choice.backend,
        "device": choice.device,
        "precision": choice.precision,
        "threads": choice.threads,
        "roof_flops_per_second": roofs,
        "runs": [
            {
                "window": list(shape),
                "batch": batch,
                "images_per_second": rate,
                "flops_per_second": rate * work[shape],
                "of_the_roof": rate * work[shape] / statistics.fmean(roofs),
            }
            for shape, batch, rate in rates
        ],
    }


def images_per_second(engine: Engine, shape: Shape, batch: int, seconds: float) -> float:
    """Windows a second of the bare engine: bytes in its own buffer to probabilities."""
    staged = engine.stage(shape, batch)
    staged[:] = drawn(*shape)[None, :, :, None]
    return batch / timed(lambda: engine.run(engine.load(staged)), seconds)


def batches(largest: int) -> list[int]:
    """1, 2, 4, ... and the largest."""
    return [*(2**n for n in range(largest.bit_length()) if 2**n < largest), largest]


def bare_engine(
    checkpoint: Checkpoint, choice: EngineChoice, shape: Shape, seconds: float
) -> float:
    """Windows a second of an engine built for it, at its best batch size."""
    engine = build_engine(choice, checkpoint)
    rates = [images_per_second(engine, shape, n, seconds) for n in batches(engine.max_batch)]
    engine.close()
    return max(rates)
