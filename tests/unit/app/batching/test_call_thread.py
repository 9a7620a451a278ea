"""The thread for blocking calls."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from app.batching.call_thread import CallThread


@pytest.fixture
def thread() -> Iterator[CallThread]:
    thread = CallThread("calls")
    yield thread
    thread.stop()


def test_calls_run_on_one_thread_in_their_order(thread: CallThread) -> None:
    names: list[str] = []
    order: list[int] = []

    def work(number: int) -> int:
        names.append(threading.current_thread().name)
        order.append(number)
        return number * 10

    async def scene() -> list[int]:
        return await asyncio.gather(*(thread.call(work, number) for number in range(20)))

    assert asyncio.run(scene()) == [number * 10 for number in range(20)]
    assert order == list(range(20))
    assert set(names) == {"calls"}


def test_error_reaches_the_caller_and_the_thread_continues(thread: CallThread) -> None:
    async def scene() -> None:
        with pytest.raises(ZeroDivisionError):
            await thread.call(lambda: 1 // 0)
        with pytest.raises(SystemExit):
            await thread.call(raise_exit)
        assert await thread.call(lambda: "still here") == "still here"

    def raise_exit() -> None:
        raise SystemExit

    asyncio.run(scene())


def test_cancelled_wait_does_not_stop_the_call(thread: CallThread) -> None:
    gate, finished = threading.Event(), threading.Event()

    def work() -> None:
        assert gate.wait(10)
        finished.set()

    async def scene() -> None:
        call = asyncio.create_task(thread.call(work))
        await asyncio.sleep(0.01)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert call.cancelled()
        gate.set()
        assert await thread.call(finished.is_set)

    asyncio.run(scene())


def test_call_that_outlives_its_loop_is_harmless(thread: CallThread) -> None:
    gate = threading.Event()

    async def scene() -> None:
        call = asyncio.create_task(thread.call(gate.wait, 10))
        await asyncio.sleep(0.01)
        call.cancel()

    asyncio.run(scene())
    gate.set()

    async def later() -> str:
        return await thread.call(lambda: "still here")

    assert asyncio.run(later()) == "still here"


def test_stop_ends_the_thread_after_the_calls_before_it() -> None:
    thread = CallThread("one that stops")
    done: list[int] = []

    async def scene() -> None:
        calls = [asyncio.create_task(thread.call(done.append, number)) for number in range(3)]
        await asyncio.sleep(0)
        thread.stop()
        await asyncio.gather(*calls)

    asyncio.run(scene())
    assert done == [0, 1, 2]
    until = time.monotonic() + 5
    while any(each.name == "one that stops" for each in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(0.001)
