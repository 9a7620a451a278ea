"""The dynamic batcher: windows of many requests share the batches of a few devices.

::

    admit ──▶ Reservation ──submit──▶ fair queue ──▶ batch ──▶ device ──▶ futures
      └▶ QueueFull, DeadlineExceeded, Unavailable          (one worker per device)

- **Bounded.** A request reserves one slot per window. If the slots are not free it is rejected at
  once (`app.batching.admission`).
- **Work-conserving.** A batch is formed from the windows that wait at the moment a device is free.
  While it runs, the next one is prepared as soon as it is full, or when the first is about to end:
  until then it can still grow.
- **Fair.** Requests take turns window by window, keys batch by batch. Estimates count these turns.
  The images of one request have reservations of their own and a common `Share` of the turns.
- **Isolated.** An error of a window fails only its own request (`app.batching.device_worker`).

Knows keys, payloads, runners and time; no torch, no images, no HTTP. All state belongs to the event
loop's thread, so that no lock is needed. Only `_settle` gives a future its outcome.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic

from app.batching.admission import Admission
from app.batching.deadline import Deadline, describe_lateness
from app.batching.device_worker import (
    MAX_BATCHES,
    DeviceWorker,
    NotWanted,
    Observer,
    Outcome,
    Runner,
)
from app.batching.estimates import Estimates
from app.batching.fair_queue import FairQueue
from app.batching.reservation import PayloadT, QueuedWindow, Reservation, ResultT, Share
from app.errors import DeadlineExceeded, DeviceLost, Unavailable

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BatcherStatistics:
    """A snapshot of the batcher.

    Attributes:
        capacity: slots for windows.
        requests: admitted and not released.
        reserved: windows of these requests without a result.
        waiting: windows in the queue.
        in_flight: windows being prepared or run.
        submitted: windows since the start.
        settled: windows since the start whose futures were given an outcome.
    """

    capacity: int
    requests: int
    reserved: int
    waiting: int
    in_flight: int
    submitted: int
    settled: int


class Batcher(Generic[PayloadT, ResultT]):
    """Admits requests, forms batches of their windows, and runs them on the devices.

    Args:
        runners: the devices.
        max_batch: windows per batch, or a function of the key.
        capacity: slots for windows that are admitted and have no result. None is the number of
            windows that can be computed in `longest` seconds, as measured.
        longest: seconds, the longest deadline of a request.
        max_wait: seconds that a batch waits to be filled, from the first window of its key.
        observer: receives events.

    Attributes:
        workers: one per runner, in their order.
    """

    def __init__(
        self,
        runners: Sequence[Runner],
        *,
        max_batch: int | Callable[[Any], int],
        capacity: int | None = None,
        longest: float = 60.0,
        max_wait: float = 0.0,
        observer: Observer | None = None,
    ) -> None:
        self._observer = observer or Observer()
        self.workers = [DeviceWorker(runner, self._observer) for runner in runners]
        self.estimates = Estimates(self.workers)
        self._admission = Admission(
            self.estimates, capacity, longest, self._keys_in_flight, self._observer
        )
        self._max_batch = max_batch if callable(max_batch) else lambda key: max_batch
        self._max_wait = max_wait
        self._queue: FairQueue[Share, QueuedWindow[PayloadT, ResultT]] = FairQueue()
        self._reservations: set[Reservation[PayloadT, ResultT]] = set()
        self._all_released = asyncio.Event()
        self._all_released.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._in_flight: set[QueuedWindow[PayloadT, ResultT]] = set()
        self._submitted = self._settled = 0
        self.draining = False

    def statistics(self) -> BatcherStatistics:
        """Count what the batcher holds at the moment."""
        return BatcherStatistics(
            capacity=self.capacity,
            requests=len(self._reservations),
            reserved=sum(each.pending.total() for each in self._reservations),
            waiting=len(self._queue),
            in_flight=len(self._in_flight),
            submitted=self._submitted,
            settled=self._settled,
        )

    @property
    def capacity(self) -> int:
        """Slots for windows that are admitted and have no result."""
        return self._admission.capacity

    @property
    def has_room(self) -> bool:
        """Whether the slots of a request are free, however many windows it has."""
        return self._admission.has_room

    @property
    def failure(self) -> Unavailable | None:
        """Why nothing can be computed any more: the last device is lost."""
        for worker in self.workers:
            if worker.failure is None:
                return None
        return Unavailable("the engine is lost; see the server log")

    def elapsed(self) -> float:
        """Seconds that a device has been at its batch or another call, at most; 0 if all idle."""
        return max(worker.elapsed() for worker in self.workers)

    async def check_devices(self) -> None:
        """Check that every device responds; one that does not is lost."""
        await asyncio.gather(*(worker.check() for worker in self.workers))

    def forget(self, matches: Callable[[Any], bool]) -> None:
        """Drop what was measured for the keys that match; no request uses them any more."""
        for worker in self.workers:
            worker.forget(matches)

    # --- admission ---

    def admit(
        self,
        keys: Sequence[Hashable],
        *,
        deadline: Deadline | None = None,
        share: Share | None = None,
        ignore_capacity: bool = False,
    ) -> Reservation[PayloadT, ResultT]:
        """Reserve one slot per window.

        Args:
            keys: one per window.
            deadline: when the request needs its last window; None is never.
            share: of the request, if it has several reservations.
            ignore_capacity: admit even if the queue is full. For the service's own work.

        Raises:
            Unavailable: the batcher is draining, or every device is lost.
            QueueFull: the slots are not free.
            DeadlineExceeded: the deadline has passed or, as measured, cannot be met.
        """
        deadline = deadline or Deadline.never()
        share = share or Share()
        windows = Counter(keys)
        self._check(windows, deadline, share, ignore_capacity=ignore_capacity)
        reservation: Reservation[PayloadT, ResultT] = Reservation(
            self, keys, windows, deadline, share
        )
        self._reservations.add(reservation)
        self._admission.count(share)
        self._all_released.clear()
        return reservation

    def check_admission(self, keys: Sequence[Hashable], *, deadline: Deadline) -> None:
        """Check that a request would be admitted now.

        Raises:
            Unavailable, QueueFull, DeadlineExceeded: see `admit`.
        """
        self._check(Counter(keys), deadline, Share())

    def _check(
        self,
        windows: Counter[Hashable],
        deadline: Deadline,
        share: Share,
        *,
        ignore_capacity: bool = False,
    ) -> None:
        if self.draining:
            self._admission.reject("draining", Unavailable("the service is stopping"))
        if self.failure is not None:
            self._admission.reject("dead", self.failure)
        self._admission.check(windows, deadline, share, ignore_capacity=ignore_capacity)

    def release(self, reservation: Reservation[PayloadT, ResultT]) -> None:
        """Free a request's slots. A batch that runs already still computes its windows."""
        if reservation.released:
            return
        unfinished = bool(reservation.pending)
        reservation.leave()
        self._reservations.discard(reservation)
        if not self._reservations:
            self._all_released.set()
        if unfinished:
            self._admission.count(reservation.share)
            self._discard_waiting(reservation, "cancelled", asyncio.CancelledError())

    # --- from the queue to the futures ---

    def queue(self, windows: Sequence[QueuedWindow[PayloadT, ResultT]]) -> None:
        """Queue windows that are new, all of one reservation."""
        self._submitted += len(windows)
        self._enqueue(windows)

    def _enqueue(self, windows: Sequence[QueuedWindow[PayloadT, ResultT]]) -> None:
        for window in windows:
            self._queue.put(window.reservation.share, window.key, [window])
        if self.failure is not None:
            for reservation in {window.reservation for window in windows}:
                self._discard_waiting(reservation, "dead", self.failure)
        self._wake_workers()

    def _ready_key(
        self, worker: DeviceWorker, *, busy: bool
    ) -> tuple[Hashable | None, float | None]:
        """Find the key whose windows should form the worker's next batch now.

        A key is ready if it fills a batch, or if its first window has waited for `max_wait` and
        the worker has no batch, or will soon be done with it. If no key is ready, the second value
        is the seconds until one will be, or None if only an event can change that.

        Args:
            busy: the worker has a batch.
        """
        now = time.monotonic()
        # An available device starts a full batch at once; a busy one would only prepare it.
        leave_to_others = busy and any(each.available for each in self.workers)
        shortest_wait = None
        for key in self._queue:
            if self._queue.size(key) >= worker.max_batch(key, self._max_batch(key)):
                # The device that it is left to wakes this worker when it has taken it.
                return (None, None) if leave_to_others else (key, None)
            first_queued_at = min(window.queued_at for window in self._queue.heads(key))
            wait = first_queued_at + self._max_wait - now
            if wait <= 0:
                # It has waited long enough: the keys after it do not overtake it.
                growing = worker.growing_time() if busy else 0.0
                if growing == 0 and not leave_to_others:
                    return key, None
                return None, growing or None
            shortest_wait = wait if shortest_wait is None else min(wait, shortest_wait)
        return None, shortest_wait

    async def _next_key(self, worker: DeviceWorker) -> Hashable | None:
        """Wait until a key is ready for the worker; None if its device is lost."""
        loop = asyncio.get_running_loop()
        while worker.failure is None:
            worker.wake.clear()
            worker.idle = True
            key, wait = None, None
            if worker.batches < MAX_BATCHES and not worker.splitting:
                key, wait = self._ready_key(worker, busy=worker.batches > 0)
            if key is not None:
                worker.idle = False
                self._wake_workers()  # one that left this key to this worker may take the next
                return key
            timer = None if wait is None else loop.call_later(wait, worker.wake.set)
            await worker.wake.wait()
            if timer is not None:
                timer.cancel()
        return None

    def _form_batch(
        self, worker: DeviceWorker, key: Hashable
    ) -> list[QueuedWindow[PayloadT, ResultT]]:
        """Take the next batch of a key from the queue, and drop requests that would be late."""
        in_flight: dict[object, int] = {}
        for running in self._in_flight:
            place = running.reservation, running.key
            in_flight[place] = in_flight.get(place, 0) + 1
        earliest_start = min(each.remaining() for each in self.workers if each.failure is None)

        def in_time(window: QueuedWindow[PayloadT, ResultT]) -> bool:
            reservation = window.reservation
            to_run = {
                each: count - in_flight.get((reservation, each), 0)
                for each, count in reservation.pending.items()
            }
            remaining = reservation.deadline.remaining()
            estimated = earliest_start + self.estimates.estimate(to_run)
            if estimated < remaining:
                return True
            self.estimates.discount(to_run, remaining, exclude=self._keys_in_flight())
            message = f"dropped from the queue: {describe_lateness(estimated, remaining)}"
            self._discard_waiting(reservation, "expired", DeadlineExceeded(message))
            return False

        batch = self._queue.take(key, worker.max_batch(key, self._max_batch(key)), in_time)
        self._in_flight.update(batch)
        return batch

    async def _serve(self, worker: DeviceWorker) -> None:
        """Form and start batches on one device until it is lost or the batcher is closed."""
        settle = functools.partial(self._settle_batch, worker)
        try:
            while (key := await self._next_key(worker)) is not None:
                batch = self._form_batch(worker, key)
                if batch:
                    worker.start(key, batch, settle)
        except Exception as error:  # a bug: fail this device, so that no request waits forever
            log.exception("unexpected error in the batcher")
            worker.failure = DeviceLost(repr(error))
        if self.failure is not None:
            for reservation in list(self._reservations):
                self._discard_waiting(reservation, "dead", self.failure)

    def _settle_batch(
        self, worker: DeviceWorker, outcomes: Sequence[Outcome[QueuedWindow[PayloadT, ResultT]]]
    ) -> None:
        """Give the windows of a batch their outcomes."""
        for window, result, started in outcomes:
            if window not in self._in_flight:  # it was settled before a bug failed its batch
                continue
            window.reservation.record_run(started, time.monotonic())
            if isinstance(result, DeviceLost) and window.wanted:
                self._in_flight.discard(window)
                self._enqueue([window])  # for another device
            elif isinstance(result, NotWanted):
                self._settle(window, asyncio.CancelledError())
            else:
                self._settle(window, result)
                if isinstance(result, Exception):  # the other windows are useless without it
                    self._discard_waiting(window.reservation, "failed", result)
        if len(self._queue) or worker.failure is not None:
            worker.wake.set()

    def _settle(
        self, window: QueuedWindow[PayloadT, ResultT], outcome: ResultT | BaseException
    ) -> None:
        """Give a window its outcome and free its slot. Every future is settled here, once."""
        self._in_flight.discard(window)
        self._settled += 1
        window.reservation.settle(window.key)
        self._admission.count(window.reservation.share)
        if window.future.done():  # cancelled by the task that awaited it
            return
        if isinstance(outcome, asyncio.CancelledError):
            window.future.cancel()
        elif isinstance(outcome, BaseException):
            window.future.set_exception(outcome)
            # Mark it as retrieved: a request awaits no more futures after its first failure.
            window.future.exception()
        else:
            window.future.set_result(outcome)

    def _discard_waiting(
        self, reservation: Reservation[PayloadT, ResultT], reason: str, error: BaseException
    ) -> None:
        """Remove a request's waiting windows from the queue; their futures get the error."""
        discarded = self._queue.discard(
            reservation.share, lambda window: window.reservation is reservation
        )
        for window in discarded:
            self._settle(window, error)
        if discarded:
            self._observer.windows_dropped(reason, len(discarded))

    def _keys_in_flight(self) -> set[Hashable]:
        return {window.key for window in self._in_flight}

    def _wake_workers(self) -> None:
        for worker in self.workers:
            worker.wake.set()

    # --- start and end ---

    async def start(self) -> None:
        """Begin to serve the queue."""
        self._tasks = [asyncio.create_task(self._serve(worker)) for worker in self.workers]

    async def drain(self) -> None:
        """Admit no more requests, and return when every admitted one has left."""
        self.draining = True
        await self._all_released.wait()

    async def close(self) -> None:
        """Stop. Windows without a result fail; the threads of a hung device are left behind."""
        self.draining = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self.workers:
            await worker.stop()
        stopped = Unavailable("the service has stopped")
        for window in list(self._in_flight):
            self._settle(window, stopped)
        for reservation in list(self._reservations):
            self._discard_waiting(reservation, "stopped", stopped)
