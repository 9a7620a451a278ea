"""The spans of requests, of their images and of batches.

::

    POST /segment                  one per request, child of the caller's span; FastAPI makes it
      image                        one per image
        decode, queue, infer, stitch, encode

    batch                          a trace of its own, with links to the images it serves;
                                   their `infer` links back to it

A batch serves several requests, so that it has no single parent. Spans are written at the moments
that the stages are measured at anyway. Knows no HTTP server, no queues and no pixels.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Sampler
from opentelemetry.trace import Link, Span, SpanContext, Status, StatusCode
from opentelemetry.trace.span import INVALID_SPAN

_SCOPE = "unet-server"
_FLUSH_S = 1.5
"""Longest wait for the collector when the service stops."""


class Tracing:
    """Makes spans, and passes them to a processor.

    Args:
        processor: receives all spans.
        resource: describes the service.
        sampler: of requests; None is the one that OTEL_TRACES_SAMPLER names.

    Attributes:
        provider: makes the spans of requests.
    """

    def __init__(
        self, processor: SpanProcessor, resource: Resource, sampler: Sampler | None = None
    ) -> None:
        self._processor = processor
        self.provider = _build_provider(processor, resource, sampler)
        self._tracer = self.provider.get_tracer(_SCOPE)
        # A batch is recorded if one of its images is, whatever the sampler says of its own trace.
        batches = _build_provider(processor, resource, ALWAYS_ON)
        self._batch_tracer = batches.get_tracer(_SCOPE)

    def find_request(self) -> RequestTrace:
        """The trace of the request that the current task works for."""
        return RequestTrace(trace.get_current_span())

    def start_image(self, model: str) -> ImageTrace | None:
        """Begin the span of an image, a child of the current span; None if that is not recorded."""
        if not trace.get_current_span().is_recording():
            return None
        return ImageTrace(self._tracer, model)

    def start_batch(self, attributes: Mapping[str, str | int], images: list[ImageTrace]) -> Span:
        """Begin the span of a batch that serves these images."""
        links = [Link(image.context) for image in images]
        root = trace.set_span_in_context(INVALID_SPAN)
        return self._batch_tracer.start_span("batch", root, attributes=attributes, links=links)

    async def close(self) -> None:
        """Send the spans that wait, for 1.5 s at most."""
        # A daemon, because a collector that hangs must not keep the process from ending.
        thread = threading.Thread(target=self._processor.shutdown, name="traces", daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, _FLUSH_S)


class RequestTrace:
    """The span of a request, which FastAPI makes.

    Attributes:
        ids: trace and span, for the log.
        header: value of the field `traceresponse`, which gives the client the ids (W3C Trace
            Context Level 2, draft of 2021).
    """

    def __init__(self, span: Span) -> None:
        context = span.get_span_context()
        trace_id = trace.format_trace_id(context.trace_id)
        span_id = trace.format_span_id(context.span_id)
        self.ids = {"trace_id": trace_id, "span_id": span_id}
        self.header = f"00-{trace_id}-{span_id}-{context.trace_flags:02x}"
        self._span = span

    def describe(self, fields: Mapping[str, str | int]) -> None:
        """Add the fields of the request's log line."""
        self._span.set_attributes({f"unet.{name}": value for name, value in fields.items()})


class ImageTrace:
    """The span of an image, and the spans of its stages.

    `start_batch` and `end_batch` are called on the threads of devices, everything else on the
    event loop: a device must not wait for spans.

    Attributes:
        context: of the image's span.
    """

    def __init__(self, tracer: trace.Tracer, model: str) -> None:
        self._tracer = tracer
        self._image = tracer.start_span("image", attributes={"unet.model": model})
        self.context = self._image.get_span_context()
        self._parent = trace.set_span_in_context(self._image)
        self._stage = self._start("decode")
        self._batches: list[tuple[SpanContext, int]] = []
        self._last_result = 0

    def end_decoding(self, height: int, width: int, windows: int) -> None:
        """The image of this size was decoded, and its windows enter the queue."""
        self._image.set_attributes(
            {"unet.height": height, "unet.width": width, "unet.windows": windows}
        )
        self._stage.end()
        self._stage = self._start("queue")

    def start_batch(self, batch: SpanContext, at: int) -> None:
        """A device started a batch that has a window of this image.

        Args:
            at: nanoseconds since 1970, as all times here.
        """
        self._batches.append((batch, at))

    def end_batch(self, at: int) -> None:
        """That batch ended."""
        self._last_result = at

    def end_stitching(self, queue_seconds: float, infer_seconds: float) -> None:
        """The last window was blended, and the outputs are rendered next.

        Args:
            queue_seconds, infer_seconds: as measured; the spans overlap if an image has windows in
                the queue while others are on a device.
        """
        self._image.set_attributes(
            {"unet.queue_seconds": queue_seconds, "unet.infer_seconds": infer_seconds}
        )
        self._start_inference()
        self._stage.end(self._last_result)
        self._start("stitch", self._last_result).end()
        self._stage = self._start("encode")

    def end(self, error: BaseException | None = None) -> None:
        """The image is done, or the current stage failed."""
        if error is not None:
            self._start_inference()  # a batch that hangs or failed was started
            set_error(self._stage, error)
            set_error(self._image, error)
        self._stage.end()
        self._image.end()

    def _start_inference(self) -> None:
        """End the span of the queue when the first batch started, if one did."""
        if not self._batches:
            return
        batches, self._batches = self._batches, []
        first = min(at for _, at in batches)
        self._stage.end(first)
        self._stage = self._start("infer", first, [Link(context) for context, _ in batches])

    def _start(self, name: str, at: int | None = None, links: list[Link] | None = None) -> Span:
        return self._tracer.start_span(name, self._parent, links=links, start_time=at)


def now() -> int:
    """Nanoseconds since 1970."""
    return time.time_ns()


def set_error(span: Span, error: BaseException) -> None:
    """Mark a span as failed, by the type of the error: its text is in the log."""
    name = type(error).__name__
    span.set_attribute("error.type", name)
    span.set_status(Status(StatusCode.ERROR, name))


def _build_provider(
    processor: SpanProcessor, resource: Resource, sampler: Sampler | None
) -> TracerProvider:
    provider = TracerProvider(sampler, resource, shutdown_on_exit=False)
    provider.add_span_processor(processor)
    return provider
