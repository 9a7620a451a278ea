"""The batcher alone: how batches are formed, in whose turn, and what becomes of their results."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from app.batching.batcher import Batcher, Reservation
from app.batching.deadline import Deadline
from app.errors import DeadlineExceeded, Unavailable
from tests.devices import Device, Log, ask, until, with_batcher


def test_results_come_back_in_order() -> None:
    async def body(batcher: Batcher[Any, Any]) -> None:
        assert await ask(batcher, *range(10)) == [("done", n) for n in range(10)]

    device = Device()
    with_batcher(body, device)
    assert sorted(item for _, batch in device.batches for item in batch) == list(range(10))


def test_batches_are_formed_of_what_waits_when_the_device_is_free() -> None:
    device = Device()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.gate.clear()
        first = asyncio.create_task(ask(batcher, "first"))
        await until(lambda: batcher.elapsed() > 0)
        others = [asyncio.create_task(ask(batcher, n)) for n in range(3)]
        await until(lambda: batcher.waiting == 3)
        device.gate.set()
        await asyncio.gather(first, *others)

    with_batcher(body, device)
    # alone at once, since nothing else was there; then everything that came meanwhile, together
    assert [batch for _, batch in device.batches] == [["first"], [0, 1, 2]]


def test_different_keys_never_share_a_batch() -> None:
    device = Device()

    async def body(batcher: Batcher[Any, Any]) -> None:
        await asyncio.gather(*(ask(batcher, (n, k), key=k) for n in range(8) for k in "ab"))

    with_batcher(body, device)
    assert all(item[1] == key for key, batch in device.batches for item in batch)
    assert max(len(batch) for _, batch in device.batches) > 1


def test_next_batch_is_prepared_while_one_runs() -> None:
    device = Device(seconds=0.05)

    async def body(batcher: Batcher[Any, Any]) -> None:
        await ask(batcher, *range(12))

    with_batcher(body, device)
    runs = [(start, end) for what, start, end in device.timeline if what == "run"]
    prepares = [(start, end) for what, start, end in device.timeline if what == "prepare"]
    for (start, end), (running, until_) in zip(prepares[1:], runs, strict=False):
        assert start < until_
        assert end > running


def test_requests_take_turns() -> None:
    device = Device()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.gate.clear()
        large = asyncio.create_task(ask(batcher, *(("large", n) for n in range(60))))
        await until(lambda: batcher.elapsed() > 0)
        small = [asyncio.create_task(ask(batcher, ("small", n))) for n in range(3)]
        await until(lambda: batcher.reserved == 63)
        device.gate.set()
        await asyncio.gather(large, *small)

    with_batcher(body, device, max_batch=2)
    order = [item for _, batch in device.batches for item in batch]
    # two batches of the large image were taken before the small ones came; then turn by turn
    assert max(order.index(("small", n)) for n in range(3)) <= 4 + 2 * 3


def test_keys_take_turns() -> None:
    device = Device()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.gate.clear()
        many = asyncio.create_task(ask(batcher, *range(40), key="large"))
        await until(lambda: batcher.elapsed() > 0)
        one = asyncio.create_task(ask(batcher, "x", key="small"))
        await until(lambda: batcher.reserved == 41)
        device.gate.set()
        await asyncio.gather(many, one)

    with_batcher(body, device)
    assert [key for key, _ in device.batches].index("small") <= 3


def test_max_wait_fills_a_batch_and_counts_from_its_first_window() -> None:
    device = Device()

    async def body(batcher: Batcher[Any, Any]) -> None:
        start = asyncio.get_running_loop().time()
        first = asyncio.create_task(ask(batcher, 1))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(ask(batcher, 2))
        await asyncio.gather(first, second)
        assert 0.09 < asyncio.get_running_loop().time() - start < 1
        start = asyncio.get_running_loop().time()
        await ask(batcher, *range(4))  # full: no need to wait
        assert asyncio.get_running_loop().time() - start < 0.09

    with_batcher(body, device, max_wait=0.1)
    assert [batch for _, batch in device.batches] == [[1, 2], [0, 1, 2, 3]]


def test_two_devices_pull_from_one_queue() -> None:
    left, right = Device("left", 0.02), Device("right", 0.02)

    async def body(batcher: Batcher[Any, Any]) -> None:
        assert await ask(batcher, *range(40)) == [("done", n) for n in range(40)]

    with_batcher(body, left, right)
    assert min(len(left.batches), len(right.batches)) >= 3


def test_draining_answers_what_was_admitted_and_nothing_more() -> None:
    device, log = Device(seconds=0.02), Log()

    async def body(batcher: Batcher[Any, Any]) -> None:
        accepted = [asyncio.create_task(ask(batcher, n)) for n in range(20)]
        await until(lambda: batcher.reserved == 20)
        drained = asyncio.create_task(batcher.drain())
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            batcher.admit(["k"] * 1)
        await drained
        assert [task.result() for task in accepted] == [[("done", n)] for n in range(20)]

    with_batcher(body, device, log=log)
    assert log.events["refused draining"] == 1


def test_times_of_a_ticket() -> None:
    device = Device(seconds=0.03)

    async def body(batcher: Batcher[Any, Any]) -> None:
        async def one() -> Reservation[Any, Any]:
            with batcher.admit(["k"] * 1) as ticket:
                (future,) = ticket.submit([1])
                await future
            return ticket

        first, second = await asyncio.gather(one(), one())
        assert 0.025 < first.infer_seconds < 0.5
        assert second.queue_seconds > 0.025
        assert first.queue_seconds < second.queue_seconds

    with_batcher(body, device, max_batch=1)


def test_one_request_may_have_windows_of_several_keys() -> None:
    """Each is computed under its own key; the estimate counts the turns of every key."""
    device = Device(seconds=0.02)

    async def body(batcher: Batcher[Any, Any]) -> None:
        with batcher.admit(["a", "b", "a"]) as ticket:
            results = await asyncio.gather(*ticket.submit([1, 2, 3]))
        assert results == [("done", 1), ("done", 2), ("done", 3)]
        assert sorted(device.batches) == [("a", [1, 3]), ("b", [2])]
        # four of its own, and meanwhile four of a and four of b
        needed = 8 * batcher.estimates.seconds("a") + 4 * batcher.estimates.seconds("b")
        with batcher.admit(["a", "b"] * 10):
            with pytest.raises(DeadlineExceeded, match="about"):
                batcher.admit(["a"] * 4, deadline=Deadline.after(0.9 * needed))
            with batcher.admit(["a"] * 4, deadline=Deadline.after(2 * needed)):
                pass

    with_batcher(body, device)
