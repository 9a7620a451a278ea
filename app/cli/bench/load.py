"""Clients of a service, many at once, and what they were answered.

Plain threads on bare sockets: on one machine the clients take their time from the service. An
asynchronous client costs over a millisecond of CPU a request and `http.client` half of one, mostly
to parse headers of which two are looked at here.
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

_IDLE = 3
"""Seconds after which a connection is not trusted any more: uvicorn closes idle ones after 5."""
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)")
_RETRY = re.compile(rb"\r\nretry-after: *(\d+)")


@dataclasses.dataclass
class Result:
    """What one run gave.

    Attributes:
        name: of the run.
        offered: requests a second that were sent; None: as many as were answered.
        seconds: from the first request to the last answer.
        statuses: of the answers, or names of what went wrong, and how often.
        latencies: in seconds, of what was answered 200.
    """

    name: str
    offered: float | None = None
    seconds: float = 0.0
    statuses: Counter[str] = dataclasses.field(default_factory=Counter)
    latencies: list[float] = dataclasses.field(default_factory=list, repr=False)

    @property
    def throughput(self) -> float:
        """Masks a second."""
        return self.statuses["200"] / self.seconds

    def percentile(self, q: float) -> float | None:
        """Of the latencies; None when nothing was answered 200."""
        return float(np.percentile(self.latencies, q)) if self.latencies else None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "offered_per_second": self.offered,
            "seconds": self.seconds,
            "statuses": dict(self.statuses),
            "images_per_second": self.throughput,
            **{f"p{q}_seconds": self.percentile(q) for q in (50, 95, 99)},
        }


def answers(statuses: Mapping[str, int]) -> str:
    """Statuses in words."""
    return ", ".join(f"{count} × {status}" for status, count in sorted(statuses.items()) if count)


class Caller:
    """One connection, kept open; for one thread at a time.

    Args:
        url: of the service.
        path: that takes an image.
        kind: Content-Type of what is sent.
    """

    def __init__(self, url: str, path: str = "/segment", kind: str = "image/jpeg") -> None:
        parts = urlsplit(url)
        self._address = parts.hostname, parts.port or 80
        self._head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: {kind}\r\n"
        self._socket: socket.socket | None = None
        self._used = 0.0

    def post(self, image: bytes) -> tuple[str, float]:
        """The status, or the name of what went wrong; and Retry-After in seconds."""
        if time.monotonic() - self._used > _IDLE:
            self.close()
        try:
            if self._socket is None:
                self._socket = socket.create_connection(self._address, timeout=3600)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.sendall(
                f"{self._head}Content-Length: {len(image)}\r\n\r\n".encode() + image
            )
            head = self._answer(self._socket)
        except OSError as error:
            self.close()
            return type(error).__name__, 0.0
        self._used = time.monotonic()
        if head.startswith(b"http/1.0") or b"\r\nconnection: close" in head:
            self.close()
        retry = _RETRY.search(head)
        return head[9:12].decode(), float(retry[1]) if retry else 0.0

    @staticmethod
    def _answer(connection: socket.socket) -> bytes:
        """The head of the answer in small letters; its body is read and dropped."""
        got = b""
        while (end := got.find(b"\r\n\r\n")) < 0:
            got += _received(connection)
        head = got[:end].lower()
        length = _LENGTH.search(head)
        if length is None:
            raise ConnectionError("an answer without Content-Length")
        left = end + 4 + int(length[1]) - len(got)
        while left > 0:
            left -= len(_received(connection))
        return head

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _received(connection: socket.socket) -> bytes:
    part = connection.recv(1 << 16)
    if not part:
        raise ConnectionResetError("the service hung up")
    return part


def closed_loop(
    url: str,
    image: bytes,
    clients: int,
    seconds: float,
    *,
    path: str = "/segment",
    kind: str = "image/jpeg",
) -> Result:
    """Each client sends its next request when it has the answer to its last.

    Args:
        seconds: in which requests are sent; what was sent is waited for.
        path, kind: as `Caller` takes them.
    """
    result = Result(f"{clients} clients")
    lock = threading.Lock()
    begin = threading.Barrier(clients + 1)

    def client() -> None:
        caller = Caller(url, path, kind)
        caller.post(image)
        begin.wait()
        end = time.perf_counter() + seconds
        while (sent := time.perf_counter()) < end:
            status, retry = caller.post(image)
            took = time.perf_counter() - sent
            with lock:
                result.statuses[status] += 1
                if status == "200":
                    result.latencies.append(took)
            if status != "200":
                time.sleep(min(retry or 0.1, max(0.0, end - time.perf_counter())))
        caller.close()

    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    begin.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    result.seconds = time.perf_counter() - start
    return result
