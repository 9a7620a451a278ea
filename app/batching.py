"""The dynamic batcher: windows of many requests share the batches of a few devices.

What it knows: keys, items, runners, time. What it does not: torch, images, HTTP.

::

    admit ──▶ Ticket ──submit──▶ ring of tickets, one a key ──▶ batch ──▶ prepare ──▶ run
      │                             ▲ one window each, in turn              (a lane a device)
      └▶ QueueFull, DeadlineExceeded, Unavailable

- **Bounded.** A request reserves its windows before it is decoded; what does not fit is refused at
  once. A request larger than the whole queue is admitted only when nothing else is.
- **Work-conserving.** A batch is formed from what waits at the moment a device is free. While it
  runs, the next one is prepared, but only once it is full: until then it can still grow.
- **Fair.** Tickets take turns window by window, and keys batch by batch.
- **Contained.** A batch that fails is split and tried again, so that a window's failure is its own
  request's alone. Running out of memory halves the batches of that key on that device, for good.

All state belongs to the event loop's thread, so there is not one lock. Every future is settled by
`_settle`, once, whatever happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from app.errors import (
    DeadlineExceeded,
    DeviceLost,
    EngineError,
    OutOfMemory,
    QueueFull,
    Unavailable,
)

Item = TypeVar("Item")
Result = TypeVar("Result")
_SMOOTHING = 0.2
"""Weight of the newest batch in the measured seconds a window takes."""


class Runner(Protocol):
    """A device. Both calls block, each on a thread of its own, so that they overlap."""

    name: str

    def prepare(self, key: Any, items: Sequence[Any]) -> Any:
        """Bring the items into the form `run` takes: cut, stack, copy."""

    def run(self, key: Any, staged: Any) -> Sequence[Any]:
        """One result an item, in their order."""


class Observer(Protocol):
    """Told of what happens, on the event loop; must not block."""

    def batch_done(self, runner: str, key: Hashable, size: int, seconds: float) -> None: ...
    def batch_failed(self, runner: str, error: BaseException) -> None: ...
    def refused(self, reason: str) -> None: ...
    def dropped(self, reason: str, windows: int) -> None: ...


class _Silent:
    def batch_done(self, runner: str, key: Hashable, size: int, seconds: float) -> None: ...
    def batch_failed(self, runner: str, error: BaseException) -> None: ...
    def refused(self, reason: str) -> None: ...
    def dropped(self, reason: str, windows: int) -> None: ...


class _Entry(Generic[Item, Result]):
    """One window: its item, who waits for it, and the ticket it counts against."""

    __slots__ = ("future", "item", "ticket")

    def __init__(
        self, ticket: Ticket[Item, Result], item: Item, future: asyncio.Future[Result]
    ) -> None:
        self.ticket = ticket
        self.item = item
        self.future = future


class Ticket(Generic[Item, Result]):
    """The right of one request to some windows; a context manager.

    Leaving it, for whatever reason, drops its windows that still wait and frees its places.

    Attributes:
        queue_seconds: from `submit` to the last result, less `infer_seconds`.
        infer_seconds: total duration of the batches that held its windows.
    """

    def __init__(
        self, batcher: Batcher[Item, Result], windows: int, deadline: float | None
    ) -> None:
        self.deadline = deadline
        self.infer_seconds = 0.0
        self.places = windows  # reserved and not settled yet
        self.waiting: dict[Hashable, deque[_Entry[Item, Result]]] = {}
        self._batcher = batcher
        self._unused = windows
        self.submitted = self.settled = 0.0
        self.closed = False

    @property
    def queue_seconds(self) -> float:
        return max(0.0, self.settled - self.submitted - self.infer_seconds)

    def submit(self, key: Hashable, items: Sequence[Item]) -> list[asyncio.Future[Result]]:
        """Queue windows that may share a batch; one future each.

        Raises:
            ValueError: more windows than were reserved, or the ticket was left already.
        """
        if self.closed or len(items) > self._unused:
            raise ValueError(f"{len(items)} windows on a ticket with {self._unused} left")
        self._unused -= len(items)
        return self._batcher._enqueue(self, key, items)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._batcher._leave(self)


class _Ring(Generic[Item, Result]):
    """The tickets that wait with windows of one key, next in turn first."""

    def __init__(self, since: float) -> None:
        self.tickets: deque[Ticket[Item, Result]] = deque()
        self.windows = 0
        self.since = since  # when its oldest window began to wait, or its last batch left


class _Lane(Generic[Item, Result]):
    """A runner, its two threads, and what is known of it."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.preparing = _Thread(f"{runner.name} prepare")
        self.running = _Thread(f"{runner.name} run")
        self.caps: dict[Hashable, int] = {}
        self.since: float | None = None  # when the running batch began
        self.lost: DeviceLost | None = None
        self.wake = asyncio.Event()
        self.held: set[_Entry[Item, Result]] = set()  # taken from the queue and not settled
        self.seconds: float | None = None  # that a window takes, measured


class Batcher(Generic[Item, Result]):
    """See the module.

    Args:
        runners: the devices; each pulls from the same queue.
        max_batch: windows at once, or a function of the key.
        capacity: windows that may be admitted and not settled.
        max_wait: seconds to wait for a batch to fill, from its first window; 0 does not wait.
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
        self._lanes: list[_Lane[Item, Result]] = [_Lane(runner) for runner in runners]
        self._max_batch = max_batch if callable(max_batch) else lambda key: max_batch
        self._capacity = capacity
        self._max_wait = max_wait
        self._observer = observer or _Silent()
        self._rings: OrderedDict[Hashable, _Ring[Item, Result]] = OrderedDict()  # next key first
        self._open: set[Ticket[Item, Result]] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._all_left = asyncio.Event()
        self._all_left.set()
        self.reserved = 0
        self.draining = False

    # --- for probes and metrics ---

    @property
    def waiting(self) -> int:
        """Windows in the queue."""
        return sum(ring.windows for ring in self._rings.values())

    @property
    def in_flight(self) -> int:
        """Windows that are prepared or run."""
        return sum(len(lane.held) for lane in self._lanes)

    @property
    def rate(self) -> float | None:
        """Windows a second of all devices that are not lost, measured; None before a batch."""
        measured = [lane.seconds for lane in self._lanes if lane.seconds and not lane.lost]
        return sum(1 / seconds for seconds in measured) if measured else None

    @property
    def dead(self) -> DeviceLost | None:
        """Why nothing can be computed any more, once every device is lost."""
        lost = [lane.lost for lane in self._lanes if lane.lost is not None]
        return lost[0] if lost and len(lost) == len(self._lanes) else None

    @property
    def caps(self) -> dict[tuple[str, Hashable], int]:
        """Largest batch by device and key, where running out of memory has lowered it."""
        return {(lane.runner.name, k): cap for lane in self._lanes for k, cap in lane.caps.items()}

    def running_for(self) -> float:
        """Seconds that the longest-running batch has been on its device; 0 when all are free."""
        since = [lane.since for lane in self._lanes if lane.since is not None]
        return asyncio.get_running_loop().time() - min(since) if since else 0.0

    # --- for requests ---

    def admit(self, windows: int, *, deadline: float | None = None) -> Ticket[Item, Result]:
        """Reserve places for a request of so many windows.

        Args:
            deadline: on the event loop's clock.

        Raises:
            Unavailable: draining, or every device is lost.
            QueueFull: no room; `retry_after` from the measured rate.
            DeadlineExceeded: the measured rate says that it cannot be met.
        """
        if self.draining:
            self._observer.refused("draining")
            raise Unavailable("the service is draining; ask another instance")
        if self.dead is not None:
            self._observer.refused("dead")
            raise Unavailable(f"the engine is lost: {self.dead}")
        if self.reserved and self.reserved + windows > self._capacity:
            self._observer.refused("queue_full")
            raise QueueFull(
                f"the queue is full: {self.reserved} of {self._capacity} windows are taken, this "
                f"image needs {windows}",
                retry_after=self._estimate(self.reserved + windows - self._capacity),
            )
        if deadline is not None:
            left = deadline - asyncio.get_running_loop().time()
            if (needed := self._estimate(self.reserved + windows)) > left:
                self._observer.refused("deadline")
                raise DeadlineExceeded(
                    f"this image would take about {needed:.1f} s, and {max(0.0, left):.1f} s are "
                    "left until its deadline"
                )
        ticket: Ticket[Item, Result] = Ticket(self, windows, deadline)
        self.reserved += windows
        self._open.add(ticket)
        self._all_left.clear()
        return ticket

    def _enqueue(
        self, ticket: Ticket[Item, Result], key: Hashable, items: Sequence[Item]
    ) -> list[asyncio.Future[Result]]:
        loop = asyncio.get_running_loop()
        entries = [_Entry(ticket, item, loop.create_future()) for item in items]
        ticket.submitted = ticket.submitted or loop.time()
        if self.dead is not None:
            for entry in entries:
                self._settle(entry, Unavailable(f"the engine is lost: {self.dead}"))
        elif entries:
            self._queue(ticket, key, entries)
        return [entry.future for entry in entries]

    def _leave(self, ticket: Ticket[Item, Result]) -> None:
        """Drop what still waits; what runs is computed for nobody."""
        if ticket.closed:
            return
        ticket.closed = True
        self._drop(ticket, "cancelled", asyncio.CancelledError())
        self.reserved -= ticket.places
        ticket.places = 0
        self._open.discard(ticket)
        if not self._open:
            self._all_left.set()

    def _estimate(self, windows: int) -> float:
        """Seconds for so many windows at the measured rate; 0 while nothing was measured."""
        return windows / self.rate if self.rate else 0.0

    # --- the queue ---

    def _queue(
        self, ticket: Ticket[Item, Result], key: Hashable, entries: Sequence[_Entry[Item, Result]]
    ) -> None:
        if key not in self._rings:
            self._rings[key] = _Ring(asyncio.get_running_loop().time())
        ring = self._rings[key]
        if key not in ticket.waiting:
            ticket.waiting[key] = deque()
            ring.tickets.append(ticket)
        ticket.waiting[key].extend(entries)
        ring.windows += len(entries)
        for lane in self._lanes:
            lane.wake.set()

    def _form(self, key: Hashable, size: int) -> list[_Entry[Item, Result]]:
        """Up to `size` windows of one key: one of each ticket in turn, none past its deadline."""
        ring = self._rings[key]
        now = asyncio.get_running_loop().time()
        batch: list[_Entry[Item, Result]] = []
        while ring.tickets and len(batch) < size:
            ticket = ring.tickets[0]
            if ticket.deadline is not None and ticket.deadline <= now:
                self._drop(ticket, "expired", DeadlineExceeded("the deadline passed in the queue"))
                continue
            line = ticket.waiting[key]
            batch.append(line.popleft())
            ring.windows -= 1
            ring.tickets.rotate(-1)
            if not line:
                self._forget(ticket, key)
        if key in self._rings:
            ring.since = now
            self._rings.move_to_end(key)  # the other keys are next
        return batch

    def _forget(self, ticket: Ticket[Item, Result], key: Hashable) -> None:
        """Take a ticket out of a ring."""
        ring = self._rings[key]
        ring.windows -= len(ticket.waiting.pop(key))
        ring.tickets.remove(ticket)
        if not ring.tickets:
            del self._rings[key]

    def _drop(self, ticket: Ticket[Item, Result], reason: str, error: BaseException) -> None:
        """Take a ticket's waiting windows out of the queue, before they cost anything."""
        dropped = [entry for line in ticket.waiting.values() for entry in line]
        for key in list(ticket.waiting):
            self._forget(ticket, key)
        if dropped:
            self._observer.dropped(reason, len(dropped))
        for entry in dropped:
            self._settle(entry, error)

    def _settle(self, entry: _Entry[Item, Result], outcome: Result | BaseException) -> None:
        """The only place where a future gets its result, once; its place in the queue is free."""
        ticket = entry.ticket
        if not ticket.closed:
            ticket.places -= 1
            self.reserved -= 1
            ticket.settled = asyncio.get_running_loop().time()
        if entry.future.done():  # its request was cancelled meanwhile
            return
        if isinstance(outcome, asyncio.CancelledError):
            entry.future.cancel()
        elif isinstance(outcome, BaseException):
            entry.future.set_exception(outcome)
            entry.future.exception()  # seen: after a sibling's failure nobody may come to ask
        else:
            entry.future.set_result(outcome)

    # --- the devices ---

    async def start(self) -> None:
        """Begin to serve the queue."""
        self._tasks = [asyncio.create_task(self._serve(lane)) for lane in self._lanes]

    async def drain(self) -> None:
        """Admit nothing more; return when every admitted request has left."""
        self.draining = True
        await self._all_left.wait()

    async def close(self) -> None:
        """Stop serving; whatever is not settled yet fails. A hung device is left behind."""
        self.draining = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        gone = Unavailable("the service has stopped")
        for lane in self._lanes:
            lane.preparing.end()
            lane.running.end()
            while lane.held:
                self._settle(lane.held.pop(), gone)
        for ticket in list(self._open):
            self._drop(ticket, "stopped", gone)

    async def _serve(self, lane: _Lane[Item, Result]) -> None:
        """Form, prepare, run: for one device, until it is lost or the batcher is closed."""
        running: asyncio.Task[None] | None = None
        try:
            while (key := await self._next(lane, running)) is not None:
                batch = self._form(key, self._cap(lane, key))
                if not batch:
                    continue
                lane.held.update(batch)
                staged = await self._prepare(lane, key, batch)
                if running is not None:
                    await running
                running = asyncio.create_task(self._run(lane, key, batch, staged))
                running.add_done_callback(lambda _: lane.wake.set())
        finally:
            if running is not None:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

    async def _next(
        self, lane: _Lane[Item, Result], running: asyncio.Task[None] | None
    ) -> Hashable | None:
        """The key to serve next: whatever waits once the device is free; before, a full batch.

        None when the device is lost.
        """
        while lane.lost is None:
            lane.wake.clear()
            free = running is None or running.done()
            now = asyncio.get_running_loop().time()
            patience = None
            for key, ring in self._rings.items():
                left = ring.since + self._max_wait - now
                if ring.windows >= self._cap(lane, key) or (free and left <= 0):
                    return key
                if free:
                    patience = left if patience is None else min(patience, left)
            # the timeout wraps the wait alone: what waits stays in its ring
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(lane.wake.wait(), patience)
        return None

    def _cap(self, lane: _Lane[Item, Result], key: Hashable) -> int:
        return min(self._max_batch(key), lane.caps.get(key, sys.maxsize))

    async def _prepare(
        self, lane: _Lane[Item, Result], key: Hashable, batch: Sequence[_Entry[Item, Result]]
    ) -> Any:
        """What `run` takes, or the exception: that is `_run`'s to handle, as its own are."""
        try:
            items = [entry.item for entry in batch]
            return await lane.preparing.call(lane.runner.prepare, key, items)
        except Exception as error:
            return error

    async def _run(
        self,
        lane: _Lane[Item, Result],
        key: Hashable,
        batch: Sequence[_Entry[Item, Result]],
        staged: Any,
    ) -> None:
        """Run a batch and settle it; one that fails is split, down to the window at fault."""
        loop = asyncio.get_running_loop()
        if all(entry.future.done() for entry in batch):  # every client has left meanwhile
            for entry in batch:
                self._finish(lane, entry, asyncio.CancelledError())
            return
        started = lane.since = loop.time()
        try:
            if lane.lost is not None:
                raise lane.lost
            if isinstance(staged, Exception):
                raise staged
            results = await lane.running.call(lane.runner.run, key, staged)
            if len(results) != len(batch):
                raise EngineError(f"{len(results)} results for {len(batch)} windows")
        except DeviceLost as error:
            self._lose(lane, key, batch, error)
        except Exception as error:
            lane.since = None
            self._observer.batch_failed(lane.runner.name, error)
            await self._split(lane, key, batch, error)
        else:
            seconds = loop.time() - started
            per_window = seconds / len(batch)
            lane.seconds = (
                per_window
                if lane.seconds is None
                else lane.seconds + _SMOOTHING * (per_window - lane.seconds)
            )
            self._observer.batch_done(lane.runner.name, key, len(batch), seconds)
            for ticket in {entry.ticket for entry in batch}:
                ticket.infer_seconds += seconds
            for entry, result in zip(batch, results, strict=True):
                self._finish(lane, entry, result)
        finally:
            lane.since = None

    async def _split(
        self,
        lane: _Lane[Item, Result],
        key: Hashable,
        batch: Sequence[_Entry[Item, Result]],
        error: Exception,
    ) -> None:
        """Try the halves of a failed batch; a window that fails alone fails its request."""
        half = len(batch) // 2
        if isinstance(error, OutOfMemory) and half:
            lane.caps[key] = min(half, self._cap(lane, key))
        if not half:
            (culprit,) = batch
            self._finish(lane, culprit, error)
            # the rest of its image is of no use to anybody
            self._drop(culprit.ticket, "failed", error)
            return
        for part in (batch[:half], batch[half:]):
            await self._run(lane, key, part, await self._prepare(lane, key, part))

    def _lose(
        self,
        lane: _Lane[Item, Result],
        key: Hashable,
        batch: Sequence[_Entry[Item, Result]],
        error: DeviceLost,
    ) -> None:
        """A device is gone: its windows go to the others, or fail when there is none."""
        if lane.lost is None:
            lane.lost = error
            self._observer.batch_failed(lane.runner.name, error)
        for entry in batch:
            lane.held.discard(entry)
            if self.dead is not None or entry.ticket.closed:
                self._settle(entry, Unavailable(f"the engine is lost: {error}"))
            else:
                self._queue(entry.ticket, key, [entry])
        if self.dead is not None:
            for ticket in list(self._open):
                self._drop(ticket, "dead", Unavailable(f"the engine is lost: {error}"))

    def _finish(
        self,
        lane: _Lane[Item, Result],
        entry: _Entry[Item, Result],
        outcome: Result | BaseException,
    ) -> None:
        lane.held.discard(entry)
        self._settle(entry, outcome)


class _Thread:
    """One thread for blocking calls, in their order.

    Not an executor: its threads are joined when the process ends, and a hung device would keep
    it from ending.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def work() -> None:
            result, failure = None, None
            try:
                result = function(*args)
            except BaseException as error:
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits
                loop.call_soon_threadsafe(settle, result, failure)

        self._calls.put(work)
        return await future

    def end(self) -> None:
        """Let the thread go once it has done what it was given."""
        self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
