"""The batcher alone: who is admitted, who is refused, who is too late, and who leaves."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import pytest

from app.batching.batcher import Batcher
from app.batching.deadline import Deadline
from app.batching.estimates import MARGIN
from app.errors import DeadlineExceeded, QueueFull
from tests.devices import Device, Log, ask, until, with_batcher


def test_what_does_not_fit_is_refused_at_once_with_a_time_to_come_back() -> None:
    device, log = Device(seconds=0.01), Log()

    async def body(batcher: Batcher[Any, Any]) -> None:
        await ask(batcher, *range(8))  # now the rate is known
        assert batcher.estimates.seconds() > 0
        device.gate.clear()
        held = [asyncio.create_task(ask(batcher, 1, 2)) for _ in range(5)]
        await until(lambda: batcher.elapsed() > 0 and batcher.reserved == 10)
        with pytest.raises(QueueFull) as refused:
            batcher.admit(["k"] * 2)
        assert refused.value.retry_after == pytest.approx(2 * batcher.estimates.seconds())
        with batcher.admit(["k"] * 2, ignore_capacity=True):  # the house's own
            assert batcher.reserved == 12
        device.gate.set()
        await asyncio.gather(*held)

    with_batcher(body, device, log=log, capacity=10)
    assert log.events["refused queue_full"] == 1


def test_a_giant_takes_a_quarter_of_the_places_and_its_turns() -> None:
    """Far larger than the queue, it is admitted, and everybody else is too, and is done before."""
    device = Device(seconds=0.01)

    async def body(batcher: Batcher[Any, Any]) -> None:
        giant = asyncio.create_task(ask(batcher, *range(1000)))
        await until(lambda: len(device.batches) > 2)
        deadline = Deadline.after(400 * batcher.estimates.seconds())
        for n in range(20):  # the estimate knows of turns: 1,000 windows before them are too many
            assert await ask(batcher, ("small", n), deadline=deadline) == [("done", ("small", n))]
        assert not giant.done()
        with contextlib.ExitStack() as stack:
            for _ in range(6):
                stack.enter_context(batcher.admit(["k"] * 1))
            with pytest.raises(QueueFull):
                batcher.admit(["k"] * 50)  # counts as two
            giant.cancel()
            await asyncio.gather(giant, return_exceptions=True)

    with_batcher(body, device, max_batch=1, capacity=8)


def test_the_estimate_is_of_the_keys_own_windows() -> None:
    """Small windows are not refused because large ones take long, nor large ones admitted."""
    device, log = Device(), Log()
    device.seconds_of = {"large": 0.05}

    async def body(batcher: Batcher[Any, Any]) -> None:
        for key in ("small", "large"):
            await ask(batcher, *range(8), key=key)
        assert batcher.estimates.seconds("large") > 0.04 > 0.01 > batcher.estimates.seconds("small")
        assert (
            batcher.estimates.seconds("small")
            < batcher.estimates.seconds("unseen")
            < batcher.estimates.seconds("large")
        )
        soon = Deadline.after(1)
        with pytest.raises(DeadlineExceeded):
            batcher.admit(["large"] * 40, deadline=soon)
        assert len(await ask(batcher, *range(40), key="small", deadline=soon)) == 40

    with_batcher(body, device, log=log, max_batch=1)


def test_a_reservation_cannot_be_overdrawn_or_used_after_leaving() -> None:
    async def body(batcher: Batcher[Any, Any]) -> None:
        with batcher.admit(["k"] * 2) as ticket:
            ticket.submit([1])
            with pytest.raises(ValueError, match="1 left"):
                ticket.submit([2, 3])
        with pytest.raises(ValueError, match="left"):
            ticket.submit([2])

    with_batcher(body, Device())


def test_deadlines() -> None:
    device, log = Device(), Log()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.seconds = 0.05
        await ask(batcher, *range(8))
        with pytest.raises(DeadlineExceeded) as hopeless:  # 90 windows of 12 ms in 10 ms
            batcher.admit(["k"] * 90, deadline=Deadline.after(0.01))
        assert hopeless.value.retry_after is None
        with pytest.raises(DeadlineExceeded):
            batcher.admit(["k"] * 1, deadline=Deadline.after(-1))
        device.gate.clear()
        first = asyncio.create_task(ask(batcher, *"abcdefgh"))
        await until(lambda: batcher.elapsed() > 0)
        one = batcher.estimates.seconds("k")
        with pytest.raises(DeadlineExceeded) as crowded:  # behind one window of each in its turn
            batcher.admit(["k"], deadline=Deadline.after(1.5 * one))
        assert crowded.value.retry_after == pytest.approx((2 * MARGIN - 1.5) * one, rel=0.2)
        late = asyncio.create_task(ask(batcher, "late", deadline=Deadline.after(0.3)))
        await asyncio.sleep(0.4)
        device.gate.set()
        with pytest.raises(DeadlineExceeded, match="queue"):
            await late
        await first

    with_batcher(body, device, log=log)
    assert all("late" not in batch for _, batch in device.batches)
    assert log.events["refused deadline"] == 3
    assert log.events["dropped expired"] == 1


def test_what_would_be_too_late_is_not_begun() -> None:
    """Its deadline is still ahead when its turn comes, but a window takes longer than is left."""
    device, log = Device(), Log()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.seconds = 0.2
        await ask(batcher, "known")
        one, now = batcher.estimates.seconds(), time.monotonic()
        device.seconds = 0.4  # the queue will take twice as long as it seems
        others = [asyncio.create_task(ask(batcher, n)) for n in range(2)]
        await until(lambda: batcher.reserved == 2)
        with pytest.raises(DeadlineExceeded, match="too little time"):
            await ask(batcher, "late", deadline=Deadline(now + 4.5 * one))
        assert time.monotonic() < now + 4.5 * one
        await asyncio.gather(*others)

    with_batcher(body, device, log=log, max_batch=1)
    assert [staged for _, staged in device.batches] == [["known"], [0], [1]]
    assert log.events["dropped expired"] == 1


def test_what_would_be_too_late_behind_the_batch_that_runs_is_not_prepared() -> None:
    device, log = Device(), Log()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.seconds = 0.3
        await ask(batcher, "known")
        one = batcher.estimates.seconds()
        with batcher.admit(["k"], deadline=Deadline.after(1.9 * one)) as ticket:
            first = asyncio.create_task(ask(batcher, "first"))
            await until(lambda: batcher.elapsed() > 0)  # half of one was spent preparing it
            with pytest.raises(DeadlineExceeded, match="too little time"):
                await ticket.submit(["late"])[0]
            assert batcher.elapsed() > 0
        await first

    with_batcher(body, device, log=log, max_batch=1)
    assert [staged for _, staged in device.batches] == [["known"], ["first"]]
    assert log.events["dropped expired"] == 1


def test_an_image_that_just_fits_is_not_given_up_half_way() -> None:
    """What of it runs already is not counted again."""
    device, log = Device(), Log()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.seconds = 0.2
        await ask(batcher, "known")
        deadline = Deadline.after(1.3 * 6 * batcher.estimates.seconds())
        assert len(await ask(batcher, *range(6), deadline=deadline)) == 6

    with_batcher(body, device, log=log, max_batch=1)
    assert not log.events


def test_what_is_left_of_an_image_counts_and_not_its_mean_window() -> None:
    """Two large windows and twenty small ones; once the large are done, little is left."""
    device, log = Device(), Log()
    device.seconds_of = {"large": 0.3, "small": 0.01}

    async def body(batcher: Batcher[Any, Any]) -> None:
        for key in ("small", "large"):
            await ask(batcher, 1, key=key)
        keys = ["large"] * 2 + ["small"] * 20
        deadline = Deadline.after(1.3)
        with batcher.admit(keys, deadline=deadline) as ticket:
            await asyncio.gather(*ticket.submit(range(22)))

    with_batcher(body, device, log=log, max_batch=1)
    assert not log.events


def test_an_idle_device_is_not_waited_past() -> None:
    """While one device is busy for long, the other does what its neighbour could not in time."""
    busy, idle, log = Device("busy"), Device("idle"), Log()
    busy.seconds_of = idle.seconds_of = {"long": 1.0, "short": 0.01}

    async def body(batcher: Batcher[Any, Any]) -> None:
        for key in ("short", "long"):
            await asyncio.gather(*(ask(batcher, n, key=key) for n in range(4)))
        long = asyncio.create_task(ask(batcher, "long", key="long"))
        await until(lambda: batcher.elapsed() > 0)
        for n in range(10):
            assert await ask(batcher, n, key="short", deadline=Deadline.after(0.6))
        assert not long.done()
        await long

    with_batcher(body, busy, idle, log=log, max_batch=1)
    assert not log.events


def test_one_slow_moment_does_not_turn_everybody_away_for_ever() -> None:
    """Who is refused by a measurement alone lets it count for less; the next batch corrects it."""
    device, log = Device(), Log()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.seconds = 1.0
        await ask(batcher, "slow")
        device.seconds = 0.01
        for _ in range(100):
            with contextlib.suppress(DeadlineExceeded):
                with batcher.admit(["k"], deadline=Deadline.after(0.5)) as ticket:
                    await asyncio.sleep(0.02)  # to decode it; less is left when its turn comes
                    await ticket.submit(["quick"])[0]
                break
        # a measurement is trusted again
        assert batcher.estimates.seconds() == pytest.approx(0.8, abs=0.1)

    with_batcher(body, device, log=log)
    assert device.batches[-1] == ("k", ["quick"])
    assert 10 < log.events.total() < 25  # 1.1 times 0.95 to the 16th is under a half


def test_windows_never_measured_are_not_turned_away_for_ever_either() -> None:
    """They count as the mean of the others, which may be far too much."""
    device = Device(seconds=0.5)

    async def body(batcher: Batcher[Any, Any]) -> None:
        await ask(batcher, "large", key="large")
        device.seconds = 0.0
        for _ in range(50):
            with contextlib.suppress(DeadlineExceeded):
                assert await ask(batcher, 1, key="small", deadline=Deadline.after(0.2))
                return
        pytest.fail("refused fifty times")

    with_batcher(body, device)


def test_a_measurement_that_will_be_renewed_is_not_doubted() -> None:
    """Clients that ask for the impossible do not make the others' estimates too short."""
    device = Device(seconds=0.1)

    async def body(batcher: Batcher[Any, Any]) -> None:
        await ask(batcher, "known")
        before = batcher.estimates.seconds("k")
        device.gate.clear()
        held = asyncio.create_task(ask(batcher, "held"))
        await until(lambda: batcher.elapsed() > 0)
        for _ in range(20):
            with pytest.raises(DeadlineExceeded):
                batcher.admit(["k"], deadline=Deadline.after(0.05))
        assert batcher.estimates.seconds("k") == before
        device.gate.set()
        await held
        before = batcher.estimates.seconds("k")
        with pytest.raises(DeadlineExceeded):
            batcher.admit(["k"], deadline=Deadline.after(0.05))
        assert batcher.estimates.seconds("k") < before  # nothing runs now

    with_batcher(body, device)


def test_leaving_drops_what_waits_before_it_costs_anything() -> None:
    device, log = Device(), Log()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.gate.clear()
        leaver = asyncio.create_task(ask(batcher, *range(20)))
        await until(lambda: batcher.elapsed() > 0)
        stayer = asyncio.create_task(ask(batcher, "stays"))
        await until(lambda: batcher.reserved == 21)
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        assert leaver.cancelled()
        assert batcher.reserved == 1
        device.gate.set()
        assert await stayer == [("done", "stays")]

    with_batcher(body, device, log=log)
    computed = [item for _, batch in device.batches for item in batch if item != "stays"]
    assert len(computed) == 4  # the batch that ran already; the prepared one had lost its people
    assert log.events["dropped cancelled"] == 20 - 4 - 4


def test_a_prepared_batch_of_people_who_left_is_not_run() -> None:
    device = Device()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.gate.clear()
        first = asyncio.create_task(ask(batcher, "first"))
        await until(lambda: batcher.elapsed() > 0)
        leaver = asyncio.create_task(ask(batcher, 0, 1, 2, 3))
        await until(lambda: batcher.in_flight == 5)
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        device.gate.set()
        await first

    with_batcher(body, device)
    assert [batch for _, batch in device.batches] == [["first"]]
