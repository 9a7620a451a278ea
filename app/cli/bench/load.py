"""Load a service with many concurrent clients, and count its responses.

The clients are plain threads on plain sockets: on one machine they compete with the service for the
CPU. An asynchronous client costs over 1 ms of CPU per request and `http.client` half of that,
mostly to parse headers. Only two headers matter here.
"""

from __future__ import annotations

import dataclasses
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import numpy as np

_MAX_IDLE_S = 3
"""A connection that was idle for longer is opened anew: servers close theirs, some after 5 s."""
_READ_TIMEOUT_S = 3600
_RETRY_S = 0.1
"""Pause after an error without Retry-After."""
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)")
_RETRY_AFTER = re.compile(rb"\r\nretry-after: *(\d+)")


@dataclasses.dataclass
class LoadResult:
    """The figures of one run.

    Attributes:
        name: of the run.
        offered: requests/s that were sent; None in a closed loop.
        seconds: from the first request to the last response.
        statuses: number of responses by status, and of failures by the name of the exception.
        latencies: seconds of the responses with status 200.
    """

    name: str
    offered: float | None = None
    seconds: float = 0.0
    statuses: Counter[str] = dataclasses.field(default_factory=Counter)
    latencies: list[float] = dataclasses.field(default_factory=list, repr=False)

    @property
    def throughput(self) -> float:
        """Masks per second."""
        return self.statuses["200"] / self.seconds

    def percentile(self, q: float) -> float | None:
        """Return a percentile of the latencies; None if no response was 200."""
        return float(np.percentile(self.latencies, q)) if self.latencies else None

    def to_json(self) -> dict[str, Any]:
        """Convert to an entry of `runs` in a report."""
        return {
            "name": self.name,
            "offered_per_second": self.offered,
            "seconds": self.seconds,
            "statuses": dict(self.statuses),
            "images_per_second": self.throughput,
            **{f"p{q}_seconds": self.percentile(q) for q in (50, 95, 99)},
        }


def format_statuses(statuses: Mapping[str, int]) -> str:
    """Format counts by status: "12 × 200, 3 × 429"."""
    return ", ".join(f"{count} × {status}" for status, count in sorted(statuses.items()) if count)


class KeepAliveClient:
    """A client with one connection that stays open, for one thread at a time.

    Args:
        url: of the service.
        path: of the endpoint that takes an image.
        kind: Content-Type of the request.
    """

    def __init__(self, url: str, path: str = "/segment", kind: str = "image/jpeg") -> None:
        parts = urlsplit(url)
        self._address = parts.hostname, parts.port or 80
        self._head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: {kind}\r\n"
        self._socket: socket.socket | None = None
        self._last_used = 0.0

    def post(self, image: bytes) -> tuple[str, float]:
        """Send an image and drop the response.

        Returns:
            The status, or the name of the exception; and the seconds of Retry-After, 0 without.
        """
        if time.monotonic() - self._last_used > _MAX_IDLE_S:
            self.close()
        try:
            if self._socket is None:
                self._socket = socket.create_connection(self._address, timeout=_READ_TIMEOUT_S)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.sendall(
                f"{self._head}Content-Length: {len(image)}\r\n\r\n".encode() + image
            )
            head = self._read_response(self._socket)
        except OSError as error:
            self.close()
            return type(error).__name__, 0.0
        self._last_used = time.monotonic()
        if head.startswith(b"http/1.0") or b"\r\nconnection: close" in head:
            self.close()
        retry_after = _RETRY_AFTER.search(head)
        return head[9:12].decode(), float(retry_after[1]) if retry_after else 0.0

    @staticmethod
    def _read_response(connection: socket.socket) -> bytes:
        """Return the head of the response in lower case; the body is read and dropped."""
        received = b""
        while (end := received.find(b"\r\n\r\n")) < 0:
            received += _receive(connection)
        head = received[:end].lower()
        length = _LENGTH.search(head)
        if length is None:
            raise ConnectionError("a response without Content-Length")
        remaining = end + 4 + int(length[1]) - len(received)
        while remaining > 0:
            remaining -= len(_receive(connection))
        return head

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _receive(connection: socket.socket) -> bytes:
    part = connection.recv(1 << 16)
    if not part:
        raise ConnectionResetError("the service closed the connection")
    return part


def closed_loop(
    url: str,
    image: bytes,
    clients: int,
    seconds: float,
    *,
    path: str = "/segment",
    kind: str = "image/jpeg",
) -> LoadResult:
    """Run clients that each send the next request after the response to the last.

    Args:
        seconds: during which requests are sent; their responses are waited for.
        path, kind: see `KeepAliveClient`.
    """
    result = LoadResult(f"{clients} clients")
    lock = threading.Lock()
    begin = threading.Barrier(clients + 1)

    def run_client() -> None:
        client = KeepAliveClient(url, path, kind)
        client.post(image)  # a warm-up that does not count
        begin.wait()
        end = time.perf_counter() + seconds
        while (sent := time.perf_counter()) < end:
            status, retry_after = client.post(image)
            latency = time.perf_counter() - sent
            with lock:
                result.statuses[status] += 1
                if status == "200":
                    result.latencies.append(latency)
            if status != "200":
                time.sleep(min(retry_after or _RETRY_S, max(0.0, end - time.perf_counter())))
        client.close()

    threads = [threading.Thread(target=run_client, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    begin.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    result.seconds = time.perf_counter() - start
    return result
