"""The service without HTTP: it builds the parts from the settings, starts them and stops them.

Start: load the default model, warm up every window shape, reproduce the golden mask; then the
service is ready, and loads the other models. Probes are answered meanwhile. Stop: the service is
not ready any more and accepts no work, answers every accepted request, and frees the engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from app import logs
from app.batching.batcher import Batcher
from app.batching.device_worker import Runner
from app.engine.device_engines import BatchKey, DeviceEngines, WindowJob
from app.engine.selection import choose_engines, cpu_quota
from app.errors import ServiceError, SettingsError, Unavailable
from app.imaging.workers.pool import WorkerPool
from app.imaging.workers.worker import CallLimit
from app.inference import steps
from app.inference.allocator import trim_memory
from app.inference.budget import Budget
from app.inference.registry import Registry, WrapEngineFn, use_as_built
from app.inference.rendering import preload_object_modules
from app.inference.segmenter import Segmenter
from app.metrics import Metrics
from app.settings import PREFIX, Settings
from model.arrays import Probabilities
from model.checkpoint import SUFFIX

if TYPE_CHECKING:
    from app.tracing.spans import Tracing

log = logging.getLogger(__name__)

_CHECK_SECONDS = 5.0
"""Between two checks that a device responds; `gpu_memory_used_bytes` is as old."""
_PRELOAD = CallLimit("preloading", 60, 500_000_000)
_TRIM = CallLimit("trimming", 5, 100_000_000)
_IDLE_S = 2.0
"""Time without a new request after which free memory is given back to the system."""
_ENGINE_FAILED = 70
"""Exit status after an engine failure (sysexits.h: EX_SOFTWARE)."""


class Service:
    """Everything that the routes use.

    Args:
        settings: of the process.
        wrap_engine: see `Registry`.
        tracing: makes the traces of requests, if there are any.

    Attributes:
        failed: set when the process should end, because it cannot serve the default model.
        exit_status: of the process in that case.
        draining: no more work is accepted.

    Raises:
        SettingsError, EngineUnavailable: the settings name a model, a device or an engine that
            this machine does not have.
    """

    def __init__(
        self,
        settings: Settings,
        wrap_engine: WrapEngineFn = use_as_built,
        tracing: Tracing | None = None,
    ) -> None:
        self.settings = settings
        check_model(settings)
        choices = choose_engines(
            device=settings.device,
            engine=settings.engine,
            precision=settings.precision,
            threads=settings.threads,
            max_batch=settings.max_batch,
        )
        self.metrics = Metrics()
        self.tracing = tracing
        self.devices = [DeviceEngines(choice.device) for choice in choices]
        for device in self.devices:
            self.metrics.add_device(device.name)
        self.batcher: Batcher[WindowJob, Probabilities] = Batcher(
            self._runners(),
            max_batch=self.devices[0].max_batch,
            capacity=settings.queue_windows,
            longest=settings.longest_timeout_s,
            max_wait=settings.max_wait_ms / 1000,
            observer=self.metrics,
        )
        self.workers = WorkerPool(
            settings.image_workers or cpu_quota(),
            (steps.__name__,),
            on_kill=lambda reason: self.metrics.image_worker_kills.labels(reason).inc(),
            on_restart=self.metrics.image_worker_restarts.inc,
        )
        # For blending; more threads than CPUs would only compete with the engine.
        self.pool = ThreadPoolExecutor(settings.threads or cpu_quota(), "blend")
        count_rejected = self.metrics.rejected.labels("memory").inc
        self.pixels = Budget(
            1e6 * max(settings.queue_megapixels, settings.max_megapixels),
            "megapixels of decoded images",
            count_rejected,
        )
        self.bytes = Budget(
            1e6 * max(settings.queue_mb, settings.max_upload_mb),
            "MB of uploads and responses",
            count_rejected,
        )
        self.segmenter = Segmenter(
            self.batcher,
            self.workers,
            self.pool,
            max_pixels=int(settings.max_megapixels * 1e6),
            pixels=self.pixels,
            metrics=self.metrics,
            tracing=self.tracing,
        )
        self.registry = Registry(
            settings.weights_dir,
            settings.model,
            choices,
            self.devices,
            self.batcher.workers,
            golden_mask=self.segmenter.golden_mask,
            on_free=self._forget_model,
            metrics=self.metrics,
            wrap_engine=wrap_engine,
        )
        self.choices = choices
        self.failed = asyncio.Event()
        self.exit_status = 1
        self.draining = False
        self._accepted: set[asyncio.Task[object]] = set()
        self._accepted_ever = 0
        self._unused_memory = asyncio.Event()
        self._all_answered = asyncio.Event()
        self._all_answered.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._register_gauges()

    async def start(self) -> None:
        """Begin to load models. Returns at once, so that probes are answered meanwhile."""
        self.workers.start()
        await self.batcher.start()
        loops = (self._load(), self._watchdog(), self._check_devices(), self._trim_when_idle())
        self._tasks = [asyncio.create_task(each) for each in loops]

    async def start_without_probes(self) -> None:
        """Load the default model alone, and return when it is ready.

        Raises:
            CheckpointError, ConfigError, EngineUnavailable, GoldenMaskMismatch: it cannot be
                served.
            ServiceError: its golden image could not be segmented.
        """
        self.workers.start()
        await self.batcher.start()
        await self.registry.load_default()

    @contextmanager
    def track_request(self) -> Iterator[None]:
        """Accept the request of the current task; a drain waits until the block ends.

        Raises:
            Unavailable: the service is not ready.
        """
        self.check_ready()
        task = asyncio.current_task()
        assert task is not None
        self._accepted.add(task)
        self._accepted_ever += 1
        self._all_answered.clear()
        try:
            yield
        finally:
            self._accepted.remove(task)
            if not self._accepted:
                self._all_answered.set()

    async def drain(self) -> None:
        """Accept no more requests, and return when every accepted one is answered."""
        self.draining = True
        await self._all_answered.wait()
        await self.batcher.drain()

    def cancel_accepted(self) -> int:
        """Cancel the accepted requests that are not answered, and return their number."""
        for task in self._accepted:
            task.cancel()
        return len(self._accepted)

    async def stop(self) -> None:
        """End the tasks and free the engines."""
        self.draining = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.registry.close()
        await self.batcher.close()
        await self.workers.stop()
        self.segmenter.close()
        self.pool.shutdown(wait=False, cancel_futures=True)
        if self.tracing is not None:
            await self.tracing.close()

    def _runners(self) -> Sequence[Runner]:
        """The devices as the batcher sees them: with spans of their batches, if there are any."""
        if self.tracing is None:
            return self.devices
        from app.tracing.device import TracedDevice

        return [TracedDevice(device, self.tracing) for device in self.devices]

    @property
    def started(self) -> bool:
        """Whether the default model has reproduced its golden mask."""
        return self.registry.entries[self.settings.model].served is not None

    def liveness_error(self) -> str | None:
        """Why the process should be restarted; None if it should not."""
        elapsed = self.batcher.elapsed()
        if elapsed > self.settings.watchdog_s:
            return (
                f"the engine is hung: its device has been busy for {elapsed:.0f} s, longer than "
                f"UNET_WATCHDOG_S={self.settings.watchdog_s:g}"
            )
        failure = self.batcher.failure
        return self.workers.failure if failure is None else str(failure)

    def readiness_error(self) -> str | None:
        """Why requests should not be sent here now; None if they should."""
        if self.draining:
            return "draining: the service is about to stop"
        if not self.started:
            if self.registry.entries[self.settings.model].error is not None:
                return "the default model cannot be served; see the server log"
            return f"starting: {self.settings.model} is loading"
        return self.liveness_error()

    def check_ready(self) -> None:
        """Check that the service accepts requests.

        Raises:
            Unavailable: it does not; the message is `readiness_error`.
        """
        error = self.readiness_error()
        if error is not None:
            raise Unavailable(error, retry_after=2)

    async def _load(self) -> None:
        try:
            await self.registry.load_default()
        except Exception as error:
            log.error("the default model cannot be served: %s", error)
            if not self.settings.reload:
                self.failed.set()
                return
        try:
            await self.workers.call_each(_PRELOAD, preload_object_modules)
        except (
            RuntimeError,
            ConnectionError,
            ServiceError,
        ) as error:  # the other outputs do not need these modules
            log.error("outputs of objects are not available: %s", error)
        await self.registry.load_others()
        self._unused_memory.set()
        if self.settings.reload:
            await self.registry.watch()

    async def _watchdog(self) -> None:
        """Exit when the engine is hung or lost, if UNET_EXIT_ON_ENGINE_FAILURE is set."""
        while self.settings.exit_on_engine_failure:
            await asyncio.sleep(min(1.0, self.settings.watchdog_s / 4))
            error = self.liveness_error()
            if error is not None:
                log.critical("exiting: %s", error)
                self.exit_status = _ENGINE_FAILED
                self.cancel_accepted()  # their clients are answered with 503
                self.failed.set()
                return

    async def _check_devices(self) -> None:
        """Notice a device that is lost or hangs while no request uses it."""
        while True:
            await asyncio.sleep(min(_CHECK_SECONDS, self.settings.watchdog_s / 4))
            await self.batcher.check_devices()

    async def _trim_when_idle(self) -> None:
        """Give free memory back to the system after models were loaded or freed, and in pauses.

        While requests come, free memory is reused: new pages would take time.
        """
        trimmed_at = seen = self._accepted_ever
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._unused_memory.wait(), _IDLE_S)
            idle = seen == self._accepted_ever != trimmed_at
            seen = self._accepted_ever
            if idle or self._unused_memory.is_set():
                trimmed_at = seen
                self._unused_memory.clear()
                await self._trim()

    async def _trim(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self.pool, trim_memory)
        try:
            await self.workers.call_each(_TRIM, trim_memory)
        except (RuntimeError, ConnectionError, ServiceError) as error:  # it ended, or is replaced
            log.warning("an image worker kept its memory: %s", error)

    def _forget_model(self, engine_id: str) -> None:
        """Estimates and metrics are about models that exist, and their memory is not needed."""
        self._unused_memory.set()

        def is_of_engine(key: BatchKey) -> bool:
            return key.model == engine_id

        self.batcher.forget(is_of_engine)

    def _register_gauges(self) -> None:
        gauge, batcher = self.metrics.add_gauge, self.batcher
        gauge("windows_waiting", "Windows in the queue.", lambda: batcher.statistics().waiting)
        gauge("windows_capacity", "Limit on the windows reserved.", lambda: batcher.capacity)
        gauge("windows_in_flight", "Windows on a device.", lambda: batcher.statistics().in_flight)
        gauge(
            "windows_reserved",
            "Windows of admitted requests without a result.",
            lambda: batcher.statistics().reserved,
        )
        gauge(
            "engine_windows_per_second",
            "Measured rate; 0 before the first batch.",
            self._windows_per_second,
        )
        gauge(
            "batch_running_seconds",
            "Seconds that a device has been at its batch, at most.",
            batcher.elapsed,
        )
        gauge("image_workers", "Image workers that take calls.", lambda: self.workers.running)
        gauge("image_workers_busy", "Image workers with a call.", lambda: self.workers.busy)
        gauge("held_pixels", "Pixels of the decoded images in memory.", lambda: self.pixels.used)
        gauge("held_bytes", "Bytes of uploads and responses in memory.", lambda: self.bytes.used)
        self._register_gpu_memory()
        self.metrics.add_counter(
            "log_lines_dropped",
            "Lines dropped because the log was not read.",
            logs.count_dropped_lines,
        )
        gauge("ready", "1 if requests are served.", lambda: float(self.readiness_error() is None))
        gauge(
            "live",
            "1 unless the process should be restarted.",
            lambda: float(self.liveness_error() is None),
        )

    def _register_gpu_memory(self) -> None:
        self.metrics.add_labeled_gauge(
            "gpu_memory_used_bytes",
            "Memory in use on a CUDA device.",
            "device",
            {
                # as measured on the device's own thread: a hung driver must not block this one
                device.name: functools.partial(getattr, device, "used_bytes")
                for device in self.devices
                if device.name != "cpu"
            },
        )

    def _windows_per_second(self) -> float:
        seconds = self.batcher.estimates.seconds()
        return 1 / seconds if seconds else 0.0


def check_model(settings: Settings) -> None:
    """Check that the weights folder holds the default model.

    Raises:
        SettingsError: it does not; the message says which ones it holds.
    """
    folder, name = settings.weights_dir, settings.model
    available = sorted(path.stem for path in folder.glob(f"*{SUFFIX}"))
    if name in available:
        return
    if not available:
        raise SettingsError(f"{PREFIX}WEIGHTS_DIR={str(folder)!r}: it holds no {SUFFIX} files")
    names = ", ".join(available)
    if "model" in settings.model_fields_set:
        raise SettingsError(f"{PREFIX}MODEL={name!r}: {folder} holds {names}")
    raise SettingsError(
        f"{PREFIX}MODEL is not set, and {folder} holds {names}; set {PREFIX}MODEL or --model to "
        "one of them"
    )
