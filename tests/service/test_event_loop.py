"""The event loop under requests that try to occupy it: every callback is short.

The server runs in a thread of the test, and each callback of its loop is measured: the processor
time of its thread, which does not depend on what else the machine does.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import gzip
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator

import pytest
import uvicorn

from app.api.protocol import Connection
from app.api.server import Server, listen
from app.main import create_app
from app.settings import Settings
from tests.conftest import encode, nuclei, write_tiny

LONGEST_SECONDS = 0.05
FORM = "multipart/form-data; boundary=B"
IMAGE = encode(nuclei(60, 60)[0])
INFER = "/v2/models/nuclei/infer"


def request(
    body: bytes = b"",
    *fields: str,
    path: str = "/segment",
    kind: str = "image/png",
    gz: bool = False,
    method: str = "POST",
) -> bytes:
    """A request after which the server closes the connection."""
    sent = gzip.compress(body) if gz else body
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: x",
        "Connection: close",
        f"Content-Type: {kind}",
        f"Content-Length: {len(sent)}",
        *(["Content-Encoding: gzip"] if gz else []),
        *fields,
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + sent


def part(content: bytes, name: bytes = b'name="file"; filename="a.png"') -> bytes:
    head = b"--B\r\nContent-Disposition: form-data; " + name + b"\r\n\r\n"
    return head + content + b"\r\n"


def wide_png() -> bytes:
    """100,000,000 x 1 pixels in 57 bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 100_000_000, 1, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


def tiny_chunks() -> bytes:
    lines = ["POST /segment HTTP/1.1", "Host: x", "Connection: close", "Content-Type: image/png"]
    head = "\r\n".join([*lines, "Transfer-Encoding: chunked", "", ""]).encode()
    return head + b"1\r\na\r\n" * 100_000 + b"0\r\n\r\n"


END = b"--B--\r\n"
BASE64 = base64.b64encode(bytes(11_000_000))
HOSTILE: dict[str, Callable[[], bytes]] = {
    "form in another charset": lambda: request(
        part(b"a" * 900_000, b'name="file"') + END, kind=FORM + "; charset=punycode", gz=True
    ),
    "form of a long field": lambda: request(part(b"a" * 9_000_000, b'name="x"') + END, kind=FORM),
    "form of 1000 files": lambda: request(part(b"x") * 1000 + END, kind=FORM),
    "form of encoded names": lambda: request(
        b"".join(
            part(b"x", b'name="file"; filename="' + (word * 4000)[:3900] + b'"')
            for word in (
                b"=?utf-8?q?a?= ",
                b"=?a?q?",
                b"%41",
                b"\\\\",
                b'";a="',
                b"a" + "\u0301".encode(),
            )
            for _ in range(60)
        )
        + END,
        kind=FORM,
    ),
    "form of 200 wide images": lambda: request(part(wide_png()) * 200 + END, kind=FORM),
    "form of headers": lambda: request(
        (part(b"x", b'name="file"; filename="a"\r\n' + b"X: y\r\n" * 14) * 1000) + END, kind=FORM
    ),
    "form of near boundaries": lambda: request(
        part(b"\r\n--\r\n--Z" * 500_000) + END, kind=FORM, gz=True
    ),
    "form of zeros": lambda: request(part(bytes(31_000_000)) + END, kind=FORM, gz=True),
    "boundary of 60 KB": lambda: request(END, kind=FORM + "B" * 60_000),
    "parameters of 60 KB": lambda: request(END, kind=FORM + ";a=b" * 15_000),
    "wide image": lambda: request(wide_png()),
    "image of zeros": lambda: request(bytes(31_000_000), gz=True),
    "image that inflates too far": lambda: request(bytes(200_000_000), gz=True),
    "many members": lambda: request(
        gzip.compress(b"") * 9000 + gzip.compress(IMAGE), "Content-Encoding: gzip"
    ),
    "outputs of 60 KB": lambda: request(IMAGE, path="/segment?" + "output=x&" * 6500),
    "index of 60 KB": lambda: request(b"[" * 60_000, path="/v2/repository/index"),
    "JSON of one string": lambda: request(
        b'{"id":"' + b"a" * 31_000_000 + b'"}', path=INFER, kind="application/json", gz=True
    ),
    "JSON of many values": lambda: request(
        b'{"x":[' + b"1," * 1_900_000 + b"1]}", path=INFER, kind="application/json", gz=True
    ),
    "JSON of a large file": lambda: request(
        b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[1],"data":["' + BASE64 + b'"]}]}',
        path=INFER,
        kind="application/json",
        gz=True,
    ),
    "chunks of one byte": tiny_chunks,
    "20,000 fields": lambda: request(IMAGE, *["X: y"] * 20_000),
    "field of 200 KB": lambda: request(IMAGE, "X: " + "a" * 200_000),
    "target of 60 KB": lambda: request(IMAGE, path="/" + "%41" * 20_000),
    "query of 60 KB": lambda: request(IMAGE, path="/segment?" + "a=b&" * 15_000),
    "Accept of 60 KB": lambda: request(IMAGE, "Accept: " + "a;q=1," * 10_000),
    "Range of 60 KB": lambda: request(
        b"",
        "Range: bytes=" + ",".join(f"{at}-{at}" for at in range(0, 20_000, 2)),
        path="/static/app.js",
        method="GET",
    ),
    "content codings of 60 KB": lambda: request(IMAGE, "Content-Encoding: " + "gzip," * 12_000),
}


class Recorder:
    """Measures the callbacks of every loop in this process.

    Attributes:
        longest: seconds, and the callback, since `reset`.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.longest = (0.0, "")

    def wrap(self, run: Callable[[asyncio.Handle], None]) -> Callable[[asyncio.Handle], None]:
        def measured(handle: asyncio.Handle) -> None:
            described = repr(handle) if handle._callback is not None else ""  # type: ignore[attr-defined]
            start = time.thread_time()
            run(handle)
            seconds = time.thread_time() - start
            if seconds > self.longest[0]:
                self.longest = (seconds, described)

        return measured


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Recorder, int]]:
    """A service in a thread, and its port."""
    folder = tmp_path_factory.mktemp("weights")
    write_tiny(folder / "nuclei.safetensors")
    recorder, ready = Recorder(), threading.Event()
    listening = listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    settings = Settings(weights_dir=folder, threads=1, max_upload_mb=32)
    app = create_app(settings)
    config = uvicorn.Config(app, http=Connection, log_config=None, access_log=False)
    server = Server(config, app.state.service, lambda *_: ready.set())
    thread = threading.Thread(target=server.run, args=([listening],))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.Handle, "_run", recorder.wrap(asyncio.Handle._run))  # type: ignore[attr-defined]
        thread.start()
        try:
            assert ready.wait(60)
            exchange(port, request(IMAGE))  # imports and caches
            yield recorder, port
        finally:
            server.should_exit = True
            thread.join(60)
            gc.unfreeze()


def exchange(port: int, sent: bytes) -> bytes:
    """Send a request, and return the response."""
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # rejected early
            connection.sendall(sent)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(1 << 16):
                received += data
    return received


@pytest.mark.parametrize("name", HOSTILE)
def test_no_callback_is_long(measured: tuple[Recorder, int], name: str) -> None:
    recorder, port = measured
    sent = HOSTILE[name]()
    recorder.reset()
    received = exchange(port, sent)
    assert received.startswith(b"HTTP/1.1 ")
    assert not received.startswith(b"HTTP/1.1 500")
    seconds, callback = recorder.longest
    assert seconds < LONGEST_SECONDS, callback
