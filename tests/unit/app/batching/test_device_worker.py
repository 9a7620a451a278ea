"""One device: what becomes of a batch, and what the worker knows about its device."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from app.batching import batch_caps
from app.batching.device_worker import DeviceWorker, NotWanted, Outcome
from app.errors import DeviceLost, EngineError, OutOfMemory
from tests.devices import Device, Recorder, until


@dataclasses.dataclass
class Item:
    """One window of a batch."""

    payload: Any
    wanted: bool = True


def with_worker(
    body: Callable[[DeviceWorker], Awaitable[None]],
    device: Device,
    recorder: Recorder | None = None,
) -> None:
    async def scene() -> None:
        worker = DeviceWorker(device, recorder or Recorder())
        try:
            await asyncio.wait_for(body(worker), 20)
        finally:
            device.gate.set()
            await worker.stop()

    asyncio.run(scene())


async def compute(worker: DeviceWorker, *items: Item, key: str = "k") -> dict[Any, Any]:
    """The outcome of each payload; every item must have exactly one."""
    outcomes: list[Outcome[Item]] = []
    settled = asyncio.Event()

    def settle(some: Sequence[Outcome[Item]]) -> None:
        outcomes.extend(some)
        if len(outcomes) >= len(items):
            settled.set()

    worker.start(key, items, settle)
    await settled.wait()
    await asyncio.sleep(0)  # the last split ends
    assert sorted(id(each.item) for each in outcomes) == sorted(map(id, items))
    return {each.item.payload: each.result for each in outcomes}


def test_batch_gives_every_item_its_result() -> None:
    async def body(worker: DeviceWorker) -> None:
        assert await compute(worker, Item(1), Item(2)) == {1: ("done", 1), 2: ("done", 2)}

    device, recorder = Device(), Recorder()
    with_worker(body, device, recorder)
    assert device.batches == [("k", [1, 2])]
    assert recorder.sizes == [2]


def test_batch_that_raises_is_split_down_to_the_item_at_fault() -> None:
    device, recorder = Device(), Recorder()
    device.poison[3] = ZeroDivisionError()

    async def body(worker: DeviceWorker) -> None:
        outcomes = await compute(worker, *map(Item, range(8)))
        assert isinstance(outcomes.pop(3), ZeroDivisionError)
        assert outcomes == {n: ("done", n) for n in range(8) if n != 3}
        assert worker.max_batch("k", 8) == 8

    with_worker(body, device, recorder)
    assert recorder.events["failed ZeroDivisionError"] == 4  # of 8, 4, 2 and 1 items


def test_running_out_of_memory_lowers_the_limit_of_that_key() -> None:
    device, recorder = Device(), Recorder()
    device.memory = 3

    async def body(worker: DeviceWorker) -> None:
        assert len(await compute(worker, *map(Item, range(8)))) == 8
        assert worker.max_batch("k", 8) == 2
        assert worker.max_batch("k", 1) == 1
        assert worker.max_batch("other", 8) == 8

    with_worker(body, device, recorder)
    assert recorder.caps == {("device", "k"): 2}


def test_batch_that_ran_out_of_memory_is_gone_before_it_is_tried_again() -> None:
    class Staged(list[Any]):
        pass

    class Full(Device):
        """Has room for the windows of one batch."""

        def prepare(self, key: Any, payloads: Any) -> Any:
            end = time.monotonic() + 1  # the thread that prepared the last one may still return
            while any(each() is not None for each in alive) and time.monotonic() < end:
                time.sleep(0.001)
            assert all(each() is None for each in alive)
            staged = Staged(payloads)
            alive.append(weakref.ref(staged))
            return staged

    alive: list[weakref.ref[Staged]] = []

    device = Full()
    device.memory = 1

    async def body(worker: DeviceWorker) -> None:
        outcomes = await compute(worker, *map(Item, range(4)))
        assert outcomes == {n: ("done", n) for n in range(4)}

    device.batches = Forgetful()  # type: ignore[assignment]
    with_worker(body, device)
    assert len(alive) == 7


class Forgetful(list[Any]):
    """Keeps nothing, so that it holds no batch in memory."""

    def append(self, value: Any) -> None:
        pass


def test_lost_device_runs_nothing_more() -> None:
    device = Device()
    device.poison[1] = DeviceLost("illegal address")

    async def body(worker: DeviceWorker) -> None:
        worker.idle = True
        assert worker.available
        for _ in range(2):
            outcomes = await compute(worker, Item(1), Item(2))
            assert [type(outcome) for outcome in outcomes.values()] == [DeviceLost] * 2
        assert str(worker.failure) == "illegal address"
        assert not worker.available

    with_worker(body, device)
    assert len(device.batches) == 1


def test_batch_that_no_request_waits_for_is_not_run() -> None:
    device = Device()

    async def body(worker: DeviceWorker) -> None:
        outcomes = await compute(worker, Item(1, wanted=False), Item(2, wanted=False))
        assert [type(outcome) for outcome in outcomes.values()] == [NotWanted] * 2
        assert len(await compute(worker, Item(3, wanted=False), Item(4))) == 2

    with_worker(body, device)
    assert device.batches == [("k", [3, 4])]


def test_failed_batch_that_no_request_waits_for_is_not_tried_again() -> None:
    device, recorder = Device(), Recorder()
    device.memory = 1
    items = [Item(n) for n in range(4)]

    async def body(worker: DeviceWorker) -> None:
        device.gate.clear()
        computing = asyncio.create_task(compute(worker, *items))
        await until(lambda: worker.elapsed() > 0)
        for item in items:
            item.wanted = False
        device.gate.set()
        assert [type(each) for each in (await computing).values()] == [OutOfMemory] * 4

    with_worker(body, device, recorder)
    assert len(device.batches) == 1
    assert recorder.caps == {}


def test_error_while_preparing_counts_as_one_of_the_batch() -> None:
    class Picky(Device):
        def prepare(self, key: Any, payloads: Any) -> list[Any]:
            if "bad" in payloads:
                raise ValueError("cannot cut")
            return super().prepare(key, payloads)

    async def body(worker: DeviceWorker) -> None:
        outcomes = await compute(worker, Item(1), Item("bad"), Item(2))
        assert isinstance(outcomes.pop("bad"), ValueError)
        assert outcomes == {1: ("done", 1), 2: ("done", 2)}

    with_worker(body, Picky())


def test_wrong_number_of_results_is_an_error() -> None:
    class Generous(Device):
        def collect(self, key: Any, staged: Any) -> list[Any]:
            return [*super().collect(key, staged), "one more"]

    async def body(worker: DeviceWorker) -> None:
        outcome = (await compute(worker, Item(1)))[1]
        assert isinstance(outcome, EngineError)
        assert str(outcome) == "2 results for 1 windows"
        assert worker.measurements.seconds() is None

    with_worker(body, Generous())


def test_elapsed_and_remaining_are_of_the_batch_on_the_device() -> None:
    device = Device(seconds=0.1)

    async def body(worker: DeviceWorker) -> None:
        worker.idle = True
        await compute(worker, Item(1))
        assert (worker.elapsed(), worker.remaining()) == (0, 0)
        one = worker.measurements.seconds("k")
        assert one is not None
        assert one >= 0.1
        device.gate.clear()
        computing = asyncio.create_task(compute(worker, Item(2), Item(3)))
        await until(lambda: worker.elapsed() > 0)
        assert worker.remaining() == pytest.approx(2 * one - worker.elapsed(), abs=0.01)
        assert not worker.available
        await until(lambda: worker.elapsed() > 2 * one)
        assert worker.remaining() == 0
        device.gate.set()
        await computing

    with_worker(body, device)


def test_forget_drops_measurements_and_limits_of_a_key() -> None:
    device, recorder = Device(), Recorder()
    device.memory = 1

    async def body(worker: DeviceWorker) -> None:
        for key in ("gone", "stays"):
            await compute(worker, *map(Item, range(4)), key=key)
        worker.forget(lambda key: key == "gone")
        assert worker.max_batch("gone", 4) == 4
        assert worker.max_batch("stays", 4) == 1
        assert worker.measurements.seconds("gone") == worker.measurements.seconds("stays")

    with_worker(body, device, recorder)
    assert recorder.caps == {("device", "stays"): 1}


def test_batch_of_a_forgotten_key_is_not_measured_when_it_ends() -> None:
    device = Device()

    async def body(worker: DeviceWorker) -> None:
        device.gate.clear()
        computing = asyncio.create_task(compute(worker, Item(1)))
        await until(lambda: worker.elapsed() > 0)
        worker.forget(lambda key: key == "k")
        device.gate.set()
        await computing
        assert worker.measurements.seconds() is None

    with_worker(body, device)


@pytest.mark.parametrize(("depth", "collecting"), [(1, "cuda:0"), (2, "cuda:0 collect")])
def test_all_calls_but_preparing_and_waiting_are_made_on_one_thread(
    depth: int, collecting: str
) -> None:
    device = Device("cuda:0", depth=depth)

    async def body(worker: DeviceWorker) -> None:
        await asyncio.gather(*(compute(worker, Item(n)) for n in range(4)))
        await worker.check()
        assert await worker.call(lambda: threading.current_thread().name) == "cuda:0"

    with_worker(body, device)
    assert {name for method in ("submit", "check") for name in device.threads[method]} == {"cuda:0"}
    assert device.threads["collect"] == {collecting}
    assert device.threads["prepare"] == {"cuda:0 prepare"}


def test_loss_of_an_idle_device_is_noticed_by_a_check() -> None:
    device = Device()

    async def body(worker: DeviceWorker) -> None:
        await worker.check()
        assert worker.failure is None
        device.lost = True
        await worker.check()
        assert str(worker.failure) == "fell off the bus"
        assert worker.wake.is_set()
        assert isinstance((await compute(worker, Item(1)))[1], DeviceLost)

    with_worker(body, device)
    assert device.batches == []


def test_idle_device_that_hangs_is_noticed_by_a_check() -> None:
    device = Device()

    async def body(worker: DeviceWorker) -> None:
        device.gate.clear()
        checking = asyncio.create_task(worker.check())
        await until(lambda: worker.elapsed() > 0.05)
        device.gate.set()
        await checking
        assert worker.elapsed() == 0

    with_worker(body, device)


def test_limit_of_a_passing_lack_of_memory_is_raised_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch_caps, "_FIRST_WAIT_S", 0.0)
    device, recorder = Device(), Recorder()
    device.memory = 3

    async def body(worker: DeviceWorker) -> None:
        await compute(worker, *map(Item, range(8)))
        device.memory = 8
        while worker.max_batch("k", 8) < 8:
            await compute(worker, *map(Item, range(worker.max_batch("k", 8))))
        assert len(await compute(worker, *map(Item, range(8)))) == 8

    with_worker(body, device, recorder)
    assert len(device.batches[-1][1]) == 8
    assert recorder.caps == {}


def test_posted_call_does_not_wait_and_its_error_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = Device()

    async def body(worker: DeviceWorker) -> None:
        device.gate.clear()
        hung = asyncio.create_task(worker.check())
        await until(lambda: worker.elapsed() > 0)
        worker.post(lambda: 1 // 0)
        device.gate.set()
        await hung
        await worker.call(lambda: None)

    with_worker(body, device)
    assert caplog.messages == ["device: integer division or modulo by zero"]


def test_next_batch_may_grow_until_it_must_be_prepared() -> None:
    device = Device(seconds=0.2)

    async def body(worker: DeviceWorker) -> None:
        computing = asyncio.create_task(compute(worker, Item(1)))
        await until(lambda: worker.elapsed() > 0)
        assert worker.growing_time() is None  # nothing was measured
        await computing
        computing = asyncio.create_task(compute(worker, Item(1)))
        await until(lambda: worker.elapsed() > 0)
        growing = worker.growing_time()
        assert growing is not None
        assert 0 < growing < worker.remaining() - 0.01  # less the time to prepare
        await computing

    with_worker(body, device)
