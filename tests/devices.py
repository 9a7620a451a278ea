"""Devices of plain Python, and a batcher that must leave nothing behind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any

from app.batching.batcher import Batcher
from app.batching.device_worker import Observer
from app.errors import OutOfMemory


class Device:
    """Gives back what it gets, tagged; can be slow, short of memory, or broken."""

    def __init__(self, name: str = "device", seconds: float = 0.0) -> None:
        self.name = name
        self.seconds = seconds
        self.seconds_of: dict[Hashable, float] = {}  # keys that take another time
        self.memory = 10**9
        self.poison: dict[Any, Exception] = {}
        self.batches: list[tuple[Hashable, list[Any]]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.timeline: list[tuple[str, float, float]] = []

    def prepare(self, key: Hashable, items: Sequence[Any]) -> list[Any]:
        start = time.monotonic()
        if self.seconds:
            time.sleep(self.seconds / 2)
        self.timeline.append(("prepare", start, time.monotonic()))
        return list(items)

    def run(self, key: Hashable, staged: list[Any]) -> list[Any]:
        start = time.monotonic()
        assert self.gate.wait(20)
        self.batches.append((key, staged))
        time.sleep(self.seconds_of.get(key, self.seconds))
        if len(staged) > self.memory:
            raise OutOfMemory("no room")
        for item in staged:
            if item in self.poison:
                raise self.poison[item]
        self.timeline.append(("run", start, time.monotonic()))
        return [("done", item) for item in staged]


class Log(Observer):
    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        self.sizes: list[int] = []
        self.caps: dict[tuple[str, Hashable], int] = {}

    def batch_capped(self, runner: str, key: Hashable, cap: int) -> None:
        self.caps[runner, key] = cap

    def batch_done(self, runner: str, key: Hashable, size: int, seconds: float) -> None:
        self.sizes.append(size)

    def batch_failed(self, runner: str, error: BaseException) -> None:
        self.events[f"failed {type(error).__name__}"] += 1

    def request_rejected(self, reason: str) -> None:
        self.events[f"refused {reason}"] += 1

    def windows_dropped(self, reason: str, windows: int) -> None:
        self.events[f"dropped {reason}"] += windows


Body = Callable[[Batcher[Any, Any]], Awaitable[None]]


def with_batcher(body: Body, *devices: Device, log: Log | None = None, **options: Any) -> None:
    """Run `body` with a started batcher; afterwards nothing may be left behind."""

    async def scene() -> None:
        before = asyncio.all_tasks()
        options.setdefault("max_batch", 4)
        options.setdefault("capacity", 100)
        batcher: Batcher[Any, Any] = Batcher(devices, observer=log, **options)
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
    assert (batcher.waiting, batcher.in_flight, batcher.reserved) == (0, 0, 0)
    assert not batcher._tickets
    assert not batcher._held
    assert not list(batcher._queue)


async def ask(
    batcher: Batcher[Any, Any], *items: Any, key: Hashable = "k", **admit: Any
) -> list[Any]:
    with batcher.admit([key] * len(items), **admit) as ticket:
        return [await future for future in ticket.submit(items)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)
