"""The batcher alone, with devices that fail, hang and are lost."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Sequence
from typing import Any

import pytest

from app.batching.batcher import Batcher
from app.errors import DeviceLost, EngineError, OutOfMemory, Unavailable
from tests.devices import Device, Log, ask, assert_nothing_left, until, with_batcher


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
        await until(lambda: batcher.elapsed() > 0)
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
        await until(lambda: batcher.elapsed() > 0.05)
        await asyncio.wait_for(batcher.close(), 2)
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [Unavailable] * 3
        assert_nothing_left(batcher)
        device.gate.set()

    asyncio.run(scene())
