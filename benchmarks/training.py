"""Measure steps of training per second: `python -m benchmarks.training [--baseline CHECKOUT]`.

Runs `unet train` with the nuclei recipe on drawn images. With --baseline it alternates between this
checkout and another one (`git worktree add`), so that both see the same machine. Rates are those
that the run itself logs: from step 20 to the last one, without reading and validation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu_training import RECIPE, data_flags, draw_data

ROOT = Path(__file__).parent.parent
_FIRST_STEP = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--baseline", type=Path, help="another checkout to compare with")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each checkout (3)")
    parser.add_argument("--steps", type=int, default=80, help="of each run (80)")
    parser.add_argument("--base-features", type=int, default=16, help="width of the network (16)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("flags", nargs="*", help="further flags of `unet train`, after --")
    args = parser.parse_args()
    checkouts = {"this": ROOT} | ({"baseline": args.baseline} if args.baseline else {})
    rates: dict[str, list[float]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        draw_data(data, 24, 300)
        flags = data_flags(data) | {"golden": "", "steps": str(args.steps)}
        flags |= {"base_features": str(args.base_features), "validate_every": "100000"}
        words = [word for name, value in flags.items() for word in (to_flag(name), value)]
        for number in range(args.rounds):
            for name, checkout in checkouts.items():
                run = Path(scratch) / f"{name}-{number}"
                rates[name].append(measure_run(checkout.resolve(), run, [*words, *args.flags]))
                print(f"{name}: {rates[name][-1]:.3f} steps/s", flush=True)
    report = {name: {"steps_per_second": each} for name, each in rates.items()}
    for name, each in rates.items():
        print(f"{name}: median {statistics.median(each):.3f} steps/s")
    if args.baseline:
        ratio = statistics.median(
            a / b for a, b in zip(rates["this"], rates["baseline"], strict=True)
        )
        print(f"this over the baseline, median of the rounds: {ratio:.3f}")
        report["ratio"] = ratio
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def to_flag(name: str) -> str:
    """Return the flag of a recipe's field."""
    return f"--{name.replace('_', '-')}"


def measure_run(checkout: Path, run: Path, flags: list[str]) -> float:
    """Train once with the code of a checkout, and return the steps per second.

    Raises:
        subprocess.CalledProcessError: the training failed.
    """
    command = [sys.executable, "-m", "app.cli", "train", str(RECIPE), "--out", str(run), *flags]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = {record["step"]: record["seconds"] for record in records if "loss" in record}
    last = max(seconds)
    return float((last - _FIRST_STEP) / (seconds[last] - seconds[_FIRST_STEP]))


if __name__ == "__main__":
    sys.exit(main())
