"""Ours beside LitServe, over HTTP, in one run: `python -m benchmarks.litserve_compare`.

The same network with the same weights behind both: the shipped ones, widened to base_features 64
(which keeps their function) and put on the whole image resized to 512×512. A 1918×1280 JPEG goes
in, a PNG mask of its size comes out; clients in a closed loop. Ours runs as it would by itself,
or in int8 where --precision says so, with ranges measured here on a few drawn images: enough for
its speed, not a proof of its masks.
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

from app.cli.bench.load import Result, answers, closed_loop
from app.cli.bench.machine import in_words, machine
from app.cli.bench.serving import running, serving
from app.cli.bench.stages import PHOTO, drawn, encoded
from benchmarks.networks import write_wide_checkpoint
from model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from model.config import Calibration
from model.convert.calibration import activation_ranges
from model.predict import Predictor

ROOT = Path(__file__).parent.parent
_BOUNDARY = "a-mask-please"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--litserve-python", default=sys.executable, help="of an environment that has LitServe"
    )
    parser.add_argument("--weights", type=Path, default=ROOT / "weights/nuclei.safetensors")
    parser.add_argument("--base-features", type=int, default=64)
    parser.add_argument("--side", type=int, default=512, help="of the window (512)")
    parser.add_argument("--network", type=Path, help="keep the network there, or take it if it is")
    parser.add_argument("--precision", default="int8", help="of ours (int8)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for both (cpu)")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60, help="of each (60)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.network or Path(folder) / "compared.safetensors"
        checkpoint = load_checkpoint(path) if path.exists() else make(path, args)
        report = compare(path, checkpoint, args)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def make(path: Path, args: argparse.Namespace) -> Checkpoint:
    """The network that both serve, with ranges for int8."""
    wide = write_wide_checkpoint(path, args.weights, args.base_features, (args.side, args.side))
    images = [drawn(*PHOTO), drawn(args.side, args.side)]
    calibration = Calibration(activation_ranges(Predictor.of(wide), images))
    return save_checkpoint(path, dataclasses.replace(wide, calibration=calibration))


def compare(path: Path, checkpoint: Checkpoint, args: argparse.Namespace) -> dict[str, Any]:
    """Both after each other, each alone on the machine."""
    image = encoded(drawn(*PHOTO))
    print(in_words(machine()))
    print(
        f"base_features {checkpoint.architecture.base_features} at {args.side}x{args.side}; "
        f"a {PHOTO[1]}x{PHOTO[0]} JPEG of {len(image)} bytes; {args.clients} clients"
    )
    flags = [f"--device={args.device}", f"--precision={args.precision}", "--request-timeout-s=600"]
    with serving(path, *flags) as ours:
        mine = closed_loop(ours.url, image, args.clients, args.seconds)
    show(f"ours, {args.precision}", mine)
    with lit_serving(path, args) as url:
        kind = f"multipart/form-data; boundary={_BOUNDARY}"
        theirs = closed_loop(
            url, form(image), args.clients, args.seconds, path="/predict", kind=kind
        )
    show("LitServe, torch fp32", theirs)
    ratio = mine.throughput / theirs.throughput
    print(f"ours over LitServe: {ratio:.2f}")
    return {
        "machine": machine(),
        "litserve": litserve_version(args.litserve_python),
        "base_features": checkpoint.architecture.base_features,
        "window": [args.side, args.side],
        "precision": args.precision,
        "ours": mine.to_json(),
        "theirs": theirs.to_json(),
        "ours_over_theirs": ratio,
    }


@contextlib.contextmanager
def lit_serving(path: Path, args: argparse.Namespace) -> Iterator[str]:
    """The URL of the network behind LitServe, once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [args.litserve_python, "-m", "benchmarks.litserve_server", str(path)]
    command += ["--port", str(port), "--accelerator", args.device.partition(":")[0]]
    with running(command, r"running on (http://127\.0\.0\.1:\d+)", "/health") as server:
        yield server.url


def form(image: bytes) -> bytes:
    """A form with one `file`."""
    head = (
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="image.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    )
    return head.encode() + image + f"\r\n--{_BOUNDARY}--\r\n".encode()


def litserve_version(python: str) -> str:
    code = "import importlib.metadata as m; print(m.version('litserve'))"
    return subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def show(name: str, run: Result) -> None:
    median = run.percentile(50) or math.nan
    print(
        f"{name:>22}  {run.throughput:6.3f} images/s  p50 {median:.2f} s  {answers(run.statuses)}"
    )


if __name__ == "__main__":
    main()
