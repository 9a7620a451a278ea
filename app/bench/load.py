"""Clients of a service, many at once, and what they were answered.

Plain threads on `http.client`: an asynchronous client costs over a millisecond of CPU a request,
and on one machine the clients take their time from the service.
"""

from __future__ import annotations

import dataclasses
import http.client
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import numpy as np

_IDLE = 3
"""Seconds after which a connection is not trusted any more: uvicorn closes idle ones after 5."""


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
        self._path = path
        self._headers = {"Content-Type": kind}
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=3600)
        self._used = time.monotonic()

    def post(self, image: bytes) -> tuple[str, float]:
        """The status, or the name of what went wrong; and Retry-After in seconds."""
        if time.monotonic() - self._used > _IDLE:
            self.close()  # the next request opens it again
        try:
            self._connection.request("POST", self._path, image, self._headers)
            with self._connection.getresponse() as answer:
                answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            return type(error).__name__, 0.0
        self._used = time.monotonic()
        return str(answer.status), float(answer.getheader("Retry-After", "0"))

    def close(self) -> None:
        self._connection.close()


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
