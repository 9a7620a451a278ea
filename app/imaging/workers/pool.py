"""A pool of processes for work on bytes from clients: decoding, preparing, rendering, encoding.

A decoder cannot be interrupted, and one that crashes takes its process with it. So each call has a
limit of time and of memory, and a process that exceeds one is killed and replaced. Only the call
that it was making fails. Knows processes and functions; no images and no HTTP.

::

    WorkerPool ── call ──▶ an idle ImageWorker ── pickle, file descriptors ──▶ its process
               ◀─ result ─                     ◀─ JSON ─────────────────────── (`child`)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from app.imaging.workers.worker import CallLimit, ImageWorker, KillReason, WorkerStartError

log = logging.getLogger(__name__)

_FAILED_STARTS = 3
"""Starts that fail one after the other until the pool counts as failed."""
_MAX_PAUSE = 10.0


class WorkerPool:
    """Keeps a number of processes running, and gives calls to those that are idle.

    Args:
        size: number of processes.
        modules: imported by each process at its start.
        on_kill: called with the reason when a process was killed or crashed.
        on_restart: called when a process has replaced another one.

    Attributes:
        failure: why no process can be started any more; None while that works.
    """

    def __init__(
        self,
        size: int,
        modules: Sequence[str],
        *,
        on_kill: Callable[[KillReason], object] = lambda reason: None,
        on_restart: Callable[[], object] = lambda: None,
    ) -> None:
        self.size = size
        self.failure: str | None = None
        self._modules = modules
        self._on_kill = on_kill
        self._on_restart = on_restart
        self._failed_starts = 0
        self._idle: list[ImageWorker] = []
        self._became_idle = asyncio.Semaphore(0)
        """Released for each worker that becomes idle. One that ends while idle leaves it as it is,
        so that its count is at least the number of idle workers."""
        self._running: set[ImageWorker] = set()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def running(self) -> int:
        """Number of processes that take calls."""
        return len(self._running)

    @property
    def busy(self) -> int:
        """Number of processes that are making a call."""
        return sum(worker.busy for worker in self._running)

    def start(self) -> None:
        """Begin to start the processes. Calls wait for the first one."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._keep_one()) for _ in range(self.size)]

    async def stop(self) -> None:
        """Kill all processes."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def call(self, limit: CallLimit, function: Callable[..., Any], *args: Any) -> Any:
        """Run `function(*args)` in a process, and return its result.

        If this is cancelled while the function runs, its process is killed unless it is done soon.

        Args:
            limit: counts from the moment a process begins with the call.
            function: of a module; its result must be representable as JSON.
            args: are pickled; shared blocks among them are passed by their file descriptors.

        Raises:
            ServiceError: the function raised it; same class, same text.
            UnprocessableImage: the call exceeded a limit, or its process ended.
            RuntimeError: the function raised anything else.
        """
        while True:
            try:
                return await self._call(await self._take_idle(), limit, function, *args)
            except ConnectionError:  # the process ended while it was idle: take another one
                log.debug("an idle image worker had ended")

    async def call_each(self, limit: CallLimit, function: Callable[..., Any], *args: Any) -> None:
        """Make a call in every process that is idle now, one after the other. See `call`."""
        for worker in list(self._idle):
            if worker in self._idle:
                self._idle.remove(worker)
                await self._call(worker, limit, function, *args)

    async def _call(
        self, worker: ImageWorker, limit: CallLimit, function: Callable[..., Any], *args: Any
    ) -> Any:
        try:
            return await worker.call(limit, function, *args)
        finally:
            if worker.busy:  # cancelled, or not even sent
                late = time.monotonic() >= limit.deadline
                worker.abandon(KillReason.DEADLINE if late else KillReason.CANCELLED)
            else:
                self._give_back(worker)

    async def _take_idle(self) -> ImageWorker:
        while True:
            await self._became_idle.acquire()
            if self._idle:
                return self._idle.pop()  # the last one used: its memory is in the caches

    def _give_back(self, worker: ImageWorker) -> None:
        if worker.kill_reason is not None:
            return
        if worker.leaks:
            worker.kill(KillReason.LEAK)
            return
        self._idle.append(worker)
        self._became_idle.release()

    async def _keep_one(self) -> None:
        """Keep one process running: start it, and replace it whenever it ends."""
        restart = False
        while True:
            try:
                worker = await ImageWorker.start(self._modules, self._give_back)
            except (WorkerStartError, OSError) as error:
                await self._pause_after_failed_start(str(error))
                continue
            self.failure = None
            if restart:
                self._on_restart()
            self._running.add(worker)
            self._give_back(worker)
            start = time.monotonic()
            try:
                reason = await worker.wait()
            finally:
                self._running.remove(worker)
                if worker in self._idle:
                    self._idle.remove(worker)
                await worker.close()
            restart = True
            self._on_kill(reason)
            log.warning("an image worker ended (%s, %s)", reason, worker.exit_status)
            log.debug("image worker: %s", worker.describe_end())
            if worker.used or time.monotonic() > start + _MAX_PAUSE:
                self._failed_starts = 0
            else:
                await self._pause_after_failed_start(worker.describe_end())

    async def _pause_after_failed_start(self, error: str) -> None:
        self._failed_starts += 1
        log.error("an image worker could not be started: %s", error)
        if self._failed_starts >= _FAILED_STARTS:
            self.failure = (
                f"image workers cannot be started: {self._failed_starts} failures in a row"
            )
        await asyncio.sleep(min(0.1 * 2**self._failed_starts, _MAX_PAUSE))
