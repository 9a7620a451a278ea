"""Requests, responses and errors of both clients."""

from __future__ import annotations

import asyncio
import copy
import gzip
import pickle
import socket
from pathlib import Path

import httpx
import pytest
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, use_span

from app.settings import KEY_PATTERN
from tests.unit.clients.fake_server import CLIENTS, Connect, FakeServer, Reply
from unet_client import (
    AsyncClient,
    Client,
    ConnectionFailed,
    ResponseTimeout,
    SegmentationError,
    SegmentationResult,
    UnetClientError,
)


def test_segment_posts_the_image_with_query_and_key(fake: FakeServer, connect: Connect) -> None:
    with connect(fake.url, key="secret", timeout=30) as client:
        result = client.segment(b"image", model="nuclei", threshold=0.25)
    (request,) = fake.requests
    assert result.content == b"image"
    assert (request.method, request.body) == ("POST", b"image")
    assert request.path == "/segment?model=nuclei&threshold=0.25"
    assert request.headers["authorization"] == "Bearer secret"
    assert request.headers["content-type"] == "application/octet-stream"
    assert 29 < request.timeout <= 30


def test_closed_client_raises_the_error_of_httpx(fake: FakeServer) -> None:
    async def call_closed() -> None:
        client = AsyncClient(fake.url)
        await client.close()
        with pytest.raises(RuntimeError, match="client has been closed"):
            await client.models()
        with pytest.raises(RuntimeError, match="client has been closed"):
            await anext(client.segment_many([b"image"]))

    asyncio.run(call_closed())
    client = Client(fake.url)
    client.close()
    with pytest.raises(RuntimeError, match="client has been closed"):
        client.models()
    with pytest.raises(RuntimeError, match="client has been closed"):
        next(client.segment_many([b"image"]))
    assert not fake.requests


def test_key_is_not_sent_unless_given(fake: FakeServer, connect: Connect) -> None:
    with connect(fake.url) as client:
        client.segment(b"image")
    assert "authorization" not in fake.requests[0].headers


def test_span_of_the_caller_is_sent_as_its_trace_context(fake: FakeServer) -> None:
    async def segment() -> None:
        async with AsyncClient(fake.url) as client:
            await client.segment(b"image")

    span = NonRecordingSpan(SpanContext(0xABC, 0xDEF, False, TraceFlags(1)))
    with Client(fake.url) as client:
        client.segment(b"image")
        with use_span(span):
            client.segment(b"image")
            asyncio.run(segment())
    sent = [request.headers.get("traceparent") for request in fake.requests]
    context = f"00-{'abc':0>32}-{'def':0>16}-01"
    assert sent == [None, context, context]


def test_base_url_may_have_a_path(fake: FakeServer, connect: Connect) -> None:
    for url in (f"{fake.url}/unet", f"{fake.url}/unet/"):
        with connect(url) as client:
            client.segment(b"image")
    assert [request.path for request in fake.requests] == ["/unet/segment"] * 2


def test_connection_is_reused(fake: FakeServer, connect: Connect) -> None:
    with connect(fake.url) as client:
        for _ in range(3):
            client.segment(b"image")
            assert fake.open_connections == 1
    assert fake.all_connections == 1


def test_models_and_model_return_json(fake: FakeServer, connect: Connect) -> None:
    fake.respond = lambda request: Reply(body=b'{"path": "%s"}' % request.path.encode())
    with connect(fake.url) as client:
        assert client.models() == {"path": "/models"}
        assert client.model("nuclei") == {"path": "/models/nuclei"}
        assert client.model("a/b é") == {"path": "/models/a%2Fb%20%C3%A9"}


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b""])
def test_models_of_another_server_are_an_error(
    fake: FakeServer, connect: Connect, body: bytes
) -> None:
    fake.respond = lambda _: Reply(body=body)
    with connect(fake.url) as client, pytest.raises(SegmentationError, match="is it unet-server"):
        client.models()


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b'{"detail": "not an image"}', "not an image"),
        (b"<html>proxy</html>", "<html>proxy</html>"),
        (b"", "Unprocessable"),
        (b"[]", "[]"),
    ],
)
def test_error_response_raises_segmentation_error(
    fake: FakeServer, connect: Connect, body: bytes, detail: str
) -> None:
    fake.respond = lambda _: Reply(422, {"X-Request-ID": "id-1"}, body)
    with connect(fake.url) as client, pytest.raises(SegmentationError) as caught:
        client.segment(b"image")
    assert len(fake.requests) == 1
    assert (caught.value.status, caught.value.request_id) == (422, "id-1")
    assert caught.value.detail.startswith(detail)


def test_error_without_a_body_has_the_phrase_that_was_sent(
    fake: FakeServer, connect: Connect
) -> None:
    head = b"HTTP/1.1 422 Unprocessable Content\r\nContent-Length: 0\r\n\r\n"
    fake.respond = lambda _: Reply(body=head, raw=True)
    with connect(fake.url) as client, pytest.raises(SegmentationError) as caught:
        client.segment(b"image")
    assert caught.value.detail == "Unprocessable Content"


def test_unreachable_server_raises_connection_failed(connect: Connect) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with (
        connect(url.replace("http://", "http://user:password@")) as client,
        pytest.raises(ConnectionFailed, match=f"cannot reach {url}: ."),
    ):
        client.segment(b"image")


def test_unknown_host_raises_connection_failed(connect: Connect) -> None:
    with (
        connect("http://unet.invalid:8000") as client,
        pytest.raises(ConnectionFailed, match=r"cannot reach http://unet\.invalid:8000: ."),
    ):
        client.models()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not HTTP\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Encoding: gzip\r\n"
        b"Content-Length: 4\r\n\r\nabcd",
    ],
)
def test_broken_response_raises_connection_failed(
    fake: FakeServer, connect: Connect, body: bytes
) -> None:
    fake.respond = lambda _: Reply(body=[body], raw=True)
    with connect(fake.url) as client:
        with pytest.raises(ConnectionFailed):
            client.segment(b"image")
        fake.respond = lambda _: Reply(body=b"mask")
        assert client.segment(b"image").content == b"mask"


def test_compressed_response_is_decompressed(fake: FakeServer, connect: Connect) -> None:
    fake.respond = lambda _: Reply(200, {"Content-Encoding": "gzip"}, gzip.compress(b"mask"))
    with connect(fake.url) as client:
        assert client.segment(b"image").content == b"mask"


def test_large_image_is_sent_in_full(fake: FakeServer, connect: Connect) -> None:
    image = bytes(range(256)) * 40_000
    with connect(fake.url) as client:
        assert client.segment(image).content == image


@pytest.mark.parametrize("create", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("localhost:8000", {}, "invalid server URL 'localhost:8000'; expected, for example, http"),
        ("ftp://host", {}, "invalid server URL"),
        ("http://", {}, "invalid server URL"),
        ("http://host:abc", {}, "invalid server URL 'http://host:abc': "),
        ("http://host", {"timeout": 0}, "timeout must be a positive number of seconds, got 0"),
        ("http://host", {"timeout": float("inf")}, "timeout must be"),
        ("http://host", {"timeout": float("nan")}, "timeout must be"),
        ("http://host", {"key": "line break\n"}, "the API key must be visible ASCII"),
        ("http://host", {"key": "schlüssel"}, "the API key must be visible ASCII"),
    ],
)
def test_invalid_argument_is_rejected_at_construction(
    create: type[Client | AsyncClient], url: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        create(url, **options)  # type: ignore[arg-type]
    assert str(options.get("key", "no key")) not in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "s3cret-Key",
        "a+b/c==",
        "a=b",
        "p@ss",
        "a,b",
        "#a",
        "with space",
        " a",
        "a\n",
        "é",
    ],
)
def test_client_sends_the_keys_that_the_service_accepts(key: str) -> None:
    accepted = True
    try:
        Client("http://host", key=key).close()
    except ValueError:
        accepted = False
    assert accepted == bool(KEY_PATTERN.fullmatch(key))
    assert accepted == (key.isascii() and key == "".join(key.split()))


@pytest.mark.parametrize(
    "error",
    [
        SegmentationError(422, "not an image", "id"),
        SegmentationError(503, "busy"),
        ResponseTimeout("no response"),
        ConnectionFailed("cannot reach it"),
    ],
)
def test_errors_can_be_pickled_and_copied(error: UnetClientError) -> None:
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert vars(twin) == vars(error)


def test_errors_of_a_call_can_be_pickled(fake: FakeServer, connect: Connect) -> None:
    fake.respond = lambda _: Reply(body=[b""], raw=True)
    with connect(fake.url) as client, pytest.raises(ConnectionFailed) as caught:
        client.segment(b"image")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_results_can_be_pickled() -> None:
    result = SegmentationResult(b"mask", httpx.Headers({"X-Mask-Coverage": "0.25"}))
    twin = pickle.loads(pickle.dumps(result))
    assert twin == result
    assert twin.coverage == 0.25


def test_missing_file_raises_os_error(fake: FakeServer, connect: Connect, tmp_path: Path) -> None:
    with connect(fake.url) as client, pytest.raises(FileNotFoundError):
        client.segment(tmp_path / "missing.png")
    assert not fake.requests


def test_both_clients_have_the_same_methods() -> None:
    def methods(client: type) -> set[str]:
        return {name for name in vars(client) if not name.startswith("_")}

    assert methods(Client) == methods(AsyncClient)
    assert len(CLIENTS) == 2
