"""A device whose batches have spans. Knows no engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opentelemetry.trace import Span

from app.batching.device_worker import Runner
from app.tracing.spans import ImageTrace, Tracing, now, set_error


class _TracedBatch:
    """The span of a batch, and the traces of the images whose windows it has."""

    def __init__(self, span: Span, images: list[ImageTrace]) -> None:
        self._span = span
        self._images = images

    def start(self) -> None:
        at, context = now(), self._span.get_span_context()
        for image in self._images:
            image.start_batch(context, at)

    def end(self) -> None:
        at = now()
        for image in self._images:
            image.end_batch(at)
        self._span.end(at)

    def fail(self, error: BaseException) -> None:
        set_error(self._span, error)
        self.end()


class TracedDevice:
    """Makes a span of each batch from when it is prepared to its last result.

    Implements `app.batching.device_worker.Runner`. Payloads have an attribute `trace`: the
    `ImageTrace` of their image, or None.

    Args:
        runner: the device.
        tracing: makes the spans.
    """

    def __init__(self, runner: Runner, tracing: Tracing) -> None:
        self.name = runner.name
        self.depth = runner.depth
        self._runner = runner
        self._tracing = tracing

    def prepare(self, key: Any, payloads: Sequence[Any]) -> tuple[Any, _TracedBatch | None]:
        """Prepare a batch, and begin its span unless none of its images has a trace."""
        images = list(
            {id(job.trace): job.trace for job in payloads if job.trace is not None}.values()
        )
        if not images:
            return self._runner.prepare(key, payloads), None
        attributes: dict[str, str | int] = {
            "unet.device": self.name,
            "unet.batch.key": str(key),
            "unet.batch.windows": len(payloads),
            "unet.batch.images": len(images),
        }
        batch = _TracedBatch(self._tracing.start_batch(attributes, images), images)
        try:
            return self._runner.prepare(key, payloads), batch
        except BaseException as error:
            batch.fail(error)
            raise

    def submit(
        self, key: Any, staged: tuple[Any, _TracedBatch | None]
    ) -> tuple[Any, _TracedBatch | None]:
        """Submit a batch, and record the start of its inference."""
        data, batch = staged
        if batch is None:
            return self._runner.submit(key, data), None
        batch.start()
        try:
            return self._runner.submit(key, data), batch
        except BaseException as error:
            batch.fail(error)
            raise

    def collect(self, key: Any, submitted: tuple[Any, _TracedBatch | None]) -> Sequence[Any]:
        """Collect the results of a batch, and end its span."""
        data, batch = submitted
        if batch is None:
            return self._runner.collect(key, data)
        try:
            results = self._runner.collect(key, data)
        except BaseException as error:
            batch.fail(error)
            raise
        batch.end()
        return results

    def check(self) -> None:
        """Check the device."""
        self._runner.check()
