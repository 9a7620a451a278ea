"""ASGI middleware around every request: its id, log line and metrics, safe headers, limits.

Pure ASGI: anything that buffered a response would hide from a route that its client disconnected.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.problems import describe_status, problem_response
from app.inference.budget import Budget
from app.logs import request_id, trace_ids
from app.metrics import Metrics

if TYPE_CHECKING:
    from app.tracing.spans import RequestTrace, Tracing

log = logging.getLogger("app.access")

CLIENT_DISCONNECTED = 499
"""Logged and counted for a request whose client disconnected before its response (nginx's code)."""
UNMATCHED = "unmatched"
"""The route of a request that matches none."""
RESPONSE_STATUS_KEY = "response_status"
"""In a request's state: the status of a response that the connection sent, not the application."""

_VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._~:/+=-]{1,128}")
_ABSOLUTE_TARGET = re.compile(rb"https?://([^/]+)(/.*)?", re.IGNORECASE)
_MAX_PATH = 200
"""Characters of a path that are logged."""
PROBE_PATHS = (
    "/livez",
    "/readyz",
    "/startupz",
    "/healthz",
    "/metrics",
    "/v2/health/live",
    "/v2/health/ready",
)
"""Logged at debug level unless they fail: they are polled all the time."""

_SAFE_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
# Swagger UI has icons in its style sheet (data:) and shows image responses (blob:).
_DOCS_POLICY = _POLICY.replace("img-src 'self'", "img-src 'self' blob: data:")
_CONTENT_SECURITY_POLICIES = {"/": _POLICY, "/docs": _DOCS_POLICY}


_OF_CONTENT = ("content-type", "content-length")
"""Fields of a response that describe its content (RFC 9110, section 8)."""


class LingeringCloseMiddleware:
    """Reads the rest of a rejected request's body before the response is sent.

    If a server closes the connection while the client still sends, the client sees a broken pipe
    instead of the response. The rest is read and dropped, up to a limit. A client that sends more
    gets the response, and has some more time to receive it before the connection is closed.

    Args:
        seconds: to read the rest for at most.
        seconds_after: to read more of it once the response is sent.
        max_bytes: of the rest, each time.
    """

    def __init__(
        self,
        app: ASGIApp,
        seconds: float = 5.0,
        seconds_after: float = 2.0,
        max_bytes: int = 256_000_000,
    ) -> None:
        self.app = app
        self.seconds = seconds
        self.seconds_after = seconds_after
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        has_body = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        # A client that waits for "100 Continue" has not sent its body, and need not.
        unread = has_body and headers.get(b"expect", b"").lower() != b"100-continue"

        async def receive_tracked() -> Message:
            nonlocal unread
            message = await receive()
            unread = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def drop_rest(seconds: float) -> None:
            remaining = self.max_bytes
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while unread and remaining > 0:
                        message = await receive_tracked()
                        remaining -= len(message.get("body", b""))

        async def send_after_body(message: Message) -> None:
            if unread and message["type"] == "http.response.start":
                await drop_rest(self.seconds)
                if unread:
                    MutableHeaders(scope=message)["Connection"] = "close"
            elif unread and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await drop_rest(self.seconds_after)
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        await self.app(scope, receive_tracked, send_after_body)


class MemoryBudgetMiddleware:
    """Gives every request an allocation of the memory budget.

    The allocation is freed when the client has received the response. The response is sent in
    chunks, each after the previous one was sent, so that a client that does not read still counts.

    Args:
        budget: of the bytes that all requests together may hold.
        chunk_bytes: of a response.
    """

    def __init__(self, app: ASGIApp, budget: Budget, chunk_bytes: int = 256 * 1024) -> None:
        self.app = app
        self.budget = budget
        self.chunk_bytes = chunk_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_chunks(message: Message) -> None:
            if len(message.get("body", b"")) > self.chunk_bytes:
                body = memoryview(message["body"])
                while len(body) > self.chunk_bytes:
                    chunk, body = body[: self.chunk_bytes], body[self.chunk_bytes :]
                    await send({"type": message["type"], "body": bytes(chunk), "more_body": True})
                message = {**message, "body": bytes(body)}
            await send(message)

        with self.budget.allocate() as allocation:
            scope.setdefault("state", {})["allocation"] = allocation
            await self.app(scope, receive, send_chunks)


class ServerErrorMiddleware:
    """Answers 500 for an unhandled exception, and 503 for a request that the shutdown cancels.

    It runs inside the middleware that adds headers. Without the CORS headers, for example, a script
    of another origin would see a network error instead of the problem document.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_tracked(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, send_tracked)
        except ClientDisconnect:
            pass  # no one receives a response
        except asyncio.CancelledError:  # only the server cancels requests: the drain timed out
            if scope["type"] != "http":
                raise
            if not started:
                detail = "the service stopped before this request was done; retry in a moment"
                headers = {"Retry-After": "2", "Connection": "close"}
                response = problem_response(Request(scope), 503, detail, headers)
                await response(scope, receive, send)
        except Exception:
            log.exception("unhandled exception")
            if started or scope["type"] != "http":
                raise  # the connection is closed
            detail = "internal error; see the server log for this request id"
            await problem_response(Request(scope), 500, detail)(scope, receive, send)


class PlainErrorMiddleware:
    """Turns errors in plain text into problem documents.

    Starlette's static files, for example, answer a malformed Range header in plain text.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message | None = None

        async def send_problem(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and _is_plain_error(message):
                start = message
            elif start is None:
                await send(message)
            else:
                detail = message.get("body", b"").decode("utf-8", "replace")
                headers = Headers(raw=start["headers"]).items()
                kept = {name: value for name, value in headers if name not in _OF_CONTENT}
                status, start = start["status"], None
                title = describe_status(status)
                await problem_response(Request(scope), status, detail or title, kept)(
                    scope, receive, send
                )

        await self.app(scope, receive, send_problem)


def _is_plain_error(message: Message) -> bool:
    if message["status"] < 400:
        return False
    return Headers(raw=message["headers"]).get("content-type", "").startswith("text/plain")


class AbsoluteTargetMiddleware:
    """Turns an absolute target, `GET http://host/path`, into its path.

    Servers must accept this form, and its host replaces the header's (RFC 9112, section 3.2.2).
    Uvicorn passes the whole URL on as the path, which matches no route.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        absolute = _ABSOLUTE_TARGET.fullmatch(scope.get("raw_path") or b"")
        if absolute:
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
    """Gives every response its id and standard headers, counts the request and logs it.

    Args:
        tracing: makes the traces of requests, if there are any. Probes have none.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self.app = app
        self.metrics = metrics
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.tracing is None or scope["path"] in PROBE_PATHS:
            await self._serve(scope, receive, send)
            return
        trace = self.tracing.find_request()
        token = trace_ids.set(trace.ids)
        try:
            await self._serve(scope, receive, send, trace)
        finally:
            trace_ids.reset(token)

    async def _serve(
        self, scope: Scope, receive: Receive, send: Send, trace: RequestTrace | None = None
    ) -> None:
        identifier = assign_request_id(scope)
        token = request_id.set(identifier)
        start = time.perf_counter()
        status = CLIENT_DISCONNECTED
        method, path = scope["method"], scope["path"][:_MAX_PATH]
        fields: dict[str, Any] = {}
        scope["state"]["log_fields"] = fields
        if scope.get("client"):
            fields["client"] = scope["client"][0]
        if method == "HEAD":  # answered as GET; the server omits the body
            scope = {**scope, "method": "GET"}

        async def send_observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                add_standard_headers(headers, identifier)
                if trace is not None:
                    headers["traceresponse"] = trace.header
                    trace.describe({"request_id": identifier, **fields})  # it ends soon
                if scope["path"] in _CONTENT_SECURITY_POLICIES:
                    headers["Content-Security-Policy"] = _CONTENT_SECURITY_POLICIES[scope["path"]]
            await send(message)

        try:
            await self.app(scope, receive, send_observed)
        finally:
            seconds = time.perf_counter() - start
            status = scope["state"].get(RESPONSE_STATUS_KEY, status)
            route = _route_template(scope)
            record_request(self.metrics, method, path, route, status, seconds, fields)
            request_id.reset(token)


def assign_request_id(scope: Scope) -> str:
    """Return the id of a request, and store it: the client's X-Request-ID if that is valid."""
    state: dict[str, str] = scope.setdefault("state", {})
    if "request_id" not in state:
        given = Headers(scope=scope).get("x-request-id", "")
        state["request_id"] = given if _VALID_REQUEST_ID.fullmatch(given) else os.urandom(16).hex()
    return state["request_id"]


def add_standard_headers(headers: MutableHeaders, identifier: str) -> None:
    """Add the headers that every response has; no response has them before."""
    headers.raw.append((b"x-request-id", identifier.encode()))
    headers.raw.extend(_SAFE_HEADERS)


def record_request(
    metrics: Metrics,
    method: str,
    path: str,
    route: str,
    status: int,
    seconds: float,
    fields: Mapping[str, Any],
) -> None:
    """Count a request that ended, and log it.

    Args:
        route: the template of its path, or `UNMATCHED`.
        fields: added to the log line: client, model, size of the image.
    """
    metrics.count_request(route, status, seconds)
    quiet = route in PROBE_PATHS and status < 500
    details = "".join(f" {key}={value}" for key, value in fields.items())
    log.log(
        logging.DEBUG if quiet else logging.INFO,
        "%s %s %d %.0f ms%s",
        method,
        path,
        status,
        seconds * 1000,
        details,
        extra={
            "fields": {
                "method": method,
                "path": path,
                "status": status,
                "milliseconds": round(seconds * 1000, 1),
                **fields,
            }
        },
    )


def _route_template(scope: Scope) -> str:
    """The template of the route that matched, such as `/models/{name}`, never the path itself: a
    client must not choose the labels of a metric."""
    template = getattr(scope.get("route"), "path", None)
    return template or scope.get("root_path") or UNMATCHED  # root_path: of a mounted application
