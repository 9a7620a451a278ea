"""Connections at the limit of file descriptors."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable

import pytest

from app.api.acceptor import MAX_CONNECTIONS, Acceptor, connection_limit, raise_file_limit
from app.api.server import listen

REJECTION = b"HTTP/1.1 503 Service Unavailable\r\n\r\n"
LIMIT = 3


class FakeConnection(asyncio.Protocol):
    """A connection that is idle unless a test changes that."""

    def __init__(self, connections: set[FakeConnection]) -> None:
        self.connections = connections
        self.idle_since: float | None = asyncio.get_running_loop().time()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.discard(self)

    def drop(self) -> None:
        self.transport.abort()


def run(body: Callable[[Acceptor, set[FakeConnection], int], Awaitable[None]]) -> None:
    """Run `body` with an acceptor of at most `LIMIT` connections, and its port."""

    async def main() -> None:
        connections: set[FakeConnection] = set()
        listening = listen("127.0.0.1", 0)
        port = listening.getsockname()[1]
        acceptor = Acceptor(
            listening,
            lambda: FakeConnection(connections),
            connections,
            LIMIT,
            lambda: REJECTION,
        )
        async with asyncio.timeout(20):
            await body(acceptor, connections, port)
        acceptor.close()
        await acceptor.wait_closed()
        for connection in connections:
            connection.transport.abort()
        await asyncio.sleep(0)
        assert listening.fileno() == -1

    asyncio.run(main())


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_longest_idle_connections_are_dropped_at_the_limit() -> None:
    async def body(acceptor: Acceptor, connections: set[FakeConnection], port: int) -> None:
        clients = [await connect(port) for _ in range(LIMIT)]
        await until(lambda: len(connections) == LIMIT)
        busy, *_ = connections
        busy.idle_since = None
        new = await connect(port)
        await until(lambda: connections >= {busy} and len(connections) == 2)
        for _, writer in (*clients, new):
            writer.close()

    run(body)


def test_new_connection_is_rejected_if_none_is_idle() -> None:
    async def body(acceptor: Acceptor, connections: set[FakeConnection], port: int) -> None:
        clients = [await connect(port) for _ in range(LIMIT)]
        await until(lambda: len(connections) == LIMIT)
        for connection in connections:
            connection.idle_since = None
        reader, writer = await connect(port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")  # would reset a connection that was closed
        assert await reader.read() == REJECTION
        assert len(connections) == LIMIT
        for _, each in (*clients, (reader, writer)):
            each.close()

    run(body)


def test_accepting_without_descriptors_logs_one_line_and_recovers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(acceptor: Acceptor, connections: set[FakeConnection], port: int) -> None:
        loop = asyncio.get_running_loop()
        accept, failures = loop.sock_accept, 4

        async def fail(sock: socket.socket) -> tuple[socket.socket, object]:
            nonlocal failures
            if failures:
                failures -= 1
                raise OSError(24, "Too many open files")
            return await accept(sock)

        monkeypatch.setattr(loop, "sock_accept", fail)
        _, writer = await connect(port)
        await until(lambda: len(connections) == 1)
        assert not failures
        writer.close()

    monkeypatch.setattr("app.api.acceptor._RETRY_SECONDS", 0.01)
    with caplog.at_level(logging.WARNING):
        run(body)
    assert [record.message for record in caplog.records] == [
        "cannot accept a connection: Too many open files (0 lines omitted)"
    ]


def test_soft_limit_of_files_becomes_the_hard_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    limits = [1024, 20_000]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.__setitem__(slice(2), new))
    assert raise_file_limit() == 20_000
    assert limits == [20_000, 20_000]


@pytest.mark.parametrize(
    ("files", "connections"),
    [(1024, 768), (20_000, MAX_CONNECTIONS), (100, 50), (1, 1), (-1, MAX_CONNECTIONS)],
)
def test_some_descriptors_are_kept_for_files(files: int, connections: int) -> None:
    assert connection_limit(files) == connections
