"""The house, assembled: what is built from the settings, in which order it starts and ends.

Start: listen (so that probes are answered), load, warm every shape, reproduce the golden mask,
ready; then the other models. End: not ready at once, no new work, every accepted request
answered, then the engines are freed.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from app.batching.batcher import Batcher
from app.engine.device_engines import BatchKey, DeviceEngines, WindowJob
from app.engine.memory import used_bytes
from app.engine.selection import choose_engines, cpu_quota
from app.errors import SettingsError, Unavailable
from app.inference.budget import Budget
from app.inference.outputs import preload_instance_modules
from app.inference.registry import Registry
from app.inference.segmenter import Segmenter
from app.metrics import Metrics
from app.settings import Settings
from model.arrays import FloatArray
from model.checkpoint import SUFFIX

log = logging.getLogger(__name__)

_QUEUE_ON_CPU, _QUEUE_ON_CUDA = 64, 512
_ENGINE_FAILED = 70
"""Exit status after an engine failure (sysexits.h: EX_SOFTWARE)."""


class Service:
    """Everything behind the routes.

    Raises:
        SettingsError, EngineUnavailable: the settings ask for what is not there.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        _check_model(settings.weights_dir, settings.model)
        choices = choose_engines(
            device=settings.device,
            engine=settings.engine,
            precision=settings.precision,
            threads=settings.threads,
            max_batch=settings.max_batch,
        )
        self.metrics = Metrics()
        self.workers = [DeviceEngines(choice.device) for choice in choices]
        on_cpu = choices[0].device == "cpu"
        self.batcher: Batcher[WindowJob, FloatArray] = Batcher(
            self.workers,
            max_batch=self._max_batch,
            capacity=settings.queue_windows or (_QUEUE_ON_CPU if on_cpu else _QUEUE_ON_CUDA),
            max_wait=settings.max_wait_ms / 1000,
            observer=self.metrics,
        )
        # Decoding and encoding run beside the engine; more threads than CPUs would only contend.
        self.pool = ThreadPoolExecutor(settings.threads or cpu_quota(), "images")
        memory_refused = self.metrics.rejected.labels("memory").inc
        self.pixels = Budget(
            1e6 * max(settings.queue_megapixels, settings.max_megapixels),
            "megapixels of decoded images",
            memory_refused,
        )
        self.bytes = Budget(
            1e6 * max(settings.queue_mb, settings.max_upload_mb),
            "MB of uploads and answers",
            memory_refused,
        )
        self.segmenter = Segmenter(
            self.batcher,
            self.pool,
            max_pixels=int(settings.max_megapixels * 1e6),
            pixels=self.pixels,
            metrics=self.metrics,
        )
        self.registry = Registry(
            settings.weights_dir,
            settings.model,
            choices,
            self.workers,
            self.segmenter.golden_mask,
            self.metrics,
        )
        self.choices = choices
        self.failed = asyncio.Event()
        """Set when the start failed for good: nothing will ever be served."""
        self.draining = False
        self._accepted: set[asyncio.Task[object]] = set()
        self._all_answered = asyncio.Event()
        self._all_answered.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._register_gauges()

    async def start(self) -> None:
        """Begin to load; returns at once, so that the probes are answered meanwhile."""
        await self.batcher.start()
        self._tasks = [asyncio.create_task(self._load()), asyncio.create_task(self._watchdog())]

    async def start_without_probes(self) -> None:
        """Load the default model and nothing else, without probes; returns when it is ready.

        Raises:
            CheckpointError, ConfigError, EngineUnavailable, GoldenMaskMismatch: it cannot serve.
            ServiceError: what its proof met instead of a mask.
        """
        await self.batcher.start()
        await self.registry.load_default()

    @contextmanager
    def track_request(self) -> Iterator[None]:
        """A request that is here in full: a drain waits until it is answered, all its images.

        Raises:
            Unavailable: no request is taken now.
        """
        self.check_ready()
        task = asyncio.current_task()
        assert task is not None  # whoever calls this runs on the loop
        self._accepted.add(task)
        self._all_answered.clear()
        try:
            yield
        finally:
            self._accepted.remove(task)
            if not self._accepted:
                self._all_answered.set()

    async def drain(self) -> None:
        """No new work from now on; returns when every accepted request is settled."""
        self.draining = True
        await self._all_answered.wait()
        await self.batcher.drain()

    def cancel_accepted(self) -> int:
        """Cancel the accepted requests that are not answered, each of which then answers 503
        (`ServerErrorMiddleware`); returns how many they were."""
        for task in self._accepted:
            task.cancel()
        return len(self._accepted)

    async def stop(self) -> None:
        """After the last request: end the tasks and free the engines."""
        self.draining = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.batcher.close()
        self.registry.close()
        self.pool.shutdown(wait=False, cancel_futures=True)

    @property
    def started(self) -> bool:
        """The default model was loaded, warmed and proven."""
        return self.registry.entries[self.settings.model].served is not None

    def liveness_error(self) -> str | None:
        """Why an orchestrator should restart this process; None while it is sound."""
        running = self.batcher.elapsed()
        if running > self.settings.watchdog_s:
            return (
                f"the engine is hung: a batch has been running for {running:.0f} s, longer than "
                f"UNET_WATCHDOG_S={self.settings.watchdog_s:g}"
            )
        if dead := self.batcher.dead:
            return str(dead)
        return None

    def readiness_error(self) -> str | None:
        """Why no request should come here now; None when the default model is proven."""
        if self.draining:
            return "draining: the service is about to stop"
        if not self.started:
            error = self.registry.entries[self.settings.model].error
            return (
                f"the default model cannot be served: {error}"
                if error
                else f"starting: {self.settings.model} is loading"
            )
        return self.liveness_error()

    def check_ready(self) -> None:
        """
        Raises:
            Unavailable: no request should come here now.
        """
        if cause := self.readiness_error():
            raise Unavailable(cause, retry_after=2)

    async def _load(self) -> None:
        try:
            await self.registry.load_default()
        except Exception as error:
            log.error("the default model cannot be served: %s", error)
            if not self.settings.reload:
                self.failed.set()
                return
        try:
            await asyncio.to_thread(preload_instance_modules)
        except ImportError as error:  # masks are made without it
            log.error("objects cannot be told apart: %s", error)
        await self.registry.load_others()
        if self.settings.reload:
            await self.registry.watch()

    async def _watchdog(self) -> None:
        """Leave the process, if told to, when the engine is hung or lost."""
        while self.settings.exit_on_engine_failure:
            await asyncio.sleep(min(1.0, self.settings.watchdog_s / 4))
            if cause := self.liveness_error():
                log.critical("leaving: %s", cause)
                logging.shutdown()
                os._exit(_ENGINE_FAILED)  # a hung thread cannot be joined

    def _max_batch(self, key: BatchKey) -> int:
        return self.workers[0].max_batch(key)

    def _register_gauges(self) -> None:
        gauge, batcher = self.metrics.add_gauge, self.batcher
        gauge("windows_waiting", "Windows in the queue.", lambda: batcher.waiting)
        gauge("windows_in_flight", "Windows on a device.", lambda: batcher.in_flight)
        gauge("windows_reserved", "Windows of all admitted requests.", lambda: batcher.reserved)
        gauge(
            "engine_windows_per_second",
            "Measured rate, 0 before it.",
            lambda: 1 / seconds if (seconds := batcher.estimates.seconds()) else 0.0,
        )
        gauge("batch_running_seconds", "Age of the running batch.", batcher.elapsed)
        gauge("held_pixels", "Decoded images held.", lambda: self.pixels.used)
        gauge("held_bytes", "Uploads and answers held.", lambda: self.bytes.used)
        self.metrics.add_labeled_gauge(
            "gpu_memory_used_bytes",
            "In use on a CUDA device.",
            "device",
            {
                choice.device: functools.partial(used_bytes, choice.device)
                for choice in self.choices
                if choice.device.startswith("cuda")
            },
        )
        gauge("ready", "1 when requests are served.", lambda: float(self.readiness_error() is None))


def _check_model(folder: Path, name: str) -> None:
    there = sorted(path.stem for path in folder.glob(f"*{SUFFIX}"))
    if name not in there:
        raise SettingsError(
            f"UNET_MODEL={name!r}: {folder} holds "
            + (f"{', '.join(there)}" if there else f"no {SUFFIX} files")
        )
