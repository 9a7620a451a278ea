"""Compare `unet segment --ray` with one and two actors to the same work without Ray:
`python -m benchmarks.ray_data`.

Each way segments the same folder, in turn, with one thread per engine and one image worker per
thread: one engine without Ray, one actor, two actors, and one engine with two threads without Ray.
A way has as many CPUs as its engines have threads: all its processes, those of Ray too, are
confined to them. Otherwise one actor would decode images on a CPU that two actors have to share.

A temporary cluster runs on this machine. Images per second are those between the first tenth of the
results and the last result, by the times of the files, so that neither the start of Ray nor the
loading of the model counts; the whole time is shown as well.

Prints a table in Markdown, and writes JSON with --json. Needs the extra [ray] and two CPUs that
nothing else uses.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from app.cli.bench.stages import draw_image, encode_jpeg

ROOT = Path(__file__).parent.parent
WARM_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to segment the folder.

    Attributes:
        name: for the table.
        flags: of `unet segment`.
        threads: of an engine.
        cpus: number of CPUs for all processes.
    """

    name: str
    flags: tuple[str, ...]
    threads: int
    cpus: int


ALONE = Way("without Ray, 1 thread", (), 1, 1)
ONE = Way("1 actor", ("--ray", "local", "--actors", "1"), 1, 1)
TWO = Way("2 actors", ("--ray", "local", "--actors", "2"), 1, 2)
ALONE_TWO = Way("without Ray, 2 threads", (), 2, 2)
WAYS = (ALONE, ONE, TWO, ALONE_TWO)


@dataclasses.dataclass(frozen=True)
class Timing:
    """A run: images per second once it is under way, and the seconds of the whole command."""

    rate: float
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--weights", type=Path, default=ROOT / "weights/nuclei.safetensors")
    parser.add_argument("--images", type=int, default=200, help="in the folder (200)")
    parser.add_argument("--side", type=int, default=512, help="of the images, in pixels (512)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < TWO.cpus:
        raise SystemExit(f"needs {TWO.cpus} CPUs")
    timings: dict[str, list[Timing]] = {way.name: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = encode_jpeg(draw_image(args.side, args.side))
        (folder / "images").mkdir()
        for index in range(args.images):
            (folder / f"images/{index:05d}.jpg").write_bytes(image)
        for number in range(args.rounds):
            for way in WAYS:
                out = folder / f"{number} {way.name}"
                timing = run(way, cpus[: way.cpus], folder, out, args.weights)
                timings[way.name].append(timing)
                print(
                    f"{way.name:24} {timing.rate:7.2f} images/s, {timing.seconds:6.1f} s in all",
                    flush=True,
                )
    rates = {name: statistics.median(each.rate for each in runs) for name, runs in timings.items()}
    figures = {
        "gain": rates[TWO.name] / rates[ONE.name],
        "overhead": 1 - rates[ONE.name] / rates[ALONE.name],
        "against_threads": rates[TWO.name] / rates[ALONE_TWO.name],
    }
    print_table(timings)
    print(f"two actors give {figures['gain']:.2f} times the images/s of one")
    print(f"Ray costs {figures['overhead']:.1%} of the images/s of one engine")
    print(
        f"two actors give {figures['against_threads']:.2f} times the images/s of one engine with "
        "two threads"
    )
    if args.json:
        runs = {name: [dataclasses.asdict(each) for each in of] for name, of in timings.items()}
        args.json.write_text(json.dumps({"runs": runs, **figures}, indent=1) + "\n")


def print_table(timings: Mapping[str, Sequence[Timing]]) -> None:
    """Print medians and ranges, and what the command needs besides segmenting."""
    print("\n| | CPUs | images/s | lowest to highest | whole command, s |\n|---|---|---|---|---|")
    for way in WAYS:
        rates = [timing.rate for timing in timings[way.name]]
        seconds = statistics.median(timing.seconds for timing in timings[way.name])
        print(
            f"| {way.name} | {way.cpus} | {statistics.median(rates):.2f} | "
            f"{min(rates):.2f} to {max(rates):.2f} | {seconds:.0f} |"
        )
    print()


def run(way: Way, cpus: Collection[int], folder: Path, out: Path, weights: Path) -> Timing:
    """Segment the folder once.

    Args:
        cpus: those that the processes may use.

    Raises:
        SystemExit: it failed.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "UNET_WEIGHTS_DIR": str(weights.parent.absolute()),
        "UNET_MODEL": weights.stem,
        "UNET_DEVICE": "cpu",
        "UNET_THREADS": str(way.threads),
        "UNET_IMAGE_WORKERS": str(way.threads),
    }
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "segment", str(folder / "images"), "-o", str(out),
         *way.flags],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, cpus),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{way.name} failed: {done.stderr}")
    times = sorted(file.stat().st_mtime for file in out.iterdir())
    assert len(times) == len(list((folder / "images").iterdir()))
    first = int(len(times) * WARM_SHARE)
    return Timing((len(times) - 1 - first) / (times[-1] - times[first]), seconds)


if __name__ == "__main__":
    main()
