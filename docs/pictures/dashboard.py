"""Draw dashboard.png, the panels of the dashboard: python -m docs.pictures.dashboard

Runs two services with a small model and a Prometheus for 92 seconds. One service has memory for
two windows per batch and twelve slots in its queue, and rejects requests for some seconds. Needs
Prometheus (Debian: `apt install prometheus`).
"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from PIL import Image

from tests.conftest import serving, write_tiny
from tests.scale.picture import draw_dashboard
from tests.scale.ports import free_port
from tests.scale.prometheus import scraping
from tests.scale.test_alerts import clients, faulty
from tests.scale.test_dashboard import DASHBOARD, fill_in

HERE = Path(__file__).parent
SMALL = ("--max-batch=8", "--max-wait-ms=100", "--queue-windows=12")
LOADS = ((20, 2, 0), (25, 2, 6), (12, 2, 24), (20, 2, 6), (15, 2, 0))
"""Seconds, and the clients of the first and of the second service."""


def main() -> None:
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        weights = folder / "weights"
        weights.mkdir()
        write_tiny(weights / "nuclei.safetensors")
        ports = free_port(), free_port()
        stack.enter_context(serving("--port", str(ports[0]), f"--weights-dir={weights}"))
        stack.enter_context(faulty("memory", weights, *SMALL, port=ports[1]))
        prometheus = stack.enter_context(scraping(folder / "prometheus", *ports))
        start = time.monotonic()
        for duration, *counts in LOADS:
            with ExitStack() as load:
                for port, count in zip(ports, counts, strict=True):
                    if count:
                        load.enter_context(clients(port, count))
                time.sleep(duration)
        seconds = time.monotonic() - start
        drawn = folder / "dashboard.png"
        draw_dashboard(DASHBOARD, prometheus.url, fill_in, seconds, drawn)
        Image.open(drawn).quantize(64).save(HERE / "dashboard.png", optimize=True)


if __name__ == "__main__":
    main()
