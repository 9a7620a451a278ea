"""Compare unet-server with LitServe over HTTP, in one run: `python -m benchmarks.litserve_compare`.

Both serve one network with the same weights: the shipped ones, widened to base_features 64 (which
keeps their function), on the whole image resized to 512×512. Clients in a closed loop send a
1918×1280 JPEG and receive a PNG mask of its size. unet-server runs in int8 unless --precision says
otherwise. Its int8 ranges are measured here on two synthetic images, which is enough for its speed
but validates no masks.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.cli.bench.load import LoadResult, closed_loop, format_statuses
from app.cli.bench.machine import describe_machine, machine_summary
from app.cli.bench.serving import running, serving
from app.cli.bench.stages import PHOTO_SHAPE, draw_image, encode_jpeg
from benchmarks.networks import write_wide_checkpoint
from model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from model.config import Calibration
from model.convert.calibration import measure_ranges
from model.predict import Predictor

ROOT = Path(__file__).parent.parent
BOUNDARY = "boundary-of-the-form"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--litserve-python",
        default=sys.executable,
        help="Python of an environment that has LitServe",
    )
    parser.add_argument("--weights", type=Path, default=ROOT / "weights/nuclei.safetensors")
    parser.add_argument("--base-features", type=int, default=64)
    parser.add_argument("--side", type=int, default=512, help="side of the window (512)")
    parser.add_argument(
        "--network", type=Path, help="file for the compared network; reused if it exists"
    )
    parser.add_argument("--precision", default="int8", help="UNET_PRECISION of unet-server (int8)")
    parser.add_argument("--device", default="cpu", help="of both servers: cpu or cuda (cpu)")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60, help="duration for each server (60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.network or Path(folder) / "compared.safetensors"
        checkpoint = load_checkpoint(path) if path.exists() else make_network(path, args)
        report = compare_servers(path, checkpoint, args)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def make_network(path: Path, args: argparse.Namespace) -> Checkpoint:
    """Write the network that both serve, with ranges for int8."""
    wide = write_wide_checkpoint(path, args.weights, args.base_features, (args.side, args.side))
    images = [draw_image(*PHOTO_SHAPE), draw_image(args.side, args.side)]
    calibration = Calibration(measure_ranges(Predictor.of(wide), images))
    return save_checkpoint(path, dataclasses.replace(wide, calibration=calibration))


def compare_servers(path: Path, checkpoint: Checkpoint, args: argparse.Namespace) -> dict[str, Any]:
    """Measure both servers one after the other, each alone on the machine."""
    image = encode_jpeg(draw_image(*PHOTO_SHAPE))
    print(machine_summary(describe_machine()))
    print(
        f"base_features {checkpoint.architecture.base_features} at {args.side}x{args.side}; "
        f"a {PHOTO_SHAPE[1]}x{PHOTO_SHAPE[0]} JPEG of {len(image)} bytes; {args.clients} clients"
    )
    flags = [f"--device={args.device}", f"--precision={args.precision}", "--request-timeout-s=600"]
    with serving(path, *flags) as service:
        unet = closed_loop(service.url, image, args.clients, args.seconds)
    print_run(f"unet-server, {args.precision}", unet)
    with serving_with_litserve(path, args) as url:
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        body = encode_form(image)
        litserve = closed_loop(url, body, args.clients, args.seconds, path="/predict", kind=kind)
    print_run("LitServe, torch fp32", litserve)
    ratio = unet.throughput / litserve.throughput
    print(f"unet-server over LitServe: {ratio:.2f}")
    return {
        "machine": describe_machine(),
        "litserve_version": litserve_version(args.litserve_python),
        "base_features": checkpoint.architecture.base_features,
        "window": [args.side, args.side],
        "precision": args.precision,
        "unet_server": unet.to_json(),
        "litserve": litserve.to_json(),
        "ratio": ratio,
    }


@contextlib.contextmanager
def serving_with_litserve(path: Path, args: argparse.Namespace) -> Iterator[str]:
    """Serve the network with LitServe, and yield its URL once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [args.litserve_python, "-m", "benchmarks.litserve_server", str(path)]
    command += ["--port", str(port), "--accelerator", args.device.partition(":")[0]]
    with running(command, r"running on (http://127\.0\.0\.1:\d+)", "/health") as server:
        yield server.url


def encode_form(image: bytes) -> bytes:
    """Encode a multipart form with one part, `file`."""
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="image.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    )
    return head.encode() + image + f"\r\n--{BOUNDARY}--\r\n".encode()


def litserve_version(python: str) -> str:
    """Ask another Python for its version of LitServe."""
    code = "import importlib.metadata as m; print(m.version('litserve'))"
    return subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def print_run(name: str, run: LoadResult) -> None:
    median = run.percentile(50) or math.nan
    statuses = format_statuses(run.statuses)
    print(f"{name:>22}  {run.throughput:6.3f} images/s  p50 {median:.2f} s  {statuses}")


if __name__ == "__main__":
    main()
