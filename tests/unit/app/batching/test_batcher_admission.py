"""The batcher: which requests it admits, deadlines, and requests that are cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import pytest

from app.batching.admission import UNMEASURED_CAPACITY
from app.batching.batcher import Batcher
from app.batching.deadline import Deadline
from app.batching.estimates import MARGIN
from app.batching.reservation import Share
from app.errors import DeadlineExceeded, QueueFull
from tests.devices import (
    Device,
    Recorder,
    request,
    until,
    until_reserved,
    until_running,
    with_batcher,
)


def test_full_queue_rejects_at_once_and_says_when_to_retry() -> None:
    device, recorder = Device(seconds=0.01), Recorder()

    async def body(batcher: Batcher[Any, Any]) -> None:
        await request(batcher, *range(8))  # measures the rate
        assert batcher.estimates.seconds() > 0
        device.gate.clear()
        others = [asyncio.create_task(request(batcher, 1, 2)) for _ in range(5)]
        await until_running(batcher)
        await until_reserved(batcher, 10)
        with pytest.raises(QueueFull) as rejected:
            batcher.admit(["k"] * 2)
        assert str(rejected.value) == "queue full: 10 of 10 slots used, 2 needed"
        assert rejected.value.retry_after == pytest.approx(2 * batcher.estimates.seconds())
        with batcher.admit(["k"] * 2, ignore_capacity=True):
            assert batcher.statistics().reserved == 12
        device.gate.set()
        await asyncio.gather(*others)

    with_batcher(body, device, recorder=recorder, capacity=10)
    assert recorder.events["rejected queue_full"] == 1


def test_check_of_admission_reserves_nothing() -> None:
    async def body(batcher: Batcher[Any, Any]) -> None:
        batcher.check_admission(["k"], deadline=Deadline.never())
        assert batcher.statistics().requests == 0
        with batcher.admit(["k"]), pytest.raises(QueueFull, match="1 of 1 slots used"):
            batcher.check_admission(["k"], deadline=Deadline.never())
        with pytest.raises(DeadlineExceeded, match="has passed"):
            batcher.check_admission(["k"], deadline=Deadline.after(-1))

    recorder = Recorder()
    with_batcher(body, Device(), recorder=recorder, capacity=1)
    assert recorder.events == {"rejected queue_full": 1, "rejected deadline": 1}


def test_large_request_takes_a_quarter_of_the_slots_and_its_turns() -> None:
    """It is admitted although the queue is far smaller, and small requests are done before it."""
    device = Device(seconds=0.01)

    async def body(batcher: Batcher[Any, Any]) -> None:
        large = asyncio.create_task(request(batcher, *range(1000)))
        await until(lambda: len(device.batches) > 2)
        # Too soon for 1,000 windows, but the estimate counts that requests take turns.
        deadline = Deadline.after(400 * batcher.estimates.seconds())
        for n in range(20):
            assert await request(batcher, n, deadline=deadline) == [("done", n)]
        assert not large.done()
        with contextlib.ExitStack() as stack:
            for _ in range(6):
                stack.enter_context(batcher.admit(["k"]))
            with pytest.raises(QueueFull, match="8 of 8 slots used, 2 needed"):
                batcher.admit(["k"] * 50)
            large.cancel()
            await asyncio.gather(large, return_exceptions=True)

    with_batcher(body, device, max_batch=1, capacity=8)


def test_reservations_of_one_request_take_a_quarter_of_the_slots_together() -> None:
    device = Device()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.gate.clear()
        share = Share()
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(batcher.admit(["k"] * 3, share=share)) for _ in range(5)]
            assert share.pending == {"k": 15}
            stack.enter_context(batcher.admit(["k"] * 2))
            stack.enter_context(batcher.admit(["k"] * 2))
            stack.enter_context(batcher.admit(["k"]))
            with pytest.raises(QueueFull, match="7 of 8 slots used, 2 needed"):
                batcher.admit(["k"] * 2)
            stack.enter_context(batcher.admit(["k"] * 9, share=share))  # needs no more
            for each in files:
                each.__exit__()
            assert share.pending == {"k": 9}
        assert not share.pending
        device.gate.set()

    with_batcher(body, device, capacity=8)


def test_estimate_counts_the_windows_of_the_same_request_first() -> None:
    device = Device(seconds=0.05)

    async def body(batcher: Batcher[Any, Any]) -> None:
        await request(batcher, *range(8))
        one, share = batcher.estimates.seconds(), Share()
        with batcher.admit(["k"] * 20, share=share):
            soon = Deadline.after(10 * one)
            with pytest.raises(DeadlineExceeded):
                batcher.admit(["k"], deadline=soon, share=share)
            with batcher.admit(["k"], deadline=soon):  # of another request: takes turns
                pass

    with_batcher(body, device)


def test_late_file_leaves_the_others_of_its_request_in_the_queue() -> None:
    device = Device(seconds=0.05)

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.gate.clear()
        # One runs and one is prepared: neither waits in the queue.
        first = asyncio.create_task(request(batcher, "first", "second"))
        await until(lambda: batcher.statistics().in_flight == 2)
        share = Share()
        late = asyncio.create_task(
            request(batcher, "late", share=share, deadline=Deadline.after(0.1))
        )
        other = asyncio.create_task(request(batcher, "other", share=share))
        await until_reserved(batcher, 4)
        await asyncio.sleep(0.2)
        device.gate.set()
        with pytest.raises(DeadlineExceeded):
            await late
        assert await other == [("done", "other")]
        await first

    with_batcher(body, device, max_batch=1)


def test_capacity_follows_the_measured_rate() -> None:
    device = Device(seconds=0.01)

    async def body(batcher: Batcher[Any, Any]) -> None:
        assert batcher.capacity == UNMEASURED_CAPACITY
        await request(batcher, *range(8))
        assert batcher.capacity == int(3 / batcher.estimates.seconds())
        device.seconds = 3
        for _ in range(2):
            await request(batcher, 1)
        assert batcher.capacity == 4  # not fewer, so that a request can have a quarter

    with_batcher(body, device, capacity=None, longest=3)


def test_clients_of_a_fast_device_are_not_rejected() -> None:
    """Eight images of a megapixel at once, where each has sixteen windows."""
    device = Device(seconds=0.01)

    async def body(batcher: Batcher[Any, Any]) -> None:
        await request(batcher, *range(8))
        images = [
            request(batcher, *range(16), deadline=Deadline.after(60), key="k") for _ in range(8)
        ]
        assert [len(results) for results in await asyncio.gather(*images)] == [16] * 8

    with_batcher(body, device, capacity=None, longest=600)


def test_idle_slow_device_rejects_what_cannot_be_done_in_time() -> None:
    device = Device(seconds=0.2)

    async def body(batcher: Batcher[Any, Any]) -> None:
        await request(batcher, 1)
        with pytest.raises(DeadlineExceeded) as rejected:
            batcher.admit(["k"] * 400, deadline=Deadline.after(60))
        assert rejected.value.retry_after is None
        with batcher.admit(["k"] * 400, deadline=Deadline.after(600)):
            pass

    with_batcher(body, device, max_batch=1, capacity=None, longest=600)


def test_admission_takes_no_longer_when_thousands_wait() -> None:
    device = Device(seconds=0.001)

    async def body(batcher: Batcher[Any, Any]) -> None:
        await request(batcher, *range(8))
        device.gate.clear()

        def seconds_of_admission() -> float:
            least = 1.0
            for _ in range(20):
                start = time.perf_counter()
                with batcher.admit(["k"], deadline=Deadline.after(60)):
                    least = min(least, time.perf_counter() - start)
            return least

        alone = seconds_of_admission()
        with contextlib.ExitStack() as stack:
            for _ in range(5000):
                stack.enter_context(batcher.admit(["k"], deadline=Deadline.after(600)))
            assert seconds_of_admission() < 5 * alone

    with_batcher(body, device, capacity=10_000)


def test_estimate_uses_the_measurements_of_the_key() -> None:
    """Small windows are not rejected because large ones take long."""
    device = Device()
    device.seconds_of = {"large": 0.05}

    async def body(batcher: Batcher[Any, Any]) -> None:
        for key in ("small", "large"):
            await request(batcher, *range(8), key=key)
        soon = Deadline.after(1)
        with pytest.raises(DeadlineExceeded):
            batcher.admit(["large"] * 40, deadline=soon)
        assert len(await request(batcher, *range(40), key="small", deadline=soon)) == 40

    with_batcher(body, device, max_batch=1)


def test_reservation_takes_no_more_windows_than_slots_and_none_after_release() -> None:
    async def body(batcher: Batcher[Any, Any]) -> None:
        with batcher.admit(["k"] * 2) as reservation:
            reservation.submit([1])
            with pytest.raises(ValueError, match="2 windows for 1 reserved slots"):
                reservation.submit([2, 3])
        with pytest.raises(ValueError, match="released"):
            reservation.submit([2])

    with_batcher(body, Device())


def test_deadline_is_enforced_at_admission_and_in_the_queue() -> None:
    device, recorder = Device(), Recorder()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.seconds = 0.05
        await request(batcher, *range(8))
        with pytest.raises(DeadlineExceeded, match=r"estimated .* exceeds the 0\.0\d+ s") as alone:
            batcher.admit(["k"] * 90, deadline=Deadline.after(0.01))  # 90 windows of 12 ms
        assert alone.value.retry_after is None
        with pytest.raises(DeadlineExceeded, match="the deadline has passed"):
            batcher.admit(["k"], deadline=Deadline.after(-1))
        device.gate.clear()
        first = asyncio.create_task(request(batcher, *"abcdefgh"))
        await until_running(batcher)
        one = batcher.estimates.seconds("k")
        with pytest.raises(DeadlineExceeded) as queued:  # one window of `first` runs before it
            batcher.admit(["k"], deadline=Deadline.after(1.5 * one))
        assert queued.value.retry_after == pytest.approx((2 * MARGIN - 1.5) * one, rel=0.2)
        late = asyncio.create_task(request(batcher, "late", deadline=Deadline.after(0.3)))
        await asyncio.sleep(0.4)
        device.gate.set()
        with pytest.raises(DeadlineExceeded, match="dropped from the queue"):
            await late
        await first

    with_batcher(body, device, recorder=recorder)
    assert all("late" not in batch for _, batch in device.batches)
    assert recorder.events["rejected deadline"] == 3
    assert recorder.events["dropped expired"] == 1


def test_request_that_would_be_late_is_not_started() -> None:
    """When its turn comes its deadline has not passed, but a window takes longer than remains."""
    device, recorder = Device(), Recorder()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.seconds = 0.2
        await request(batcher, "measured")
        one, now = batcher.estimates.seconds(), time.monotonic()
        device.seconds = 0.4  # twice as long as estimated
        others = [asyncio.create_task(request(batcher, n)) for n in range(2)]
        await until_reserved(batcher, 2)
        with pytest.raises(DeadlineExceeded, match="dropped from the queue"):
            await request(batcher, "late", deadline=Deadline(now + 4.5 * one))
        assert time.monotonic() < now + 4.5 * one
        await asyncio.gather(*others)

    with_batcher(body, device, recorder=recorder, max_batch=1)
    assert [staged for _, staged in device.batches] == [["measured"], [0], [1]]
    assert recorder.events["dropped expired"] == 1


def test_request_that_would_be_late_after_the_running_batch_is_not_prepared() -> None:
    device, recorder = Device(), Recorder()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.seconds = 0.3
        await request(batcher, "measured")
        one = batcher.estimates.seconds()
        with batcher.admit(["k"], deadline=Deadline.after(1.9 * one)) as reservation:
            first = asyncio.create_task(request(batcher, "first"))
            await until_running(batcher)  # preparing it took half as long as a window runs
            with pytest.raises(DeadlineExceeded, match="dropped from the queue"):
                await reservation.submit(["late"])[0]
            assert batcher.elapsed() > 0
        await first

    with_batcher(body, device, recorder=recorder, max_batch=1)
    assert [staged for _, staged in device.batches] == [["measured"], ["first"]]
    assert recorder.events["dropped expired"] == 1


def test_request_that_just_fits_is_not_dropped_half_way() -> None:
    """Its windows that run already do not count as windows to run."""
    device, recorder = Device(), Recorder()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.seconds = 0.2
        await request(batcher, "measured")
        deadline = Deadline.after(1.3 * 6 * batcher.estimates.seconds())
        assert len(await request(batcher, *range(6), deadline=deadline)) == 6

    with_batcher(body, device, recorder=recorder, max_batch=1)
    assert not recorder.events


def test_windows_that_remain_are_estimated_by_their_own_keys() -> None:
    """Two large windows and twenty small ones: after the large ones, little time is needed."""
    device, recorder = Device(), Recorder()
    device.seconds_of = {"large": 0.3, "small": 0.01}

    async def body(batcher: Batcher[Any, Any]) -> None:
        for key in ("small", "large"):
            await request(batcher, 1, key=key)
        keys = ["large"] * 2 + ["small"] * 20
        with batcher.admit(keys, deadline=Deadline.after(1.3)) as reservation:
            await asyncio.gather(*reservation.submit(range(22)))

    with_batcher(body, device, recorder=recorder, max_batch=1)
    assert not recorder.events


def test_idle_device_runs_what_the_busy_one_could_not_in_time() -> None:
    busy, idle, recorder = Device("busy"), Device("idle"), Recorder()
    busy.seconds_of = idle.seconds_of = {"long": 0.6, "short": 0.01}

    async def body(batcher: Batcher[Any, Any]) -> None:
        for key in ("short", "long"):
            await asyncio.gather(*(request(batcher, n, key=key) for n in range(4)))
        long = asyncio.create_task(request(batcher, "long", key="long"))
        await until_running(batcher)
        for n in range(10):
            assert await request(batcher, n, key="short", deadline=Deadline.after(0.4))
        assert not long.done()
        await long

    with_batcher(body, busy, idle, recorder=recorder, max_batch=1)
    assert not recorder.events


def test_one_slow_batch_does_not_cause_rejections_forever() -> None:
    """Each rejection lowers the confidence in its measurement, until a batch can correct it."""
    device, recorder = Device(), Recorder()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.seconds = 1.0
        await request(batcher, "slow")
        device.seconds = 0.01
        for _ in range(100):
            with contextlib.suppress(DeadlineExceeded):
                with batcher.admit(["k"], deadline=Deadline.after(0.5)) as reservation:
                    await asyncio.sleep(0.02)  # as if the image was decoded
                    await reservation.submit(["quick"])[0]
                break
        # The new measurement has its full weight, and so has the old one again.
        assert batcher.estimates.seconds() == pytest.approx(0.8, abs=0.1)

    with_batcher(body, device, recorder=recorder)
    assert device.batches[-1] == ("k", ["quick"])
    assert 10 < recorder.events.total() < 25  # 1.1 * 0.95**16 < 0.5


def test_key_that_was_never_measured_is_not_rejected_forever() -> None:
    """It counts as the mean of the other keys, which may be far too long."""
    device = Device(seconds=0.5)

    async def body(batcher: Batcher[Any, Any]) -> None:
        await request(batcher, "large", key="large")
        device.seconds = 0.0
        for _ in range(50):
            with contextlib.suppress(DeadlineExceeded):
                assert await request(batcher, 1, key="small", deadline=Deadline.after(0.2))
                return
        pytest.fail("rejected fifty times")

    with_batcher(body, device)


def test_key_that_is_being_measured_keeps_its_estimate() -> None:
    """Requests with impossible deadlines do not make the estimates of others too short."""
    device = Device(seconds=0.1)

    async def body(batcher: Batcher[Any, Any]) -> None:
        await request(batcher, "measured")
        before = batcher.estimates.seconds("k")
        device.gate.clear()
        running = asyncio.create_task(request(batcher, "running"))
        await until_running(batcher)
        for _ in range(20):
            with pytest.raises(DeadlineExceeded):
                batcher.admit(["k"], deadline=Deadline.after(0.05))
        assert batcher.estimates.seconds("k") == before
        device.gate.set()
        await running
        before = batcher.estimates.seconds("k")
        with pytest.raises(DeadlineExceeded):
            batcher.admit(["k"], deadline=Deadline.after(0.05))
        assert batcher.estimates.seconds("k") < before

    with_batcher(body, device)


def test_cancelled_request_drops_its_waiting_windows() -> None:
    device, recorder = Device(), Recorder()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.gate.clear()
        cancelled = asyncio.create_task(request(batcher, *range(20)))
        await until_running(batcher)
        other = asyncio.create_task(request(batcher, "other"))
        await until_reserved(batcher, 21)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        assert cancelled.cancelled()
        assert batcher.statistics().reserved == 1
        device.gate.set()
        assert await other == [("done", "other")]

    with_batcher(body, device, recorder=recorder)
    computed = [item for _, batch in device.batches for item in batch if item != "other"]
    assert len(computed) == 4  # the batch that was running; the one that was prepared did not run
    assert recorder.events["dropped cancelled"] == 20 - 4 - 4


def test_prepared_batch_of_a_cancelled_request_is_not_run() -> None:
    device = Device()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.gate.clear()
        first = asyncio.create_task(request(batcher, "first"))
        await until_running(batcher)
        cancelled = asyncio.create_task(request(batcher, 0, 1, 2, 3))
        await until(lambda: batcher.statistics().in_flight == 5)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        device.gate.set()
        await first

    with_batcher(body, device)
    assert [batch for _, batch in device.batches] == [["first"]]
