"""Test and measure this project on a borrowed GPU: `python -m benchmarks.gpu_proof`.

It runs in eight minutes at most, on an image with torch, torchvision, NumPy and this project alone.
Missing packages are taken from wheels in `--wheels` (`make gpu-wheels` downloads them); nothing is
installed. The parts, in this order: probe, tests, engine table, the service's engine, the service
over HTTP, one training. Each is a process with a time limit, and writes each figure at once: what
was measured before a part was killed is in the folder of the results.

    FOLDER/PART.json   the figures of a part
    FOLDER/proof.json  how each part ended, and the goals
    FOLDER/proof.log   everything that was printed
    FOLDER/nuclei.safetensors  the trained checkpoint

`--device cpu --quick` tries all of it without a GPU in a minute or two.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

TOTAL_SECONDS = 480.0
_LEAST_SECONDS = 5.0
"""A part is not started with less time."""
_STOP_SECONDS = 5.0
"""Between SIGTERM and SIGKILL."""

_CORE = ("torch", "numpy", "pydantic", "safetensors", "PIL")


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the proof.

    Attributes:
        name: of its file of figures.
        seconds: after which it is killed.
        needs: modules without which it is skipped.
        command: arguments of Python. {device}, {json} and {out} are replaced.
        quick: further arguments for trying the program.
        optional: the proof succeeds without it where a module is missing.
    """

    name: str
    seconds: float
    needs: tuple[str, ...]
    command: tuple[str, ...]
    quick: tuple[str, ...] = ("--quick",)
    optional: bool = False


_FIGURES = ("--device", "{device}", "--json", "{json}")
PARTS = (
    Part("probe", 80, _CORE, ("-m", "benchmarks.cuda_probe", *_FIGURES)),
    Part(
        "tests",
        80,
        (*_CORE, "pytest"),
        # Without the project's own settings and conftest, which need packages for HTTP.
        ("-m", "pytest", "--noconftest", "-c", os.devnull, "--rootdir=.", "-p", "no:cacheprovider",
         "--import-mode=importlib", "-o", "markers=gpu: needs a CUDA device", "-q", "tests/gpu"),
        (),
    ),
    Part("engine", 110, _CORE, ("-m", "benchmarks.gpu_engine", "table", *_FIGURES)),
    Part("service", 40, _CORE, ("-m", "benchmarks.gpu_engine", "service", *_FIGURES)),
    Part(
        "http",
        50,
        (*_CORE, "fastapi", "uvicorn", "h11", "python_multipart", "pydantic_settings",
         "prometheus_client", "zlib_ng", "fastapi_swagger", "imagecodecs", "simplejpeg"),
        ("-m", "benchmarks.gpu_engine", "http", *_FIGURES),
        optional=True,
    ),
    Part(
        "training",
        180,
        (*_CORE, "scipy", "tqdm", "imagecodecs"),
        ("-m", "benchmarks.gpu_training", *_FIGURES, "--out", "{out}"),
        ("--quick", "--minutes", "0.1"),
        optional=True,
    ),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda:0", help="cuda:N or cpu (cuda:0)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the program")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/gpu-proof"),
        help="folder of the results (build/gpu-proof)",
    )
    parser.add_argument(
        "--wheels",
        type=Path,
        default=Path(".wheels"),
        help="folder with wheels of missing packages (.wheels)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=TOTAL_SECONDS,
        help=f"limit of the whole run ({TOTAL_SECONDS:.0f})",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=[part.name for part in PARTS],
        default=[part.name for part in PARTS],
        help="all by default",
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for part in PARTS:  # figures of an earlier run would be taken for those of this one
        (args.out / f"{part.name}.json").unlink(missing_ok=True)
    parts = [part for part in PARTS if part.name in args.parts]
    with unpacked(args.wheels) as environment, (args.out / "proof.log").open("w") as log:
        ends = run_parts(parts, args, environment, log)
        figures = read_figures(args.out)
        missed = report_goals(figures, ends, log) if args.device != "cpu" else []
        write_summary(args.out, ends, missed)
    return 1 if missed or any(is_failure(part, ends[part.name]) for part in parts) else 0


def is_failure(part: Part, end: Mapping[str, Any]) -> bool:
    """Whether a part's end makes the whole run fail."""
    return end["status"] != "ok" and not (end["status"] == "skipped" and part.optional)


@contextmanager
def unpacked(wheels: Path) -> Iterator[dict[str, str]]:
    """Unpack wheels into a temporary folder. Yields the environment in which they are found.

    Installed packages have priority. PYTHONPATH would come before them, so a `sitecustomize`
    appends the folder at the start of every Python.
    """
    with tempfile.TemporaryDirectory() as folder:
        packages, start = Path(folder) / "packages", Path(folder) / "start"
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(packages)
        start.mkdir()
        (start / "sitecustomize.py").write_text(f"import sys\nsys.path.append({str(packages)!r})\n")
        path = os.pathsep.join(filter(None, [str(start), os.environ.get("PYTHONPATH", "")]))
        yield {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def run_parts(
    parts: Sequence[Part],
    args: argparse.Namespace,
    environment: Mapping[str, str],
    log: IO[str],
) -> dict[str, dict[str, Any]]:
    """Run parts one after the other within the limit of the whole run.

    Returns:
        How each ended: status (ok, failed, timeout or skipped), seconds, and why.
    """
    end = time.monotonic() + args.seconds
    ends: dict[str, dict[str, Any]] = {}
    for part in parts:
        left = end - time.monotonic()
        missing = missing_modules(part.needs, environment)
        if missing:
            ends[part.name] = {"status": "skipped", "why": f"needs {', '.join(missing)}"}
        elif left < _LEAST_SECONDS:
            ends[part.name] = {"status": "skipped", "why": "no time is left"}
        else:
            say(log, f"== {part.name}, at most {min(part.seconds, left):.0f} s")
            values = {
                "device": args.device,
                "json": str(args.out / f"{part.name}.json"),
                "out": str(args.out),
            }
            command = [text.format(**values) for text in part.command]
            command += part.quick if args.quick else ()
            limit = min(part.seconds, left)
            ends[part.name] = run_limited([sys.executable, *command], limit, environment, log)
        say(log, f"== {part.name}: {ends[part.name]}")
        write_summary(args.out, ends, None)
    return ends


def missing_modules(needs: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return the modules that cannot be found in an environment, which are not imported."""
    code = (
        "import importlib.util, sys; print(*[n for n in sys.argv[1:] "
        "if importlib.util.find_spec(n) is None])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *needs],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def run_limited(
    command: Sequence[str], seconds: float, environment: Mapping[str, str], log: IO[str]
) -> dict[str, Any]:
    """Run a command, print its output, and end it and its children after some seconds.

    Returns:
        status, seconds and, for tests, the last line.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    last = ""

    def print_output() -> None:
        nonlocal last
        assert process.stdout is not None
        with process.stdout as output:
            for line in output:
                say(log, line.rstrip())
                last = line.strip() or last

    reader = threading.Thread(target=print_output, daemon=True)
    reader.start()
    status = "timeout"
    try:
        status = "ok" if process.wait(seconds) == 0 else "failed"
    except subprocess.TimeoutExpired:
        _signal_group(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
    finally:
        _signal_group(process, signal.SIGKILL)  # and what it left running
        process.wait()
    reader.join(_STOP_SECONDS)
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "last_line": last}


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def say(log: IO[str], line: str) -> None:
    """Print a line, and write it to the log at once."""
    print(line, flush=True)
    log.write(line + "\n")
    log.flush()


def read_figures(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the figures of all parts that wrote some, by the part's name."""
    found = {}
    for part in PARTS:
        path = folder / f"{part.name}.json"
        if path.exists():
            found[part.name] = json.loads(path.read_text())
    return found


def write_summary(folder: Path, ends: Mapping[str, Any], missed: Sequence[str] | None) -> None:
    """Write proof.json: how the parts ended, and the goals that were missed, once known."""
    text = json.dumps({"parts": ends, "missed_goals": missed}, indent=1)
    (folder / "proof.json").write_text(text + "\n")


def report_goals(
    figures: Mapping[str, dict[str, Any]], ends: Mapping[str, dict[str, Any]], log: IO[str]
) -> list[str]:
    """Print each goal with its figure, and return those that are missed.

    A goal whose figure is missing counts as missed.
    """
    missed = []
    for name, reached, text in check_goals(figures, ends):
        say(log, f"{'reached' if reached else 'MISSED '}  {name}: {text}")
        if not reached:
            missed.append(name)
    return missed


def check_goals(
    figures: Mapping[str, dict[str, Any]], ends: Mapping[str, dict[str, Any]]
) -> Iterator[tuple[str, bool, str]]:
    """Yield the name of each goal, whether it is reached, and its figures as text.

    Args:
        figures: of `read_figures`.
        ends: of `run_parts`.
    """
    tests = ends.get("tests", {})
    last_line = str(tests.get("last_line", ""))
    passed = tests.get("status") == "ok" and "passed" in last_line and "skipped" not in last_line
    yield "all tests pass, and none is skipped", passed, last_line
    engine, service = figures.get("engine", {}), figures.get("service", {})
    warmed = engine.get("warmed", [])
    without = [row for row in warmed if row["without_a_graph"]]
    yield (
        "a graph for every window and batch size",
        bool(warmed) and not without,
        f"{len(without)} of {len(warmed)} engines lack one",
    )
    scores = [
        row
        for part in ("engine", "training")
        for row in figures.get(part, {}).get("mask_iou_with_fp32", [])
    ]
    least = min((row["mean"] for row in scores), default=0.0)
    yield "IoU of masks with fp32 is 0.99 or more", least >= 0.99, f"{least:.4f}"
    rows = [row for row in engine.get("rows", []) if row["precision"] == "bf16"]
    best = max((row["of_products"] for row in rows if row["side"] == 544), default=0.0)
    yield "the engine reaches 0.60 of the matrix product (0.70 later)", best >= 0.6, f"{best:.3f}"
    published = max((row["images_per_second"] for row in rows if row["side"] == 572), default=0.0)
    products = engine.get("products_bf16", 0.0)
    # 1,150 images/s at 788 TFLOP/s, an H200's matrix products; another card by its own
    needed = 1150 * min(1.0, products / 788e12) if products else 1150.0
    yield (
        "572x572 reaches 1,150 images/s, by the card's matrix products",
        published >= needed,
        f"{published:.0f} of {needed:.0f}",
    )
    ratio = service.get("engine_two_in_flight", {}).get("of_bare_network", 0.0)
    yield "two batches in flight keep 0.95 of the bare network", ratio >= 0.95, f"{ratio:.3f}"
    over_http = max(
        (row["of_engine"] for row in figures.get("http", {}).get("runs", [])), default=0.0
    )
    yield "HTTP reaches 0.9 of the engine", over_http >= 0.9, f"{over_http:.3f}"


if __name__ == "__main__":
    sys.exit(main())
