"""The batcher with devices that fail, hang and are lost."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Sequence
from typing import Any

import pytest

from app.batching.batcher import Batcher
from app.errors import DeviceLost, OutOfMemory, Unavailable
from tests.devices import (
    Device,
    Recorder,
    assert_nothing_left,
    request,
    until,
    until_reserved,
    until_running,
    with_batcher,
)


@pytest.mark.parametrize("where", ["prepare", "run"])
def test_only_the_window_at_fault_fails(where: str) -> None:
    device, recorder = Device(), Recorder()
    if where == "run":
        device.poison["bad"] = ZeroDivisionError("mine")
    else:
        prepare_all = device.prepare

        def prepare(key: Hashable, payloads: Sequence[Any]) -> list[Any]:
            if "bad" in payloads:
                raise ZeroDivisionError("mine")
            return prepare_all(key, payloads)

        device.prepare = prepare  # type: ignore[method-assign]

    async def body(batcher: Batcher[Any, Any]) -> None:
        device.gate.clear()
        first = asyncio.create_task(request(batcher, "first"))
        await until_running(batcher)
        tasks = [asyncio.create_task(request(batcher, item)) for item in (1, 2, "bad", 3)]
        await until_reserved(batcher, 5)
        device.gate.set()
        results = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert [type(result).__name__ for result in results] == [
            "list", "list", "list", "ZeroDivisionError", "list",
        ]  # fmt: skip

    with_batcher(body, device, recorder=recorder)
    assert recorder.events["failed ZeroDivisionError"] == 3  # of four, two and one windows


def test_other_windows_of_a_failed_request_are_dropped() -> None:
    device, recorder = Device(), Recorder()
    device.poison[0] = ValueError("first window")

    async def body(batcher: Batcher[Any, Any]) -> None:
        with batcher.admit(["k"] * 50) as reservation:
            futures = reservation.submit(range(50))
            with pytest.raises(ValueError, match="first window"):
                await futures[0]
            with pytest.raises(ValueError, match="first window"):
                await futures[49]

    with_batcher(body, device, recorder=recorder)
    assert recorder.events["dropped failed"] >= 40


def test_out_of_memory_halves_the_batch_for_good() -> None:
    device, recorder = Device(), Recorder()
    device.memory = 3

    async def body(batcher: Batcher[Any, Any]) -> None:
        assert len(await request(batcher, *range(32), key="big")) == 32
        assert recorder.caps == {("device", "big"): 2}
        device.batches.clear()
        assert len(await request(batcher, *range(32), key="big")) == 32

    with_batcher(body, device, recorder=recorder, max_batch=8)
    assert max(len(batch) for _, batch in device.batches) == 2
    assert recorder.events["failed OutOfMemory"] >= 1


def test_out_of_memory_for_one_window_fails_its_request() -> None:
    device = Device()
    device.memory = 0

    async def body(batcher: Batcher[Any, Any]) -> None:
        with pytest.raises(OutOfMemory):
            await request(batcher, 1)

    with_batcher(body, device)


def test_windows_of_a_lost_device_run_on_another() -> None:
    lost, sound = Device("lost", 0.01), Device("sound", 0.01)
    lost.poison = {n: DeviceLost("illegal address") for n in range(40)}

    async def body(batcher: Batcher[Any, Any]) -> None:
        assert await request(batcher, *range(40)) == [("done", n) for n in range(40)]
        assert batcher.failure is None

    with_batcher(body, lost, sound)
    assert 1 <= len(lost.batches) <= 2


@pytest.mark.parametrize("where", ["observer", "max_batch"])
def test_bug_fails_the_device_and_every_request_gets_an_error(where: str) -> None:
    class Broken(Recorder):
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
                *(request(batcher, n) for n in range(10)), return_exceptions=True
            )
        assert all(isinstance(result, Exception) for result in results), results
        if where == "max_batch":
            assert "the engine is lost" in str(batcher.failure)

    with_batcher(body, Device(), recorder=Broken(), max_batch=max_batch)


def test_losing_the_last_device_fails_every_request_and_admits_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    device, recorder = Device(), Recorder()
    device.poison[0] = DeviceLost("illegal address")

    async def body(batcher: Batcher[Any, Any]) -> None:
        results = await asyncio.gather(
            *(request(batcher, n) for n in range(10)), return_exceptions=True
        )
        assert all(isinstance(result, Unavailable) for result in results)
        with pytest.raises(Unavailable) as rejection:
            batcher.admit(["k"])
        texts = [str(each) for each in (*results, batcher.failure, rejection.value)]
        assert not any("illegal address" in text for text in texts)

    with_batcher(body, device, recorder=recorder)
    assert any("illegal address" in message for message in caplog.messages)
    assert recorder.events["rejected dead"] == 1


def test_lack_of_host_memory_is_out_of_memory() -> None:
    device = Device()
    device.poison[0] = MemoryError("no room")

    async def body(batcher: Batcher[Any, Any]) -> None:
        with pytest.raises(OutOfMemory):
            await request(batcher, 0)
        assert await request(batcher, 1) == [("done", 1)]

    with_batcher(body, device)


def test_close_returns_although_a_device_hangs() -> None:
    device = Device()

    async def scene() -> None:
        batcher: Batcher[Any, Any] = Batcher([device], max_batch=1, capacity=9)
        await batcher.start()
        device.gate.clear()
        waiting = [asyncio.create_task(request(batcher, n)) for n in range(3)]
        await until(lambda: batcher.elapsed() > 0.05)
        await asyncio.wait_for(batcher.close(), 2)
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [Unavailable] * 3
        assert_nothing_left(batcher)
        device.gate.set()

    asyncio.run(scene())


def test_check_finds_the_loss_of_an_idle_device() -> None:
    lost, sound = Device("lost"), Device("sound")
    lost.lost = True

    async def body(batcher: Batcher[Any, Any]) -> None:
        await batcher.check_devices()
        assert batcher.failure is None
        assert await request(batcher, 1) == [("done", 1)]
        sound.lost = True
        await batcher.check_devices()
        with pytest.raises(Unavailable):
            batcher.admit(["k"])

    with_batcher(body, lost, sound)
    assert lost.batches == []


def test_bug_fails_the_device_and_leaves_no_request_waiting() -> None:
    class Broken(Recorder):
        def batch_done(self, runner: str, key: Hashable, size: int, seconds: float) -> None:
            raise KeyError("a bug")

    device = Device()

    async def body(batcher: Batcher[Any, Any]) -> None:
        tasks = [asyncio.create_task(request(batcher, item)) for item in range(3)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(each, (DeviceLost, Unavailable)) for each in results)
        assert batcher.failure is not None

    with_batcher(body, device, recorder=Broken())
