"""Measure what each output costs: `python -m benchmarks.outputs`.

A drawn image of 2,500 round objects per megapixel, at several sizes. Milliseconds of CPU time and
peak memory of each output, in a process of its own with the limit of memory of an image worker
(Linux), and how scikit-image measures the same objects. The time of finding the objects is a row of
its own, and is not in the other rows.

Prints a table, and JSON with --json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from app.batching.deadline import Deadline
from app.imaging.workers.child import MemoryUse
from app.inference.limits import rendering_limit
from app.inference.outputs import FileFormat, Options, Output
from app.inference.rendering import Decision, preload_object_modules, render_output
from model.config import PreprocessConfig
from model.transforms import mask_and_confidence

PITCH = 20
"""Pixels between the centres of objects."""
OBJECTS, LIBRARY = "(objects)", "(measurements by scikit-image)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megapixels", type=float, nargs="+", default=[2, 16])
    parser.add_argument(
        "--outputs", nargs="+", choices=list(map(str, Output)), default=list(Output)
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    args = parser.parse_args()
    print(
        f"{'megapixels':>10} {'objects':>8} {'output':<32} {'s':>8} {'bytes/px':>9} {'MB out':>8}"
    )
    rows = []
    for megapixels in args.megapixels:
        for output in (OBJECTS, LIBRARY, *map(str, args.outputs)):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = pool.apply(measure, (megapixels, output))
            rows.append(row)
            print(
                f"{row['megapixels']:>10.1f} {row['objects']:>8} {output:<32} "
                f"{row['seconds']:>8.2f} {row['bytes_per_pixel']:>9.1f} {row['bytes'] / 1e6:>8.1f}"
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(megapixels: float, name: str) -> dict[str, Any]:
    """Measure one output of one image."""
    decision = draw_decision(megapixels, name)
    pixels = decision.whole_mask.size
    preload_object_modules()
    objects = decision.objects if name != OBJECTS else None
    limit = rendering_limit(pixels, Deadline.never())
    with PeakMemory(limit.max_bytes) as memory:
        start = time.process_time()
        size = 0
        if name == OBJECTS:
            objects = decision.objects
        elif name == LIBRARY:
            measure_by_library(decision)
        else:
            size = len(render_output(decision, Output(name)).content)
        seconds = time.process_time() - start
    assert objects is not None
    return {
        "megapixels": pixels / 1e6,
        "objects": objects.count,
        "output": name,
        "seconds": seconds,
        "bytes_per_pixel": memory.peak / pixels,
        "bytes": size,
    }


def draw_decision(megapixels: float, name: str) -> Decision:
    """Draw a square image of discs, and the probabilities of a model that separates them."""
    cells = round((megapixels * 1e6) ** 0.5 / PITCH)
    y, x = np.indices((PITCH, PITCH)) - (PITCH - 1) / 2
    disc = np.clip(0.5 + (0.38 * PITCH - np.hypot(x, y)) / 4, 0, 1)
    foreground = np.tile(disc, (cells, cells)).astype(np.float32)
    image = (1000 + 3000 * foreground).astype(np.uint16)
    probabilities = np.stack([foreground, np.zeros_like(foreground)])
    config = PreprocessConfig(intensity="percentile")
    mask, confidence = mask_and_confidence(probabilities, *foreground.shape, config)
    format = FileFormat.TIFF if name == Output.INSTANCES else FileFormat.PNG
    options = Options(tuple(Output), format=format)
    return Decision(probabilities, mask, confidence, 0.5, config, options, image)


def measure_by_library(decision: Decision) -> None:
    from skimage.measure import regionprops_table

    properties = (
        "area", "centroid", "bbox", "perimeter", "equivalent_diameter_area", "eccentricity",
        "solidity", "intensity_mean",
    )  # fmt: skip
    regionprops_table(decision.objects.labels, decision.image, properties=properties)


class PeakMemory:
    """Watches the memory that this process allocates, and limits it.

    Attributes:
        peak: bytes above those at the start.
    """

    def __init__(self, max_bytes: int) -> None:
        self.peak = 0
        self._memory = MemoryUse()
        self._start = self._memory.allocated
        self._memory.limit(max_bytes)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self._memory.update()
            self.peak = max(self.peak, self._memory.allocated - self._start)


if __name__ == "__main__":
    main()
