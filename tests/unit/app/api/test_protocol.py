"""Connections: which are dropped or closed, and which requests are rejected."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import types
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from app.api.protocol import MAX_FIELDS, MAX_HEAD_BYTES, Connection
from app.metrics import Metrics

IDLE_TIMEOUT = 0.1
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"

Client = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def slow_app(scope: Any, receive: Any, send: Any) -> None:
    """Compute for longer than the idle timeout, then answer."""
    await asyncio.sleep(4 * IDLE_TIMEOUT)
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


async def echo_app(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the path, and the length of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message["body"]), message["more_body"]
    body = f"<{scope['path']} {size}>".encode()
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class App:
    """An application with the state that a rejected request is counted in."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.state = types.SimpleNamespace(service=types.SimpleNamespace(metrics=Metrics()))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


def run(client: Client, app: Any = slow_app) -> None:
    """Run a client against a server whose connections have a short idle timeout."""

    async def main() -> None:
        config = uvicorn.Config(
            App(app), log_config=None, timeout_keep_alive=60, interface="asgi3", lifespan="off"
        )
        state = ServerState()
        server = await asyncio.get_running_loop().create_server(
            lambda: Connection(config, state, {}, idle_timeout=IDLE_TIMEOUT), "127.0.0.1", 0
        )
        async with server, asyncio.timeout(60):
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            await client(reader, writer)
            writer.close()

    asyncio.run(main())


@pytest.mark.parametrize("sent", [b"", GET[:10]])
def test_connection_without_a_request_is_dropped(sent: bytes) -> None:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""

    run(client)


def test_computing_and_kept_alive_connections_are_not_dropped() -> None:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            writer.write(GET)
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200 ")
            await asyncio.sleep(4 * IDLE_TIMEOUT)  # the connection is idle between requests

    run(client)


def exchange(sent: bytes, *, half_close: bool = False, app: Any = echo_app) -> bytes:
    """Send bytes, and read until the server closes the connection."""
    received = b""

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        writer.write(sent)
        if half_close:
            writer.write_eof()
        received = await reader.read()

    run(client, app)
    return received


def post(length: int, *fields: str, path: str = "/") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {length}", *fields, "", ""]
    return "\r\n".join(lines).encode()


CLOSE = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
CHUNKED = b"POST /chunked HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_half_closed_client_gets_the_responses_to_its_requests() -> None:
    sent = post(3, path="/a") + b"abc" + post(100_000, path="/b") + bytes(100_000) + GET
    received = exchange(sent, half_close=True)
    for answer in (b"</a 3>", b"</b 100000>", b"</ 0>"):
        assert received.count(answer) == 1


def test_half_closed_client_gets_a_response_that_takes_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.api.protocol._PROBE_SECONDS", IDLE_TIMEOUT)
    received = exchange(GET, half_close=True, app=slow_app)
    assert received.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 ")
    assert received.endswith(b"ok")


def test_head_of_a_response_is_sent_with_its_content(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    made = Connection.connection_made

    def record_writes(connection: Connection, transport: asyncio.Transport) -> None:
        write = transport.write

        def write_recorded(data: bytes) -> None:
            written.append(data)
            write(data)

        monkeypatch.setattr(transport, "write", write_recorded)
        made(connection, transport)

    monkeypatch.setattr(Connection, "connection_made", record_writes)
    received = exchange(post(3) + b"abc" + CLOSE)
    first, second = (data for data in written if data)
    assert first + second == received
    assert (first.startswith(b"HTTP/1.1 200 "), first.endswith(b"</ 3>")) == (True, True)
    assert second.endswith(b"</last 0>")


@pytest.mark.parametrize(
    ("status", "phrase"),
    [(200, b"OK"), (413, b"Content Too Large"), (422, b"Unprocessable Content")],
)
def test_status_line_has_the_phrase_of_rfc_9110(status: int, phrase: bytes) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"0")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body"})

    line, _, _ = exchange(post(0) + CLOSE, app=app).partition(b"\r\n")
    assert line == b"HTTP/1.1 %d %s" % (status, phrase)


@pytest.mark.parametrize("sent", [post(100) + b"abc", GET[:-4], CHUNKED + b"5\r\nab"])
def test_incomplete_request_of_a_half_closed_client_is_400(sent: bytes) -> None:
    assert exchange(sent, half_close=True).startswith(b"HTTP/1.1 400 ")


def test_client_that_disconnects_cancels_its_request() -> None:
    disconnected = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        disconnected.set()

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GET)
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()
        await asyncio.wait_for(disconnected.wait(), 5)

    run(client, app)


def test_connection_closes_after_a_request_with_two_lengths() -> None:
    """RFC 9112, section 6.3. What follows may be a smuggled request."""
    head = CHUNKED.replace(b"Host: x", b"Host: x\r\nContent-Length: 4")
    received = exchange(head + b"3\r\nabc\r\n0\r\n\r\n" + GET)
    assert received.count(b"HTTP/1.1 200 ") == 1
    assert b"connection: close" in received
    assert b"</chunked 3>" in received


@pytest.mark.parametrize("empty", [b"\r\n", b"\r\n\r\n", b"\n"])
def test_empty_line_before_a_request_is_skipped(empty: bytes) -> None:
    received = exchange(empty + post(1) + b"a" + empty + CLOSE)
    assert received.count(b"HTTP/1.1 200 ") == 2


def test_halves_of_an_empty_line_before_a_request_are_skipped() -> None:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in (b"\r", b"\n", CLOSE):
            writer.write(part)
            await asyncio.sleep(0.02)
        assert b"</last 0>" in await reader.read()

    run(client, echo_app)


OLD = b"GET /old HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n"


def test_connection_of_http_1_0_is_kept_alive_if_its_client_asks() -> None:
    received = exchange(OLD + OLD + OLD.replace(b"Keep-Alive", b"close") + OLD)
    assert received.count(b"</old 0>") == 3
    first, second, last = received.lower().split(b"http/1.1 200 ok")[1:]
    assert b"connection: keep-alive" in first
    assert b"connection: keep-alive" in second
    assert b"connection: close" in last


@pytest.mark.parametrize(
    "head", [b"GET / HTTP/1.0\r\n\r\n", OLD.replace(b"Keep-Alive", b"keep-alive, close")]
)
def test_connection_of_http_1_0_is_closed_otherwise(head: bytes) -> None:
    received = exchange(head + OLD)
    assert received.count(b"HTTP/1.1 200 ") == 1
    assert b"connection: close" in received.lower()


def test_response_without_a_length_closes_a_connection_of_http_1_0() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    received = exchange(OLD + OLD, app=app)
    assert received.count(b"HTTP/1.1 200 ") == 1
    assert b"connection: close" in received.lower()
    assert received.endswith(b"\r\n\r\nok")


def with_fields(number: int, size: int = 1) -> bytes:
    return CLOSE[:-2] + (b"X: " + b"a" * size + b"\r\n") * number + b"\r\n"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (CLOSE, 200),
        (with_fields(MAX_FIELDS - 2), 200),
        (with_fields(MAX_FIELDS - 1), 431),
        (with_fields(20_000), 431),
        (with_fields(1, MAX_HEAD_BYTES - 200), 200),
        (with_fields(1, MAX_HEAD_BYTES), 431),
        (b"GET /" + b"a" * 200_000, 431),
        (CLOSE.replace(b"HTTP/1.1", b"HTTP/1.0"), 200),
        (CLOSE.replace(b"HTTP/1.1", b"HTTP/1.9"), 200),
        (CLOSE.replace(b"HTTP/1.1", b"HTTP/3.0"), 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (CLOSE.replace(b"GET", b"HEAD").replace(b"HTTP/1.1", b"HTTP/2.0"), 505),
        (CHUNKED.replace(b"chunked\r", b"gzip, chunked\r"), 501),
        (CHUNKED + b"1;" + b"a" * 100_000, 400),
        (CHUNKED + b"0\r\n" + b"a: b\r\n" * 20_000, 400),
    ],
    ids=range(15),
)
def test_heads_are_bounded_and_versions_are_checked(sent: bytes, status: int) -> None:
    first, _, body = exchange(sent).partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 %d " % status)
    if sent.startswith(b"HEAD"):
        assert not body
    elif status != 200:
        assert json.loads(body)["status"] == status


def test_body_of_tiny_chunks_leaves_turns_for_others() -> None:
    longest = 0.0

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal longest
        head = CHUNKED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        writer.write(post(5) + b"abcde" + head + b"1\r\na\r\n" * 50_000 + b"0\r\n\r\n")
        answer = asyncio.create_task(reader.read())
        while not answer.done():
            start = time.thread_time()
            await asyncio.sleep(0)
            longest = max(longest, time.thread_time() - start)
        assert b"</chunked 50000>" in answer.result()

    run(client, echo_app)
    assert longest < 0.05
