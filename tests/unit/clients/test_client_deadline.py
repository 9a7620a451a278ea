"""The timeout of both clients bounds a whole call, whatever the server does meanwhile."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.unit.clients.fake_server import Connect, FakeServer, Reply
from unet_client import ResponseTimeout

TIMEOUT = 0.3
LIMIT = 4  # less than the server takes


def stall(fake: FakeServer) -> Iterator[bytes]:
    fake.pause(10)
    yield b""


HEAD = b"HTTP/1.1 200 OK\r\n"
RESPONSES: dict[str, Callable[[FakeServer], Reply]] = {
    "no response": lambda fake: Reply(body=stall(fake), raw=True),
    "dripping headers": lambda fake: Reply(body=fake.drip(HEAD, b"X-Slow: "), raw=True),
    "dripping body": lambda fake: Reply(body=fake.drip()),
    "dripping error": lambda fake: Reply(500, body=fake.drip()),
}


@pytest.mark.parametrize("response", RESPONSES)
def test_slow_response_ends_at_the_timeout(
    fake: FakeServer, connect: Connect, response: str
) -> None:
    fake.respond = lambda _: RESPONSES[response](fake)
    with connect(fake.url, timeout=TIMEOUT) as client:
        start = time.monotonic()
        with pytest.raises(ResponseTimeout, match=rf"no response from {fake.url} .*of 0\.3 s"):
            client.segment(b"image")
        assert TIMEOUT <= time.monotonic() - start < LIMIT


@pytest.mark.parametrize("first", [HEAD, HEAD + b"Content-Length: 9\r\n\r\nx"])
def test_first_bytes_do_not_extend_the_timeout(
    fake: FakeServer, connect: Connect, first: bytes
) -> None:
    """A timeout per read would end 1.2 s after the first bytes, at 2.1 s."""

    def begin_late() -> Iterator[bytes]:
        fake.pause(0.9)
        yield first
        fake.pause(5)

    fake.respond = lambda _: Reply(body=begin_late(), raw=True)
    with connect(fake.url, timeout=1.2) as client:
        start = time.monotonic()
        with pytest.raises(ResponseTimeout):
            client.segment(b"image")
        assert 1.2 <= time.monotonic() - start < 2


def test_models_have_the_same_timeout(fake: FakeServer, connect: Connect) -> None:
    fake.respond = lambda _: Reply(body=fake.drip())
    with connect(fake.url, timeout=TIMEOUT) as client:
        start = time.monotonic()
        with pytest.raises(ResponseTimeout):
            client.models()
        assert time.monotonic() - start < LIMIT


def test_server_that_reads_slowly_ends_at_the_timeout(fake: FakeServer, connect: Connect) -> None:
    def read_slowly(file: Any, length: int) -> bytes:
        for _ in range(200):
            fake.pause(0.05)
            file.read(100_000)
        return b""

    fake.read_body = read_slowly
    with connect(fake.url, timeout=TIMEOUT) as client:
        start = time.monotonic()
        with pytest.raises(ResponseTimeout):
            client.segment(bytes(30_000_000))
        assert time.monotonic() - start < LIMIT


def test_server_that_does_not_accept_ends_at_the_timeout(connect: Connect) -> None:
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for occupant in (first, second):
            occupant.setblocking(False)
            occupant.connect_ex(full.getsockname())
        with connect(f"http://127.0.0.1:{full.getsockname()[1]}", timeout=TIMEOUT) as client:
            start = time.monotonic()
            with pytest.raises(ResponseTimeout):
                client.segment(b"image")
            assert time.monotonic() - start < LIMIT


def test_slow_name_resolution_ends_at_the_timeout(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()

    def resolve(*_: object, **__: object) -> list[Any]:
        released.wait(10)
        raise socket.gaierror("no resolver")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with connect("http://unet.example:8000", timeout=TIMEOUT) as client:
        start = time.monotonic()
        with pytest.raises(ResponseTimeout):
            client.segment(b"image")
        assert time.monotonic() - start < LIMIT
        released.set()


def test_second_address_is_tried_when_the_first_refuses(
    fake: FakeServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(host: Any, port: Any, *_: object, **__: object) -> list[Any]:
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in ("127.0.0.2", "127.0.0.1")
        ]

    original = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *rest, **named: (
            resolve(host, *rest, **named)
            if host in ("localhost", b"localhost")
            else original(host, *rest, **named)
        ),
    )
    with connect(fake.url.replace("127.0.0.1", "localhost")) as client:
        assert client.segment(b"image").content == b"image"


def test_client_works_after_a_timeout(fake: FakeServer, connect: Connect) -> None:
    fake.respond = lambda _: Reply(body=fake.drip())
    with connect(fake.url, timeout=TIMEOUT) as client:
        with pytest.raises(ResponseTimeout):
            client.segment(b"image")
        fake.respond = lambda _: Reply(body=b"mask")
        assert client.segment(b"image").content == b"mask"
