"""A Ray cluster of two nodes on this machine. Its programs run as users start them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT
from tests.scale.ports import free_port

BIN = Path(sys.executable).parent
OBJECT_STORE = f"http://127.0.0.1:{free_port()}"
"""Address of the object store that a test may start. Nodes know it from their start."""
_STORE_BYTES = 100_000_000
"""Size of a node's object store, which lies in memory; Ray takes no less than 75 MB."""
_STARTS = 8
"""Attempts to start a node. Ray ends each after 30 seconds."""
_START_SECONDS = 180
"""Time for an attempt, with what Ray does before and after these 30 seconds."""


@dataclasses.dataclass
class Cluster:
    """Two nodes with a CPU each.

    Attributes:
        address: for `ray.init`.
        dashboard: URL of the dashboard, which also deploys.
        folder: for the files of Ray.
        nodes: processes that run the nodes.
    """

    address: str
    dashboard: str
    folder: Path
    nodes: list[subprocess.Popen[bytes]]

    def actors(self, class_name: str) -> list[dict[str, Any]]:
        """The actors that are alive, of classes whose names contain this."""
        url = f"{self.dashboard}/api/v0/actors"
        answer = httpx.get(url, params={"detail": "1", "limit": "1000"}, timeout=30).json()
        return [
            actor
            for actor in answer["data"]["result"]["result"]
            if class_name in actor["class_name"] and actor["state"] == "ALIVE"
        ]

    def run(self, *words: str, seconds: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, and check that it succeeded."""
        done = subprocess.run(
            [str(BIN / words[0]), *words[1:]], cwd=ROOT, env=environment(), timeout=seconds,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done


def environment() -> dict[str, str]:
    """The environment of every node and program, with the object store and its keys."""
    return {
        **os.environ,
        "AWS_ENDPOINT_URL": OBJECT_STORE,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deploy.ray.proxy:make_middlewares",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",  # on a busy machine; 5 seconds by default
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # when the tests end
        "RAY_enable_metrics_collection": "0",
        "RAY_enable_worker_prestart": "0",
    }


def wait_until(
    check: Callable[[], object], seconds: float, what: str, *, every: float = 0.3
) -> None:
    """Wait until a check returns something true; errors of the network count as false.

    Args:
        seconds: after which the test fails.
        every: seconds between two checks.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(httpx.TransportError, KeyError, json.JSONDecodeError):
            if check():
                return
        time.sleep(every)
    raise AssertionError(f"{what}: not within {seconds:g} s")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes of one CPU, for all tests of the session."""
    folder = Path(tempfile.mkdtemp(prefix="unet-ray-", dir="/tmp"))  # sockets need a short path
    port, dashboard = free_port(), free_port()
    address = f"127.0.0.1:{port}"
    running = Cluster(address, f"http://127.0.0.1:{dashboard}", folder, [])
    try:
        add_node(
            running, "--head", f"--port={port}", f"--dashboard-port={dashboard}",
            f"--temp-dir={folder}",
        )  # fmt: skip
        add_node(running, f"--address={address}")
        yield running
    finally:
        for node in reversed(running.nodes):
            stop_node(node)
        shutil.rmtree(folder, ignore_errors=True)


def add_node(running: Cluster, *flags: str) -> None:
    """Start a node, and wait until it has joined the cluster.

    Ray's 30 seconds may not be enough while other programs use the machine. A node that may choose
    the ports of its agents itself crashes if they are slow to report them.
    """
    number = len(running.nodes) + 1
    agents = ("dashboard-agent-grpc-port", "dashboard-agent-listen-port", "runtime-env-agent-port")
    for _ in range(_STARTS):
        ports = [f"--{name}={free_port()}" for name in (*agents, "metrics-export-port")]
        log = Path(running.folder, f"node{number}.log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [BIN / "ray", "start", "--block", "--num-cpus=1", "--disable-usage-stats",
                 f"--object-store-memory={_STORE_BYTES}", *ports, *flags],
                cwd=ROOT, env=environment(), stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        running.nodes.append(process)
        wait_until(
            lambda: process.poll() is not None or count_nodes(running) == number,  # noqa: B023
            _START_SECONDS,
            f"node {number}",
        )
        if process.poll() is None:
            return
        running.nodes.remove(process)
        stop_node(process)  # what is left of it
    raise AssertionError(f"node {number} does not start:\n{log.read_text()}")


def stop_node(node: subprocess.Popen[bytes]) -> None:
    """Stop a node and its processes: Ray does it at SIGTERM; the group is killed if it does not."""
    node.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        node.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)
    node.wait(10)


def count_nodes(running: Cluster) -> int:
    answer = httpx.get(f"{running.dashboard}/api/v0/nodes", timeout=10).json()
    return sum(node["state"] == "ALIVE" for node in answer["data"]["result"]["result"])
