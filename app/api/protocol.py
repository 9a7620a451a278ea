"""One connection: uvicorn's, with an end to its patience.

Uvicorn waits for ever for the end of a request's head, and for a client to take what was sent to
it. A few thousand of such connections use up the process's file descriptors, and then nobody gets
in. What a request does while it has the connection is not its concern: that has its deadline.
"""

from __future__ import annotations

import asyncio
import contextvars
from typing import cast

import h11
from fastapi import FastAPI, Request
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.api.middleware import ANSWERED, UNMATCHED, account, identify, mark
from app.api.problems import problem
from app.logs import request_id
from app.metrics import Metrics


class Connection(H11Protocol):
    """H11Protocol bounds a request's head to 64 KiB; this class bounds the time."""

    patience = 30.0
    """Seconds after which a connection that came no further is dropped; at most twice as many."""

    _look_again: asyncio.TimerHandle | None = None
    _seen: tuple[object, int] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._look_again is not None:
            self._look_again.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        """Drop the connection if nothing has happened since the last look that should have."""
        at_work = self.cycle is not None and not self.cycle.response_complete
        seen = self.cycle, self.transport.get_write_buffer_size()
        if seen == self._seen and (not at_work or self.flow.write_paused):
            self.transport.abort()
            return
        self._seen = seen
        self._look_again = self.loop.call_later(self.patience, self._look)

    def handle_events(self) -> None:
        # Pipelined requests are parsed within the one before: they must not inherit its id.
        contextvars.Context().run(super().handle_events)

    def send_400_response(self, msg: str) -> None:
        """To what is no HTTP: a problem document, counted and logged, as of every error."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # in the middle of an answer
            return
        begun = self.conn.our_state is h11.SEND_RESPONSE  # its head was good, its body is not
        scope: Scope = dict(self.cycle.scope) if begun else {"type": "http", "headers": []}
        identifier = identify(scope)
        text = "this is not a request that HTTP/1.1 allows, or its head is too large"
        answer = problem(Request(scope), 400, text, {"Connection": "close"})
        mark(answer.headers, identifier)
        headers = [*self.server_state.default_headers, *answer.raw_headers]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=b"" if scope.get("method") == "HEAD" else bytes(answer.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        if begun:  # the application hears that its client is gone, and accounts for it
            scope["state"][ANSWERED] = 400
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            return
        request_id.set(identifier)  # of this context alone
        metrics: Metrics = cast(FastAPI, self.config.app).state.service.metrics
        account(metrics, "-", "-", UNMATCHED, 400, 0.0)
