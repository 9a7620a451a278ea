"""What every route that computes does with its request: its deadline, its client, its model."""

from __future__ import annotations

import asyncio
import hmac
import math
import re
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from app.errors import DeadlineExceeded, InvalidRequest, Unauthorized
from app.inference.registry import ServedModel
from app.inference.service import Service

T = TypeVar("T")

_DECIMAL = re.compile(r"([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")


def deadline_of(request: Request) -> float:
    """When its answer is due, on the event loop's clock: X-Request-Timeout, or the service's.

    Raises:
        InvalidRequest: the header is not a number of seconds.
    """
    service: Service = request.app.state.service
    longest = service.settings.request_timeout_s
    return asyncio.get_running_loop().time() + _timeout(request, longest)


def _timeout(request: Request, longest: float) -> float:
    given = request.headers.get("x-request-timeout")
    if given is None:
        return longest
    # float() alone takes 1_0, nan and the digits of every script as well
    seconds = float(given) if _DECIMAL.fullmatch(given) else math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise InvalidRequest(f"X-Request-Timeout is a number of seconds above 0, not {given!r}")
    return min(seconds, longest)


async def read_body_before(request: Request, deadline: float, reading: Coroutine[Any, Any, T]) -> T:
    """What `reading` makes of the request's body, if all of it is here before the deadline.

    Raises:
        DeadlineExceeded: it is not.
    """
    service: Service = request.app.state.service
    try:
        async with asyncio.timeout_at(deadline):
            return await reading
    except TimeoutError:
        service.metrics.rejected.labels("deadline").inc()
        raise DeadlineExceeded("the deadline passed before the request was complete") from None


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled as soon as the client hangs up.

    Raises:
        ClientDisconnect: it did; there is nobody left to answer.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def model_headers(model: ServedModel) -> dict[str, str]:
    choice = model.choices[0]
    return {"X-Model": model.id, "X-Engine": f"{choice.device}/{choice.precision}"}


SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
"""How a key may be sent, in the words of OpenAPI."""


async def authorized(request: Request) -> None:
    """Dependency of every route that does work or tells of it.

    Raises:
        Unauthorized: keys are set, and the request carries none of them.
    """
    service: Service = request.app.state.service
    keys = service.settings.api_keys
    if not keys:
        return
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    # Either may be right: what a gateway in between asks for is of no concern here.
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    given = (bearer, request.headers.get("x-api-key", ""))
    # Every key is compared, each in constant time: the time tells nothing of any of them.
    if not any([hmac.compare_digest(g.encode(), k.encode()) for g in given for k in keys]):  # noqa: C419
        raise Unauthorized("send a valid key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")
