"""Errors -> HTTP: the only table that knows both. Every error is a problem document (RFC 9457)."""

from __future__ import annotations

import http.client
import logging
import math

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from app import errors
from app.api.validation import describe_validation_error

log = logging.getLogger(__name__)

STATUS: dict[type[errors.ServiceError], int] = {
    errors.InvalidRequest: 422,
    errors.UnsupportedContentEncoding: 415,
    errors.UnknownModel: 404,
    errors.Unauthorized: 401,
    errors.RequestTooLarge: 413,
    errors.UploadTooLarge: 413,
    errors.ImageTooLarge: 413,
    errors.ResponseTooLarge: 413,
    errors.UnsupportedImage: 415,
    errors.CorruptImage: 422,
    errors.WrongSelection: 422,
    errors.UnprocessableImage: 422,
    errors.QueueFull: 429,
    errors.TooManyWrongKeys: 429,
    errors.DeadlineExceeded: 504,
    errors.Unavailable: 503,
    errors.OutOfMemory: 500,
    errors.NonFiniteOutput: 500,
    errors.DeviceLost: 503,
    errors.EngineError: 500,
}
"""The status of each error. `tests/unit/app/api/test_problems.py` fails if one is missing."""

_PHRASES = http.client.responses | {
    413: "Content Too Large",
    414: "URI Too Long",
    416: "Range Not Satisfiable",
    422: "Unprocessable Content",
}
"""Phrases of the statuses (RFC 9110, section 15). Python before 3.13 has other ones for these."""
_RETRY_LATER = (429, 503)
_MAX_PATH = 200
"""Characters of a client's path that an error repeats."""


def http_status(error: errors.ServiceError) -> int:
    """The status of an error, by the nearest class in the table."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def describe_status(status: int) -> str:
    """The reason phrase of a status (RFC 9110, section 15), the same with every Python."""
    return _PHRASES.get(status, "")


def classify_error(error: errors.ServiceError) -> tuple[int, str]:
    """The status of an error, and its message if clients may see it."""
    status = http_status(error)
    if isinstance(error, errors.EngineError):
        return status, "the engine failed on this image; see the server log for this request id"
    return status, str(error)


def problem_response(
    request: Request, status: int, detail: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """A problem document. `type` is `about:blank`: the status says what kind of problem it is.

    Clients of the Open Inference Protocol read the member `error`. RFC 9457, section 3.2, allows
    such extension members.
    """
    body: dict[str, object] = {
        "type": "about:blank",
        "title": describe_status(status),
        "status": status,
        "detail": detail,
        "request_id": request.scope.get("state", {}).get("request_id", ""),
    }
    if request.scope.get("path", "").startswith("/v2"):
        body["error"] = detail
    return JSONResponse(body, status, headers, media_type="application/problem+json")


def install_handlers(app: FastAPI) -> None:
    """Answer every error that a route raises with a problem document."""

    @app.exception_handler(errors.ServiceError)
    async def handle_service_error(request: Request, error: errors.ServiceError) -> JSONResponse:
        status, detail = classify_error(error)
        if isinstance(error, errors.EngineError):
            log.error("%s: %s", type(error).__name__, error)
        return problem_response(request, status, detail, _error_headers(error, status))

    @app.exception_handler(HTTPException)
    async def handle_http_error(request: Request, error: HTTPException) -> JSONResponse:
        detail, headers = error.detail, dict(error.headers or {})
        path = request.url.path[:_MAX_PATH]
        if error.status_code == 404:
            detail = f"{path} not found; see /docs"
        elif error.status_code == 405:
            allowed = set(headers.get("Allow", "GET").split(", "))
            if "GET" in allowed:
                allowed.add("HEAD")  # the middleware turns it into a GET
            headers["Allow"] = ", ".join(sorted(allowed))
            detail = f"{request.method} not allowed on {path}; use {headers['Allow']}"
        return problem_response(request, error.status_code, detail, headers)

    @app.exception_handler(RequestValidationError)
    async def handle_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return problem_response(request, 422, describe_validation_error(error.errors()[0]))


def _error_headers(error: errors.ServiceError, status: int) -> dict[str, str]:
    headers = {}
    retry_after = error.retry_after if isinstance(error, errors.RequestRejected) else None
    if retry_after is not None or status in _RETRY_LATER:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after or 1)))
    if isinstance(error, errors.UnsupportedContentEncoding):
        headers["Accept-Encoding"] = error.accepted  # RFC 9110, section 12.5.3
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return headers
