"""Requests and responses as bytes on a socket: an HTTP library would not send what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import re
import socket
import time

_STATUS = re.compile(rb"HTTP/1\.1 (\d{3})")


@dataclasses.dataclass(frozen=True)
class Answer:
    """Everything that came back on a connection until it was closed.

    Attributes:
        status: of the final response; 0 if there was none.
        head: its status line and fields.
        body: all bytes after the head.
        seconds: from the first byte sent to the end.
        end: closed, reset, or timeout.
        complete: the body is as long as its Content-Length says.
    """

    status: int
    head: bytes
    body: bytes
    seconds: float
    end: str
    complete: bool


def request(
    body: bytes = b"",
    *fields: str,
    path: str = "/segment",
    method: str = "POST",
    kind: str = "application/octet-stream",
    compressed: bool = False,
) -> bytes:
    """A request after whose response the service closes the connection.

    Args:
        fields: further lines of the head.
        kind: its Content-Type.
        compressed: send the body in gzip.
    """
    sent = gzip.compress(body) if compressed else body
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close"]
    if body:
        lines += [f"Content-Type: {kind}", f"Content-Length: {len(sent)}"]
    if compressed:
        lines.append("Content-Encoding: gzip")
    return "\r\n".join([*lines, *fields, "", ""]).encode("latin-1") + sent


def exchange(port: int, sent: bytes, seconds: float = 60, *, half_close: bool = False) -> Answer:
    """Send bytes on a new connection, and receive until it is closed.

    Args:
        seconds: for everything.
        half_close: close the sending half after the bytes.

    Raises:
        OSError: the connection was not established.
    """
    with socket.create_connection(("127.0.0.1", port), seconds) as connection:
        start = time.monotonic()
        # A rejection may come before everything is sent.
        with contextlib.suppress(ConnectionResetError, BrokenPipeError, TimeoutError):
            connection.sendall(sent)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        received, end = receive(connection, start + seconds)
    return parse(received, time.monotonic() - start, end)


def receive(connection: socket.socket, end: float) -> tuple[bytes, str]:
    """All bytes until a connection is closed, and how it ended.

    Args:
        end: on the clock of `time.monotonic`.
    """
    received = bytearray()
    try:
        while True:
            connection.settimeout(max(0.001, end - time.monotonic()))
            data = connection.recv(1 << 16)
            if not data:
                return bytes(received), "closed"
            received += data
    except TimeoutError:
        return bytes(received), "timeout"
    except OSError:
        return bytes(received), "reset"


def parse(received: bytes, seconds: float, end: str) -> Answer:
    """Find the first final response in what was received."""
    rest = received
    while rest.startswith(b"HTTP/1.1 1"):
        rest = rest.partition(b"\r\n\r\n")[2]
    head, found, body = rest.partition(b"\r\n\r\n")
    status = _STATUS.match(head)
    length = re.search(rb"\r\ncontent-length: *(\d+)", head.lower())
    complete = bool(found) and (length is None or len(body) >= int(length[1]))
    return Answer(int(status[1]) if status else 0, head, body, seconds, end, complete)
