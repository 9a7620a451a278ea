"""Runs the experiments, prints their tables and writes them to build/prove.md.

    python -m tools.prove [--long] [EXPERIMENT ...]

Exits with 1 if a bound was missed.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

from model.checkpoint import git_revision
from tools.prove import api, bombs, faults, mutations, protocol, signals, soak
from tools.prove.report import Row, at_most, format_table, none_of
from tools.prove.subject import ROOT

OUTPUT = ROOT / "build" / "prove.md"
SHORT_S, LONG_S = 600, 3900
"""Longest time of a whole run."""


class Experiment(NamedTuple):
    """One experiment, with the time that it may spend in a short run and in a long one.

    One that has to do a certain number of things takes longer where the machine is slow.
    """

    title: str
    run: Callable[[float], list[Row]]
    short: float
    long: float


EXPERIMENTS = {
    "faults": Experiment("Engines that fail", faults.run, 0, 0),
    "protocol": Experiment("Clients that do not speak HTTP", protocol.run, 0, 0),
    "bombs": Experiment("Requests that are costly to process", bombs.run, 0, 300),
    "api": Experiment("Requests made from the API's schema", api.run, 45, 600),
    "mutations": Experiment("Damaged images", mutations.run, 0, 600),
    "soak": Experiment("Mixed traffic with reloads", soak.run, 150, 1500),
    "signals": Experiment("SIGTERM under load", signals.run, 0, 420),
}


def main() -> int:
    """Run the chosen experiments, or all; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.prove", description=__doc__)
    parser.add_argument("--long", action="store_true", help="about an hour instead of ten minutes")
    parser.add_argument(
        "names", nargs="*", metavar="EXPERIMENT", help=f"one of {', '.join(EXPERIMENTS)}"
    )
    args = parser.parse_args()
    if unknown := set(args.names) - set(EXPERIMENTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(EXPERIMENTS)}")
    start = time.monotonic()
    sections, passed = [_describe_run()], True
    for name in args.names or EXPERIMENTS:
        experiment = EXPERIMENTS[name]
        print(f"==> {experiment.title} ({name})", file=sys.stderr, flush=True)
        begin = time.monotonic()
        rows = _run(experiment.run, experiment.long if args.long else experiment.short)
        passed &= all(row.passed for row in rows)
        seconds = time.monotonic() - begin
        section = f"## {experiment.title}\n\n{format_table(rows)}\n\n{seconds:.0f} s."
        print(f"\n{section}\n", flush=True)
        sections.append(section)
    total = at_most(
        "the whole run", time.monotonic() - start, LONG_S if args.long else SHORT_S, "s"
    )
    sections.append(f"## All of it\n\n{format_table([total])}")
    print(sections[-1])
    passed &= total.passed
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text("\n\n".join(sections) + "\n")
    verdict = "every bound was kept" if passed else "a bound was MISSED"
    print(f"\n{verdict}; the tables are in {OUTPUT.relative_to(ROOT)}", file=sys.stderr)
    return 0 if passed else 1


def _run(experiment: Callable[[float], list[Row]], seconds: float) -> list[Row]:
    try:
        return experiment(seconds)
    except Exception as error:
        traceback.print_exc()
        return [none_of("errors that ended the experiment", [f"{type(error).__name__}: {error}"])]


def _describe_run() -> str:
    date = time.strftime("%Y-%m-%d", time.gmtime())
    machine = f"{os.cpu_count()} CPUs, {platform.system()}, Python {platform.python_version()}"
    return f"Revision {git_revision()}, {date}, {machine}."


if __name__ == "__main__":
    sys.exit(main())
