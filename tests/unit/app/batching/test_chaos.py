"""Ten thousand requests that leave, fail and hurry: every future settled once, none crossed."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from app.batching.batcher import Batcher
from app.batching.deadline import Deadline
from app.errors import DeadlineExceeded, QueueFull, Unavailable

TASKS, REQUESTS = 200, 50
POISON = (17, 23)


class Unreliable:
    """Fails now and then for no reason, is slow now and then, and chokes on one item always."""

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.random = random.Random(seed)
        self.ran = 0

    def prepare(self, key: Hashable, items: Sequence[Any]) -> list[Any]:
        if self.random.random() < 0.005:
            raise MemoryError("while staging")
        return list(items)

    def run(self, key: Hashable, staged: list[Any]) -> list[Any]:
        self.ran += len(staged)
        if self.random.random() < 0.01:
            time.sleep(0.005)
        if self.random.random() < 0.01:
            raise RuntimeError("for no reason")
        assert all(item[2] == key for item in staged)
        if any(item[:2] == POISON for item in staged):
            raise ValueError("poison")
        return [("result of", item) for item in staged]


class Audited(Batcher[Any, Any]):
    """Counts how often each future is given an outcome."""

    settled: Counter[int]
    keep: list[Any]

    def _settle(self, entry: Any, outcome: Any) -> None:
        self.settled[id(entry.future)] += 1
        self.keep.append(entry.future)  # or its id might be used again
        super()._settle(entry, outcome)


def test_chaos() -> None:
    threads_before = threading.active_count()
    outcomes: Counter[str] = Counter()
    started = time.monotonic()

    async def client(batcher: Audited, number: int, stop: asyncio.Event) -> None:
        rng = random.Random(number)
        for request in range(REQUESTS):
            outcomes["sent"] += 1
            await one(batcher, number, request, rng)
            if stop.is_set():
                outcomes["after the stop"] += 1

    async def one(batcher: Audited, number: int, request: int, rng: random.Random) -> None:
        key = rng.choice("abc")
        items = [(number, request, key, n) for n in range(rng.choice((1, 1, 1, 2, 5, 20)))]
        hurry = Deadline.after(0.05) if rng.random() < 0.1 else Deadline.never()

        async def ask() -> None:
            with batcher.admit([key] * len(items), deadline=hurry) as ticket:
                await asyncio.sleep(0)  # the image is decoded
                for item, future in zip(items, ticket.submit(items), strict=True):
                    assert await future == ("result of", item)

        asking = asyncio.create_task(ask())
        if rng.random() < 1 / 3:
            await asyncio.sleep(rng.random() * 0.02)
            asking.cancel()
        try:
            await asking
            outcomes["answered"] += 1
        except asyncio.CancelledError:
            outcomes["left"] += 1
        except QueueFull as refused:
            assert refused.retry_after is None or refused.retry_after >= 0
            outcomes["refused"] += 1
            await asyncio.sleep(0.002)
        except DeadlineExceeded:
            outcomes["late"] += 1
        except Unavailable:
            outcomes["stopped"] += 1
        except ValueError as error:
            assert str(error) == "poison"
            assert (number, request) == POISON
            outcomes["poisoned"] += 1
        except (RuntimeError, MemoryError):
            outcomes["unlucky"] += 1

    async def scene() -> None:
        before = asyncio.all_tasks()
        batcher = Audited(
            [Unreliable("one", 1), Unreliable("two", 2)], max_batch=8, capacity=600, max_wait=0.001
        )
        batcher.settled, batcher.keep = Counter(), []
        await batcher.start()
        stop = asyncio.Event()
        clients = [asyncio.create_task(client(batcher, n, stop)) for n in range(TASKS)]
        while outcomes["sent"] < TASKS * REQUESTS * 0.9:
            await asyncio.sleep(0.005)
        stop.set()
        await batcher.close()  # in the middle of everything
        await asyncio.gather(*clients)
        assert set(batcher.settled.values()) == {1}
        assert all(future.done() for future in batcher.keep)
        assert (batcher.waiting, batcher.in_flight, batcher.reserved) == (0, 0, 0)
        assert not batcher._tickets
        assert not list(batcher._queue)
        assert asyncio.all_tasks() == before

    asyncio.run(scene())
    assert outcomes["sent"] == TASKS * REQUESTS == 10_000
    ended = ("answered", "left", "refused", "late", "stopped", "poisoned", "unlucky")
    assert sum(outcomes[each] for each in ended) == 10_000
    assert outcomes["answered"] > 1000
    assert outcomes["left"] > 500
    assert outcomes["stopped"] > 0
    deadline = time.monotonic() + 5
    while threading.active_count() > threads_before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads_before
    assert time.monotonic() - started < 60
