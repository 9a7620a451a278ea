"""The dynamic batcher: windows of many requests share the batches of a few devices.

::

    admit ──▶ Reservation ──submit──▶ fair queue ──▶ batch ──▶ prepare ──▶ run ──▶ futures
      └▶ QueueFull, DeadlineExceeded, Unavailable         (a lane for each device)

- **Bounded.** A request reserves its windows before it is decoded; what does not fit is refused
  at once. None takes more than a quarter of the places: with its turns alone it delays nobody more.
- **Work-conserving.** A batch is formed of what waits at the moment a device is free. While it
  runs the next one is prepared, but only once it is full: until then it can still grow.
- **Fair.** Requests take turns window by window, keys batch by batch; estimates count these turns.
- **Contained.** What a window raises fails its own request alone (`app.batching.device_worker`).

Knows keys, items, runners and time; no torch, no images, no HTTP. All state belongs to the event
loop's thread: there is no lock. Every future is settled by `_settle`, once, whatever happens.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, NoReturn, Self, TypeVar

from app.batching.deadline import Deadline
from app.batching.device_worker import DeviceWorker, Observer, Runner
from app.batching.estimates import Estimates
from app.batching.fair_queue import FairQueue
from app.errors import DeadlineExceeded, DeviceLost, QueueFull, Unavailable

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Entry(Generic[Item, Result]):
    """One window: its item, the request it belongs to, and who waits for it."""

    __slots__ = ("future", "item", "key", "since", "ticket")

    def __init__(self, ticket: Reservation[Item, Result], key: Hashable, item: Item) -> None:
        self.ticket = ticket
        self.key = key
        self.item = item
        self.since = ticket._batcher._now()
        self.future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()

    @property
    def wanted(self) -> bool:
        return not self.ticket.left


class Reservation(Generic[Item, Result]):
    """The right of one request to some windows; a context manager.

    Leaving it, for whatever reason, drops its windows that still wait and frees its places.
    """

    def __init__(
        self, batcher: Batcher[Item, Result], keys: Sequence[Hashable], deadline: Deadline
    ) -> None:
        self.kinds = Counter(keys)  # reserved and not settled yet; each takes a place
        self.deadline = deadline
        self.unused = deque(keys)  # reserved and not submitted yet
        self.left = False
        self.submitted_at = self.settled_at = 0.0
        self.infer_seconds = 0.0  # during which some of its windows were on a device
        self._ran_until = 0.0
        self._batcher = batcher

    @property
    def queue_seconds(self) -> float:
        """From `submit` to the last result, less `infer_seconds`."""
        return max(0.0, self.settled_at - self.submitted_at - self.infer_seconds)

    def submit(self, items: Sequence[Item]) -> list[asyncio.Future[Result]]:
        """Queue windows, in the order of the keys they were reserved by; one future each.

        Raises:
            ValueError: more windows than were reserved, or the ticket was left already.
        """
        if self.left or len(items) > len(self.unused):
            raise ValueError(f"{len(items)} windows on a ticket with {len(self.unused)} left")
        entries = [_Entry(self, self.unused.popleft(), item) for item in items]
        self.submitted_at = self.submitted_at or self._batcher._now()
        self._batcher._enqueue(self, entries)
        return [entry.future for entry in entries]

    def ran(self, start: float, end: float) -> None:
        """Some of its windows were on a device; time that two devices shared counts once."""
        self.infer_seconds += max(0.0, end - max(start, self._ran_until))
        self._ran_until = max(end, self._ran_until)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._batcher._leave(self)


class Batcher(Generic[Item, Result]):
    """See the module.

    Args:
        runners: the devices.
        max_batch: windows at once, or a function of the key.
        capacity: places for windows that are admitted and not settled.
        max_wait: seconds a batch waits to be filled, from the first window of its key; 0: none.
        observer: told of what happens.
    """

    def __init__(
        self,
        runners: Sequence[Runner],
        *,
        max_batch: int | Callable[[Any], int],
        capacity: int,
        max_wait: float = 0.0,
        observer: Observer | None = None,
    ) -> None:
        self._observer = observer or Observer()
        self._lanes = [DeviceWorker(runner, self._observer) for runner in runners]
        self.estimates = Estimates(self._lanes)
        self._max_batch = max_batch if callable(max_batch) else lambda key: max_batch
        self._capacity = capacity
        self._most = max(1, capacity // 4)  # places of one request
        self._max_wait = max_wait
        self._queue: FairQueue[Reservation[Item, Result], _Entry[Item, Result]] = FairQueue()
        self._tickets: set[Reservation[Item, Result]] = set()
        self._all_left = asyncio.Event()
        self._all_left.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._held: set[_Entry[Item, Result]] = set()  # taken from the queue and not settled
        self.draining = False

    @property
    def reserved(self) -> int:
        """Windows of every admitted request that are not settled yet."""
        return sum(ticket.kinds.total() for ticket in self._tickets)

    @property
    def waiting(self) -> int:
        """Windows in the queue."""
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """Windows that are prepared or run."""
        return len(self._held)

    @property
    def dead(self) -> Unavailable | None:
        """Why nothing can be computed any more: the last device is lost."""
        lost = [lane.lost for lane in self._lanes]
        return Unavailable(f"the engine is lost: {lost[-1]}") if all(lost) else None

    def elapsed(self) -> float:
        """Seconds that the longest-running batch has been on its device; 0 when all are free."""
        return max(lane.elapsed() for lane in self._lanes)

    def admit(
        self,
        keys: Sequence[Hashable],
        *,
        deadline: Deadline | None = None,
        ignore_capacity: bool = False,
    ) -> Reservation[Item, Result]:
        """Reserve a slot for a window of each key.

        Args:
            keys: one per window.
            deadline: when the request needs its last window; None is never.
            ignore_capacity: admit even if the queue is full, as the service does with its own work.

        Raises:
            Unavailable: draining, or every device is lost.
            QueueFull, DeadlineExceeded: no room or, as measured, no time; with `retry_after`.
        """
        deadline = deadline or Deadline.never()
        if self.draining:
            self._refuse("draining", Unavailable("the service is stopping"))
        if dead := self.dead:
            self._refuse("dead", dead)
        ticket: Reservation[Item, Result] = Reservation(self, keys, deadline)
        windows = len(keys)
        taken = sum(min(each.kinds.total(), self._most) for each in self._tickets)
        if (
            not ignore_capacity
            and (excess := taken + min(windows, self._most) - self._capacity) > 0
        ):
            text = f"{taken} of {self._capacity} places are taken, and this image needs {windows}"
            self._refuse(
                "queue_full", QueueFull(text, retry_after=excess * self.estimates.seconds())
            )
        left = deadline.remaining()
        turns = sum(self.estimates.turns(each.kinds, windows) for each in self._tickets)
        late = turns + (alone := self.estimates.allow(ticket.kinds)) - left
        if late > 0 or left <= 0:
            self.estimates.doubt(ticket.kinds, left, but=[entry.key for entry in self._held])
            text = f"it would take about {turns + alone:.1f} s; {left:.1f} s are left"
            again = late if alone < left else None  # one that is too large will not fit later
            self._refuse("deadline", DeadlineExceeded(text, retry_after=again))
        self._tickets.add(ticket)
        self._all_left.clear()
        return ticket

    def _refuse(self, reason: str, error: Exception) -> NoReturn:
        self._observer.request_rejected(reason)
        raise error

    def _leave(self, ticket: Reservation[Item, Result]) -> None:
        """Free a request's places; what runs is computed for nobody."""
        ticket.left = True
        self._tickets.discard(ticket)
        if not self._tickets:
            self._all_left.set()
        self._drop(ticket, "cancelled", asyncio.CancelledError())

    def _enqueue(
        self, ticket: Reservation[Item, Result], entries: list[_Entry[Item, Result]]
    ) -> None:
        for entry in entries:
            self._queue.put(ticket, entry.key, [entry])
        if dead := self.dead:
            self._drop(ticket, "dead", dead)
        for lane in self._lanes:
            lane.wake.set()

    def _form(self, lane: DeviceWorker, key: Hashable) -> list[_Entry[Item, Result]]:
        """The next batch of a key; on the way those are dropped whose results would be too late."""
        soonest = min(each.running_yet() for each in self._lanes if each.lost is None)
        held = Counter((entry.ticket, entry.key) for entry in self._held)

        def in_time(ticket: Reservation[Item, Result]) -> bool:
            to_do = {kind: count - held[ticket, kind] for kind, count in ticket.kinds.items()}
            left = ticket.deadline.remaining()
            if soonest + self.estimates.allow(to_do) < left:
                return True
            self.estimates.doubt(to_do, left, but=[entry.key for entry in self._held])
            self._drop(ticket, "expired", DeadlineExceeded("the queue left it too little time"))
            return False

        batch = self._queue.take(key, lane.cap(key, self._max_batch(key)), in_time)
        self._held.update(batch)
        return batch

    def _drop(self, ticket: Reservation[Item, Result], reason: str, error: BaseException) -> None:
        """Take a request's waiting windows out of the queue, before they cost anything."""
        dropped = self._queue.discard(ticket)
        for entry in dropped:
            self._settle(entry, error)
        if dropped:
            self._observer.windows_dropped(reason, len(dropped))

    def _settle(self, entry: _Entry[Item, Result], outcome: Result | BaseException) -> None:
        """The only place where a future gets its outcome, once; its place is free again."""
        self._held.discard(entry)
        entry.ticket.kinds -= Counter([entry.key])
        entry.ticket.settled_at = self._now()
        if entry.future.done():  # whoever awaited it was cancelled
            return
        if isinstance(outcome, asyncio.CancelledError):
            entry.future.cancel()
        elif isinstance(outcome, BaseException):
            entry.future.set_exception(outcome)
            entry.future.exception()  # counts as seen: after a first failure nobody asks for more
        else:
            entry.future.set_result(outcome)

    async def start(self) -> None:
        """Begin to serve the queue."""
        self._tasks = [asyncio.create_task(self._serve(lane)) for lane in self._lanes]

    async def drain(self) -> None:
        """Admit nothing more; return when every admitted request has left."""
        self.draining = True
        await self._all_left.wait()

    async def close(self) -> None:
        """Stop; whatever is not settled yet fails. A hung device is left behind."""
        self.draining = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for lane in self._lanes:
            lane.end()
        stopped = Unavailable("the service has stopped")
        for entry in list(self._held):
            self._settle(entry, stopped)
        for ticket in list(self._tickets):
            self._drop(ticket, "stopped", stopped)

    async def _serve(self, lane: DeviceWorker) -> None:
        """Form, prepare, run: for one device, until it is lost or the batcher is closed."""
        running: asyncio.Task[None] | None = None
        try:
            while (key := await self._next(lane, running)) is not None:
                if batch := self._form(lane, key):
                    staged = await lane.prepare(key, batch)
                    if running is not None:
                        await running
                    running = asyncio.create_task(self._run(lane, key, batch, staged))
                    running.add_done_callback(lambda _: lane.wake.set())
                    await asyncio.sleep(0)  # it begins: `_form` asks for how long it will run
        except asyncio.CancelledError:
            if running is not None:
                running.cancel()
            raise
        except Exception as error:  # a bug of ours: a lost device, never one that is waited for
            lane.lost = DeviceLost(repr(error))
        finally:
            if running is not None:
                await asyncio.gather(running, return_exceptions=True)
            if dead := self.dead:
                for ticket in list(self._tickets):
                    self._drop(ticket, "dead", dead)

    async def _next(
        self, lane: DeviceWorker, running: asyncio.Task[None] | None
    ) -> Hashable | None:
        """The key with a full batch, or that waited enough for a free device; None: it is lost."""
        while lane.lost is None:
            lane.wake.clear()
            lane.waits = True
            free, now, patience = running is None or running.done(), self._now(), None
            behind = not free and any(each.free for each in self._lanes)  # they begin at once
            for key in self._queue:
                left = min(entry.since for entry in self._queue.heads(key)) + self._max_wait - now
                full = self._queue.size(key) >= lane.cap(key, self._max_batch(key))
                if (full and not behind) or (free and left <= 0):
                    lane.waits = False
                    for each in self._lanes:
                        each.wake.set()
                    return key
                if left <= 0:
                    break  # its turn, once the device is free: the others do not pass it
                patience = left if patience is None else min(left, patience)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(lane.wake.wait(), patience)
        return None

    async def _run(
        self, lane: DeviceWorker, key: Hashable, batch: Sequence[_Entry[Item, Result]], staged: Any
    ) -> None:
        """Compute a batch and settle its windows."""
        started = self._now()
        try:
            async for entry, outcome in lane.compute(key, batch, staged):
                entry.ticket.ran(started, self._now())
                if isinstance(outcome, DeviceLost) and entry.wanted:
                    self._held.discard(entry)
                    self._enqueue(entry.ticket, [entry])  # for another device
                    continue
                self._settle(entry, outcome)
                if isinstance(outcome, Exception):  # half an image is of no use to anybody
                    self._drop(entry.ticket, "failed", outcome)
        except Exception as error:
            lane.lost = DeviceLost(repr(error))
            for entry in self._held.intersection(batch):
                self._settle(entry, lane.lost)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
