"""The service under load, over HTTP, beside the bare engine: `python -m benchmarks.load`.

Closed loop: a number of clients, each with one request at a time. Open loop: requests arrive at
their own (Poisson) times whether the service keeps up or not, and a latency counts from the time a
request was meant to be sent, so that waiting in front of a slow service is not left out
("coordinated omission"). Clients and service share one machine, so the clients cost the service
some of its time.

Writes `load.json`, `load.md` and, with matplotlib, `load.png` into the folder of --out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import random
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from app.bench.engines import bare_engine
from app.bench.load import Caller, Result, answers, closed_loop
from app.bench.machine import in_words, machine
from app.bench.serving import serving
from app.bench.stages import drawn, encoded, one_window
from app.engine.factory import choose_engines, resolve
from model.checkpoint import load_checkpoint

ROOT = Path(__file__).parent.parent
CLIENTS = (1, 4, 8, 16, 64)
FACTORS = (0.5, 1.0, 2.0, 10.0)
HELD_AGAINST_THE_ENGINE = (8, 16)
MOST_AT_ONCE = 1000
"""Requests in the air. What would be more waits for a thread, and its latency says so."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=20, help="of each run (20)")
    parser.add_argument("--weights", type=Path, default=ROOT / "weights/nuclei.safetensors")
    parser.add_argument("--precision", default="auto", help="as UNET_PRECISION (auto)")
    parser.add_argument("--device", default="auto", help="as UNET_DEVICE (auto)")
    parser.add_argument("--timeout", type=float, default=30, help="UNET_REQUEST_TIMEOUT_S (30)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/load")
    args = parser.parse_args()
    checkpoint = load_checkpoint(args.weights)
    choice = resolve(choose_engines(device=args.device, precision=args.precision)[0], checkpoint)
    window, sides = one_window(checkpoint)
    image = encoded(drawn(*sides))
    flags = [f"--{name}={getattr(args, name)}" for name in ("device", "precision")]
    engine = [bare_engine(checkpoint, choice, window, 8)]
    print(f"bare engine: {engine[0]:.2f} windows/s")
    runs: list[Result] = []
    with serving(args.weights, f"--request-timeout-s={args.timeout}", *flags) as service:
        for clients in CLIENTS:
            # long enough for each client's first and last request not to weigh
            seconds = max(args.seconds, 3 * clients / engine[0])
            runs.append(closed_loop(service.url, image, clients, seconds))
            print(line(runs[-1]))
        capacity = max(run.throughput for run in runs)
        for factor in FACTORS:
            rate = factor * capacity
            name = f"{factor:g} × capacity"
            runs.append(open_loop(service.url, image, rate, args.seconds, name))
            print(line(runs[-1]))
        memory = service.memory()
    engine.append(bare_engine(checkpoint, choice, window, 8))
    ratios = {
        n: runs[CLIENTS.index(n)].throughput / statistics.fmean(engine)
        for n in HELD_AGAINST_THE_ENGINE
    }
    report = {
        "machine": machine(choice.device),
        "model": checkpoint.id,
        "engine": f"{choice.backend} {choice.precision} on {choice.device}",
        "image": f"{sides[1]}x{sides[0]} JPEG, {len(image)} bytes",
        "window": f"{window[0]}x{window[1]}",
        "bare_engine_images_per_second": engine,
        "of_the_engine": ratios,
        "capacity_images_per_second": capacity,
        "peak_resident_bytes": memory and memory.peak,
        "runs": [run.to_json() for run in runs],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "load.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.out / "load.md").write_text(table(report, runs))
    with contextlib.suppress(ImportError):
        draw(runs, engine, args.out / "load.png")
    print(table(report, runs))


def open_loop(url: str, image: bytes, rate: float, seconds: float, name: str) -> Result:
    """Poisson arrivals at `rate` a second; a latency counts from when its request was due."""
    result = Result(name, rate)
    lock = threading.Lock()
    callers: queue.SimpleQueue[Caller] = queue.SimpleQueue()
    rng = random.Random(1)
    due = start = time.perf_counter()

    def request(due: float) -> None:
        try:
            caller = callers.get_nowait()
        except queue.Empty:
            caller = Caller(url)
        status, _ = caller.post(image)
        latency = time.perf_counter() - due
        callers.put(caller)
        with lock:
            result.statuses[status] += 1
            if status == "200":
                result.latencies.append(latency)

    with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
        while (due := due + rng.expovariate(rate)) < start + seconds:
            time.sleep(max(0.0, due - time.perf_counter()))
            pool.submit(request, due)
    result.seconds = time.perf_counter() - start
    while not callers.empty():
        callers.get().close()
    return result


def line(run: Result) -> str:
    """A run while it is all there is to see."""
    shown = [f"{value:8.2f}" if (value := run.percentile(q)) else "       -" for q in (50, 95, 99)]
    return (
        f"{run.name:>16}  {run.throughput:6.2f} images/s  "
        f"p50/p95/p99 {' '.join(shown)} s  {answers(run.statuses)}"
    )


def table(report: dict[str, Any], runs: list[Result]) -> str:
    """All of it, in Markdown."""
    engine = " and ".join(f"{value:.2f}" for value in report["bare_engine_images_per_second"])
    ratios = ", ".join(
        f"**{ratio:.3f}** at {clients} clients"
        for clients, ratio in report["of_the_engine"].items()
    )
    memory = report["peak_resident_bytes"]
    rows = [
        f"{in_words(report['machine'])}; {report['model']}, {report['engine']}. The image: "
        f"a {report['image']}, which is one {report['window']} window.",
        "",
        f"Bare engine, before and after: {engine} images/s. HTTP over bare engine: {ratios}. "
        f"Capacity, the best of the closed loop: {report['capacity_images_per_second']:.2f} "
        "images/s." + (f" Resident memory at its peak: {memory / 1e6:.0f} MB." if memory else ""),
        "",
        "| load | offered/s | masks/s | p50 s | p95 s | p99 s | answers |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        offered = "-" if run.offered is None else f"{run.offered:.1f}"
        times = [f"{value:.2f}" if (value := run.percentile(q)) else "-" for q in (50, 95, 99)]
        cells = [run.name, offered, f"{run.throughput:.2f}", *times, answers(run.statuses)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def draw(runs: list[Result], engine: list[float], path: Path) -> None:
    """Throughput beside the bare engine's, and latencies, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    names = [run.name for run in runs]
    left.bar(names, [run.throughput for run in runs], color="#0f766e")
    left.axhline(statistics.fmean(engine), color="#56635f", linewidth=1, linestyle="--")
    left.text(0, statistics.fmean(engine), "bare engine", va="bottom", fontsize=8, color="#56635f")
    left.set_ylabel("masks / s")
    for q, marker in ((50, "o"), (95, "s"), (99, "^")):
        right.plot(names, [run.percentile(q) for run in runs], marker, label=f"p{q}")
    right.set_yscale("log")
    right.set_ylabel("seconds from the intended start")
    right.legend()
    for axes in (left, right):
        axes.tick_params(axis="x", rotation=35)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
