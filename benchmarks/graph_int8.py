"""Compare the speed of ONNX graphs in int8 and fp32: `python -m benchmarks.graph_int8 FILE ...`.

The files are checkpoints that `unet export --calibrate` calibrated, on a CPU. Both precisions take
turns, and the fastest of the runs counts.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np

from app.engine.base import Engine
from app.engine.selection import build_engine, choose_engines
from model.checkpoint import load_checkpoint

PRECISIONS = ("fp32", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.graph_int8")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--runs", type=int, default=10, help="windows per precision (default: 10)")
    args = parser.parse_args()
    print("| model | window | fp32, ms | int8, ms | ratio |")
    print("|---|---|---|---|---|")
    for path in args.files:
        checkpoint = load_checkpoint(path)
        engines = []
        for precision in PRECISIONS:
            (choice,) = choose_engines(device="cpu", precision=precision)
            engines.append(build_engine(choice, checkpoint))
        height, width = max(engines[0].shapes, key=math.prod)
        exact, rounded = measure(engines, args.runs)
        print(
            f"| {checkpoint.id} | {height}x{width} | {1e3 * exact:.0f} | {1e3 * rounded:.0f} | "
            f"{exact / rounded:.2f} |"
        )


def measure(engines: list[Engine], runs: int) -> list[float]:
    """Measure seconds per window of the largest shape, with the engines in turn."""
    shape = max(engines[0].shapes, key=math.prod)
    staged = [engine.stage(shape, 1) for engine in engines]
    for windows in staged:
        windows[:] = np.random.default_rng(0).integers(0, 256, windows.shape)
    seconds = [math.inf] * len(engines)
    for run in range(runs + 1):
        for index, engine in enumerate(engines):
            start = time.perf_counter()
            engine.collect(engine.submit(staged[index]))
            if run:  # the first prepares the shape
                seconds[index] = min(seconds[index], time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
