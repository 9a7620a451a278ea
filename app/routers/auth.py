"""API keys, where they are set."""

from __future__ import annotations

import hmac
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from app.errors import Unauthorized
from app.service import Service

# Both for /openapi.json, from which clients are generated; neither answers by itself.
_BEARER = HTTPBearer(auto_error=False, description="where keys are set")
_HEADER = APIKeyHeader(name="X-API-Key", auto_error=False, description="where keys are set")


async def authorized(
    request: Request,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
    header: Annotated[str | None, Depends(_HEADER)],
) -> None:
    """Dependency of every route that does work or tells of it.

    Raises:
        Unauthorized: keys are set, and the request carries none of them.
    """
    service: Service = request.app.state.service
    keys = service.settings.api_keys
    if not keys:
        return
    given = bearer.credentials.strip() if bearer else header or ""
    # Every key is compared, each in constant time: the time tells nothing of any of them.
    if not any([hmac.compare_digest(given.encode(), key.encode()) for key in keys]):  # noqa: C419
        raise Unauthorized("send a valid key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")
