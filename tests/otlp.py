"""A receiver of OTLP over HTTP, and the spans that it got."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue


@dataclasses.dataclass(frozen=True)
class ReceivedSpan:
    """A span as it arrived; ids are hexadecimal.

    Attributes:
        links: spans, each (trace, span).
        service: attributes of the resource.
        error: whether its status is an error.
    """

    name: str
    trace: str
    id: str
    parent: str
    links: list[tuple[str, str]]
    attributes: dict[str, Any]
    service: dict[str, Any]
    start: int
    end: int
    error: bool


class Receiver(ThreadingHTTPServer):
    """Keeps the spans that are posted to it.

    Attributes:
        spans: in the order of their arrival.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.spans: list[ReceivedSpan] = []

    def wait_for(
        self, matches: Callable[[ReceivedSpan], bool], count: int = 1, seconds: float = 30
    ) -> list[ReceivedSpan]:
        """Wait for spans that match.

        Raises:
            AssertionError: they do not arrive in time.
        """
        end = time.monotonic() + seconds
        while len(found := [span for span in list(self.spans) if matches(span)]) < count:
            assert time.monotonic() < end, f"only {found} of {self.spans}"
            time.sleep(0.02)
        return found


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.spans += read_spans(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def read_spans(request: ExportTraceServiceRequest) -> Iterator[ReceivedSpan]:
    for of_resource in request.resource_spans:
        service = read_attributes(of_resource.resource.attributes)
        for of_scope in of_resource.scope_spans:
            for span in of_scope.spans:
                yield ReceivedSpan(
                    span.name,
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    [(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
                    read_attributes(span.attributes),
                    service,
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    span.status.code == span.status.STATUS_CODE_ERROR,
                )


def read_attributes(attributes: Any) -> dict[str, Any]:
    def value(item: KeyValue) -> Any:
        return getattr(item.value, item.value.WhichOneof("value") or "string_value")

    return {item.key: value(item) for item in attributes}


@contextlib.contextmanager
def receiving() -> Iterator[Receiver]:
    """Run a receiver on a free port of this machine."""
    with Receiver() as receiver:
        thread = threading.Thread(target=receiver.serve_forever)
        thread.start()
        try:
            yield receiver
        finally:
            receiver.shutdown()
            thread.join()
