"""Devices in plain Python for tests of the batcher, and checks that it leaves nothing behind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any

from app.batching.batcher import Batcher
from app.batching.device_worker import Observer
from app.errors import DeviceLost, OutOfMemory


class Device:
    """A runner that returns ("done", payload) for each payload.

    Attributes:
        depth: batches that may be submitted and not collected.
        seconds: that `collect` takes; `prepare` takes half of it.
        seconds_of: that `collect` takes for some keys instead.
        memory: the most payloads it can run at once.
        poison: the errors that some payloads cause.
        lost: whether `check` finds it lost.
        batches: key and payloads of every batch that was run.
        gate: `collect` waits until it is set.
        timeline: ("prepare" or "run", start, end) of every call of `prepare` and `collect`.
        threads: names of the threads that called each method.
    """

    def __init__(self, name: str = "device", seconds: float = 0.0, depth: int = 1) -> None:
        self.name = name
        self.depth = depth
        self.seconds = seconds
        self.seconds_of: dict[Hashable, float] = {}
        self.memory = 10**9
        self.poison: dict[Any, Exception] = {}
        self.lost = False
        self.batches: list[tuple[Hashable, list[Any]]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.timeline: list[tuple[str, float, float]] = []
        self.threads: defaultdict[str, set[str]] = defaultdict(set)

    def prepare(self, key: Hashable, payloads: Sequence[Any]) -> list[Any]:
        self._record_thread("prepare")
        start = time.monotonic()
        if self.seconds:
            time.sleep(self.seconds / 2)
        self.timeline.append(("prepare", start, time.monotonic()))
        return list(payloads)

    def submit(self, key: Hashable, staged: list[Any]) -> list[Any]:
        self._record_thread("submit")
        return staged

    def check(self) -> None:
        self._record_thread("check")
        assert self.gate.wait(20)
        if self.lost:
            raise DeviceLost("fell off the bus")

    def collect(self, key: Hashable, staged: list[Any]) -> list[Any]:
        self._record_thread("collect")
        start = time.monotonic()
        assert self.gate.wait(20)
        self.batches.append((key, staged))
        time.sleep(self.seconds_of.get(key, self.seconds))
        if len(staged) > self.memory:
            raise OutOfMemory("not enough memory")
        for payload in staged:
            if payload in self.poison:
                raise self.poison[payload]
        self.timeline.append(("run", start, time.monotonic()))
        return [("done", payload) for payload in staged]

    def _record_thread(self, method: str) -> None:
        self.threads[method].add(threading.current_thread().name)


class Recorder(Observer):
    """Records events.

    Attributes:
        events: how often each happened, by name and reason.
        sizes: of the batches that have run.
        caps: batch limits after running out of memory, by runner and key.
    """

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        self.sizes: list[int] = []
        self.caps: dict[tuple[str, Hashable], int] = {}

    def batch_done(self, runner: str, key: Hashable, size: int, seconds: float) -> None:
        self.sizes.append(size)

    def batch_failed(self, runner: str, error: BaseException) -> None:
        self.events[f"failed {type(error).__name__}"] += 1

    def batch_capped(self, runner: str, key: Hashable, cap: int) -> None:
        self.caps[runner, key] = cap

    def batch_cap_removed(self, runner: str, key: Hashable) -> None:
        del self.caps[runner, key]

    def request_rejected(self, reason: str) -> None:
        self.events[f"rejected {reason}"] += 1

    def windows_dropped(self, reason: str, windows: int) -> None:
        self.events[f"dropped {reason}"] += windows


Body = Callable[[Batcher[Any, Any]], Awaitable[None]]


def with_batcher(
    body: Body, *devices: Device, recorder: Recorder | None = None, **options: Any
) -> None:
    """Run `body` with a started batcher, then check that nothing is left behind."""

    async def scene() -> None:
        before = asyncio.all_tasks()
        options.setdefault("max_batch", 4)
        options.setdefault("capacity", 100)
        batcher: Batcher[Any, Any] = Batcher(devices, observer=recorder, **options)
        await batcher.start()
        try:
            await asyncio.wait_for(body(batcher), 30)
        finally:
            for device in devices:
                device.gate.set()
            await batcher.close()
        assert_nothing_left(batcher)
        assert asyncio.all_tasks() == before

    asyncio.run(scene())


def assert_nothing_left(batcher: Batcher[Any, Any]) -> None:
    """No request, window or unsettled future is left in the batcher."""
    now = batcher.statistics()
    assert (now.requests, now.reserved, now.waiting, now.in_flight) == (0, 0, 0, 0)
    assert now.settled == now.submitted


async def request(
    batcher: Batcher[Any, Any], *payloads: Any, key: Hashable = "k", **admit: Any
) -> list[Any]:
    """Send one request with a window per payload, and return its results."""
    with batcher.admit([key] * len(payloads), **admit) as reservation:
        return [await future for future in reservation.submit(payloads)]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, for at most ten seconds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def until_reserved(batcher: Batcher[Any, Any], windows: int) -> None:
    """Wait until so many windows are reserved."""
    await until(lambda: batcher.statistics().reserved == windows)


async def until_running(batcher: Batcher[Any, Any]) -> None:
    """Wait until a batch is on a device."""
    await until(lambda: batcher.elapsed() > 0)
