"""Cost against work: seconds and memory of one image at a time, by its size.

`python -m benchmarks.cost` starts the service and sends it images of 0.25 to 100 megapixels. The
cost of a window is constant, so by default a narrow network made on the spot stands for any: 100
megapixels take it a minute and not a quarter of an hour, and everything around the engine, where a
cost that grows too fast would hide, weighs the more. --weights takes a real one.

Memory is what the service holds at its peak while it works on the image, above what it held when
it was ready (Linux).
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

from app.cli.bench.load import Caller
from app.cli.bench.machine import in_words, machine
from app.cli.bench.serving import Running, serving
from app.cli.bench.stages import drawn, encoded
from benchmarks.networks import untrained
from model.checkpoint import Checkpoint, load_checkpoint
from model.windows import plan_windows

MEGAPIXELS = (0.25, 1, 4, 16, 50, 100)
HEAD = f"{'megapixels':>10} {'size':>12} {'windows':>8} {'s':>8} {'s/MP':>7} {'MB above idle':>14}"
_TILE = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, help="a checkpoint (an untrained one, made here)")
    parser.add_argument("--base-features", type=int, default=8, help="of the one made here (8)")
    parser.add_argument("--megapixels", type=float, nargs="+", default=MEGAPIXELS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.weights or Path(folder) / "narrow.safetensors"
        checkpoint = load_checkpoint(path) if args.weights else untrained(path, args.base_features)
        print(f"{in_words(machine())}; {checkpoint.architecture}")
        report = measure(path, checkpoint, args.megapixels)
    show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(path: Path, checkpoint: Checkpoint, megapixels: list[float]) -> dict[str, Any]:
    """What each size costs, and by which power of the size the seconds grow."""
    flags = ["--max-upload-mb=1000", f"--max-megapixels={max(*megapixels, 100) + 1}"]
    with serving(path, *flags, "--request-timeout-s=3600") as service:
        one_image(
            service, checkpoint, min(megapixels)
        )  # the first of all pays for what is only paid once
        ready = service.memory()
        runs = []
        print(HEAD)
        for size in sorted(megapixels):
            run = one_image(service, checkpoint, size)
            runs.append(run | {"above_idle_bytes": ready and run["peak_bytes"] - ready.now})
            print(row(runs[-1]), flush=True)
    slope, _ = np.polyfit(
        [math.log(run["megapixels"]) for run in runs],
        [math.log(run["seconds"]) for run in runs],
        1,
    )
    return {
        "machine": machine(),
        "model": checkpoint.id,
        "architecture": checkpoint.architecture.to_json(),
        "idle_bytes": ready and ready.now,
        "exponent": float(slope),
        "runs": runs,
    }


def one_image(service: Running, checkpoint: Checkpoint, megapixels: float) -> dict[str, Any]:
    """Seconds, the median of three where that is quick; and the peak of the resident memory.

    Raises:
        OSError: the service did not answer 200.
    """
    height = round(math.sqrt(megapixels * 1e6 / 1.5))
    width = round(megapixels * 1e6 / height)
    tile = drawn(min(_TILE, height), min(_TILE, width))
    repeats = (-(-height // tile.shape[0]), -(-width // tile.shape[1]))
    image = encoded(np.tile(tile, repeats)[:height, :width])
    plan = plan_windows(height, width, checkpoint.architecture, checkpoint.preprocess)
    if before := service.memory():
        service.forget_peak()
    caller = Caller(service.url)
    took = []
    for _ in range(3 if megapixels < 10 else 1):
        start = time.perf_counter()
        status, _ = caller.post(image)
        took.append(time.perf_counter() - start)
        if status != "200":
            raise OSError(f"{megapixels} megapixels were answered {status}")
    caller.close()
    after = service.memory()
    return {
        "megapixels": height * width / 1e6,
        "width": width,
        "height": height,
        "windows": plan.count,
        "waste": plan.overhead,
        "seconds": sorted(took)[len(took) // 2],
        "peak_bytes": after.peak if before and after else None,
    }


def row(run: dict[str, Any]) -> str:
    """A line of the table."""
    above = run["above_idle_bytes"]
    return (
        f"{run['megapixels']:10.2f} {run['width']:>6}x{run['height']:<5} {run['windows']:8} "
        f"{run['seconds']:8.2f} {run['seconds'] / run['megapixels']:7.3f} "
        f"{'-' if above is None else f'{above / 1e6:.0f}':>14}"
    )


def show(report: dict[str, Any]) -> None:
    """What the table comes to."""
    print(f"seconds grow as megapixels to the power of {report['exponent']:.3f}")
    if idle := report["idle_bytes"]:
        most = max(run["above_idle_bytes"] for run in report["runs"])
        print(f"memory: {idle / 1e6:.0f} MB idle, at most {most / 1e6:.0f} MB above that")


if __name__ == "__main__":
    main()
