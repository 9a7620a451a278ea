"""A local HTTP server that responds as a test wants, and both clients behind one interface."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from unet_client import (
    AsyncClient,
    Client,
    ImageInput,
    SegmentationResult,
    UnetClientError,
)

ImageT = TypeVar("ImageT", bound=ImageInput)
Outcome = SegmentationResult | UnetClientError | OSError


@dataclasses.dataclass
class ReceivedRequest:
    """A request as the server received it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def timeout(self) -> float:
        return float(self.headers["x-request-timeout"])


@dataclasses.dataclass
class Reply:
    """A canned response. Without a length the connection is closed after the body."""

    status: int = 200
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: bytes | Iterable[bytes] = b""
    raw: bool = False  # send the body alone, without a status line and headers


class FakeServer(ThreadingHTTPServer):
    """Responds with `respond(request)`; by default with the body of the request."""

    daemon_threads = False  # closing the server waits for all connections

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[ReceivedRequest] = []
        self.respond: Callable[[ReceivedRequest], Reply] = lambda request: Reply(body=request.body)
        self.read_body: Callable[[Any, int], bytes] = lambda file, length: file.read(length)
        self.open_connections = self.all_connections = 0
        self.stopped = threading.Event()
        self._lock = threading.Lock()

    def count_connection(self, change: int) -> None:
        with self._lock:
            self.open_connections += change
            self.all_connections += max(change, 0)

    def pause(self, seconds: float) -> None:
        """Wait, but not longer than the test."""
        self.stopped.wait(seconds)

    def drip(self, *first: bytes) -> Iterator[bytes]:
        """Send a byte every 50 ms for ten seconds."""
        yield from first
        for _ in range(200):
            self.pause(0.05)
            yield b"x"

    def handle_error(self, *_: object) -> None:
        """Ignore clients that disconnect."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 30

    def setup(self) -> None:
        super().setup()
        self.server.count_connection(1)

    def finish(self) -> None:
        self.server.count_connection(-1)
        super().finish()

    def do_GET(self) -> None:
        self._reply()

    def do_POST(self) -> None:
        self._reply()

    def do_CONNECT(self) -> None:
        self._reply()

    def _reply(self) -> None:
        length = int(self.headers.get("content-length", 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.server.read_body(self.rfile, length)
        request = ReceivedRequest(self.command, self.path, headers, body)
        self.server.requests.append(request)
        reply = self.server.respond(request)
        if not reply.raw:
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            if isinstance(reply.body, bytes):
                self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
        if not isinstance(reply.body, bytes):
            self.close_connection = True
        for part in [reply.body] if isinstance(reply.body, bytes) else reply.body:
            self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        """Keep the output of the tests clean."""


class BlockingClient(Protocol):
    """The methods of both clients, as a test calls them."""

    def segment(self, image: ImageInput, **query: str | float) -> SegmentationResult: ...
    def segment_many(
        self, images: Iterable[ImageT], *, concurrency: int = 3, **query: str | float
    ) -> Iterator[tuple[ImageT, Outcome]]: ...
    def models(self) -> dict[str, Any]: ...
    def model(self, name: str) -> dict[str, Any]: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Connect(Protocol):
    """Creates one of the clients."""

    def __call__(
        self, url: str, *, key: str | None = None, timeout: float = 60
    ) -> BlockingClient: ...


class AsyncClientOnLoop:
    """`AsyncClient` with an event loop of its own, as a `BlockingClient`."""

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 60) -> None:
        self._client = AsyncClient(url, key=key, timeout=timeout)
        self._runner = asyncio.Runner()

    def segment(self, image: ImageInput, **query: str | float) -> SegmentationResult:
        return self._runner.run(self._client.segment(image, **query))

    def segment_many(
        self, images: Iterable[ImageT], *, concurrency: int = 3, **query: str | float
    ) -> Iterator[tuple[ImageT, Outcome]]:
        many = self._client.segment_many(images, concurrency=concurrency, **query)

        async def next_outcome() -> tuple[ImageT, Outcome] | None:
            return await anext(many, None)

        while (found := self._runner.run(next_outcome())) is not None:
            yield found

    def models(self) -> dict[str, Any]:
        return self._runner.run(self._client.models())

    def model(self, name: str) -> dict[str, Any]:
        return self._runner.run(self._client.model(name))

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


CLIENTS: dict[str, Connect] = {"Client": Client, "AsyncClient": AsyncClientOnLoop}
