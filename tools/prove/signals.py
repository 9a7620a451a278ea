"""SIGTERM under load, again and again: nothing that was accepted is lost.

Each client opens a connection per request. A request counts as accepted once its connection is
established: from then on it must get a complete response. After the end of the drain, connections
are refused, which tells a load balancer to choose another replica.
"""

from __future__ import annotations

import io
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from tools.prove.report import Row, at_least, at_most, equal, format_counts, none_of, noted
from tools.prove.subject import serving
from tools.prove.wire import parse, receive, request

TERMINATIONS = 100
"""In any run."""
_AT_ONCE = 2
"""Services that are terminated at the same time."""
_CLIENTS = 6
_LOAD_S = 0.4
"""Shortest time from ready to the signal; it varies, so that the signal meets every state."""
_DRAIN_S = 20
_LATEST_S = _DRAIN_S + 3
_TIMEOUT_S = 40.0
_END_OF_PNG = b"IEND\xaeB`\x82"


def _encode_image() -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class Tally:
    """Counts over all terminations.

    Attributes:
        outcomes: number of requests by status, or `refused`.
        lost: requests with a connection and without a complete response.
        exits: number of processes by exit status.
        seconds: from each signal to the end of its process.
        answered: number of requests that were accepted before the signal and answered after it.
        logged: lines of the logs that must not be there.
    """

    def __init__(self) -> None:
        self.outcomes: Counter[object] = Counter()
        self.lost: list[str] = []
        self.exits: Counter[object] = Counter()
        self.seconds: list[float] = []
        self.answered = 0
        self.logged: list[str] = []
        self.lock = threading.Lock()


class Client:
    """Sends images until its connection is refused.

    Args:
        signalled: the time of the signal, once it was sent.
    """

    def __init__(self, port: int, sent: bytes, tally: Tally, signalled: list[float]) -> None:
        self._port = port
        self._sent = sent
        self._tally = tally
        self._signalled = signalled

    def run(self) -> None:
        """Send requests, and count their outcomes."""
        while self._send_request():
            pass

    def _send_request(self) -> bool:
        try:
            connection = socket.create_connection(("127.0.0.1", self._port), _TIMEOUT_S)
        except OSError:
            self._count("refused")
            return False
        start, failure = time.monotonic(), ""
        with connection:
            try:
                connection.sendall(self._sent)
            except OSError as error:
                failure = f"{type(error).__name__} while sending"
            received, end = receive(connection, start + _TIMEOUT_S)
        answer = parse(received, time.monotonic() - start, end)
        whole = answer.complete and (answer.status != 200 or answer.body.endswith(_END_OF_PNG))
        if not whole:
            self._lose(f"{failure or answer.end} ({self._describe(start)})")
            return True
        accepted_before = bool(self._signalled) and start < self._signalled[0]
        self._count(answer.status, answered=accepted_before)
        if answer.status == 503:
            time.sleep(0.02)
        return True

    def _count(self, outcome: object, *, answered: bool = False) -> None:
        with self._tally.lock:
            self._tally.outcomes[outcome] += 1
            self._tally.answered += answered

    def _lose(self, text: str) -> None:
        with self._tally.lock:
            self._tally.lost.append(text)

    def _describe(self, start: float) -> str:
        if not self._signalled:
            return "before the signal"
        return f"connected {start - self._signalled[0]:+.3f} s from the signal"


def run(seconds: float) -> list[Row]:
    """Terminate `TERMINATIONS` services, and more until the time is over."""
    start = time.monotonic()
    tally, sent = Tally(), request(_encode_image(), kind="image/png")

    def work(first: int) -> None:
        number = first
        while number < TERMINATIONS or time.monotonic() < start + seconds:
            _terminate(tally, sent, number)
            number += _AT_ONCE

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for job in [pool.submit(work, first) for first in range(_AT_ONCE)]:
            job.result()
    return [
        at_least("SIGTERMs under load", tally.exits.total(), TERMINATIONS),
        noted("requests by status", format_counts(tally.outcomes)),
        noted("requests in the service at the signal, all answered", f"{tally.answered:,}"),
        none_of("requests with a connection and without a complete response", tally.lost),
        none_of("other statuses", set(tally.outcomes) - {200, 429, 503, "refused"}),
        equal("exit statuses", format_counts(tally.exits), f"-15: {tally.exits.total()}"),
        at_most("slowest end after the signal", max(tally.seconds), _LATEST_S, "s"),
        none_of("tracebacks in the logs", tally.logged),
    ]


def _terminate(tally: Tally, sent: bytes, number: int) -> None:
    with serving(f"--drain-s={_DRAIN_S}") as subject, ThreadPoolExecutor(_CLIENTS) as pool:
        signalled: list[float] = []
        clients = [Client(subject.port, sent, tally, signalled) for _ in range(_CLIENTS)]
        jobs = [pool.submit(client.run) for client in clients]
        time.sleep(_LOAD_S + 0.013 * (number % 23))
        signalled.append(time.monotonic())
        subject.process.send_signal(signal.SIGTERM)
        status = subject.process.wait(2 * _LATEST_S)
        elapsed = time.monotonic() - signalled[0]
        for job in jobs:
            job.result()
        tracebacks = [line for line in subject.log().splitlines() if "Traceback" in line]
    with tally.lock:
        tally.exits[status] += 1
        tally.seconds.append(elapsed)
        tally.logged += tracebacks
