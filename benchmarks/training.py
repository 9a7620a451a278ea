"""Measure steps of training per second: `python -m benchmarks.training [--baseline CHECKOUT]`.

Runs `unet train` with the nuclei recipe on drawn images. With --baseline it alternates between this
checkout and an older one (`git worktree add`), so that both see the same machine; both train by the
older one's recipe, whose keys both know. Rates are those that the run itself logs: from step 20 to
the last one, without reading and validation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from benchmarks.gpu_training import RECIPE, data_flags, draw_data

ROOT = Path(__file__).parent.parent
_FIRST_STEP = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--baseline", type=Path, help="an older checkout to compare with")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each checkout (3)")
    parser.add_argument("--steps", type=int, default=80, help="of each run (80)")
    parser.add_argument("--base-features", type=int, default=16, help="width of the network (16)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("flags", nargs="*", help="further flags of `unet train`, after --")
    args = parser.parse_args()
    checkouts = {"this": ROOT} | ({"baseline": args.baseline} if args.baseline else {})
    recipe = (args.baseline or ROOT).resolve() / RECIPE
    rates: dict[str, list[float]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        draw_data(data, 24, 300)
        flags = data_flags(data) | {"golden": "", "steps": str(args.steps)}
        if "sources" not in tomllib.loads(recipe.read_text())["data"]:
            del flags["sources"]  # a checkout of that time does not know the flag
        flags |= {"base_features": str(args.base_features), "validate_every": "100000"}
        words = [word for name, value in flags.items() for word in (to_flag(name), value)]
        for number in range(args.rounds):
            for name, checkout in checkouts.items():
                run = Path(scratch) / f"{name}-{number}"
                command = ["train", str(recipe), "--out", str(run), *words, *args.flags]
                rates[name].append(measure_run(checkout.resolve(), command, run))
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


def measure_run(checkout: Path, command: list[str], run: Path) -> float:
    """Run a command of `unet` with the code of a checkout, and return its steps per second.

    Args:
        run: the folder that the command writes its metrics to.

    Raises:
        subprocess.CalledProcessError: the training failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    subprocess.run(
        [sys.executable, "-m", "app.cli", *command],
        cwd=checkout,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = {record["step"]: record["seconds"] for record in records if "loss" in record}
    last = max(seconds)
    return float((last - _FIRST_STEP) / (seconds[last] - seconds[_FIRST_STEP]))


if __name__ == "__main__":
    sys.exit(main())
