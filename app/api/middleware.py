"""What happens around every request: its id, its line in the log, its count, safe headers.

Pure ASGI, since anything that buffers would hide from a handler that its client has left.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from contextlib import suppress
from urllib.parse import unquote

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.problems import problem
from app.inference.budget import Budget
from app.logs import request_id
from app.metrics import Metrics

log = logging.getLogger("app.access")

CLIENT_LEFT = 499
"""Logged and counted for a request whose client left before the answer (nginx's number)."""
UNMATCHED = "unmatched"
"""The route of a request that has none."""
ANSWERED = "answered"
"""In a request's state: the status by which its connection has answered, before the application."""

_SANE_ID = re.compile(r"[A-Za-z0-9._~:/+=-]{1,128}")
_ABSOLUTE = re.compile(rb"https?://([^/]+)(/.*)?", re.IGNORECASE)
_LONGEST_PATH = 200
_QUIET = (
    "/livez",
    "/readyz",
    "/startupz",
    "/healthz",
    "/metrics",
    "/v2/health/live",
    "/v2/health/ready",
)

_SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_PAGES = ("/", "/docs")
_PAGE_POLICY = (
    "connect-src 'self'; img-src 'self' blob: data:; style-src 'self'; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'self'"
)


class LingeringCloseMiddleware:
    """Lets a client finish sending before it is told that its request is refused.

    A server that closes the connection while the client still sends makes the client see a broken
    pipe instead of the answer. What is left of the body is read and dropped, within bounds;
    beyond them the connection is closed.
    """

    seconds = 5.0
    max_bytes = 256_000_000

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        # A client that waits for "100 Continue" has sent nothing yet, and need not.
        unread = headers.get("expect", "").lower() != "100-continue" and (
            "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
        )

        async def heard() -> Message:
            nonlocal unread
            message = await receive()
            unread = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def answer(message: Message) -> None:
            if unread and message["type"] == "http.response.start":
                left = self.max_bytes
                with suppress(TimeoutError):
                    async with asyncio.timeout(self.seconds):
                        while unread and left > 0:
                            left -= len((await heard()).get("body", b""))
                if unread:
                    MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        await self.app(scope, heard, answer)


class MemoryBudgetMiddleware:
    """Gives every request its share of the bytes that all may hold, from the first of its upload
    until its client has taken the answer.

    The answer leaves in pieces, each when the one before has gone, so that a client that reads
    nothing is still known to hold it.
    """

    piece = 256 * 1024

    def __init__(self, app: ASGIApp, budget: Budget) -> None:
        self.app = app
        self.budget = budget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            body = memoryview(message.get("body", b""))
            while len(body) > self.piece:
                part, body = body[: self.piece], body[self.piece :]
                await send({"type": message["type"], "body": bytes(part), "more_body": True})
            await send({**message, "body": bytes(body)} if body else message)

        with self.budget.share() as share:
            scope.setdefault("state", {})["share"] = share
            await self.app(scope, receive, sent)


class Cors(CORSMiddleware):
    """Starlette's, but it refuses with a problem document, as everything else here."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        refused = Request({"type": "http", "state": {"request_id": request_id.get()}})
        text = f"{bytes(response.body).decode()}; UNET_CORS_ORIGINS says whose pages may ask"
        vary = {"Vary": response.headers["Vary"]}
        return problem(refused, response.status_code, text, vary)


class ServerErrorMiddleware:
    """Answers 500 for an error of ours, and 503 where the server ends before the answer is there.

    Inside whatever gives headers to answers, so that this one has them too: without those of CORS,
    another page's script would be told of a broken network, and not of the problem.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def sent(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, sent)
        except ClientDisconnect:
            pass  # there is nobody to answer
        except asyncio.CancelledError:  # of a request: by the server alone, which waits no longer
            if scope["type"] != "http":
                raise
            if not begun:
                text = "the service stopped before this was done; send it again in a moment"
                headers = {"Retry-After": "2", "Connection": "close"}
                await problem(Request(scope), 503, text, headers)(scope, receive, send)
        except Exception:
            log.exception("an error of ours")
            if begun or scope["type"] != "http":  # all that is left is to hang up
                raise
            text = "an error of ours; the log knows more under the request's id"
            await problem(Request(scope), 500, text)(scope, receive, send)


def identify(scope: Scope) -> str:
    """The request's id, from now on: its client's own if that is sane."""
    state: dict[str, str] = scope.setdefault("state", {})
    if "request_id" not in state:
        given = Headers(scope=scope).get("x-request-id", "")
        state["request_id"] = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
    return state["request_id"]


def mark(headers: MutableHeaders, identifier: str) -> None:
    """Give an answer the headers that each of them has."""
    headers["X-Request-ID"] = identifier
    for name, value in _SAFE_HEADERS.items():
        headers[name] = value


def account(
    metrics: Metrics, method: str, path: str, route: str, status: int, seconds: float
) -> None:
    """Count a request, and write its line into the log."""
    metrics.requests.labels(route, str(status)).inc()
    metrics.request_seconds.labels(route).observe(seconds)
    log.log(
        logging.DEBUG if route in _QUIET and status < 500 else logging.INFO,
        "%s %s %d %.0f ms",
        method,
        path,
        status,
        seconds * 1000,
        extra={
            "fields": {
                "method": method,
                "path": path,
                "status": status,
                "milliseconds": round(seconds * 1000, 1),
            }
        },
    )


class AbsoluteTargetMiddleware:
    """Takes a target with scheme and host, `GET http://host/path`, as the path alone. A client may
    send it to any server, and what it says of the host wins (RFC 9112, section 3.2.2)."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if absolute := _ABSOLUTE.fullmatch(scope.get("raw_path") or b""):
            host, path = absolute[1], absolute[2] or b"/"
            others = [(name, value) for name, value in scope["headers"] if name != b"host"]
            scope = {
                **scope,
                "raw_path": path,
                "path": unquote(path.decode("ascii")),
                "headers": [*others, (b"host", host)],
            }
        await self.app(scope, receive, send)


class AccessLogMiddleware:
    """Wraps the whole application: what comes out of it has its id, and is counted and logged."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        identifier = identify(scope)
        token = request_id.set(identifier)
        start = time.perf_counter()
        status = CLIENT_LEFT
        method, path = scope["method"], scope["path"][:_LONGEST_PATH]
        if method == "HEAD":  # is a GET; the server below leaves the body out
            scope = {**scope, "method": "GET"}

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                mark(headers, identifier)
                if scope["path"] in _PAGES:
                    headers["Content-Security-Policy"] = _PAGE_POLICY
            await send(message)

        try:
            await self.app(scope, receive, observed)
        finally:
            seconds = time.perf_counter() - start
            # The route's template, never the path: a client must not choose a metric's labels.
            route = getattr(scope.get("route"), "path", None)
            route = route or scope.get("root_path") or UNMATCHED  # where a mount took over
            status = scope["state"].get(ANSWERED, status)
            account(self.metrics, method, path, route, status, seconds)
            request_id.reset(token)
