"""The service under load, over HTTP, beside the bare engine: `python benchmarks/load.py`.

Closed loop: a number of clients, each with one request at a time. Open loop: requests arrive at
their own (Poisson) times whether the service keeps up or not, and a latency counts from the time a
request was meant to be sent, so that waiting in front of a slow service is not left out
("coordinated omission"). Both on one machine, so the clients cost the service some of its time.

Writes `load.json`, `load.md` and, with matplotlib, `load.png` into the folder of --out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import io
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
CLIENTS = (1, 4, 16, 64)
FACTORS = (0.5, 1.0, 2.0, 10.0)


@dataclasses.dataclass
class Result:
    """One run; latencies in seconds, of the requests that were answered 200."""

    name: str
    offered: float | None
    seconds: float
    statuses: dict[str, int]
    latencies: list[float] = dataclasses.field(repr=False)

    @property
    def throughput(self) -> float:
        """Masks a second."""
        return self.statuses.get("200", 0) / self.seconds

    def percentile(self, q: float) -> float | None:
        return float(np.percentile(self.latencies, q)) if self.latencies else None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "offered_per_second": self.offered,
            "seconds": self.seconds,
            "statuses": self.statuses,
            "images_per_second": self.throughput,
            **{f"p{q}_seconds": self.percentile(q) for q in (50, 95, 99)},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=20, help="of each run (20)")
    parser.add_argument("--side", type=int, default=512, help="of the square image (512)")
    parser.add_argument("--weights", type=Path, default=ROOT / "weights")
    parser.add_argument("--model", default="nuclei")
    parser.add_argument("--timeout", type=float, default=30, help="UNET_REQUEST_TIMEOUT_S (30)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    args = parser.parse_args()
    image = field_of_nuclei(args.side)
    results: dict[str, Any] = {
        "machine": machine(),
        "image": f"{args.side}x{args.side} grey PNG, {len(image)} bytes",
        "model": args.model,
    }
    engine = [bare_engine(args.weights / f"{args.model}.safetensors", args.side)]
    print(f"bare engine: {engine[0]:.2f} windows/s")
    runs: list[Result] = []
    with service(args.weights, args.model, args.timeout) as url:
        for clients in CLIENTS:
            runs.append(asyncio.run(closed(url, image, clients, args.seconds)))
            print(line(runs[-1]))
        capacity = max(run.throughput for run in runs)
        for factor in FACTORS:
            runs.append(asyncio.run(opened(url, image, factor, capacity, args.seconds)))
            print(line(runs[-1]))
        served = httpx.get(f"{url}/models/{args.model}").json()
    engine.append(bare_engine(args.weights / f"{args.model}.safetensors", args.side))
    sixteen = next(run for run in runs if run.name == "16 clients")
    results |= {
        "engine": f"{served['engine']} {served['precision']} on {served['device']}",
        "windows_an_image": 1,
        "bare_engine_images_per_second": engine,
        "http_over_engine_at_16_clients": sixteen.throughput / float(np.mean(engine)),
        "runs": [run.to_json() for run in runs],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "load.json").write_text(json.dumps(results, indent=2) + "\n")
    (args.out / "load.md").write_text(table(results, runs))
    with contextlib.suppress(ImportError):
        draw(runs, capacity, args.out / "load.png")
    print(f"bare engine before and after: {engine[0]:.2f}, {engine[1]:.2f} windows/s")
    print(f"HTTP over bare engine at 16 clients: {results['http_over_engine_at_16_clients']:.3f}")


def field_of_nuclei(side: int) -> bytes:
    """A drawn field of bright ellipses on noise, as PNG."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side]
    image = np.full((side, side), 12.0)
    for _ in range(side * side // 3000):
        cy, cx = rng.uniform(0, side, 2)
        a, b = rng.uniform(6, 13, 2)
        image[((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 < 1] = rng.uniform(70, 180)
    buffer = io.BytesIO()
    Image.fromarray(rng.poisson(image).clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def machine() -> dict[str, Any]:
    """What it ran on."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = match[1] if match else name
    return {"cpu": name, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}


def bare_engine(checkpoint: Path, side: int, seconds: float = 8) -> float:
    """Windows a second of the engine alone, in a process of its own."""
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from app.engine.factory import build_engine, choose_engines
from model.checkpoint import load_checkpoint
checkpoint = load_checkpoint(Path({str(checkpoint)!r}))
engine = build_engine(choose_engines()[0], checkpoint)
staged = engine.stage(({side}, {side}), 1)
staged[:] = 100
engine.run(staged)
start, count = time.perf_counter(), 0
while time.perf_counter() - start < {seconds}:
    engine.run(staged)
    count += 1
print(count / (time.perf_counter() - start))
"""
    return float(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout
    )


@contextlib.contextmanager
def service(weights: Path, model: str, timeout: float) -> Iterator[str]:
    """A running service; its URL once it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "serve", "--port", "0"],
        cwd=ROOT,
        env={
            **os.environ,
            "UNET_LOG_FORMAT": "text",
            "UNET_WEIGHTS_DIR": str(weights),
            "UNET_MODEL": model,
            "UNET_REQUEST_TIMEOUT_S": str(timeout),
        },
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        url = ""
        for text in process.stderr:
            if match := re.search(r"listening on (\S+)", text):
                url = match[1]
            if f"model {model}@" in text:
                break
        # nobody reads its log from here on, and a full pipe would stop it
        subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        while httpx.get(f"{url}/readyz").status_code != 200:
            time.sleep(0.1)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


async def closed(url: str, image: bytes, clients: int, seconds: float) -> Result:
    """Each client sends its next request when it has the answer to its last."""
    statuses: Counter[str] = Counter()
    latencies: list[float] = []
    async with _client(url, clients) as http:
        await _post(http, image)
        start = time.perf_counter()
        end = start + seconds

        async def one() -> None:
            while time.perf_counter() < end:
                begun = time.perf_counter()
                status, retry = await _post(http, image)
                statuses[status] += 1
                if status == "200":
                    latencies.append(time.perf_counter() - begun)
                elif retry:
                    await asyncio.sleep(min(retry, max(0.0, end - time.perf_counter())))

        await asyncio.gather(*(one() for _ in range(clients)))
        took = time.perf_counter() - start
    return Result(f"{clients} clients", None, took, dict(statuses), latencies)


async def opened(url: str, image: bytes, factor: float, capacity: float, seconds: float) -> Result:
    """Poisson arrivals at `factor` times the capacity."""
    rate = factor * capacity
    arrivals, moment = [], 0.0
    rng = random.Random(1)
    while (moment := moment + rng.expovariate(rate)) < seconds:
        arrivals.append(moment)
    statuses: Counter[str] = Counter()
    latencies: list[float] = []
    async with _client(url, 10_000) as http:
        await _post(http, image)
        start = time.perf_counter()

        async def one(moment: float) -> None:
            await asyncio.sleep(max(0.0, start + moment - time.perf_counter()))
            status, _ = await _post(http, image)
            statuses[status] += 1
            if status == "200":
                latencies.append(time.perf_counter() - start - moment)

        await asyncio.gather(*(one(moment) for moment in arrivals))
        took = time.perf_counter() - start
    return Result(f"{factor:g} x capacity", rate, took, dict(statuses), latencies)


def _client(url: str, connections: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx.AsyncClient(base_url=url, timeout=120, limits=limits)


async def _post(http: httpx.AsyncClient, image: bytes) -> tuple[str, float]:
    """The status, or the name of what went wrong; and Retry-After."""
    try:
        answer = await http.post("/segment", content=image, headers={"Content-Type": "image/png"})
    except httpx.TransportError as error:
        return type(error).__name__, 0.0
    return str(answer.status_code), float(answer.headers.get("retry-after", 0))


def line(run: Result) -> str:
    shown = [f"{value:8.2f}" if (value := run.percentile(q)) else "       -" for q in (50, 95, 99)]
    return (
        f"{run.name:>16}  {run.throughput:6.2f} images/s  "
        f"p50/p95/p99 {' '.join(shown)} s  {run.statuses}"
    )


def table(results: dict[str, Any], runs: list[Result]) -> str:
    engine = ", ".join(f"{value:.2f}" for value in results["bare_engine_images_per_second"])
    rows = [
        f"{results['machine']['cpu']}, {results['machine']['cores']} cores; "
        f"{results['model']}, {results['engine']}; {results['image']}. The clients run on the same "
        "cores.",
        "",
        f"Bare engine, before and after: {engine} images/s. HTTP over bare engine at 16 clients: "
        f"**{results['http_over_engine_at_16_clients']:.3f}**.",
        "",
        "| load | offered/s | masks/s | p50 s | p95 s | p99 s | answers |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        offered = "-" if run.offered is None else f"{run.offered:.1f}"
        times = [f"{value:.2f}" if (value := run.percentile(q)) else "-" for q in (50, 95, 99)]
        answers = ", ".join(f"{count} × {status}" for status, count in sorted(run.statuses.items()))
        cells = [run.name, offered, f"{run.throughput:.2f}", *times, answers]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def draw(runs: list[Result], capacity: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    names = [run.name for run in runs]
    left.bar(names, [run.throughput for run in runs], color="#0f766e")
    left.axhline(capacity, color="#56635f", linewidth=1, linestyle="--")
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
