"""One device as the batcher sees it: a batch in, an outcome for each of its windows out.

An error stays with the window that caused it: a batch that raises is split and tried again, down
to that window. Running out of memory lowers the batch limit of that key. Knows runners and batches;
no queue and no requests.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from typing import Any, Protocol, TypeVar

from app.batching.call_thread import CallThread
from app.batching.estimates import Measurements
from app.errors import DeviceLost, EngineError, OutOfMemory

log = logging.getLogger(__name__)


class Runner(Protocol):
    """A device. Its two methods block; each has a thread of its own, so that they overlap."""

    name: str

    def prepare(self, key: Any, payloads: Sequence[Any], /) -> Any:
        """Turn the payloads into the form that `run` takes: cut, stack, copy to the device."""

    def run(self, key: Any, staged: Any, /) -> Sequence[Any]:
        """Return one result per payload, in their order."""


class Observer:
    """Receives events on the event loop; its methods must not block. This base ignores them."""

    def batch_done(self, runner: str, key: Hashable, size: int, seconds: float) -> None:
        """A batch has run."""

    def batch_failed(self, runner: str, error: BaseException) -> None:
        """A batch raised an error. It is split if it can be."""

    def batch_capped(self, runner: str, key: Hashable, cap: int) -> None:
        """The device ran out of memory; batches of this key now have at most `cap` windows."""

    def batch_cap_removed(self, runner: str, key: Hashable) -> None:
        """The key is not used any more."""

    def request_rejected(self, reason: str) -> None:
        """A request was not admitted: queue_full, deadline, draining or dead."""

    def windows_dropped(self, reason: str, windows: int) -> None:
        """Windows left the queue without a result: cancelled, expired, failed, dead or stopped."""


class BatchItem(Protocol):
    """One window of a batch."""

    @property
    def payload(self) -> Any:
        """The runner's input for this window."""

    @property
    def wanted(self) -> bool:
        """Whether its request still waits for the result."""


ItemT = TypeVar("ItemT", bound=BatchItem)


@dataclasses.dataclass
class _RunningBatch:
    """The batch on the device.

    Attributes:
        started: on the clock of `time.monotonic`.
        expected: seconds that it should take, as measured.
        measured: whether to record how long it takes.
    """

    key: Hashable
    started: float
    expected: float
    measured: bool = True


class DeviceWorker:
    """A runner with its two threads.

    Attributes:
        runner: the device.
        idle: no batch is being prepared for it.
        failure: why the device cannot compute any more; None if it can.
        wake: set when there may be something for it to do.
        measurements: seconds that its batches took.
    """

    def __init__(self, runner: Runner, observer: Observer) -> None:
        self.runner = runner
        self.idle = False
        self.failure: DeviceLost | None = None
        self.wake = asyncio.Event()
        self.measurements = Measurements()
        self._batch: _RunningBatch | None = None
        self._caps: dict[Hashable, int] = {}
        self._observer = observer
        self._prepare_thread = CallThread(f"{runner.name} prepare")
        self._run_thread = CallThread(f"{runner.name} run")

    @property
    def available(self) -> bool:
        """Whether it would start a batch at once."""
        return self.idle and self._batch is None and self.failure is None

    def max_batch(self, key: Hashable, limit: int) -> int:
        """The most windows of a key in one batch: `limit`, or less where memory was too small."""
        return min(limit, self._caps.get(key, limit))

    def elapsed(self) -> float:
        """Seconds that a batch has been on the device; 0 if there is none."""
        return 0.0 if self._batch is None else time.monotonic() - self._batch.started

    def remaining(self) -> float:
        """Seconds until that batch should be done, as measured; 0 if there is none."""
        return 0.0 if self._batch is None else max(0.0, self._batch.expected - self.elapsed())

    def forget(self, matches: Callable[[Any], bool]) -> None:
        """Drop what is known about the keys that match."""
        self.measurements.forget(matches)
        for key in [key for key in self._caps if matches(key)]:
            del self._caps[key]
            self._observer.batch_cap_removed(self.runner.name, key)
        if self._batch is not None and matches(self._batch.key):
            self._batch.measured = False

    def stop(self) -> None:
        """End the threads. A hung one is left behind."""
        self._prepare_thread.stop()
        self._run_thread.stop()

    async def prepare(self, key: Hashable, batch: Sequence[BatchItem]) -> Any:
        """Return what the runner's `run` takes, or the exception of the runner's `prepare`, which
        `compute` handles like one of `run`."""
        try:
            payloads = [item.payload for item in batch]
            return await self._prepare_thread.call(self.runner.prepare, key, payloads)
        except MemoryError as error:
            return OutOfMemory(f"memory of the host: {error}")
        except Exception as error:
            return error

    async def compute(
        self, key: Hashable, batch: Sequence[ItemT], staged: Any
    ) -> AsyncIterator[tuple[ItemT, Any]]:
        """Run a prepared batch.

        Yields:
            Every item once, with its result or its exception. `DeviceLost` is not the item's
            fault: another device may compute it.
        """
        try:
            for item, result in zip(batch, await self._run(key, batch, staged), strict=True):
                yield item, result
        except DeviceLost as error:
            self.failure = error
            log.error("%s is lost: %s", self.runner.name, error)
            self._observer.batch_failed(self.runner.name, error)
            for item in batch:
                yield item, error
        except Exception as error:
            self._observer.batch_failed(self.runner.name, error)
            half = len(batch) // 2
            if half == 0 or not any(item.wanted for item in batch):
                for item in batch:
                    yield item, error
                return
            if isinstance(error, OutOfMemory):
                self._caps[key] = self.max_batch(key, half)
                self._observer.batch_capped(self.runner.name, key, self._caps[key])
            for part in (batch[:half], batch[half:]):
                async for outcome in self.compute(key, part, await self.prepare(key, part)):
                    yield outcome

    async def _run(self, key: Hashable, batch: Sequence[BatchItem], staged: Any) -> Sequence[Any]:
        if self.failure is not None:
            raise self.failure
        if not any(item.wanted for item in batch):
            return [asyncio.CancelledError()] * len(batch)
        if isinstance(staged, Exception):
            raise staged
        expected = len(batch) * (self.measurements.seconds(key) or 0.0)
        running = self._batch = _RunningBatch(key, time.monotonic(), expected)
        try:
            results = await self._run_thread.call(self.runner.run, key, staged)
            seconds = self.elapsed()
        except MemoryError as error:
            raise OutOfMemory(f"memory of the host: {error}") from error
        finally:
            self._batch = None
        if len(results) != len(batch):
            raise EngineError(f"{len(results)} results for {len(batch)} windows")
        if running.measured:
            self.measurements.record(key, seconds / len(batch))
        self._observer.batch_done(self.runner.name, key, len(batch), seconds)
        return results
