"""Errors of Ray Serve's HTTP proxy as problem documents, like all errors of the service.

The environment of every node names this module:

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deploy.ray.proxy:make_middlewares

Ray Serve's proxy answers a request whose replica died with a bare 500. Here it is 503 with
Retry-After: segmenting the image again does no harm, and clients repeat such requests.
"""

from __future__ import annotations

import math

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.middleware import add_standard_headers, assign_request_id
from app.api.problems import problem_response

_OWN_PATHS = "/-/"
"""Routes of the proxy itself, such as /-/healthz."""
_DEADLINE, _PROXY_DEADLINE = "X-Request-Timeout", "x-request-timeout-seconds"
"""A client's deadline, as the service reads it and as Ray Serve's proxy does."""
_MARGIN_S = 1.0
"""By which the replica's own deadline comes first: its error says more."""
_RETRY_SECONDS = "1"
_STATUS = {408: 504}
"""The proxy's status of a deadline that passed, and the service's."""
_LOST = "the replica that processed this request ended; send it again"


def make_middlewares() -> list[Middleware]:
    """The middleware that Ray Serve puts around its proxy."""
    return [Middleware(ProblemMiddleware)]


class ProblemMiddleware:
    """Turns the proxy's own errors, which are plain text, into problem documents (RFC 9457)."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(_OWN_PATHS):
            await self.app(scope, receive, send)
            return
        identifier = assign_request_id(scope)
        headers = MutableHeaders(scope=scope)
        headers["X-Request-ID"] = identifier  # for the proxy and the replica
        if seconds := parse_deadline(headers.get(_DEADLINE, "")):
            headers[_PROXY_DEADLINE] = str(seconds + _MARGIN_S)  # while no replica has room, too
        error: Message | None = None
        started = False
        text = b""

        async def send_observed(message: Message) -> None:
            nonlocal error, started, text
            if message["type"] == "http.response.start":
                started = True
                if is_proxy_error(message):
                    error = message
                    return
                # The proxy and the replica both add it.
                MutableHeaders(scope=message)["X-Request-ID"] = identifier
            elif error is not None:
                text += message.get("body", b"")
                return
            await send(message)

        async def send_problem(status: int, detail: str, headers: dict[str, str]) -> None:
            response = problem_response(Request(scope), status, detail, headers)
            add_standard_headers(response.headers, identifier)
            await response(scope, receive, send)

        await self.app(scope, receive, send_observed)
        if error is not None:
            status: int = error["status"]
            await send_problem(
                _STATUS.get(status, status), text.decode(errors="replace"), retry(error)
            )
        elif not started:
            await send_problem(503, _LOST, {"Retry-After": _RETRY_SECONDS})


def is_proxy_error(start: Message) -> bool:
    """Whether a response is an error of the proxy: the service's own are never plain text."""
    content_type = Headers(raw=start["headers"]).get("content-type", "")
    return start["status"] >= 400 and content_type.startswith("text/plain")


def retry(start: Message) -> dict[str, str]:
    """The header that says when to send a request again, if a later one can succeed."""
    if start["status"] not in (429, 503):
        return {}
    return {"Retry-After": Headers(raw=start["headers"]).get("retry-after", _RETRY_SECONDS)}


def parse_deadline(value: str) -> float | None:
    """The seconds that a client gives a request; None if the replica will reject the value."""
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if 0 < seconds < math.inf else None
