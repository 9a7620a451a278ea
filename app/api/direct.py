"""Routes whose function takes the request alone. FastAPI describes them, Starlette calls them.

FastAPI handles each request by general rules: parameters, bodies, dependencies, results. Where a
function needs none of that, these took a fifteenth of the calls that a small image costs.
"""

from __future__ import annotations

from collections.abc import Callable

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope


class DirectRoute(Route):
    """Answers the requests of a route of FastAPI, before which it has to be added.

    Args:
        described: its function takes the request and returns the response.
        check: called with each request before that, in place of the route's dependencies.
    """

    def __init__(self, described: APIRoute, check: Callable[[Request], object]) -> None:
        async def answer(request: Request) -> Response:
            check(request)
            response: Response = await described.endpoint(request)
            return response

        super().__init__(described.path, answer, methods=described.methods, name=described.name)

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child_scope = super().matches(scope)
        if match is not Match.NONE:
            child_scope["route"] = self  # as FastAPI does: metrics are named after it
        return match, child_scope
