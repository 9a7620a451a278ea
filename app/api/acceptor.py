"""Accepting connections, within the file descriptors that the process may open.

asyncio's own server tries the whole backlog again, and logs each try, when no descriptor is left.
This one keeps some descriptors free: at its limit, it drops the connections that have been idle for
the longest time, and rejects a new one if none is idle. Knows no requests.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import resource
import socket
from collections.abc import Callable, Collection
from typing import Protocol

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 10_000
"""At once, if there are as many file descriptors. An idle one takes 13 KB (measured)."""
_RESERVED_FILES = 256
"""Descriptors for everything else: models, worker processes, the log."""
_DROPPED_AT_ONCE = 64
_ACCEPTED_PER_TURN = 64
"""Connections that are accepted in one turn of the event loop."""
_RETRY_SECONDS = 0.1
"""Wait after an error of `accept`."""
_LINGER_SECONDS = 1.0
"""Time for a client to read its rejection."""
_MAX_LINGERING = 64
_LOG_SECONDS = 10.0
"""Shortest time between two lines of the log."""


class ManagedConnection(Protocol):
    """The part of a connection that the acceptor uses."""

    @property
    def idle_since(self) -> float | None:
        """Time of the loop; None while a request is processed."""

    def drop(self) -> None:
        """Close the connection; its client gets no response."""


class Acceptor:
    """Accepts the connections of one listening socket until it is closed.

    It has the methods of `asyncio.Server` that uvicorn calls.

    Args:
        listening: the socket.
        make_connection: the protocol of a connection.
        connections: those that are open, of all acceptors.
        limit: of the open connections.
        reject: called for a connection that is rejected; returns the response.

    Attributes:
        sockets: the listening one.
    """

    def __init__(
        self,
        listening: socket.socket,
        make_connection: Callable[[], asyncio.Protocol],
        connections: Collection[ManagedConnection],
        limit: int,
        reject: Callable[[], bytes],
    ) -> None:
        self.sockets = (listening,)
        self._listening = listening
        self._make_connection = make_connection
        self._connections = connections
        self._limit = limit
        self._reject = reject
        self._opening: set[asyncio.Task[None]] = set()
        self._lingering: dict[socket.socket, asyncio.TimerHandle] = {}
        self._logged_at = -_LOG_SECONDS
        self._unlogged = 0
        listening.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._accept_all())

    def close(self) -> None:
        """Stop accepting, and close the listening socket once the loop no longer watches it."""
        self._task.cancel()
        self._task.add_done_callback(lambda _: self._listening.close())
        for connection in list(self._lingering):
            self._close_rejected(connection)

    async def wait_closed(self) -> None:
        """Wait until the connections that were accepted are open."""
        await asyncio.gather(self._task, *self._opening, return_exceptions=True)

    async def _accept_all(self) -> None:
        accepted = 0
        while True:
            try:
                connection, _ = await self._loop.sock_accept(self._listening)
            except OSError as error:
                self._warn("cannot accept a connection: %s", error.strerror)
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            if self._count() >= self._limit:
                await self._drop_idle()
            if self._count() >= self._limit:
                self._reject_connection(connection)
            else:
                task = self._loop.create_task(self._open(connection))
                self._opening.add(task)
                task.add_done_callback(self._opening.discard)
            accepted += 1
            if accepted % _ACCEPTED_PER_TURN == 0:
                await asyncio.sleep(0)

    def _count(self) -> int:
        return len(self._connections) + len(self._opening)

    async def _open(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make_connection, connection)
        except OSError as error:
            connection.close()
            self._warn("cannot open a connection: %s", error.strerror)

    async def _drop_idle(self) -> None:
        """Drop some of the connections that have been idle for the longest time."""
        idle = [(each.idle_since, id(each), each) for each in self._connections]
        oldest = heapq.nsmallest(_DROPPED_AT_ONCE, (each for each in idle if each[0] is not None))
        for _, _, connection in oldest:
            connection.drop()
        if oldest:
            self._warn("%d connections are open: dropped the longest idle ones", self._count())
            await asyncio.sleep(0)  # the loop closes a connection in its next turn
            await asyncio.sleep(0)

    def _reject_connection(self, connection: socket.socket) -> None:
        """Send a response. Closing at once would reset the connection before it is read."""
        self._warn("%d connections are in use: rejected new ones", self._count())
        try:
            connection.send(self._reject())
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            connection.close()
            return
        if len(self._lingering) >= _MAX_LINGERING:
            self._close_rejected(next(iter(self._lingering)))
        self._lingering[connection] = self._loop.call_later(
            _LINGER_SECONDS, self._close_rejected, connection
        )

    def _close_rejected(self, connection: socket.socket) -> None:
        self._lingering.pop(connection).cancel()
        connection.close()

    def _warn(self, message: str, detail: object) -> None:
        """Log a line, unless the last one was just logged."""
        now = self._loop.time()
        if now < self._logged_at + _LOG_SECONDS:
            self._unlogged += 1
            return
        log.warning(message + " (%d lines omitted)", detail, self._unlogged)
        self._logged_at, self._unlogged = now, 0


def raise_file_limit() -> int:
    """Raise the soft limit of open files to the hard one, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):  # macOS: the hard limit is infinite, the kernel's is not
        return soft
    return hard


def connection_limit(files: int) -> int:
    """How many connections may be open at once.

    Args:
        files: how many files the process may open; a negative number is infinity.
    """
    if files == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, files - min(_RESERVED_FILES, files // 2)))
