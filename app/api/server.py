"""The server process: its socket, its signals, and a drain before it stops."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import functools
import gc
import logging
import signal
import socket
import struct
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import Any, cast

import uvicorn

from app.api.acceptor import Acceptor, connection_limit, raise_file_limit
from app.api.protocol import Connection, too_many_connections
from app.errors import SettingsError
from app.inference.service import Service
from app.settings import PREFIX

log = logging.getLogger(__name__)

_MIN_DRAIN_S = 0.5
"""Shortest time from the signal to the end: clients that still connect read 503, not a reset."""
_AT_ONCE_S = 1
"""Time in which requests can be answered when the server stops without a drain."""
_LAST_REQUESTS_S = 0.1
"""Time in which connections that were accepted last can still send their request."""

_SO_ATTACH_FILTER = 26
"""From <asm-generic/socket.h>; Python has no name for it."""
_DROP_SYN = (
    struct.pack("HBBI", 0x30, 0, 0, 13),  # load the byte with the flags of the TCP header
    struct.pack("HBBI", 0x45, 0, 1, 0x02),  # skip one instruction unless SYN is set
    struct.pack("HBBI", 0x06, 0, 0, 0),  # drop the packet
    struct.pack("HBBI", 0x06, 0, 0, 0xFFFFFFFF),  # keep it
)
"""A program for the kernel's classic packet filter: code, jump if true, if false, operand."""


class Server(uvicorn.Server):
    """Uvicorn, but the first SIGTERM drains before the sockets close.

    Uvicorn alone stops listening at once. A load balancer would see refused connections before it
    had a chance to read `/readyz`. Here the probe fails first, new work is rejected with 503 and
    Retry-After, and every accepted request is answered: with 503 if UNET_DRAIN_S is too short.
    Then the sockets close.

    Args:
        on_ready: called once with host and port, as soon as the default model is served.
        on_stop: called when the server begins to stop, also in a signal handler: with the seconds
            that requests have left, and the exit status.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        on_ready: Callable[[str, int], None] | None = None,
        on_stop: Callable[[float, int], None] = lambda *_: None,
    ) -> None:
        super().__init__(config)
        self.service = service
        self._on_stop = on_stop
        self._on_ready = on_ready
        self._background: list[asyncio.Task[None]] = []
        self._draining = False
        self._drain_task: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            self._loop = asyncio.get_running_loop()
            self._background.append(self._loop.create_task(self._exit_on_failure()))
            try:
                yield
            finally:
                for task in self._background:
                    task.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        at_once = self._draining or sig == signal.SIGINT
        self._on_stop(_AT_ONCE_S if at_once else self.service.settings.drain_s, 128 + sig)
        if at_once:
            self.config.timeout_graceful_shutdown = _AT_ONCE_S
            super().handle_exit(sig, frame)  # a second signal, or Ctrl-C: do not drain
            return
        self._draining = True
        self._captured_signals.append(sig)
        self._loop.call_soon_threadsafe(self._start_drain)

    def _start_drain(self) -> None:
        self._drain_task = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        seconds = self.service.settings.drain_s
        end = self._loop.time() + seconds
        earliest = self._loop.time() + min(seconds, _MIN_DRAIN_S)
        log.info("draining: accepted requests have up to %g s", seconds)
        try:
            await asyncio.wait_for(self.service.drain(), seconds)
        except TimeoutError:
            aborted = self.service.cancel_accepted()  # while their clients can still be answered
            log.warning("drain timeout (%g s): %d requests aborted with 503", seconds, aborted)
        await asyncio.sleep(max(0.0, earliest - self._loop.time()))
        # The last responses may still be in transmission; they get the rest of the time.
        self.config.timeout_graceful_shutdown = max(1, round(end - self._loop.time()))
        self.should_exit = True

    async def _exit_on_failure(self) -> None:
        await self.service.failed.wait()
        self._on_stop(_AT_ONCE_S, self.service.exit_status)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            for listening in server.sockets:
                reject_new_connections(listening)
        await asyncio.sleep(_LAST_REQUESTS_S)  # handshakes that have begun end, and are accepted
        for server in self.servers:
            server.close()  # uvicorn would close idle connections at the same moment
        await asyncio.sleep(_LAST_REQUESTS_S)
        await super().shutdown(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        limit = connection_limit(raise_file_limit())
        await super().startup([])
        self.servers = [self._accept(listening, limit) for listening in sockets or []]
        for server in self.servers:
            for listening in server.sockets:
                host, port = listening.getsockname()[:2]
                log.info("listening on %s", format_url(host, port))
        self._background.append(self._loop.create_task(self._freeze_objects()))
        if self._on_ready is not None and self.servers:
            report = self._report_ready(self._on_ready, host, port)
            self._background.append(self._loop.create_task(report))

    def _accept(self, listening: socket.socket, limit: int) -> Any:
        """Accept connections in place of `asyncio.Server`, whose interface uvicorn uses."""
        return Acceptor(
            listening,
            functools.partial(
                cast(Callable[..., asyncio.Protocol], self.config.http_protocol_class),
                self.config,
                self.server_state,
                self.lifespan.state,
            ),
            cast(Collection[Connection], self.server_state.connections),
            limit,
            functools.partial(too_many_connections, self.service.metrics),
        )

    async def _wait_started(self) -> None:
        while not self.service.started:  # noqa: ASYNC110 (the service has no event for it)
            await asyncio.sleep(0.05)

    async def _freeze_objects(self) -> None:
        """Hide the modules and the models from the garbage collector once they are loaded.

        A full collection stops all threads, and would visit them each time: for 0.15 s (measured).
        """
        await self._wait_started()
        gc.freeze()

    async def _report_ready(
        self, on_ready: Callable[[str, int], None], host: str, port: int
    ) -> None:
        await self._wait_started()
        on_ready(host, port)


def listen(host: str, port: int) -> socket.socket:
    """Open a listening TCP socket. The host `::` accepts IPv4 as well.

    Args:
        port: 0 takes a free one.

    Raises:
        SettingsError: not an address of this machine, or the port is in use.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        dual_stack = address[0] == "::" and socket.has_dualstack_ipv6()
        listening = socket.create_server(
            address, family=family, backlog=2048, dualstack_ipv6=dual_stack
        )
        # Every connection inherits this. asyncio sets it only on sockets created with a protocol
        # number, which this one is not. Without it, the second packet of a response waits 40 ms for
        # the client to acknowledge the first (RFC 896; RFC 1122, section 4.2.3.2).
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except OSError as error:
        reason = error.strerror or error
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            text = f"{PREFIX}HOST={host}: {reason}; allowed is an address of this machine"
            raise SettingsError(text) from None
        raise SettingsError(f"{PREFIX}HOST={host}, {PREFIX}PORT={port}: {reason}") from None


def reject_new_connections(listening: socket.socket) -> None:
    """Ignore the first packet of every further handshake, so that no connection is half accepted.

    Closing a socket resets the connections that it has not accepted yet. A client whose first
    packet is ignored sends it again after a second, and its connection is refused. Without Linux's
    socket filters this does nothing.
    """
    program = ctypes.create_string_buffer(b"".join(_DROP_SYN))
    argument = struct.pack("HP", len(_DROP_SYN), ctypes.addressof(program))
    with contextlib.suppress(OSError):
        listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, argument)


def format_url(host: str, port: int) -> str:
    """The URL of an address; brackets enclose an IPv6 host (RFC 3986, section 3.2.2)."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
