"""The middleware of Ray Serve's proxy: its errors look like those of the service."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from deploy.ray.proxy import ProblemMiddleware, make_middlewares, parse_deadline


def answer(
    status: int, body: bytes, content_type: str = "text/plain; charset=utf-8", **headers: str
) -> ASGIApp:
    """A proxy that gives one response, and adds the id of its request to it, as Ray Serve does."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        received = dict(scope["headers"])
        raw = [
            (b"content-type", content_type.encode()),
            (b"x-request-id", received[b"x-request-id"]),
            (b"x-request-id", received[b"x-request-id"]),
            (b"x-seen-deadline", received.get(b"x-request-timeout-seconds", b"none")),
            *((name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()),
        ]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": body})

    return app


async def give_no_answer(scope: Scope, receive: Receive, send: Send) -> None:
    """The proxy when a replica died."""


def request(
    app: ASGIApp, path: str = "/segment", headers: dict[str, str] | None = None
) -> httpx.Response:
    async def scene() -> httpx.Response:
        (middleware,) = make_middlewares()
        transport = httpx.ASGITransport(middleware.cls(app, *middleware.args, **middleware.kwargs))
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(scene())


def test_a_request_whose_replica_died_is_answered_with_503() -> None:
    response = request(give_no_answer, headers={"X-Request-ID": "mine"})
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "1"
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers.get_list("X-Request-ID") == ["mine"]
    assert response.json()["detail"].startswith("the replica that processed this request ended")
    assert response.json()["request_id"] == "mine"


@pytest.mark.parametrize(
    ("status", "retry_after", "expected", "after"),
    [(429, "7", 429, "7"), (503, "", 503, "1"), (408, "", 504, None), (404, "", 404, None)],
)
def test_errors_of_the_proxy_are_problem_documents(
    status: int, retry_after: str, expected: int, after: str | None
) -> None:
    headers = {"retry_after": retry_after} if retry_after else {}
    response = request(answer(status, b"the reason", **headers))
    assert response.status_code == response.json()["status"] == expected
    assert response.json()["detail"] == "the reason"
    assert response.headers.get("Retry-After") == after
    assert len(response.headers.get_list("X-Request-ID")) == 1


def test_responses_of_the_service_stay_as_they_are() -> None:
    problem = request(answer(422, b'{"status":422}', "application/problem+json"))
    assert (problem.status_code, problem.content) == (422, b'{"status":422}')
    metrics = request(answer(200, b"unet_ready 1", "text/plain; version=0.0.4"))
    assert (metrics.status_code, metrics.content) == (200, b"unet_ready 1")
    assert len(metrics.headers.get_list("X-Request-ID")) == 1


def test_routes_of_the_proxy_stay_as_they_are() -> None:
    response = request(answer(503, b"draining"), "/-/healthz", {"X-Request-ID": "mine"})
    assert (response.status_code, response.content) == (503, b"draining")


def test_an_invalid_request_id_is_replaced() -> None:
    response = request(answer(200, b"", "image/png"), headers={"X-Request-ID": "a b"})
    (identifier,) = response.headers.get_list("X-Request-ID")
    assert len(identifier) == 32


def test_the_proxy_knows_the_deadline_of_a_request() -> None:
    ok = answer(200, b"", "image/png")
    given = request(ok, headers={"X-Request-Timeout": "2.5"})
    assert given.headers["X-Seen-Deadline"] == "3.5"
    assert request(ok).headers["X-Seen-Deadline"] == "none"


@pytest.mark.parametrize("value", ["", "soon", "0", "-1", "inf", "nan"])
def test_deadlines_that_the_service_rejects_are_left_to_it(value: str) -> None:
    assert parse_deadline(value) is None


def test_the_middleware_passes_other_protocols() -> None:
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    asyncio.run(ProblemMiddleware(app)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]
