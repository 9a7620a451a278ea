"""Every alert is provoked in a real service that a real Prometheus scrapes.

The rules are those of deploy/observability at sixty times their pace. Faults of the engine are
injected by `tools.prove.faulty`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml

from tests.conftest import ROOT, Server, encode, nuclei, serving
from tests.scale.ports import free_port
from tests.scale.prometheus import FOLDER, Prometheus, find_program, scraping

IMAGE = encode(nuclei(60, 60)[0])
POISON = encode(np.full((60, 60), 255, np.uint8))
FAULTY = ("-m", "tools.prove.faulty")
RULES = yaml.safe_load((FOLDER / "alerts.yml").read_text())
ALERTS = {rule["alert"] for group in RULES["groups"] for rule in group["rules"] if "alert" in rule}


@contextlib.contextmanager
def faulty(
    fault: str, weights: Path, *flags: str, port: int, ready: bool = True
) -> Iterator[Server]:
    """Run a service with a fault on a given port."""
    options = ("--port", str(port), f"--weights-dir={weights}", *flags)
    with serving(*options, program=FAULTY, ready=ready, FAULT=fault) as server:
        yield server


@contextlib.contextmanager
def clients(port: int, count: int = 3, data: bytes = IMAGE, **headers: str) -> Iterator[None]:
    """Clients that post images all the time, whatever they are answered."""
    end = threading.Event()

    def send() -> None:
        with httpx.Client(timeout=10) as client:
            while not end.wait(0.005):
                with contextlib.suppress(httpx.TransportError):
                    url = f"http://127.0.0.1:{port}/segment"
                    client.post(url, content=data, headers={"Content-Type": "image/png"} | headers)

    with ThreadPoolExecutor(count) as pool:
        jobs = [pool.submit(send) for _ in range(count)]
        try:
            yield
        finally:
            end.set()
    for job in jobs:
        job.result()


def expect(prometheus: Prometheus, alert: str, *others: str) -> None:
    """Wait until an alert fires, alone or with others that the same cause may raise."""
    prometheus.wait_for(lambda: alert in prometheus.firing())
    assert prometheus.firing() - {alert, *others} == set()


def wait_scraped(prometheus: Prometheus) -> None:
    """Wait until a ready service is scraped, and the alert on its absence before that has ended.

    Prometheus begins to scrape up to five seconds after its start. At the pace of these rules that
    is the time after which UnetAbsent fires.
    """
    prometheus.wait_for(
        lambda: prometheus.query("unet_ready == 1") and "UnetAbsent" not in prometheus.firing()
    )


def test_no_alert_fires_for_a_healthy_service_under_load(tiny: Path, tmp_path: Path) -> None:
    port = free_port()
    # Batches of a constant tenth of a second: other programs on this machine do not slow them.
    with faulty("slow", tiny, port=port), scraping(tmp_path, port) as prometheus, clients(port):
        wait_scraped(prometheus)
        end = time.monotonic() + 25  # 25 minutes at the pace of the rules
        seen: set[str] = set()
        while time.monotonic() < end:
            seen |= prometheus.firing()
            time.sleep(0.5)
        assert seen == set()
        assert prometheus.query("unet:window_seconds:mean5m")


def test_service_without_replicas_is_absent(tmp_path: Path) -> None:
    with scraping(tmp_path) as prometheus:
        expect(prometheus, "UnetAbsent")


def test_service_that_is_gone_is_down(tiny: Path, tmp_path: Path) -> None:
    port = free_port()
    with scraping(tmp_path, port) as prometheus:
        with serving("--port", str(port), f"--weights-dir={tiny}"):
            wait_scraped(prometheus)
        expect(prometheus, "UnetDown")


def test_service_that_never_finishes_loading_is_not_ready(tiny: Path, tmp_path: Path) -> None:
    port = free_port()
    with (
        faulty("load", tiny, port=port, ready=False),
        scraping(tmp_path, port) as prometheus,
    ):
        expect(prometheus, "UnetNotReady")


@pytest.mark.parametrize("fault", ["hang", "lost"])
def test_engine_that_hangs_or_is_lost_has_failed(fault: str, tiny: Path, tmp_path: Path) -> None:
    port = free_port()
    flags = ("--watchdog-s=2", "--request-timeout-s=3")
    with faulty(fault, tiny, *flags, port=port), scraping(tmp_path, port) as prometheus:
        wait_scraped(prometheus)
        with clients(port, 1, POISON):
            expect(prometheus, "UnetDeviceFailed", "UnetNotReady", "UnetBatchFailures")


def test_crash_loop_is_counted_as_restarts(tiny: Path, tmp_path: Path) -> None:
    port = free_port()
    with scraping(tmp_path, port) as prometheus:
        for _ in range(4):
            with faulty("crash", tiny, port=port) as server:
                prometheus.wait_for(lambda: prometheus.query('up{job="unet"} == 1'))
                with contextlib.suppress(httpx.TransportError):
                    httpx.post(f"{server.url}/segment", content=POISON, timeout=60)
                assert server.process.wait(30) == -signal.SIGSEGV
            prometheus.wait_for(lambda: prometheus.query('up{job="unet"} == 0'))
        expect(prometheus, "UnetRestarts", "UnetDown")


def test_engine_that_fails_images_is_an_internal_error(tiny: Path, tmp_path: Path) -> None:
    port = free_port()
    with faulty("error", tiny, port=port), scraping(tmp_path, port) as prometheus:
        wait_scraped(prometheus)
        with clients(port, 1, POISON), clients(port, 1):
            expect(prometheus, "UnetBatchFailures", "UnetInternalErrors")
            expect(prometheus, "UnetInternalErrors", "UnetBatchFailures")


def test_error_of_a_new_kind_is_a_batch_failure(tiny: Path, tmp_path: Path) -> None:
    port = free_port()
    with faulty("bug", tiny, port=port) as server, scraping(tmp_path, port) as prometheus:
        wait_scraped(prometheus)
        assert httpx.post(f"{server.url}/segment", content=POISON).status_code == 500
        prometheus.wait_for(lambda: "UnetBatchFailures" in prometheus.firing())
        (alert,) = prometheus.query('ALERTS{alertname="UnetBatchFailures", alertstate="firing"}')
        assert alert["metric"]["error"] == "KeyError"


def test_device_out_of_memory(tiny: Path, tmp_path: Path) -> None:
    port = free_port()
    flags = ("--max-batch=8", "--max-wait-ms=100")
    with faulty("memory", tiny, *flags, port=port), scraping(tmp_path, port) as prometheus:
        wait_scraped(prometheus)
        with clients(port, 12):
            expect(prometheus, "UnetOutOfMemory")


def test_more_clients_than_the_queue_holds(tiny: Path, tmp_path: Path) -> None:
    port = free_port()
    flags = ("--queue-windows=4",)
    with faulty("slow", tiny, *flags, port=port), scraping(tmp_path, port) as prometheus:
        wait_scraped(prometheus)
        with clients(port, 12):
            expect(prometheus, "UnetQueueFull")


def test_deadlines_that_the_device_cannot_meet(tiny: Path, tmp_path: Path) -> None:
    port = free_port()
    with faulty("slow", tiny, port=port), scraping(tmp_path, port) as prometheus:
        wait_scraped(prometheus)
        with clients(port, 2, **{"X-Request-Timeout": "0.05"}), clients(port, 1):
            expect(prometheus, "UnetDeadlinesMissed")


def test_device_that_becomes_slow(tiny: Path, tmp_path: Path) -> None:
    port = free_port()
    with scraping(tmp_path, port) as prometheus, clients(port):
        with serving("--port", str(port), f"--weights-dir={tiny}"):
            wait_scraped(prometheus)
            time.sleep(30)
        with faulty("slow", tiny, port=port):
            expect(prometheus, "UnetDeviceSlow", "UnetDown")


def test_checkpoint_that_is_rejected(tiny: Path, tmp_path: Path) -> None:
    port, weights = free_port(), tmp_path / "weights"
    shutil.copytree(tiny, weights)
    with (
        serving("--port", str(port), f"--weights-dir={weights}", "--reload=on"),
        scraping(tmp_path / "prometheus", port) as prometheus,
    ):
        wait_scraped(prometheus)
        path = weights / "nuclei.safetensors"
        changed = bytearray(path.read_bytes())
        changed[-1] ^= 1
        path.write_bytes(changed)
        expect(prometheus, "UnetReloadRejected")
        answer = httpx.post(f"http://127.0.0.1:{port}/segment", content=IMAGE, timeout=60)
        assert answer.status_code == 200  # by the previous one


def test_image_workers_that_keep_dying(tiny: Path, tmp_path: Path) -> None:
    port = free_port()
    flags = ("--port", str(port), f"--weights-dir={tiny}", "--image-workers=8")
    with serving(*flags) as server, scraping(tmp_path, port) as prometheus:
        wait_scraped(prometheus)
        prometheus.wait_for(lambda: server.metric("unet_image_workers") == 8)
        time.sleep(11)  # one that ends within ten seconds of its start counts as a failed start
        for pid in children(server.process.pid):
            os.kill(pid, signal.SIGKILL)
        expect(prometheus, "UnetImageWorkersKilled")


def children(pid: int) -> set[int]:
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found |= {int(child) for child in (task / "children").read_text().split()}
    return found


def test_log_that_is_not_read(tiny: Path, tmp_path: Path) -> None:
    port = free_port()
    reader, writer = os.pipe()  # nothing reads it
    process = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "serve", f"--port={port}", f"--weights-dir={tiny}"],
        cwd=ROOT,
        env={**os.environ, "UNET_LOG_FORMAT": "json"},
        stderr=writer,
    )
    os.close(writer)
    path = "%01" * 190  # each is six characters in the log
    try:
        with scraping(tmp_path, port) as prometheus, httpx.Client(timeout=30) as client:
            wait_scraped(prometheus)

            def fill_log() -> bool:
                for _ in range(200):
                    client.get(f"http://127.0.0.1:{port}/{path}")
                return "UnetLogDropped" in prometheus.firing()

            prometheus.wait_for(fill_log)
            expect(prometheus, "UnetLogDropped")
    finally:
        process.kill()
        process.wait()
        os.close(reader)


def test_rules_hold_for_written_series() -> None:
    test = ROOT / "tests/scale/alerts_test.yml"
    run([find_program("promtool"), "test", "rules", str(test)])


def test_rules_and_configuration_are_valid() -> None:
    run([find_program("promtool"), "check", "config", str(FOLDER / "prometheus.yml")])


def test_metrics_follow_the_conventions_of_prometheus(server: Server) -> None:
    image = httpx.post(f"{server.url}/segment", content=IMAGE, timeout=60)
    assert image.status_code == 200
    text = httpx.get(f"{server.url}/metrics").text
    run([find_program("promtool"), "check", "metrics"], text)


def run(command: list[str], text: str = "") -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", done.stderr  # promtool reports names that break a convention there


def test_every_alert_is_provoked_above() -> None:
    provoked = re.findall(r'\bexpect\(prometheus, "(\w+)"', Path(__file__).read_text())
    assert set(provoked) == ALERTS
