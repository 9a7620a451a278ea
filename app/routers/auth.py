"""API keys, where they are set."""

from __future__ import annotations

import hmac

from fastapi import Request

from app.errors import Unauthorized
from app.service import Service

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
