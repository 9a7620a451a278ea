"""Compare one request with many images to as many requests: `python -m benchmarks.many_files`.

Both run in turn against the same service, with the engine of this machine: 64 small JPEGs in one
form by one client, and 64 requests with one JPEG each by several clients at once. The ratio of
their images per second is reported per round, and its median.

Prints a table, and JSON with --json.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import threading
import time
from pathlib import Path

from app.cli.bench.load import KeepAliveClient
from app.cli.bench.serving import serving
from app.cli.bench.stages import draw_image, encode_jpeg
from benchmarks.overhead import encode_body

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, default=ROOT / "weights/nuclei.safetensors")
    parser.add_argument("--files", type=int, default=64, help="images per round (64)")
    parser.add_argument("--side", type=int, default=256, help="of the images, in pixels (256)")
    parser.add_argument("--clients", type=int, default=16, help="of the single requests (16)")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median counts (5)")
    parser.add_argument("--device", default="auto", help="UNET_DEVICE (auto)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args()
    image = encode_jpeg(draw_image(args.side, args.side))
    rounds = []
    with serving(args.weights, f"--device={args.device}") as service:
        send_singles(service.url, image, args.files, args.clients)  # fills caches
        for _ in range(args.rounds):
            singles = send_singles(service.url, image, args.files, args.clients)
            together = send_form(service.url, image, args.files)
            rounds.append({"singles": singles, "together": together, "ratio": together / singles})
            print(
                f"{args.files} requests: {singles:7.1f} images/s, one request: {together:7.1f} "
                f"images/s, ratio {together / singles:.3f}",
                flush=True,
            )
    ratio = statistics.median(each["ratio"] for each in rounds)
    print(f"median ratio {ratio:.3f}")
    if args.json:
        args.json.write_text(json.dumps({"rounds": rounds, "ratio": ratio}, indent=1) + "\n")


def send_form(url: str, image: bytes, files: int) -> float:
    """Send all images in one request, and return images per second.

    Raises:
        SystemExit: it failed.
    """
    body, kind = encode_body(image, files)
    client = KeepAliveClient(url, kind=kind)
    start = time.perf_counter()
    _check(client.post(body)[0])
    seconds = time.perf_counter() - start
    client.close()
    return files / seconds


def send_singles(url: str, image: bytes, files: int, clients: int) -> float:
    """Send each image in a request of its own, and return images per second.

    Args:
        clients: that send at the same time, over one connection each.

    Raises:
        SystemExit: a request failed.
    """
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    for _ in range(files):
        waiting.put(image)
    statuses: list[str] = []

    def run_client() -> None:
        client = KeepAliveClient(url)
        while True:
            try:
                sent = waiting.get_nowait()
            except queue.Empty:
                break
            statuses.append(client.post(sent)[0])
        client.close()

    threads = [threading.Thread(target=run_client, daemon=True) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    for status in statuses:
        _check(status)
    return files / seconds


def _check(status: str) -> None:
    if status != "200":
        raise SystemExit(f"a request failed: {status}")


if __name__ == "__main__":
    main()
