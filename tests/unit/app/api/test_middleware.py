"""What surrounds every request, around applications that misbehave."""

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
    CLIENT_LEFT,
    AbsoluteTargetMiddleware,
    AccessLogMiddleware,
    ServerErrorMiddleware,
)
from app.main import create_app
from app.metrics import Metrics
from app.settings import Settings


def call(app: Any, path: str = "/x", **headers: str) -> tuple[list[dict[str, Any]], Metrics]:
    """What `app` inside the middleware sends."""
    metrics, sent = Metrics(), []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "headers": [(key.encode(), value.encode()) for key, value in headers.items()],
    }
    asyncio.run(AccessLogMiddleware(ServerErrorMiddleware(app), metrics)(scope, receive, send))
    return sent, metrics


def counted(metrics: Metrics, status: int) -> float | None:
    labels = {"route": "unmatched", "status": str(status)}
    return metrics.registry.get_sample_value("unet_requests_total", labels)


def test_a_bug_of_ours_has_an_id_a_count_and_its_lines_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ids = []

    class Remember(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            ids.append(logs.request_id.get())

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise KeyError("secret of ours")

    handler = Remember()
    logging.getLogger("app.access").addHandler(handler)
    with caplog.at_level(logging.INFO):
        sent, metrics = call(broken, **{"x-request-id": "mine"})
    logging.getLogger("app.access").removeHandler(handler)
    assert sent[0]["status"] == 500
    assert dict(sent[0]["headers"])[b"x-request-id"] == b"mine"
    problem = json.loads(sent[1]["body"])
    assert problem["request_id"] == "mine"
    assert "secret" not in problem["detail"]
    assert "secret of ours" in caplog.text
    assert ids == ["mine", "mine"]  # the error, and the line of the request
    assert counted(metrics, 500) == 1


async def ask(app: Any, method: str, path: str, **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
        return await client.request(method, path, headers=headers)


@pytest.mark.parametrize("origins", [("https://lab.example",), ("*",)])
def test_another_page_may_read_of_a_bug_of_ours(origins: tuple[str, ...], tiny: Path) -> None:
    app = create_app(Settings(cors_origins=origins, weights_dir=tiny))

    @app.get("/broken")
    async def broken() -> None:
        raise KeyError("secret of ours")

    for path, status in (("/broken", 500), ("/nowhere", 404), ("/readyz", 503), ("/", 200)):
        answer = asyncio.run(ask(app, "GET", path, Origin="https://lab.example"))
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] in origins
        assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
        assert answer.headers["x-request-id"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        if status in (404, 500):
            assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_a_page_that_may_not_ask_is_told_so_with_a_problem(tiny: Path) -> None:
    app = create_app(Settings(cors_origins=("https://lab.example",), weights_dir=tiny))

    def preflight(origin: str) -> httpx.Response:
        wanted = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        return asyncio.run(ask(app, "OPTIONS", "/segment", **wanted))

    allowed = preflight("https://lab.example")
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://lab.example"
    refused = preflight("https://other.example")
    assert refused.status_code == 400
    assert refused.headers["content-type"] == "application/problem+json"
    assert "access-control-allow-origin" not in refused.headers
    assert "Origin" in refused.headers["vary"]
    assert refused.json()["request_id"] == refused.headers["x-request-id"]
    assert "origin" in refused.json()["detail"]


def test_a_server_that_ends_says_so(caplog: pytest.LogCaptureFixture) -> None:
    async def cancelled(scope: Any, receive: Any, send: Any) -> None:
        raise asyncio.CancelledError

    sent, metrics = call(cancelled, **{"x-request-id": "mine"})
    headers = dict(sent[0]["headers"])
    assert sent[0]["status"] == 503
    assert headers[b"content-type"] == b"application/problem+json"
    assert headers[b"x-request-id"] == b"mine"
    assert int(headers[b"retry-after"]) >= 1
    assert json.loads(sent[1]["body"])["request_id"] == "mine"
    assert counted(metrics, 503) == 1
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
def test_a_target_with_its_host_is_its_path(target: bytes, path: str, host: bytes) -> None:
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
        ("/staticity", "unmatched"),
    ],
)
def test_requests_are_counted_by_their_route(path: str, route: str, tiny: Path) -> None:
    app = create_app(Settings(weights_dir=tiny))
    status = str(asyncio.run(ask(app, "GET", path)).status_code)
    registry = app.state.service.metrics.registry
    labels = {"route": route, "status": status}
    assert registry.get_sample_value("unet_requests_total", labels) == 1


@pytest.mark.parametrize("path", ["/", "/docs", "/favicon.ico", "/static/app.js"])
def test_a_browser_asks_whether_the_page_is_still_the_same(path: str, tiny: Path) -> None:
    app = create_app(Settings(weights_dir=tiny))
    first = asyncio.run(ask(app, "GET", path))
    assert (first.status_code, first.headers["cache-control"]) == (200, "no-cache")
    tag = {"If-None-Match": first.headers["etag"]}
    second = asyncio.run(ask(app, "GET", path, **tag))
    assert (second.status_code, second.headers["cache-control"]) == (304, "no-cache")


def test_a_client_that_left_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async def left(scope: Any, receive: Any, send: Any) -> None:
        raise ClientDisconnect

    sent, metrics = call(left)
    assert sent == []
    assert counted(metrics, CLIENT_LEFT) == 1
    assert "Traceback" not in caplog.text


def test_an_answer_that_breaks_off_is_left_to_the_server() -> None:
    async def half(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise EOFError

    with pytest.raises(EOFError):
        call(half)


def test_a_line_of_text_stays_a_line() -> None:
    record = logging.LogRecord(
        "x", logging.INFO, "", 0, "GET %s", ("/\n00:00 ERROR \x1b[2J\x9b",), None
    )
    line = logs.TextFormatter().format(record)
    assert len(line.splitlines()) == 1
    assert not {"\x1b", "\x9b"} & set(line)
    assert "\\n00:00 ERROR \\x1b" in line
