"""One device as the batcher sees it: a batch in, an outcome for each of its windows out.

An error stays with the window that caused it: a batch that raises is split and tried again, down
to that window. Running out of memory lowers the batch limit of that key for a while. Two batches
may be under way: on CUDA both are on the device, elsewhere one is prepared while the other runs.
Knows runners and batches; no queue and no requests.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from app.batching.batch_caps import BatchCaps
from app.batching.call_thread import CallThread, ThreadCallback, ThreadFuture
from app.batching.device_thread import DeviceCall, DeviceThread, Timed
from app.batching.estimates import Measurements
from app.errors import DeviceLost, EngineError, OutOfMemory

log = logging.getLogger(__name__)

MAX_BATCHES = 2
"""Batches that a worker has at once, from the first window cut to the last result."""
_HANDOVER_S = 0.002
"""Seconds that a batch takes from the queue to its device besides cutting its windows: the event
loop's timer is exact to a millisecond, and threads have to wake up."""
_SMOOTHING = 0.2
"""Weight of the newest batch in the average time to prepare one."""


class Runner(Protocol):
    """A device. All methods but `prepare` are called on one thread; `prepare` has its own.

    Attributes:
        name: of the device.
        depth: most batches that are submitted and not collected.
    """

    name: str
    depth: int

    def prepare(self, key: Any, payloads: Sequence[Any], /) -> Any:
        """Turn the payloads into the form that `submit` takes: cut and stack them."""

    def submit(self, key: Any, staged: Any, /) -> Any:
        """Start to compute a batch, and return what `collect` takes. Waits for nothing."""

    def collect(self, key: Any, submitted: Any, /) -> Sequence[Any]:
        """Wait for a batch, and return one result per payload, in their order."""

    def check(self) -> None:
        """Check that the device responds.

        Raises:
            DeviceLost: it does not.
        """


class Observer:
    """Receives events on the event loop; its methods must not block. This base ignores them."""

    def batch_done(self, runner: str, key: Hashable, size: int, seconds: float) -> None:
        """A batch has run."""

    def batch_failed(self, runner: str, error: BaseException) -> None:
        """A batch raised an error. It is split if it can be."""

    def batch_capped(self, runner: str, key: Hashable, cap: int) -> None:
        """The device ran out of memory before; batches of this key have at most `cap` windows."""

    def batch_cap_removed(self, runner: str, key: Hashable) -> None:
        """The limit of this key was removed, or the key is not used any more."""

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
T = TypeVar("T")


class NotWanted(Exception):
    """No request waits for any window of the batch, so it was not run."""


class Outcome(NamedTuple, Generic[ItemT]):
    """The outcome of one window.

    Attributes:
        result: of the runner, or an exception.
        started: when its batch began to run, on the clock of `time.monotonic`.
    """

    item: ItemT
    result: Any
    started: float


Done = Timed[Sequence[Any]] | BaseException
"""The results of a batch, or its error."""
Settle = Callable[[Sequence[Outcome[ItemT]]], object]
"""Gives items their outcomes."""


@dataclasses.dataclass
class _RunningBatch:
    """A batch that the worker has.

    Attributes:
        expected: seconds that it should take on the device, as measured; None if unknown.
        measured: whether to record how long it takes.
        created: on the clock of `time.monotonic`.
    """

    key: Hashable
    expected: float | None
    measured: bool = True
    created: float = dataclasses.field(default_factory=time.monotonic)


class DeviceWorker:
    """A runner with its threads: one prepares batches, and `DeviceThread` makes all other calls.

    Attributes:
        runner: the device.
        idle: it waits for a batch to be formed.
        failure: why the device cannot compute any more; None if it can.
        splitting: batches that failed and whose parts are tried. It takes no other batch meanwhile:
            that could fail in the same way, or need memory that the parts need.
        wake: set when there may be something for it to do.
        measurements: seconds that its batches took.
    """

    def __init__(self, runner: Runner, observer: Observer) -> None:
        self.runner = runner
        self.idle = False
        self.failure: DeviceLost | None = None
        self.splitting = 0
        self.wake = asyncio.Event()
        self.measurements = Measurements()
        self._batches: list[_RunningBatch] = []
        self._splits: set[asyncio.Task[None]] = set()
        self._stopped = False
        self._caps = BatchCaps()
        self._capped: dict[Hashable, int] = {}
        self._prepare_seconds = 0.0
        self._observer = observer
        self._prepare_thread = CallThread(f"{runner.name} prepare")
        self._thread = DeviceThread(runner.name, runner.depth)

    @property
    def batches(self) -> int:
        """Number of batches that it has."""
        return len(self._batches)

    @property
    def available(self) -> bool:
        """Whether it would start a batch at once."""
        return self.idle and not self._batches and self.failure is None

    def max_batch(self, key: Hashable, limit: int) -> int:
        """The most windows of a key in one batch: `limit`, or less where memory was too small."""
        cap = self._caps.limit(key)
        return limit if cap is None else min(limit, cap)

    def elapsed(self) -> float:
        """Seconds that the device has been at what it does now; 0 if it is idle."""
        return self._thread.elapsed()

    def remaining(self) -> float:
        """Seconds until its batches should be done, as measured; 0 if it has none."""
        expected = sum(each.expected or 0.0 for each in self._batches)
        return max(0.0, expected - self.elapsed()) if self._batches else 0.0

    def growing_time(self) -> float | None:
        """Seconds for which the next batch can still grow, because the device has a batch.

        After that it must be prepared, or the device would wait for it. None if unknown: until the
        device is done.
        """
        if any(each.expected is None for each in self._batches):
            return None
        return max(0.0, self.remaining() - self._prepare_seconds - _HANDOVER_S)

    def forget(self, matches: Callable[[Any], bool]) -> None:
        """Drop what is known about the keys that match."""
        self.measurements.forget(matches)
        self._caps.forget(matches)
        for key in [key for key in self._capped if matches(key)]:
            self._report_cap(key)
        for batch in self._batches:
            if matches(batch.key):
                batch.measured = False

    async def call(self, function: Callable[[], T]) -> T:
        """Call the device between two batches, on the thread that runs them.

        Raises:
            DeviceLost: the device was lost before.
            Exception: what the function raised.
        """
        try:
            return await self._thread.call(functools.partial(self._noting_loss, function))
        finally:
            self.wake.set()  # the device may be lost

    def post(self, function: Callable[[], object]) -> None:
        """Call the device like `call`, without waiting. An error is logged."""

        def work() -> None:
            try:
                self._noting_loss(function)
            except Exception as error:
                log.warning("%s: %s", self.runner.name, error)

        self._thread.put(DeviceCall(work, None, ThreadFuture()))

    async def check(self) -> None:
        """Check that the device responds, so that a loss is noticed without a request.

        If it hangs, this does not return and `elapsed` grows.
        """
        try:
            await self.call(self.runner.check)
        except DeviceLost:
            pass  # `failure` is set
        except EngineError as error:
            log.warning("%s: %s", self.runner.name, error)

    async def stop(self) -> None:
        """End the threads; a hung one is left behind. Outcomes are not passed on any more."""
        self._stopped = True
        for task in self._splits:
            task.cancel()
        await asyncio.gather(*self._splits, return_exceptions=True)
        self._prepare_thread.stop()
        self._thread.stop()

    def start(self, key: Hashable, batch: Sequence[ItemT], settle: Settle[ItemT]) -> None:
        """Prepare and run a batch. Returns at once.

        Args:
            settle: gets the outcomes of the items later, on the event loop, in one call or several.
                `DeviceLost` is not an item's fault: another device may compute it.
        """
        running = self._begin(key, batch)

        def finish(done: Done) -> None:
            if self._stopped:
                return
            try:
                if not self._end(running, batch, done, settle):
                    task = asyncio.create_task(self._split(key, batch, settle))
                    self._splits.add(task)
                    task.add_done_callback(self._splits.discard)
            except Exception as error:
                self._fail(batch, error, settle)

        self._send(key, batch, ThreadCallback(finish))

    def _fail(self, batch: Sequence[ItemT], error: Exception, settle: Settle[ItemT]) -> None:
        """Fail this device after a bug, so that no request waits forever."""
        log.error("unexpected error in the batcher", exc_info=error)
        self.failure = DeviceLost(repr(error))
        settle([Outcome(item, self.failure, time.monotonic()) for item in batch])

    async def _split(self, key: Hashable, batch: Sequence[ItemT], settle: Settle[ItemT]) -> None:
        """Compute the halves of a batch that failed, one after the other."""
        self.splitting += 1
        half = len(batch) // 2
        try:
            for part in (batch[:half], batch[half:]):
                if not await self._compute_part(key, part, settle):
                    await self._split(key, part, settle)
        except Exception as error:
            self._fail(batch, error, settle)
        finally:
            self.splitting -= 1
            self.wake.set()

    async def _compute_part(
        self, key: Hashable, batch: Sequence[ItemT], settle: Settle[ItemT]
    ) -> bool:
        """Compute a part of a batch. Returns whether it was settled; if not, it has to be split.

        An error that was raised would be alive while a part of the batch is tried again.
        """
        if self.failure is not None:
            settle([Outcome(item, self.failure, time.monotonic()) for item in batch])
            return True
        outcome: ThreadFuture[Timed[Sequence[Any]]] = ThreadFuture()
        running = self._begin(key, batch)
        self._send(key, batch, outcome)
        try:
            done = await outcome.future
        except Exception as error:
            return self._end(running, batch, error, settle)
        return self._end(running, batch, done, settle)

    def _begin(self, key: Hashable, batch: Sequence[BatchItem]) -> _RunningBatch:
        seconds = self.measurements.seconds(key)
        running = _RunningBatch(key, None if seconds is None else len(batch) * seconds)
        self._batches.append(running)
        return running

    def _end(
        self,
        running: _RunningBatch,
        batch: Sequence[ItemT],
        done: Done,
        settle: Settle[ItemT],
    ) -> bool:
        """Settle the items of a batch with its results or its error.

        Returns:
            Whether they are settled. If not, the batch may be split.
        """
        self._batches.remove(running)
        if isinstance(done, Timed) and len(done.result) != len(batch):
            done = EngineError(f"{len(done.result)} results for {len(batch)} windows")
        if isinstance(done, Timed):
            self._record(running, len(batch), done.seconds)
            pairs = zip(batch, done.result, strict=True)
            settle([Outcome(item, result, done.started) for item, result in pairs])
            return True
        if isinstance(done, MemoryError):
            done = OutOfMemory(f"memory of the host: {done}")
        if not isinstance(done, NotWanted):
            self._observer.batch_failed(self.runner.name, done)
        if (
            len(batch) == 1
            or isinstance(done, (DeviceLost, NotWanted))
            or not any(item.wanted for item in batch)
        ):
            settle([Outcome(item, done, running.created) for item in batch])
            return True
        if isinstance(done, OutOfMemory):
            self._caps.lower(running.key, len(batch))
            self._report_cap(running.key)
        return False

    def _record(self, running: _RunningBatch, windows: int, seconds: float) -> None:
        """Record how long a batch took."""
        if running.measured:
            self.measurements.record(running.key, seconds / windows)
            self._caps.record_success(running.key, windows)
            self._report_cap(running.key)
        self._observer.batch_done(self.runner.name, running.key, windows, seconds)

    def _send(self, key: Hashable, batch: Sequence[BatchItem], outcome: ThreadCallback) -> None:
        """Send a batch to the thread that prepares it and passes it on to the device's thread."""
        payloads = [item.payload for item in batch]

        def prepare() -> None:
            start = time.monotonic()
            try:
                staged = self._noting_loss(self.runner.prepare, key, payloads)
            except BaseException as error:  # an error of the batch, like one of `submit`
                outcome.set(error)
                return
            seconds = time.monotonic() - start
            weight = _SMOOTHING if self._prepare_seconds else 1.0
            self._prepare_seconds += weight * (seconds - self._prepare_seconds)
            self._thread.put(DeviceCall(functools.partial(submit, staged), collect, outcome))

        def submit(staged: Any) -> Any:
            if not any(item.wanted for item in batch):
                raise NotWanted
            return self._noting_loss(self.runner.submit, key, staged)

        def collect(submitted: Any) -> Sequence[Any]:
            return self._noting_loss(self.runner.collect, key, submitted)

        self._prepare_thread.put(prepare)

    def _noting_loss(self, function: Callable[..., T], *args: Any) -> T:
        """Call a method of the runner, on a thread that may have the next call already.

        Raises:
            DeviceLost: the device was lost, now or before.
        """
        if self.failure is not None:
            raise DeviceLost(str(self.failure))
        try:
            return function(*args)
        except DeviceLost as error:
            self.failure = error
            log.error("%s is lost: %s", self.runner.name, error)
            raise

    def _report_cap(self, key: Hashable) -> None:
        """Tell the observer the limit of a key, if it has changed."""
        cap = self._caps.limit(key)
        if cap == self._capped.get(key):
            return
        if cap is None:
            del self._capped[key]
            self._observer.batch_cap_removed(self.runner.name, key)
        else:
            self._capped[key] = cap
            self._observer.batch_capped(self.runner.name, key, cap)
