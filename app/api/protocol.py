"""HTTP/1.1 connections: uvicorn's, with a limit on idle time.

Uvicorn waits forever for the end of a request's head, and for a client to read its response. A few
thousand such connections use up the file descriptors of the process, and no client can connect any
more. Knows no deadlines: while a request is computed, its own deadline applies.
"""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any, cast

import h11
from fastapi import FastAPI, Request
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.api.middleware import (
    RESPONSE_STATUS_KEY,
    UNMATCHED,
    add_standard_headers,
    assign_request_id,
    record_request,
)
from app.api.problems import problem_response
from app.logs import request_id
from app.metrics import Metrics

IDLE_TIMEOUT_S = 30.0
"""Default time without progress after which a connection is dropped."""


class Connection(H11Protocol):
    """H11Protocol limits the size of a request's head to 64 KiB; this class limits the time.

    Args:
        idle_timeout: seconds without progress after which a connection is dropped, at most twice as
            many. A connection that is kept alive between requests has uvicorn's own timeout.
    """

    def __init__(self, *args: Any, idle_timeout: float = IDLE_TIMEOUT_S, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._idle_timeout = idle_timeout
        self._idle_check: asyncio.TimerHandle | None = None
        self._last_state: tuple[object, int] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._check_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._idle_check is not None:
            self._idle_check.cancel()
        super().connection_lost(exc)

    def _check_idle(self) -> None:
        """Drop the connection if the client has made no progress since the last check."""
        unsent = self.transport.get_write_buffer_size()
        computing = self.cycle is not None and not self.cycle.response_complete
        waits_for_client = not computing or self.flow.write_paused
        kept_alive = self.timeout_keep_alive_task is not None and not unsent
        state = self.cycle, unsent
        if state == self._last_state and waits_for_client and not kept_alive:
            self.transport.abort()
            return
        self._last_state = state
        self._idle_check = self.loop.call_later(self._idle_timeout, self._check_idle)

    def handle_events(self) -> None:
        # A pipelined request is parsed in the task of the previous one: an empty context keeps it
        # from inheriting that request's id.
        contextvars.Context().run(super().handle_events)

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP with a problem document, counted and logged as usual."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # a response is partly sent
            return
        started = self.conn.our_state is h11.SEND_RESPONSE  # the head was valid, the body is not
        scope: Scope = dict(self.cycle.scope) if started else {"type": "http", "headers": []}
        identifier = assign_request_id(scope)
        detail = "not a valid HTTP/1.1 request, or its head is too large"
        response = problem_response(Request(scope), 400, detail, {"Connection": "close"})
        add_standard_headers(response.headers, identifier)
        headers = [*self.server_state.default_headers, *response.raw_headers]
        body = b"" if scope.get("method") == "HEAD" else bytes(response.body)
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        if started:  # the application sees a disconnect, and records the request
            scope["state"][RESPONSE_STATUS_KEY] = 400
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            return
        request_id.set(identifier)  # in the context of this call only
        metrics: Metrics = cast(FastAPI, self.config.app).state.service.metrics
        fields = {"client": self.client[0]} if self.client else {}
        record_request(metrics, "-", "-", UNMATCHED, 400, 0.0, fields)
