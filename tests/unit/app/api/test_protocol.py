"""Connections that are idle: which are dropped, and which are kept."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from app.api.protocol import Connection

IDLE_TIMEOUT = 0.1
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"

Client = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def slow_app(scope: Any, receive: Any, send: Any) -> None:
    """Compute for longer than the idle timeout, then answer."""
    await asyncio.sleep(4 * IDLE_TIMEOUT)
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


def run(client: Client) -> None:
    """Run a client against a server whose connections have a short idle timeout."""

    async def main() -> None:
        config = uvicorn.Config(slow_app, log_config=None, timeout_keep_alive=60)
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
