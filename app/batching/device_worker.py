"""One device, as the batcher sees it: a batch in, an outcome for each of its windows out.

A failure stays with its owner: a batch that raises is split and tried again, down to the window
at fault. Running out of memory halves the batches of that key, for good. Knows runners and
batches; nothing of the queue, of requests, or of where outcomes go.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Hashable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

from app.batching.call_thread import CallThread
from app.errors import DeviceLost, EngineError, OutOfMemory

_SMOOTHING = 0.2
"""Weight of the newest batch in the measured seconds that a window takes."""
_DOUBT = 0.95
"""What a measurement counts for less, each time it alone turned somebody away."""


class Runner(Protocol):
    """A device. Its calls block, each on a thread of its own, so that they overlap."""

    name: str

    def prepare(self, key: Any, items: Sequence[Any]) -> Any:
        """Bring the items into the form `run` takes: cut, stack, copy."""

    def run(self, key: Any, staged: Any) -> Sequence[Any]:
        """One result an item, in their order."""


class Observer:
    """Told of what happens, on the event loop; must not block. This one does not listen."""

    def batch_done(self, runner: str, key: Hashable, size: int, seconds: float) -> None:
        """A batch gave its results."""

    def batch_failed(self, runner: str, error: BaseException) -> None:
        """A batch raised; it will be split, if it can be."""

    def batch_capped(self, runner: str, key: Hashable, cap: int) -> None:
        """The device ran out of memory: batches of this key are no larger from now on."""

    def request_rejected(self, reason: str) -> None:
        """A request was not admitted: queue_full, deadline, draining, dead."""

    def windows_dropped(self, reason: str, windows: int) -> None:
        """Waiting windows left the queue uncomputed: cancelled, expired, failed, dead, stopped."""


class Work(Protocol):
    """One window of a batch."""

    @property
    def item(self) -> Any:
        """What the runner takes."""

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits for it."""


Window = TypeVar("Window", bound=Work)


class DeviceWorker:
    """A runner, its two threads, and what is known of it.

    Attributes:
        waits: for its next batch; none is being prepared.
        caps: largest batch by key, where running out of memory has lowered it.
        lost: why the device will never answer again.
        wake: set when there may be something to do.
    """

    def __init__(self, runner: Runner, observer: Observer) -> None:
        self.runner = runner
        self.waits = False
        self._since: float | None = None
        self.caps: dict[Hashable, int] = {}
        self.lost: DeviceLost | None = None
        self.wake = asyncio.Event()
        self._seconds: dict[Hashable, float] = {}
        self._trust: dict[Hashable, float] = {}
        self._expected = 0.0
        self._observer = observer
        self._preparing = CallThread(f"{runner.name} prepare")
        self._running = CallThread(f"{runner.name} run")

    def cap(self, key: Hashable, most: int) -> int:
        """Windows of this key that a batch may hold."""
        return min(most, self.caps.get(key, sys.maxsize))

    def seconds(self, key: Hashable | None) -> float | None:
        """That a window takes, measured; the mean of all keys for one not seen yet, or for none."""
        known = self._seconds
        if not known:
            return None
        measured = known[key] if key in known else sum(known.values()) / len(known)
        return measured * self._trust.get(key, 1.0)

    def doubt(self, keys: Iterable[Hashable]) -> None:
        """Trust the measured seconds of these keys less, until the next batch of them is measured.

        Who is refused because of them is no batch that could correct them: after one slow moment
        of the machine everybody with a short deadline would be refused for ever.
        """
        for key in keys:
            self._trust[key] = self._trust.get(key, 1.0) * _DOUBT

    @property
    def free(self) -> bool:
        """Whether it would begin a batch at once."""
        return self.waits and self._since is None and self.lost is None

    def elapsed(self) -> float:
        """Seconds that the batch has been on the device; 0 when there is none."""
        return 0.0 if self._since is None else asyncio.get_running_loop().time() - self._since

    def running_yet(self) -> float:
        """Seconds until that batch should be done, as measured; 0 when there is none."""
        return 0.0 if self._since is None else max(0.0, self._expected - self.elapsed())

    def end(self) -> None:
        """Let the threads go; a hung one is left behind."""
        self._preparing.end()
        self._running.end()

    async def prepare(self, key: Hashable, batch: Sequence[Work]) -> Any:
        """What the runner's `run` takes; or the exception, which `compute` takes as its own."""
        try:
            items = [window.item for window in batch]
            return await self._preparing.call(self.runner.prepare, key, items)
        except Exception as error:
            return error

    async def compute(
        self, key: Hashable, batch: Sequence[Window], staged: Any
    ) -> AsyncIterator[tuple[Window, Any]]:
        """Run a prepared batch.

        Yields:
            Every window once, with its result or with the exception that is its own.
            `DeviceLost` is nobody's own: another device may compute that window.
        """
        try:
            for window, result in zip(batch, await self._run(key, batch, staged), strict=True):
                yield window, result
        except DeviceLost as error:
            self.lost = error
            self._observer.batch_failed(self.runner.name, error)
            for window in batch:
                yield window, error
        except Exception as error:
            self._observer.batch_failed(self.runner.name, error)
            half = len(batch) // 2
            if not half:
                yield batch[0], error
                return
            if isinstance(error, OutOfMemory):
                self.caps[key] = self.cap(key, half)
                self._observer.batch_capped(self.runner.name, key, self.caps[key])
            for part in (batch[:half], batch[half:]):
                async for outcome in self.compute(key, part, await self.prepare(key, part)):
                    yield outcome

    async def _run(self, key: Hashable, batch: Sequence[Work], staged: Any) -> Sequence[Any]:
        if self.lost is not None:
            raise self.lost
        if not any(window.wanted for window in batch):
            return [asyncio.CancelledError()] * len(batch)
        if isinstance(staged, Exception):
            raise staged
        loop = asyncio.get_running_loop()
        self._since = loop.time()
        self._expected = len(batch) * (self.seconds(key) or 0.0)
        try:
            results = await self._running.call(self.runner.run, key, staged)
            if len(results) != len(batch):
                raise EngineError(f"{len(results)} results for {len(batch)} windows")
            seconds = self.elapsed()
        finally:
            self._since = None
        newest = seconds / len(batch)
        known = self._seconds.setdefault(key, newest)
        self._seconds[key] = known + _SMOOTHING * (newest - known)
        self._trust.pop(key, None)
        self._observer.batch_done(self.runner.name, key, len(batch), seconds)
        return results
