"""Time and memory of decoding a large TIFF, as an image worker does it.

    python -m benchmarks.tiff --side 10000

Writes a tiled TIFF per kind, of the given side, and inspects, decodes and prepares it in a process
of its own. Prints the seconds of each step, and the resident memory that they needed on top.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "uint8": ("u1", {}),
    "uint8, JPEG": ("u1", {"compression": "jpeg"}),
    "uint16": ("u2", {}),
    "uint16, Deflate": ("u2", {"compression": "zlib"}),
    "uint16, LZW, predictor": ("u2", {"compression": "lzw", "predictor": True}),
    "uint16, Zstandard": ("u2", {"compression": "zstd"}),
    "float32, Deflate": ("f4", {"compression": "zlib"}),
}


def write(path: Path, side: int, dtype: str, options: dict[str, Any]) -> None:
    """Write a tiled TIFF of a noisy gradient with bright discs."""
    import tifffile

    rng = np.random.default_rng(0)
    y, x = np.mgrid[:512, :512].astype(np.float32)
    spots = 120 * (np.hypot(y % 64 - 32, x % 64 - 32) < 12)
    patch = (40 + y / 32 + spots + rng.normal(0, 4, y.shape)).clip(0, 255)
    scale = {"u1": 1, "u2": 100, "f4": 0.01}[dtype]
    times = -(-side // 512)
    image = np.tile((patch * scale).astype(dtype), (times, times))[:side, :side]
    tifffile.imwrite(path, image, photometric="minisblack", tile=(512, 512), **options)


def measure(path: Path) -> dict[str, float]:
    """Inspect, decode and prepare a file in this process."""
    from app.imaging.decode import decode, inspect
    from model.config import PreprocessConfig
    from model.transforms import prepare

    data = path.read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = [time.perf_counter()]
    header = inspect(data, max_pixels=1 << 31)
    times.append(time.perf_counter())
    pixels = decode(data, header)
    times.append(time.perf_counter())
    prepare(pixels, PreprocessConfig(intensity="percentile"))
    times.append(time.perf_counter())
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    steps = dict(zip(("inspect", "decode", "prepare"), np.diff(times).tolist(), strict=True))
    return steps | {"megabytes": grown / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--side", type=int, default=10_000, help="pixels (default: 10000)")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.file:
        print(json.dumps(measure(args.file)))
        return
    print(f"{'':24}{'file MB':>8}{'inspect':>9}{'decode':>9}{'prepare':>9}{'MB':>7}")
    with tempfile.TemporaryDirectory() as folder:
        for name, (dtype, options) in KINDS.items():
            path = Path(folder) / "image.tif"
            write(path, args.side, dtype, options)
            command = [sys.executable, "-m", "benchmarks.tiff", "--file", str(path)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            figures = json.loads(output)
            seconds = "".join(f"{figures[step]:9.3f}" for step in ("inspect", "decode", "prepare"))
            size = path.stat().st_size / 1e6
            print(f"{name:24}{size:8.1f}{seconds}{figures['megabytes']:7.0f}", flush=True)


if __name__ == "__main__":
    main()
