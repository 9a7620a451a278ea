"""An engine that fails: the error stays with its image, or the probes report the engine as lost."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.conftest import Server, encode, nuclei, serving
from tests.service.test_bad_input import assert_problem
from tests.service.test_lifecycle import wait_until

GOOD = encode(nuclei(60, 60)[0])
POISON = encode(np.full((60, 60), 255, np.uint8))
DRIVER = ("-m", "tools.prove.faulty")


def post(server: Server, data: bytes, **query: object) -> httpx.Response:
    return httpx.post(
        f"{server.url}/segment",
        content=data,
        params=query,  # type: ignore[arg-type]
        headers={"Content-Type": "image/png"},
        timeout=30,
    )


def faulty(
    fault: str, weights: Path, **environment: str
) -> contextlib.AbstractContextManager[Server]:
    """Start the service with an engine that has this fault."""
    return serving(program=DRIVER, FAULT=fault, UNET_WEIGHTS_DIR=str(weights), **environment)


@pytest.mark.parametrize(
    ("fault", "logged"),
    [
        ("error", "secret"),
        ("bug", "secret"),
        ("nan", "not finite"),
        ("short", "0 results for 1 windows"),
        ("host-memory", "secret"),
    ],
)
def test_only_the_image_at_fault_fails_in_a_shared_batch(
    fault: str, logged: str, tiny: Path
) -> None:
    with faulty(fault, tiny, UNET_MAX_BATCH="8", UNET_MAX_WAIT_MS="200") as server:
        alone = post(server, GOOD).content
        with ThreadPoolExecutor(8) as clients:
            bodies = [GOOD] * 5 + [POISON] + [GOOD] * 2
            answers = list(clients.map(lambda body: post(server, body), bodies))
        for body, answer in zip(bodies, answers, strict=True):
            if body is POISON:
                problem = assert_problem(answer, 500)
                assert "secret" not in problem["detail"]
            else:
                assert answer.status_code == 200
                assert answer.content == alone
        wait_until(lambda: any(logged in line for line in server.lines))
        assert httpx.get(f"{server.url}/livez").status_code == 200
        assert server.metric("unet_windows_reserved") == 0


def test_out_of_memory_fails_no_request(tiny: Path) -> None:
    with faulty("memory", tiny, UNET_MAX_BATCH="8", UNET_MAX_WAIT_MS="200") as server:
        with ThreadPoolExecutor(8) as clients:
            answers = list(clients.map(lambda _: post(server, GOOD), range(16)))
        assert {answer.status_code for answer in answers} == {200}
        assert server.metric("unet_batch_cap_windows", device="cpu") in (1, 2)
        assert server.metric("unet_batch_failures_total", error="OutOfMemory") >= 1


def test_lost_device_fails_the_probes_without_its_text(tiny: Path) -> None:
    with faulty("lost", tiny) as server:
        assert_problem(post(server, POISON), 503)
        for probe in ("/livez", "/readyz"):
            answer = httpx.get(server.url + probe)
            assert answer.status_code == 503
            assert answer.json()["cause"] == "the engine is lost; see the server log"
        rejected = post(server, GOOD)
        assert_problem(rejected, 503)
        assert int(rejected.headers["retry-after"]) >= 1
        assert "illegal memory access" not in rejected.text
    assert any("illegal memory access" in line for line in server.lines)


def test_hung_engine_fails_the_liveness_probe(tiny: Path) -> None:
    with faulty("hang", tiny, UNET_WATCHDOG_S="1", UNET_REQUEST_TIMEOUT_S="5") as server:
        hung = threading.Thread(target=post, args=(server, POISON))
        hung.start()
        started = time.monotonic()
        while httpx.get(f"{server.url}/livez").status_code == 200:
            assert time.monotonic() - started < 10
            time.sleep(0.05)
        assert "hung" in httpx.get(f"{server.url}/livez").json()["cause"]
        assert httpx.get(f"{server.url}/metrics").status_code == 200
        hung.join()
        assert server.stop(seconds=15) != 0


def test_requests_that_a_drain_has_no_time_for_get_503(tiny: Path) -> None:
    """Requests in the queue as well as an upload that never ends."""
    with faulty("hang", tiny, UNET_DRAIN_S="1") as server, ThreadPoolExecutor(5) as clients:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 20) as endless:
            endless.sendall(
                b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
                b"Content-Length: 1000\r\n\r\n\x89PNG"
            )
            requests = [clients.submit(post, server, POISON) for _ in range(5)]
            while server.metric("unet_windows_reserved") < 5:
                time.sleep(0.02)
            signalled = time.monotonic()
            server.process.terminate()
            for request in requests:
                answer = request.result()
                problem = assert_problem(answer, 503)
                assert "stopped" in problem["detail"]
                assert int(answer.headers["retry-after"]) >= 1
            head = b"".join(iter(lambda: endless.recv(65536), b"")).partition(b"\r\n\r\n")[0]
        assert head.startswith(b"HTTP/1.1 503")
        assert b"retry-after:" in head.lower()
        assert b"x-request-id:" in head.lower()
        assert server.process.wait(10) == -signal.SIGTERM
        assert time.monotonic() - signalled < 10
    logged = "\n".join(server.lines)
    assert "Traceback" not in logged
    assert len(re.findall(r"drain timeout \(1 s\): 5 requests aborted with 503", logged)) == 1
    assert len(re.findall("POST /segment 503", logged)) == 6


@pytest.mark.parametrize("fault", ["hang", "lost"])
def test_process_exits_on_engine_failure_if_set(fault: str, tiny: Path) -> None:
    settings = {"UNET_EXIT_ON_ENGINE_FAILURE": "on", "UNET_WATCHDOG_S": "1"}
    with faulty(fault, tiny, **settings) as server:
        with ThreadPoolExecutor(3) as clients:
            answers = list(clients.map(post, [server] * 3, [POISON] * 3))
        for answer in answers:
            assert_problem(answer, 503)
        assert server.process.wait(15) == 70
        assert any("exiting" in line for line in server.lines)


@pytest.mark.parametrize(
    ("sig", "statuses"), [(signal.SIGTERM, (-15, 143)), (signal.SIGINT, (130,))]
)
def test_signal_ends_the_process_although_nothing_stops(
    sig: signal.Signals, statuses: tuple[int, ...], tiny: Path
) -> None:
    """The engine hangs, and so does a thread of the event loop's executor."""
    with faulty("stuck", tiny, UNET_DRAIN_S="1") as server:
        client = threading.Thread(target=_post_quietly, args=(server,))
        client.start()
        while server.metric("unet_windows_in_flight") == 0:
            time.sleep(0.02)
        signalled = time.monotonic()
        assert server.stop(sig, seconds=15) in statuses
        assert time.monotonic() - signalled < 6.5  # drain, 3 s to stop, 1 s for the log
        client.join()


@pytest.mark.parametrize(("fault", "cause"), [("idle loss", "lost"), ("idle hang", "hung")])
def test_device_that_fails_while_idle_ends_the_process(fault: str, cause: str, tiny: Path) -> None:
    settings = {"UNET_EXIT_ON_ENGINE_FAILURE": "on", "UNET_WATCHDOG_S": "2"}
    with faulty(fault, tiny, **settings) as server:
        started = time.monotonic()
        assert server.process.wait(20) == 70
        assert time.monotonic() - started < 10
    (line,) = [line for line in server.lines if "exiting" in line]
    assert f"the engine is {cause}" in line
    assert not any("Traceback" in line for line in server.lines)


def test_device_without_room_for_the_model_is_one_line(tiny: Path) -> None:
    done = subprocess.run(
        [sys.executable, *DRIVER, "serve", "--port", "0"],
        env={**os.environ, "FAULT": "no room", "UNET_WEIGHTS_DIR": str(tiny)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("CUDA out of memory") == 1
    assert "the default model cannot be served: cuda:0: CUDA out of memory" in done.stderr
    assert "Traceback" not in done.stderr


def _post_quietly(server: Server) -> None:
    with contextlib.suppress(httpx.TransportError):
        post(server, POISON)
