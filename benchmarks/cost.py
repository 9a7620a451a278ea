"""Measure seconds and memory of one image at a time, by its size: `python -m benchmarks.cost`.

Starts the service and sends it images of 0.25 to 100 megapixels. A window costs the same in every
image, so the default is a narrow, untrained network: 100 megapixels take it a minute, not a quarter
of an hour, and a cost around the engine that grows too fast is not hidden by the network. --weights
takes a real checkpoint.

Memory is the peak during an image, above what the service holds when it is ready (Linux).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from app.cli.bench.load import KeepAliveClient
from app.cli.bench.machine import describe_machine, machine_summary
from app.cli.bench.serving import RunningServer, serving
from app.cli.bench.stages import draw_image, encode_jpeg
from benchmarks.networks import write_untrained_checkpoint
from model.checkpoint import Checkpoint, load_checkpoint
from model.windows import plan_windows

MEGAPIXELS = (0.25, 1, 4, 16, 50, 100)
HEAD = f"{'megapixels':>10} {'size':>12} {'windows':>8} {'s':>8} {'s/MP':>7} {'MB above idle':>14}"
_TILE = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, help="checkpoint (an untrained network)")
    parser.add_argument(
        "--base-features", type=int, default=8, help="width of the untrained network (8)"
    )
    parser.add_argument("--megapixels", type=float, nargs="+", default=MEGAPIXELS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.weights or Path(folder) / "narrow.safetensors"
        if args.weights:
            checkpoint = load_checkpoint(path)
        else:
            checkpoint = write_untrained_checkpoint(path, args.base_features)
        print(f"{machine_summary(describe_machine())}; {checkpoint.architecture}")
        report = measure(path, checkpoint, args.megapixels)
    print_summary(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(path: Path, checkpoint: Checkpoint, megapixels: list[float]) -> dict[str, Any]:
    """Measure each size, and the exponent with which seconds grow with size."""
    flags = ["--max-upload-mb=1000", f"--max-megapixels={max(*megapixels, 100) + 1}"]
    with serving(path, *flags, "--request-timeout-s=3600") as service:
        measure_image(service, checkpoint, min(megapixels))  # pays the cost of a first request
        ready = service.memory()
        runs = []
        print(HEAD)
        for size in sorted(megapixels):
            run = measure_image(service, checkpoint, size)
            runs.append(run | {"above_idle_bytes": ready and run["peak_bytes"] - ready.now})
            print(format_row(runs[-1]), flush=True)
    slope, _ = np.polyfit(
        [math.log(run["megapixels"]) for run in runs],
        [math.log(run["seconds"]) for run in runs],
        1,
    )
    return {
        "machine": describe_machine(),
        "model": checkpoint.id,
        "architecture": checkpoint.architecture.to_json(),
        "idle_bytes": ready and ready.now,
        "exponent": float(slope),
        "runs": runs,
    }


def measure_image(
    service: RunningServer, checkpoint: Checkpoint, megapixels: float
) -> dict[str, Any]:
    """Measure the seconds (the median of three, where an image is small) and the peak memory.

    Raises:
        OSError: the response was not 200.
    """
    height = round(math.sqrt(megapixels * 1e6 / 1.5))
    width = round(megapixels * 1e6 / height)
    tile = draw_image(min(_TILE, height), min(_TILE, width))
    repeats = (-(-height // tile.shape[0]), -(-width // tile.shape[1]))
    image = encode_jpeg(np.tile(tile, repeats)[:height, :width])
    plan = plan_windows(height, width, checkpoint.architecture, checkpoint.preprocess)
    if before := service.memory():
        service.reset_peak()
    client = KeepAliveClient(service.url)
    seconds = []
    for _ in range(3 if megapixels < 10 else 1):
        start = time.perf_counter()
        status, _ = client.post(image)
        seconds.append(time.perf_counter() - start)
        if status != "200":
            raise OSError(f"{megapixels} megapixels: the response was {status}")
    client.close()
    after = service.memory()
    return {
        "megapixels": height * width / 1e6,
        "width": width,
        "height": height,
        "windows": plan.count,
        "overhead": plan.overhead,
        "seconds": sorted(seconds)[len(seconds) // 2],
        "peak_bytes": after.peak if before and after else None,
    }


def format_row(run: dict[str, Any]) -> str:
    """Format a line of the table."""
    above = run["above_idle_bytes"]
    return (
        f"{run['megapixels']:10.2f} {run['width']:>6}x{run['height']:<5} {run['windows']:8} "
        f"{run['seconds']:8.2f} {run['seconds'] / run['megapixels']:7.3f} "
        f"{'-' if above is None else f'{above / 1e6:.0f}':>14}"
    )


def print_summary(report: dict[str, Any]) -> None:
    """Print the exponent and the most memory."""
    print(f"seconds grow as megapixels to the power of {report['exponent']:.3f}")
    if idle := report["idle_bytes"]:
        most = max(run["above_idle_bytes"] for run in report["runs"])
        print(f"memory: {idle / 1e6:.0f} MB idle, at most {most / 1e6:.0f} MB above that")


if __name__ == "__main__":
    main()
