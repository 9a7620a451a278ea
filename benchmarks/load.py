"""Load the service over HTTP, and compare with the bare engine: `python -m benchmarks.load`.

Closed loop: a number of clients, each with one request at a time. Open loop: requests arrive at
(Poisson) times that do not depend on the service, and a latency counts from the time at which its
request was due, so that waiting for a slow service counts ("coordinated omission"). Clients and
service share one machine, so the clients cost the service some of its CPU.

Writes `load.json`, `load.md` and, with matplotlib, `load.png` to the folder of --out.
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

from app.cli.bench.engines import measure_bare_engine
from app.cli.bench.load import KeepAliveClient, LoadResult, closed_loop, format_statuses
from app.cli.bench.machine import describe_machine, machine_summary
from app.cli.bench.serving import serving
from app.cli.bench.stages import choose_window, draw_image, encode_jpeg
from app.engine.selection import choose_engines, resolve
from model.checkpoint import load_checkpoint

ROOT = Path(__file__).parent.parent
CLIENTS = (1, 4, 8, 16, 64)
FACTORS = (0.5, 1.0, 2.0, 10.0)
COMPARED_CLIENTS = (8, 16)
"""Runs whose throughput is compared with the engine's."""
PERCENTILES = ("p50_seconds", "p95_seconds", "p99_seconds")
MAX_IN_FLIGHT = 1000
"""Concurrent requests in the open loop. Others wait for a thread, and their latency includes it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--loop",
        choices=("closed", "open"),
        help="only one of them; open needs the results of closed",
    )
    parser.add_argument("--seconds", type=float, default=20, help="duration of a run (20)")
    parser.add_argument("--weights", type=Path, default=ROOT / "weights/nuclei.safetensors")
    parser.add_argument(
        "--side", type=int, default=512, help="side of the window, approximately (512)"
    )
    parser.add_argument("--precision", default="auto", help="UNET_PRECISION (auto)")
    parser.add_argument("--device", default="auto", help="UNET_DEVICE (auto)")
    parser.add_argument("--timeout", type=float, default=30, help="UNET_REQUEST_TIMEOUT_S (30)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/load")
    args = parser.parse_args()
    checkpoint = load_checkpoint(args.weights)
    choice = resolve(choose_engines(device=args.device, precision=args.precision)[0], checkpoint)
    window, size = choose_window(checkpoint, args.side)
    image = encode_jpeg(draw_image(*size))
    report: dict[str, Any] = {
        "machine": describe_machine(choice.device),
        "model": checkpoint.id,
        "engine": f"{choice.backend} {choice.precision} on {choice.device}",
        "image": f"{size[1]}x{size[0]} JPEG, {len(image)} bytes",
        "window": f"{window[0]}x{window[1]}",
    }
    if args.loop == "open":
        report |= {"closed": json.loads((args.out / "load.json").read_text())["closed"]}
    flags = [f"--{name}={getattr(args, name)}" for name in ("device", "precision")]
    with serving(args.weights, f"--request-timeout-s={args.timeout}", *flags) as service:

        def measure_engine() -> float:
            return measure_bare_engine(checkpoint, choice, window, min(5, args.seconds))

        if args.loop != "open":
            before = measure_engine()
            # long enough that the first and the last request of each client weigh little
            lengths = {clients: max(args.seconds, 2 * clients / before) for clients in CLIENTS}
            runs = [report_run(closed_loop(service.url, image, n, lengths[n])) for n in CLIENTS]
            report["closed"] = {
                "engine_images_per_second": [before, measure_engine()],
                "capacity": max(run["images_per_second"] for run in runs),
                "runs": runs,
            }
        if args.loop != "closed":
            capacity = report["closed"]["capacity"]
            runs = []
            for factor in FACTORS:
                name, rate = f"{factor:g} × capacity", factor * capacity
                runs.append(report_run(open_loop(service.url, image, rate, args.seconds, name)))
            report["open"] = {"runs": runs}
        memory = service.memory()
        report["peak_resident_bytes"] = memory and memory.peak
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "load.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.out / "load.md").write_text(format_table(report))
    with contextlib.suppress(ImportError):
        draw_chart(report, args.out / "load.png")
    print(format_table(report))


def report_run(run: LoadResult) -> dict[str, Any]:
    """Print a run, and return it as JSON."""
    times = [f"{value:8.2f}" if (value := run.percentile(q)) else "       -" for q in (50, 95, 99)]
    print(
        f"{run.name:>16}  {run.throughput:6.2f} images/s  "
        f"p50/p95/p99 {' '.join(times)} s  {format_statuses(run.statuses)}",
        flush=True,
    )
    return run.to_json()


def open_loop(url: str, image: bytes, rate: float, seconds: float, name: str) -> LoadResult:
    """Send requests with Poisson arrivals; a latency counts from when its request was due.

    Args:
        rate: requests/s.
        name: of the run.
    """
    result = LoadResult(name, rate)
    lock = threading.Lock()
    clients: queue.SimpleQueue[KeepAliveClient] = queue.SimpleQueue()
    rng = random.Random(1)
    due = start = time.perf_counter()

    def send(due: float) -> None:
        try:
            client = clients.get_nowait()
        except queue.Empty:
            client = KeepAliveClient(url)
        status, _ = client.post(image)
        latency = time.perf_counter() - due
        clients.put(client)
        with lock:
            result.statuses[status] += 1
            if status == "200":
                result.latencies.append(latency)

    with ThreadPoolExecutor(MAX_IN_FLIGHT) as pool:
        while (due := due + rng.expovariate(rate)) < start + seconds:
            time.sleep(max(0.0, due - time.perf_counter()))
            pool.submit(send, due)
    result.seconds = time.perf_counter() - start
    while not clients.empty():
        clients.get().close()
    return result


def format_table(report: dict[str, Any]) -> str:
    """Format a report as Markdown."""
    closed = report["closed"]
    engine = closed["engine_images_per_second"]
    alone = " and ".join(f"{rate:.2f}" for rate in engine)
    ratios = [
        f"**{run['images_per_second'] / statistics.fmean(engine):.3f}** with {run['name']}"
        for run, clients in zip(closed["runs"], CLIENTS, strict=True)
        if clients in COMPARED_CLIENTS
    ]
    memory = report["peak_resident_bytes"]
    rows = [
        f"{machine_summary(report['machine'])}. {report['model']}, {report['engine']}. Image: "
        f"{report['image']}, one {report['window']} window.",
        "",
        f"Bare engine before and after: {alone} images/s. "
        f"HTTP over bare engine: {', '.join(ratios)}. Capacity (best of the closed loop): "
        f"{closed['capacity']:.2f} images/s."
        + (f" Peak of resident memory: {memory / 1e6:.0f} MB." if memory else ""),
        "",
        "| load | offered/s | masks/s | p50 s | p95 s | p99 s | responses |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in list_runs(report):
        offered = run["offered_per_second"]
        cells = [
            run["name"],
            "-" if offered is None else f"{offered:.1f}",
            f"{run['images_per_second']:.2f}",
            *(f"{run[key]:.2f}" if run[key] else "-" for key in PERCENTILES),
            format_statuses(run["statuses"]),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def list_runs(report: dict[str, Any]) -> list[dict[str, Any]]:
    """List the runs of both loops."""
    return [run for loop in ("closed", "open") if loop in report for run in report[loop]["runs"]]


def draw_chart(report: dict[str, Any], path: Path) -> None:
    """Draw throughput, with that of the bare engine, and latencies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = list_runs(report)
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
