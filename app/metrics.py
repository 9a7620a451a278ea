"""Prometheus metrics, with their units in their names. Knows no HTTP.

Each application has its own registry, so that two in one process do not count into each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from app.batching.device_worker import Observer
from app.errors import DeviceLost, EngineError, NonFiniteOutput, OutOfMemory

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = (1, 2, 4, 8, 16, 32, 64)

STAGES = ("decode", "queue", "infer", "stitch", "encode")

KILL_REASONS = ("time", "memory", "crash", "deadline", "cancelled", "leak")
REJECT_REASONS = ("queue_full", "memory", "deadline", "draining", "dead")
DROP_REASONS = ("cancelled", "expired", "failed", "stopped", "dead")
RELOAD_RESULTS = ("accepted", "rejected")
BATCH_ERRORS = (OutOfMemory, NonFiniteOutput, DeviceLost, EngineError)

# A series with the start of each counter would double their number, and no query needs it.
disable_created_metrics()  # type: ignore[no-untyped-call]


class _ReadCounter(Collector):
    """A counter that another object counts."""

    def __init__(self, name: str, text: str, value: Callable[[], float]) -> None:
        self._name = name
        self._text = text
        self._value = value

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(self._name, self._text, self._value())


class Metrics(Observer):
    """All metrics of one application, and the batcher's observer.

    Attributes:
        count_missed_deadline: counts a request whose deadline passed.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = self._counter(
            "requests",
            "Requests by route and status; 499: the client disconnected.",
            ("route", "status"),
        )
        self.request_seconds = self._histogram(
            "request_seconds",
            "Seconds from the request's head to the end of its response, by class of status (2xx, "
            "4xx, 5xx): rejections are fast and say nothing about the latency of answers.",
            _SECONDS,
            ("route", "status"),
        )
        self.stage_seconds = self._histogram(
            "stage_seconds", "Seconds of each stage of a segmented image.", _SECONDS, ("stage",)
        )
        self.images = self._counter("images", "Segmented images.", ("model",))
        self.pixels = self._counter("pixels", "Pixels of segmented images.", ("model",))
        self.batch_windows = self._histogram("batch_windows", "Windows in a batch.", _SIZES)
        self.batch_seconds = self._histogram(
            "batch_seconds", "Seconds of a batch on its device.", _SECONDS, ("device",)
        )
        self.rejected = self._counter("rejected", "Requests rejected at admission.", ("reason",))
        self.dropped_windows = self._counter(
            "dropped_windows",
            "Windows removed from the queue before they ran, by reason: cancelled, expired, ...",
            ("reason",),
        )
        self.batch_failures = self._counter(
            "batch_failures", "Batches that failed.", ("device", "error")
        )
        self.batch_cap = Gauge(
            "unet_batch_cap_windows",
            "Largest batch, for devices where running out of memory has lowered it.",
            ("device", "key"),
            registry=self.registry,
        )
        self.reloads = self._counter(
            "reloads", "Checkpoints loaded or rejected after the start.", ("result",)
        )
        self.image_worker_kills = self._counter(
            "image_worker_kills",
            "Image workers that were killed or crashed, by reason: time, memory, crash, deadline, "
            "cancelled, leak.",
            ("reason",),
        )
        self.image_worker_restarts = self._counter(
            "image_worker_restarts", "Image workers that replaced another one."
        )
        self.model_info = Gauge(
            "unet_model_info",
            "Models in service; the value is 1.",
            ("model", "id", "engine", "device", "precision"),
            registry=self.registry,
        )
        self._begin_at_zero()
        # A look-up of a series takes as long as counting, and these are counted for every image.
        self._stages = {stage: self.stage_seconds.labels(stage) for stage in STAGES}
        self._series_of_request = functools.cache(self._find_series_of_request)
        self._series_of_model = functools.cache(
            lambda name: (self.images.labels(name), self.pixels.labels(name))
        )
        self._series_of_device = functools.cache(self.batch_seconds.labels)
        self.count_missed_deadline = self.rejected.labels("deadline").inc

    def _begin_at_zero(self) -> None:
        """Show every value of these labels from the start.

        Prometheus computes the increase of a series from its first sample. It would miss the first
        event if that made the series.
        """
        known: list[tuple[Counter | Histogram, tuple[str, ...]]] = [
            (self.stage_seconds, STAGES),
            (self.image_worker_kills, KILL_REASONS),
            (self.rejected, REJECT_REASONS),
            (self.dropped_windows, DROP_REASONS),
            (self.reloads, RELOAD_RESULTS),
        ]
        for metric, values in known:
            for value in values:
                metric.labels(value)

    def add_device(self, name: str) -> None:
        """Show the batches of a device from the start."""
        self.batch_seconds.labels(name)
        for error in BATCH_ERRORS:
            self.batch_failures.labels(name, error.__name__)

    def add_gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is read whenever the metrics are."""
        Gauge(f"unet_{name}", text, registry=self.registry).set_function(value)

    def add_counter(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a counter whose value is read whenever the metrics are."""
        self.registry.register(_ReadCounter(f"unet_{name}", text, value))

    def add_labeled_gauge(
        self, name: str, text: str, label: str, values: dict[str, Callable[[], float]]
    ) -> None:
        """Add such a gauge with one value per value of its label."""
        gauge = Gauge(f"unet_{name}", text, (label,), registry=self.registry)
        for key, value in values.items():
            gauge.labels(key).set_function(value)

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Count a request that ended.

        Args:
            route: the template of its path: a client must not choose a label's value.
            status: of its response.
            seconds: from the request's head to the end of its response.
        """
        counter, histogram = self._series_of_request(route, status)
        counter.inc()
        histogram.observe(seconds)

    def count_image(self, model: str, pixels: int, seconds: Mapping[str, float]) -> None:
        """Count an image that was segmented.

        Args:
            model: its name.
            seconds: by stage.
        """
        for stage, duration in seconds.items():
            self._stages[stage].observe(duration)
        images, all_pixels = self._series_of_model(model)
        images.inc()
        all_pixels.inc(pixels)

    def format_text(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return generate_latest(self.registry)

    # Observer: called by the batcher

    def batch_done(self, runner: str, key: Hashable, size: int, seconds: float) -> None:
        self.batch_windows.observe(size)
        self._series_of_device(runner).observe(seconds)

    def batch_failed(self, runner: str, error: BaseException) -> None:
        self.batch_failures.labels(runner, type(error).__name__).inc()

    def batch_capped(self, runner: str, key: Hashable, cap: int) -> None:
        self.batch_cap.labels(runner, str(key)).set(cap)

    def batch_cap_removed(self, runner: str, key: Hashable) -> None:
        self.batch_cap.remove(runner, str(key))

    def request_rejected(self, reason: str) -> None:
        self.rejected.labels(reason).inc()

    def windows_dropped(self, reason: str, windows: int) -> None:
        self.dropped_windows.labels(reason).inc(windows)

    def _find_series_of_request(self, route: str, status: int) -> tuple[Counter, Histogram]:
        return (
            self.requests.labels(route, str(status)),
            self.request_seconds.labels(route, f"{status // 100}xx"),
        )

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"unet_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()
    ) -> Histogram:
        return Histogram(f"unet_{name}", text, labels, buckets=buckets, registry=self.registry)
