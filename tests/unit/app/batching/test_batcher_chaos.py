"""Ten thousand requests that are cancelled, fail or are late.

Every future is settled once, and every result reaches its own request.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import pytest

from app.batching.batcher import Batcher
from app.batching.deadline import Deadline
from app.errors import DeadlineExceeded, OutOfMemory, QueueFull, Unavailable
from tests.devices import assert_nothing_left

CLIENTS, REQUESTS = 200, 50
POISON = (17, 23)


class Unreliable:
    """A runner that is sometimes slow, sometimes fails, and always fails on one request."""

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.depth = 1 + seed % 2
        self.random = random.Random(seed)

    def prepare(self, key: Hashable, payloads: Sequence[Any]) -> list[Any]:
        if self.random.random() < 0.005:
            raise MemoryError("while preparing")
        return list(payloads)

    def submit(self, key: Hashable, staged: list[Any]) -> list[Any]:
        return staged

    def check(self) -> None:
        pass

    def collect(self, key: Hashable, staged: list[Any]) -> list[Any]:
        if self.random.random() < 0.01:
            time.sleep(0.005)
        if self.random.random() < 0.01:
            raise RuntimeError("at random")
        assert all(payload[2] == key for payload in staged)
        if any(payload[:2] == POISON for payload in staged):
            raise ValueError("poison")
        return [("result of", payload) for payload in staged]


class Crowd:
    """Clients of one batcher.

    Attributes:
        outcomes: how many requests were sent, and how many ended how.
        futures: of every window that was submitted.
    """

    def __init__(self, batcher: Batcher[Any, Any]) -> None:
        self.outcomes: Counter[str] = Counter()
        self.futures: list[asyncio.Future[Any]] = []
        self._batcher = batcher

    async def run_client(self, number: int) -> None:
        """Send the requests of one client, one after the other."""
        rng = random.Random(number)
        for request in range(REQUESTS):
            self.outcomes["sent"] += 1
            outcome = await self._send(number, request, rng)
            self.outcomes[outcome] += 1
            if outcome == "queue full":
                await asyncio.sleep(0.002)

    async def _send(self, number: int, request: int, rng: random.Random) -> str:
        """Send one request, perhaps cancel it, and return how it ended."""
        key = rng.choice("abc")
        windows = rng.choice((1, 1, 1, 2, 5, 20))
        payloads = [(number, request, key, window) for window in range(windows)]
        deadline = Deadline.after(0.05) if rng.random() < 0.1 else Deadline.never()
        task = asyncio.create_task(self._compute(key, payloads, deadline))
        if rng.random() < 1 / 3:
            await asyncio.sleep(rng.random() * 0.02)
            task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return "cancelled"
        except QueueFull as rejected:
            assert rejected.retry_after is None or rejected.retry_after >= 0
            return "queue full"
        except DeadlineExceeded:
            return "late"
        except Unavailable:
            return "stopped"
        except ValueError as error:
            assert str(error) == "poison"
            assert (number, request) == POISON
            return "poisoned"
        except (RuntimeError, OutOfMemory):
            return "failed"
        return "answered"

    async def _compute(self, key: str, payloads: list[Any], deadline: Deadline) -> None:
        with self._batcher.admit([key] * len(payloads), deadline=deadline) as reservation:
            await asyncio.sleep(0)  # as if the image was decoded
            futures = reservation.submit(payloads)
            self.futures += futures
            for payload, future in zip(payloads, futures, strict=True):
                assert await future == ("result of", payload)


async def close_amid_requests() -> Counter[str]:
    """Close a batcher after nine in ten requests, and return how all of them ended."""
    before = asyncio.all_tasks()
    batcher: Batcher[Any, Any] = Batcher(
        [Unreliable("one", 1), Unreliable("two", 2)], max_batch=8, capacity=600, max_wait=0.001
    )
    await batcher.start()
    crowd = Crowd(batcher)
    clients = [asyncio.create_task(crowd.run_client(number)) for number in range(CLIENTS)]
    while crowd.outcomes["sent"] < CLIENTS * REQUESTS * 0.9:
        await asyncio.sleep(0.005)
    await batcher.close()
    await asyncio.gather(*clients)
    assert_nothing_left(batcher)
    # As many outcomes as windows, and every future is done: each was settled once.
    assert batcher.statistics().settled == len(crowd.futures)
    assert all(future.done() for future in crowd.futures)
    assert asyncio.all_tasks() == before
    return crowd.outcomes


@pytest.mark.slow
def test_chaos_settles_every_future_once_and_leaves_nothing_behind() -> None:
    threads_before = threading.active_count()
    started = time.monotonic()
    outcomes = asyncio.run(close_amid_requests())
    assert outcomes.pop("sent") == CLIENTS * REQUESTS == 10_000
    assert outcomes.total() == 10_000
    assert outcomes["answered"] > 1000
    assert outcomes["cancelled"] > 500
    assert outcomes["stopped"] > 0
    until = time.monotonic() + 5
    while threading.active_count() > threads_before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= threads_before
    assert time.monotonic() - started < 60
