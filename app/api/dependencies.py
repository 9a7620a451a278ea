"""Dependencies of the routes: service, authentication, and acceptance of a request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, TypeVar

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import ClientDisconnect

from app.api.keys import Authenticator
from app.batching.deadline import Deadline
from app.inference.budget import Allocation
from app.inference.registry import ServedModel
from app.inference.service import Service

_QUICK_S = 0.05
"""Time after which a request's client is watched. Most requests for small images are done before,
and a task that watches costs as much as a call of an image worker."""

BodyT = TypeVar("BodyT")

BodyReader = Callable[[Request, int, Allocation], Awaitable[BodyT]]
"""Reads a body of at most so many bytes; the allocation grows by what is kept."""


def find_service(request: Request) -> Service:
    """The service that `create_app` assembled."""
    service: Service = request.app.state.service
    return service


async def get_service(request: Request) -> Service:
    """The same as a dependency, which FastAPI would call on a thread if it were not `async`."""
    return find_service(request)


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
        # The service is checked again: it may have begun to drain.
        with service.track_request(), cancel_on_disconnect(request):
            yield model, body


async def _read_body_before(
    deadline: Deadline, request: Request, service: Service, read: BodyReader[BodyT]
) -> BodyT:
    max_bytes = int(service.settings.max_upload_mb * 1e6)
    count = service.metrics.count_missed_deadline
    async with deadline.enforced("the deadline passed before the request was complete", count):
        return await read(request, max_bytes, request.state.allocation)


@contextmanager
def cancel_on_disconnect(request: Request) -> Iterator[None]:
    """Cancel the block as soon as the client disconnects. The body must have been read.

    Raises:
        ClientDisconnect: it did.
    """
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    watchers: list[asyncio.Task[None]] = []
    disconnected = False

    async def watch() -> None:
        nonlocal disconnected
        await _wait_for_disconnect(request)
        disconnected = True
        task.cancel()

    begin = loop.call_later(_QUICK_S, lambda: watchers.append(loop.create_task(watch())))
    try:
        yield
    except asyncio.CancelledError:
        if not disconnected:
            raise
        task.uncancel()
        raise ClientDisconnect from None
    finally:
        begin.cancel()
        for watcher in watchers:  # it ends in the next turn of the loop, and cancels nothing
            watcher.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def model_headers(model: ServedModel) -> dict[str, str]:
    """The headers that name the model and its engine."""
    choice = model.choices[0]
    return {"X-Model": model.id, "X-Engine": f"{choice.device}/{choice.precision}"}
