"""What an operator sees: Prometheus metrics, units in their names.

One registry an application, so that two of them in one process do not count into each other.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from app.batching.device_worker import Observer

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = (1, 2, 4, 8, 16, 32, 64)

STAGES = ("decode", "queue", "infer", "stitch", "encode")


class Metrics(Observer):
    """All metrics of one application; the batcher tells them what it does."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = self._counter("requests", "Answered requests.", ("route", "status"))
        self.request_seconds = self._histogram(
            "request_seconds", "From the first byte to the answer.", _SECONDS, ("route",)
        )
        self.stage_seconds = self._histogram(
            "stage_seconds", "A stage of one segmented image.", _SECONDS, ("stage",)
        )
        self.images = self._counter("images", "Segmented images.", ("model",))
        self.pixels = self._counter("pixels", "Pixels of segmented images.", ("model",))
        self.batch_windows = self._histogram("batch_windows", "Windows in a batch.", _SIZES)
        self.batch_seconds = self._histogram(
            "batch_seconds", "A batch on its device.", _SECONDS, ("device",)
        )
        self.rejected = self._counter("rejected", "Requests refused at admission.", ("reason",))
        self.dropped_windows = self._counter(
            "dropped_windows",
            "Windows taken out of the queue: cancelled (the client left), expired, failed, ...",
            ("reason",),
        )
        self.batch_failures = self._counter(
            "batch_failures", "Batches that raised.", ("device", "error")
        )
        self.batch_cap = Gauge(
            "unet_batch_cap_windows",
            "Largest batch, where running out of memory has lowered it.",
            ("device", "key"),
            registry=self.registry,
        )
        self.reloads = self._counter("reloads", "Checkpoints taken in or turned down.", ("result",))
        self.model_info = Gauge(
            "unet_model_info",
            "Models in service; the value is 1.",
            ("model", "id", "engine", "device", "precision"),
            registry=self.registry,
        )
        for stage in STAGES:
            self.stage_seconds.labels(stage)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A value that is read when somebody asks."""
        Gauge(f"unet_{name}", text, registry=self.registry).set_function(value)

    def gauges(
        self, name: str, text: str, label: str, values: dict[str, Callable[[], float]]
    ) -> None:
        """The same, one a label value."""
        gauge = Gauge(f"unet_{name}", text, (label,), registry=self.registry)
        for key, value in values.items():
            gauge.labels(key).set_function(value)

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)

    # --- the batcher's observer ---

    def batch_done(self, runner: str, key: Hashable, size: int, seconds: float) -> None:
        self.batch_windows.observe(size)
        self.batch_seconds.labels(runner).observe(seconds)

    def batch_failed(self, runner: str, error: BaseException) -> None:
        self.batch_failures.labels(runner, type(error).__name__).inc()

    def capped(self, runner: str, key: Hashable, cap: int) -> None:
        self.batch_cap.labels(runner, str(key)).set(cap)

    def refused(self, reason: str) -> None:
        self.rejected.labels(reason).inc()

    def dropped(self, reason: str, windows: int) -> None:
        self.dropped_windows.labels(reason).inc(windows)

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"unet_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()
    ) -> Histogram:
        return Histogram(f"unet_{name}", text, labels, buckets=buckets, registry=self.registry)
