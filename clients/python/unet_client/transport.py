"""An httpx transport that keeps a deadline for the whole exchange.

The timeouts of httpx bound each operation on the socket. A server that sends one byte per second
never reaches them. Here each operation gets the time that remains until the deadline.
asyncio has `asyncio.timeout` for this; blocking sockets have no counterpart.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any

# The connection layer of httpx, which requires httpcore 1.x itself.
import httpcore
import httpx

DEADLINE = "deadline"
"""Extension of a request: when its response must be complete, in seconds of `time.monotonic`."""

_SLICE_BYTES = 65536
"""Bytes per write, so that a server that reads slowly cannot extend the deadline."""


class DeadlineTransport(httpx.BaseTransport):
    """Sends requests that have the extension `DEADLINE`, and reads their responses in full.

    Args:
        proxy: the proxy to connect through.
    """

    def __init__(self, proxy: httpx.Proxy | None = None) -> None:
        self._pool = _build_pool(proxy)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        # httpcore passes these values on to the network backend, which takes them as deadlines.
        deadline = request.extensions[DEADLINE]
        timeouts = {"connect": deadline, "read": deadline, "write": deadline}
        response = self._pool.request(
            request.method,
            _to_core_url(request.url),
            headers=request.headers.raw,
            content=request.read(),
            extensions={"timeout": timeouts},
        )
        return httpx.Response(
            response.status,
            headers=response.headers,
            content=response.content,
            extensions=response.extensions,
        )

    def close(self) -> None:
        self._pool.close()


def _build_pool(proxy: httpx.Proxy | None) -> httpcore.ConnectionPool:
    """The threads that share a client bound the connections, so requests never wait for one."""
    options: dict[str, Any] = {
        "ssl_context": httpx.create_ssl_context(),
        "max_connections": None,
        "max_keepalive_connections": 20,
        "keepalive_expiry": 5.0,
        "network_backend": _DeadlineBackend(),
    }
    if proxy is None:
        return httpcore.ConnectionPool(**options)
    options |= {"proxy_url": _to_core_url(proxy.url), "proxy_auth": proxy.raw_auth}
    if proxy.url.scheme.startswith("socks"):
        return httpcore.SOCKSProxy(**options)
    return httpcore.HTTPProxy(**options)


def _to_core_url(url: httpx.URL) -> httpcore.URL:
    return httpcore.URL(
        scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
    )


class _DeadlineBackend(httpcore.SyncBackend):
    """Network backend whose `timeout` arguments are deadlines."""

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        assert timeout is not None
        deadline = timeout
        addresses = _resolve(host, port, _remaining(deadline, httpcore.ConnectTimeout))
        for address in addresses[:-1]:
            try:
                return self._connect(address, port, deadline, local_address, socket_options)
            except httpcore.ConnectError:
                continue
        return self._connect(addresses[-1], port, deadline, local_address, socket_options)

    def _connect(
        self,
        address: str,
        port: int,
        deadline: float,
        local_address: str | None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None,
    ) -> httpcore.NetworkStream:
        seconds = _remaining(deadline, httpcore.ConnectTimeout)
        stream = super().connect_tcp(address, port, seconds, local_address, socket_options)
        return _DeadlineStream(stream, deadline)


class _DeadlineStream(httpcore.NetworkStream):
    """Network stream whose `timeout` arguments are deadlines; None is the previous deadline."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._seconds(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), _SLICE_BYTES):
            part = buffer[start : start + _SLICE_BYTES]
            self._stream.write(part, self._seconds(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        seconds = self._seconds(timeout, httpcore.ConnectTimeout)
        stream = self._stream.start_tls(ssl_context, server_hostname, seconds)
        return _DeadlineStream(stream, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)

    def _seconds(self, deadline: float | None, error: type[Exception]) -> float:
        if deadline is not None:
            self._deadline = deadline
        return _remaining(self._deadline, error)


def _remaining(deadline: float, error: type[Exception]) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise error("the deadline has passed")
    return seconds


def _resolve(host: str, port: int, seconds: float) -> list[str]:
    """Resolve a host name to IP addresses.

    The resolver of the operating system takes no timeout. It runs on a thread, which outlives a
    timeout until the resolver returns.

    Raises:
        httpcore.ConnectTimeout: it takes longer than `seconds`.
        httpcore.ConnectError: the name has no address.
    """
    resolved: Future[list[str]] = Future()

    def look_up() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            resolved.set_result([str(address[0]) for *_, address in found])
        except Exception as error:
            resolved.set_exception(error)

    threading.Thread(target=look_up, daemon=True, name="unet-client-resolver").start()
    try:
        return resolved.result(seconds)
    except TimeoutError as error:
        raise httpcore.ConnectTimeout(f"resolving {host} took too long") from error
    except (OSError, UnicodeError) as error:
        raise httpcore.ConnectError(f"cannot resolve {host}: {error}") from error
