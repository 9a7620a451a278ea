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

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.logs import request_id
from app.metrics import Metrics

log = logging.getLogger("app.access")

CLIENT_LEFT = 499
"""Logged and counted for a request whose client left before the answer (nginx's number)."""

_SANE_ID = re.compile(r"[A-Za-z0-9._~:/+=-]{1,128}")
_QUIET = ("/livez", "/readyz", "/startupz", "/healthz", "/metrics")

_SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_PAGE_POLICY = (
    "connect-src 'self'; img-src 'self' blob: data:; style-src 'self'; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'self'"
)


class HearOut:
    """Lets a client finish sending before it is told that its request is refused.

    A server that closes the connection while the client still sends makes the client see a broken
    pipe instead of the answer. What is left of the body is read and dropped, within bounds.
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
            await send(message)

        await self.app(scope, heard, answer)


class Observe:
    """Wraps the whole application."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        identifier = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = identifier
        token = request_id.set(identifier)
        start = time.perf_counter()
        status = CLIENT_LEFT

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = identifier
                for name, value in _SAFE_HEADERS.items():
                    headers[name] = value
                if scope["path"] == "/":
                    headers["Content-Security-Policy"] = _PAGE_POLICY
            await send(message)

        try:
            await self.app(scope, receive, observed)
        finally:
            seconds = time.perf_counter() - start
            # The route's template, never the path: a client must not choose a metric's labels.
            route = getattr(scope.get("route"), "path", None) or "unmatched"
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.request_seconds.labels(route).observe(seconds)
            log.log(
                logging.DEBUG if route in _QUIET and status < 500 else logging.INFO,
                "%s %s %d %.0f ms",
                scope["method"],
                scope["path"],
                status,
                seconds * 1000,
                extra={
                    "fields": {
                        "method": scope["method"],
                        "path": scope["path"],
                        "status": status,
                        "milliseconds": round(seconds * 1000, 1),
                    }
                },
            )
            request_id.reset(token)
