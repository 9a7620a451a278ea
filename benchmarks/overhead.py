"""Measure what a request costs beside the network: `python -m benchmarks.overhead --json FILE`.

The service runs as `unet serve` starts it, with its image workers, and an engine that returns at
once (`benchmarks.free_engine`). Clients in a closed loop send JPEGs of three sizes, one or sixteen
per request. Times are CPU time, so other programs count for little. Each case is measured in
several rounds, and the least counts.

Prints a table, and writes {"rows": [...]} with --json. A row has

- side: the greater side of the JPEG, and files: JPEGs per request,
- cpu_ms: CPU milliseconds of all processes of the server, per request,
- loop_ms: of these, those of the thread of the event loop,
- per_second: requests per second. The clients share the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path

from app.cli.bench.load import LoadResult, closed_loop, format_statuses
from app.cli.bench.serving import RunningServer, running
from app.cli.bench.stages import PHOTO_SHAPE, draw_image, encode_jpeg

ROOT = Path(__file__).parent.parent
SHAPES = ((256, 256), (544, 544), PHOTO_SHAPE)
"""(height, width) of the JPEGs."""
FILES = (1, 16)
FIELDS = ("side", "files", "cpu_ms", "loop_ms", "per_second")
_BOUNDARY = "overhead"
_TICK_MS = 1000 / os.sysconf("SC_CLK_TCK")

Row = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="of which the best counts (3)")
    parser.add_argument("--seconds", type=float, default=3, help="per case and round (3)")
    parser.add_argument("--clients", type=int, default=4, help="in the closed loop (4)")
    parser.add_argument("--weights", type=Path, default=ROOT / "weights")
    parser.add_argument("--model", default="nuclei")
    parser.add_argument("--sides", type=int, nargs="+", default=[max(each) for each in SHAPES])
    parser.add_argument("--files", type=int, nargs="+", default=FILES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    args = parser.parse_args()
    shapes = [shape for shape in SHAPES if max(shape) in args.sides]
    cases = list(itertools.product(shapes, args.files))
    best: list[Row] = []
    with serving_free(args.weights, args.model) as service:
        for _ in range(args.rounds):
            rows = [measure(service, *case, args.clients, args.seconds) for case in cases]
            best = [keep_best(*pair) for pair in zip(best, rows, strict=True)] if best else rows
    print(format_table(best))
    if args.json:
        args.json.write_text(json.dumps({"rows": best}, indent=1) + "\n")


def serving_free(weights: Path, model: str) -> AbstractContextManager[RunningServer]:
    """Run the service with an engine that returns at once. See `running`.

    The queue has more slots than the clients need: this measures costs, not admission.
    """
    command = [sys.executable, "-m", "benchmarks.free_engine", "--port=0", "--log-format=text"]
    command += [f"--weights-dir={weights}", f"--model={model}", "--queue-windows=100000"]
    return running(command, r"listening on (http://\S+)", "/readyz")


def measure(
    service: RunningServer, shape: tuple[int, int], files: int, clients: int, seconds: float
) -> Row:
    """Measure one case: JPEGs of a size, and the number of them in a request.

    Raises:
        SystemExit: a request failed.
    """
    body, kind = encode_body(encode_jpeg(draw_image(*shape)), files)
    send(service, body, kind, clients, seconds / 3)  # fills the caches of the server
    before = read_cpu_ms(service.pid)
    run = send(service, body, kind, clients, seconds)
    cpu, loop = (end - start for start, end in zip(before, read_cpu_ms(service.pid), strict=True))
    requests = run.statuses["200"] + clients  # a client's first request is not in the result
    values = (max(shape), files, cpu / requests, loop / requests, run.throughput)
    row = dict(zip(FIELDS, values, strict=True))
    print(format_row(row), flush=True)
    return row


def send(
    service: RunningServer, body: bytes, kind: str, clients: int, seconds: float
) -> LoadResult:
    run = closed_loop(service.url, body, clients, seconds, kind=kind)
    if set(run.statuses) != {"200"}:
        raise SystemExit(f"the responses were not all 200: {format_statuses(run.statuses)}")
    return run


def encode_body(image: bytes, files: int) -> tuple[bytes, str]:
    """The body of a request with so many copies of an image, and its Content-Type."""
    if files == 1:
        return image, "image/jpeg"
    parts = [
        f"--{_BOUNDARY}\r\nContent-Disposition: form-data; name=file; filename={index}.jpg"
        "\r\n\r\n".encode()
        + image
        + b"\r\n"
        for index in range(files)
    ]
    body = b"".join(parts) + f"--{_BOUNDARY}--\r\n".encode()
    return body, f"multipart/form-data; boundary={_BOUNDARY}"


def read_cpu_ms(server: int) -> tuple[float, float]:
    """CPU milliseconds of the server with its child processes, and of its first thread.

    The first thread runs the event loop.

    Args:
        server: its process id.
    """
    listed = (task / "children" for task in Path(f"/proc/{server}/task").iterdir())
    processes = [server, *(int(pid) for each in listed for pid in each.read_text().split())]
    total = sum(_read_ticks(Path(f"/proc/{each}/stat")) for each in processes)
    return total * _TICK_MS, _read_ticks(Path(f"/proc/{server}/task/{server}/stat")) * _TICK_MS


def _read_ticks(stat: Path) -> int:
    """Clock ticks in user and in kernel mode (proc(5)); 0 if the process has ended."""
    try:
        fields = stat.read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0
    return int(fields[11]) + int(fields[12])


def keep_best(first: Row, second: Row) -> Row:
    """The least times and the most requests per second of two rounds."""
    pick = {"per_second": max}
    return {name: pick.get(name, min)(first[name], second[name]) for name in first}


def format_row(row: Row) -> str:
    return "{side:>6g}{files:>6g}{cpu_ms:>10.2f}{loop_ms:>10.2f}{per_second:>12.1f}".format(**row)


def format_table(rows: list[Row]) -> str:
    head = f"{'side':>6}{'files':>6}{'cpu_ms':>10}{'loop_ms':>10}{'per_second':>12}"
    return "\n".join([f"\nthe best of all rounds\n{head}", *map(format_row, rows)])


if __name__ == "__main__":
    main()
