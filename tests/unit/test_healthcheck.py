"""deploy/healthcheck.py: which server it asks, and the exit status for each answer."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "deploy/healthcheck.py"

SERVER = """
import http.server, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(int(sys.argv[1]) if self.path == "/readyz" else 404)
        self.end_headers()
        self.wfile.write(b"the answer")

    def log_message(self, *arguments):
        pass

port = int(sys.argv[sys.argv.index("--port") + 1]) if "--port" in sys.argv else int(sys.argv[2])
server = http.server.HTTPServer(("127.0.0.1", port), Handler)
print("listening", flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def healthcheck() -> ModuleType:
    spec = importlib.util.spec_from_file_location("healthcheck", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        return int(unused.getsockname()[1])


@pytest.fixture
def start() -> Iterator[Callable[..., int]]:
    """Starts a server that answers `/readyz` with a status; returns its process id."""
    processes: list[subprocess.Popen[str]] = []

    def run(status: int, *arguments: str) -> int:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(status), *arguments],
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        return process.pid

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def check(pid: int, **environment: str) -> tuple[int, str]:
    run = subprocess.run(
        [sys.executable, "-I", SCRIPT, str(pid)],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
    )
    assert run.stderr == ""
    return run.returncode, run.stdout


@pytest.mark.parametrize(
    ("command", "environment", "host", "port"),
    [
        ("unet serve", {}, "127.0.0.1", 8000),
        ("unet serve", {"UNET_HOST": "0.0.0.0", "UNET_PORT": "9001"}, "127.0.0.1", 9001),
        ("unet serve --port 9000", {"UNET_PORT": "9001"}, "127.0.0.1", 9000),
        ("unet serve --port=9000 --host=::", {"UNET_HOST": "0.0.0.0"}, "::1", 9000),
        ("unet serve --port 1 --port 2", {}, "127.0.0.1", 2),
        ("/sbin/docker-init -- unet serve --port 9000", {}, "127.0.0.1", 9000),
        ("unet serve --host 10.0.0.5", {}, "10.0.0.5", 8000),
    ],
)
def test_address_is_that_of_the_running_server(
    healthcheck: ModuleType, command: str, environment: dict[str, str], host: str, port: int
) -> None:
    assert healthcheck.server_address(command.split(), environment) == (host, port)


def test_address_is_found_in_the_command_of_a_shell(healthcheck: ModuleType) -> None:
    command = ["sh", "-c", "unet serve --port 9000"]
    assert healthcheck.server_address(command, {}) == ("127.0.0.1", 9000)


def test_ready_server_is_healthy_whatever_the_proxy_variables_say(
    start: Callable[..., int], free_port: int
) -> None:
    pid = start(200, "serve", "--port", str(free_port))
    proxy = "http://127.0.0.1:9"  # nothing listens on this port
    proxies = {"HTTP_PROXY": proxy, "http_proxy": proxy, "ALL_PROXY": proxy, "UNET_PORT": "9"}
    assert check(pid, **proxies) == (0, "200 the answer\n")


def test_port_of_the_environment_is_used_without_the_flag(
    start: Callable[..., int], free_port: int
) -> None:
    pid = start(200, str(free_port))
    assert check(pid, UNET_PORT=str(free_port))[0] == 0


def test_server_that_is_not_ready_is_unhealthy(start: Callable[..., int], free_port: int) -> None:
    pid = start(503, "serve", "--port", str(free_port))
    assert check(pid) == (1, "503 the answer\n")


def test_server_that_does_not_listen_is_unhealthy(free_port: int) -> None:
    status, output = check(os.getpid(), UNET_PORT=str(free_port))
    assert status == 1
    assert output.startswith(f"GET http://127.0.0.1:{free_port}/readyz: ")
