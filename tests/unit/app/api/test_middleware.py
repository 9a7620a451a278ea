"""The middleware around every request, with applications that fail in all ways."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from starlette.requests import ClientDisconnect

from app import logs
from app.api.middleware import (
    CLIENT_DISCONNECTED,
    AbsoluteTargetMiddleware,
    AccessLogMiddleware,
    LingeringCloseMiddleware,
    MemoryBudgetMiddleware,
    PlainErrorMiddleware,
    ServerErrorMiddleware,
)
from app.inference.budget import Budget
from app.main import create_app
from app.metrics import Metrics
from app.settings import Settings


def call(app: Any, path: str = "/x", **headers: str) -> tuple[list[dict[str, Any]], Metrics]:
    """Send a request to `app` inside the middleware; return the messages that it sends."""
    metrics, sent = Metrics(), []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "client": ("192.0.2.7", 1234),
        "headers": [(key.encode(), value.encode()) for key, value in headers.items()],
    }
    asyncio.run(AccessLogMiddleware(ServerErrorMiddleware(app), metrics)(scope, receive, send))
    return sent, metrics


def count_requests(metrics: Metrics, status: int) -> float | None:
    labels = {"route": "unmatched", "status": str(status)}
    return metrics.registry.get_sample_value("unet_requests_total", labels)


def request(app: Any, method: str, path: str, **headers: str) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(send())


def test_unhandled_exception_is_500_with_id_count_and_log_lines(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ids = []

    class RememberId(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            ids.append(logs.request_id.get())

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise KeyError("internal secret")

    handler = RememberId()
    logging.getLogger("app.access").addHandler(handler)
    with caplog.at_level(logging.INFO):
        sent, metrics = call(broken, **{"x-request-id": "mine"})
    logging.getLogger("app.access").removeHandler(handler)
    assert sent[0]["status"] == 500
    assert dict(sent[0]["headers"])[b"x-request-id"] == b"mine"
    problem = json.loads(sent[1]["body"])
    assert problem["request_id"] == "mine"
    assert "secret" not in problem["detail"]
    assert "internal secret" in caplog.text
    assert ids == ["mine", "mine"]  # the exception, and the line of the request
    assert count_requests(metrics, 500) == 1


def test_log_line_has_client_and_fields_of_the_route(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["state"]["log_fields"]["model"] = "nuclei@0123"
        await send({"type": "http.response.start", "status": 200, "headers": []})

    with caplog.at_level(logging.INFO):
        call(app, "/segment")
    (record,) = caplog.records
    fields = record.fields  # type: ignore[attr-defined]
    assert fields["client"] == "192.0.2.7"
    assert fields["model"] == "nuclei@0123"
    assert (fields["path"], fields["status"]) == ("/segment", 200)
    assert "client=192.0.2.7 model=nuclei@0123" in record.getMessage()


@pytest.mark.parametrize("origins", [("https://lab.example",), ("*",)])
def test_errors_have_cors_headers(origins: tuple[str, ...], tiny: Path) -> None:
    app = create_app(Settings(cors_origins=origins, weights_dir=tiny))

    @app.get("/broken")
    async def broken() -> None:
        raise KeyError("internal secret")

    for path, status in (("/broken", 500), ("/nowhere", 404), ("/readyz", 503), ("/", 200)):
        response = request(app, "GET", path, Origin="https://lab.example")
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] in origins
        assert "X-Request-ID" in response.headers["access-control-expose-headers"]
        assert response.headers["x-request-id"]
        assert response.headers["x-content-type-options"] == "nosniff"
        if status in (404, 500):
            assert response.json()["request_id"] == response.headers["x-request-id"]


def test_preflight_of_another_origin_is_rejected(tiny: Path) -> None:
    app = create_app(Settings(cors_origins=("https://lab.example",), weights_dir=tiny))

    def preflight(origin: str) -> httpx.Response:
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        return request(app, "OPTIONS", "/segment", **headers)

    allowed = preflight("https://lab.example")
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://lab.example"
    rejected = preflight("https://other.example")
    assert rejected.status_code == 400
    assert "access-control-allow-origin" not in rejected.headers
    assert "Origin" in rejected.headers["vary"]
    assert rejected.headers["x-request-id"]
    assert "origin" in rejected.text


def test_request_cancelled_by_the_shutdown_is_503(caplog: pytest.LogCaptureFixture) -> None:
    async def cancelled(scope: Any, receive: Any, send: Any) -> None:
        raise asyncio.CancelledError

    sent, metrics = call(cancelled, **{"x-request-id": "mine"})
    headers = dict(sent[0]["headers"])
    assert sent[0]["status"] == 503
    assert headers[b"content-type"] == b"application/problem+json"
    assert headers[b"x-request-id"] == b"mine"
    assert int(headers[b"retry-after"]) >= 1
    assert json.loads(sent[1]["body"])["request_id"] == "mine"
    assert count_requests(metrics, 503) == 1
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    ("target", "path", "host"),
    [
        (b"http://lab.example/livez", "/livez", b"lab.example"),
        (b"HTTPS://lab.example:8000/a%20b", "/a b", b"lab.example:8000"),
        (b"http://lab.example", "/", b"lab.example"),
        (b"/http://lab.example/livez", "/http://lab.example/livez", b"header.example"),
        (b"*", "*", b"header.example"),
    ],
)
def test_absolute_target_becomes_its_path(target: bytes, path: str, host: bytes) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    scope = {
        "type": "http",
        "path": unquote(target.decode()),
        "raw_path": target,
        "query_string": b"a=http://b/c",
        "headers": [(b"host", b"header.example"), (b"accept", b"*/*")],
    }
    asyncio.run(AbsoluteTargetMiddleware(app)(scope, None, None))  # type: ignore[arg-type]
    assert seen[0]["path"] == path
    assert seen[0]["query_string"] == b"a=http://b/c"
    assert sorted(seen[0]["headers"]) == [(b"accept", b"*/*"), (b"host", host)]


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/static/app.js", "/static"),
        ("/static/nothing/there.js", "/static"),
        ("/livez", "/livez"),
        ("/openapi.json", "/openapi.json"),
        ("/staticity", "unmatched"),
    ],
)
def test_requests_are_counted_by_route(path: str, route: str, tiny: Path) -> None:
    app = create_app(Settings(weights_dir=tiny))
    status = request(app, "GET", path).status_code
    registry = app.state.service.metrics.registry
    labels = {"route": route, "status": str(status)}
    assert registry.get_sample_value("unet_requests_total", labels) == 1
    labels["status"] = f"{status // 100}xx"
    assert registry.get_sample_value("unet_request_seconds_count", labels) == 1


@pytest.mark.parametrize("path", ["/", "/docs", "/favicon.ico", "/static/app.js"])
def test_static_files_are_revalidated(path: str, tiny: Path) -> None:
    app = create_app(Settings(weights_dir=tiny))
    first = request(app, "GET", path)
    assert (first.status_code, first.headers["cache-control"]) == (200, "no-cache")
    second = request(app, "GET", path, **{"If-None-Match": first.headers["etag"]})
    assert (second.status_code, second.headers["cache-control"]) == (304, "no-cache")


def test_client_disconnect_is_not_an_error(caplog: pytest.LogCaptureFixture) -> None:
    async def disconnected(scope: Any, receive: Any, send: Any) -> None:
        raise ClientDisconnect

    sent, metrics = call(disconnected)
    assert sent == []
    assert count_requests(metrics, CLIENT_DISCONNECTED) == 1
    assert "Traceback" not in caplog.text


def test_exception_after_the_head_of_the_response_reaches_the_server() -> None:
    async def half(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise EOFError

    with pytest.raises(EOFError):
        call(half)


@pytest.mark.parametrize(("max_bytes", "dropped", "closes"), [(1000, 50, False), (25, 30, True)])
def test_rest_of_a_rejected_body_is_read_within_bounds(
    max_bytes: int, dropped: int, closes: bool
) -> None:
    remaining = 50
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        nonlocal remaining
        remaining -= 10
        return {"type": "http.request", "body": b"." * 10, "more_body": remaining > 0}

    async def send(message: Any) -> None:
        sent.append(message)

    async def reject(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 413, "headers": []})

    scope = {"type": "http", "headers": [(b"content-length", b"50")]}
    asyncio.run(LingeringCloseMiddleware(reject, max_bytes=max_bytes)(scope, receive, send))
    assert 50 - remaining == dropped
    assert ((b"connection", b"close") in sent[0]["headers"]) == closes


def test_response_is_complete_before_more_of_a_rejected_body_is_read() -> None:
    events: list[str] = []

    async def receive() -> dict[str, Any]:
        events.append("read")
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b".", "more_body": True}

    async def send(message: Any) -> None:
        events.append(f"{message['type'].rpartition('.')[2]} {message.get('more_body')}")

    async def reject(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 413, "headers": []})
        await send({"type": "http.response.body", "body": b"too large"})

    middleware = LingeringCloseMiddleware(reject, seconds=0.05, seconds_after=0.05)
    asyncio.run(
        middleware({"type": "http", "headers": [(b"content-length", b"50")]}, receive, send)
    )
    sent = [event for event in events if event != "read"]
    assert sent == ["start None", "body True", "body False"]
    assert events.index("body True") < len(events) - 2  # bytes are read in between
    assert events[-1] == "body False"


def test_response_is_sent_in_chunks_while_it_is_allocated() -> None:
    budget = Budget(100, "bytes", lambda: None)
    used: list[tuple[bytes, float]] = []

    async def send(message: Any) -> None:
        used.append((message["body"], budget.used))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["state"]["allocation"].grow(10)
        await send({"type": "http.response.body", "body": b"0123456789"})

    middleware = MemoryBudgetMiddleware(app, budget, chunk_bytes=4)
    asyncio.run(middleware({"type": "http"}, None, send))  # type: ignore[arg-type]
    assert used == [(b"0123", 10), (b"4567", 10), (b"89", 10)]
    assert budget.used == 0


def test_error_in_plain_text_becomes_a_problem_document() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/plain"), (b"content-range", b"bytes */9")]
        await send({"type": "http.response.start", "status": 416, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    (start, body), _ = call(PlainErrorMiddleware(app))
    headers = dict(start["headers"])
    assert start["status"] == 416
    assert headers[b"content-type"] == b"application/problem+json"
    assert headers[b"content-range"] == b"bytes */9"
    assert int(headers[b"content-length"]) == len(body["body"])
    assert json.loads(body["body"])["detail"] == "Range Not Satisfiable"


@pytest.mark.parametrize(("value", "status"), [("bytes=junk", 400), ("bytes=9999999-", 416)])
def test_bad_range_of_a_static_file_is_a_problem(value: str, status: int) -> None:
    answer = request(create_app(Settings()), "GET", "/static/icon.svg", Range=value)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == status
