"""The process: a socket, signals, and an orderly end. `unet serve`."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Iterator
from types import FrameType

import uvicorn

from app.errors import SettingsError
from app.inference.service import Service
from app.settings import PREFIX

log = logging.getLogger(__name__)

_LINGER = 0.5
"""Seconds from the signal to the end at least: who connects meanwhile reads 503, not a reset."""
_SETTLE = 0.1
"""Seconds in which connections that were accepted last can still say what they want."""


class Server(uvicorn.Server):
    """Uvicorn, but the first SIGTERM drains before the sockets close.

    Uvicorn alone stops listening at once, so that a load balancer sees refused connections
    before it had a chance to read `/readyz`. Here the probe turns 503 first, new work is refused
    with 503 and Retry-After, every accepted request is answered (503 too, if UNET_DRAIN_S is too
    short for it), and then the sockets close.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self._ending: asyncio.Task[None] | None = None
        self.interrupted = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            self._loop = asyncio.get_running_loop()
            failed = self._loop.create_task(self._leave_on_failure())
            try:
                yield
            finally:
                failed.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # What becomes of a re-raised Ctrl-C depends on what asyncio awaits at that moment.
        self.interrupted = sig == signal.SIGINT
        if self._ending is not None or self.interrupted:
            super().handle_exit(sig, frame)  # the second signal, or Ctrl-C: do not wait
            return
        self._captured_signals.append(sig)
        self._loop.call_soon_threadsafe(self._begin_end)

    def _begin_end(self) -> None:
        self._ending = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        seconds = self.service.settings.drain_s
        end = self._loop.time() + seconds
        log.info("draining: accepted requests are answered, for up to %g s", seconds)
        try:
            await asyncio.wait_for(self.service.drain(), seconds)
        except TimeoutError:
            left = self.service.cancel_accepted()  # while there is time to tell their clients
            log.warning("UNET_DRAIN_S=%g passed: %d requests are answered 503", seconds, left)
        await asyncio.sleep(max(0.0, min(seconds, _LINGER) - seconds + end - self._loop.time()))
        # The last answers may still be on their way out; they get what is left of the time.
        self.config.timeout_graceful_shutdown = max(1, round(end - self._loop.time()))
        self.should_exit = True

    async def _leave_on_failure(self) -> None:
        await self.service.failed.wait()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()  # uvicorn would hang up on connections in the same breath
        await asyncio.sleep(_SETTLE)
        await super().shutdown(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for listening in server.sockets:
                host, port = listening.getsockname()[:2]
                log.info("listening on http://%s:%d", host, port)


def listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(address, family=family, backlog=2048)
        # Inherited by every connection. asyncio sets it only on sockets whose protocol number is
        # given, which it is not here; without it, the second packet of an answer waits 40 ms for
        # the client to acknowledge the first (RFC 896, RFC 1122 section 4.2.3.2).
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except OSError as error:
        reason = error.strerror or error
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            text = f"{PREFIX}HOST={host}: {reason}; allowed is an address of this machine"
            raise SettingsError(text) from None
        raise SettingsError(f"{PREFIX}HOST={host}, {PREFIX}PORT={port}: {reason}") from None
