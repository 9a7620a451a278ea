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

from app.cli.bench.engines import bare_engine
from app.cli.bench.load import Caller, Result, answers, closed_loop
from app.cli.bench.machine import in_words, machine
from app.cli.bench.serving import serving
from app.cli.bench.stages import drawn, encoded, one_window
from app.engine.selection import choose_engines, resolve
from model.checkpoint import load_checkpoint

ROOT = Path(__file__).parent.parent
CLIENTS = (1, 4, 8, 16, 64)
FACTORS = (0.5, 1.0, 2.0, 10.0)
HELD_AGAINST_THE_ENGINE = (8, 16)
PERCENTILES = ("p50_seconds", "p95_seconds", "p99_seconds")
MOST_AT_ONCE = 1000
"""Requests in the air. What would be more waits for a thread, and its latency says so."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--loop", choices=("closed", "open"), help="one of them alone; open needs closed before it"
    )
    parser.add_argument("--seconds", type=float, default=20, help="of each run (20)")
    parser.add_argument("--weights", type=Path, default=ROOT / "weights/nuclei.safetensors")
    parser.add_argument("--side", type=int, default=512, help="of the window, nearly (512)")
    parser.add_argument("--precision", default="auto", help="as UNET_PRECISION (auto)")
    parser.add_argument("--device", default="auto", help="as UNET_DEVICE (auto)")
    parser.add_argument("--timeout", type=float, default=30, help="UNET_REQUEST_TIMEOUT_S (30)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/load")
    args = parser.parse_args()
    checkpoint = load_checkpoint(args.weights)
    choice = resolve(choose_engines(device=args.device, precision=args.precision)[0], checkpoint)
    window, sides = one_window(checkpoint, args.side)
    image = encoded(drawn(*sides))
    report: dict[str, Any] = {
        "machine": machine(choice.device),
        "model": checkpoint.id,
        "engine": f"{choice.backend} {choice.precision} on {choice.device}",
        "image": f"{sides[1]}x{sides[0]} JPEG, {len(image)} bytes",
        "window": f"{window[0]}x{window[1]}",
    }
    if args.loop == "open":
        report |= {"closed": json.loads((args.out / "load.json").read_text())["closed"]}
    flags = [f"--{name}={getattr(args, name)}" for name in ("device", "precision")]
    with serving(args.weights, f"--request-timeout-s={args.timeout}", *flags) as service:

        def engine_alone() -> float:
            return bare_engine(checkpoint, choice, window, min(5, args.seconds))

        if args.loop != "open":
            before = engine_alone()
            # long enough for each client's first and last request not to weigh
            lengths = {clients: max(args.seconds, 2 * clients / before) for clients in CLIENTS}
            runs = [told(closed_loop(service.url, image, n, lengths[n])) for n in CLIENTS]
            report["closed"] = {
                "engine_images_per_second": [before, engine_alone()],
                "capacity": max(run["images_per_second"] for run in runs),
                "runs": runs,
            }
        if args.loop != "closed":
            capacity = report["closed"]["capacity"]
            runs = []
            for factor in FACTORS:
                name, rate = f"{factor:g} × capacity", factor * capacity
                runs.append(told(open_loop(service.url, image, rate, args.seconds, name)))
            report["open"] = {"runs": runs}
        memory = service.memory()
        report["peak_resident_bytes"] = memory and memory.peak
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "load.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.out / "load.md").write_text(table(report))
    with contextlib.suppress(ImportError):
        draw(report, args.out / "load.png")
    print(table(report))


def told(run: Result) -> dict[str, Any]:
    """Show a run as soon as it is over."""
    times = [f"{value:8.2f}" if (value := run.percentile(q)) else "       -" for q in (50, 95, 99)]
    print(
        f"{run.name:>16}  {run.throughput:6.2f} images/s  "
        f"p50/p95/p99 {' '.join(times)} s  {answers(run.statuses)}",
        flush=True,
    )
    return run.to_json()


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


def table(report: dict[str, Any]) -> str:
    """All of it, in Markdown."""
    closed = report["closed"]
    engine = closed["engine_images_per_second"]
    alone = " and ".join(f"{rate:.2f}" for rate in engine)
    ratios = [
        f"**{run['images_per_second'] / statistics.fmean(engine):.3f}** with {run['name']}"
        for run, clients in zip(closed["runs"], CLIENTS, strict=True)
        if clients in HELD_AGAINST_THE_ENGINE
    ]
    memory = report["peak_resident_bytes"]
    rows = [
        f"{in_words(report['machine'])}. {report['model']}, {report['engine']}. The image is a "
        f"{report['image']}, and one {report['window']} window.",
        "",
        f"Bare engine, before and after: {alone} images/s. "
        f"HTTP over bare engine: {', '.join(ratios)}. Capacity, the best of the closed loop: "
        f"{closed['capacity']:.2f} images/s."
        + (f" Resident memory at its peak: {memory / 1e6:.0f} MB." if memory else ""),
        "",
        "| load | offered/s | masks/s | p50 s | p95 s | p99 s | answers |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs_of(report):
        offered = run["offered_per_second"]
        cells = [
            run["name"],
            "-" if offered is None else f"{offered:.1f}",
            f"{run['images_per_second']:.2f}",
            *(f"{run[key]:.2f}" if run[key] else "-" for key in PERCENTILES),
            answers(run["statuses"]),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def runs_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [run for loop in ("closed", "open") if loop in report for run in report[loop]["runs"]]


def draw(report: dict[str, Any], path: Path) -> None:
    """Throughput beside the bare engine's, and latencies, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = runs_of(report)
    engine = statistics.fmean(report["closed"]["engine_images_per_second"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    names = [run["name"] for run in runs]
    left.bar(names, [run["images_per_second"] for run in runs], color="#0f766e")
    left.axhline(engine, color="#56635f", linewidth=1, linestyle="--")
    left.text(len(runs) - 0.5, engine, "bare engine", ha="right", va="bottom", color="#56635f")
    left.set_ylabel("masks / s")
    left.margins(y=0.15)
    for key, marker in zip(PERCENTILES, "os^", strict=True):
        right.plot(names, [run[key] for run in runs], marker, label=key.partition("_")[0])
    right.set_yscale("log")
    right.set_ylabel("seconds from the intended start")
    right.legend()
    for axes in (left, right):
        axes.tick_params(axis="x", rotation=35)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
