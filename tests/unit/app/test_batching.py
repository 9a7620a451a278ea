"""The batcher alone, with devices that are plain Python."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any

import pytest

from app.batching import Batcher, Ticket
from app.errors import (
    DeadlineExceeded,
    DeviceLost,
    EngineError,
    OutOfMemory,
    QueueFull,
    Unavailable,
)
from app.lanes import Observer


class Device:
    """Gives back what it gets, tagged; can be slow, short of memory, or broken."""

    def __init__(self, name: str = "device", seconds: float = 0.0) -> None:
        self.name = name
        self.seconds = seconds
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
        time.sleep(self.seconds)
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

    def capped(self, runner: str, key: Hashable, cap: int) -> None:
        self.caps[runner, key] = cap

    def batch_done(self, runner: str, key: Hashable, size: int, seconds: float) -> None:
        self.sizes.append(size)

    def batch_failed(self, runner: str, error: BaseException) -> None:
        self.events[f"failed {type(error).__name__}"] += 1

    def refused(self, reason: str) -> None:
        self.events[f"refused {reason}"] += 1

    def dropped(self, reason: str, windows: int) -> None:
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
        await until(lambda: batcher.running_for() > 0)
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
        await until(lambda: batcher.running_for() > 0)
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
        await until(lambda: batcher.running_for() > 0)
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


def test_what_does_not_fit_is_refused_at_once_with_a_time_to_come_back() -> None:
    device, log = Device(seconds=0.01), Log()

    async def body(batcher: Batcher[Any, Any]) -> None:
        await ask(batcher, *range(8))  # now the rate is known
        assert batcher.seconds() > 0
        device.gate.clear()
        held = [asyncio.create_task(ask(batcher, 1, 2)) for _ in range(5)]
        await until(lambda: batcher.running_for() > 0 and batcher.reserved == 10)
        with pytest.raises(QueueFull) as refused:
            batcher.admit(["k"] * 2)
        assert refused.value.retry_after == pytest.approx(2 * batcher.seconds())
        with batcher.admit(["k"] * 2, bounded=False):  # the house's own
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
        deadline = asyncio.get_running_loop().time() + 400 * batcher.seconds()
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
    honest = device.run

    def run(key: Hashable, staged: list[Any]) -> list[Any]:
        time.sleep(0.05 if key == "large" else 0)
        return honest(key, staged)

    device.run = run  # type: ignore[method-assign]

    async def body(batcher: Batcher[Any, Any]) -> None:
        for key in ("small", "large"):
            await ask(batcher, *range(8), key=key)
        assert batcher.seconds("large") > 0.04 > 0.01 > batcher.seconds("small")
        assert batcher.seconds("small") < batcher.seconds("unseen") < batcher.seconds("large")
        soon = asyncio.get_running_loop().time() + 1
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
        loop = asyncio.get_running_loop()
        device.seconds = 0.05
        await ask(batcher, *range(8))
        with pytest.raises(DeadlineExceeded) as hopeless:  # 90 windows of 12 ms in 10 ms
            batcher.admit(["k"] * 90, deadline=loop.time() + 0.01)
        assert hopeless.value.retry_after is None
        with pytest.raises(DeadlineExceeded):
            batcher.admit(["k"] * 1, deadline=loop.time() - 1)
        device.gate.clear()
        first = asyncio.create_task(ask(batcher, *"abcdefgh"))
        await until(lambda: batcher.running_for() > 0)
        one = batcher.seconds()
        with pytest.raises(DeadlineExceeded) as crowded:  # behind one window of each in its turn
            batcher.admit(["k"], deadline=loop.time() + 1.5 * one)
        assert crowded.value.retry_after == pytest.approx((2 * 1.1 - 1.5) * one, rel=0.2)
        late = asyncio.create_task(ask(batcher, "late", deadline=loop.time() + 0.3))
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
        one, now = batcher.seconds(), asyncio.get_running_loop().time()
        device.seconds = 0.4  # the queue will take twice as long as it seems
        others = [asyncio.create_task(ask(batcher, n)) for n in range(2)]
        await until(lambda: batcher.reserved == 2)
        with pytest.raises(DeadlineExceeded, match="too little time"):
            await ask(batcher, "late", deadline=now + 4 * one)
        assert asyncio.get_running_loop().time() < now + 4 * one
        await asyncio.gather(*others)

    with_batcher(body, device, log=log, max_batch=1)
    assert [staged for _, staged in device.batches] == [["known"], [0], [1]]
    assert log.events["dropped expired"] == 1


def test_what_would_be_too_late_behind_the_batch_that_runs_is_not_prepared() -> None:
    device, log = Device(), Log()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.seconds = 0.3
        await ask(batcher, "known")
        one, loop = batcher.seconds(), asyncio.get_running_loop()
        with batcher.admit(["k"], deadline=loop.time() + 1.9 * one) as ticket:
            first = asyncio.create_task(ask(batcher, "first"))
            await until(lambda: batcher.running_for() > 0)  # half of one was spent preparing it
            with pytest.raises(DeadlineExceeded, match="too little time"):
                await ticket.submit(["late"])[0]
            assert batcher.running_for() > 0
        await first

    with_batcher(body, device, log=log, max_batch=1)
    assert [staged for _, staged in device.batches] == [["known"], ["first"]]
    assert log.events["dropped expired"] == 1


def test_an_image_that_just_fits_is_not_given_up_half_way() -> None:
    """What of it runs already is not counted again."""
    device, log = Device(), Log()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.seconds = 0.1
        await ask(batcher, "known")
        deadline = asyncio.get_running_loop().time() + 1.15 * 6 * batcher.seconds()
        assert len(await ask(batcher, *range(6), deadline=deadline)) == 6

    with_batcher(body, device, log=log, max_batch=1)
    assert not log.events


def test_one_slow_moment_does_not_turn_everybody_away_for_ever() -> None:
    """Who is refused by a measurement alone lets it count for less; the next batch corrects it."""
    device, log = Device(), Log()

    async def body(batcher: Batcher[Any, Any]) -> None:
        loop = asyncio.get_running_loop()
        device.seconds = 1.0
        await ask(batcher, "slow")
        device.seconds = 0.01
        for _ in range(100):
            with contextlib.suppress(DeadlineExceeded):
                await ask(batcher, "quick", deadline=loop.time() + 0.5)
                break
        assert batcher.seconds() == pytest.approx(0.8, abs=0.1)  # a measurement is trusted again

    with_batcher(body, device, log=log)
    assert device.batches[-1] == ("k", ["quick"])
    assert 10 < log.events["refused deadline"] < 20  # 1.1 times 0.95 to the 16th is under a half


def test_leaving_drops_what_waits_before_it_costs_anything() -> None:
    device, log = Device(), Log()

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.gate.clear()
        leaver = asyncio.create_task(ask(batcher, *range(20)))
        await until(lambda: batcher.running_for() > 0)
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
        await until(lambda: batcher.running_for() > 0)
        leaver = asyncio.create_task(ask(batcher, 0, 1, 2, 3))
        await until(lambda: batcher.in_flight == 5)
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        device.gate.set()
        await first

    with_batcher(body, device)
    assert [batch for _, batch in device.batches] == [["first"]]


@pytest.mark.parametrize("where", ["prepare", "run"])
def test_only_the_culprit_fails(where: str) -> None:
    device, log = Device(), Log()
    if where == "run":
        device.poison["bad"] = ZeroDivisionError("mine")
    else:
        honest = device.prepare

        def prepare(key: Hashable, items: Sequence[Any]) -> list[Any]:
            if "bad" in items:
                raise ZeroDivisionError("mine")
            return honest(key, items)

        device.prepare = prepare  # type: ignore[method-assign]

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.gate.clear()
        first = asyncio.create_task(ask(batcher, "first"))
        await until(lambda: batcher.running_for() > 0)
        tasks = [asyncio.create_task(ask(batcher, item)) for item in (1, 2, "bad", 3)]
        await until(lambda: batcher.reserved == 5)
        device.gate.set()
        results = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert [type(result).__name__ for result in results] == [
            "list", "list", "list", "ZeroDivisionError", "list",
        ]  # fmt: skip

    with_batcher(body, device, log=log)
    assert log.events["failed ZeroDivisionError"] == 3  # of four, of two, and alone


def test_the_rest_of_a_failed_image_is_dropped() -> None:
    device, log = Device(), Log()
    device.poison[0] = ValueError("first window")

    async def body(batcher: Batcher[Any, Any]) -> None:
        with batcher.admit(["k"] * 50) as ticket:
            futures = ticket.submit(range(50))
            with pytest.raises(ValueError, match="first window"):
                await futures[0]
            with pytest.raises(ValueError, match="first window"):
                await futures[49]

    with_batcher(body, device, log=log)
    assert log.events["dropped failed"] >= 40


def test_out_of_memory_halves_the_batch_and_is_remembered() -> None:
    device, log = Device(), Log()
    device.memory = 3

    async def body(batcher: Batcher[Any, Any]) -> None:
        assert len(await ask(batcher, *range(32), key="big")) == 32
        assert log.caps == {("device", "big"): 2}
        device.batches.clear()
        assert len(await ask(batcher, *range(32), key="big")) == 32

    with_batcher(body, device, log=log, max_batch=8)
    assert max(len(batch) for _, batch in device.batches) == 2
    assert log.events["failed OutOfMemory"] >= 1


def test_out_of_memory_for_a_single_window_is_its_own_failure() -> None:
    device = Device()
    device.memory = 0

    async def body(batcher: Batcher[Any, Any]) -> None:
        with pytest.raises(OutOfMemory):
            await ask(batcher, 1)

    with_batcher(body, device)


def test_a_result_of_the_wrong_length_is_an_error() -> None:
    device = Device()
    device.run = lambda key, staged: [1] * (len(staged) + 1)  # type: ignore[method-assign]

    async def body(batcher: Batcher[Any, Any]) -> None:
        with pytest.raises(EngineError, match="2 results for 1"):
            await ask(batcher, 1)

    with_batcher(body, device)


def test_two_devices_pull_from_one_queue() -> None:
    left, right = Device("left", 0.02), Device("right", 0.02)

    async def body(batcher: Batcher[Any, Any]) -> None:
        assert await ask(batcher, *range(40)) == [("done", n) for n in range(40)]

    with_batcher(body, left, right)
    assert min(len(left.batches), len(right.batches)) >= 3


def test_windows_of_a_lost_device_go_to_the_other() -> None:
    lost, sound = Device("lost", 0.01), Device("sound", 0.01)
    lost.poison = {n: DeviceLost("illegal address") for n in range(40)}

    async def body(batcher: Batcher[Any, Any]) -> None:
        assert await ask(batcher, *range(40)) == [("done", n) for n in range(40)]
        assert batcher.dead is None

    with_batcher(body, lost, sound)
    assert 1 <= len(lost.batches) <= 2


@pytest.mark.parametrize("where", ["observer", "max_batch"])
def test_a_bug_of_ours_is_a_lost_device_and_nobody_waits_for_ever(where: str) -> None:
    class Broken(Log):
        def batch_done(self, *_: object) -> None:
            if where == "observer":
                raise RuntimeError("a bug")

    def max_batch(key: Hashable) -> int:
        if where == "max_batch":
            raise RuntimeError("a bug")
        return 4

    async def body(batcher: Batcher[Any, Any]) -> None:
        async with asyncio.timeout(5):
            results = await asyncio.gather(
                *(ask(batcher, n) for n in range(10)), return_exceptions=True
            )
        assert all(isinstance(result, Exception) for result in results), results
        if where == "max_batch":
            assert "a bug" in str(batcher.dead)

    with_batcher(body, Device(), log=Broken(), max_batch=max_batch)


def test_losing_the_last_device_fails_everything_and_admits_nothing() -> None:
    device, log = Device(), Log()
    device.poison[0] = DeviceLost("illegal address")

    async def body(batcher: Batcher[Any, Any]) -> None:
        results = await asyncio.gather(
            *(ask(batcher, n) for n in range(10)), return_exceptions=True
        )
        assert all(isinstance(result, Unavailable) for result in results)
        assert "illegal address" in str(batcher.dead)
        with pytest.raises(Unavailable, match="illegal address"):
            batcher.admit(["k"] * 1)

    with_batcher(body, device, log=log)
    assert log.events["refused dead"] == 1


def test_a_hung_device_is_seen_and_does_not_keep_close_from_returning() -> None:
    device = Device()

    async def scene() -> None:
        batcher: Batcher[Any, Any] = Batcher([device], max_batch=1, capacity=9)
        await batcher.start()
        device.gate.clear()
        waiting = [asyncio.create_task(ask(batcher, n)) for n in range(3)]
        await until(lambda: batcher.running_for() > 0.05)
        await asyncio.wait_for(batcher.close(), 2)
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [Unavailable] * 3
        assert_nothing_left(batcher)
        device.gate.set()

    asyncio.run(scene())


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
        async def one() -> Ticket[Any, Any]:
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
        needed = 8 * batcher.seconds("a") + 4 * batcher.seconds("b")
        now = asyncio.get_running_loop().time
        with batcher.admit(["a", "b"] * 10):
            with pytest.raises(DeadlineExceeded, match="about"):
                batcher.admit(["a"] * 4, deadline=now() + 0.9 * needed)
            with batcher.admit(["a"] * 4, deadline=now() + 2 * needed):
                pass

    with_batcher(body, device)
