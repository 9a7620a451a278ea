"""Errors -> HTTP: the only table that knows both. Every error is a problem document (RFC 9457)."""

from __future__ import annotations

import http
import logging
import math

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from app import errors

log = logging.getLogger(__name__)

STATUS: dict[type[errors.ServiceError], int] = {
    errors.InvalidRequest: 422,
    errors.UnsupportedContentEncoding: 415,
    errors.UnknownModel: 404,
    errors.Unauthorized: 401,
    errors.UploadTooLarge: 413,
    errors.ImageTooLarge: 413,
    errors.UnsupportedImage: 415,
    errors.CorruptImage: 422,
    errors.QueueFull: 429,
    errors.DeadlineExceeded: 504,
    errors.Unavailable: 503,
    errors.OutOfMemory: 500,
    errors.NonFiniteOutput: 500,
    errors.DeviceLost: 503,
    errors.EngineError: 500,
}
"""By the nearest class; `tests/unit/app/test_handlers.py` holds that none is missing."""

_RETRY_LATER = (429, 503)


def http_status(error: errors.ServiceError) -> int:
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def describe(error: errors.ServiceError) -> tuple[int, str]:
    """Status and the detail a client may read; of our own faults it may not read any."""
    status = http_status(error)
    if isinstance(error, errors.EngineError):
        return status, "the engine failed on this image; the log knows more under the request's id"
    return status, str(error)


def problem(
    request: Request, status: int, detail: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """One problem document. `type` is `about:blank`: the status says what kind it is.

    Clients of the Open Inference Protocol read `error`, which an extension member may be called
    (RFC 9457, section 3.2).
    """
    body: dict[str, object] = {
        "type": "about:blank",
        "title": http.HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "request_id": request.scope.get("state", {}).get("request_id", ""),
    }
    if request.scope.get("path", "").startswith("/v2"):
        body["error"] = detail
    return JSONResponse(body, status, headers, media_type="application/problem+json")


def install(app: FastAPI) -> None:
    """Give every error its answer."""

    @app.exception_handler(errors.ServiceError)
    async def service_error(request: Request, error: errors.ServiceError) -> JSONResponse:
        status, detail = describe(error)
        if status >= 500 and isinstance(error, errors.EngineError):
            log.error("%s: %s", type(error).__name__, error)
        headers = {}
        later = error.retry_after if isinstance(error, errors.RequestRejected) else None
        if status in _RETRY_LATER or later is not None:
            headers["Retry-After"] = str(max(1, math.ceil(later or 1)))
        if isinstance(error, errors.UnsupportedContentEncoding):
            headers["Accept-Encoding"] = error.accepted  # RFC 9110, section 12.5.3
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return problem(request, status, detail, headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        detail, headers = error.detail, dict(error.headers or {})
        if error.status_code == 404:
            detail = f"there is nothing at {request.url.path[:200]}; /docs lists what there is"
        elif error.status_code == 405:
            allowed = set(headers.get("Allow", "GET").split(", "))
            if "GET" in allowed:
                allowed.add("HEAD")  # wherever there is GET, as the middleware sees to
            headers["Allow"] = ", ".join(sorted(allowed))
            path = request.url.path[:200]
            detail = f"{request.method} is not for {path}, but {headers['Allow']}"
        return problem(request, error.status_code, detail, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return problem(request, 422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
