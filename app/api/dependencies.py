"""Dependencies of the routes: service, authentication, deadline, and acceptance of a request."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, TypeVar

from fastapi import Depends, Header, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import ClientDisconnect

from app.api.keys import Authenticator
from app.batching.deadline import Deadline
from app.errors import InvalidRequest
from app.inference.budget import Allocation
from app.inference.registry import ServedModel
from app.inference.service import Service

BodyT = TypeVar("BodyT")

BodyReader = Callable[[Request, int, Allocation], Awaitable[BodyT]]
"""Reads a body of at most so many bytes; the allocation grows by what is kept."""


async def get_service(request: Request) -> Service:
    """The service that `create_app` assembled."""
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(get_service)]

_bearer = HTTPBearer(scheme_name="bearer", auto_error=False)
_api_key = APIKeyHeader(name="X-API-Key", scheme_name="header", auto_error=False)


async def require_api_key(
    request: Request,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    header: Annotated[str | None, Depends(_api_key)],
) -> None:
    """Check the key of a request. A wrong bearer token, which may be meant for a gateway, does not
    hide a right X-API-Key.

    Raises:
        Unauthorized: the request carries none of the keys that are set.
        TooManyWrongKeys: its client has sent too many wrong ones.
    """
    authenticator: Authenticator = request.app.state.authenticator
    address = request.client.host if request.client else ""
    authenticator.check(address, [bearer.credentials if bearer else "", header or ""])


async def get_deadline(
    request: Request,
    seconds: Annotated[
        float | None,
        Header(
            alias="X-Request-Timeout",
            description="seconds this request may take, up to the service's limit; the service has "
            "a default for requests without it",
            gt=0,
            allow_inf_nan=False,
        ),
    ] = None,
) -> Deadline:
    """When the response is due: X-Request-Timeout, up to the service's limit, from now."""
    # Not by `ServiceDep`: FastAPI takes 20 µs for each dependency of a dependency.
    settings = (await get_service(request)).settings
    if seconds is None:
        return Deadline.after(settings.default_timeout_s)
    return Deadline.after(min(seconds, settings.longest_timeout_s))


DeadlineDep = Annotated[Deadline, Depends(get_deadline)]


_REPEATABLE = ("output",)


async def reject_repeated_params(request: Request) -> None:
    """Check that no query parameter is given twice: of several values FastAPI takes the last.

    `output` may be, because several outputs can be asked for.

    Raises:
        InvalidRequest: names the parameter.
    """
    counts = Counter(name for name, _ in request.query_params.multi_items())
    for name, count in counts.items():
        if count > 1 and name not in _REPEATABLE:
            raise InvalidRequest(f"{name[:100]} is given {count} times; send it once")


@asynccontextmanager
async def accept_request(
    request: Request,
    service: Service,
    name: str | None,
    deadline: Deadline,
    read: BodyReader[BodyT],
    check: Callable[[ServedModel], object],
) -> AsyncIterator[tuple[ServedModel, BodyT]]:
    """Accept a request that computes; the block is the computation.

    A request is rejected as early as possible, before its body is read. Once accepted, a drain
    waits for it, the model stays loaded, and the block is cancelled when the client disconnects.

    Args:
        name: of the model; None is the default model.
        deadline: for the body; the block has to enforce its own.
        check: called with the model before the body is read.

    Yields:
        The model, and what `read` returned.

    Raises:
        UnknownModel, Unavailable: the model or the service is not ready.
        RequestRejected: the queue is full, or the deadline passed or cannot be met.
        ClientDisconnect: the client disconnected.
        ServiceError: from `read` and `check`.
    """
    service.check_ready()
    with service.registry.lease(name) as model:
        check(model)
        service.segmenter.precheck_admission(model, deadline)
        request.state.log_fields["model"] = model.id
        body = await _read_body_before(deadline, request, service, read)
        with service.track_request():  # checks again that the service is ready
            async with cancel_on_disconnect(request):
                yield model, body


async def _read_body_before(
    deadline: Deadline, request: Request, service: Service, read: BodyReader[BodyT]
) -> BodyT:
    max_bytes = int(service.settings.max_upload_mb * 1e6)
    count = service.metrics.rejected.labels("deadline").inc
    async with deadline.enforced("the deadline passed before the request was complete", count):
        return await read(request, max_bytes, request.state.allocation)


@asynccontextmanager
async def cancel_on_disconnect(request: Request) -> AsyncIterator[None]:
    """Cancel the block as soon as the client disconnects. The body must have been read.

    Raises:
        ClientDisconnect: it did.
    """
    task = asyncio.current_task()
    assert task is not None
    disconnected = False

    async def watch() -> None:
        nonlocal disconnected
        await _wait_for_disconnect(request)
        disconnected = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not disconnected:
            raise
        task.uncancel()
        raise ClientDisconnect from None
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def model_headers(model: ServedModel) -> dict[str, str]:
    """The headers that name the model and its engine."""
    choice = model.choices[0]
    return {"X-Model": model.id, "X-Engine": f"{choice.device}/{choice.precision}"}
