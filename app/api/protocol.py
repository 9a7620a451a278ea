"""HTTP/1.1 connections: uvicorn's, with limits on idle time and on the work of one turn.

Uvicorn waits forever for the end of a request's head, and for a client to read its response. A few
thousand such connections use up the file descriptors of the process, and no client can connect any
more. Knows no deadlines: while a request is computed, its own deadline applies.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import re
import select
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
from app.api.problems import describe_status, problem_response
from app.logs import request_id
from app.metrics import Metrics

IDLE_TIMEOUT_S = 30.0
"""Default time without progress after which a connection is dropped."""
MAX_HEAD_BYTES = 64 * 1024
"""Limit on the head of a request: its line and its fields."""
MAX_FIELDS = 128
"""Fields of a request."""

_END_OF_HEAD = re.compile(rb"\n\r?\n")
_MAX_CHUNK_LINE_BYTES = 4096
"""Size line of a chunk, or trailer fields."""
_PIECE_BYTES = 4096
"""Bytes that h11 parses at once, except the body of a request with Content-Length. Chunks of one
byte take it 4 µs per byte (measured)."""
_TURN_SECONDS = 0.005
"""Time after which a connection lets others have their turn."""
_LINGER_SECONDS = 1.0
"""Time for a client to read its rejection."""
_PROBE_SECONDS = 0.5
"""Time without a response after which a client that sends no more is probed."""
_RESET_CHECK_SECONDS = 0.05
"""Time between two checks whether a client that was probed has disconnected."""

_log = logging.getLogger("uvicorn.error.connection")
_log.setLevel(logging.ERROR)
"""Uvicorn's warnings of each invalid request say less than the line of the access log."""

_REJECTIONS = {
    400: "not a valid HTTP/1.1 request, or its head is too large",
    431: f"the head of a request may have {MAX_HEAD_BYTES // 1024} KiB and {MAX_FIELDS} fields",
    501: "only the transfer coding 'chunked' is supported",
    505: "only HTTP/1.1 and HTTP/1.0 are supported",
}
"""Status -> detail of the response to a request that is not passed to the application."""


class _RequestParser(h11.Connection):
    """h11's server, with what RFC 9112 leaves to its caller.

    Attributes:
        status: of the response to a request that was rejected.
        method: of the request, once its head was parsed.
        body_left: bytes to come of a body with Content-Length.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self.status = 400
        self.method = b""
        self.body_left = 0
        self._kept_alive_by_request = False
        self._unsent_head = b""

    def send(self, event: Any) -> Any:
        """The bytes of an event. Those of a response's head come with the event after it: one call
        of the system sends the head and the beginning of the content, in one packet."""
        if isinstance(event, h11.Response):
            self._unsent_head = super().send(self._complete_head(event))
            return b""
        head, self._unsent_head = self._unsent_head, b""
        data = super().send(event)
        return head + data if head and data is not None else data

    def _complete_head(self, response: h11.Response) -> h11.Response:
        """Set the phrase of the status, which uvicorn takes from Python, and report to a client of
        HTTP/1.0 that its connection is kept alive, as it asked.

        h11 replaces the field where it has to close the connection to end the response.
        """
        headers = list(response.headers)
        if self._kept_alive_by_request and b"connection" not in dict(headers):
            headers.append((b"connection", b"keep-alive"))
        reason = describe_status(response.status_code).encode()
        if reason == response.reason and len(headers) == len(response.headers):
            return response
        return h11.Response(status_code=response.status_code, headers=headers, reason=reason)

    def next_event(self) -> Any:
        try:
            if self.their_state is h11.IDLE and not self._check_head():
                return h11.NEED_DATA
            event = super().next_event()
            if isinstance(event, h11.Request):
                return self._check_request(event)
            if isinstance(event, h11.Data) and self.body_left:
                self.body_left -= len(event.data)
            if event is h11.NEED_DATA and self.their_state is h11.SEND_BODY:
                self._check_chunk_line()
        except h11.RemoteProtocolError as error:
            self.status = error.error_status_hint
            raise
        return event

    def _check_head(self) -> bool:
        """Skip empty lines before a request (RFC 9112, section 2.2), and count its lines.

        Returns:
            Whether h11 may look at it: it takes the first half of an empty line for an error.
        """
        self.method = b""
        received, _ = self.trailing_data
        head = received.lstrip(b"\r\n")
        if len(head) < len(received):
            self._receive_buffer.maybe_extract_at_most(len(received) - len(head))
        end = _END_OF_HEAD.search(head)
        size = end.start() if end else len(head)
        if size > MAX_HEAD_BYTES or head.count(b"\n", 0, size) > MAX_FIELDS:
            raise h11.RemoteProtocolError("the head is too large", error_status_hint=431)
        return bool(head) or not received

    def _check_request(self, request: h11.Request) -> h11.Request:
        """Reject other versions. Close the connection after a request with two lengths.

        A proxy may have used the other length (RFC 9112, section 6.3).
        """
        self.method = request.method
        if not request.http_version.startswith(b"1."):
            raise h11.RemoteProtocolError("unsupported version", error_status_hint=505)
        values = dict(request.headers)
        self._keep_alive_if_asked(request.http_version, values.get(b"connection", b""))
        if b"transfer-encoding" not in values:
            self.body_left = int(values.get(b"content-length", 0))
            return request
        if b"content-length" not in values:
            return request
        headers = [each for each in request.headers if each[0] != b"content-length"]
        return h11.Request(
            method=request.method,
            target=request.target,
            headers=[*headers, (b"connection", b"close")],
            http_version=request.http_version,
        )

    def _keep_alive_if_asked(self, version: bytes, connection: bytes) -> None:
        """Keep a connection of HTTP/1.0 whose client asks for it (RFC 9112, appendix C.2.2).

        h11 closes it after one response, and a proxy would have to connect for each request.
        """
        options = [option.strip() for option in connection.lower().split(b",")]
        self._kept_alive_by_request = version == b"1.0" and options == [b"keep-alive"]
        if self._kept_alive_by_request:
            self._cstate.keep_alive = True

    def _check_chunk_line(self) -> None:
        """Limit what is kept of a chunked body until its line, or its trailer, is complete."""
        if len(self.trailing_data[0]) > _MAX_CHUNK_LINE_BYTES:
            raise h11.RemoteProtocolError("a line of a chunk is too long", error_status_hint=400)


class Connection(H11Protocol):
    """Uvicorn's connection, with limits.

    Args:
        idle_timeout: seconds without progress after which a connection is dropped, at most twice as
            many. A connection that is kept alive between requests has uvicorn's own timeout.
    """

    conn: _RequestParser

    def __init__(self, *args: Any, idle_timeout: float = IDLE_TIMEOUT_S, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = _RequestParser()
        self.logger = _log
        self._idle_timeout = idle_timeout
        self._idle_check: asyncio.TimerHandle | None = None
        self._last_state: tuple[object, int] | None = None
        self._idle_since = self.loop.time()
        self._unread = bytearray()
        self._next_turn: asyncio.Handle | None = None
        self._half_closed = False
        self._rejected = False
        self._reset_check: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._check_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        for handle in (self._idle_check, self._next_turn, self._reset_check):
            if handle is not None:
                handle.cancel()
        super().connection_lost(exc)

    @property
    def idle_since(self) -> float | None:
        """Time of the loop; None while a request is processed."""
        return None if self._is_processing() else self._idle_since

    def drop(self) -> None:
        """Close the connection; its client gets no response."""
        self.transport.abort()

    def _is_processing(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        """Keep what arrived, and parse it in pieces: tiny chunks take h11 a long time."""
        if self._rejected:
            return
        self._unread += data
        if self._next_turn is None:
            self._parse_unread()
        else:
            self.transport.pause_reading()  # the application resumed it

    def _parse_unread(self) -> None:
        self._next_turn = None
        end = self.loop.time() + _TURN_SECONDS
        while self._unread and not self._awaits_response() and not self.transport.is_closing():
            if self.loop.time() > end:
                self._next_turn = self.loop.call_soon(self._parse_unread)
                break
            size = max(_PIECE_BYTES, self.conn.body_left)
            with memoryview(self._unread)[:size] as view:
                piece = bytes(view)
            del self._unread[:size]
            super().data_received(piece)
        if self._unread:
            self.transport.pause_reading()
        elif not self.flow.read_paused:
            self.transport.resume_reading()
        if self._half_closed and self._next_turn is None:
            self._end_input()

    def _awaits_response(self) -> bool:
        """Whether a request is complete and its response is not. The next one has to wait."""
        return self._is_processing() and not self.cycle.more_body

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        if self._reset_check is not None:
            self._reset_check.cancel()
            self._reset_check = None
        super().on_response_complete()
        if self._next_turn is None and (self._unread or self._half_closed):
            self._next_turn = self.loop.call_soon(self._parse_unread)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection open for the response (RFC 9112, section 9.6)."""
        self._half_closed = True
        if self._rejected:
            return False
        if self._next_turn is None:
            self._end_input()
        return True

    def _end_input(self) -> None:
        """Answer the requests of a client that sends no more, then close the connection."""
        if self.transport.is_closing():
            return
        if self._awaits_response():
            if self._reset_check is None:
                self._reset_check = self.loop.call_later(_PROBE_SECONDS, self._probe_client)
        elif self._is_processing() or self.conn.trailing_data[0]:
            contextvars.Context().run(self.send_400_response, "incomplete")
        else:
            self.transport.close()

    def _probe_client(self) -> None:
        """Find out whether the client has closed its connection, or only the half it sends by.

        Both look the same until something is sent: a closed connection is then reset. An interim
        response is what a client must expect and ignore (RFC 9110, section 15.2).
        """
        if not self.cycle.response_started and self.scope["http_version"] == "1.1":
            interim = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
            self.transport.write(self.conn.send(interim))
            self.cycle.waiting_for_100_continue = False
        self._check_reset()

    def _check_reset(self) -> None:
        """Drop the connection if it was reset. The event loop no longer watches its socket."""
        if not self._is_processing() or self.transport.is_closing():
            return
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), 0)
        if poll.poll(0):  # POLLERR or POLLHUP, which need not be asked for
            self.transport.abort()
            return
        self._reset_check = self.loop.call_later(_RESET_CHECK_SECONDS, self._check_reset)

    def _close_after_reading(self) -> None:
        """Close the connection after a rejection.

        Closing it while the client still sends would reset it, and the rejection would be lost.
        """
        self._rejected = True
        self._unread.clear()
        if self._half_closed:
            self.transport.close()
            return
        self.transport.write_eof()
        self.transport.resume_reading()
        self.loop.call_later(_LINGER_SECONDS, self.transport.abort)

    def _check_idle(self) -> None:
        """Drop the connection if the client has made no progress since the last check."""
        unsent = self.transport.get_write_buffer_size()
        waits_for_client = not self._is_processing() or self.flow.write_paused
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
        started = self._is_processing()  # the head was valid, the body is not
        scope: Scope = dict(self.cycle.scope) if started else {"type": "http", "headers": []}
        identifier = assign_request_id(scope)
        status = self.conn.status
        response = problem_response(
            Request(scope), status, _REJECTIONS[status], {"Connection": "close"}
        )
        add_standard_headers(response.headers, identifier)
        headers = [*self.server_state.default_headers, *response.raw_headers]
        body = b"" if self.conn.method == b"HEAD" else bytes(response.body)
        reason = describe_status(status).encode()
        for event in (
            h11.Response(status_code=status, headers=headers, reason=reason),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self._close_after_reading()
        if started:  # the application sees a disconnect, and records the request
            scope["state"][RESPONSE_STATUS_KEY] = status
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            return
        request_id.set(identifier)  # in the context of this call only
        metrics: Metrics = cast(FastAPI, self.config.app).state.service.metrics
        fields = {"client": self.client[0]} if self.client else {}
        record_request(metrics, "-", "-", UNMATCHED, status, 0.0, fields)


def too_many_connections(metrics: Metrics) -> bytes:
    """The response to a connection that is rejected before its request is read."""
    scope: Scope = {"type": "http", "headers": []}
    identifier = assign_request_id(scope)
    detail = "too many connections are open; retry in a moment"
    headers = {"Connection": "close", "Retry-After": "1"}
    response = problem_response(Request(scope), 503, detail, headers)
    add_standard_headers(response.headers, identifier)
    metrics.count_request(UNMATCHED, 503, 0.0)
    fields = b"".join(b"%s: %s\r\n" % field for field in response.raw_headers)
    return b"HTTP/1.1 503 Service Unavailable\r\n" + fields + b"\r\n" + bytes(response.body)
