"""A check of the host that a request asks for.

A page of another site can make a browser send requests here under a name of that site, which its
DNS server resolves to this machine (DNS rebinding). Such a request has the other name as its host.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.middleware import PROBE_PATHS
from app.api.problems import problem_response


class AllowedHostsMiddleware:
    """Answers 421 (RFC 9110, section 15.5.20) to a request for another host.

    Probes and metrics are answered under any name, because an orchestrator asks for the address of
    a pod.

    Args:
        allowed: names and addresses in lower case, or `*.DOMAIN` for all names of a domain.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self.app = app
        self.names = frozenset(allowed)
        self.domains = tuple(name[1:] for name in allowed if name.startswith("*."))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBE_PATHS or self._is_allowed(scope):
            await self.app(scope, receive, send)
            return
        detail = "this service has another host name; see its setting UNET_ALLOWED_HOSTS"
        response = problem_response(Request(scope), 421, detail, {"Connection": "close"})
        await response(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        given = Headers(scope=scope).get("host", "").lower()
        host = given.rpartition("]")[0] + "]" if given.startswith("[") else given.partition(":")[0]
        host = host.removesuffix(".")
        return host in self.names or host.endswith(self.domains)
