"""Bytes that are not HTTP, or hardly: each connection is answered or closed within its limits.

Slow clients are opened first and wait in the background, because the limits they meet are half a
minute long. Meanwhile malformed requests, floods and full tables of connections are tried.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from app.api.protocol import IDLE_TIMEOUT_S
from tools.prove.report import Row, at_least, at_most, equal, format_counts, none_of, noted
from tools.prove.subject import Subject, serving
from tools.prove.watch import LIVEZ_MS, Watch, small_image
from tools.prove.wire import Answer, exchange, parse, receive, request

_REQUEST_TIMEOUT_S = 20
_SLOW_CLIENTS = 100
"""Number of each kind."""
_FLOOD_MS = 500.0
"""Longest answer of a probe in a flood, which takes the event loop all its time."""
_FILES = 300
"""Open files of the service that gets more connections than that."""
_POST = "POST /segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
_CHUNKED = _POST + "Transfer-Encoding: chunked\r\n\r\n"


_IMAGE = small_image()


class Case(NamedTuple):
    """Bytes on a connection, and the statuses that are right; 0: closed without an answer."""

    sent: bytes
    statuses: frozenset[int]


def _case(sent: str | bytes, *statuses: int) -> Case:
    data = sent.encode("latin-1") if isinstance(sent, str) else sent
    return Case(data, frozenset(statuses))


def _get(line: str = "GET /livez HTTP/1.1", *fields: str) -> str:
    return "\r\n".join([line, *(fields or ("Host: x",)), "Connection: close", "", ""])


CASES: dict[str, Case] = {
    "random bytes": _case(random.Random(0).randbytes(5000) + b"\n\n", 400),
    "preface of HTTP/2": _case("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, 505),
    "a TLS hello": _case(bytes.fromhex("16030100c8010000c40303") + bytes(190) + b"\n\n", 400),
    "HTTP/0.9": _case("GET /livez\r\n\r\n", 400),
    "HTTP/3.0": _case(_get("GET /livez HTTP/3.0"), 505),
    "bare line feeds": _case("GET /livez HTTP/1.1\nHost: x\nConnection: close\n\n", 200, 400),
    "no host": _case(_get("GET /livez HTTP/1.1", "X: y"), 400),
    "two hosts": _case(_get("GET /livez HTTP/1.1", "Host: x", "Host: y"), 400),
    "a bare carriage return": _case(_get("GET /livez HTTP/1.1", "Host: x\rX: y"), 400),
    "a null byte in a field": _case(_get("GET /livez HTTP/1.1", "Host: x", "X: a\0b"), 400),
    "a space before a colon": _case(_get("GET /livez HTTP/1.1", "Host: x", "X : y"), 400),
    "CONNECT": _case(_get("CONNECT x:80 HTTP/1.1"), 400, 404, 405),
    "TRACE": _case(_get("TRACE /livez HTTP/1.1"), 405),
    "OPTIONS *": _case(_get("OPTIONS * HTTP/1.1"), 400, 404, 405),
    "an absolute target": _case(_get("GET http://x/livez HTTP/1.1"), 200),
    "a bad absolute target": _case(_get("GET http:// HTTP/1.1"), 400, 404),
    "upgrade to a WebSocket": _case(
        _get(
            "GET / HTTP/1.1", "Host: x", "Upgrade: websocket", "Sec-WebSocket-Key: x",
            "Sec-WebSocket-Version: 13",
        ),
        200, 400,
    ),
    "a field of 200 KB": _case(_get("GET /livez HTTP/1.1", "Host: x", "X: " + "a" * 200_000), 431),
    "20,000 fields": _case(_get("GET /livez HTTP/1.1", "Host: x", *["X: y"] * 20_000), 431),
    "a target of 70 KB": _case(_get("GET /" + "a" * 70_000 + " HTTP/1.1"), 414, 431),
    "two lengths": _case(_POST + "Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcde", 400),
    "a negative length": _case(_POST + "Content-Length: -5\r\n\r\nabcde", 400),
    "a length with a plus": _case(_POST + "Content-Length: +5\r\n\r\nabcde", 400),
    "a length of 40 digits": _case(_POST + f"Content-Length: {'9' * 40}\r\n\r\nabc", 400, 413),
    "a length and chunks": _case(
        _POST + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        "GET /models HTTP/1.1\r\nHost: x\r\n\r\n",
        422,
    ),
    "another transfer coding": _case(
        _POST + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400, 501
    ),
    "gzip as a transfer coding": _case(
        _POST + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400, 501
    ),
    "a chunk that is not a number": _case(_CHUNKED + "ZZZ\r\nabc\r\n", 400),
    "a negative chunk": _case(_CHUNKED + "-5\r\nabc\r\n", 400),
    "a chunk of 2^84 bytes": _case(_CHUNKED + "F" * 21 + "\r\nabc\r\n", 400),
    "a chunk with 30 KB of extensions": _case(_CHUNKED + "3;" + "a" * 30_000 + "\r\nabc\r\n", 400),
    "a trailer of 30 KB": _case(
        _CHUNKED + "3\r\nabc\r\n0\r\nX: " + "a" * 30_000 + "\r\n\r\n", 400, 422
    ),
    "an unknown expectation": _case(
        _get("GET /livez HTTP/1.1", "Host: x", "Expect: nonsense"), 200, 417
    ),
}  # fmt: skip


_BODY = _POST.encode() + b"Content-Length: 100000\r\n\r\n"
_SLOW: dict[str, tuple[bytes, bytes]] = {
    "silent": (b"", b""),
    "head by bytes": (b"GET /livez HTTP/1.1\r\nHost: x\r\n", b"X: y\r\n"),
    "head that stops": (b"GET /livez HTTP/1.1\r\nHost", b""),
    "body by bytes": (_BODY, b"x"),
    "body that stops": (_BODY + b"\x89PNG", b""),
}
"""Kind of a slow client -> what it sends first, and then every few seconds."""


class SlowClients:
    """Connections that make little or no progress, until the service ends them.

    Attributes:
        outcomes: how each kind ended, and how often: a status, closed, reset, or open.
        longest: seconds until the last one ended.
    """

    def __init__(self, port: int) -> None:
        self.outcomes: dict[str, Counter[object]] = {kind: Counter() for kind in _SLOW}
        self.longest = 0.0
        self._open: dict[socket.socket, str] = {}
        self._start = time.monotonic()
        for kind, (first, _) in _SLOW.items():
            for _ in range(_SLOW_CLIENTS):
                connection = socket.create_connection(("127.0.0.1", port), 10)
                connection.sendall(first)
                self._open[connection] = kind
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def wait(self) -> None:
        """Wait until all have ended, or should have."""
        self._thread.join()

    def _run(self) -> None:
        end = self._start + 2 * IDLE_TIMEOUT_S + 10
        next_bytes = time.monotonic() + 3
        while self._open and time.monotonic() < end:
            ready, _, _ = select.select(list(self._open), [], [], 0.5)
            for connection in ready:
                self._finish(connection)
            if time.monotonic() > next_bytes:
                next_bytes += 3
                for connection, kind in list(self._open.items()):
                    with contextlib.suppress(OSError):
                        connection.send(_SLOW[kind][1])
        for connection, kind in self._open.items():
            self.outcomes[kind]["still open"] += 1
            connection.close()

    def _finish(self, connection: socket.socket) -> None:
        received, end = receive(connection, time.monotonic() + 2)
        answer = parse(received, 0, end)
        self.outcomes[self._open.pop(connection)][answer.status or end] += 1
        self.longest = max(self.longest, time.monotonic() - self._start)
        connection.close()


def run(seconds: float) -> list[Row]:
    """Try everything once. `seconds` is not used: the limits of the service set the time."""
    with serving(f"--request-timeout-s={_REQUEST_TIMEOUT_S}") as subject:
        expected = subject.post(_IMAGE).body
        slow = SlowClients(subject.port)
        rows = _send_malformed(subject)
        rows += _close_halves(subject, expected)
        rows += _pipeline(subject)
        with Watch(subject) as flooded:
            floods = _flood(subject)
        with Watch(subject) as watch:
            slow.wait()
        rows += _describe_slow(slow)
        rows += [
            at_most("slowest /livez meanwhile", watch.slowest_livez[1], LIVEZ_MS, "ms"),
            none_of("its other answers to a normal client than 200 and 429", watch.rejections),
            noted("floods", floods),
            at_most("slowest /livez in the floods", flooded.slowest_livez[1], _FLOOD_MS, "ms"),
            none_of(
                "answers to a normal client in the floods, other than 200 and 429",
                flooded.rejections,
            ),
            equal("the same mask at the end", subject.post(_IMAGE).body == expected, True),
            none_of("left behind", subject.leftovers()),
            none_of(
                "tracebacks in the log", [line for line in _lines(subject) if "Traceback" in line]
            ),
        ]
    return rows + _exhaust_files()


def _lines(subject: Subject) -> list[str]:
    return subject.log().splitlines()


def _send_malformed(subject: Subject) -> list[Row]:
    wrong = []
    before = len(subject.log())
    for name, case in CASES.items():
        answer = exchange(subject.port, case.sent, 5)
        if answer.status not in case.statuses or answer.end == "timeout":
            wrong.append(f"{name}: {answer.status} {answer.end}")
    attempts = 2000
    sent = CASES["a negative chunk"].sent
    with ThreadPoolExecutor(4) as pool:
        statuses = Counter(
            each.status
            for each in pool.map(lambda _: exchange(subject.port, sent), range(attempts))
        )
    logged = (len(subject.log()) - before) / (attempts + len(CASES))
    return [
        noted("malformed requests", len(CASES)),
        none_of("with another status, or not closed", wrong),
        equal(f"{attempts:,} times the same one", format_counts(statuses), f"400: {attempts:,}"),
        at_most("bytes of log for each", logged, 300),
    ]


def _close_halves(subject: Subject, expected: bytes) -> list[Row]:
    """Clients that close their sending half after the request."""

    def post(_: int) -> Answer:
        return exchange(subject.port, request(_IMAGE), half_close=True)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(post, range(40)))
    masks = sum(answer.status == 200 and answer.body == expected for answer in answers)
    return [equal("half-closed clients with their mask", masks, len(answers))]


def _pipeline(subject: Subject) -> list[Row]:
    """Requests that do not wait for their responses, the last one with an error."""
    probe = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    image = _POST.encode() + b"Content-Length: %d\r\n\r\n" % len(_IMAGE) + _IMAGE
    last = b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = exchange(subject.port, probe * 20 + image + probe * 20 + last)
    received = answer.head + b"\r\n\r\n" + answer.body
    found = [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:]]
    return [equal("pipelined requests, answered in order", found == [200] * 41 + [404], True)]


def _flood(subject: Subject) -> str:
    """Pipelined requests whose responses are not read, and connections without a request."""
    counts: Counter[str] = Counter()
    flood = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * 500
    with contextlib.ExitStack() as stack:
        deaf = [
            stack.enter_context(socket.create_connection(("127.0.0.1", subject.port), 10))
            for _ in range(10)
        ]
        for connection in deaf:
            connection.setblocking(False)
        end = time.monotonic() + 8
        while time.monotonic() < end:
            for connection in deaf:
                with contextlib.suppress(OSError):
                    counts["pipelined, not read"] += connection.send(flood) // (len(flood) // 500)
            for _ in range(20):
                socket.create_connection(("127.0.0.1", subject.port), 10).close()
                counts["connections"] += 1
    return format_counts(counts)


def _describe_slow(slow: SlowClients) -> list[Row]:
    allowed: dict[str, set[object]] = {
        "silent": {"closed", "reset"},
        "head by bytes": {"closed", "reset"},
        "head that stops": {"closed", "reset"},
        "body by bytes": {504},
        "body that stops": {504},
    }
    rows = [
        Row(
            f"{_SLOW_CLIENTS} slow clients: {kind}",
            format_counts(outcomes),
            " or ".join(sorted(map(str, allowed[kind]))),
            set(outcomes) <= allowed[kind],
        )
        for kind, outcomes in slow.outcomes.items()
    ]
    return [
        *rows,
        at_most("last slow client ended after", slow.longest, 2 * IDLE_TIMEOUT_S + 5, "s"),
    ]


def _exhaust_files() -> list[Row]:
    """More idle connections than the service may have open files."""
    with serving(files=_FILES) as subject, contextlib.ExitStack() as stack:
        before, connected = len(subject.log()), 0
        for _ in range(2 * _FILES):
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_connection(("127.0.0.1", subject.port), 5))
                connected += 1
        start = time.monotonic()
        answers = [subject.get("/livez", 10) for _ in range(10)]
        images = [subject.post(_IMAGE, seconds=10).status for _ in range(10)]
        elapsed = time.monotonic() - start
        logged = len(subject.log()) - before
        cpu_before, wall = _cpu_seconds(subject), time.monotonic()
        time.sleep(2)
        busy = (_cpu_seconds(subject) - cpu_before) / (time.monotonic() - wall)
    statuses = Counter(each.status for each in answers)
    return [
        at_least(f"idle connections to a service with {_FILES} files", connected, 2 * _FILES),
        equal(
            "/livez and images meanwhile",
            (dict(statuses), dict(Counter(images))),
            ({200: 10}, {200: 10}),
        ),
        at_most("all of them after", elapsed, 5, "s"),
        at_most("bytes of log", logged, 20_000),
        at_most("processor time of the service meanwhile", 100 * busy, 20, "%"),
    ]


def _cpu_seconds(subject: Subject) -> float:
    with open(f"/proc/{subject.process.pid}/stat") as file:  # noqa: PTH123
        fields = file.read().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
