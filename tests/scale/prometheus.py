"""A real Prometheus on this machine, with the rules of deploy/observability at a faster pace.

Debian's package `prometheus` has the server and promtool.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.conftest import ROOT
from tests.scale.ports import free_port

FOLDER = ROOT / "deploy/observability"
PACE = 60
"""Times that a duration of the rules is shorter in these tests."""
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION = re.compile(r"(\[|offset |for: )(\d+)([smhd])\b")
_INTERVAL = "1s"
"""Between two scrapes, and the time for one: a busy machine takes a while to answer."""
_EVALUATION_INTERVAL = "250ms"


@dataclasses.dataclass
class Prometheus:
    """A running Prometheus."""

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an instant query.

        Raises:
            AssertionError: Prometheus rejects the expression.
        """
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=30)
        assert answer.status_code == 200, f"{expression}: {answer.text}"
        result: list[dict[str, Any]] = answer.json()["data"]["result"]
        return result

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        return {
            sample["metric"]["alertname"] for sample in self.query('ALERTS{alertstate="firing"}')
        }

    def wait_for(self, condition: Callable[[], object], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not condition():
            alerts = [
                (s["metric"]["alertname"], s["metric"]["alertstate"]) for s in self.query("ALERTS")
            ]
            assert time.monotonic() < end, f"alerts: {alerts}"
            time.sleep(0.2)


def find_program(name: str) -> str:
    path = shutil.which(name)
    assert path, f"{name} is missing: apt-get install --no-install-recommends prometheus"
    return path


def quicken(rules: str) -> str:
    """Divide the durations of rules by `PACE`."""

    def shorten(match: re.Match[str]) -> str:
        seconds = int(match[2]) * _SECONDS[match[3]]
        return f"{match[1]}{seconds * 1000 // PACE}ms"

    return _DURATION.sub(shorten, rules)


@contextlib.contextmanager
def scraping(folder: Path, *ports: int) -> Iterator[Prometheus]:
    """Run Prometheus with our configuration, for services on these ports.

    Args:
        folder: for its data.
    """
    folder.mkdir(exist_ok=True)
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {
        "scrape_interval": _INTERVAL,
        "scrape_timeout": _INTERVAL,
        "evaluation_interval": _EVALUATION_INTERVAL,
    }
    (job,) = config["scrape_configs"]
    (targets,) = job["static_configs"]
    targets["targets"] = [f"127.0.0.1:{port}" for port in ports]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "alerts.yml").write_text(quicken((FOLDER / "alerts.yml").read_text()))
    port = free_port()
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                find_program("prometheus"),
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=output,
            stderr=output,
        )
    running = Prometheus(f"http://127.0.0.1:{port}")
    try:
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{running.url}/-/ready").status_code == 200:
                    break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield running
    finally:
        process.terminate()
        process.wait(20)
