"""Clients that are slow or never finish: limits on the bytes and the time that they occupy."""

from __future__ import annotations

import contextlib
import io
import json
import re
import socket
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.conftest import Server, encode, nuclei, serving
from tests.service.test_bad_input import assert_problem

IMAGE = encode(nuclei(60, 60)[0])
PNG = {"Content-Type": "image/png"}
SHORT_IDLE_TIMEOUT = """
import functools, sys
from app.api.protocol import Connection
from app.cli import main, serve
serve.Connection = functools.partial(Connection, idle_timeout={})
sys.exit(main())
"""


@contextlib.contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.settimeout(30)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # little is on its way
        connection.connect((host, int(port)))
        yield connection


def head(length: int, *more: str) -> bytes:
    lines = ["POST /segment HTTP/1.1", "Host: x", "Content-Type: image/png", *more]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def read_all(connection: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def wait_for(server: Server, name: str, value: float) -> None:
    until = time.monotonic() + 15
    while server.metric(name) != value:
        assert time.monotonic() < until, f"{name} is {server.metric(name)}, not {value}"
        time.sleep(0.02)


def test_upload_that_never_ends_gets_504(tiny: Path) -> None:
    with serving(UNET_WEIGHTS_DIR=str(tiny)) as server, connected(server) as connection:
        connection.sendall(head(1000, "X-Request-Timeout: 0.5") + IMAGE[:10])
        wait_for(server, "unet_held_bytes", 10)
        answer = read_all(connection)  # the server closes it: the rest may never be sent
        assert answer.startswith(b"HTTP/1.1 504")
        assert b"connection: close" in answer.lower()
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["status"] == 504
        wait_for(server, "unet_held_bytes", 0)


def test_uploads_of_all_requests_are_bounded(tiny: Path) -> None:
    with (
        serving(UNET_WEIGHTS_DIR=str(tiny), UNET_QUEUE_MB="1", UNET_MAX_UPLOAD_MB="1") as server,
        connected(server) as holder,
    ):
        holder.sendall(head(990_000) + b"\0" * 900_000)
        wait_for(server, "unet_held_bytes", 900_000)
        rejected = httpx.post(f"{server.url}/segment", content=b"\0" * 500_000, headers=PNG)
        assert_problem(rejected, 429)
        assert int(rejected.headers["retry-after"]) >= 1
        assert server.metric("unet_rejected_total", reason="memory") == 1
        assert httpx.post(f"{server.url}/segment", content=IMAGE, headers=PNG).status_code == 200
        holder.close()
        wait_for(server, "unet_held_bytes", 0)
        assert_problem(
            httpx.post(f"{server.url}/segment", content=b"\0" * 500_000, headers=PNG), 422
        )


def test_output_that_does_not_fit_is_rejected_and_the_others_are_kept(tiny: Path) -> None:
    """16-bit probabilities of noise take more than the 0.7 MB of the noise itself."""
    noise = np.random.default_rng(0).integers(0, 256, (840, 840), np.uint8)
    limits = {"UNET_QUEUE_MB": "1", "UNET_MAX_UPLOAD_MB": "1", "UNET_QUEUE_WINDOWS": "1000"}
    with serving(UNET_WEIGHTS_DIR=str(tiny), **limits) as server:
        url = f"{server.url}/segment?output=probability"
        alone = httpx.post(url, content=IMAGE, headers=PNG).content
        named = {"before": IMAGE, "large": encode(noise), "after": IMAGE}
        files = [("file", (f"{name}.png", image)) for name, image in named.items()]
        answer = httpx.post(url, files=files, timeout=60)
        assert answer.status_code == 200, answer.text
        archive = zipfile.ZipFile(io.BytesIO(answer.content))
        errors = json.loads(archive.read("errors.json"))
        assert list(errors) == ["large"]
        assert errors["large"]["status"] == 429
        assert [archive.read(f"{name}.png") for name in ("before", "after")] == [alone] * 2
        assert server.metric("unet_rejected_total", reason="memory") == 1
        wait_for(server, "unet_held_bytes", 0)


def test_memory_for_the_zip_is_counted_with_each_output(tiny: Path) -> None:
    noise = encode(np.random.default_rng(0).integers(0, 256, (200, 200), np.uint8))
    limits = {"UNET_QUEUE_MB": "1", "UNET_MAX_UPLOAD_MB": "1", "UNET_QUEUE_WINDOWS": "1000"}
    with serving(UNET_WEIGHTS_DIR=str(tiny), **limits) as server:
        url = f"{server.url}/segment?output=probability"
        alone = httpx.post(url, content=noise, headers=PNG).content
        count = int(1e6 / (len(noise) + 1.5 * len(alone)))
        files = [("file", (f"{n}.png", noise)) for n in range(count)]
        left = 1_000_000 - len(httpx.Request("POST", url, files=files).read())
        assert count * len(alone) < left < 2 * count * len(alone)
        kept = left // (2 * len(alone))

        answer = httpx.post(url, files=files, timeout=60)
        assert answer.status_code == 200, answer.text
        archive = zipfile.ZipFile(io.BytesIO(answer.content))
        errors = json.loads(archive.read("errors.json"))
        assert len(errors) == count - kept  # the last to be done, which need not be the last sent
        assert {each["status"] for each in errors.values()} == {429}
        served = {str(n) for n in range(count)} - set(errors)
        assert {archive.read(f"{name}.png") for name in served} == {alone}

        answer = httpx.post(url, files=files, headers={"Accept": "application/json"}, timeout=60)
        kept = left // (4 * len(alone))  # base64, and the document that is joined from it
        assert 0 < kept < count
        assert sum("error" in each for each in answer.json()["images"]) == count - kept
        wait_for(server, "unet_held_bytes", 0)


def test_client_that_does_not_read_its_response_is_dropped(tiny: Path) -> None:
    """Until then the response counts as used memory."""
    image = encode(np.random.default_rng(0).integers(0, 256, (2300, 2300), np.uint8))
    program = ("-c", SHORT_IDLE_TIMEOUT.format(1.0))
    with (
        serving(
            program=program,
            UNET_WEIGHTS_DIR=str(tiny),
            UNET_QUEUE_WINDOWS="1000",
            UNET_REQUEST_TIMEOUT_S="200",
        ) as server,
        connected(server) as client,
    ):
        request = head(len(image)).replace(b"/segment", b"/segment?output=cutout")
        client.sendall(request + image)
        until = time.monotonic() + 200
        while server.metric("unet_images_total", model="nuclei") == 0:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert server.metric("unet_held_bytes") > len(image)
        wait_for(server, "unet_held_bytes", 0)
        answer = read_all(client)  # what was sent already
        declared = re.search(rb"content-length: (\d+)", answer)
        assert declared is not None
        assert len(answer) < int(declared[1])


@pytest.mark.parametrize("sent", [b"", b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Slow"])
def test_connection_without_a_complete_request_is_dropped(tiny: Path, sent: bytes) -> None:
    program = ("-c", SHORT_IDLE_TIMEOUT.format(0.5))
    with (
        serving(program=program, UNET_WEIGHTS_DIR=str(tiny)) as server,
        connected(server) as connection,
    ):
        connection.sendall(sent)
        started = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""
        assert time.monotonic() - started < 5
        assert httpx.get(f"{server.url}/livez").status_code == 200


def test_client_that_sends_too_much_can_read_413_before_it_is_disconnected(tiny: Path) -> None:
    """It cannot send forever, and what it sends does not stay in memory."""
    with serving(UNET_WEIGHTS_DIR=str(tiny)) as server, connected(server) as endless:
        before = server.metric("process_resident_memory_bytes")
        endless.sendall(
            b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"100000\r\n" + b"\0" * 0x100000 + b"\r\n"
        with pytest.raises(ConnectionError):  # noqa: PT012, some later chunk fails
            for _ in range(1000):
                endless.sendall(chunk)
        assert server.metric("unet_requests_total", route="/segment", status="413") == 1
        assert server.metric("process_resident_memory_bytes") - before < 150e6


def test_drain_waits_for_all_images_of_a_request(tiny: Path) -> None:
    with serving(UNET_WEIGHTS_DIR=str(tiny)) as server, ThreadPoolExecutor(1) as client:
        files = [("file", (f"{n}.png", IMAGE)) for n in range(200)]
        request = client.submit(httpx.post, f"{server.url}/segment", files=files, timeout=30)
        until = time.monotonic() + 10
        while server.metric("unet_images_total", model="nuclei") < 3:
            assert time.monotonic() < until
        server.process.terminate()
        archive = zipfile.ZipFile(io.BytesIO(request.result().content))
        assert len(archive.namelist()) == 200
        assert "errors.json" not in archive.namelist()
        assert server.process.wait(10) is not None


def test_malformed_http_gets_a_problem_document(server: Server) -> None:
    with connected(server) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\r\n\r\n")
        first, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert b"400 Bad Request" in first
    assert b"application/problem+json" in first
    assert set(json.loads(body)) == {"type", "title", "status", "detail", "request_id"}


CHUNKED = b"POST /segment HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"


@pytest.mark.parametrize(
    ("sent", "route"),
    [
        (b"\x16\x03\x01\x02\x00\r\n\r\n", "unmatched"),
        (b"GET /livez HTTP/1.1\r\n\r\n", "unmatched"),
        (head(1).replace(b"\r\n\r\n", b"\r\nContent-Length: 2\r\n\r\n"), "unmatched"),
        (CHUNKED + b"X-Request-ID: mine\r\n\r\nno chunk\r\n", "/segment"),
        (CHUNKED.replace(b"/segment", b"/nowhere") + b"\r\nno chunk\r\n", "unmatched"),
        (CHUNKED.replace(b"POST /segment", b"HEAD /livez") + b"\r\nno chunk\r\n", "/livez"),
    ],
)
def test_malformed_http_has_an_id_a_count_and_a_log_line(
    sent: bytes, route: str, tiny: Path
) -> None:
    quiet = {"UNET_WEIGHTS_DIR": str(tiny), "UNET_LOG_FORMAT": "json", "UNET_LOG_LEVEL": "debug"}
    with serving(**quiet) as server, connected(server) as connection:
        connection.sendall(sent)
        first, _, body = read_all(connection).partition(b"\r\n\r\n")
        assert first.startswith(b"HTTP/1.1 400 ")
        given = re.search(rb"\r\nx-request-id: (\S+)", first, re.IGNORECASE)
        assert given is not None
        identifier = given[1].decode()
        if not sent.startswith(b"HEAD"):
            assert json.loads(body)["request_id"] == identifier
        assert (b"X-Request-ID: mine" in sent) == (identifier == "mine")
        assert server.metric("unet_requests_total", route=route, status="400") == 1
        assert server.metric("unet_requests_total", status="499") == 0
        lines = [json.loads(line) for line in server.lines if identifier in line]
    (line,) = lines
    assert line["status"] == 400
    assert line["request_id"] == identifier
    assert line["path"] == ("-" if b"chunked" not in sent else sent.split()[1].decode())
    assert not any("exception" in json.loads(line) for line in server.lines)
    warnings = [line for line in server.lines if json.loads(line)["level"] == "warning"]
    assert warnings == []  # an invalid request is one line of the log


def test_absolute_target_is_accepted(server: Server) -> None:
    """RFC 9112, section 3.2.2: proxies are sent this form, and servers must accept it."""
    for target, status in ((b"http://x:1/livez", 200), (b"http://x/segment?wrong=1", 422)):
        with connected(server) as connection:
            request = head(len(IMAGE), "Connection: close").replace(b"/segment", target) + IMAGE
            if status == 200:
                request = b"GET " + target + b" HTTP/1.1\r\nHost: y\r\nConnection: close\r\n\r\n"
            connection.sendall(request)
            assert read_all(connection).startswith(b"HTTP/1.1 %d " % status)


def test_pipelined_requests_are_answered_in_order_after_an_error(server: Server) -> None:
    wrong = head(len(IMAGE)).replace(b"/segment", b"/segment?wrong=1") + IMAGE
    with connected(server) as connection:
        connection.sendall(wrong + head(len(IMAGE), "Connection: close") + IMAGE)
        answers = read_all(connection)
    assert [part[:3] for part in answers.split(b"HTTP/1.1 ")[1:]] == [b"422", b"200"]
