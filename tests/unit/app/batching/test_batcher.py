"""The batcher: how batches are formed, in whose turn, and what becomes of their results."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from app.batching.batcher import Batcher
from app.batching.deadline import Deadline
from app.batching.reservation import Reservation, Share
from app.errors import DeadlineExceeded, Unavailable
from tests.devices import (
    Device,
    Recorder,
    request,
    until,
    until_reserved,
    until_running,
    with_batcher,
)


def test_results_come_back_in_order() -> None:
    async def body(batcher: Batcher[Any, Any]) -> None:
        assert await request(batcher, *range(10)) == [("done", n) for n in range(10)]

    device = Device()
    with_batcher(body, device)
    assert sorted(item for _, batch in device.batches for item in batch) == list(range(10))


def test_batch_is_formed_from_what_waits_when_the_device_is_free() -> None:
    device = Device()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.gate.clear()
        first = asyncio.create_task(request(batcher, "first"))
        await until_running(batcher)
        others = [asyncio.create_task(request(batcher, n)) for n in range(3)]
        await until(lambda: batcher.statistics().waiting == 3)
        device.gate.set()
        await asyncio.gather(first, *others)

    with_batcher(body, device)
    # The first runs alone, since nothing else waits; the others come meanwhile and share a batch.
    assert [batch for _, batch in device.batches] == [["first"], [0, 1, 2]]


def test_different_keys_never_share_a_batch() -> None:
    device = Device()

    async def body(batcher: Batcher[Any, Any]) -> None:
        await asyncio.gather(*(request(batcher, (n, k), key=k) for n in range(8) for k in "ab"))

    with_batcher(body, device)
    assert all(item[1] == key for key, batch in device.batches for item in batch)
    assert max(len(batch) for _, batch in device.batches) > 1


def test_next_batch_is_prepared_while_one_runs() -> None:
    device = Device(seconds=0.05)

    async def body(batcher: Batcher[Any, Any]) -> None:
        await request(batcher, *range(12))

    with_batcher(body, device)
    runs = [(start, end) for what, start, end in device.timeline if what == "run"]
    prepares = [(start, end) for what, start, end in device.timeline if what == "prepare"]
    for (start, end), (run_start, run_end) in zip(prepares[1:], runs, strict=False):
        assert start < run_end
        assert end > run_start


def test_batch_is_formed_shortly_before_the_one_on_the_device_ends() -> None:
    """It could grow until then, but the device would wait while it is prepared."""
    device = Device(seconds=0.2, depth=2)

    async def body(batcher: Batcher[Any, Any]) -> None:
        await request(batcher, "measured")
        first = asyncio.create_task(request(batcher, "first"))
        await until_running(batcher)
        others = [asyncio.create_task(request(batcher, n)) for n in range(2)]
        await asyncio.sleep(0.05)
        assert batcher.statistics().waiting == 2
        others.append(asyncio.create_task(request(batcher, 2)))
        await asyncio.gather(first, *others)

    with_batcher(body, device)
    assert [batch for _, batch in device.batches] == [["measured"], ["first"], [0, 1, 2]]
    prepared = [end for what, _, end in device.timeline if what == "prepare"]
    ran = [end for what, _, end in device.timeline if what == "run"]
    assert prepared[2] < ran[1] + 0.05  # at the latest about when the first ended


def test_requests_take_turns() -> None:
    device = Device()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.gate.clear()
        large = asyncio.create_task(request(batcher, *(("large", n) for n in range(60))))
        await until_running(batcher)
        small = [asyncio.create_task(request(batcher, ("small", n))) for n in range(3)]
        await until_reserved(batcher, 63)
        device.gate.set()
        await asyncio.gather(large, *small)

    with_batcher(body, device, max_batch=2)
    order = [item for _, batch in device.batches for item in batch]
    # Two batches of the large request were taken before the small ones came; then they take turns.
    assert max(order.index(("small", n)) for n in range(3)) <= 4 + 2 * 3


def test_reservations_of_one_request_have_the_turns_of_one() -> None:
    device = Device()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.gate.clear()
        first = asyncio.create_task(request(batcher, ("first", 0)))
        await until_running(batcher)
        share = Share()
        files = [
            asyncio.create_task(request(batcher, *[("many", n)] * 2, share=share))
            for n in range(10)
        ]
        await until_reserved(batcher, 21)
        others = [asyncio.create_task(request(batcher, *[(n, 0)] * 4)) for n in range(2)]
        await until_reserved(batcher, 29)
        device.gate.set()
        await asyncio.gather(first, *files, *others)
        assert not share.pending

    with_batcher(body, device, max_batch=3)
    order = [item[0] for _, batch in device.batches[2:6] for item in batch]
    # The second batch was prepared before the others came.
    assert order[:9] == ["many", 0, 1] * 3
    many = [n for _, batch in device.batches for name, n in batch if name == "many"]
    assert many == sorted(many)  # the files keep their order


def test_keys_take_turns() -> None:
    device = Device()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.gate.clear()
        many = asyncio.create_task(request(batcher, *range(40), key="large"))
        await until_running(batcher)
        one = asyncio.create_task(request(batcher, "x", key="small"))
        await until_reserved(batcher, 41)
        device.gate.set()
        await asyncio.gather(many, one)

    with_batcher(body, device)
    assert [key for key, _ in device.batches].index("small") <= 3


def test_max_wait_counts_from_the_first_window_and_ends_when_the_batch_is_full() -> None:
    device = Device()

    async def body(batcher: Batcher[Any, Any]) -> None:
        start = time.monotonic()
        first = asyncio.create_task(request(batcher, 1))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(request(batcher, 2))
        await asyncio.gather(first, second)
        assert 0.2 <= time.monotonic() - start < 10
        start = time.monotonic()
        await request(batcher, *range(4))
        assert time.monotonic() - start < 0.2

    with_batcher(body, device, max_wait=0.2)
    assert [batch for _, batch in device.batches] == [[1, 2], [0, 1, 2, 3]]


def test_two_devices_take_from_one_queue() -> None:
    left, right = Device("left", 0.02), Device("right", 0.02)

    async def body(batcher: Batcher[Any, Any]) -> None:
        assert await request(batcher, *range(40)) == [("done", n) for n in range(40)]

    with_batcher(body, left, right)
    assert min(len(left.batches), len(right.batches)) >= 3


def test_drain_waits_for_admitted_requests_and_admits_no_more() -> None:
    device, recorder = Device(seconds=0.02), Recorder()

    async def body(batcher: Batcher[Any, Any]) -> None:
        accepted = [asyncio.create_task(request(batcher, n)) for n in range(20)]
        await until_reserved(batcher, 20)
        drained = asyncio.create_task(batcher.drain())
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="stopping"):
            batcher.admit(["k"])
        await drained
        assert [task.result() for task in accepted] == [[("done", n)] for n in range(20)]

    with_batcher(body, device, recorder=recorder)
    assert recorder.events["rejected draining"] == 1


def test_reservation_measures_time_in_the_queue_and_on_the_device() -> None:
    device = Device(seconds=0.03)

    async def body(batcher: Batcher[Any, Any]) -> None:
        async def one() -> Reservation[Any, Any]:
            with batcher.admit(["k"]) as reservation:
                (future,) = reservation.submit([1])
                await future
            return reservation

        first, second = await asyncio.gather(one(), one())
        assert first.infer_seconds >= 0.03
        assert second.queue_seconds >= 0.03
        assert first.queue_seconds < second.queue_seconds

    with_batcher(body, device, max_batch=1)


def test_request_may_have_windows_of_several_keys() -> None:
    """Each runs under its own key, and the estimate counts the turns of every key."""
    device = Device(seconds=0.02)

    async def body(batcher: Batcher[Any, Any]) -> None:
        with batcher.admit(["a", "b", "a"]) as reservation:
            results = await asyncio.gather(*reservation.submit([1, 2, 3]))
        assert results == [("done", 1), ("done", 2), ("done", 3)]
        assert sorted(device.batches) == [("a", [1, 3]), ("b", [2])]
        # Four windows of its own; meanwhile four of a and four of b run for the other request.
        needed = 8 * batcher.estimates.seconds("a") + 4 * batcher.estimates.seconds("b")
        with batcher.admit(["a", "b"] * 10):
            with pytest.raises(DeadlineExceeded, match=r"estimated .* s exceeds"):
                batcher.admit(["a"] * 4, deadline=Deadline.after(0.9 * needed))
            with batcher.admit(["a"] * 4, deadline=Deadline.after(2 * needed)):
                pass

    with_batcher(body, device)


def test_statistics_count_windows_where_they_are() -> None:
    device = Device()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.gate.clear()
        with batcher.admit(["k"] * 12) as reservation:
            futures = reservation.submit(range(10))
            await until(lambda: batcher.statistics().in_flight == 8)
            now = batcher.statistics()
            assert (now.capacity, now.requests, now.reserved, now.waiting) == (100, 1, 12, 2)
            assert (now.submitted, now.settled) == (10, 0)
            device.gate.set()
            await asyncio.gather(*futures)
            now = batcher.statistics()
            assert (now.requests, now.reserved, now.waiting, now.in_flight) == (1, 2, 0, 0)
            assert (now.submitted, now.settled) == (10, 10)

    with_batcher(body, device)


def test_forgotten_keys_do_not_count_in_estimates() -> None:
    device = Device()
    device.seconds_of = {("old", "large"): 0.2}

    async def body(batcher: Batcher[Any, Any]) -> None:
        for model in ("old", "new"):
            await request(batcher, 1, key=(model, "large"))
        assert batcher.estimates.seconds() > 0.09
        batcher.forget(lambda key: key[0] == "old")
        assert batcher.estimates.seconds() == batcher.estimates.seconds(("new", "large")) < 0.09

    with_batcher(body, device)
